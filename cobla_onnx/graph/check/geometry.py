"""Check a node's attributes against the shape of its weight."""

from __future__ import annotations

from typing import Any

import onnx

from cobla_onnx.errors import ModelError
from cobla_onnx.graph.index import attributes

__all__ = ["check_geometry"]

AGAIN = "the model is damaged, export it again"
# Steps, sizes and paddings above this cannot be meant, and overflow in other libraries.
LARGEST = 2**31 - 1


def check_geometry(node: onnx.NodeProto, shape: tuple[int, ...], label: str) -> None:
    """Check the weight's rank, and what a convolution says about its kernel.

    Parameters
    ----------
    node : NodeProto
        Of any operator; only products and convolutions are looked at.
    shape : tuple of int
        Of the weight as the node reads it.
    label : str
        What the node is called, for the message.

    Raises
    ------
    ModelError
        If they do not fit.
    """
    least, most = {
        "Conv": (3, 16),
        "ConvTranspose": (3, 16),
        "Gemm": (2, 2),
        "MatMul": (1, 16),
    }.get(node.op_type, (0, None))
    if most is None:
        return
    if not least <= len(shape) <= most:
        raise ModelError(
            f"{label}: its weight has shape {list(shape)}, a {node.op_type}'s has "
            f"{least} axes{' or more' if most > least else ''}; {AGAIN}"
        )
    if node.op_type in ("Conv", "ConvTranspose"):
        _check_convolution(attributes(node), shape, label)


def _check_convolution(values: dict[str, Any], shape: tuple[int, ...], label: str) -> None:
    group = values.get("group", 1)
    if group < 1 or shape[0] % group:
        raise ModelError(
            f"{label}: group {group} does not divide the {shape[0]} channels of its weight; {AGAIN}"
        )
    kernel = values.get("kernel_shape")
    if kernel is not None and list(kernel) != list(shape[2:]):
        raise ModelError(
            f"{label}: kernel_shape says {list(kernel)}, its weight has {list(shape[2:])}; {AGAIN}"
        )
    axes = len(shape) - 2
    for name, length, least in (
        ("strides", axes, 1),
        ("dilations", axes, 1),
        ("pads", 2 * axes, -LARGEST),
        ("output_padding", axes, 0),
        ("output_shape", axes, 0),
    ):
        sizes = values.get(name)
        if sizes is None:
            continue
        if len(sizes) != length or not all(least <= size <= LARGEST for size in sizes):
            raise ModelError(
                f"{label}: {name} {list(sizes)[:16]} do not fit a kernel of {axes} axes; {AGAIN}"
            )
