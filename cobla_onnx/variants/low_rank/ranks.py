"""Choose the candidate ranks: those that the hardware computes without waste."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["EVERY_RANK", "RankGrid", "RankMultiple", "RankRule", "rank_rule"]

RankMultiple: TypeAlias = "Literal['auto'] | int"
# Properties of onnxruntime's CPU kernels, measured with AVX-512 in single precision: ranks that are
# not multiples of 4 leave the blocked layout; below about 128 they are padded to whole blocks; two
# 1 x 1 convolutions are not faster than one above 0.8 of its MACs.
STEP, PADDED_BELOW, POINTWISE_SHARE = 4, 128, 0.8
# Ranks below a block, for latency budgets: the measurement shows what padding or leaving the
# blocked layout costs, and few channels may be worth it.
SMALL = (1, 4, 8)
# For other execution providers: matrix units take operands in multiples of 8.
OTHER_STEP = 8


@dataclass(frozen=True)
class RankGrid:
    """Ranks that are multiples of `block` below `blocked_below`, and of `step` above.

    Those in `small` are on the grid, too.

    Examples
    --------
    >>> RankGrid(4, block=16, blocked_below=32).candidates(40)
    array([16, 32, 36, 40])
    >>> RankGrid(4, block=16, blocked_below=32, small=(1, 8)).candidates(40)
    array([ 1,  8, 16, 32, 36, 40])
    """

    step: int = 1
    block: int = 1
    blocked_below: int = 0
    small: tuple[int, ...] = ()

    def candidates(self, most: int) -> NDArray[np.int64]:
        """Return the ranks from 1 to `most` that are on the grid, ascending."""
        ranks = np.arange(1, most + 1, dtype=np.int64)
        unit = np.where(ranks < self.blocked_below, self.block, self.step)
        found: NDArray[np.int64] = ranks[(ranks % unit == 0) | np.isin(ranks, self.small)]
        return found

    @property
    def complete(self) -> bool:
        """Whether every rank is on the grid."""
        return self.step == 1 and (self.block == 1 or self.blocked_below <= 1)

    def __str__(self) -> str:
        small = ", ".join([*map(str, self.small), ""])
        return f"ranks are {small}multiples of {self.block if self.blocked_below else self.step}"


@dataclass(frozen=True)
class RankRule:
    """Rules for the candidate ranks of a layer.

    Attributes
    ----------
    convolution : RankGrid
        For two-dimensional convolutions, which onnxruntime computes in blocks of channels.
    product : RankGrid
        For all other layers.
    faster : bool
        Whether a choice must have fewer MACs than the whole layer, not just no more.
    pointwise_share : float
        Most MACs that the factors of a 1 x 1 convolution may have, as a fraction of its own.
    """

    convolution: RankGrid = RankGrid()
    product: RankGrid = RankGrid()
    faster: bool = False
    pointwise_share: float = 1.0

    def finer(self) -> Iterator[RankRule]:
        """Yield rules with ever smaller ranks added, for budgets that the grid cannot reach.

        Halves of the least rank come first, so that as few ranks as possible are off the grid;
        the last rule allows all ranks, however slow.
        """
        small: tuple[int, ...] = ()
        rank = max(self.convolution.block, self.convolution.step, self.product.step) // 2
        while rank:
            small = (rank, *small)
            yield replace(
                self,
                convolution=replace(self.convolution, small=small),
                product=replace(self.product, small=small),
            )
            rank //= 2
        yield EVERY_RANK

    @property
    def complete(self) -> bool:
        """Whether every rank may be chosen that is worth its MACs."""
        return self.convolution.complete and self.product.complete

    def most(self, macs_whole: int, macs_per_rank: int, *, pointwise: bool) -> int:
        """Return the largest rank that is worth its MACs."""
        if not self.faster:
            return macs_whole // macs_per_rank
        share = self.pointwise_share if pointwise else 1.0
        return min((macs_whole - 1) // macs_per_rank, int(share * macs_whole / macs_per_rank))


EVERY_RANK = RankRule()


def rank_rule(
    multiple: RankMultiple, *, mac: bool, latency: bool, block: int, cpu: bool = True
) -> RankRule:
    """Return the rule for ranks under the budgets that are set.

    Parameters
    ----------
    multiple : 'auto' or int
        ``auto`` allows every rank if memory alone is limited. Otherwise, on the CPU, those
        that its convolutions compute without waste, with 1, 4 and 8 where time is measured;
        on other providers multiples of 8.
    mac, latency : bool
        Whether there is such a budget. With a MAC budget alone, choices that would not be
        faster are excluded by their MACs; a latency budget uses measured times instead.
    block : int
        Channels in a block of the CPU's convolutions.
    cpu : bool
        Whether the model runs on the CPU.
    """
    timed = mac or latency
    if multiple != "auto":
        convolution = product = RankGrid(multiple)
    elif not timed:
        convolution = product = RankGrid()
    elif cpu:
        small = tuple(rank for rank in SMALL if rank < block) if latency else ()
        convolution, product = RankGrid(STEP, block, PADDED_BELOW, small), RankGrid(STEP)
    else:
        convolution = product = RankGrid(OTHER_STEP)
    share = POINTWISE_SHARE if mac and not latency else 1.0
    return RankRule(convolution, product, timed, share)
