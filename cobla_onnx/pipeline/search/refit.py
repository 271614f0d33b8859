"""Refit the chosen layers one after the other, on the inputs that compressed layers produce.

Which of a layer's candidates is best, the factors before refit among them, is decided where the
layer is: by the error of its own outputs on the held-back samples, which needs their moments alone.
Whether the network gains is asked a few times on the way, after about as many layers each time. In
models of so few layers that it is asked at each, it also chooses between the candidates.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.calibration.evaluation.graph_cut import Frontier
from cobla_onnx.calibration.evaluation.probe import Pair, Probe
from cobla_onnx.calibration.moment import Joint
from cobla_onnx.calibration.patches import (
    WIDE,
    ReadPatch,
    finite_outputs,
    has_products,
    read_patch_of,
)
from cobla_onnx.calibration.positions import Chosen
from cobla_onnx.graph.layers import Layer, read_weight
from cobla_onnx.pipeline.search.walk import Request, VectorPair, Walk
from cobla_onnx.runtime.pool import open_pool
from cobla_onnx.runtime.session import Feeds
from cobla_onnx.variants.base import Approximation
from cobla_onnx.variants.low_rank.approximation import LowRankWeight
from cobla_onnx.variants.low_rank.matricisation import schemes_for
from cobla_onnx.variants.low_rank.regression import fitted_rows, refit_second
from cobla_onnx.variants.low_rank.shrinkage import shrink_joint
from cobla_onnx.variants.low_rank.svd import Float64
from cobla_onnx.variants.low_rank.weighted_svd import inputs_first
from cobla_onnx.variants.registry import require_family
from cobla_onnx.variants.replacement import Replacement

__all__ = ["ChosenLayer", "refit_layers", "replaced_weights", "replacements_for"]

# Strengths of the ridge towards the original weight; that with the least held-back error is used.
RIDGES = (0.1, 0.01)
# Variance below this fraction of the energy is what single precision left of a constant.
CONSTANT = 1e-6
# Bytes of moments, of which each candidate that is made at a time takes a few copies.
SYSTEMS = 1 << 26
# Times that the loss of the whole network is measured on the way.
CHECKS = 8


Trial: TypeAlias = tuple[list[Approximation], dict[int, Pair]]
"""Approximations of all chosen layers, and the same as `Probe` takes them."""


@dataclass(frozen=True)
class ChosenLayer:
    """A layer that is replaced.

    Attributes
    ----------
    index : int
        Of the layer in the probe.
    layer : Layer
    form : Form
    level : int
    approximation : Approximation
        Of the family that the form belongs to.
    importance : float64 array, optional
        How much each of the layer's outputs counts.
    """

    index: int
    layer: Layer
    form: Any
    level: int
    approximation: Any
    importance: Float64 | None = None


def refit_layers(
    model: onnx.ModelProto,
    chosen: Sequence[ChosenLayer],
    batches: Callable[[], Iterable[Feeds]],
    selection: Probe,
    *,
    threads: int,
    before: float | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[Approximation], int]:
    """Refit each layer in topological order, and keep refits where they help.

    A section of layers is refitted by the least error of each layer's outputs on the selection
    split, and keeps its refits if the loss there falls. Where a section is a single layer, the
    loss decides between its candidates, too. Layers with no approximated layer before them have
    nothing to refit.

    Parameters
    ----------
    model : ModelProto
        The original.
    chosen : sequence of ChosenLayer
    batches : callable
        Gives a fresh iterator over the calibration split.
    selection : Probe
        Has the samples of the selection split, and evaluates the loss there.
    before : float, optional
        The loss there before refit, if it is known.

    Returns
    -------
    approximations : list of Approximation
        In the order of `chosen`.
    kept : int
        How many layers were changed.
    """
    order = sorted(range(len(chosen)), key=lambda i: chosen[i].layer.uses[0].node)
    weights = replaced_weights(chosen, [entry.approximation for entry in chosen])
    best = selection.loss(weights) if before is None else before
    selection.rest()
    layers = {entry.index: entry.layer for entry in chosen}
    walk = Walk(model, layers, batches, selection.batches, threads)
    able = [i for i in order if _refits(model, chosen[i]) and walk.is_moved(chosen[i].layer)]
    work = _Work(chosen, walk, selection, [_Refit(model, chosen[i]) for i in able], threads)
    trial: Trial = [entry.approximation for entry in chosen], weights
    total, steps = max(len(able), 1), itertools.count()

    def advance() -> None:
        progress(next(steps), total)

    for section in _sections(able):
        place, trials = work.trials(section, trial, advance)
        least, answer = best, None
        for found in trials:
            if any(found[0][position] is not trial[0][position] for position in section):
                loss = work.loss(place, found[1])
                if loss < least:
                    least, answer = loss, found
        selection.rest()
        if answer is None:
            walk.place = place
        else:
            best, trial = least, answer
        # The tensors there are kept no longer than they may be needed.
        del place
    progress(total, total)
    made = zip(trial[0], chosen, strict=True)
    return trial[0], sum(found is not entry.approximation for found, entry in made)


@dataclass
class _Work:
    """What refits layers, section by section.

    Attributes
    ----------
    chosen : sequence of ChosenLayer
    walk : Walk
    selection : Probe
    ahead : list of _Refit
        Of the layers that are still to be refitted, in their order.
    threads : int
    """

    chosen: Sequence[ChosenLayer]
    walk: Walk
    selection: Probe
    ahead: list[_Refit]
    threads: int

    def trials(
        self, section: Sequence[int], trial: Trial, advance: Callable[[], None]
    ) -> tuple[Frontier, list[Trial]]:
        """Refit the layers of a section, each on what those before it became.

        Of several layers each becomes the best of its candidates, where it gains; of a single one
        all candidates are returned. Also returns the place of the walk before the first of them.
        """
        for number, position in enumerate(section):
            advance()
            refit = self.ahead.pop(0)
            # While the network chooses, a section is seen by itself: the next one reads the answer.
            single = len(section) == 1
            beside = len(self.ahead) if single else len(section) - number - 1
            following = [each.request for each in self.ahead]
            joints = self.walk.joint(refit.request, trial[1], following, beside)
            ranked = refit.candidates(joints, self.threads)
            entry = self.chosen[position]
            if number == 0:
                place = self.walk.place
            if single:
                return place, [_replaced(trial, position, entry, made) for _, made in ranked]
            gain, made = ranked[0]
            if gain > 0:
                trial = _replaced(trial, position, entry, made)
        return place, [trial]

    def loss(self, place: Frontier, weights: dict[int, Pair]) -> float:
        """Loss on the selection split, from a place of the walk on where that is faster."""
        if place.at_start or not self.selection.reopens:
            return self.selection.loss(weights)
        names = self.selection.measures
        return self.selection.loss_of(self.walk.outputs(place, weights, names))


def _replaced(trial: Trial, position: int, entry: ChosenLayer, made: Approximation) -> Trial:
    """Return a trial with another approximation of a layer."""
    approximations = list(trial[0])
    approximations[position] = made
    return approximations, trial[1] | replaced_weights([entry], [made])


def _refits(model: onnx.ModelProto, entry: ChosenLayer) -> bool:
    """Whether a layer can be refitted: where vectors are wide, unrounded factors alone.

    A tied weight has outputs of several kinds, and no one regression.
    """
    if entry.layer.readings or not has_products(model, entry.layer):
        return False
    if _is_wide(model, entry):
        return type(entry.approximation) is LowRankWeight
    return require_family(entry.form.name).refits


def _is_wide(model: onnx.ModelProto, entry: ChosenLayer) -> bool:
    """Whether a layer's vectors are too wide for their second moment."""
    return read_patch_of(model, entry.layer, entry.layer.uses[0]).size > WIDE


