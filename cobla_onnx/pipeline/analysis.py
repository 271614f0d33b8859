"""Analyse a model for the allocation: its layers, their costs and their singular values."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import numpy as np
import onnx

from cobla_onnx.allocation import Budget, Choice, Constraint, Curve, LayerCurves
from cobla_onnx.calibration.statistics import Seen
from cobla_onnx.errors import BudgetError, ModelError, UsageError
from cobla_onnx.graph.io.model_file import stored_bytes
from cobla_onnx.graph.layers import (
    Inventory,
    Layer,
    Reason,
    Skipped,
    find_layers,
    node_label,
)
from cobla_onnx.graph.macs import COUNTED, Shape, fixed_input_shapes, infer_shapes, node_macs
from cobla_onnx.pipeline.reach import ranks_in_reach
from cobla_onnx.plan import Decision, FactorsFrom, Plan
from cobla_onnx.runtime.cache import Cache
from cobla_onnx.runtime.pool import Pool, open_pool
from cobla_onnx.runtime.progress import Progress
from cobla_onnx.runtime.session import measured_shapes
from cobla_onnx.text import matching
from cobla_onnx.variants.low_rank.family import Candidate, add_curves, layer_grid, options_for
from cobla_onnx.variants.low_rank.matricisation import Scheme, schemes_for
from cobla_onnx.variants.low_rank.ranks import EVERY_RANK, RankRule
from cobla_onnx.wording import either, option_name

__all__ = ["Analysis", "analyse", "model_costs"]


@dataclass(frozen=True)
class Analysis:
    """A model's layers with the cost and the loss of every rank.

    Attributes
    ----------
    layers : tuple of Layer
        Layers that may be factorised, with their `curves`, `schemes` and `macs`.
    curves : tuple of LayerCurves
    schemes : tuple of tuple of Scheme
        Schemes, in the order of the layer's curves.
    macs : tuple of int or None
        MACs of each layer over all its uses.
    skipped : tuple of Skipped
    mem_total : int
        Bytes of all constant tensors of the model.
    mac_total : int or None
        MACs of the model; None if not known.
    input_shapes : dict of str to Shape
    notes : tuple of str
    seen : Seen or None
        Statistics of the layers on the calibration data.
    shapes : dict of str to Shape
        Shapes of the model's tensors, as far as known.
    time_total : int or None
        Nanoseconds of one run of the model, if its layers were timed.
    """

    layers: tuple[Layer, ...]
    curves: tuple[LayerCurves, ...]
    schemes: tuple[tuple[Scheme, ...], ...]
    macs: tuple[int | None, ...]
    skipped: tuple[Skipped, ...]
    mem_total: int
    mac_total: int | None
    input_shapes: dict[str, Shape]
    notes: tuple[str, ...]
    seen: Seen | None = None
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    time_total: int | None = None

    def constraints(self, budget: Budget) -> tuple[Constraint, ...]:
        """Turn a budget into hard integer constraints over the layers' choices."""
        return budget.constraints(self.curves, self.mem_total, self.mac_total, self.time_total)

    def curves_under(self, rule: RankRule) -> tuple[LayerCurves, ...]:
        """Curves with only the ranks that a rule allows, without layers that keep none."""
        result = []
        for layer, curves in zip(self.layers, self.curves, strict=True):
            grid, pointwise = layer_grid(layer, rule)
            kept = []
            for curve in curves.curves:
                most = int(curve.ranks[-1])
                if curves.macs_whole is not None and curve.macs_per_rank is not None:
                    costs = curves.macs_whole, curve.macs_per_rank
                    most = min(most, rule.most(*costs, pointwise=pointwise))
                ranks = np.intersect1d(grid.candidates(most), curve.ranks)
                if len(ranks):
                    kept.append(replace(curve, ranks=ranks))
            if kept:
                result.append(replace(curves, curves=tuple(kept)))
        return tuple(result)

    def limits(self, budget: Budget) -> dict[str, int]:
        """Absolute limits of a budget, in bytes, MACs and nanoseconds."""
        return {constraint.name: constraint.limit for constraint in self.constraints(budget)}

    def plan(self, choices: Iterable[Choice | None], factors: FactorsFrom = "data") -> Plan:
        """Convert the choices of an allocation to a plan."""
        return Plan(
            tuple(
                Decision(layer.name)
                if choice is None
                else Decision(layer.name, curves.curves[choice.curve].scheme, choice.rank)
                for layer, curves, choice in zip(self.layers, self.curves, choices, strict=True)
            ),
            factors,
        )

    def resolve(self, decision: Decision) -> tuple[Layer, Scheme, int]:
        """Look up the layer, scheme and rank of a decision to factorise.

        Raises
        ------
        UsageError
            If the layer, the scheme or the rank does not exist.
        """
        index = self._index(decision.layer)
        found = {scheme.name: scheme for scheme in schemes_for(self.layers[index])}
        scheme = found.get(decision.scheme or "")
        if scheme is None:
            raise UsageError(
                f"plan: layer {decision.layer!r} has no scheme {decision.scheme!r}; "
                f"it has {', '.join(found)}"
            )
        full_rank = min(scheme.matrix_shape()[1:])
        if decision.rank is None or not 1 <= decision.rank <= full_rank:
            raise UsageError(
                f"plan: layer {decision.layer!r} has ranks 1 to {full_rank}, not {decision.rank}"
            )
        return self.layers[index], scheme, decision.rank

    def _index(self, name: str) -> int:
        for index, layer in enumerate(self.layers):
            if layer.name == name:
                return index
        close = difflib.get_close_matches(name, [layer.name for layer in self.layers], 3)
        hint = f"did you mean {', '.join(close)}?" if close else "see the names in the report"
        raise UsageError(f"plan: there is no layer {name!r} to factorise; {hint}")

    def curve(self, decision: Decision) -> Curve | None:
        """Return the curve of a decision; None for a layer kept whole."""
        curves = self.curves[self._index(decision.layer)].curves
        return next((c for c in curves if c.scheme == decision.scheme), None)

    def layer_macs(self, decision: Decision) -> int | None:
        """MACs of a layer after a decision."""
        index = self._index(decision.layer)
        curve = self.curve(decision)
        if curve is None or decision.rank is None:
            return self.macs[index]
        return None if curve.macs_per_rank is None else curve.macs_per_rank * decision.rank

    def macs_after(self, plan: Plan) -> int | None:
        """MACs of the whole model after a plan; None if not known."""
        total = self.mac_total
        for decision in plan.decisions:
            after, before = self.layer_macs(decision), self.macs[self._index(decision.layer)]
            if total is None or after is None or before is None:
                return None
            total += after - before
        return total


