"""Compress models that people deploy, with data, and measure how well they still do their task.

    python tools/field.py run results.json --models FOLDER
    python tools/field.py table results.json --write docs/compatibility.md

FOLDER holds NAME.onnx and, where a model comes with data, NAME_calibration.npz and
NAME_test.npz; data for the others is made by ``tools/field_data.py`` beside the results. The
models that this repository trained are always among them. Each compression is a run of the
installed command in a process of its own, whose time and peak memory are recorded. Quality
is measured without the package, by ``tools/field_quality.py``. Runs that are in the results
are not repeated.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import field_data
import numpy as np
import typer
from field_data import NoData, feeds_for, open_model
from field_quality import MEASURES, losses_by_sample, mean_over_mask, surprises
from numpy.typing import NDArray

__all__ = ["TASKS", "Task", "judge", "judge_samples", "measure", "print_table"]

ROOT = Path(__file__).resolve().parent.parent
COMMAND = Path(sys.executable).with_name("cobla-onnx")
BUDGETS = (("mem", 0.8), ("mem", 0.6), ("mac", 0.7))
BEGIN, END = "<!-- measured by tools/field.py -->", "<!-- end of what tools/field.py measured -->"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

# Options of all benchmarks that keep their rows in a file.
Only = Annotated[str, typer.Option(help="Names of models, or parts, comma separated.")]
Limit = Annotated[float, typer.Option(help="Seconds after which a run is stopped.")]
Page = Annotated[Path | None, typer.Option("--write", help="Page with the markers.")]


@dataclass(frozen=True)
class Task:
    """A model and how it is judged.

    Attributes
    ----------
    name
        The file's name without its ending.
    measure
        Key of `field_quality.MEASURES`.
    make
        Makes calibration and test data at two paths, for a model that comes without.
    suffix
        Of these paths; folders have none.
    folder
        Where the model is, if not in the folder that is given.
    """

    name: str
    measure: str
    make: Callable[[Path, Path, Path], None] | None = None
    suffix: str = ".npz"
    folder: Path | None = None


TASKS = (
    Task("paraphrase_minilm_l3", "embedding"),
    Task("ppocr_rec", "ctc"),
    Task("ppocr_det", "map", field_data.draw_texts),
    Task("vit_s_focus", "map"),
    Task("silero_vad_16k_op15", "event", field_data.make_sounds, suffix=""),
    Task("shapes_detector", "boxes", field_data.draw_shapes, folder=ROOT / "models"),
    Task("docstring_gpt", "perplexity", folder=ROOT / "models"),
)


def data_of(task: Task, model: Path, made: Path) -> tuple[Path, Path]:
    """Return calibration and test data, made if there is none beside the model."""
    found = [model.with_name(f"{task.name}_{part}.npz") for part in ("calibration", "test")]
    if not all(path.exists() for path in found):
        if task.make is None:
            raise NoData(f"{found[0].name} and {found[1].name} are not there")
        found = [made / f"{task.name}_{part}{task.suffix}" for part in ("calibration", "test")]
        if not all(path.exists() for path in found):
            made.mkdir(parents=True, exist_ok=True)
            task.make(model, *found)
    return found[0], found[1]


def judge(kind: str, original: Path, compressed: Path, test: Path) -> dict[str, float]:
    """Compare two models on test data by a measure of `field_quality`."""
    return MEASURES[kind](_outputs(kind, original, test), _outputs(kind, compressed, test))


def judge_samples(kind: str, original: Path, compressed: Path, test: Path) -> dict[str, Any]:
    """Do the same, and tell what each sample loses, from which paired intervals are made."""
    both = [_outputs(kind, path, test) for path in (original, compressed)]
    losses = [float(f"{loss:.4g}") for loss in losses_by_sample(kind, *both)]
    return MEASURES[kind](*both) | {"losses": losses}


def _outputs(kind: str, path: Path, data: Path) -> NDArray[Any]:
    """What a measure looks at: the first output, sentences' vectors, or what tokens cost."""
    session = open_model(path)
    found = []
    for feeds in feeds_for(session, data):
        outputs = session.run(None, feeds)
        if kind == "embedding":
            hidden = [x for x in outputs if x.ndim == 3 and x.dtype.kind == "f"][-1]
            found.append(mean_over_mask(hidden, feeds["attention_mask"]))
        elif kind == "perplexity":
            found.append(surprises(outputs[0], feeds["input_ids"]))
        else:
            found.append(outputs[0])
    return np.concatenate(found)


