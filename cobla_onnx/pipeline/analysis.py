"""Analyse a model for the allocation: its layers, and the costs and errors of their variants."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.allocation import Budget, Choice, Constraint, LayerCurves, VariantCurve
from cobla_onnx.allocation.pruning import undominated
from cobla_onnx.calibration.statistics import Seen
from cobla_onnx.errors import BudgetError, UsageError
from cobla_onnx.graph.layers import Layer, Reason, Skipped
from cobla_onnx.graph.macs import Shape, fixed_input_shapes
from cobla_onnx.graph.protos import opset_of
from cobla_onnx.pipeline.branches import Followed
from cobla_onnx.pipeline.reach import ranks_in_reach
from cobla_onnx.pipeline.select import (
    Selection,
    counted,
    readable,
    selected,
    warnings_of,
    without_unmeasured,
)
from cobla_onnx.plan import Decision, FactorsFrom, Plan
from cobla_onnx.runtime.context import RunContext
from cobla_onnx.runtime.shapes import model_costs
from cobla_onnx.text import quoted
from cobla_onnx.variants.base import Asked, Candidate, Form, LayerCosts, LayerVariants
from cobla_onnx.variants.coded_factors.form import split_name
from cobla_onnx.variants.from_data import FromData
from cobla_onnx.variants.low_rank.folded import FOLDED_FROM
from cobla_onnx.variants.low_rank.ranks import EVERY_RANK, RankRule
from cobla_onnx.variants.registry import forms_of, require_family
from cobla_onnx.variants.work import candidate, measured_curves, within_range

__all__ = ["Analysis", "Reach", "analyse"]


@dataclass(frozen=True)
class Analysis:
    """A model's layers with the cost and the loss of all that may become of them.

    Attributes
    ----------
    variants : tuple of LayerVariants
        The layers that may be replaced.
    skipped : tuple of Skipped
    mem_total : int
        Bytes of all constant tensors of the model, as it was given.
    mac_total : int or None
        MACs of the model; None if not known.
    input_shapes : dict of str to Shape
    notes : tuple of str
    from_data : FromData or None
        What makes approximations from the calibration data.
    shapes : dict of str to Shape
        Shapes of the model's tensors, as far as known.
    time_total : int or None
        Nanoseconds of one run of the model, if its layers were timed.
    mem_saved : int
        Bytes of constants that it stored more than once, and that are gone.
    folding : bool
        Whether variants may be written folded, see `LayerCosts`.
    """

    variants: tuple[LayerVariants, ...]
    skipped: tuple[Skipped, ...]
    mem_total: int
    mac_total: int | None
    input_shapes: dict[str, Shape]
    notes: tuple[str, ...]
    from_data: FromData | None = None
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    time_total: int | None = None
    mem_saved: int = 0
    folding: bool = False

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The layers that may be replaced."""
        return tuple(each.layer for each in self.variants)

    @cached_property
    def curves(self) -> tuple[LayerCurves, ...]:
        """Costs and errors of each layer's variants."""
        return tuple(each.curves for each in self.variants)

    @cached_property
    def forms(self) -> tuple[tuple[Form, ...], ...]:
        """Forms of each layer, in the order of its curves."""
        return tuple(each.forms for each in self.variants)

    @cached_property
    def macs(self) -> tuple[int | None, ...]:
        """MACs of each layer over all its uses."""
        return tuple(each.macs for each in self.variants)

    @property
    def totals(self) -> dict[str, int | None]:
        """Costs of the model by the name of the resource; None where not known."""
        return {"mem": self.mem_total, "mac": self.mac_total, "latency": self.time_total}

    @property
    def saved(self) -> dict[str, int]:
        """What of the totals is gone before any choice."""
        return {"mem": self.mem_saved}

    def with_curves(self, curves: Sequence[LayerCurves]) -> Analysis:
        """Return the same layers with other curves."""
        pairs = zip(self.variants, curves, strict=True)
        return replace(self, variants=tuple(replace(each, curves=its) for each, its in pairs))

    def with_times(
        self, total: int, variants: Sequence[LayerVariants], slower: Sequence[Skipped]
    ) -> Analysis:
        """Return an analysis of timed layers.

        Parameters
        ----------
        total : int
            Nanoseconds of one run of the model.
        variants, slower
            What `time_layers` gives.
        """
        skipped = (*self.skipped, *slower)
        return replace(self, variants=tuple(variants), skipped=skipped, time_total=total)

    def constraints(self, budget: Budget) -> tuple[Constraint, ...]:
        """Turn a budget into hard integer constraints over the layers' choices."""
        return budget.constraints(self.curves, self.totals, self.saved)

    def under(self, rule: RankRule) -> Analysis:
        """Return the analysis with only the ranks that a rule allows, and layers that have any."""

        def allowed(each: LayerVariants, form: Form, curve: VariantCurve) -> NDArray[np.int64]:
            family = require_family(form.name)
            return family.allowed(each.layer, form, curve.levels, self._costs(each), rule)

        return self.with_levels(allowed)

    def with_levels(
        self, levels_of: Callable[[LayerVariants, Form, VariantCurve], NDArray[np.int64]]
    ) -> Analysis:
        """Return the analysis with only these levels of each curve, and layers that have any."""
        kept, skipped = [], list(self.skipped)
        for each in self.variants:
            layer, pairs = each.layer, []
            for form, curve in zip(each.forms, each.curves.curves, strict=True):
                levels = levels_of(each, form, curve)
                if len(levels):
                    pairs.append((form, curve.only(np.isin(curve.levels, levels))))
            if pairs:
                curves = replace(each.curves, curves=tuple(curve for _, curve in pairs))
                kept.append(replace(each, curves=curves, forms=tuple(form for form, _ in pairs)))
            else:
                skipped.append(Skipped(layer.name, layer.op, Reason.NO_GAIN, "", layer.params))
        return replace(self, variants=tuple(kept), skipped=tuple(skipped))

    def limits(self, budget: Budget) -> dict[str, int]:
        """Absolute limits of a budget, in bytes, MACs and nanoseconds."""
        return {constraint.name: constraint.limit for constraint in self.constraints(budget)}

    def plan(self, choices: Iterable[Choice | None], factors: FactorsFrom = "data") -> Plan:
        """Convert the choices of an allocation to a plan."""
        pairs = zip(self.variants, choices, strict=True)
        return Plan(tuple(self._decision(each, choice) for each, choice in pairs), factors)

    def _decision(self, variants: LayerVariants, choice: Choice | None) -> Decision:
        layer = variants.layer
        if choice is None:
            return Decision(layer.name)
        form, costs = variants.forms[choice.curve], self._costs(variants)
        folded = require_family(form.name).folds(layer, form, choice.level, costs)
        return Decision(layer.name, form.name, choice.level, folded)

    def _costs(self, variants: LayerVariants) -> LayerCosts:
        return LayerCosts(variants.macs, self.shapes, self.folding)

    def taking(self, plan: Plan) -> Plan:
        """Return a plan without layers that it keeps and that are left alone anyway.

        Other options propose other layers: a plan made with bits names those without ranks.
        """
        left = {item.name for item in self.skipped} - {layer.name for layer in self.layers}
        taken = [d for d in plan.decisions if d.scheme is not None or d.layer not in left]
        return replace(plan, decisions=tuple(taken))

    def resolve(self, decision: Decision) -> tuple[Layer, Form, int]:
        """Look up the layer, form and level of a decision to replace a layer.

        Raises
        ------
        UsageError
            If the layer, the scheme or the rank does not exist.
        """
        layer = self.layers[self._index(decision.layer)]
        found = forms_of(layer)
        form = found.get(decision.scheme or "")
        if form is None:
            # As plans spell them, with bits in a field of their own.
            scheme, bits = split_name(decision.scheme or "")
            wanted = quoted(scheme) if bits is None else f"{quoted(scheme)} in {bits} bits"
            there_are = ", ".join(dict.fromkeys(split_name(name)[0] for name in found))
            raise UsageError(
                f"plan: layer {quoted(decision.layer)} has no scheme {wanted}; it has {there_are}"
            )
        family = require_family(form.name)
        if decision.folded and not family.can_fold(layer, form):
            raise UsageError(
                f"plan: layer {quoted(decision.layer)} has no folded form of scheme "
                f'{quoted(split_name(form.name)[0])}; leave out "folded"'
            )
        return layer, form, family.check_level(layer, form, decision.rank)

    def _index(self, name: str) -> int:
        for index, layer in enumerate(self.layers):
            if layer.name == name:
                return index
        close = difflib.get_close_matches(name, [layer.name for layer in self.layers], 3)
        hint = f"did you mean {', '.join(close)}?" if close else "see the names in the report"
        left = {item.name: f"it is left alone: {item}" for item in self.skipped}
        hint = left.get(name, hint)
        raise UsageError(f"plan: there is no layer {name!r} to compress; {hint}")

    def curve(self, decision: Decision) -> VariantCurve | None:
        """Return the curve of a decision; None for a layer kept whole."""
        curves = self.curves[self._index(decision.layer)].curves
        return next((c for c in curves if c.scheme == decision.scheme), None)

    def layer_macs(self, decision: Decision) -> int | None:
        """MACs of a layer after a decision."""
        whole = self.macs[self._index(decision.layer)]
        # A plan may ask for what was not proposed, such as bits without `--precision`.
        if whole is None or decision.scheme is None or decision.folded:
            return whole
        layer, form, level = self.resolve(decision)
        costs = LayerCosts(whole, self.shapes)
        return require_family(form.name).macs(layer, form, level, costs)

    def macs_after(self, plan: Plan) -> int | None:
        """MACs of the whole model after a plan; None if not known."""
        total = self.mac_total
        for decision in plan.decisions:
            after, before = self.layer_macs(decision), self.macs[self._index(decision.layer)]
            if total is None or after is None or before is None:
                return None
            total += after - before
        return total


