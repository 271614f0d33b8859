"""Rules for convolutions with any number of axes, groups, strides, dilations and padding.

y[n, o, p] = sum over c and k of w[o, c, k] x[n, c, s p + d k - b]. The gradient with
respect to x is the transposed convolution of dy, that with respect to w the correlation of x
with dy (Dumoulin and Visin, arXiv 1603.07285). Which of several equal forms is written follows
from measurements (docs/experiments.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cobla_onnx.autodiff.emitter import Emitter
from cobla_onnx.autodiff.vjp.registry import Gradients, NoRuleError, Sizes, Step, vjp

__all__ = ["Window", "input_gradient", "same_pads", "weight_gradient"]

# Channels from which one product over all kernel offsets beats a product for each.
WIDE = 32
# Elements up to which the matrix of all patches may be built: 256 MB in float32.
PATCHES = 1 << 26
# Positions from which a product for each sample beats one over all, for which channels come first.
POSITIONS = 64
# Rows of the matrix of patches up to which they are joined in one product.
NARROW = 32


@dataclass(frozen=True)
class Window:
    """How a kernel moves over its input: one entry for each spatial axis.

    Attributes
    ----------
    kernel, strides, dilations : tuple of int
    begins : tuple of int
        Padding before the first element. Padding at the end follows from the sizes of input
        and output.
    group : int
    """

    kernel: Sizes
    strides: Sizes
    dilations: Sizes
    begins: Sizes
    group: int = 1

    def ends(self, inputs: Sequence[int], outputs: Sequence[int]) -> list[int]:
        """Padding at the end that is really read; negative where input is left over."""
        return [
            s * (o - 1) + (k - 1) * d + 1 - n - b
            for k, s, d, b, n, o in zip(
                self.kernel,
                self.strides,
                self.dilations,
                self.begins,
                inputs,
                outputs,
                strict=True,
            )
        ]

    def arguments(self) -> dict[str, Any]:
        """Attributes of Conv and ConvTranspose, but for the padding."""
        return {
            "kernel_shape": list(self.kernel),
            "strides": list(self.strides),
            "dilations": list(self.dilations),
            "group": self.group,
        }


def same_pads(total: int, mode: str) -> int:
    """Part of a total padding that goes before the input."""
    return total // 2 if mode == "SAME_UPPER" else total - total // 2


def window_of(step: Step, kernel: Sizes, inputs: Sizes, outputs: Sizes) -> Window:
    """Read the window of a Conv or pooling node; padding by ``auto_pad`` is worked out."""
    axes = len(kernel)
    strides = tuple(step.get("strides", [1] * axes))
    dilations = tuple(step.get("dilations", [1] * axes))
    begins = tuple(step.get("pads", [0] * axes)[:axes])
    mode = step.get("auto_pad", "NOTSET")
    if mode == "VALID":
        begins = (0,) * axes
    elif mode.startswith("SAME"):
        bare = Window(kernel, strides, dilations, (0,) * axes)
        begins = tuple(same_pads(max(n, 0), mode) for n in bare.ends(inputs, outputs))
    if min(step.get("pads", [0])) < 0:
        raise NoRuleError("its padding is negative")
    return Window(kernel, strides, dilations, begins, int(step.get("group", 1)))


def _turned(g: Emitter, w: str, shape: Sizes, group: int) -> str:
    """Swap a weight's input and output channels and reverse its kernel."""
    outputs, inputs, *kernel = shape
    axes = [i for i, k in enumerate(kernel) if k > 1]
    if group == 1:
        swapped = g.transpose(w, [1, 0, *range(2, len(shape))])
        return g.flip(swapped, [2 + i for i in axes])
    split = g.reshape(w, [group, outputs // group, inputs, *kernel])
    swapped = g.transpose(split, [0, 2, 1, *range(3, len(shape) + 1)])
    joined = g.reshape(swapped, [group * inputs, outputs // group, *kernel])
    return g.flip(joined, [2 + i for i in axes])


def input_gradient(
    g: Emitter, dy: str, y_shape: Sizes, w: str, w_shape: Sizes, window: Window, x_shape: Sizes
) -> str:
    """Write dE/dx of a convolution.

    At stride 1 as a convolution with the turned kernel, unless y has twice the channels of
    x or more, where the transposed convolution builds the smaller matrix.

    Parameters
    ----------
    dy, w : str
        Of shapes (N, O, *outputs) and (O, C / group, *kernel).
    x_shape : tuple of int
        (N, C, *inputs)
    """
    ends = window.ends(x_shape[2:], y_shape[2:])
    reach = [(k - 1) * d for k, d in zip(window.kernel, window.dilations, strict=True)]
    begins = [r - b for r, b in zip(reach, window.begins, strict=True)]
    tails = [r - e for r, e in zip(reach, ends, strict=True)]
    plain = math.prod(window.strides) == 1 and min(*begins, *tails) >= 0
    if plain and (2 * x_shape[1] > y_shape[1] or math.prod(window.kernel) == 1):
        turned = _turned(g, w, w_shape, window.group)
        return g.op("Conv", dy, turned, **window.arguments(), pads=[*begins, *tails])
    return g.op(
        "ConvTranspose",
        dy,
        w,
        **window.arguments(),
        pads=[*window.begins, *(max(e, 0) for e in ends)],
        output_padding=[max(-e, 0) for e in ends],
    )


def weight_gradient(
    g: Emitter, x: str, x_shape: Sizes, dy: str, y_shape: Sizes, window: Window
) -> str:
    """Write dE/dw of a convolution, of shape (O, C / group, *kernel).

    A matrix product over batch and positions: dw[o, c, k] = sum over n and p of
    dy[n, o, p] x[n, c, s p + d k - b].
    """
    positions, group = math.prod(y_shape[2:]), window.group
    read, written = x_shape[1] // group, y_shape[1] // group
    # The products of all samples are to be smaller than what they are made of.
    if positions >= POSITIONS and positions * (read + written) > read * written:
        if written < read and math.prod(window.strides) == 1:
            return _by_sample_of_output(g, x, x_shape, dy, y_shape, window)
        return _by_sample(g, x, x_shape, dy, y_shape, window)
    return _over_batch(g, x, x_shape, dy, y_shape, window)


def _by_sample(g: Emitter, x: str, x_shape: Sizes, dy: str, y_shape: Sizes, window: Window) -> str:
    """Write it as a product for each sample and offset of the kernel, over shifted inputs."""
    channels, *inputs = x_shape[1:]
    begins, ends = [0, 0, *window.begins], [0, 0, *window.ends(inputs, y_shape[2:])]
    moved = g.frame(x, x_shape, begins, ends)
    shifted = _shifts(g, moved, window, y_shape[2:])
    group, offsets = window.group, len(shifted)
    positions = math.prod(y_shape[2:])
    shape = (y_shape[1], channels // group, *window.kernel)
    rows = _split(g, dy, y_shape[1], positions, group)
    if group == 1 and 1 < offsets * channels <= NARROW:
        patches = _split(g, g.concat(shifted, 1), offsets * channels, positions, group)
        product = _products(g, rows, patches, group)
        split = g.reshape(product, [shape[0], offsets, shape[1]])
        return g.reshape(g.transpose(split, [0, 2, 1]), shape)
    products = [
        _products(g, rows, _split(g, part, channels, positions, group), group) for part in shifted
    ]
    return _by_offset(g, products, shape)


def _by_sample_of_output(
    g: Emitter, x: str, x_shape: Sizes, dy: str, y_shape: Sizes, window: Window
) -> str:
    """Write the same over shifted gradients, which there are fewer of, for strides of 1.

    With q = p + d k - b, dw[o, c, k] = sum over n and q of dy[n, o, q - d k + b] x[n, c, q].
    """
    inputs, outputs = x_shape[2:], y_shape[2:]
    reach = [(k - 1) * d for k, d in zip(window.kernel, window.dilations, strict=True)]
    begins = [r - b for r, b in zip(reach, window.begins, strict=True)]
    ends = [r - e for r, e in zip(reach, window.ends(inputs, outputs), strict=True)]
    moved = g.frame(dy, y_shape, [0, 0, *begins], [0, 0, *ends])
    group, positions = window.group, math.prod(inputs)
    columns = _split(g, x, x_shape[1], positions, group)
    # The first cut is that of the last offset.
    shifted = reversed(_shifts(g, moved, window, inputs))
    products = [
        _products(g, _split(g, part, y_shape[1], positions, group), columns, group)
        for part in shifted
    ]
    return _by_offset(g, products, (y_shape[1], x_shape[1] // group, *window.kernel))


def _split(g: Emitter, a: str, channels: int, positions: int, group: int) -> str:
    """Write a tensor of all samples as matrices of channels by positions, one for each group."""
    return g.reshape(a, [-1, *[group][group == 1 :], channels // group, positions])


def _products(g: Emitter, rows: str, columns: str, group: int) -> str:
    """Multiply matrices over positions, and add up those of all samples."""
    rank = 3 if group == 1 else 4
    # onnxruntime fuses the swap into the product.
    return g.sum(g.matmul(rows, g.swap(columns, rank)), [0])


def _by_offset(g: Emitter, products: Sequence[str], shape: Sizes) -> str:
    """Put the derivatives by the weights at each offset of the kernel together."""
    last = [g.reshape(product, [*shape[:2], 1]) for product in products]
    return g.reshape(g.concat(last, 2), shape)


def _over_batch(g: Emitter, x: str, x_shape: Sizes, dy: str, y_shape: Sizes, window: Window) -> str:
    """Write it as one product over batch and positions.

    With the channels in front, the shifted inputs are blocks of whole rows.
    """
    batch, channels, *inputs = x_shape
    outputs = y_shape[1]
    group, axes = window.group, len(inputs)
    front = [1, 0, *range(2, axes + 2)]
    positions = batch * math.prod(y_shape[2:])
    rows = g.reshape(g.transpose(dy, front), [group, outputs // group, positions][group == 1 :])
    begins = [0, 0, *window.begins]
    ends = [0, 0, *window.ends(inputs, y_shape[2:])]
    moved = g.frame(g.transpose(x, front), [channels, batch, *inputs], begins, ends)
    each = [group, channels // group, positions][group == 1 :]
    shifted = [g.reshape(part, each) for part in _shifts(g, moved, window, y_shape[2:])]
    shape = (outputs, channels // group, *window.kernel)
    offsets = len(shifted)
    wide = channels // group >= WIDE or group > 1
    if group == 1 and not (wide and offsets * channels * positions <= PATCHES):
        products = [g.op("Gemm", rows, part, transB=1) for part in shifted]
        return _by_offset(g, products, shape)
    patches = g.concat(shifted, len(each) - 2)
    if group == 1:
        product = g.op("Gemm", rows, patches, transB=1)
    else:
        product = g.matmul(rows, g.swap(patches, 3))
    turned = g.transpose(g.reshape(product, [outputs, offsets, shape[1]]), [0, 2, 1])
    return g.reshape(turned, shape)


def _shifts(g: Emitter, x: str, window: Window, outputs: Sequence[int]) -> list[str]:
    """Cut out of the padded input what each kernel offset reads, in the kernel's order.

    Axis by axis, so that the cuts along one axis are shared by those along the next.
    """
    parts = [x]
    for axis, (kernel, stride, dilation, count) in enumerate(
        zip(window.kernel, window.strides, window.dilations, outputs, strict=True)
    ):
        reach = stride * (count - 1) + 1
        if kernel == 1 and stride == 1:
            continue
        steps = [stride] if stride > 1 else None
        parts = [
            g.slice(part, [dilation * k], [dilation * k + reach], [2 + axis], steps)
            for part in parts
            for k in range(kernel)
        ]
    return parts


@vjp("Conv")
def conv(g: Emitter, step: Step) -> Gradients:
    """Gradients with respect to input, weight and bias."""
    x, w = step.node.input[:2]
    x_shape, w_shape, y_shape = step.shape(0), step.shape(1), step.y_shape
    window = window_of(step, w_shape[2:], x_shape[2:], y_shape[2:])
    dx = dw = db = None
    if step.wants(0):
        dx = input_gradient(g, step.dy, y_shape, w, w_shape, window, x_shape)
    if step.wants(1):
        dw = weight_gradient(g, x, x_shape, step.dy, y_shape, window)
    if step.wants(2):
        db = g.sum(step.dy, [0, *range(2, len(y_shape))])
    return (dx, dw, db)[: len(step.node.input)]


@vjp("ConvTranspose")
def conv_transpose(g: Emitter, step: Step) -> Gradients:
    """The adjoint of a convolution from y to x: dx is that convolution of dy."""
    x, w = step.node.input[:2]
    x_shape, w_shape, y_shape = step.shape(0), step.shape(1), step.y_shape
    axes = len(x_shape) - 2
    kernel = w_shape[2:]
    strides = tuple(step.get("strides", [1] * axes))
    dilations = tuple(step.get("dilations", [1] * axes))
    begins = tuple(step.get("pads", [0] * axes)[:axes])
    mode = step.get("auto_pad", "NOTSET")
    if mode != "NOTSET" or "output_shape" in step.attributes:
        bare = Window(kernel, strides, dilations, (0,) * axes)
        extra = step.get("output_padding", [0] * axes)
        totals = [
            max(n + e, 0) for n, e in zip(bare.ends(y_shape[2:], x_shape[2:]), extra, strict=True)
        ]
        begins = tuple(0 if mode == "VALID" else same_pads(n, mode) for n in totals)
    window = Window(kernel, strides, dilations, begins, int(step.get("group", 1)))
    dx = dw = db = None
    if step.wants(0):
        ends = window.ends(y_shape[2:], x_shape[2:])
        cut = [0, 0, *(min(e, 0) for e in ends)]
        framed = g.frame(step.dy, y_shape, [0] * len(y_shape), cut)
        pads = [*begins, *(max(e, 0) for e in ends)]
        dx = g.op("Conv", framed, w, **window.arguments(), pads=pads)
    if step.wants(1):
        dw = weight_gradient(g, step.dy, y_shape, x, x_shape, window)
    if step.wants(2):
        db = g.sum(step.dy, [0, *range(2, len(y_shape))])
    return (dx, dw, db)[: len(step.node.input)]