def analyse(
    model: onnx.ModelProto,
    *,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    min_size: int = 0,
    scheme: str = "auto",
    macs_needed: bool = False,
    threads: int = 1,
    progress: Progress = lambda stage, done, total: None,
    see: Callable[[Sequence[Layer]], Seen] | None = None,
    weigh: bool = True,
    ranks: RankRule = EVERY_RANK,
    pool: Pool | None = None,
    cache: Cache | None = None,
    budgets: Sequence[Budget] = (),
    refine: bool = False,
    refuse: Callable[[BudgetError, Analysis], BudgetError] = lambda error, analysis: error,
    unmeasured: Collection[str] = (),
) -> Analysis:
    """Find a model's layers, count their costs and compute their singular values.

    With `see`, which collects statistics on the calibration data, singular values and errors are
    those of the layers' outputs and not of their weights, unless `weigh` is False. Layers are
    mapped over `pool`, by default over `threads` of this process. `ranks` decides the candidate
    ranks. The layers named in `unmeasured` stay whole: no loss would see their errors.

    Raises
    ------
    UsageError
        If a pattern matches nothing, or a shape that MACs need is missing.
    ModelError
        If a weight is damaged.
    """
    inventory = _select(find_layers(model), include, exclude, min_size)
    known = fixed_input_shapes(model, input_shapes or {})
    shapes, macs, notes = model_costs(model, known, macs_needed, threads)
    total = None if macs is None else sum(macs.values())
    notes += _warnings(model, inventory)
    inventory = _without_unmeasured(inventory, unmeasured)
    skipped = list(inventory.skipped)
    taken: list[Layer] = []
    for layer in inventory.layers:
        if _vector_meets_batch(layer, shapes):
            detail = "a stack of matrices meets a vector, or data of unknown rank"
            skipped.append(Skipped(layer.name, layer.op, Reason.NOT_A_MATRIX, detail, layer.params))
        else:
            taken.append(layer)

    def candidates(rule: RankRule) -> list[Candidate]:
        return [_candidate(layer, scheme, shapes, macs, rule) for layer in taken]

    rules = [ranks, *(ranks.finer() if refine and not ranks.complete else ())]
    mem_total = stored_bytes(model)
    try:
        found, used = ranks_in_reach(budgets, rules, candidates, mem_total, total)
    except BudgetError as error:
        able = tuple(c.layer for c in candidates(rules[-1]) if c.options)
        costs = Analysis(able, (), (), (), tuple(skipped), mem_total, total, known, notes)
        raise refuse(error, costs) from error
    if used is not ranks:
        notes += (
            "the budget is out of reach with the ranks that are computed without waste; smaller "
            "ones were added, which save less time than MACs",
        )
    seen = None if see is None else see(taken)
    with nullcontext(pool) if pool is not None else open_pool(threads) as working:
        add_curves(model, found, seen if weigh else None, working, cache, progress)
    layers, curves, schemes, layer_macs = [], [], [], []
    for candidate in found:
        layer = candidate.layer
        if not candidate.curves:
            skipped.append(Skipped(layer.name, layer.op, *candidate.refusal, layer.params))
            continue
        layers.append(layer)
        schemes.append(tuple(one for one, _ in candidate.curves))
        layer_macs.append(candidate.macs)
        its_curves = tuple(curve for _, curve in candidate.curves)
        curves.append(LayerCurves(layer.name, layer.stored_bytes, candidate.macs, its_curves))
    return Analysis(
        tuple(layers),
        tuple(curves),
        tuple(schemes),
        tuple(layer_macs),
        tuple(skipped),
        mem_total,
        total,
        known,
        notes,
        seen,
        shapes,
    )