@dataclass(frozen=True)
class Reach:
    """Which budgets the ranks must reach.

    Attributes
    ----------
    budgets : sequence of Budget
    refine : bool
        Whether smaller ranks are added for budgets that are out of reach otherwise.
    refuse : callable
        Explains the error if no budget can be met, given an analysis of costs alone.
    """

    budgets: Sequence[Budget] = ()
    refine: bool = False
    refuse: Callable[[BudgetError, Analysis], BudgetError] = lambda error, analysis: error


ALL_LAYERS, EVERYTHING, NO_BUDGETS = Selection(), Asked("auto", EVERY_RANK), Reach()


def analyse(
    model: onnx.ModelProto,
    selection: Selection = ALL_LAYERS,
    asked: Asked = EVERYTHING,
    *,
    context: RunContext | None = None,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    macs_needed: bool = False,
    see: Callable[[Sequence[Layer]], Seen] | None = None,
    weigh: bool = True,
    reach: Reach = NO_BUDGETS,
    comparing: bool = False,
    unmeasured: Collection[str] = (),
    followed: Followed | None = None,
) -> Analysis:
    """Find a model's layers, count their costs and measure the errors of their variants.

    With `see`, which collects statistics on the calibration data, errors are those of the layers'
    outputs and not of their weights, unless `weigh` is False. With bits, candidates that others
    beat are left out, and factors that save no time multiplied out, or left out where that cannot
    be, unless families are compared with each other (`comparing`). The layers named in `unmeasured`
    stay whole: no loss would see their errors. With `followed`, whose model is `model`, layers and
    bytes of branches that data never takes are told and counted, and bytes that were stored more
    than once.

    Raises
    ------
    UsageError
        If a pattern matches nothing, or a shape that MACs need is missing.
    ModelError
        If a weight is damaged.
    BudgetError
        If costs alone show that no budget can be met.
    """
    context = context or RunContext()
    followed = followed or Followed(model, model)
    inventory = selected(followed.inventory, selection)
    known = fixed_input_shapes(model, input_shapes or {})
    shapes, macs, notes = model_costs(model, known, macs_needed, context.threads)
    notes += warnings_of(model, inventory)
    inventory = without_unmeasured(inventory, unmeasured)
    taken, skipped = readable(model, inventory, shapes, weighted=see is not None)
    taken, skipped, each_macs, total = counted(
        model, shapes, taken, skipped, macs, needed=macs_needed
    )
    # Whoever asks for bits has weights made when a session opens anyway; but what is made then does
    # not compute in 8 bits.
    quick = bool(asked.bits) and not (asked.computed or asked.ranks.faster or comparing)
    folding = quick and opset_of(model) >= FOLDED_FROM
    costs = [LayerCosts(count, shapes, folding, quick) for count in each_macs]
    size, saved = followed.stored_bytes + followed.saved, followed.saved
    bare = Analysis(
        (), skipped, size, total, known, notes, None, shapes, mem_saved=saved, folding=folding
    )
    candidates, more = _in_reach(bare, taken, costs, asked, reach)
    candidates = [within_range(model, each) for each in candidates]
    data = None if see is None else FromData(see([c.layer for c in candidates if c.proposals]))
    curves = measured_curves(model, candidates, data if weigh else None, context)
    variants, refused = [], []
    for each in candidates:
        pairs = curves.get(each.layer.name)
        if pairs and asked.bits and not comparing:
            pairs = _worthwhile(pairs)
        if pairs:
            variants.append(_variants(each, pairs))
        else:
            refused.append(_refused(each))
    return replace(
        bare,
        variants=tuple(variants),
        skipped=(*skipped, *refused),
        notes=notes + more,
        from_data=data,
    )


