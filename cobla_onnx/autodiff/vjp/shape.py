"""Rules for operators that only move values: the gradient is moved back."""

from __future__ import annotations

import numpy as np

from cobla_onnx.autodiff.emitter import Emitter
from cobla_onnx.autodiff.vjp.registry import Gradients, NoRuleError, Sizes, Step, vjp
from cobla_onnx.autodiff.vjp.selection import adjoint_of_take

__all__: list[str] = []


def _only(step: Step, dx: str | None) -> Gradients:
    """Gradient with respect to the first input; the others say how, and have none."""
    return (dx, *[None] * (len(step.node.input) - 1))


@vjp("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def reshape(g: Emitter, step: Step) -> Gradients:
    """y = the same numbers in another shape: dx = dy in the shape of x."""
    return _only(step, g.reshape(step.dy, step.shape()))


@vjp("Transpose")
def transpose(g: Emitter, step: Step) -> Gradients:
    """y = x permuted: dx = dy, permuted by the inverse permutation."""
    order = step.get("perm", list(range(len(step.shape())))[::-1])
    return (g.transpose(step.dy, [int(a) for a in np.argsort(order)]),)


@vjp("Expand")
def expand(g: Emitter, step: Step) -> Gradients:
    """y = x broadcast: dx = dy summed over the copies."""
    return _only(step, g.sum_to(step.dy, step.y_shape, step.shape()))


@vjp("Tile")
def tile(g: Emitter, step: Step) -> Gradients:
    """y = x repeated as a whole: dx = dy summed over the copies."""
    shape = step.shape()
    folded = [n for x, y in zip(shape, step.y_shape, strict=True) for n in (y // max(x, 1), x)]
    return _only(step, g.sum(g.reshape(step.dy, folded), range(0, 2 * len(shape), 2)))


@vjp("Concat")
def concat(g: Emitter, step: Step) -> Gradients:
    """y = [a, b, ...]: each operand gets its block of dy."""
    axis = step.axis(0)
    result: list[str | None] = []
    start = 0
    for index in range(len(step.node.input)):
        end = start + step.shape(index)[axis]
        result.append(g.slice(step.dy, [start], [end], [axis]) if step.wants(index) else None)
        start = end
    return result


@vjp("Split")
def split(g: Emitter, step: Step) -> Gradients:
    """[a, b, ...] = x: dx = [da, db, ...], with zeros for what nobody reads."""
    axis = step.axis(0)
    parts = []
    for output, dy in zip(step.node.output, step.dys, strict=True):
        if dy is None:
            if output not in step.shapes:
                raise NoRuleError(f"the shape of {output!r} is not known")
            dy = g.expand(g.number(0.0), step.shapes[output])
        parts.append(dy)
    return _only(step, g.concat(parts, axis))


@vjp("Slice")
def slice_(g: Emitter, step: Step) -> Gradients:
    """y = x[start:end:step]: dx = dy at these places, zero elsewhere."""
    starts, ends = step.integers(1), step.integers(2)
    assert starts is not None
    assert ends is not None
    axes = step.integers(3) or list(range(len(starts)))
    steps = step.integers(4) or [1] * len(starts)
    sizes = step.shape()
    dx, shape = step.dy, list(step.y_shape)
    for axis, *bounds in zip(axes, starts, ends, steps, strict=True):
        taken = np.arange(sizes[axis])[slice(*bounds)]
        # Axes may be negative, and shape has as many as sizes.
        place = axis % len(sizes)
        dx = adjoint_of_take(g, dx, shape, place, taken, sizes[place])
        shape[place] = sizes[place]
    return _only(step, dx)


@vjp("Pad")
def pad(g: Emitter, step: Step) -> Gradients:
    """y = x in a frame of zeros, or of x itself (reflect, edge, wrap): dx = what went where.

    A constant frame gives nothing back, a negative pad (a cut) gives zeros.
    """
    if step.wants(2):
        raise NoRuleError("a gradient with respect to the value of the padding is needed")
    shape, rank = step.shape(), len(step.shape())
    pads = step.integers(1)
    assert pads is not None
    axes = [a % rank for a in step.integers(3) or range(rank)]
    begins, ends = [0] * rank, [0] * rank
    for number, axis in enumerate(axes):
        begins[axis], ends[axis] = pads[number], pads[len(axes) + number]
    mode = step.get("mode", "constant")
    if mode == "constant":
        cut = [-n for n in begins], [-n for n in ends]
        return _only(step, g.frame(step.dy, step.y_shape, *cut))
    if min(*begins, *ends) < 0:
        raise NoRuleError(f"a negative pad in mode {mode}")
    dx, current = step.dy, list(step.y_shape)
    for axis in range(rank):
        if begins[axis] or ends[axis]:
            taken = np.pad(np.arange(shape[axis]), (begins[axis], ends[axis]), mode=mode)
            dx = adjoint_of_take(g, dx, current, axis, taken, shape[axis])
            current[axis] = shape[axis]
    return _only(step, dx)


def _zeros(g: Emitter, shape: Sizes) -> str:
    return g.expand(g.number(0.0), shape)


@vjp("Gather")
def gather(g: Emitter, step: Step) -> Gradients:
    """y = x[indices] along an axis: dy is added up at the places it came from."""
    shape, axis = step.shape(), step.axis(0)
    picked = step.shape(1)
    count = int(np.prod(picked))
    flat = [*shape[:axis], count, *shape[axis + 1 :]]
    dy = g.reshape(step.dy, flat)
    known = step.constants.get(step.node.input[1])
    if known is not None:
        indices = np.ravel(known).astype(np.int64)
        indices = np.where(indices < 0, indices + shape[axis], indices)
        most = int(np.bincount(indices, minlength=1).max()) if count else 0
        # A table of where each row went is small, unless a few rows are read very often.
        if shape[axis] * most <= 4 * (count + shape[axis]):
            return _only(step, adjoint_of_take(g, dy, flat, axis, indices, shape[axis]))
    front = [axis, *(a for a in range(len(shape)) if a != axis)]
    zeros = _zeros(g, tuple(shape[a] for a in front))
    rows = g.reshape(step.node.input[1], [count, 1])
    added = g.op("ScatterND", zeros, rows, g.transpose(dy, front), reduction="add")
    return _only(step, g.transpose(added, [int(a) for a in np.argsort(front)]))


@vjp("GatherElements")
def gather_elements(g: Emitter, step: Step) -> Gradients:
    """y = x at indices along an axis: dy is added up at the places it came from."""
    zeros, axis = _zeros(g, step.shape()), step.axis(0)
    indices = step.node.input[1]
    dx = g.op("ScatterElements", zeros, indices, step.dy, axis=axis, reduction="add")
    return _only(step, dx)


@vjp("GatherND")
def gather_nd(g: Emitter, step: Step) -> Gradients:
    """y = x at tuples of indices: dy is added up at the places it came from."""
    if step.get("batch_dims", 0):
        raise NoRuleError("batch_dims is not 0")
    zeros = _zeros(g, step.shape())
    return _only(step, g.op("ScatterND", zeros, step.node.input[1], step.dy, reduction="add"))


@vjp("DepthToSpace")
def depth_to_space(g: Emitter, step: Step) -> Gradients:
    """Blocks of channels become blocks of pixels: the inverse permutation."""
    batch, channels, height, width = step.shape()
    block = int(step.attributes["blocksize"])
    if step.get("mode", "DCR") == "DCR":
        return (g.op("SpaceToDepth", step.dy, blocksize=block),)
    split = [batch, channels // block**2, height, block, width, block]
    moved = g.transpose(g.reshape(step.dy, split), [0, 1, 3, 5, 2, 4])
    return (g.reshape(moved, step.shape()),)


@vjp("SpaceToDepth")
def space_to_depth(g: Emitter, step: Step) -> Gradients:
    """Blocks of pixels become blocks of channels: the inverse permutation."""
    return (g.op("DepthToSpace", step.dy, blocksize=int(step.attributes["blocksize"])),)


@vjp("Trilu")
def trilu(g: Emitter, step: Step) -> Gradients:
    """y = a triangle of x: dx = the same triangle of dy."""
    inputs = [step.dy, *step.node.input[1:]]
    return _only(step, g.op("Trilu", *inputs, upper=int(step.get("upper", 1))))


@vjp("CumSum")
def cumulative_sum(g: Emitter, step: Step) -> Gradients:
    """y_i = sum of x_j, j <= i: dx_j = sum of dy_i, i >= j."""
    flags = {"exclusive": int(step.get("exclusive", 0))}
    dx = g.op(
        "CumSum", step.dy, step.node.input[1], reverse=1 - int(step.get("reverse", 0)), **flags
    )
    return _only(step, dx)
