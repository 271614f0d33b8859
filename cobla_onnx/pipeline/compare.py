"""Compare any two models: outputs, size, MACs and running time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from cobla_onnx.autodiff.measures import Measure
from cobla_onnx.calibration.batching import choose_batching
from cobla_onnx.calibration.data.dataset import Dataset, InputSpec, input_specs
from cobla_onnx.calibration.data.readers import ImageOptions, open_data
from cobla_onnx.calibration.evaluation.caches import without_caches
from cobla_onnx.calibration.evaluation.choosing import Chooser, look_at, measures_on, notes_on
from cobla_onnx.calibration.evaluation.output_choice import OutputChoice, Outputs, resolve_outputs
from cobla_onnx.calibration.evaluation.outputs import (
    Comparison,
    OutputComparison,
    as_array,
    differently_made,
)
from cobla_onnx.errors import ModelError, UsageError
from cobla_onnx.graph.io.disk import bytes_of, files_of
from cobla_onnx.graph.io.model_file import stored_bytes
from cobla_onnx.graph.macs import fixed_input_shapes
from cobla_onnx.graph.opening import opened
from cobla_onnx.graph.words import known_words
from cobla_onnx.latency import timing
from cobla_onnx.options import BatchSize, Settings, check_declared, memory_bytes
from cobla_onnx.options.combined import check_without_data
from cobla_onnx.pipeline.inputs import (
    ModelSource,
    available_cores,
    file_of,
    naming_full_folder,
    open_model,
)
from cobla_onnx.pipeline.verification import not_read, rows_of, varying_outputs
from cobla_onnx.report.comparison import ModelComparison, ModelFacts
from cobla_onnx.runtime.context import RunContext
from cobla_onnx.runtime.progress import Progress, silent
from cobla_onnx.runtime.providers import execution_provider
from cobla_onnx.runtime.session import Feeds, open_session, run_session, runnable_feeds
from cobla_onnx.runtime.shapes import model_costs
from cobla_onnx.text import quoted, safe_text

__all__ = ["compare"]

# Seconds and runs for timing both models in turn.
SECONDS, LEAST, MOST = 5.0, 9, 200


def compare(
    first: ModelSource,
    second: ModelSource,
    *,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    data: Any = None,
    samples: int | None = None,
    batch: BatchSize = "auto",
    memory_limit: int | str | None = None,
    images: ImageOptions | None = None,
    outputs: Outputs = (),
    provider: str | None = None,
    seed: int = 0,
    threads: int | None = None,
    progress: Progress | None = None,
) -> ModelComparison:
    """Compare any two models that have the same inputs and outputs.

    Parameters
    ----------
    first, second : ModelProto or path
        Differences are relative to the first.
    input_shapes, data, samples, batch, memory_limit, images, outputs
        As those of `compress`; without data, inputs are random.
    provider : str, optional
        onnxruntime's execution provider; by default the CPU's.
    seed : int
        For random inputs.
    threads : int, optional
        Threads of onnxruntime; by default the number of cores.
    progress : callable, optional

    Raises
    ------
    UsageError
        If inputs or outputs differ in names, types or shapes, or for options of data that is not
        given.
    ModelError, DataError, WriteError
        See `cobla_onnx.errors`.

    Examples
    --------
    >>> from cobla_onnx import Budget, compare, compress
    >>> small = compress("models/digits.onnx", Budget(mem=0.5)).model
    >>> found = compare("models/digits.onnx", small)
    >>> found.second.weight_bytes <= 0.5 * found.first.weight_bytes
    True
    """
    numbers = {"samples": samples, "batch": batch, "seed": seed, "threads": threads}
    others = {"memory_limit": memory_limit, "provider": provider, "progress": progress}
    check_declared(Settings, {**numbers, **others})
    if data is None:
        check_without_data(samples, images)
    pair = _Pair.opened(first, second)
    shapes = input_shapes or {}
    _check_ends(pair.models, pair.names, shapes)
    context = RunContext(threads or available_cores(), progress=progress or silent)
    asked = _Asked(shapes, data, samples, batch, memory_limit, images, outputs, seed)
    with (
        naming_full_folder(),
        execution_provider(provider) as running_on,
        _inputs(pair, asked, context) as inputs,
    ):
        compared, count, more = _compare_outputs(pair, inputs, context)
        latency = _timed(pair, inputs, context)
        known = {**inputs.shapes, **shapes}
        # As compressing counts them, in functions, too.
        costs = [
            model_costs(opened(each), fixed_input_shapes(each, known), False, context.threads)
            for each in pair.models
        ]
    found = zip(pair.models, pair.sources, costs, (latency.before, latency.after), strict=True)
    facts = [_facts(model, source, macs, spread) for model, source, (_, macs, _), spread in found]
    told = [note for _, _, notes in costs for note in notes]
    return ModelComparison(
        first=facts[0],
        second=facts[1],
        outputs=compared,
        data=inputs.name,
        samples=count,
        latency=latency,
        timed_shapes={key: tuple(value.shape) for key, value in inputs.example.items()},
        threads=context.threads,
        provider=running_on,
        onnxruntime=onnxruntime.__version__,
        notes=tuple(dict.fromkeys([*told, *inputs.notes, *more])),
    )


@dataclass(frozen=True)
class _Pair:
    """Two models, their files if they have any, and their names for messages."""

    models: tuple[onnx.ModelProto, onnx.ModelProto]
    sources: tuple[Path | None, Path | None]
    names: tuple[str, str]

    @classmethod
    def opened(cls, first: ModelSource, second: ModelSource) -> _Pair:
        sources = file_of(first), file_of(second)
        models = open_model(first), open_model(second)
        names = _shown(sources[0], "the first model"), _shown(sources[1], "the second model")
        return cls(models, sources, names)


@dataclass(frozen=True)
class _Asked:
    """Which inputs the models are compared on, as the caller asked."""

    shapes: Mapping[str, Sequence[int]]
    data: Any
    samples: int | None
    batch: BatchSize
    memory_limit: int | str | None
    images: ImageOptions | None
    outputs: Outputs
    seed: int


@dataclass(frozen=True)
class _Inputs:
    """Inputs for both models; `example` is one sample, for timing.

    `batches` are inputs with how many samples they are; `shapes` are those of the samples, empty
    if inputs are random.
    """

    name: str
    batches: Iterable[tuple[int, Feeds]]
    count: int
    example: Feeds
    shapes: Mapping[str, Sequence[int]]
    measures: Mapping[str, Measure]
    notes: tuple[str, ...] = ()


@contextmanager
def _inputs(pair: _Pair, asked: _Asked, context: RunContext) -> Iterator[_Inputs]:
    """Open the samples, or draw random inputs, and decide how outputs are compared."""
    model = pair.models[0]
    named = resolve_outputs(asked.outputs, [value.name for value in model.graph.output])
    choices, assumed = without_caches(named, model)
    if asked.data is None:
        found = _random(model, choices, asked, context)
        yield replace(found, notes=found.notes + assumed)
        return
    specs = input_specs(model, asked.shapes)
    with open_data(asked.data, specs, samples=asked.samples, images=asked.images) as dataset:
        found = _samples(pair, choices, asked, dataset, context)
        yield replace(found, notes=found.notes + assumed)


def _random(
    model: onnx.ModelProto,
    choices: Mapping[str, OutputChoice],
    asked: _Asked,
    context: RunContext,
) -> _Inputs:
    session = open_session(model, context.threads, optimized=True)
    known = fixed_input_shapes(model, asked.shapes)
    feeds, found, _ = runnable_feeds(session, known, asked.seed, known_words(model))
    measures = measures_on(model, zip(feeds, found, strict=True), choices)
    batches = [(rows_of(each), each) for each in feeds]
    return _Inputs("random", batches, len(feeds), feeds[0], {}, measures, notes_on(measures))


def _samples(
    pair: _Pair,
    choices: Mapping[str, OutputChoice],
    asked: _Asked,
    dataset: Dataset,
    context: RunContext,
) -> _Inputs:
    model, threads = pair.models[0], context.threads
    context.progress("size of a run", 0, 1)
    limit = memory_bytes(asked.memory_limit)
    sizes = [
        choose_batching(each, each, (), dataset, asked.batch, limit, threads=threads)
        for each in pair.models
    ]
    chosen = min(sizes, key=lambda batching: batching.size)
    context.progress("size of a run", 1, 1)
    chooser = Chooser.of(model, choices=choices)
    told = partial(context.progress, "survey")
    compared = look_at(model, dataset, chosen.size, threads, chooser, told)
    kept = sorted((*dataset.calibration, *dataset.selection))
    (example,) = dataset.batches(kept[:1], 1)
    batches, total = dataset.counted(kept, chosen.size), -(-len(kept) // chosen.size)
    shape = {name: array.shape for name, array in example.items()}
    notes = chosen.notes + compared.notes
    return _Inputs(dataset.source, batches, total, example, shape, compared.measures, notes)


def _compare_outputs(
    pair: _Pair, inputs: _Inputs, context: RunContext
) -> tuple[tuple[OutputComparison, ...], int, tuple[str, ...]]:
    sessions = [open_session(model, context.threads, optimized=True) for model in pair.models]
    varying = frozenset().union(*(varying_outputs(model, inputs.example) for model in pair.models))
    comparison, count = Comparison(inputs.measures, varying), 0
    read: set[str] = set()
    for number, (samples, feeds) in enumerate(inputs.batches):
        context.progress("outputs", number, inputs.count)
        before, after = (run_session(session, feeds) for session in sessions)
        _check_outputs(before, after, pair.names, varying)
        comparison.add(before, after, feeds, samples)
        count += samples
        read.update(before)
    context.progress("outputs", inputs.count, inputs.count)
    return comparison.results(), count, (*not_read(pair.models[0], read), *comparison.notes())


def _timed(pair: _Pair, inputs: _Inputs, context: RunContext) -> timing.Comparison:
    """Time both models in turn."""
    context.progress("latency", 0, 1)
    stopwatch = timing.Stopwatch(context.threads)
    times = stopwatch.times(pair.models, inputs.example, seconds=SECONDS, least=LEAST, most=MOST)
    context.progress("latency", 1, 1)
    return timing.compare(times)


def _check_ends(
    models: Sequence[onnx.ModelProto], names: Sequence[str], shapes: Mapping[str, Sequence[int]]
) -> None:
    """Check that both models take the same inputs and give the same outputs."""
    inputs = [{spec.name: spec for spec in input_specs(model, shapes)} for model in models]
    outputs = [{value.name: value for value in model.graph.output} for model in models]
    for kind, (left, right) in (("inputs", inputs), ("outputs", outputs)):
        if set(left) != set(right):
            raise UsageError(
                f"{kind} differ: {names[0]} has {_list(left)}, {names[1]} has {_list(right)}; "
                f"give two models with the same {kind}, or rename those of one"
            )
    for name, spec in inputs[0].items():
        if not _compatible(spec, inputs[1][name]):
            raise UsageError(
                f"input {quoted(name)}: {names[0]} takes {_typed(spec)}, {names[1]} takes "
                f"{_typed(inputs[1][name])}; give two models that take the same inputs"
            )


def _compatible(one: InputSpec, other: InputSpec) -> bool:
    if one.dtype != other.dtype:
        return False
    if one.shape is None or other.shape is None:
        return True
    if len(one.shape) != len(other.shape):
        return False
    return all(
        None in pair or pair[0] == pair[1] for pair in zip(one.shape, other.shape, strict=True)
    )


def _typed(spec: InputSpec) -> str:
    if spec.shape is None:
        return str(spec.dtype)
    return f"{spec.dtype} [{', '.join('?' if d is None else str(d) for d in spec.shape)}]"


def _list(named: Iterable[str]) -> str:
    return ", ".join(quoted(name) for name in sorted(named)) or "none"


def _check_outputs(
    before: Feeds, after: Feeds, names: Sequence[str], varying: frozenset[str]
) -> None:
    if alone := before.keys() ^ after.keys():
        name = min(alone)
        whose, another = names if name not in before else names[::-1]
        raise UsageError(
            f"output {quoted(name)}: {whose} gives it in a type that numpy does not have, and "
            f"{another} does not; give two models with the same outputs"
        )
    for name, given in before.items():
        value, other = as_array(given), as_array(after[name])
        if value is None and other is None:
            continue
        if value is None or other is None or differently_made(value, other, name in varying):
            raise UsageError(
                f"output {quoted(name)}: {names[0]} gives {_made(value)}, {names[1]} gives "
                f"{_made(other)}; give two models with the same outputs"
            )
        if value.dtype.kind == "f":
            _check_finite(name, value, other, names)


def _check_finite(
    name: str, value: NDArray[Any], other: NDArray[Any], names: Sequence[str]
) -> None:
    finite = [bool(np.isfinite(each).all()) for each in (value, other)]
    if finite[0] and not finite[1]:
        raise ModelError(
            f"{names[1]}: output {quoted(name)} is not finite where {names[0]} gives numbers; "
            "the model overflows, check how it was made"
        )
    # Infinities of the first may be meant, such as those of suppressed tokens.
    if finite[1] and np.isnan(value).any():
        raise ModelError(
            f"{names[0]}: output {quoted(name)} is NaN where {names[1]} gives numbers; the model "
            "overflows or holds NaN, check how it was made"
        )


def _made(value: NDArray[Any] | None) -> str:
    return "nothing that is compared" if value is None else f"{value.dtype} {list(value.shape)}"


def _shown(source: Path | None, otherwise: str) -> str:
    return otherwise if source is None else safe_text(str(source), 120)


def _facts(
    model: onnx.ModelProto,
    source: Path | None,
    macs: Mapping[int, int] | None,
    latency: tuple[float, float, float],
) -> ModelFacts:
    return ModelFacts(
        path=None if source is None else str(source),
        file_bytes=None if source is None else bytes_of(files_of(source)),
        weight_bytes=stored_bytes(model),
        macs=None if macs is None else sum(macs.values()),
        nodes=len(model.graph.node),
        latency_ms=latency,
    )
