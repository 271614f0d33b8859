"""Time and memory of data-free compression of a VGG-16 with random weights (138 M).

Compared with what numpy needs for the same matrices alone: the eigendecomposition of the
smaller Gram matrix (which cobla-onnx uses too) of every layer under every scheme. Peak
memory is that of a child process (Linux only), libraries included, as a multiple of the
model file. Run from the repository's root::

    python tools/benchmark_scale.py
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cobla_onnx import Budget, compress
from cobla_onnx.graph.layers import find_layers, read_weight
from cobla_onnx.lowrank.schemes import schemes_for

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def vgg16() -> onnx.ModelProto:
    """VGG-16 with random weights: 13 convolutions and 3 Gemm."""
    generator = np.random.default_rng(0)
    nodes, weights, x, channels = [], [], "image", 3

    def weight(name: str, *shape: int) -> str:
        scale = np.float32(np.sqrt(2 / np.prod(shape[1:])))
        array = generator.standard_normal(shape, dtype=np.float32) * scale
        weights.append(numpy_helper.from_array(array, name))
        return name

    for stage, widths in enumerate(STAGES):
        for number, width in enumerate(widths):
            name = f"conv{stage + 1}_{number + 1}"
            w = weight(f"{name}.weight", width, channels, 3, 3)
            nodes.append(helper.make_node("Conv", [x, w], [name], name, pads=[1, 1, 1, 1]))
            nodes.append(helper.make_node("Relu", [name], [f"{name}.relu"]))
            x, channels = f"{name}.relu", width
        pool = f"pool{stage + 1}"
        nodes.append(helper.make_node("MaxPool", [x], [pool], kernel_shape=[2, 2], strides=[2, 2]))
        x = pool
    nodes.append(helper.make_node("Flatten", [x], ["flat"]))
    x, inputs = "flat", 25088
    for number, outputs in enumerate((4096, 4096, 1000)):
        name = f"fc{number + 6}"
        w = weight(f"{name}.weight", outputs, inputs)
        nodes.append(helper.make_node("Gemm", [x, w], [name], name, transB=1))
        x, inputs = name, outputs
        if outputs == 4096:
            nodes.append(helper.make_node("Relu", [name], [f"{name}.relu"]))
            x = f"{name}.relu"
    graph = helper.make_graph(
        nodes,
        "vgg16",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, 224, 224])],
        [helper.make_tensor_value_info("fc8", TensorProto.FLOAT, ["N", 1000])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def baseline(model: onnx.ModelProto) -> float:
    """Seconds that numpy needs for the eigendecompositions alone."""
    seconds = 0.0
    for layer in find_layers(model).layers:
        for scheme in schemes_for(layer):
            (matrix,) = scheme.matrix(read_weight(model, layer)).astype(np.float64)
            started = time.perf_counter()
            small = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
            np.linalg.eigh(small @ small.T)
            seconds += time.perf_counter() - started
    return seconds


def child(path: str) -> None:
    """Compress in a process of its own and print seconds and peak memory in bytes."""
    started = time.perf_counter()
    result = compress(path, Budget(mem=0.3))
    result.save(f"{path}.out")
    seconds = time.perf_counter() - started
    # Not getrusage: a process inherits its parent's peak there.
    status = Path("/proc/self/status").read_text()
    peak = next(int(row.split()[1]) * 1024 for row in status.splitlines() if "VmHWM" in row)
    print(seconds, peak)


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vgg16.onnx"
        model = vgg16()
        path.write_bytes(model.SerializeToString())
        del model
        done = subprocess.run(
            [sys.executable, __file__, "--child", str(path)],
            check=True,
            capture_output=True,
            text=True,
        )
        reference = baseline(onnx.load(path))
        seconds, peak = map(float, done.stdout.split())
        size = path.stat().st_size
        smaller = Path(f"{path}.out").stat().st_size
    print(f"model {size / 1e6:.0f} MB, written {smaller / 1e6:.0f} MB ({smaller / size:.4f})")
    print(f"numpy eigendecompositions alone: {reference:.1f} s")
    print(f"compress and save: {seconds:.1f} s, ratio {seconds / reference:.2f}")
    print(f"peak memory {peak / 1e6:.0f} MB, {peak / size:.2f} x the model")


if __name__ == "__main__":
    main()