def measure(
    kind: str, model: Path, data: tuple[Path, Path], options: list[str], limit: float
) -> dict[str, Any]:
    """Compress in a child process, then judge; `limit` is in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        out, report = Path(folder) / "out.onnx", Path(folder) / "report.json"
        command = [COMMAND, model, out, *options, "--data", data[0], "--report", report]
        row = run_child(list(map(str, command)), limit)
        if row["exit_code"] == 0:
            row["bytes"] = out.stat().st_size / model.stat().st_size
            row["quality"] = judge(kind, model, out, data[1])
            row["stated"] = stated(json.loads(report.read_text(encoding="utf-8")))
    return row


def run_child(command: list[str], limit: float) -> dict[str, Any]:
    """Run a command; return its exit code, seconds, peak memory in MB and last words.

    A small process stands between: Linux counts the size of the process that starts another
    as a peak of that one.
    """
    measure = [sys.executable, str(Path(__file__).with_name("field_child.py")), str(limit)]
    done = subprocess.run([*measure, *command], stdout=subprocess.PIPE, check=True)
    row: dict[str, Any] = json.loads(done.stdout)
    return row


def stated(report: Mapping[str, Any]) -> dict[str, Any]:
    """Take from a report's JSON what it says about the loss, and its notes."""
    calibration, verification = report["calibration"] or {}, report["verification"] or {}
    wanted = ("outputs", "loss", "loss_before_refit", "quality", "calibration_samples")
    return {
        "calibration": {key: calibration[key] for key in wanted if key in calibration},
        "verification": {k: v for k, v in verification.items() if k != "data"},
        "notes": report["notes"],
    }


def read(results: Path) -> dict[str, dict[str, Any]]:
    """Read the results: rows by model and budget."""
    if not results.exists():
        return {}
    rows: dict[str, dict[str, Any]] = json.loads(results.read_text(encoding="utf-8"))
    return rows


def write(results: Path, rows: Mapping[str, Any]) -> None:
    """Write the results whole or not at all."""
    scratch = results.with_suffix(".part")
    scratch.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    scratch.replace(results)


@app.command()
def run(
    results: Path,
    models: Annotated[Path, typer.Option(help="Folder of models and their data.")] = Path(),
    only: Only = "",
    budgets: Annotated[str, typer.Option(help="For example mem=0.8,mac=0.7.")] = "",
    limit: Limit = 1800,
    again: Annotated[bool, typer.Option(help="Repeat runs that failed.")] = False,
) -> None:
    """Measure what is not measured yet."""
    chosen = [pair.split("=") for pair in budgets.split(",")] if budgets else BUDGETS
    for task in TASKS:
        model = (task.folder or models) / f"{task.name}.onnx"
        if not any(part in task.name for part in only.split(",")):
            continue
        for kind, value in chosen:
            rows, key = read(results), f"{task.name} --{kind} {float(value):g}"
            failed = again and rows.get(key, {}).get("exit_code") != 0
            if key in rows and not failed:
                continue
            try:
                if not model.exists():
                    raise NoData(f"{model.name} is not in {model.parent}")
                data = data_of(task, model, results.with_suffix(".data"))
            except NoData as error:
                print(f"{key}: left out, {error}", file=sys.stderr)
                continue
            row = measure(task.measure, model, data, [f"--{kind}", f"{float(value):g}"], limit)
            # Others may have written meanwhile.
            write(results, read(results) | {key: row})
            print(f"{key}: {' | '.join(_cells(row))}", file=sys.stderr, flush=True)


@app.command()
def table(
    results: Path,
    page: Page = None,
) -> None:
    """Print the table in Markdown, or put it between the markers of a page."""
    publish(print_table(read(results)), page, BEGIN, END)


def publish(text: str, page: Path | None, begin: str, end: str) -> None:
    """Print a text, or put it between two markers of a page, in place of what is there."""
    if page is None:
        print(text)
        return
    before, begun, rest = page.read_text(encoding="utf-8").partition(begin)
    _, ended, after = rest.partition(end)
    if not begun or not ended:
        raise typer.BadParameter(f"{page} lacks {begin} or {end}")
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def line(first: str, cells: Sequence[str]) -> str:
    """Return a line of a Markdown table."""
    return f"| {' | '.join([first, *cells])} |"


def print_table(rows: Mapping[str, dict[str, Any]]) -> str:
    """Return the rows as a Markdown table, models in the order of `TASKS`."""
    lines = [
        "| model | budget | on the task | loss stated | file | CPU s | peak MB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    names = [task.name for task in TASKS]
    for key in sorted(rows, key=lambda key: _place(names, key)):
        name, budget = key.split(maxsplit=1)
        lines.append(line(name, [f"`{budget}`", *_cells(rows[key])]))
    return "\n".join(lines)


def _place(names: Sequence[str], key: str) -> tuple[int, bool, float]:
    """Order of a row: models as in `TASKS`, budgets of memory first, the larger before."""
    name, kind, value = key.split()
    return names.index(name), kind != "--mem", -float(value)


def _cells(row: Mapping[str, Any]) -> list[str]:
    """Quality, stated loss, size, processor time and memory of one run."""
    # Unlike the seconds that passed, these hardly depend on what else a machine does.
    spent = [f"{row['cpu_seconds']:.0f}", f"{row['peak_mb']:.0f}"]
    if "stopped_after" in row:
        return ["not finished", "", "", *spent]
    if row["exit_code"]:
        return [f"exit {row['exit_code']}", "", "", *spent]
    quality = ", ".join(
        f"{name.replace('_', ' ')} {_figure(value)}" for name, value in row["quality"].items()
    )
    calibration = row["stated"]["calibration"]
    loss = f"{calibration['loss']:.3g}" if "loss" in calibration else ""
    return [quality, loss, f"{row['bytes']:.3f}", *spent]


def _figure(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4f}"


if __name__ == "__main__":
    app()
