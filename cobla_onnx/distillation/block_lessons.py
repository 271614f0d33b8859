"""The lesson of a block: to give what the original's does, of what the blocks before it leave."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from cobla_onnx.allocation.problem import Float64
from cobla_onnx.autodiff.measures import Measure
from cobla_onnx.calibration.evaluation.gradient_sessions import Differentiated
from cobla_onnx.distillation.blocks import Block
from cobla_onnx.distillation.lessons import Taught, in_shards, joined, mean_of, opened_sessions
from cobla_onnx.distillation.parameters import Flat, Parameters
from cobla_onnx.distillation.streams import Stream, names_of
from cobla_onnx.runtime.pool import Pool
from cobla_onnx.runtime.session import Feeds

__all__ = ["BlockLessons", "Posed"]

ERROR = Measure("mse", None)
"""Of the tensor behind a block: the mean square relative to the target's."""


# Samples whose error is watched.
WATCHED = 32


class Posed(NamedTuple):
    """Samples before a block, and the targets behind it."""

    stream: Stream
    targets: Sequence[Feeds]


class BlockLessons:
    """A `Task`: what learns in one block.

    After Li et al. 2021, BRECQ (arXiv 2102.05426), section 3.2. A last block that has no single
    tensor behind it is to lower the loss of the model.

    Parameters
    ----------
    taught : Taught
    block : Block
    parameters : Parameters
        Of the block alone. Those without a derivative are taken out.
    posed : Posed
    pool : Pool

    Raises
    ------
    ModelError
        If the block has no gradient graph.
    """

    def __init__(
        self, taught: Taught, block: Block, parameters: Parameters, posed: Posed, pool: Pool
    ) -> None:
        self._parameters, self._posed, self._pool = parameters, posed, pool
        stream, model = posed.stream, parameters.rewritten.model
        measures: Mapping[str, Measure] = {block.end: ERROR}
        if not block.end:
            # An output at which the block begins cannot be learned by it.
            measures = {n: m for n, m in taught.measures.items() if n != stream.at}
        self._width = stream.width(block.end)
        part = stream.part(model, list(measures))
        self._inputs = names_of(part)
        first = self._feeds(range(min(self._width, self.samples)))
        self._sessions, _ = opened_sessions(part, measures, parameters, first)

    def _feeds(self, chosen: Sequence[int]) -> Feeds:
        stream = self._posed.stream
        return stream.read(chosen, stream.compressed, self._inputs)

    @property
    def samples(self) -> int:
        """Samples that are learned from."""
        return len(self._posed.targets)

    def gradient(self, values: Flat, chosen: Sequence[int]) -> tuple[float, Flat]:
        """Mean error of some samples, and its derivatives."""
        found = self._differentiated(values, chosen)
        return mean_of(found, self._parameters, values, len(chosen))

    def held_back(self, values: Flat) -> Float64:
        """Error of the first samples: it tells what explodes. The model judges what helps."""
        found = self._differentiated(values, range(min(WATCHED, self.samples)))
        return np.concatenate([each.losses for each in found]).astype(np.float64)

    def _differentiated(self, values: Flat, chosen: Sequence[int]) -> Iterator[Differentiated]:
        tensors = self._parameters.feeds(values)

        def differentiated(shard: Sequence[int]) -> Differentiated:
            feeds = self._feeds(shard)
            self._sessions.open(feeds, {})
            return self._sessions.run(feeds, joined(self._posed.targets, shard), tensors)

        shards = in_shards(chosen, self._width)
        return self._pool.map(differentiated, shards, self._pool.width, is_step=True)
