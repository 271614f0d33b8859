"""Select the layers that may be changed: by patterns, by size, and by what a loss can see."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx

from cobla_onnx.calibration.patches import unreadable
from cobla_onnx.errors import UsageError
from cobla_onnx.graph.bodies import all_nodes
from cobla_onnx.graph.inventory import Refusal
from cobla_onnx.graph.layers import Inventory, Layer, Reason, Skipped
from cobla_onnx.graph.macs import Shape, layer_macs
from cobla_onnx.graph.operators.base import operator_of
from cobla_onnx.pipeline.body_proof import provable
from cobla_onnx.text import matching
from cobla_onnx.wording import either

__all__ = ["Selection", "counted", "readable", "selected", "warnings_of", "without_unmeasured"]


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


def readable(
    model: onnx.ModelProto, inventory: Inventory, shapes: Mapping[str, Shape], *, weighted: bool
) -> tuple[tuple[Layer, ...], tuple[Skipped, ...]]:
    """Skip layers that their operator refuses, now that shapes are known.

    With calibration data (`weighted`), also those of which data say nothing.
    """
    taken, skipped = [], list(inventory.skipped)
    for layer in inventory.layers:
        refused = operator_of(layer).refusal(layer, shapes)
        if refused is None and layer.in_body:
            refused = _unprovable(layer, weighted=weighted)
        elif refused is None and weighted:
            refused = unreadable(model, layer)
        if refused is None:
            taken.append(layer)
        else:
            skipped.append(Skipped(layer.name, layer.op, *refused, layer.params))
    return tuple(taken), tuple(skipped)


def _unprovable(layer: Layer, *, weighted: bool) -> Refusal | None:
    """Why a layer in a body is left as it is."""
    if weighted:
        return Refusal(Reason.NOT_FOLLOWED)
    return None if provable(layer) else Refusal(Reason.SUBGRAPH)


def counted(
    model: onnx.ModelProto,
    shapes: Mapping[str, Shape],
    layers: Sequence[Layer],
    skipped: tuple[Skipped, ...],
    macs: Mapping[int, int] | None,
    *,
    needed: bool,
) -> tuple[tuple[Layer, ...], tuple[Skipped, ...], list[int | None], int | None]:
    """Count MACs. Where they are needed, layers in bodies whose own are not known are skipped.

    Parameters
    ----------
    macs : mapping of int to int, or None
        Of all nodes by their index; None if some are not known.

    Returns
    -------
    tuple of Layer, tuple of Skipped
    list of int or None
        MACs of each layer over all its uses.
    int or None
        Those of the model.
    """
    nodes = all_nodes(model.graph)
    each = [None if macs is None else layer_macs(nodes, x, shapes, macs) for x in layers]
    if macs is None or (None in each and not needed):
        return tuple(layers), skipped, each, None
    pairs = list(zip(layers, each, strict=True))
    more = (
        Skipped(x.name, x.op, Reason.UNCOUNTED, "", x.params) for x, count in pairs if count is None
    )
    kept = tuple(layer for layer, count in pairs if count is not None)
    known = [count for _, count in pairs if count is not None]
    return kept, (*skipped, *more), [*known], sum(macs.values())


def warnings_of(model: onnx.ModelProto, inventory: Inventory) -> tuple[str, ...]:
    """Say what makes the model slower than it need be."""
    inputs = {value.name for value in model.graph.input}
    if any(layer.source in inputs for layer in inventory.layers):
        return (
            "weights are also listed as graph inputs, so onnxruntime does not use its fast "
            "layouts; they are taken as constant",
        )
    return ()
