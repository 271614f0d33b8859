"""What it gains to cut attention heads inside, before ranks are chosen, at equal bytes.

    python tools/cut_heads.py MODEL DATA TEST --left 26,22,16 --budgets 0.8,0.6

For encoders that PyTorch exported from transformers' BERT. Of each head, the scores depend on its
query and key weights by Wq Wk^T alone, and what it adds to the output by Wv Wo. Both products are
cut to a rank within the head, with the biases as one more row and weighted by the inputs' second
moment S: the SVD of S^1/2 Wq Wk^T S^1/2 and of S^1/2 Wv Wo (MoDeGPT, arXiv 2408.09632; A3,
arXiv 2505.12942). The node count stays, and all heads keep as many numbers. Then ranks are chosen
by the package (``--mem``), at the bytes of the original that a budget allows, with the heads cut
and without, and the vectors of the test sentences are compared with the original's.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import typer
from field import judge
from field_data import feeds_for
from numpy.typing import NDArray
from onnx import numpy_helper

from cobla_onnx import Budget, compress
from cobla_onnx.graph.io.model_file import stored_bytes
from cobla_onnx.runtime.session import open_session

Array = NDArray[Any]


@dataclass
class Attention:
    """The initializers of a block of attention, as they stand in the model."""

    block: str
    data: str
    weights: dict[str, onnx.TensorProto]
    biases: dict[str, onnx.TensorProto]
    sizes: list[onnx.TensorProto]
    heads: int


def blocks(model: onnx.ModelProto) -> Iterator[Attention]:
    """Yield all blocks, found by the names that transformers gives."""
    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    made = {out: node for node in graph.node for out in node.output}
    keys = [n for n in graph.node if n.op_type == "MatMul" and "/self/key/" in n.output[0]]
    for key in keys:
        block = key.output[0].split("self/key/")[0]
        paths = {"q": "self/query", "k": "self/key", "v": "self/value", "o": "output/dense"}
        nodes = {
            part: next(n for n in graph.node if n.name == f"{block}{path}/MatMul")
            for part, path in paths.items()
        }
        adds = {
            part: next(n for n in graph.node if n.name == f"{block}{path}/Add")
            for part, path in paths.items()
        }
        biases = {
            part: next(stored[name] for name in add.input if name in stored)
            for part, add in adds.items()
        }
        shapes = [n for n in graph.node if n.op_type == "Concat" and n.name.startswith(block)]
        constants = [made[name] for node in shapes for name in node.input if name in made]
        sizes = [n.attribute[0].t for n in constants if n.op_type == "Constant"]
        width = int(numpy_helper.to_array(sizes[-1]).ravel()[0])
        counts = {int(numpy_helper.to_array(size).ravel()[0]) for size in sizes} - {width}
        weights = {part: stored[node.input[1]] for part, node in nodes.items()}
        heads = min(c for c in counts if c > 0 and width % c == 0 and width // c in counts)
        yield Attention(block, key.input[0], weights, biases, sizes, heads)


def moments(model: onnx.ModelProto, names: list[str], data: Path) -> dict[str, Array]:
    """Second moments of tensors (positions, size), each with a 1 at its end."""
    tapped = onnx.ModelProto()
    tapped.CopyFrom(model)
    tapped.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = open_session(tapped, 1, optimized=True)
    sums: dict[str, Array] = {}
    count = 0
    for feeds in feeds_for(session, data):
        (mask,) = [v for name, v in feeds.items() if "mask" in name]
        for name, value in zip(names, session.run(names, feeds), strict=True):
            rows = value[mask.astype(bool)].astype(np.float64)
            rows = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
            sums[name] = sums.get(name, 0.0) + rows.T @ rows
        count += int(mask.sum())
    return {name: total / count for name, total in sums.items()}


def roots(second: Array) -> tuple[Array, Array]:
    """Return S^1/2 and its inverse, with a floor of 1e-6 of the mean eigenvalue."""
    values, vectors = np.linalg.eigh(second)
    values = np.sqrt(np.maximum(values, 1e-6 * values.mean()))
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T


def cut(model: onnx.ModelProto, data: Path, left: int) -> onnx.ModelProto:
    """Return a copy whose heads keep `left` numbers."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    found = list(blocks(copy))
    seen = moments(model, [each.data for each in found], data)
    for each in found:
        root, inverse = roots(seen[each.data])
        parts = {
            part: numpy_helper.to_array(tensor).astype(np.float64)
            for part, tensor in each.weights.items()
        }
        for part in "qkv":
            bias = numpy_helper.to_array(each.biases[part]).astype(np.float64)
            parts[part] = np.concatenate([parts[part], bias[None]])
        width = parts["o"].shape[0] // each.heads
        new: dict[str, list[Array]] = {part: [] for part in "qkvo"}
        for head in range(each.heads):
            at = slice(head * width, (head + 1) * width)
            u, s, vt = np.linalg.svd(root @ parts["q"][:, at] @ parts["k"][:, at].T @ root)
            scale = np.sqrt(s[:left])
            new["q"].append(inverse @ (u[:, :left] * scale))
            new["k"].append(inverse @ (vt[:left].T * scale))
            u, s, vt = np.linalg.svd(root @ parts["v"][:, at] @ parts["o"][at], full_matrices=False)
            scale = np.sqrt(s[:left])
            new["v"].append(inverse @ (u[:, :left] * scale))
            new["o"].append((vt[:left].T * scale).T)
        for part in "qkv":
            stacked = np.concatenate(new[part], axis=1).astype(np.float32)
            _store(each.weights[part], stacked[:-1])
            _store(each.biases[part], stacked[-1])
        _store(each.weights["o"], np.concatenate(new["o"]).astype(np.float32))
        for size in each.sizes:
            value = numpy_helper.to_array(size)
            renamed = {width: left, each.heads * width: each.heads * left}
            changed = np.array([renamed.get(int(v), int(v)) for v in value.ravel()], value.dtype)
            _store(size, changed.reshape(value.shape))
    return copy


def _store(tensor: onnx.TensorProto, value: Array) -> None:
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), tensor.name))


def main(
    model: Path,
    data: Path,
    test: Path,
    left: Annotated[str, typer.Option(help="Numbers that heads keep.")] = "26,22,16",
    budgets: Annotated[str, typer.Option(help="Fractions of the bytes.")] = "0.8,0.6",
) -> None:
    """Print a line for each number of heads and each budget."""
    original = onnx.load(model)
    whole = stored_bytes(original)
    with tempfile.TemporaryDirectory() as folder:
        at = {"as they are": model}
        for number in map(int, left.split(",")):
            path = at[f"{number} left"] = Path(folder) / f"{number}.onnx"
            onnx.save(cut(original, data, number), path)
        print("| heads | bytes | figures |\n| --- | --- | --- |")
        for name, path in at.items():
            if path != model:
                share = stored_bytes(onnx.load(path)) / whole
                print(f"| {name} | {share:.3f} | {judge('embedding', model, path, test)} |")
            for budget in map(float, budgets.split(",")):
                here = budget * whole / stored_bytes(onnx.load(path))
                out = Path(folder) / "out.onnx"
                compress(path, Budget(mem=min(here, 1.0)), data=data, threads=2).save(out)
                figures = judge("embedding", model, out, test)
                print(f"| {name}, then ranks | {budget} | {figures} |", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    typer.run(main)
