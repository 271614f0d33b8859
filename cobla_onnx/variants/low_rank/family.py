"""Candidate factorisations of a layer, with the costs and error of each at every rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.allocation import Curve
from cobla_onnx.calibration.statistics import Seen
from cobla_onnx.calibration.statistics import spectra as weighted_spectra
from cobla_onnx.graph.inventory import Refusal
from cobla_onnx.graph.layers import Layer, Reason, read_weight
from cobla_onnx.graph.macs import Shape
from cobla_onnx.graph.operators.base import operator_of
from cobla_onnx.runtime.cache import Cache
from cobla_onnx.runtime.pool import Pool
from cobla_onnx.runtime.progress import Progress, tracked
from cobla_onnx.variants.low_rank.matricisation import SCHEMES, Scheme, largest_rank, schemes_for
from cobla_onnx.variants.low_rank.ranks import RankGrid, RankRule
from cobla_onnx.variants.low_rank.units import mapped, values_units, weight_values

__all__ = ["Candidate", "Option", "add_curves", "layer_grid", "options_for"]

Spectrum: TypeAlias = "tuple[NDArray[np.float64], NDArray[np.float64] | None]"


@dataclass(frozen=True)
class Option:
    """A scheme under which a layer is smaller, and not slower, at some ranks.

    Attributes
    ----------
    scheme : Scheme
    ranks : int64 array, shape (candidates,)
        In increasing order.
    bytes_per_rank : int
    macs_per_rank : int or None
        Over all uses of the layer, None where MACs are not known.
    """

    scheme: Scheme
    ranks: NDArray[np.int64]
    bytes_per_rank: int
    macs_per_rank: int | None

    def curve(self, spectrum: Spectrum) -> Curve:
        """Combine the option's costs and ranks with its singular values and errors."""
        values, errors = spectrum
        costs = self.bytes_per_rank, self.macs_per_rank
        return Curve(self.scheme.name, values, self.ranks, *costs, errors)


@dataclass
class Candidate:
    """A layer that may be factorised, with its options.

    Attributes
    ----------
    layer : Layer
    macs : int or None
        Over all uses of the whole layer, None where they are not known.
    options : list of Option
    refusal : (Reason, str)
        Why there are no options, if there are none.
    curves : list of (Scheme, Curve)
        Curves of the options, once `add_curves` has computed them.
    """

    layer: Layer
    macs: int | None
    options: list[Option]
    refusal: tuple[Reason, str]
    curves: list[tuple[Scheme, Curve]] = field(default_factory=list)


def layer_grid(layer: Layer, rule: RankRule) -> tuple[RankGrid, bool]:
    """Ranks of a layer under a rule, and whether it is a 1 x 1 convolution."""
    blocked = layer.op == "Conv" and len(layer.shape) == 4
    return rule.convolution if blocked else rule.product, blocked and layer.shape[2:] == (1, 1)


def options_for(
    layer: Layer,
    wanted: str,
    shapes: Mapping[str, Shape],
    macs_whole: int | None,
    rule: RankRule,
) -> tuple[list[Option], tuple[Reason, str]]:
    """Schemes that make the layer smaller and not slower at some rank; else the reason why none."""
    if operator_of(layer).kind not in SCHEMES:
        return [], Refusal(Reason.OPERATOR)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(layer.stored_type)
    grid, pointwise = layer_grid(layer, rule)
    options, useful = [], False
    for scheme in schemes_for(layer, wanted):
        bytes_per_rank = scheme.params_per_rank() * dtype.itemsize
        most = largest_rank(layer, scheme)
        macs_per_rank = None
        if macs_whole is not None:
            each = [scheme.macs_per_rank(use, shapes) for use in layer.uses]
            macs_per_rank = sum(count for count in each if count is not None)
            if None in each or macs_per_rank == 0:
                continue
            useful |= most >= 1 and macs_whole >= macs_per_rank
            most = min(most, rule.most(macs_whole, macs_per_rank, pointwise=pointwise))
        useful |= most >= 1
        ranks = grid.candidates(most)
        if len(ranks):
            options.append(Option(scheme, ranks, bytes_per_rank, macs_per_rank))
    if options or not useful:
        return options, (Reason.NO_GAIN, "")
    return options, (Reason.NOT_FASTER, "" if grid.complete else str(grid))


def add_curves(
    model: onnx.ModelProto,
    candidates: Sequence[Candidate],
    seen: Seen | None,
    pool: Pool,
    cache: Cache | None,
    progress: Progress,
) -> None:
    """Compute the curves of all options, the largest layers first."""
    order = [c for c in candidates if c.options]
    order.sort(key=lambda c: max(min(o.scheme.matrix_shape()[1:]) for o in c.options), reverse=True)
    found = zip(order, _spectra(model, order, seen, pool, cache), strict=True)
    for candidate, spectra in tracked(found, len(order), partial(progress, "singular values")):
        candidate.curves = [
            (option.scheme, option.curve(spectrum))
            for option, spectrum in zip(candidate.options, spectra, strict=True)
            if spectrum is not None
        ]


def _spectra(
    model: onnx.ModelProto,
    candidates: Sequence[Candidate],
    seen: Seen | None,
    pool: Pool,
    cache: Cache | None,
) -> Iterator[list[Spectrum | None]]:
    """Yield for each candidate the spectra of its options."""
    if seen is None:
        wanted = ((c.layer, (option.scheme for option in c.options)) for c in candidates)
        for values in mapped(weight_values, values_units(model, wanted, pool, cache), pool, cache):
            yield [(one, None) for one in values.values]
        return
    units = (
        seen.unit(
            c.layer,
            [(option.scheme, int(option.ranks[-1])) for option in c.options],
            pool.carry(read_weight(model, c.layer)),
        )
        for c in candidates
    )
    for found in mapped(weighted_spectra, units, pool, cache):
        yield list(found.spectra)
