"""How the time of the main job grows with a model's layers, and with the samples.

    python tools/benchmark_growth.py run results.json
    python tools/benchmark_growth.py table results.json --write docs/benchmarks.md

Models are chains of residual blocks, one 3 x 3 convolution of 32 channels each, on random pictures
of 16 x 16, with random weights whose singular values fall as those of trained ones do. Each is cut
to half of its bytes by `cobla_onnx.compress` in a process of its own. Figures are seconds of the
processor, imports and opening among them: what other programs do changes them little. Rows that
are in the results are not measured again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import typer
from onnx import TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).parent))
import field

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
BEGIN = "<!-- measured by tools/benchmark_growth.py -->"
END = "<!-- end of what tools/benchmark_growth.py measured -->"
LAYERS, SAMPLES = (8, 16, 32, 64), (64, 128, 256, 512)
# What stays the same while the other one grows.
FEW_LAYERS, FEW_SAMPLES = LAYERS[0], SAMPLES[0]
CHANNELS, SIZE, CLASSES = 32, 16, 10
# Power by which singular values fall with their number.
DECAY = 0.7

Row = dict[str, Any]


def chain(layers: int) -> onnx.ModelProto:
    """Return a chain of residual blocks, `layers` convolutions and a classifier."""
    generator = np.random.default_rng(0)
    nodes, weights, last = [], {}, "x"
    for number in range(layers):
        weights[f"w{number}"] = _decaying(generator, CHANNELS, CHANNELS * 9).reshape(
            CHANNELS, CHANNELS, 3, 3
        )
        conv, kept, added = f"conv{number}", f"relu{number}", f"sum{number}"
        nodes.append(helper.make_node("Conv", [last, f"w{number}"], [conv], conv, pads=[1] * 4))
        nodes.append(helper.make_node("Relu", [conv], [kept], kept))
        nodes.append(helper.make_node("Add", [last, kept], [added], added))
        last = added
    weights["classes"] = _decaying(generator, CHANNELS, CLASSES)
    nodes += [
        helper.make_node("ReduceMean", [last], ["mean"], "mean", axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["mean", "classes"], ["logits"], "classifier"),
    ]
    shape = ["n", CHANNELS, SIZE, SIZE]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", CLASSES])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _decaying(generator: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Draw a matrix whose singular values fall by a power of their number."""
    left, _, right = np.linalg.svd(generator.standard_normal((rows, columns)), full_matrices=False)
    values = np.arange(1, len(right) + 1) ** -DECAY
    return ((left * values) @ right).astype(np.float32)


@app.command(hidden=True)
def one(layers: int, samples: int) -> None:
    """Compress one model with so many samples, in this process."""
    from cobla_onnx import Budget, compress

    data = np.random.default_rng(1).standard_normal((samples, CHANNELS, SIZE, SIZE))
    compress(chain(layers), Budget(mem=0.5), data={"x": data.astype(np.float32)}, threads=1)


def pairs() -> list[tuple[int, int]]:
    """Numbers of layers and of samples that are measured: either one grows."""
    return [*((n, FEW_SAMPLES) for n in LAYERS), *((FEW_LAYERS, n) for n in SAMPLES[1:])]


@app.command()
def run(
    results: Path,
    limit: field.Limit = 1800,
) -> None:
    """Measure what is not measured yet."""
    for layers, samples in pairs():
        key = f"{layers} | {samples}"
        if key in field.read(results):
            continue
        row = field.run_child([sys.executable, __file__, "one", str(layers), str(samples)], limit)
        field.write(results, field.read(results) | {key: row})
        print(f"{key}: {json.dumps(row)}", file=sys.stderr, flush=True)


@app.command()
def table(
    results: Path,
    page: field.Page = None,
) -> None:
    """Print the tables in Markdown, or put them between the markers of a page."""
    field.publish(print_tables(field.read(results)), page, BEGIN, END)


def print_tables(rows: Mapping[str, Row]) -> str:
    """Return a table for growing layers, and one for growing samples."""
    layers = [(n, rows.get(f"{n} | {FEW_SAMPLES}", {})) for n in LAYERS]
    samples = [(n, rows.get(f"{FEW_LAYERS} | {n}", {})) for n in SAMPLES]
    return "\n\n".join(
        [
            _table(f"layers, {FEW_SAMPLES} samples", layers),
            _table(f"samples, {FEW_LAYERS} layers", samples),
        ]
    )


def _table(head: str, rows: list[tuple[int, Row]]) -> str:
    counts = [str(count) for count, _ in rows]
    seconds = [row.get("cpu_seconds") if row.get("exit_code") == 0 else None for _, row in rows]
    lines = [
        [head, *counts],
        ["---"] * (len(rows) + 1),
        ["seconds of the processor", *("-" if s is None else f"{s:.1f}" for s in seconds)],
        ["of which each adds, ms", "", *_added([count for count, _ in rows], seconds)],
    ]
    return "\n".join(field.line(first, cells) for first, *cells in lines)


def _added(counts: list[int], seconds: list[float | None]) -> list[str]:
    """Milliseconds that each further layer or sample takes, from one column to the next."""
    cells = []
    for place in range(1, len(counts)):
        before, after = seconds[place - 1 : place + 1]
        if before is None or after is None:
            cells.append("-")
        else:
            more = counts[place] - counts[place - 1]
            cells.append(f"{1000 * (after - before) / more:.0f}")
    return cells


if __name__ == "__main__":
    app()
