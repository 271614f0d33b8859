"""What each part of cobla-onnx is worth: the benchmark with one part off at a time.

Resumable, like the benchmark, and on the same splits of the same tasks::

    python tools/ablation.py run ablation.jsonl --assets ../shared --task SqueezeNet
    python tools/ablation.py table ablation.jsonl

A part is switched off by replacing it in a process of its own.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

sys.path.insert(0, str(Path(__file__).parent))
import benchmark

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def nothing() -> None:
    """Leave all parts on."""


def plain_svd() -> None:
    """Let factors see white data: they become plain truncated SVDs, bias corrected."""
    from cobla_onnx.calibration.moment import Moment
    from cobla_onnx.calibration.statistics import Seen

    inner = Seen.moment

    def white(self: Any, layer: Any) -> Moment:
        found = inner(self, layer)
        second = np.broadcast_to(np.eye(found.second.shape[1]), found.second.shape).copy()
        if layer.bias is not None:
            # The covariance is what counts then.
            second += found.mean[:, :, None] * found.mean[:, None, :]
        return Moment(second, found.mean, found.count, found.effective)

    Seen.moment = white  # type: ignore[method-assign]


def no_scale() -> None:
    """Allocate by relative output error, not by the measured loss."""
    import cobla_onnx.pipeline.search.data as data
    from cobla_onnx.allocation import OutputError, allocate
    from cobla_onnx.pipeline.search.problem import SearchResult

    def by_error(problem: Any, evidence: Any, rivals: Any, constraints: Any) -> Any:
        curves = problem.analysis.curves
        errors = [[curve.errors for curve in layer.curves] for layer in curves]
        found = allocate(curves, OutputError(errors), constraints, solver=problem.solver)
        return SearchResult(found), OutputError(errors)

    data.search_by_output = by_error


def one_scheme() -> None:
    """Unfold all convolutions as ``channel``."""
    for name in ("ours", "ours, loss"):
        _, *rest = benchmark.METHODS[name]
        benchmark.METHODS[name] = ("channel", *rest)  # type: ignore[index]


def one_round() -> None:
    """Do not measure what an allocation chose."""
    import cobla_onnx.pipeline.search.output

    cobla_onnx.pipeline.search.output.ROUNDS = 1


def no_bias() -> None:
    """Leave the biases as they were, until refit."""
    from cobla_onnx.graph.layers import read_bias
    from cobla_onnx.variants.low_rank.from_data import FactorsFromData

    inner = FactorsFromData.approximate

    def without(self: Any, layer: Any, form: Any, levels: Any) -> Any:
        bias = read_bias(self._seen.model, layer)
        return [replace(found, bias=bias) for found in inner(self, layer, form, levels)]

    FactorsFromData.approximate = without  # type: ignore[method-assign]


def knapsacks_only() -> None:
    """Search by integer steps alone, without SLSQP."""
    from cobla_onnx.allocation import sqp as sequential

    sequential._Search.relax = lambda *_: None  # type: ignore[method-assign, assignment]
    sequential._Search.round = lambda *_: None  # type: ignore[method-assign]


def slsqp_only() -> None:
    """Search by SLSQP and its rounding alone."""
    from cobla_onnx.allocation import sqp as sequential

    inner = sequential._Search.descend

    def descend(self: Any, origin: str, start: Any, damping: float) -> None:
        if origin.startswith("slsqp"):
            inner(self, origin, start, damping)

    sequential._Search.descend = descend  # type: ignore[method-assign]


def divergence_itself() -> None:
    """Let all decisions follow the divergence as it is, at temperature 1."""
    from cobla_onnx.calibration.evaluation.evaluator import Judge

    begin = Judge.__post_init__

    def by_divergence(self: Any) -> None:
        self.loss = "kl"
        begin(self)

    Judge.__post_init__ = by_divergence  # type: ignore[method-assign]


def judged_before_refit() -> None:
    """Choose between the candidates of the search as they are before refit."""
    from cobla_onnx.allocation import sqp as sequential

    inner = sequential._elected
    sequential._elected = lambda candidates, _: inner(candidates, None)


def no_noise_test() -> None:
    """Take the best on the selection split, be it by chance."""
    from cobla_onnx.allocation import sqp as sequential

    sequential.SIGNIFICANCE, sequential.TOLERANCE = 0.0, np.inf


PARTS: Mapping[str, tuple[str, Callable[[], None]]] = {
    "all parts": ("ours", nothing),
    "plain SVD": ("ours", plain_svd),
    "no measured scale": ("ours", no_scale),
    "one scheme": ("ours", one_scheme),
    "one round": ("ours", one_round),
    "no bias correction": ("ours", no_bias),
    "divergence itself": ("ours", divergence_itself),
    "all parts, loss": ("ours, loss", nothing),
    "knapsacks only": ("ours, loss", knapsacks_only),
    "SLSQP only": ("ours, loss", slsqp_only),
    "judged before refit": ("ours, loss", judged_before_refit),
    "no noise test": ("ours, loss", no_noise_test),
}
"""Method, and the part that is switched off; each with and without refit."""


def measure(part: str, task: str, wanted: Any, paths: Any, threads: int) -> None:
    """Switch a part off and measure; runs in a process of its own."""
    method, switch_off = PARTS[part]
    switch_off()
    benchmark.measure(task, method, wanted, paths, threads, f" ({part})")


@app.command()
def run(
    results: Path,
    assets: Annotated[Path, typer.Option(help="Folder with models/ and data/.")] = benchmark.ROOT
    / "../shared",
    task: Annotated[str, typer.Option(help="Part of the task's name.")] = "SqueezeNet",
    budgets: Annotated[str, typer.Option(help="Fractions of memory.")] = "0.8,0.6,0.4",
    parts: Annotated[str, typer.Option(help="Semicolon separated; all if empty.")] = "",
    threads: int = 2,
) -> None:
    """Measure what is not measured yet."""
    name = next(t.name for t in benchmark.TASKS if task in t.name)
    for part, (method, _) in PARTS.items():
        if parts and part not in parts.split(";"):
            continue
        done = {(r["task"], r["method"], r["value"]) for r in benchmark.read(results)}
        values = [float(value) for value in budgets.split(",")]
        wanted = [("mem", v) for v in values if (name, f"{method} ({part})", v) not in done]
        if not wanted:
            continue
        print(f"{name}: {part}", file=sys.stderr, flush=True)
        process = multiprocessing.get_context("spawn").Process(
            target=measure, args=(part, name, wanted, (results, assets, Path()), threads)
        )
        process.start()
        process.join()
        if process.exitcode:
            print(f"{name}: {part} failed", file=sys.stderr)


@app.command()
def table(results: Path) -> None:
    """Print a table in markdown for each task."""
    rows = benchmark.read(results)
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = {(r["method"], r["value"]): r for r in rows if r["task"] == task}
        values = sorted({value for _, value in mine}, reverse=True)
        print(f"\n{task}, agreement / divergence, `--mem`, without refit → with:\n")
        print("| part off | " + " | ".join(f"{v:g}" for v in values) + " |")
        print("| --- |" + " --- |" * len(values))
        for part, (method, _) in PARTS.items():
            names = [f"{variant} ({part})" for variant in benchmark.VARIANTS[method]]
            cells = [" → ".join(_cell(mine.get((n, v))) for n in names) for v in values]
            if any(cell != " → " for cell in cells):
                print(f"| {part} | " + " | ".join(cells) + " |")


def _cell(row: dict[str, Any] | None) -> str:
    if row is None or "loss" not in row:
        return ""
    return (
        f"{row['agreement']:.1%} / {row['loss']:.3g}"
        if "agreement" in row
        else f"{row['loss']:.3g}"
    )


if __name__ == "__main__":
    app()
