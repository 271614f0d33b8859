"""Format numbers for people: counts, bytes, percentages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from cobla_onnx.allocation.resources import RESOURCES
from cobla_onnx.text import safe_text

if TYPE_CHECKING:
    from cobla_onnx.allocation import Budget
    from cobla_onnx.report.costs import Cost
    from cobla_onnx.report.model import LayerReport

__all__ = [
    "budget_name",
    "change_text",
    "count_text",
    "elsewhere_text",
    "factor_text",
    "kind_text",
    "percent_text",
    "rank_text",
]

# Most operators that are named.
NAMED = 4


def count_text(number: int | None) -> str:
    """Format a count with three digits and a unit; a question mark if it is not known.

    Examples
    --------
    >>> count_text(721064), count_text(None)
    ('721k', '?')
    """
    if number is None:
        return "?"
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def change_text(cost: Cost) -> str:
    """Format what a cost was and is; once where nothing changed.

    Examples
    --------
    >>> from cobla_onnx.report.costs import Cost
    >>> change_text(Cost(1000, 500)), change_text(Cost(500, 500)), change_text(Cost(None, 500))
    ('1k → 500', '500', '? → 500')
    """
    if cost.before == cost.after:
        return count_text(cost.after)
    return f"{count_text(cost.before)} → {count_text(cost.after)}"


def factor_text(before: int | None, after: int | None, sign: str = "x") -> str:
    """Say how many times smaller something became; nothing where it did not, or is not known.

    Examples
    --------
    >>> factor_text(300, 100), factor_text(100, 125), factor_text(100, 0)
    ('3.0x', '', '')
    """
    return f"{before / after:.1f}{sign}" if before and after and after < before else ""


def percent_text(fraction: float | None) -> str:
    """Format a fraction as percent, with as many digits as are meaningful.

    Examples
    --------
    >>> percent_text(0.29981), percent_text(1.0), percent_text(0.00012)
    ('29.98 %', '100 %', '0.012 %')
    """
    if fraction is None:
        return "?"
    if fraction in (0.0, 1.0):
        return f"{fraction:.0%}".replace("%", " %")
    digits = 2 if fraction >= 0.01 else 3
    return f"{100 * fraction:.{digits}f} %"


def budget_name(budget: Budget) -> str:
    """Format a budget as ``mem 0.5 mac 0.7``."""
    limits = ((resource.name, getattr(budget, resource.name)) for resource in RESOURCES)
    return " ".join(f"{name} {value:g}" for name, value in limits if value is not None)


def kind_text(layer: LayerReport) -> str:
    """Name what became of a layer, in a word or two."""
    if not layer.replaced or not layer.scheme:
        return "whole"
    return f"{layer.scheme}, folded" if layer.folded else layer.scheme


def rank_text(layer: LayerReport) -> str:
    """Format the rank of a layer as ``96 → 5``, or that of the weight where it is not cut."""
    full = str(layer.full_rank or "")
    return full if layer.rank is None else f"{full} → {layer.rank}"


def elsewhere_text(held: Mapping[str, int]) -> str:
    """Describe bytes by operator, largest first.

    Examples
    --------
    >>> elsewhere_text({"Gather": 47_000_000, "LSTM": 12_000_000})
    '47M in Gather, 12M in LSTM'
    """
    parts = [f"{count_text(size)} in {safe_text(op)}" for op, size in held.items()]
    rest = sum(list(held.values())[NAMED:])
    more = [f"{count_text(rest)} in others"] if rest else []
    return ", ".join([*parts[:NAMED], *more])
