"""How far times of single layers in 8 bits, added up, are from that of the whole model.

    python tools/eight_bit_sums.py "ResNet-20" --assets ../shared

A layer alone enters and leaves 8 bits, a layer between others does neither. So the prediction is
made as a table of layers would make it, and again with a term for each edge: what it costs to
quantise a layer's input, and what to take its output back, which neighbours in 8 bits save. The
model should run on a machine that does nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypedDict

import numpy as np
import onnx
import typer
from onnx import TensorProto, helper, numpy_helper

from cobla_onnx.graph.io.model_file import load_model
from cobla_onnx.graph.layers import find_layers
from cobla_onnx.graph.macs import Shape, fixed_input_shapes, infer_shapes
from cobla_onnx.graph.opset import lifted
from cobla_onnx.latency.single_layer import layer_key, micro_graph
from cobla_onnx.latency.timing import Stopwatch
from cobla_onnx.pipeline.search.eight_bits import stand_in_eight_bits
from cobla_onnx.pipeline.search.latency import example_feeds
from cobla_onnx.runtime.session import Feeds

sys.path.insert(0, str(Path(__file__).parent))
from benchmark_tasks import ROOT, TASKS, find_model
from precision_methods import OPSET


class Effort(TypedDict):
    """How long something is timed."""

    seconds: float
    least: int
    most: int


# Seconds, and least and most rounds, for layers and for whole models.
EFFORT: Effort = {"seconds": 1.0, "least": 15, "most": 100}
WHOLE: Effort = {"seconds": 10.0, "least": 30, "most": 150}


def crossing(shape: Shape, enters: bool) -> onnx.ModelProto:
    """Make a model that quantises a tensor, or that takes a quantised one back."""
    kinds = (TensorProto.FLOAT, TensorProto.UINT8)
    source, target = kinds if enters else kinds[::-1]
    operator = "QuantizeLinear" if enters else "DequantizeLinear"
    scale, zero = np.array(0.02, np.float32), np.array(128, np.uint8)
    tensors = [numpy_helper.from_array(v, n) for n, v in (("scale", scale), ("zero", zero))]
    graph = helper.make_graph(
        [helper.make_node(operator, ["x", "scale", "zero"], ["y"])],
        operator,
        [helper.make_tensor_value_info("x", source, shape)],
        [helper.make_tensor_value_info("y", target, shape)],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def nothing() -> onnx.ModelProto:
    """Make a model that takes what it takes to call one."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    node = helper.make_node("Identity", ["x"], ["y"])
    graph = helper.make_graph([node], "nothing", values[:1], values[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def fastest(
    stopwatch: Stopwatch,
    models: Sequence[onnx.ModelProto],
    effort: Effort,
    feeds: Feeds | None = None,
) -> list[float]:
    """Least milliseconds of models that take the same inputs, run in turn.

    Not medians: what else a machine does adds more to a long run than to short ones.
    """
    times = stopwatch.times(models, feeds, **effort)
    return [1000 * float(value) for value in np.nanmin(times, axis=0)]


def sums(model: onnx.ModelProto, stopwatch: Stopwatch) -> tuple[float, float, float]:
    """Add up milliseconds of layers: in floating point, in 8 bits, and of the edges between."""
    shapes = infer_shapes(model, fixed_input_shapes(model, {}))
    ends = {value.name for value in (*model.graph.input, *model.graph.output)}
    known: dict[object, tuple[float, ...]] = {}
    total = np.zeros(3)
    # Both forms of a layer have it, so that it is in no difference between them.
    (call,) = fastest(stopwatch, [nothing()], EFFORT)
    for layer in find_layers(model).layers:
        for use in layer.uses:
            key = layer_key(model, layer, use, shapes)
            if key not in known:
                alone = micro_graph(model, layer, use, shapes).model
                both = [alone, stand_in_eight_bits(alone)]
                known[key] = tuple(fastest(stopwatch, both, EFFORT))
            total[:2] += known[key]
            for name, enters in ((use.data, True), (use.output, False)):
                edge = (tuple(shapes[name]), enters)
                if edge not in known:
                    known[edge] = tuple(fastest(stopwatch, [crossing(*edge)], EFFORT))
                total[2] += 0.0 if name in ends else known[edge][0] - call
    floats, narrow, edges = map(float, total)
    return floats, narrow, edges


def main(
    name: Annotated[str, typer.Argument(help="Of a model of tools/benchmark_tasks.py.")],
    assets: Annotated[Path, typer.Option(help="Folder with models/.")] = ROOT / "../shared",
    wheels: Annotated[Path, typer.Option(help="Folder with wheels that hold models.")] = Path(),
    threads: int = 1,
) -> None:
    """Print what the sums predict of the model in 8 bits, and what is measured."""
    (task,) = [task for task in TASKS if task.name == name]
    model, stopwatch = (
        lifted(load_model(find_model(task, assets, wheels)), OPSET),
        Stopwatch(threads),
    )
    floats, narrow, edges = sums(model, stopwatch)
    feeds = example_feeds(model, fixed_input_shapes(model, {}), threads, 0)
    before, after = fastest(stopwatch, [model, stand_in_eight_bits(model)], WHOLE, feeds)
    rest = before - floats
    print(f"{name}, {threads} threads: {before:.3g} ms, {floats:.3g} of them in layers alone")
    print(f"layers alone in 8 bits: {narrow:.3g} ms; what neighbours save of it: {edges:.3g} ms")
    print(f"by the sum of layers: {(rest + narrow) / before:.3f} of the time")
    print(f"with a term for each edge: {(rest + narrow - edges) / before:.3f}")
    print(f"measured: {after / before:.3f}")


if __name__ == "__main__":
    typer.run(main)
