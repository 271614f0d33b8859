"""Time, memory and growth of compression at scale, as ratios to numpy's own SVD.

Models have random weights: VGG-16 (138 M), and a stack of transformer MLP blocks (2048 x 8192
and back, 30 blocks are 1.0 B) whose weights lie in a file beside it. Each run is a process of
its own; its seconds of processor time, children included, are told beside those on the clock,
which other work on the machine stretches. Peak memory (Linux only) is that of the main
process, and of its largest worker. Run from the repository's root::

    python tools/benchmark_scale.py vgg
    python tools/benchmark_scale.py stack --blocks 30
    python tools/benchmark_scale.py samples ../shared/models/squeezenet1.1_fp32.onnx

numpy's SVD is measured on each shape of matrix once, and on none that would take more than
`LARGEST` multiplications; the rest is extrapolated from the largest one measured, by m n^2.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import typer
from onnx import TensorProto, helper, numpy_helper
from threadpoolctl import threadpool_limits

from cobla_onnx import Budget, compress
from cobla_onnx.graph.io.model_file import load_model
from cobla_onnx.graph.layers import find_layers
from cobla_onnx.variants.low_rank.matricisation import schemes_for

sys.path.insert(0, str(Path(__file__).parent))
from process_memory import peak

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
WIDTH, INNER = 2048, 8192
LARGEST = 4e10

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


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
    return _model(nodes, "image", ["N", 3, 224, 224], "fc8", ["N", 1000], weights)


def _model(
    nodes: list[onnx.NodeProto],
    name: str,
    shape: list[Any],
    output: str,
    output_shape: list[Any],
    weights: list[onnx.TensorProto],
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "benchmark",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, output_shape)],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def write_stack(path: Path, blocks: int) -> None:
    """Write MLP blocks with residual connections, the weights in a file beside the model."""
    generator = np.random.default_rng(0)
    nodes, weights, x = [], [], "x"
    data = path.with_suffix(".data")
    with data.open("wb") as file:

        def weight(name: str, *shape: int) -> str:
            array = generator.standard_normal(shape, dtype=np.float32)
            array *= np.float32(np.sqrt(1 / shape[0]))
            tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
            tensor.data_location = TensorProto.EXTERNAL
            entries = {"location": data.name, "offset": file.tell(), "length": array.nbytes}
            for key, value in entries.items():
                tensor.external_data.add(key=key, value=str(value))
            array.tofile(file)
            weights.append(tensor)
            return name

        for block in range(blocks):
            up, down = f"up{block}", f"down{block}"
            nodes += [
                helper.make_node("MatMul", [x, weight(f"{up}.w", WIDTH, INNER)], [up], up),
                helper.make_node("Relu", [up], [f"{up}.relu"]),
                helper.make_node(
                    "MatMul", [f"{up}.relu", weight(f"{down}.w", INNER, WIDTH)], [down], down
                ),
                helper.make_node("Add", [x, down], [f"x{block}"]),
            ]
            x = f"x{block}"
    model = _model(nodes, "x", ["N", WIDTH], x, ["N", WIDTH], weights)
    path.write_bytes(model.SerializeToString())


def numpy_svd(model: onnx.ModelProto) -> tuple[float, float]:
    """Processor seconds of numpy's SVD of all layers under all schemes; share extrapolated."""
    shapes: Counter[tuple[int, int]] = Counter()
    for layer in find_layers(model).layers:
        for scheme in schemes_for(layer):
            groups, rows, columns = scheme.matrix_shape()
            shapes[max(rows, columns), min(rows, columns)] += groups
    generator = np.random.default_rng(0)
    seconds = extrapolated = rate = 0.0
    for (m, n), count in sorted(shapes.items(), key=lambda entry: entry[0][0] * entry[0][1] ** 2):
        cost = m * n**2
        if cost <= LARGEST or not rate:
            matrix = generator.standard_normal((m, n))
            started = time.process_time()
            np.linalg.svd(matrix, full_matrices=False)
            taken = time.process_time() - started
            rate = taken / cost
        else:
            taken = rate * cost
            extrapolated += count * taken
        seconds += count * taken
    return seconds, extrapolated / seconds