def _candidate(
    layer: Layer,
    scheme: str,
    shapes: Mapping[str, Shape],
    macs: Mapping[int, int] | None,
    rule: RankRule,
) -> Candidate:
    whole = None if macs is None else sum(macs[use.node] for use in layer.uses)
    return Candidate(layer, whole, *options_for(layer, scheme, shapes, whole, rule))


def _vector_meets_batch(layer: Layer, shapes: Mapping[str, Shape]) -> bool:
    """Whether a product of two factors would broadcast differently from the single product."""
    if layer.op != "MatMul" or len(layer.shape) == 2:
        return False
    return any(len(shapes.get(use.data) or ()) < 2 for use in layer.uses)


def _without_unmeasured(inventory: Inventory, unmeasured: Collection[str]) -> Inventory:
    """Leave out the layers named in `unmeasured`, whose errors no loss would see."""
    blind = [layer for layer in inventory.layers if layer.name in unmeasured]
    skipped = [Skipped(x.name, x.op, Reason.UNMEASURED, "", x.params) for x in blind]
    kept = tuple(layer for layer in inventory.layers if layer.name not in unmeasured)
    return replace(inventory, layers=kept, skipped=(*inventory.skipped, *skipped))


def _warnings(model: onnx.ModelProto, inventory: Inventory) -> tuple[str, ...]:
    inputs = {value.name for value in model.graph.input}
    if any(layer.source in inputs for layer in inventory.layers):
        return (
            "weights are also listed as graph inputs, so onnxruntime does not use its fast "
            "layouts; they are taken as constant",
        )
    return ()


def _select(
    inventory: Inventory, include: Sequence[str], exclude: Sequence[str], min_size: int
) -> Inventory:
    names = [layer.name for layer in inventory.layers]
    names += [item.name for item in inventory.skipped]
    meant: dict[str, set[str]] = {}
    for option, patterns in (("include", include), ("exclude", exclude)):
        found = meant[option] = set()
        for pattern in patterns:
            its = matching(pattern, names)
            found |= its
            if not its:
                close = difflib.get_close_matches(pattern, names, 3, 0.4)
                hint = f"did you mean {', '.join(close)}?" if close else "see the report's names"
                shown = either(python=f"{option}=[{pattern!r}]", command=f"--{option} {pattern!r}")
                raise UsageError(f"{shown}: matches no layer; {hint}")
    layers, skipped = [], list(inventory.skipped)
    for layer in inventory.layers:
        included = not include or layer.name in meant["include"]
        if layer.name in meant["exclude"] or not included:
            skipped.append(Skipped(layer.name, layer.op, Reason.EXCLUDED, "", layer.params))
        elif layer.params < min_size:
            skipped.append(Skipped(layer.name, layer.op, Reason.TOO_SMALL, "", layer.params))
        else:
            layers.append(layer)
    return replace(inventory, layers=tuple(layers), skipped=tuple(skipped))


def model_costs(
    model: onnx.ModelProto, known: Mapping[str, Shape], needed: bool, threads: int
) -> tuple[dict[str, Shape], dict[int, int] | None, tuple[str, ...]]:
    """Shapes and MACs; where shape inference does not reach, from one run."""
    shapes = infer_shapes(model, known)
    macs, unknown = node_macs(model, shapes)
    if not unknown:
        return shapes, macs, ()
    open_inputs = [n for n, shape in known.items() if None in shape]
    if open_inputs:
        if needed:
            example = {n: ["?" if d is None else d for d in known[n]] for n in open_inputs}
            raise UsageError(
                f"{option_name('mac')}: the MACs of {len(unknown)} nodes are not known, "
                f"{unknown[0]!r} among them, since axes of the input are open; fill in the ? of "
                f"{option_name('input_shapes', example)}"
            )
        return shapes, None, ("MACs are not known; give --input-shape to count them",)
    missing = set(unknown)
    wanted: list[str] = []
    for index, node in enumerate(model.graph.node):
        if node.op_type in COUNTED and node_label(node, index) in missing:
            wanted.extend(name for name in (*node.input[:2], node.output[0]) if name)
    stored = {t.name for t in model.graph.initializer} | {v.name for v in model.graph.input}
    names = [name for name in dict.fromkeys(wanted) if name not in stored]
    try:
        shapes.update(measured_shapes(model, names, known, threads))
    except ModelError as error:
        if needed:
            raise
        return shapes, None, (f"MACs are not known: {error.in_flags()}",)
    macs, unknown = node_macs(model, shapes)
    note = "shapes that ONNX shape inference does not give were read from a run in onnxruntime"
    return shapes, None if unknown else macs, (note,)
