"""Select the layers that may be changed: by patterns, by size, and by what a loss can see."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from cobla_onnx.errors import UsageError
from cobla_onnx.graph.layers import Inventory, Reason, Skipped
from cobla_onnx.text import matching
from cobla_onnx.wording import either

__all__ = ["Selection", "selected", "without_unmeasured"]


@dataclass(frozen=True)
class Selection:
    """Which layers may be changed.

    Attributes
    ----------
    include, exclude : sequence of str
        Glob patterns for names of layers; without `include` all are meant.
    min_size : int
        Layers with fewer weights stay whole.
    """

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    min_size: int = 0


def selected(inventory: Inventory, selection: Selection) -> Inventory:
    """Move the layers that are not selected to those skipped, with the reason.

    Raises
    ------
    UsageError
        If a pattern matches nothing.
    """
    names = [layer.name for layer in inventory.layers]
    names += [item.name for item in inventory.skipped]
    meant: dict[str, set[str]] = {}
    for option, patterns in (
        ("include", selection.include),
        ("exclude", selection.exclude),
    ):
        found = meant[option] = set()
        for pattern in patterns:
            its = matching(pattern, names)
            found |= its
            if not its:
                close = difflib.get_close_matches(pattern, names, 3, 0.4)
                hint = f"did you mean {', '.join(close)}?" if close else "see the report's names"
                shown = either(python=f"{option}=[{pattern!r}]", command=f"--{option} {pattern!r}")
                raise UsageError(f"{shown}: matches no layer; {hint}")
    layers, skipped = [], list(inventory.skipped)
    for layer in inventory.layers:
        included = not selection.include or layer.name in meant["include"]
        if layer.name in meant["exclude"] or not included:
            skipped.append(Skipped(layer.name, layer.op, Reason.EXCLUDED, "", layer.params))
        elif layer.params < selection.min_size:
            skipped.append(Skipped(layer.name, layer.op, Reason.TOO_SMALL, "", layer.params))
        else:
            layers.append(layer)
    return replace(inventory, layers=tuple(layers), skipped=tuple(skipped))


def without_unmeasured(inventory: Inventory, unmeasured: Collection[str]) -> Inventory:
    """Leave out the layers named in `unmeasured`, whose errors no loss would see."""
    blind = [layer for layer in inventory.layers if layer.name in unmeasured]
    skipped = [Skipped(x.name, x.op, Reason.UNMEASURED, "", x.params) for x in blind]
    kept = tuple(layer for layer in inventory.layers if layer.name not in unmeasured)
    return replace(inventory, layers=kept, skipped=(*inventory.skipped, *skipped))
