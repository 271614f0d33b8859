"""Rules against central finite differences.

In float64 by onnx's reference implementation. Where that is wrong (grouped ConvTranspose,
pooling with padding, GlobalMaxPool of other than two axes, LRN), by onnxruntime in float32:
these operators are linear in each input, or linear between kinks, so that a difference over
a large step is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from scipy import special

from cobla_onnx.autodiff.backward import backward
from cobla_onnx.autodiff.emitter import Emitter
from cobla_onnx.autodiff.prepare import prepare
from cobla_onnx.runtime.session import open_session

DOUBLE, FLOAT = TensorProto.DOUBLE, TensorProto.FLOAT


class Erf(OpRun):
    """The reference's own is in float32 whatever its input."""

    op_domain = ""

    def _run(self, x):
        return (special.erf(x),)


class Gelu(OpRun):
    op_domain = ""

    def _run(self, x, approximate=None):
        if approximate == "tanh":
            return (0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),)
        return (0.5 * x * (1 + special.erf(x / np.sqrt(2))),)


def runner(model: onnx.ModelProto, element_type: int) -> Any:
    """Something with a method run(names, feeds)."""
    if element_type == DOUBLE:
        return ReferenceEvaluator(model, new_ops=[Erf, Gelu])
    return open_session(model, 1)


def forward_model(
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, np.ndarray],
    outputs: Sequence[str],
    constants: dict[str, np.ndarray],
    opset: int,
    element_type: int = DOUBLE,
) -> onnx.ModelProto:
    kinds = {n: helper.np_dtype_to_tensor_dtype(a.dtype) for n, a in inputs.items()}
    graph = helper.make_graph(
        nodes,
        "forward",
        [helper.make_tensor_value_info(n, kinds[n], a.shape) for n, a in inputs.items()],
        [helper.make_tensor_value_info(n, element_type, None) for n in outputs],
        [numpy_helper.from_array(a, n) for n, a in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def gradients_of(
    model: onnx.ModelProto,
    seeds: Sequence[str],
    wanted: Sequence[str],
    element_type: int = DOUBLE,
) -> tuple[onnx.ModelProto, dict[str, str]]:
    """Model with inputs ``seed/<output>`` and the gradients by `wanted` as outputs."""
    forward = prepare(model, wanted, {}, element_type, 1)
    g = Emitter({n for node in forward.model.graph.node for n in node.output}, element_type)
    found = backward(g, forward, {name: f"seed/{name}" for name in seeds}, list(wanted))
    result = onnx.ModelProto()
    result.CopyFrom(forward.model)
    graph = result.graph
    graph.node.extend(g.nodes)
    graph.initializer.extend(g.initializers)
    for name in seeds:
        shape = forward.shapes[name]
        graph.input.append(helper.make_tensor_value_info(f"seed/{name}", element_type, shape))
    del graph.output[:]
    for name in found.gradients.values():
        graph.output.append(helper.make_tensor_value_info(name, element_type, None))
    assert not found.blocked, found.blocked
    return result, found.gradients


def check(
    nodes: onnx.NodeProto | Sequence[onnx.NodeProto],
    inputs: dict[str, np.ndarray],
    wanted: Sequence[str] | None = None,
    *,
    outputs: Sequence[str] = ("y",),
    constants: dict[str, np.ndarray] | None = None,
    opset: int = 18,
    step: float = 1e-6,
    tolerance: float = 1e-6,
    element_type: int = DOUBLE,
) -> None:
    """Compare the gradients of sum(seed * output) with differences."""
    nodes = [nodes] if isinstance(nodes, onnx.NodeProto) else list(nodes)
    wanted = list(inputs) if wanted is None else list(wanted)
    dtype = helper.tensor_dtype_to_np_dtype(element_type)
    inputs = {n: a.astype(dtype) if a.dtype.kind == "f" else a for n, a in inputs.items()}
    model = forward_model(nodes, inputs, outputs, constants or {}, opset, element_type)
    run = runner(model, element_type)
    generator = np.random.default_rng(0)
    values = run.run(list(outputs), inputs)
    seeds: dict[str, Any] = {
        f"seed/{n}": generator.standard_normal(v.shape).astype(dtype)
        for n, v in zip(outputs, values, strict=True)
    }

    def loss(feeds: dict[str, np.ndarray]) -> float:
        results = run.run(list(outputs), feeds)
        return float(
            sum((s.astype(float) * r).sum() for s, r in zip(seeds.values(), results, strict=True))
        )

    derived, names = gradients_of(model, outputs, wanted, element_type)
    results = runner(derived, element_type).run([names[n] for n in wanted], {**inputs, **seeds})
    for name, actual in zip(wanted, results, strict=True):
        array = inputs[name]
        assert actual.shape == array.shape, (name, actual.shape, array.shape)
        assert actual.dtype == dtype
        for direction in directions(array.shape):
            moved = [(array + s * step * direction).astype(dtype) for s in (1, -1)]
            ends = [loss({**inputs, name: end}) for end in moved]
            expected = (ends[0] - ends[1]) / (2 * step)
            found = float((actual.astype(float) * direction).sum())
            assert abs(found - expected) <= tolerance * max(1.0, abs(expected)), (name, found)


def directions(shape: tuple[int, ...]) -> list[np.ndarray]:
    """A few single elements, which would show one wrong number, and two random directions."""
    generator = np.random.default_rng(1)
    count = int(np.prod(shape))
    picked = generator.permutation(count)[:6]
    singles = [(np.arange(count) == index).astype(float).reshape(shape) for index in picked]
    # Bounded elements, so that no kink further than a step away is crossed.
    return [*singles, *(generator.uniform(-1, 1, (2, *shape)))]


def distinct(*shape: int, seed: int = 0, spacing: float = 0.01) -> np.ndarray:
    """Numbers around 0 of which no two are nearer than `spacing`, and none to 0: no kinks."""
    count = int(np.prod(shape))
    order = np.random.default_rng(seed).permutation(count)
    return ((order - count // 2 + 0.5) * spacing).reshape(shape).astype(np.float64)


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Standard normal numbers."""
    return np.random.default_rng(seed).standard_normal(shape)


def check_linear(*arguments: Any, step: float = 0.5, **settings: Any) -> None:
    """`check` by onnxruntime in float32, with a step as large as can be."""
    check(*arguments, step=step, tolerance=1e-3, element_type=FLOAT, **settings)