def _sections(items: Sequence[int]) -> Iterator[Sequence[int]]:
    """Cut a sequence into at most `CHECKS` parts of about the same length."""
    count = min(CHECKS, len(items))
    edges = [number * len(items) // max(count, 1) for number in range(count + 1)]
    for start, end in itertools.pairwise(edges):
        yield items[start:end]


def replaced_weights(
    chosen: Sequence[ChosenLayer], approximations: Sequence[Approximation]
) -> dict[int, Pair]:
    """Approximated weight and bias of each chosen layer, in the form that `Probe` takes.

    In the types of the layers: in double precision all of them are several times the model.
    """
    found: dict[int, Pair] = {}
    for entry, approximation in zip(chosen, approximations, strict=True):
        # The approximation itself would keep what it multiplies out.
        made = copy.copy(approximation)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(entry.layer.type)
        found[entry.index] = np.asarray(made.weight, dtype), made.bias
    return found


def replacements_for(
    chosen: Sequence[ChosenLayer], approximations: Sequence[Approximation]
) -> list[Replacement]:
    """Return what is stored for each chosen layer."""
    return [
        require_family(entry.form.name).replace(entry.layer, entry.form, made)
        for entry, made in zip(chosen, approximations, strict=True)
    ]


class _Refit:
    """Refits one layer to the original's outputs on the inputs after compression.

    Where vectors are too wide for their second moment, the first of two factors stays.
    """

    def __init__(self, model: onnx.ModelProto, entry: ChosenLayer) -> None:
        self._model, self._entry = model, entry
        self._family = require_family(entry.form.name)
        self._scheme = schemes_for(entry.layer)[0]
        self._first: Float64 | None = None
        if _is_wide(model, entry):
            self._first = inputs_first(entry.form, entry.approximation.factors)[0]

    @cached_property
    def request(self) -> Request:
        """What is asked of the walk."""
        layer = self._entry.layer
        patches = [read_patch_of(self._model, layer, use) for use in layer.uses]
        # Ridge and shrinkage are far above the rounding of single precision.
        exact = layer.type == onnx.TensorProto.DOUBLE
        pairing = [partial(_paired, patch, self._first) for patch in patches]
        groups, outputs, size = self._scheme.rows_of(np.broadcast_to(np.int8(0), layer.shape)).shape
        if self._first is not None:
            size = self._first.shape[2]
        return Request(layer, pairing, (groups, outputs, size), exact)

    @cached_property
    def _rows(self) -> Float64:
        """The weight from which the refit sets out, shape (groups, outputs, size)."""
        if self._first is None:
            weight = read_weight(self._model, self._entry.layer)
            return self._scheme.rows_of(weight).astype(np.float64)
        return inputs_first(self._entry.form, self._entry.approximation.factors)[1].swapaxes(1, 2)

    def candidates(
        self, joints: tuple[Joint, Joint], threads: int
    ) -> list[tuple[float, Approximation]]:
        """Refit the layer under each ridge; the best first, each with what it gains.

        By the error of the layer's outputs on the samples held back.

        Parameters
        ----------
        joints : tuple of Joint
            Over the calibration split, and over the samples held back.
        threads : int
            Ridges at a time, where memory has room.
        """
        old, (joint, held_back) = self._entry.approximation, joints
        inputs = joint.inputs
        own_bias = old.bias is not None
        inner, cross = shrink_joint(
            *(_centred(joint) if own_bias else (inputs.second, joint.cross)),
            self._rows,
            inputs.effective,
            np.zeros_like(inputs.mean) if own_bias else inputs.mean,
        )
        before = self._error(held_back, copy.copy(old))

        def under(ridge: float) -> tuple[float, Approximation]:
            made = self._fitted(inner, cross, ridge)
            if own_bias:
                reached = np.einsum("gos,gs->go", self._rows_of(made), inputs.mean)
                made = made.with_bias((joint.mean - reached).reshape(old.bias.shape))
            gain = before - self._error(held_back, made)
            # Another one, which does not keep what is multiplied out.
            return gain, replace(made)

        at_once = min(threads, len(RIDGES), max(1, SYSTEMS // inner.nbytes))
        with open_pool(at_once) as pool:
            found = list(pool.map(under, RIDGES, is_step=True))
        return sorted(found, key=lambda pair: -pair[0])

    def _fitted(self, inner: Float64, cross: Float64, ridge: float) -> Any:
        entry, old = self._entry, self._entry.approximation
        if self._first is not None:
            factors = refit_second(entry.form, old.factors, inner, cross, ridge)
            return LowRankWeight(entry.form, factors, None)
        weight = self._scheme.weight_of(fitted_rows(self._rows, inner, cross, ridge))
        return self._family.refit(
            entry.layer, entry.form, entry.level, weight, inner, entry.importance
        )

    def _rows_of(self, made: Any) -> Float64:
        """What turns the vectors of the walk into outputs, shape (groups, outputs, size)."""
        if self._first is None:
            return np.asarray(self._scheme.rows_of(made.weight))
        begin, last = inputs_first(self._entry.form, made.factors)
        # The first factor was rescaled: so are its measured outputs, column by column.
        before = np.linalg.norm(self._first, axis=1)
        scale = np.linalg.norm(begin, axis=1) / np.where(before > 0, before, 1.0)
        signs = np.sign(np.einsum("gsr,gsr->gr", begin, self._first))
        return np.asarray((last * (scale * signs)[:, :, None]).swapaxes(1, 2))

    def _error(self, joint: Joint, made: Any) -> float:
        return joint.squared_error(self._rows_of(made), made.bias, self._entry.importance)


def _centred(joint: Joint) -> tuple[Float64, Float64]:
    """Covariances of inputs, and of outputs with inputs; none of inputs that never change."""
    inner, cross = joint.inputs.covariance(), joint.covariance()
    traces = (np.einsum("gii->g", moment) for moment in (inner, joint.inputs.second))
    changes = np.greater(next(traces), CONSTANT * next(traces))[:, None, None]
    return inner * changes, cross * changes


def _paired(
    patch: ReadPatch,
    first: Float64 | None,
    data: NDArray[Any],
    output: NDArray[Any],
    chosen: Chosen,
) -> Iterator[VectorPair]:
    """Yield input vectors (through the first factor, if given) beside output vectors."""
    outputs = finite_outputs(patch.outputs(output, chosen.index))
    done = 0
    for vectors in patch.vectors(data, chosen.index, chosen.each):
        read = vectors if first is None else first.swapaxes(1, 2) @ vectors.astype(np.float64)
        count = read.shape[2]
        yield read, outputs[:, :, done : done + count]
        done += count
