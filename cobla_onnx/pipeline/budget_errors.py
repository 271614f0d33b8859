"""Explain an infeasible budget: which excluded layers hold the bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import onnx

from cobla_onnx.allocation import Budget
from cobla_onnx.errors import BudgetError
from cobla_onnx.graph.holders import bytes_elsewhere
from cobla_onnx.graph.layers import Reason, Skipped, find_layers
from cobla_onnx.graph.operators.base import operator_names
from cobla_onnx.options import Settings
from cobla_onnx.pipeline.analysis import Analysis
from cobla_onnx.report.amounts import elsewhere_text
from cobla_onnx.text import numbered, quoted, safe_text
from cobla_onnx.variants.low_rank.ranks import RankRule
from cobla_onnx.wording import either, option_name

__all__ = ["elsewhere_note", "explain"]

INSPECT = either(python="`cobla_onnx.inspect`", command="`cobla-onnx inspect`")
# Fractions of the least cost below this are not mentioned.
NOTABLE = 0.1
# Nor is a budget that amounts to nearly the same fraction of the layers.
NEAR = 0.1
QUANTISED_OPERATORS = {
    "ConvInteger",
    "MatMulInteger",
    "MatMulNBits",
    "QGemm",
    "QLinearConv",
    "QLinearMatMul",
}


@dataclass(frozen=True)
class _Group:
    """Layers that are left whole for one reason, with the option that would change it."""

    count: int
    bytes: int
    text: str
    advice: str


def explain(
    error: BudgetError,
    model: onnx.ModelProto,
    analysis: Analysis,
    settings: Settings,
    rule: RankRule,
) -> BudgetError:
    """Add to the refusal of a budget which layers hold the least feasible bytes, or no known MACs.

    Parameters
    ----------
    settings : Settings
        The options that messages refer to.
    rule : RankRule
        Decides the candidate ranks; the message says if it leaves any out.
    """
    uncounted = [item.name for item in analysis.skipped if item.reason is Reason.UNCOUNTED]
    if uncounted and not analysis.mac_total and error.least.keys() == {"mac"}:
        return _without_macs(error, uncounted)
    error = _with_more_ranks(error, rule)
    include, exclude = bool(settings.include), bool(settings.exclude)
    least = error.least.get("mem")
    total = analysis.mem_total
    groups = [
        group
        for group in _groups(model, analysis, include, exclude)
        if group.bytes >= NOTABLE * (least or 0.0) * total
    ]
    if not groups:
        return _nothing_to_cut(error, model, analysis)
    if least is None:
        return error
    cause, _ = error.parts
    held = " and ".join(
        f"{group.bytes / total:.4g} in {numbered(group.count, 'layer')} {group.text}"
        for group in groups
    )
    advice = ", ".join(group.advice for group in groups)
    return BudgetError(f"{cause}, of which there is {held}", error.least, f"{advice}, or raise it")


def elsewhere_note(
    model: onnx.ModelProto, analysis: Analysis, budget: Budget | None
) -> tuple[str, ...]:
    """Say what a memory budget leaves for the layers, where that is a much smaller fraction."""
    inside = sum(layer.stored_bytes for layer in analysis.layers)
    if budget is None or budget.mem is None or not inside:
        return ()
    outside = analysis.mem_total - analysis.mem_saved - inside
    left = (budget.mem * analysis.mem_total - outside) / inside
    if left > budget.mem - NEAR:
        return ()
    held = bytes_elsewhere(model, [layer.source for layer in analysis.layers])
    return (
        f"--mem {budget.mem:g} of all bytes means {max(left, 0):.2g} of those that can be "
        f"compressed: no budget reaches the others, {elsewhere_text(held)}",
    )


def _without_macs(error: BudgetError, names: Sequence[str]) -> BudgetError:
    """Say that no MACs are known: all layers stand in bodies."""
    return BudgetError(
        f"{option_name('mac')}: the MACs of {numbered(len(names), 'layer')} in bodies are not "
        f"known, {quoted(names[0])} among them, and nothing outside of them has any",
        error.least,
        f"state the shapes of what the bodies read and write, or give {option_name('mem')}",
    )


def _nothing_to_cut(error: BudgetError, model: onnx.ModelProto, analysis: Analysis) -> BudgetError:
    """Say why no layer can be compressed, if none can: advice to allow more would not help."""
    if analysis.layers:
        return error
    counts = Counter(_why(item) for item in analysis.skipped)
    reasons = ", ".join(f"{count} x {why}" for why, count in counts.most_common(3))
    held = bytes_elsewhere(model, ())
    parts = [reasons] if reasons else []
    parts += [f"bytes: {elsewhere_text(held)}"] if held else []
    shown = f" ({'; '.join(parts)})" if parts else ""
    quantised = any(Reason.QUANTISED.value in why for why in counts)
    advice = (
        "compress the model before it is quantised"
        if quantised
        else f"only {operator_names()} with constant weights can be"
    )
    return BudgetError(
        f"{error.parts[0]}: no layer can be compressed{shown}",
        error.least,
        f"{advice}; {INSPECT} lists the nodes",
    )


def _why(item: Skipped) -> str:
    """Reason why a node is skipped, with the operator if it holds weights of its own."""
    if item.reason is not Reason.OPERATOR:
        return item.reason.message
    kind = Reason.QUANTISED if item.op in QUANTISED_OPERATORS else item.reason
    return f"{safe_text(item.op)}: {kind.message}"


def _with_more_ranks(error: BudgetError, rule: RankRule) -> BudgetError:
    """Advise to allow more ranks, if not all are allowed."""
    if rule.complete:
        return error
    cause, usual = error.parts
    advice = f"allow more ranks by {option_name('rank_multiple', 1)}"
    return BudgetError(cause, error.least, f"{usual}, or {advice}" if usual else advice)


def _groups(
    model: onnx.ModelProto, analysis: Analysis, include: bool, exclude: bool
) -> list[_Group]:
    sizes = {layer.name: layer.stored_bytes for layer in find_layers(model).layers}
    options = " and ".join(
        option_name(name) for name, given in (("exclude", exclude), ("include", include)) if given
    )
    texts = {
        Reason.EXCLUDED: (f"left out by {options}", "leave fewer layers out"),
        Reason.TOO_SMALL: (
            f"below {option_name('min_size')}",
            f"lower {option_name('min_size')}",
        ),
        Reason.NEVER_RUN: (
            "in branches that the data never takes",
            "give data that takes them, too",
        ),
        Reason.NOT_FOLLOWED: (
            "in bodies that data is not followed into",
            f"leave out {option_name('data')}",
        ),
        Reason.RANGE: (
            "whose numbers nearly overflow their type",
            "make the model's weights smaller",
        ),
        Reason.UNMEASURED: (
            "whose loss cannot be measured",
            f"give {option_name('objective', 'weights')}",
        ),
    }
    found = []
    for reason, (text, advice) in texts.items():
        names = [item.name for item in analysis.skipped if item.reason is reason]
        held = [sizes[name] for name in names if name in sizes]
        if held:
            found.append(_Group(len(held), sum(held), text, advice))
    return sorted(found, key=lambda group: -group.bytes)
