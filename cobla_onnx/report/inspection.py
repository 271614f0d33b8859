"""Result of inspecting a model, and its table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cobla_onnx.graph.operators.base import operator_names
from cobla_onnx.report.amounts import count_text, elsewhere_text
from cobla_onnx.report.sensitivity import Sensitivity
from cobla_onnx.report.serialise import Exported
from cobla_onnx.text import numbered, safe_text, short_names

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["InspectedLayer", "InspectedScheme", "Inspection", "LeftAlone", "sparkline"]

BARS = "▁▂▃▄▅▆▇█"
# A sparkline spans this many powers of ten, from the largest singular value down.
DECADES = 2.0


@dataclass(frozen=True)
class InspectedScheme:
    """One way to unfold a layer's weight.

    Attributes
    ----------
    name : str
    full_rank : int
    break_even_memory, break_even_macs : float or None
        Ranks below these make the layer smaller, or faster; None if MACs are not known.
    most : int
        The largest rank that is offered to the solver.
    half_error : float
        Relative error (of the weight or, with data, of the layer's output) at the rank that
        halves the layer's bytes; 1 if there is none.
    error_ranks : dict of str to int
        The least rank with at most that relative error.
    singular_values : tuple of float
        Relative to the largest.
    """

    name: str
    full_rank: int
    break_even_memory: float
    break_even_macs: float | None
    most: int
    half_error: float
    error_ranks: dict[str, int]
    singular_values: tuple[float, ...]


@dataclass(frozen=True)
class InspectedLayer:
    """A layer that can be compressed; the first of `schemes` has the least `half_error`."""

    name: str
    op: str
    shape: tuple[int, ...]
    params: int
    bytes: int
    macs: int | None
    schemes: tuple[InspectedScheme, ...]


@dataclass(frozen=True)
class LeftAlone:
    """A node that is left as it is, and why; `params` is 0 if its weight is not known."""

    name: str
    op: str
    reason: str
    params: int


@dataclass(frozen=True)
class Inspection(Exported):
    """Result of `inspect`.

    Attributes
    ----------
    input : str or None
        The file.
    layers : tuple of InspectedLayer
    left_alone : tuple of LeftAlone
    mem_total : int
        Bytes of all weights.
    mac_total : int or None
        Multiply-accumulates of one run with `input_shapes`; None if they are not known.
    elsewhere : dict of str to int
        Bytes of weights that cannot be compressed, by the operator that reads them.
    least : dict of str to float
        ``mem`` and ``mac``: the least feasible fraction, each budget taken alone.
    input_shapes : dict of str to tuple
    measured_by : {'weights', 'outputs'}
        Whether the spectra are singular values of weights or, with data, of outputs.
    notes : tuple of str
    sensitivity : Sensitivity or None
        If it was asked for.
    """

    input: str | None
    layers: tuple[InspectedLayer, ...]
    left_alone: tuple[LeftAlone, ...]
    mem_total: int
    mac_total: int | None
    elsewhere: dict[str, int]
    least: dict[str, float]
    input_shapes: dict[str, tuple[int | None, ...] | None]
    measured_by: str
    notes: tuple[str, ...]
    sensitivity: Sensitivity | None = None

    def __rich__(self) -> RenderableType:
        return _render(self)


def sparkline(values: Sequence[float], width: int = 10) -> str:
    """Draw descending numbers as bars on a logarithmic scale of two decades.

    Parameters
    ----------
    values : sequence of float
        Between 0 and 1.
    width : int
        Most characters.

    Examples
    --------
    >>> sparkline([1, 0.5, 0.1, 0.01, 0.001])
    '█▇▅▁▁'
    """
    if not values:
        return ""
    places = np.linspace(0, len(values) - 1, min(width, len(values))).round().astype(int)
    logs = np.log10(np.maximum(np.asarray(values, dtype=np.float64)[places], 10.0**-DECADES))
    heights = np.rint((1 + logs / DECADES) * (len(BARS) - 1)).astype(int)
    return "".join(BARS[height] for height in heights.clip(0, len(BARS) - 1))


def _cells(best: InspectedScheme) -> tuple[str, str, str, str]:
    """What the table says of the best scheme."""
    ranks = f"1-{best.most} of {best.full_rank}"
    return best.name, ranks, f"{best.half_error:.3f}", sparkline(best.singular_values)


def _render(found: Inspection) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column("layer", overflow="fold", min_width=12)
    for heading in ("op", "params", "MACs", "scheme", "ranks", "half"):
        right = heading in ("params", "MACs", "half")
        table.add_column(heading, justify="right" if right else "left", no_wrap=True)
    table.add_column("spectrum", no_wrap=True)
    names = short_names([layer.name for layer in found.layers], 40)
    for layer in found.layers:
        # Only forms with a spectrum are told of here.
        best = layer.schemes[0] if layer.schemes else None
        table.add_row(
            Text(names[layer.name]),
            layer.op,
            count_text(layer.params),
            count_text(layer.macs),
            *(_cells(best) if best else ()),
        )
    whose = "weight" if found.measured_by == "weights" else "output (on the data)"
    lines = [
        "ranks: those that make the layer smaller and no slower, by the best scheme",
        f"half: relative error of the {whose} at half the layer's memory",
        "spectrum: singular values, largest to smallest, two powers of ten high",
        "",
        *_groups(found),
        *_totals(found),
        *(f"note: {safe_text(note, 300)}" for note in found.notes),
    ]
    if not found.layers:
        # No layers: neither a table nor its legend.
        lines = [
            f"nothing can be compressed: only {operator_names()} with constant weights can be",
            *lines[3:],
        ]
        return Group(*map(Text, lines))
    if found.sensitivity is not None:
        return Group(table, *map(Text, lines), Text(""), found.sensitivity)
    return Group(table, *map(Text, lines))


def _groups(found: Inspection) -> list[str]:
    groups: dict[str, list[LeftAlone]] = {}
    for item in found.left_alone:
        groups.setdefault(item.reason, []).append(item)
    lines = []
    for reason, items in groups.items():
        names = ", ".join(short_names([item.name for item in items[:3]], 28).values())
        more = f" and {len(items) - 3} more" if len(items) > 3 else ""
        params = sum(item.params for item in items)
        size = f", {count_text(params)} parameters" if params else ""
        lines.append(f"left alone: {len(items)} x {safe_text(reason, 60)}{size}: {names}{more}")
    return [*lines, ""] if lines else []


def _totals(found: Inspection) -> list[str]:
    count = len(found.layers)
    lines = [
        f"{numbered(count, 'layer')} can be compressed, left alone: "
        f"{numbered(len(found.left_alone), 'node')}",
        f"memory: {count_text(found.mem_total)} bytes of weights; "
        f"least reachable: --mem {found.least['mem']:g}",
    ]
    # Biases are in every model, and negligible.
    if sum(found.elsewhere.values()) > found.mem_total / 100:
        lines.append(f"of these no budget reaches {elsewhere_text(found.elsewhere)}")
    if found.mac_total is None:
        return [*lines, "MACs: not known"]
    shapes = ", ".join(
        f"{safe_text(name, 28)} {'x'.join('?' if d is None else str(d) for d in shape or ())}"
        for name, shape in found.input_shapes.items()
    )
    return [
        *lines,
        f"MACs: {count_text(found.mac_total)} for {shapes}; "
        f"least reachable: --mac {found.least['mac']:g}",
    ]
