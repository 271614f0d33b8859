"""What other ranks would be worth: plans near the chosen one, refitted, on other images.

Each layer's loss curve is multiplied by a random factor and the allocation solved again, so
that every plan keeps the budget and is sensible. How much the plans differ on images that no
decision saw says what a better allocation could gain; how well the samples at hand tell them
apart says whether it could be found. The images are those that are neither the benchmark's
calibration nor its test images, which leaves ResNet-20. The first two figures are by the loss
that decisions follow, see `soften`::

    python tools/neighbours.py --assets ../shared --budget 0.4
"""

from __future__ import annotations

import sys
from copy import copy
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

sys.path.insert(0, str(Path(__file__).parent))
import benchmark
from benchmark_tasks import ROOT, TASKS, Bench

FIGURES = (
    "held back, before refit",
    "held back",
    "held back, divergence",
    "calibration, divergence",
    "others, divergence",
    "others, agreement",
)


def with_images(bench: Bench, images: Any) -> Bench:
    """Return a bench that measures on other images."""
    result = copy(bench)
    result.test, result.labels = images, None
    result.expected = result.outputs(bench.model)
    return result


def other_images(bench: Bench, assets: Path) -> Any:
    """Read the images that the benchmark leaves."""
    images, _ = bench.task.images(assets)
    used = len(bench.calibration) + len(bench.test)
    rest = np.random.default_rng(0).permutation(len(images))[used:]
    if len(rest) < 500:
        raise typer.BadParameter(f"{bench.task.name} has {len(rest)} other images; 500 are needed")
    return images[rest]


def plans(ours: benchmark.Ours, constraints: Any, count: int, spread: float) -> Any:
    """Yield the choices of the chosen plan, then those of its neighbours."""
    from cobla_onnx.allocation import OutputError, allocate
    from cobla_onnx.pipeline.search.output import search_by_output
    from cobla_onnx.pipeline.search.problem import Problem
    from cobla_onnx.pipeline.search.rivals import Rivals

    layers, finisher = ours.analysis.curves, ours.evidence.finisher()
    rivals = Rivals(finisher, ours.evidence.crossfit(finisher))
    problem = Problem(ours.analysis)
    chosen, objective = search_by_output(problem, ours.evidence, rivals, constraints)
    seen = {chosen.allocation.choices}
    yield chosen.allocation.choices
    generator = np.random.default_rng(1)
    while len(seen) <= count:
        factors = np.exp(generator.normal(0, spread, len(layers)))
        curves = [
            [factor * objective.curve(i, j) for j in range(len(layer.curves))]
            for i, (factor, layer) in enumerate(zip(factors, layers, strict=True))
        ]
        choices = allocate(layers, OutputError(curves), constraints, solver="milp").choices
        if choices not in seen:
            seen.add(choices)
            yield choices


def main(
    assets: Annotated[Path, typer.Option(help="Folder with models/ and data/.")] = ROOT
    / "../shared",
    task: Annotated[str, typer.Option(help="Part of the task's name.")] = "ResNet-20",
    budget: Annotated[float, typer.Option(help="Fraction of memory.")] = 0.4,
    count: Annotated[int, typer.Option(help="Neighbours.")] = 15,
    spread: Annotated[float, typer.Option(help="Of the factors' logarithm.")] = 0.2,
    threads: int = 1,
) -> None:
    """Print each plan's losses, how much they vary, and how they go with the others' loss."""
    from cobla_onnx import Budget
    from cobla_onnx.allocation.sqp import Scores
    from cobla_onnx.pipeline.search.data import make_factors, measure_factors
    from cobla_onnx.pipeline.search.loss import scores
    from cobla_onnx.runtime.pool import one_thread
    from cobla_onnx.variants.rewrite import rewrite

    bench = Bench(next(t for t in TASKS if task in t.name), assets, Path(), threads)
    seen = with_images(bench, bench.calibration)
    others = with_images(bench, other_images(bench, assets))
    print("| plan | " + " | ".join(FIGURES) + " |")
    print("| --- |" + " --- |" * len(FIGURES))
    rows = []
    with one_thread:
        ours = benchmark.prepare(bench, "ours")
        constraints = ours.analysis.constraints(Budget(mem=budget))
        finisher = ours.evidence.finisher()
        for number, choices in enumerate(plans(ours, constraints, count, spread)):
            plan = ours.analysis.plan(choices)
            before = scores(finisher, choices)
            after = Scores(*ours.evidence.judge.scores(finisher.refitted_weights(plan)))
            made = measure_factors(ours.evidence, make_factors(finisher, plan, refit=True))
            model = rewrite(bench.model, made.replacements)
            figures = others.figures(model)
            losses = [float(s.mean()) for s in (before.searched, after.searched, after.final)]
            losses += [seen.figures(model)["loss"], figures["loss"]]
            rows.append([*losses, figures["agreement"]])
            name = "chosen" if number == 0 else str(number)
            print(f"| {name} | " + " | ".join(f"{value:.4f}" for value in rows[-1]) + " |")
    table = np.array(rows)
    deviations = table.std(axis=0, ddof=1) / table.mean(axis=0)
    correlations = np.corrcoef(table.T)[FIGURES.index("others, divergence")]
    print("| deviation | " + " | ".join(f"{value:.1%}" for value in deviations) + " |")
    print("| correlation | " + " | ".join(f"{value:.2f}" for value in correlations) + " |")


if __name__ == "__main__":
    typer.run(main)
