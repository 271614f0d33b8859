"""The loss of a compressed model on samples, against the original's outputs, and its gradient.

A step's samples are run in shards of a fixed size, each on one thread, and their gradients are
added in order: the result is the same to the last bit whatever the number of threads.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnx

from cobla_onnx.allocation.problem import Float64
from cobla_onnx.autodiff.measures import Measure
from cobla_onnx.calibration.evaluation.evaluator import Judge
from cobla_onnx.calibration.evaluation.gradient_sessions import (
    MOST_SHAPES,
    Differentiated,
    GradientSessions,
)
from cobla_onnx.calibration.evaluation.probe import Probe, Weights
from cobla_onnx.distillation.augmentation import Augmentation
from cobla_onnx.distillation.parameters import Flat, Parameters
from cobla_onnx.runtime.pool import Pool
from cobla_onnx.runtime.session import Feeds, open_session, run_session
from cobla_onnx.runtime.temporary import Rows
from cobla_onnx.variants.replacement import Replacement

__all__ = [
    "Lessons",
    "Split",
    "Taught",
    "in_shards",
    "joined",
    "mean_of",
    "opened_sessions",
    "taught_by",
]


class Split(NamedTuple):
    """Samples of the dataset: those that are learned from, and those that judge."""

    learned: Sequence[int]
    judged: Sequence[int]


@dataclass(frozen=True)
class Taught:
    """What is learned.

    Attributes
    ----------
    model : ModelProto
        The original, with the outputs of the loss that is learned.
    measures : dict of str to Measure
        How these are compared.
    single : Probe
        Has each sample of the calibration split as a batch of its own.
    augmentation : Augmentation, optional
        How samples vary each time that they are learned from; the original says anew what is
        right for each variant.
    seed : int
        Of the variants.
    """

    model: onnx.ModelProto
    measures: Mapping[str, Measure]
    single: Probe
    augmentation: Augmentation | None = None
    seed: int = 0


# Most samples that run at a time: convolutions of half as many take a third more time for each.
SHARD = 16


def taught_by(judge: Judge, augmentation: Augmentation | None = None, seed: int = 0) -> Taught:
    """Return the loss to learn: at a temperature between 1 and the one that decisions follow.

    At 1 a few uncertain samples dominate. At the temperature of decisions the divergence that is
    stated gets worse, since what is right about the most likely classes counts for too little.
    """
    softened = judge.softened({name: math.sqrt(t) for name, t in judge.temperatures.items()})
    single = judge.singly(judge.dataset.calibration, *softened)
    return Taught(*softened, single, augmentation, seed)


class Lessons:
    """A `Task`: parameters of replacements, on samples of a judge.

    Parameters
    ----------
    judge : Judge
    taught : Taught
    parameters : Parameters
        Of replacements in that model. Those without a derivative are taken out.
    pool : Pool
        Of threads; shards run over it.
    split : Split, optional
        Samples to learn from, out of the calibration split, and those that judge; the splits of
        the dataset by default.

    Attributes
    ----------
    taught, parameters, pool
        As given.
    learned : list of int
        Places in the calibration split of the samples that are learned from.
    width : int
        Samples that run at a time.
    blocked : dict of str to str
        Tensors that do not learn, since they have no derivative, and why.
    left_out : int
        Samples that are not learned from, since there are too many shapes.

    Raises
    ------
    ModelError
        If the model has no gradient graph.
    """

    def __init__(
        self,
        judge: Judge,
        taught: Taught,
        parameters: Parameters,
        pool: Pool,
        split: Split | None = None,
    ) -> None:
        self.taught, self.parameters, self.pool = taught, parameters, pool
        self._followed, self._stated = judge.followed, judge.selection
        if split is not None:
            self._followed = judge.on(split.judged)
            same = judge.followed is judge.selection
            self._stated = self._followed if same else judge.stated_on(split.judged)
        self._indices = {layer.name: index for index, layer in enumerate(judge.layers)}
        self._single, self._augmentation = taught.single, taught.augmentation
        self._variants = np.random.default_rng(taught.seed)
        self._original = None
        if self._augmentation is not None:
            self._original = open_session(taught.model, 1, optimized=True, part="the original")
        self.width = min(SHARD, judge.batch) if _joins(judge, self._single) else 1
        wanted = judge.dataset.calibration if split is None else split.learned
        places = {sample: place for place, sample in enumerate(judge.dataset.calibration)}
        self.learned = _of_common_shapes(self._single.batches, [places[s] for s in wanted])
        self.left_out = len(wanted) - len(self.learned)
        first = joined(self._single.batches, self.learned[: self.width])
        model = parameters.rewritten.model
        self._sessions, self.blocked = opened_sessions(model, taught.measures, parameters, first)

    @property
    def samples(self) -> int:
        """Samples that are learned from."""
        return len(self.learned)

    def gradient(self, values: Flat, chosen: Sequence[int]) -> tuple[float, Flat]:
        """Mean loss of some samples, and its derivatives."""
        tensors = self.parameters.feeds(values)

        def differentiated(batch: tuple[Feeds, Feeds]) -> Differentiated:
            feeds, expected = batch
            if self._original is not None:
                expected = self._single.targets(feeds, run_session(self._original, feeds))
            return self._sessions.run(feeds, expected, tensors)

        shards = self._shards(chosen)
        found = self.pool.map(differentiated, shards, self.pool.width, is_step=True)
        return mean_of(found, self.parameters, values, len(chosen))

    def held_back(self, values: Flat) -> Float64:
        """Loss of each sample that judges, under the values as they are stored."""
        return self._judged(self._followed, values)

    def stated(self, values: Flat) -> Float64:
        """Loss itself of each sample that judges, where decisions follow another one."""
        return self._judged(self._stated, values)

    def _judged(self, probe: Probe, values: Flat) -> Float64:
        found = probe.losses(self.weights(self.parameters.replacements(values)))
        # Sessions hold the memory of their largest run: those of other tasks are open, too.
        probe.rest()
        return found

    def weights(self, replacements: Sequence[Replacement]) -> Weights:
        """Weights that replacements stand for, and biases, as `Probe` takes them."""
        return {self._indices[each.layer.name]: (each.dense(), each.bias) for each in replacements}

    def _shards(self, chosen: Sequence[int]) -> Iterator[tuple[Feeds, Feeds]]:
        """Read samples in shards whose graphs are open, each with its targets."""
        for shard in in_shards([self.learned[number] for number in chosen], self.width):
            feeds = joined(self._single.batches, shard)
            self._sessions.open(feeds, {})
            if self._augmentation is not None:
                feeds = self._augmentation.vary(feeds, self._variants)
            yield feeds, joined(self._single.expected, shard)


def opened_sessions(
    model: onnx.ModelProto, measures: Mapping[str, Measure], parameters: Parameters, feeds: Feeds
) -> tuple[GradientSessions, dict[str, str]]:
    """Open the gradient graph of a model, or of a part, for parameters and a first batch.

    Those without a derivative are taken out; they are returned, with the reason of each.
    """

    def opened() -> GradientSessions:
        sessions = GradientSessions(model, measures, parameters.names, threads=1)
        sessions.open(feeds, {})
        return sessions

    sessions = opened()
    blocked = dict(sessions.blocked)
    if blocked:
        parameters.keep([name for name in parameters.names if name not in blocked])
        if parameters.names:
            # What has no derivative stays a constant: as an input it would have to be given.
            sessions = opened()
    return sessions, blocked


def in_shards(places: Sequence[int], width: int) -> Iterator[Sequence[int]]:
    """Cut samples into as many as may run at a time."""
    for begin in range(0, len(places), width):
        yield places[begin : begin + width]


def mean_of(
    shards: Iterable[Differentiated], parameters: Parameters, values: Flat, samples: int
) -> tuple[float, Flat]:
    """Mean loss of samples, and its derivatives, out of the sums over shards, in their order."""
    loss, total = 0.0, np.zeros(parameters.read_size, np.float32)
    for found in shards:
        loss += float(found.losses.sum())
        total += parameters.gathered(found.gradients)
    return loss / samples, parameters.pulled_back(values, total / np.float32(samples))


def _joins(judge: Judge, single: Probe) -> bool:
    """Whether samples may run together: all outputs have a row for each."""
    if not (judge.dataset.uniform and judge.dataset.joins(judge.dataset.calibration, judge.batch)):
        return False
    first = single.expected[0]
    return all(array.ndim and len(array) == 1 for array in first.values())


def _of_common_shapes(samples: Sequence[Feeds], places: Sequence[int]) -> list[int]:
    """Return those places where samples have the commonest shapes, as many as graphs are made."""
    shapes = {place: tuple(a.shape for a in samples[place].values()) for place in places}
    common = {shape for shape, _ in Counter(shapes.values()).most_common(MOST_SHAPES)}
    return [place for place in places if shapes[place] in common]


def joined(samples: Sequence[Feeds], chosen: Sequence[int]) -> Feeds:
    """Put samples together along their first axes."""
    if isinstance(samples, Rows):
        return samples.take(chosen)
    parts = [samples[number] for number in chosen]
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
