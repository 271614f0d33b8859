"""Who holds what a budget cannot take away: for the message that refuses it."""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from cobla_onnx.analysis import Analysis
from cobla_onnx.errors import BudgetError
from cobla_onnx.graph.layers import Reason, find_layers

__all__ = ["explain"]

# Shares of the least below this are not worth a word.
NOTABLE = 0.1


@dataclass(frozen=True)
class _Group:
    """Layers that are left whole for one reason, and the option that would change it."""

    count: int
    bytes: int
    text: str
    advice: str


def explain(
    error: BudgetError, model: onnx.ModelProto, analysis: Analysis, include: bool, exclude: bool
) -> BudgetError:
    """Add to a refusal of memory which layers hold the least that is within reach.

    Parameters
    ----------
    include, exclude : bool
        Whether the option was given.
    """
    least = error.least.get("mem")
    if least is None:
        return error
    total = analysis.mem_total
    groups = [
        group
        for group in _groups(model, analysis, include, exclude)
        if group.bytes >= NOTABLE * least * total
    ]
    if not groups:
        return error
    held = " and ".join(
        f"the {group.count} layers {group.text} hold {group.bytes / total:.4g}" for group in groups
    )
    advice = ", ".join(group.advice for group in groups)
    return BudgetError(f"{error.cause}, of which {held}", error.least, f"{advice}, or raise it")


def _groups(
    model: onnx.ModelProto, analysis: Analysis, include: bool, exclude: bool
) -> list[_Group]:
    sizes = {layer.name: layer.stored_bytes for layer in find_layers(model).layers}
    options = " and ".join(
        name for name, given in (("--exclude", exclude), ("--include", include)) if given
    )
    texts = {
        Reason.EXCLUDED: (f"left out by {options}", "leave fewer layers out"),
        Reason.TOO_SMALL: ("below --min-size", "lower --min-size"),
        Reason.UNSEEN: ("that data cannot weight", "leave --data away"),
        Reason.UNMEASURED: ("whose loss cannot be measured", "give --objective weights"),
    }
    found = []
    for reason, (text, advice) in texts.items():
        names = [item.name for item in analysis.skipped if item.reason is reason]
        held = [sizes[name] for name in names if name in sizes]
        if held:
            found.append(_Group(len(held), sum(held), text, advice))
    return sorted(found, key=lambda group: -group.bytes)
