"""Ways to a latency budget, what they found, and which of it is fast enough."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cobla_onnx.allocation import Allocation, Constraint
from cobla_onnx.allocation.budget import rounded_up
from cobla_onnx.errors import BudgetError
from cobla_onnx.latency.timing import Comparison
from cobla_onnx.pipeline.analysis import Analysis
from cobla_onnx.pipeline.search.problem import SearchResult
from cobla_onnx.text import numbered
from cobla_onnx.wording import option_name

__all__ = ["NOISE", "Choose", "Found", "Way", "fast_enough", "too_slow", "within_noise"]

# Excess over the limit, as a fraction of it, that still counts as met within the noise.
NOISE = 0.03

Choose = Callable[[Sequence[Constraint]], SearchResult]


@dataclass(frozen=True)
class Way:
    """How plans are chosen that are then timed.

    Attributes
    ----------
    name : str
        For the report.
    analysis : Analysis
    proxy : Constraint
        The cost that stands for the time while ranks are chosen, with the most of it that the
        budget allows by itself: the table of layer times, or MACs. The table is wrong where layers
        are so small that what is between them counts, and MACs are wrong where they cost
        differently; so both are tried.
    others : tuple of Constraint
    choose : callable
        Returns the best allocation within constraints.
    eight_bits : bool
        Whether nodes compute in 8 bits after that.
    sketch : callable, optional
        Returns in no time about what `choose` returns; which limit stands for the time is found
        with it.
    draft : callable, optional
        Returns what `choose` would if it compared that with no other answer, which takes most of
        its time. With both, `choose` is called once.
    """

    name: str
    analysis: Analysis
    proxy: Constraint
    others: tuple[Constraint, ...]
    choose: Choose
    eight_bits: bool = False
    sketch: Choose | None = None
    draft: Choose | None = None


@dataclass(frozen=True)
class Found:
    """A result, its predicted fraction of the original's time, and the measured one.

    ``wanted`` is the limit of what stands for the time that it was chosen within.
    """

    way: Way
    result: SearchResult
    wanted: Constraint
    predicted: float
    measured: Comparison

    @property
    def allocation(self) -> Allocation:
        """The ranks."""
        return self.result.allocation


def fast_enough(tried: Sequence[Found], limit: float) -> Found | None:
    """Return the plan that is fast enough and is predicted to lose least; None if there is none.

    It need not be the slowest: time does not fall with each cost that stands for it. A plan that is
    fast enough within the noise only says so.
    """
    met = [found for found in tried if found.measured.ratio <= limit]
    if met:
        return min(met, key=lambda found: found.allocation.certificate.value)
    fastest = min(tried, key=lambda found: found.measured.ratio, default=None)
    if fastest is None:
        return None
    measured = fastest.measured
    if measured.low <= limit and measured.ratio <= limit * (1 + NOISE):
        noted = fastest.allocation.noting(within_noise(limit, measured))
        return replace(fastest, result=replace(fastest.result, allocation=noted))
    return None


def too_slow(tried: Sequence[Found], limit: float, threads: int) -> BudgetError:
    """Refuse a budget that no plan meets; names the fastest."""
    measured = min((found.measured for found in tried), key=lambda measured: measured.ratio)
    return BudgetError(
        f"{option_name('latency', limit)}: the fastest of {len(tried)} plans takes "
        f"{measured.ratio:.3f} of the original's time ({measured.low:.3f} to {measured.high:.3f}, "
        f"{numbered(threads, 'thread')})",
        {"latency": rounded_up(measured.ratio)},
        "raise it, or let more layers be compressed",
    )


def within_noise(limit: float, measured: Comparison) -> str:
    """Note that a budget was met within the noise of a measurement only."""
    return (
        f"the latency budget of {limit:g} is met within the noise only: {measured.ratio:.3f} was "
        f"measured ({measured.low:.3f} to {measured.high:.3f})"
    )
