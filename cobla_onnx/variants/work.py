"""Work on layers over the pool: errors of what is proposed, and approximations without data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, TypeVar

import numpy as np
import onnx

from cobla_onnx.allocation import LayerCurves, VariantCurve
from cobla_onnx.allocation.problem import Float64
from cobla_onnx.graph.inventory import Reason, Refusal
from cobla_onnx.graph.layers import Layer, read_weight
from cobla_onnx.runtime.cache import Cache
from cobla_onnx.runtime.context import RunContext
from cobla_onnx.runtime.progress import tracked
from cobla_onnx.runtime.transfer import Carried
from cobla_onnx.variants.base import (
    Approximation,
    Asked,
    Candidate,
    ErrorUnit,
    Form,
    LayerCosts,
    LayerVariants,
    Measured,
    Proposal,
    VariantFamily,
)
from cobla_onnx.variants.from_data import FromData
from cobla_onnx.variants.registry import FAMILIES, require_family
from cobla_onnx.variants.replacement import Replacement

__all__ = [
    "approximations_of",
    "candidate",
    "measured_curves",
    "replacements_of",
    "weight_curves",
    "within_range",
]

# Share of the largest number of its type up to which a weight is approximated: approximations
# exceed it here and there. In half precision it is factors that are stored, and these are smaller.
RANGE = 0.25


class _Noting(Protocol):
    """The result of a unit of work, with its notes about its own copy of the cache."""

    @property
    def notes(self) -> list[str]:
        """What a user should know of the cache."""
        ...


Unit = TypeVar("Unit")
Result = TypeVar("Result", bound=_Noting)


def _mapped(
    work: Callable[[Unit], Result],
    units: Iterable[Unit],
    context: RunContext,
    at_most: int | None = None,
    small: bool = False,
) -> Iterator[Result]:
    """Yield ``work(unit)`` for each unit, over the pool; the cache takes over the notes."""
    for made in context.pool.map(work, units, at_most, small=small):
        if context.cache is not None:
            context.cache.notes += made.notes
        yield made


def candidate(layer: Layer, costs: LayerCosts, asked: Asked) -> Candidate:
    """Collect what all families propose for a layer.

    If none does, the first refusal counts: of the families that have forms for the layer, if any
    has.
    """
    proposals: list[Proposal] = []
    refusals: list[tuple[bool, Refusal]] = []
    for family in FAMILIES.values():
        found = family.propose(layer, costs, asked)
        if isinstance(found, Refusal):
            refusals.append((not family.forms(layer), found))
        else:
            proposals.extend(found)
    refusals.sort(key=lambda entry: entry[0])
    return Candidate(layer, costs, tuple(proposals), *(refusal for _, refusal in refusals[:1]))


def within_range(model: onnx.ModelProto, found: Candidate) -> Candidate:
    """Take back what is proposed for a weight whose approximations may overflow."""
    if not found.proposals:
        return found
    weight = read_weight(model, found.layer)
    most = float(max(weight.max(), -weight.min()))
    if most <= RANGE * float(np.finfo(np.promote_types(weight.dtype, np.float32)).max):
        return found
    refusal = Refusal(Reason.RANGE, f"numbers up to {most:.2g}")
    return replace(found, proposals=(), refusal=refusal)


def measured_curves(
    model: onnx.ModelProto,
    candidates: Sequence[Candidate],
    data: FromData | None,
    context: RunContext,
) -> Mapping[str, Sequence[tuple[Form, VariantCurve]]]:
    """Measure the errors of all proposals, the largest layers first.

    Parameters
    ----------
    data : FromData or None
        None measures the errors of the weights and not those of the outputs.

    Returns
    -------
    mapping of str to sequence of (Form, VariantCurve)
        By the layer's name; without proposals whose errors cannot be measured.
    """
    order = [c for c in candidates if c.proposals]
    order.sort(key=lambda c: max(p.most for p in c.proposals), reverse=True)
    tasks = [(c, family, its) for c in order for family, its in _by_family(c)]
    units = (_error_unit(model, c.layer, family, its, data, context) for c, family, its in tasks)
    # Units that wait would hold the second moments of the largest layers.
    at_most = None if data is None else context.pool.runs_at_most
    found = zip(tasks, _mapped(_measure, units, context, at_most, small=True), strict=True)
    result: dict[str, list[tuple[Form, VariantCurve]]] = defaultdict(list)
    for (c, family, its), measured in tracked(
        found, len(tasks), partial(context.progress, "singular values")
    ):
        for proposal, errors, spectrum in zip(its, measured.errors, measured.spectra, strict=True):
            writable = None if errors is None else _writable(proposal, errors)
            if writable is not None:
                curve = family.curve(c.layer, c.costs, *writable, spectrum)
                result[c.layer.name].append((proposal.form, curve))
    return result


def _writable(proposal: Proposal, errors: Float64) -> tuple[Proposal, Float64] | None:
    """Leave out the levels that cannot be written; None where there is no other."""
    levels = proposal.levels[np.isfinite(errors[proposal.levels])]
    if not len(levels):
        return None
    finite = np.where(np.isfinite(errors), errors, 0.0)
    descending = np.maximum.accumulate(finite[::-1])[::-1]
    return replace(proposal, levels=levels), descending


def _by_family(found: Candidate) -> Iterator[tuple[VariantFamily, list[Proposal]]]:
    for family in FAMILIES.values():
        its = [p for p in found.proposals if p.form.name in family.schemes]
        if its:
            yield family, its


def _error_unit(
    model: onnx.ModelProto,
    layer: Layer,
    family: VariantFamily,
    proposals: Sequence[Proposal],
    data: FromData | None,
    context: RunContext,
) -> ErrorUnit:
    weight = context.pool.carry(read_weight(model, layer))
    maker = None if data is None else data.maker(family)
    return family.unit(layer, proposals, weight, context.cache, maker)


def _measure(unit: ErrorUnit) -> Measured:
    return unit.measure()


def weight_curves(
    model: onnx.ModelProto, variants: Sequence[LayerVariants], context: RunContext
) -> tuple[LayerCurves, ...]:
    """Return the curves of layers with the errors of the weights in place of those of outputs."""
    tasks = [(place, *task) for place, each in enumerate(variants) for task in _by_curve(each)]
    units = (
        _error_unit(model, variants[place].layer, family, its, None, context)
        for place, family, _, its in tasks
    )
    curves = [list(each.curves.curves) for each in variants]
    made = zip(tasks, _mapped(_measure, units, context), strict=True)
    for (place, _, numbers, _), measured in made:
        for number, errors, spectrum in zip(
            numbers, measured.errors, measured.spectra, strict=True
        ):
            assert errors is not None
            curve = curves[place][number]
            curves[place][number] = replace(curve, errors=errors, spectrum=spectrum)
    return tuple(
        replace(each.curves, curves=tuple(its)) for each, its in zip(variants, curves, strict=True)
    )


def _by_curve(
    variants: LayerVariants,
) -> Iterator[tuple[VariantFamily, list[int], list[Proposal]]]:
    """Yield each family with the numbers of its curves, and with what they were made from."""
    for family in FAMILIES.values():
        numbers = [k for k, form in enumerate(variants.forms) if form.name in family.schemes]
        if numbers:
            curves, forms = variants.curves.curves, variants.forms
            most = [family.most(variants.layer, forms[k]) for k in numbers]
            pairs = zip(numbers, most, strict=True)
            yield family, numbers, [Proposal(forms[k], curves[k].levels, m) for k, m in pairs]


@dataclass(frozen=True)
class _LevelUnit:
    """A layer, and the form and level at which its weight is wanted.

    The family travels with it: a worker may not have those that are registered here.
    """

    family: VariantFamily
    layer: Layer
    form: Form
    level: int
    weight: Carried
    cache: Cache | None


@dataclass(frozen=True)
class _Made:
    approximation: Approximation
    notes: list[str]


@dataclass(frozen=True)
class _Replaced:
    replacement: Replacement
    notes: list[str]


def approximations_of(
    model: onnx.ModelProto, wanted: Iterable[tuple[Layer, Form, int]], context: RunContext
) -> Iterator[Approximation]:
    """Yield approximations of weights themselves, each at a form and a level."""
    for made in _mapped(_approximate, _level_units(model, wanted, context), context):
        yield made.approximation


def replacements_of(
    model: onnx.ModelProto, wanted: Iterable[tuple[Layer, Form, int]], context: RunContext
) -> Iterator[Replacement]:
    """Yield what replaces layers by approximations of their weights themselves."""
    for made in _mapped(_replace, _level_units(model, wanted, context), context):
        yield made.replacement


def _level_units(
    model: onnx.ModelProto, wanted: Iterable[tuple[Layer, Form, int]], context: RunContext
) -> Iterator[_LevelUnit]:
    for layer, form, level in wanted:
        weight = context.pool.carry(read_weight(model, layer))
        family = require_family(form.name)
        yield _LevelUnit(family, layer, form, level, weight, context.cache)


def _approximate(unit: _LevelUnit) -> _Made:
    cache = None if unit.cache is None else unit.cache.fresh()
    weight = unit.weight.array
    made = unit.family.from_weights(unit.layer, unit.form, unit.level, weight, cache)
    return _Made(made, [] if cache is None else cache.notes)


def _replace(unit: _LevelUnit) -> _Replaced:
    made = _approximate(unit)
    return _Replaced(unit.family.replace(unit.layer, unit.form, made.approximation), made.notes)
