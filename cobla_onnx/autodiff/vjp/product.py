"""Rules for matrix products: y = a b gives da = dy b^T, db = a^T dy."""

from __future__ import annotations

from cobla_onnx.autodiff.emitter import Emitter
from cobla_onnx.autodiff.vjp.registry import Gradients, Sizes, Step, vjp

__all__: list[str] = []


@vjp("MatMul")
def matmul(g: Emitter, step: Step) -> Gradients:
    """Stacks of matrices, with broadcasting; a vector is a row on the left, a column on the right.

    numpy.matmul's rules. Against one matrix on the right the whole stack is one product.
    """
    a, b = step.node.input
    shapes = step.shape(0), step.shape(1)
    left: Sizes = shapes[0] if len(shapes[0]) > 1 else (1, *shapes[0])
    right: Sizes = shapes[1] if len(shapes[1]) > 1 else (*shapes[1], 1)
    rows, inner, columns = left[-2], left[-1], right[-1]
    batch = step.y_shape[: len(step.y_shape) - sum(len(s) > 1 for s in shapes)]
    dy = step.dy
    if len(shapes[0]) == 1 or len(shapes[1]) == 1:
        dy = g.reshape(dy, [*batch, rows, columns])
        a, b = g.reshape(a, left), g.reshape(b, right)
    da = db = None
    if step.wants(0):
        da = g.matmul(dy, g.swap(b, len(right)))
        da = g.sum_to(da, (*batch, rows, inner), left)
        da = g.reshape(da, shapes[0]) if len(shapes[0]) == 1 else da
    if step.wants(1):
        if len(right) == 2:
            count = rows
            for size in batch:
                count *= size
            flat_a = g.reshape(a, [count, inner]) if len(left) > 2 else a
            flat_dy = g.reshape(dy, [count, columns]) if batch else dy
            db = g.op("Gemm", flat_a, flat_dy, transA=1)
        else:
            db = g.matmul(g.swap(a, len(left)), dy)
            db = g.sum_to(db, (*batch, inner, columns), right)
        db = g.reshape(db, shapes[1]) if len(shapes[1]) == 1 else db
    return da, db


@vjp("Gemm")
def gemm(g: Emitter, step: Step) -> Gradients:
    """Y = alpha a' b' + beta c, where ' may transpose: the products of BLAS level 3."""
    a, b = step.node.input[:2]
    turned_a, turned_b = int(step.get("transA", 0)), int(step.get("transB", 0))
    alpha, beta = float(step.get("alpha", 1.0)), float(step.get("beta", 1.0))
    da = db = dc = None
    if step.wants(0) and turned_a:
        da = g.op("Gemm", b, step.dy, alpha=alpha, transA=turned_b, transB=1)
    elif step.wants(0):
        da = g.op("Gemm", step.dy, b, alpha=alpha, transB=1 - turned_b)
    if step.wants(1) and turned_b:
        db = g.op("Gemm", step.dy, a, alpha=alpha, transA=1, transB=turned_a)
    elif step.wants(1):
        db = g.op("Gemm", a, step.dy, alpha=alpha, transA=1 - turned_a)
    if step.wants(2):
        dc = g.sum_to(step.dy, step.y_shape, step.shape(2))
        dc = dc if beta == 1.0 else g.mul(dc, beta)
    return (da, db, dc)[: len(step.node.input)]
