"""Types of a search: the problem of a model, and the result for one budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cobla_onnx.allocation import Allocation, SeparableError
from cobla_onnx.allocation.sqp import Step
from cobla_onnx.pipeline.analysis import Analysis
from cobla_onnx.plan import Plan
from cobla_onnx.report.model import Rival

__all__ = ["Problem", "SearchResult"]


@dataclass(frozen=True)
class Problem:
    """The layers of a model, and how ranks are chosen for them, whatever the budget.

    Attributes
    ----------
    analysis : Analysis
    solver : {'slsqp', 'milp'}
    objective : {'weights', 'output', 'loss'}
        ``weights`` needs no data. ``output`` minimises the measured losses of single layers,
        ``loss`` continues from there by the loss of the whole network.
    refit : bool
        Whether factors made from data are refitted.
    seconds : float, optional
        Time that a search by the loss of the whole network may take.
    """

    analysis: Analysis
    solver: Literal["slsqp", "milp"] = "slsqp"
    objective: Literal["weights", "output", "loss"] = "output"
    refit: bool = True
    seconds: float | None = None


@dataclass(frozen=True)
class SearchResult:
    """Ranks for one budget, and what the search has to tell about them.

    Attributes
    ----------
    allocation : Allocation
        Its certificate holds the notes.
    history : tuple of Step
        Every evaluation of the search by the loss of the whole network.
    probe_samples : int
        Samples on which layers were truncated one at a time.
    candidates : tuple of float
        Losses on the selection split of the allocations that were compared.
    rivals : tuple of Rival
        Other answers that were compared with the allocation's own.
    predicted : float, optional
        Predicted fraction of the original's running time, with a latency budget.
    losses : SeparableError, optional
        The separable model of the measured loss that the choices minimise, or that a search by
        the loss of the whole network began with.
    head : int, optional
        Nodes from the first on that stay in floating point beside 8 bits, since that was measured
        to be faster; None if it was not measured.
    """

    allocation: Allocation
    history: tuple[Step, ...] = ()
    probe_samples: int = 0
    candidates: tuple[float, ...] = ()
    rivals: tuple[Rival, ...] = ()
    predicted: float | None = None
    losses: SeparableError | None = None
    head: int | None = None

    def plan(self, analysis: Analysis) -> Plan:
        """Return the choices as decisions about the layers of the analysis."""
        return analysis.plan(self.allocation.choices, self.allocation.factors)