def _in_reach(
    bare: Analysis,
    layers: Sequence[Layer],
    costs: Sequence[LayerCosts],
    asked: Asked,
    reach: Reach,
) -> tuple[Sequence[Candidate], tuple[str, ...]]:
    """Return the candidates with which most budgets can be met, and notes."""

    def under(rule: RankRule) -> list[Candidate]:
        its = replace(asked, ranks=rule)
        return [candidate(x, cost, its.of(x)) for x, cost in zip(layers, costs, strict=True)]

    ranks = asked.ranks
    rules = [ranks, *(ranks.finer() if reach.refine and not ranks.complete else ())]
    try:
        found, used = ranks_in_reach(reach.budgets, rules, under, bare.totals, bare.saved)
    except BudgetError as error:
        able = [c for c in under(rules[-1]) if c.proposals]
        of_costs = replace(bare, variants=tuple(_variants(c, ()) for c in able), shapes={})
        raise reach.refuse(error, of_costs) from error
    if used is ranks:
        return found, ()
    return found, (
        "the budget is out of reach with the ranks that are computed without waste; smaller "
        "ones were added, which save less time than MACs",
    )


def _variants(found: Candidate, pairs: Sequence[tuple[Form, VariantCurve]]) -> LayerVariants:
    curves = found.curves([curve for _, curve in pairs])
    return LayerVariants(found.layer, found.costs.macs, curves, tuple(form for form, _ in pairs))


def _worthwhile(pairs: Sequence[tuple[Form, VariantCurve]]) -> Sequence[tuple[Form, VariantCurve]]:
    """Leave out candidates that others beat: with bits, there are many forms of each scheme."""
    masks = undominated([curve for _, curve in pairs])
    marked = zip(pairs, masks, strict=True)
    return [(form, curve.only(mask)) for (form, curve), mask in marked if mask.any()]


def _refused(found: Candidate) -> Skipped:
    layer, why = found.layer, found.refusal
    reason, detail = (Reason.NO_GAIN, "") if why is None else (why.reason, why.detail)
    return Skipped(layer.name, layer.op, reason, detail, layer.params)