def measure(path: Path, **options: Any) -> dict[str, float]:
    """Compress in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "child", str(path), json.dumps(options)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


@app.command(hidden=True)
def child(path: str, options: str) -> None:
    """Compress and print what it took."""
    chosen = json.loads(options)
    mem, out = chosen.pop("mem"), f"{path}.out"
    started = time.perf_counter()
    stages: dict[str, float] = {}
    last = ["start", started]

    def progress(stage: str, done: int, total: int) -> None:
        now, name = time.perf_counter(), stage.partition(":")[0]
        stages[last[0]] = stages.get(last[0], 0.0) + now - last[1]
        last[:] = [name, now]

    result = compress(path, Budget(mem=mem), progress=progress, **chosen)
    progress("save", 0, 1)
    result.save(out)
    progress("end", 0, 1)
    own, others = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    figures = {
        "clock": time.perf_counter() - started,
        "cpu": sum(u.ru_utime + u.ru_stime for u in (own, others)),
        "peak": peak(),
        "worker": others.ru_maxrss * 1024,
        "stages": {name: round(seconds, 1) for name, seconds in stages.items()},
    }
    print(json.dumps(figures))


def _rows(path: Path, size: int, svd: float, runs: dict[str, dict[str, Any]]) -> Iterator[str]:
    yield "| run | CPU s | against numpy's SVD | on the clock, s | peak memory / model |"
    yield "| --- | --- | --- | --- | --- |"
    for name, options in runs.items():
        found = measure(path, **options)
        worker = f" + {found['worker'] / size:.2f} a worker" if "workers" in options else ""
        yield (
            f"| {name} | {found['cpu']:.1f} | {found['cpu'] / svd:.2f} | {found['clock']:.1f} | "
            f"{found['peak'] / size:.2f}{worker} | {found['stages']}"
        )


def _table(path: Path, size: int, runs: dict[str, dict[str, Any]]) -> None:
    with threadpool_limits(1):
        svd, share = numpy_svd(load_model(path))
    print(f"model {size / 1e6:.0f} MB, numpy's SVD {svd:.1f} s, {share:.0%} of it extrapolated")
    for row in _rows(path, size, svd, runs):
        print(row, flush=True)


@app.command()
def vgg(
    runs: Annotated[str, typer.Option(help="Of threads, workers, cache; with commas.")] = (
        "threads,workers,cache"
    ),
) -> None:
    """VGG-16 at memory 0.3: one and two threads, one and two processes, budgets with a cache."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vgg16.onnx"
        path.write_bytes(vgg16().SerializeToString())
        cache = {"cache": f"{folder}/cache", "threads": 2}
        known: dict[str, dict[str, dict[str, Any]]] = {
            "threads": {
                "1 thread": {"mem": 0.3, "threads": 1},
                "2 threads": {"mem": 0.3, "threads": 2},
            },
            "workers": {
                "1 process": {"mem": 0.3, "threads": 2, "workers": 1},
                "2 processes": {"mem": 0.3, "threads": 2, "workers": 2},
            },
            "cache": {
                "2 threads, cache": {"mem": 0.3, **cache},
                "the same budget again": {"mem": 0.3, **cache},
                "another budget": {"mem": 0.4, **cache},
            },
        }
        chosen = {name: options for key in runs.split(",") for name, options in known[key].items()}
        _table(path, path.stat().st_size, chosen)
        if "cache" in runs:
            stored = sum(file.stat().st_size for file in Path(f"{folder}/cache").iterdir())
            print(f"cache: {stored / path.stat().st_size:.2f} of the model")


@app.command()
def stack(
    blocks: Annotated[int, typer.Option(help="33.6 M weights each.")] = 30,
    folder: Annotated[Path | None, typer.Option(help="Where the files lie meanwhile.")] = None,
    runs: Annotated[str, typer.Option(help="Of threads, workers, cache; with commas.")] = "threads",
) -> None:
    """Transformer MLP blocks at memory 0.5."""
    with tempfile.TemporaryDirectory(dir=folder) as inside:
        path = Path(inside) / "stack.onnx"
        write_stack(path, blocks)
        size = path.with_suffix(".data").stat().st_size
        cache = {"threads": 2, "cache": f"{inside}/cache"}
        known: dict[str, dict[str, dict[str, Any]]] = {
            "threads": {"2 threads": {"mem": 0.5, "threads": 2}},
            "workers": {
                "1 process": {"mem": 0.5, "threads": 1, "workers": 1},
                "2 processes": {"mem": 0.5, "threads": 2, "workers": 2},
            },
            "cache": {"cache": {"mem": 0.5, **cache}, "another budget": {"mem": 0.4, **cache}},
        }
        chosen = {name: options for key in runs.split(",") for name, options in known[key].items()}
        _table(path, size, chosen)


@app.command()
def samples(model: Path, counts: str = "64,128,256") -> None:
    """Growth with the number of samples: random images, one thread, no refit."""
    generator = np.random.default_rng(0)
    graph = onnx.load(model).graph
    (value,) = [v for v in graph.input if v.name not in {t.name for t in graph.initializer}]
    sizes = [dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim][1:]
    with tempfile.TemporaryDirectory() as folder:
        for count in map(int, counts.split(",")):
            data = Path(folder) / f"{count}.npy"
            np.save(data, generator.standard_normal((count, *sizes), dtype=np.float32))
            options = {"mem": 0.6, "data": str(data), "threads": 1, "refit": False}
            path = Path(folder) / model.name
            path.write_bytes(model.read_bytes())
            found = measure(path, **options)
            print(count, json.dumps(found), flush=True)


if __name__ == "__main__":
    app()
