"""What a step of distillation takes, against PyTorch on the same compressed model.

    pip install ".[images]" torch torchvision onnx2torch
    python tools/benchmark_step.py --assets ../shared --threads 1 --threads 2

A step is forward, backward and Adam, over 32 samples and all factors and biases that learn. Both
take steps in turn, in one process, on the model that ``cobla-onnx --mem`` makes without data. The
machine should do nothing else.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import MagicMock

import numpy as np
import onnx
import typer

sys.path.insert(0, str(Path(__file__).parent))
import benchmark
from benchmark_tasks import ROOT, TASKS, Bench

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
MODELS = {"ResNet-20": 0.3, "SqueezeNet 1.1": 0.6}
"""Tasks, and the part of their memory that is kept."""
SAMPLES, RATE, TEMPERATURE = 32, 1e-3, 2.0
SECONDS, ROUNDS = 40.0, (8, 60)


def ours(pool: Any, replacements: Any, judge: Any) -> Callable[[], Any]:
    """Make a step of ours."""
    from cobla_onnx.distillation.adam import Adam
    from cobla_onnx.distillation.lessons import Lessons, taught_by
    from cobla_onnx.distillation.parameters import Parameters

    taught = taught_by(judge)
    parameters = Parameters(taught.model, replacements)
    lessons = Lessons(judge, taught, parameters, pool)
    values, adam = parameters.start(), Adam(parameters.sizes())

    def step() -> None:
        _, gradient = lessons.gradient(values, range(SAMPLES))
        values[:] += adam.step(gradient, RATE)

    return step


def theirs(bench: Bench, threads: int, compressed: onnx.ModelProto) -> Callable[[], Any]:
    """Make a step of PyTorch's."""
    # onnx2torch imports it for operators that are not here.
    sys.modules["torchvision"] = sys.modules["torchvision.ops"] = MagicMock()
    import onnx2torch
    import torch

    torch.set_num_threads(threads)
    if compressed.opset_import[0].version < 12:
        compressed = onnx.version_converter.convert_version(compressed, 12)
    for node in compressed.graph.node:
        if node.op_type == "Dropout":
            # onnx2torch fails at those with a mask.
            node.op_type, node.input[:], node.output[:] = (
                "Identity",
                node.input[:1],
                node.output[:1],
            )
            del node.attribute[:]
    module = onnx2torch.convert(compressed).eval()
    for tensor in module.parameters():
        tensor.requires_grad_()
    optimiser = torch.optim.Adam(module.parameters(), lr=RATE)
    x = torch.from_numpy(bench.calibration[:SAMPLES])
    with torch.no_grad():
        right = (module(x) / TEMPERATURE).softmax(1)
    loss_of = torch.nn.KLDivLoss(reduction="batchmean")

    def step() -> None:
        optimiser.zero_grad()
        loss_of((module(x) / TEMPERATURE).log_softmax(1), right).backward()
        optimiser.step()

    return step


def child(name: str, assets: Path, threads: int) -> dict[str, float]:
    """Return the medians of both, in seconds."""
    from cobla_onnx import Budget
    from cobla_onnx.graph.layers import read_weight
    from cobla_onnx.latency.timing import interleaved
    from cobla_onnx.runtime.pool import open_pool
    from cobla_onnx.variants.low_rank.nodes import make_replacement
    from cobla_onnx.variants.low_rank.svd import factorize
    from cobla_onnx.variants.rewrite import rewrite

    task = next(task for task in TASKS if task.name == name)
    bench = Bench(task, assets, Path(), threads)
    method = benchmark.prepare(bench, "ours")
    analysis = method.analysis
    constraints = analysis.constraints(Budget(mem=MODELS[name]))
    plan = analysis.plan(benchmark.data_free(analysis.curves, constraints))
    replacements = []
    for decision in plan.decisions:
        if decision.scheme is not None:
            layer, scheme, rank = analysis.resolve(decision)
            factors = factorize(scheme.matrix(read_weight(bench.model, layer)), rank)
            replacements.append(make_replacement(layer, scheme, factors))
    least, most = ROUNDS
    with open_pool(threads) as pool:
        runs = [
            ours(pool, replacements, method.evidence.judge),
            theirs(bench, threads, rewrite(bench.model, replacements)),
        ]
        found = interleaved(runs, seconds=SECONDS, least=least, most=most)
    times = np.nanmedian(found, axis=0)
    return {"ours": float(times[0]), "PyTorch": float(times[1])}


@app.command()
def main(
    assets: Annotated[Path, typer.Option(help="Folder with models/ and data/.")] = ROOT
    / "../shared",
    threads: Annotated[list[int], typer.Option(help="Of both; may be repeated.")] = [1, 2],  # noqa: B006
    only: Annotated[str, typer.Option(help="Part of a model's name.")] = "",
) -> None:
    """Print a table in Markdown."""
    print("| model | threads | ours, ms a sample | PyTorch | ratio |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    for name in MODELS:
        for each in threads if only in name else ():
            command = [sys.executable, __file__, "--child", json.dumps([name, str(assets), each])]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            mine, other = (1e3 * found[key] / SAMPLES for key in ("ours", "PyTorch"))
            print(
                f"| {name} | {each} | {mine:.1f} | {other:.1f} | {mine / other:.2f} |", flush=True
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        given = json.loads(sys.argv[2])
        print(json.dumps(child(given[0], Path(given[1]), given[2])))
    else:
        app()
