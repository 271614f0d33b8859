"""Record what small compressions give, and check that it is still the same.

For changes that must not change behaviour, such as moving modules: record before, check after,
on the same machine with the same versions, since other ones may round otherwise::

    python tools/golden.py record golden.json
    python tools/golden.py check golden.json

Only the package's public names are used. Exit code 1 if anything differs.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import numpy as np
import onnx
import typer
from onnx import helper

ROOT = Path(__file__).resolve().parent.parent
# The package of this checkout, whichever is installed.
sys.path.insert(0, str(ROOT))

from cobla_onnx import (  # noqa: E402
    Budget,
    Plan,
    Report,
    Result,
    compare,
    compress,
    inspect,
    sweep,
)
from cobla_onnx.errors import BudgetError  # noqa: E402
from tests.builders import model_of, random_array  # noqa: E402

DIGITS = ROOT / "models" / "digits.onnx"
CALIBRATION = ROOT / "models" / "digits_calibration.npz"
DETECTOR = ROOT / "models" / "shapes_detector.onnx"
DATA: dict[str, Any] = {"data": CALIBRATION, "samples": 40}
PLAN = """{"version": 1, "layers": [
    {"layer": "stage1/conv2", "scheme": "spatial-wh", "rank": 20},
    {"layer": "stage2/conv1", "scheme": "input", "rank": 24},
    {"layer": "stage3/down", "scheme": "channel", "rank": 16},
    {"layer": "hidden", "scheme": "matrix", "rank": 12},
    {"layer": "classes", "keep": true}]}"""
# Values that are listed for a report that differs.
LISTED = 12

Values = dict[str, Any]
app = typer.Typer(add_completion=False)


class SizeStopwatch:
    """Takes a nanosecond for each number stored in a model and a hundred for each node."""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def times(
        self, models: Sequence[onnx.ModelProto], feeds: object, *, least: int, **_: object
    ) -> np.ndarray:
        """Seconds, shape (least, models)."""
        graphs = [model.graph for model in models]
        stored = [sum(int(np.prod(t.dims)) for t in graph.initializer) for graph in graphs]
        nodes = [len(graph.node) for graph in graphs]
        return np.tile(1e-9 * (np.array(stored) + 100.0 * np.array(nodes)), (least, 1))


def _network(
    operators: Sequence[tuple[str, dict[str, Any]]],
    weights: Sequence[Sequence[int]],
    shape: list[int | str],
    dtype: str = "float32",
) -> onnx.ModelProto:
    """One operator after another, each with a weight of its own and a Relu behind it."""
    nodes, arrays, last = [], {}, "x"
    for number, ((kind, attributes), size) in enumerate(zip(operators, weights, strict=True)):
        name, weight, rectified = f"{kind}{number}".lower(), f"w{number}", f"r{number}"
        nodes.append(helper.make_node(kind, [last, weight], [name], name, **attributes))
        nodes.append(helper.make_node("Relu", [name], [rectified]))
        scale = np.sqrt(np.prod(size) / max(size))
        arrays[weight] = (random_array(*size, seed=number) / scale).astype(dtype)
        last = rectified
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return model_of(nodes, arrays, {"x": shape}, [last], elem_type=element)


def _built() -> dict[str, tuple[onnx.ModelProto, dict[str, Any]]]:
    """Models by name, with what `compress` is told beside the budget."""
    pads: dict[str, Any] = {"pads": [1, 1, 1, 1]}
    line = _network([("Conv", {"pads": [1, 1]})] * 2, [(32, 16, 3), (16, 32, 3)], ["N", 16, 20])
    grouped = _network([("Conv", {"group": 2, **pads})] * 2, [(32, 16, 3, 3)] * 2, ["N", 32, 9, 9])
    transposed = _network(
        [("Conv", {"strides": [2, 2]}), ("ConvTranspose", {"strides": [2, 2]})],
        [(16, 8, 3, 3), (16, 8, 3, 3)],
        ["N", 8, 9, 9],
    )
    half = _network([("MatMul", {}), ("Gemm", {})], [(48, 40), (40, 32)], ["N", 48], "float16")
    product = _network([("MatMul", {})] * 2, [(32, 48), (48, 32)], ["N", 6, 32])

    def data(*shape: int, dtype: str = "float32") -> dict[str, Any]:
        return {"data": {"x": random_array(40, *shape, seed=9, dtype=dtype)}}

    return {
        "convolution-1d": (line, data(16, 20)),
        "grouped": (grouped, data(32, 9, 9)),
        "transposed": (transposed, data(8, 9, 9)),
        "float16": (half, data(48, dtype="float16")),
        "product-3d": (product, data(6, 32)),
        "options": (line, {"rank_multiple": 4, "scheme": "channel", "exclude": ["conv1"]}),
    }


def _sweep(folder: Path, seed: int) -> Any:
    budgets = [Budget(mem=0.7), Budget(mem=0.35), Budget(mem=0.001), Budget(mac=0.5)]
    found = sweep(DIGITS, budgets, out_dir=folder, seed=seed, threads=1, **DATA)
    return replace(
        found, points=tuple(replace(p, report=p.report and still(p.report)) for p in found.points)
    )


def _compare(folder: Path, seed: int) -> Any:
    small = compress(DIGITS, plan=Plan.from_json(PLAN), threads=1).model
    return replace(compare(DIGITS, small, seed=seed, threads=1, **DATA), onnxruntime="")


def _refused(folder: Path, seed: int) -> Any:
    try:
        return compress(DIGITS, Budget(mem=0.001, mac=0.5), seed=seed, threads=1)
    except BudgetError as error:
        return {"error": error.in_flags(), "least": error.least}


def runs() -> dict[str, Callable[[Path, int], Any]]:
    """Return what is run, by name: of a folder of its own and a seed."""

    def compression(model: Any, budget: Budget | None, **options: Any) -> Callable[..., Any]:
        return lambda folder, seed: compress(
            model, budget, **{"seed": seed, "threads": 1, **options}
        )

    def latency(folder: Path, seed: int) -> Any:
        profile, budget = folder / "profile.json", Budget(latency=0.6)
        return compress(DIGITS, budget, profile=profile, seed=seed, threads=1)

    plan = Plan.from_json(PLAN)
    test = np.load(ROOT / "models" / "digits_test.npz")
    labelled = {"data": {"image": test["image"][:60]}, "labels": test["labels"][:60].tolist()}
    scenes = {"image": np.random.default_rng(1).random((10, 3, 96, 96), dtype=np.float32)}
    return {
        "mem": compression(DIGITS, Budget(mem=0.4)),
        "mac": compression(DIGITS, Budget(mac=0.5)),
        "mem-and-mac": compression(DIGITS, Budget(mem=0.5, mac=0.4)),
        "milp": compression(DIGITS, Budget(mem=0.3), solver="milp"),
        "plan": compression(DIGITS, None, plan=plan),
        "refused": _refused,
        "inspect": lambda folder, seed: inspect(DIGITS, threads=1),
        "inspect-data": lambda folder, seed: inspect(DIGITS, threads=1, **DATA),
        "compare": _compare,
        "data-mem": compression(DIGITS, Budget(mem=0.3), **DATA),
        "data-mac": compression(DIGITS, Budget(mac=0.4), **DATA),
        "data-plan": compression(DIGITS, None, plan=plan, **DATA),
        "data-loss": compression(
            DIGITS, Budget(mem=0.3), objective="loss", data=CALIBRATION, samples=24
        ),
        "data-labels": compression(DIGITS, Budget(mem=0.3), **labelled),
        "data-no-refit": compression(DIGITS, Budget(mem=0.3), refit=False, **DATA),
        "data-kl": compression(DIGITS, Budget(mem=0.3), loss="kl", **DATA),
        "data-workers": compression(DIGITS, Budget(mem=0.3), workers=2, **DATA),
        "data-sweep": _sweep,
        "data-max-drop": compression(DIGITS, None, max_drop=0.1, **DATA),
        "latency": latency,
        "data-latency": compression(DIGITS, Budget(mem=0.8, latency=0.6), **DATA),
        "detector": compression(DETECTOR, Budget(mem=0.5), data=scenes),
        **{
            name: compression(model, Budget(mem=0.7), **more)
            for name, (model, more) in _built().items()
        },
    }


def still(report: Report) -> Report:
    """Return a report without what differs between runs and machines."""
    history = tuple(replace(step, seconds=0.0) for step in report.history)
    return replace(report, seconds=0.0, versions={}, machine={}, history=history)


def parts(outcome: Any, folder: Path) -> Values:
    """Return hashes of all that a run gave, and the values of its report by their keys."""
    found: Values = {}
    if isinstance(outcome, Result):
        outcome.save(folder / "model.onnx")
        report = still(outcome.report)
        found["model"] = _sha256(outcome.model.SerializeToString(deterministic=True))
        found["plan"] = _sha256(outcome.plan.to_json().encode())
        for kind, text in (("html", report.to_html()), ("markdown", report.to_markdown())):
            found[kind] = _sha256(_without_places(text, folder).encode())
        outcome = report
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        if file.suffix == ".json":  # A profile says what machine it is of.
            content = json.dumps({**json.loads(content), "conditions": None}).encode()
        found[f"file {file.name}"] = _sha256(content)
    values = outcome if isinstance(outcome, dict) else outcome.to_dict()
    text = _without_places(json.dumps(values, allow_nan=False), folder)
    return {**found, "report": _sha256(text.encode()), "values": dict(_flat(json.loads(text)))}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _without_places(text: str, folder: Path) -> str:
    return text.replace(str(folder), "FOLDER").replace(str(ROOT), "ROOT")


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every entry by its key, such as ``layers.0.rank``; long lists of numbers as a hash."""
    if isinstance(value, list) and len(value) > 8 and not isinstance(value[0], (dict, list)):
        yield key, _sha256(json.dumps(value).encode())
    elif isinstance(value, (dict, list)) and value:
        for name, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _flat(entry, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def differences(old: Values, new: Values) -> list[str]:
    """Say which parts of a run differ, and which values of its report."""
    lines = [
        f"{part}: differs"
        for part in sorted(old.keys() | new.keys())
        if part != "values" and old.get(part) != new.get(part)
    ]
    before, after = old["values"], new["values"]
    keys = [key for key in {**before, **after} if before.get(key, "") != after.get(key, "")]
    lines += [
        f"  {key}: {before.get(key, 'nothing')} -> {after.get(key, 'nothing')}"
        for key in keys[:LISTED]
    ]
    return lines + ([f"  and {len(keys) - LISTED} more"] if len(keys) > LISTED else [])


def play(only: str, seed: int) -> Iterator[tuple[str, Values]]:
    """Run those whose name fits, without a look at a clock."""
    owners = [
        module
        for name, module in list(sys.modules.items())
        if name.split(".")[0] == "cobla_onnx" and "Stopwatch" in vars(module)
    ]
    assert owners, "the class that takes times has another name now"
    with ExitStack() as stack:
        for module in owners:
            stack.enter_context(patch.object(module, "Stopwatch", SizeStopwatch))
        for name, run in runs().items():
            if fnmatch.fnmatchcase(name, only):
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                started = time.perf_counter()
                found = parts(run(folder, seed), folder)
                print(f"{name}: {time.perf_counter() - started:.1f} s", flush=True)
                yield name, found


def _made_with() -> dict[str, str]:
    names = ("numpy", "scipy", "onnx", "onnxruntime")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


Only = Annotated[str, typer.Option(help="Runs whose name fits this pattern.")]
Seed = Annotated[int, typer.Option(help="Of the random inputs; another one has to be noticed.")]


@app.command()
def record(file: Path, only: Only = "*", seed: Seed = 0) -> None:
    """Run all and write what came of it."""
    content = {"made_with": _made_with(), "runs": dict(play(only, seed))}
    file.write_text(json.dumps(content, indent=1) + "\n")


@app.command()
def check(file: Path, only: Only = "*", seed: Seed = 0) -> None:
    """Run all again and list what differs from the record."""
    content = json.loads(file.read_text())
    recorded = {k: v for k, v in content["runs"].items() if fnmatch.fnmatchcase(k, only)}
    if content["made_with"] != _made_with():
        print(f"the record was made with {content['made_with']}, here it is {_made_with()}")
    found = dict(play(only, seed))
    failed = 0
    for name in [*recorded, *(name for name in found if name not in recorded)]:
        if name not in recorded or name not in found:
            lines = [f"only {'run now' if name in found else 'in the record'}"]
        else:
            lines = differences(recorded[name], found[name])
        failed += bool(lines)
        for line in lines:
            print(f"{name}: {line}")
    print(f"{len(found) - failed} runs are the same, {failed} differ")
    if failed or not found:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
