"""Let the blocks of a model learn one after another, each from what those before it leave."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from cobla_onnx.calibration.moments import Taps
from cobla_onnx.distillation.augmentation import Augmentation
from cobla_onnx.distillation.block_lessons import BlockLessons, Posed
from cobla_onnx.distillation.blocks import Block, cut_tensors, find_blocks
from cobla_onnx.distillation.lessons import Lessons, joined
from cobla_onnx.distillation.parameters import Flat, Parameters
from cobla_onnx.distillation.record import BLOCKS
from cobla_onnx.distillation.streams import Chosen, Stream, kept
from cobla_onnx.distillation.training import Cycles, State, Trainer
from cobla_onnx.errors import ModelError
from cobla_onnx.graph.subgraph import prefix
from cobla_onnx.runtime.session import Feeds
from cobla_onnx.variants.rewrite import rewrite

__all__ = ["BlockTrainer", "Cuts", "cuts_of"]

# Most bytes of the tensors at a cut, of all samples and their variants. There are four of them at a
# time, on disk: of both models, before and behind a block.
LIMIT = 1 << 30
# Passes that learn from one variant of a sample. To bring a variant to all blocks takes as long as
# to learn from it once.
PER_VARIANT = 4


class Cuts(NamedTuple):
    """How a model is cut into blocks.

    Attributes
    ----------
    blocks : list of Block
        With less than two there is nothing that the model as a whole would not do.
    largest : int
        Bytes of the largest tensor at a cut, of the sample with the largest inputs.
    joined : set of str
        Tensors at cuts of which samples join along the first axis.
    """

    blocks: list[Block]
    largest: int
    joined: set[str]


class BlockTrainer(Cycles):
    """Runs cycles in which each block in turn learns to give what the original's gives.

    They are judged by the loss of the whole model, as those of a `Trainer` are. A block alone is
    not: the blocks behind it have learned from what it leaves.

    Parameters
    ----------
    lessons : Lessons
    cuts : Cuts
    start : float32 array, shape (parameters,)
    options
        Those of `Cycles`; a checkpoint is behind each block.
    """

    stage = BLOCKS

    def __init__(self, lessons: Lessons, cuts: Cuts, start: Flat, **options: Any) -> None:
        super().__init__(State(start.copy(), lessons.held_back(start)), **options)
        self.lessons = lessons
        self._blocks, self._largest, self._joined = cuts

    def cycle(self, passes: int, rate: float) -> State | None:
        """Let each block learn for some passes; see `Cycles`."""
        self._begin()
        state = replace(self.first, whole=False)
        try:
            for number, (values, error) in enumerate(self._learned(passes, rate), 1):
                whole = number == len(self._blocks)
                if self._each or whole or self.is_over:
                    state = State(values, self.lessons.held_back(values), whole)
                    self._note(number, error, state)
        except ModelError:
            # A number overflows its type, or a part does not run.
            self.undone += 1
            return None
        if self._explodes(state):
            self.undone += 1
            return None
        return state

    def _learned(self, passes: int, rate: float) -> Iterator[tuple[Flat, float | None]]:
        """Yield the values behind each block, and its error on what it has learned from."""
        taught, parameters, pool = self.lessons.taught, self.lessons.parameters, self.lessons.pool
        values = self.first.values.copy()
        stream, copies = self._stream(passes)
        for number, block in enumerate(self._blocks):
            if self.is_over:
                return
            try:
                posed = Posed(stream, stream.targets(taught, block.end, pool))
                own = parameters.of(block.names)
                task = BlockLessons(taught, block, own, posed, pool)
                error = self._learn(task, own, values, math.ceil(passes / copies), rate)
                if number + 1 < len(self._blocks):
                    made = rewrite(taught.model, parameters.replacements(values))
                    stream = stream.moved(block.end, posed.targets, made, pool)
            except KeyboardInterrupt:
                self._clock.interrupted = True
                return
            yield values.copy(), error
            self._progress(self.checkpoints[-1].shown, number + 1, len(self._blocks))

    def _learn(
        self, task: BlockLessons, own: Parameters, values: Flat, passes: int, rate: float
    ) -> float | None:
        """Let a block learn, into `values`; return its error in the last pass."""
        if not own.names:
            return None
        places = self.lessons.parameters.places(own.names)
        trainer = Trainer(
            task,
            values[places],
            own.sizes(),
            clock=self._clock,
            share=self._share,
            seed=self._seed,
            each=False,
        )
        state = trainer.cycle(passes, rate)
        if state is not None:
            values[places] = state.values
        self.steps += trainer.steps
        self.undone += trainer.undone
        return trainer.checkpoints[-1].loss

    def _stream(self, passes: int) -> tuple[Stream, int]:
        """Return the samples at the model's inputs, and how many variants of each there are."""
        lessons, taught = self.lessons, self.lessons.taught
        places = lessons.learned
        inputs: Sequence[Feeds] = Chosen(taught.single.batches, places)
        expected: Sequence[Feeds] | None = Chosen(taught.single.expected, places)
        copies = 1
        if taught.augmentation is not None:
            room = LIMIT // max(1, self._largest * len(places))
            copies = max(1, min(math.ceil(passes / PER_VARIANT), room))
            numbers = all(array.dtype.kind in "biuf" for array in inputs[0].values())
            varied = _variants(inputs, taught.augmentation, copies, self._seed)
            inputs = kept(varied, lessons.width if numbers else 1)
            expected = None
        return Stream(inputs, lessons.width, self._joined, expected=expected), copies


def _variants(
    samples: Sequence[Feeds], augmentation: Augmentation, copies: int, seed: int
) -> Iterator[Feeds]:
    rng = np.random.default_rng(seed)
    for _ in range(copies):
        for feeds in samples:
            yield augmentation.vary(feeds, rng)


def cuts_of(lessons: Lessons) -> Cuts:
    """Cut the model of some lessons where the tensors of all their samples have room."""
    parameters, model = lessons.parameters, lessons.taught.model
    made = {name for node in model.graph.node for name in node.output}
    rewritten = parameters.rewritten.model
    names = [name for name in cut_tensors(rewritten, parameters.names) if name in made]
    samples = Chosen(lessons.taught.single.batches, lessons.learned)
    first = 0
    if lessons.width == 1:
        # Others than those that run together may be of several shapes.
        sizes_of = [sum(array.nbytes for array in feeds.values()) for feeds in samples]
        first = int(np.argmax(sizes_of))
    taps = Taps(prefix(model, names), names, 1)
    alone = taps.run(samples[first])
    pair = taps.run(joined(samples, [0, 1])) if lessons.width > 1 else {}
    sizes = {name: array.nbytes for name, array in alone.items() if array.dtype.kind == "f"}
    room = LIMIT // len(samples)
    known = {name for name, size in sizes.items() if size <= room}
    blocks = find_blocks(rewritten, parameters.names, known)
    ends = [block.end for block in blocks if block.end]
    return Cuts(
        blocks,
        max((sizes[end] for end in ends), default=0),
        {end for end in ends if end in pair and _doubles(alone[end].shape, pair[end].shape)},
    )


def _doubles(one: Sequence[int], two: Sequence[int]) -> bool:
    """Whether two samples make a tensor that is twice as long as that of one, of length 1."""
    return bool(one) and (1, *one[1:]) == tuple(one) and (2, *one[1:]) == tuple(two)
