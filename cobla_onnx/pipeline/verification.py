"""Verify a compressed model: run it and the original in onnxruntime and compare.

Two different questions are asked. Is the rewrite right: do the new nodes of each layer
compute what the original node computes with the same approximated dense weight, up to
float rounding? And how good is the approximation: how far are the compressed model's
outputs from the original's? The first has one right answer, the second is a measurement.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime

from cobla_onnx.autodiff.measures import Measure
from cobla_onnx.calibration.batching import TapLimit
from cobla_onnx.calibration.evaluation.choosing import measures_on
from cobla_onnx.calibration.evaluation.outputs import Comparison
from cobla_onnx.errors import ModelError, VerificationError
from cobla_onnx.graph.health import blame_weights
from cobla_onnx.graph.io.model_file import stored_bytes, without_weights
from cobla_onnx.graph.macs import Shape, infer_shapes
from cobla_onnx.graph.varying import varying_tensors
from cobla_onnx.graph.words import known_words
from cobla_onnx.pipeline.proof import prove_optimized, prove_rewrite
from cobla_onnx.report.model import Verification
from cobla_onnx.runtime.session import (
    BY_FILE,
    Feeds,
    open_session,
    run_session,
    runnable_feeds,
)
from cobla_onnx.runtime.temporary import owned
from cobla_onnx.text import first_line, quoted
from cobla_onnx.variants.replacement import Replacement

__all__ = [
    "check_model",
    "not_read",
    "rows_of",
    "varying_outputs",
    "verify",
]

# Batches of data on which every layer of the rewrite is checked.
PROVED_BATCHES = 2


def check_model(original: onnx.ModelProto, compressed: onnx.ModelProto) -> tuple[str, ...]:
    """Run the ONNX checker on the compressed model.

    Returns
    -------
    tuple of str
        A note if the original does not pass either (it may use operators that only
        onnxruntime knows).

    Raises
    ------
    VerificationError
        If the compressed model fails and the original passes.
    """
    try:
        onnx.checker.check_model(without_weights(compressed))
    except onnx.checker.ValidationError as error:
        try:
            onnx.checker.check_model(without_weights(original))
        except onnx.checker.ValidationError as before:
            return (f"the ONNX checker rejects the original too: {first_line(before)}",)
        raise VerificationError(
            f"the rewritten model does not pass the ONNX checker: {first_line(error)}; "
            "nothing was written, please report this"
        ) from error
    return ()


def verify(
    original: onnx.ModelProto,
    compressed: onnx.ModelProto,
    replacements: Sequence[Replacement],
    shapes: Mapping[str, Shape],
    *,
    quantised: onnx.ModelProto | None = None,
    data: tuple[str, Callable[[], Iterable[tuple[int, Feeds]]]] | None = None,
    proved: Callable[[], Iterable[Feeds]] | None = None,
    measures: Mapping[str, Measure] | None = None,
    taps: TapLimit | None = None,
    seed: int = 0,
    threads: int = 1,
    progress: Callable[[int], None] = lambda batches: None,
) -> Verification:
    """Check the rewrite and measure the approximation.

    Parameters
    ----------
    shapes : mapping of str to tuple
        Shapes of the model's inputs, as far as known.
    quantised : ModelProto, optional
        The compressed model with nodes that compute in 8 bits. The rewrite is proved without them;
        it is this one whose outputs are compared, optimised as users run it. Needs data.
    data : tuple of str and callable, optional
        Name of the data, and a function that returns a fresh iterator over its batches, with how
        many samples there are in each. Without data, random inputs are used.
    proved : callable, optional
        Returns one over batches on the first of which the rewrite is checked, layer by layer; by
        default those of `data`.
    measures : mapping of str to Measure, optional
        How outputs are compared; by default decided from the original's outputs.
    taps : TapLimit, optional
        Limits the layers' outputs that are compared after one run.
    progress : callable
        Called with the number of batches of data that were compared.

    Raises
    ------
    ModelError
        If the original does not load or run; without data, if a weight that is not finite makes
        its outputs NaN.
    VerificationError
        If the checker or onnxruntime rejects the compressed model, or the new nodes do
        not compute what their dense weight would.
    """
    notes = check_model(original, quantised or compressed)
    reference: Sequence[Feeds] = ()
    if data is None:
        session = open_session(original, threads)
        proof, reference, unknown = runnable_feeds(session, shapes, seed, known_words(original))
        if any(None in (shape or (None,)) for shape in shapes.values()):
            notes += (f"unknown input axes were set to {unknown} for verification",)
        del session
        _check_finite(original, reference)
    else:
        batches = (feeds for _, feeds in data[1]()) if proved is None else proved()
        proof = list(itertools.islice(batches, PROVED_BATCHES))
        reference = _runs(original, proof, threads) if measures is None else ()
    results = _results(compressed, proof, threads)
    varying = varying_outputs(original, proof[0])
    rewrite_error, network_error, more = prove_rewrite(
        original, compressed, replacements, proof, results, threads, varying, taps
    )
    more += prove_optimized(original, compressed, replacements, proof, results, threads, taps)
    if measures is None:
        measures = measures_on(original, list(zip(proof, reference, strict=True)))
    comparison = Comparison(measures, varying)
    if data is None:
        for feed, expected, actual in zip(proof, reference, results, strict=True):
            comparison.add(expected, actual, feed, rows_of(feed))
        samples = sum(map(rows_of, proof))
    else:
        # Without optimisations, 8-bit nodes compute in floating point between their pairs.
        optimized = quantised is not None or _small(original)
        second = open_session(quantised or compressed, threads, optimized=optimized)
        samples = _compare(comparison, original, second, data[1](), threads, progress)
    name = "random" if data is None else data[0]
    notes = (*notes, *not_read(original, set().union(*results)), *more, *comparison.notes())
    return Verification(name, samples, rewrite_error, network_error, comparison.results(), notes)


def _check_finite(original: onnx.ModelProto, results: Sequence[Feeds]) -> None:
    """Refuse a model that gives NaN in every run, and whose layers' weights say why.

    Where they do not, random inputs may be to blame, or NaN be meant.
    """
    if all(any(map(_has_nan, outputs.values())) for outputs in results):
        blame_weights(original, of_layers=True)


def _has_nan(value: Any) -> bool:
    # A sequence is a list of arrays.
    return isinstance(value, np.ndarray) and value.dtype.kind == "f" and bool(np.isnan(value).any())


def not_read(model: onnx.ModelProto, read: Collection[str]) -> Iterator[str]:
    """Name the outputs that numpy cannot hold: those that are not among what was read."""
    for output in model.graph.output:
        if output.name not in read:
            yield f"output {quoted(output.name)}: numpy has no such type, it is not compared"


def _runs(model: onnx.ModelProto, batches: Iterable[Feeds], threads: int) -> list[Feeds]:
    """Outputs of a model on batches."""
    session = open_session(model, threads)
    return [owned(run_session(session, feed)) for feed in batches]


def varying_outputs(model: onnx.ModelProto, feeds: Feeds) -> frozenset[str]:
    """Outputs whose shape may depend on the data, not only on the shapes of the inputs."""
    shapes = infer_shapes(model, {name: value.shape for name, value in feeds.items()})
    found = varying_tensors(model, shapes)
    names = (value.name for value in model.graph.output)
    return frozenset(name for name in names if found.cause(name) is not None)


def _results(
    compressed: onnx.ModelProto, proof: Sequence[Feeds], threads: int
) -> list[dict[str, Any]]:
    """Run the rewritten model.

    Raises
    ------
    VerificationError
        If onnxruntime does not run it.
    """
    try:
        return _runs(compressed, proof, threads)
    except ModelError as error:
        raise VerificationError(
            f"the rewritten model fails: {error.message}; nothing written"
        ) from error


def _small(original: onnx.ModelProto) -> bool:
    """Whether models are optimised, as users run them: weights in fewer bits are decoded once.

    Large ones are not, since both sessions would hold a second copy of the weights.
    """
    return stored_bytes(original) < BY_FILE


def _compare(
    comparison: Comparison,
    original: onnx.ModelProto,
    second: onnxruntime.InferenceSession,
    batches: Iterable[tuple[int, Feeds]],
    threads: int,
    progress: Callable[[int], None],
) -> int:
    """Accumulate over all batches; return the number of samples."""
    first = open_session(original, threads, optimized=_small(original))
    total = 0
    for number, (samples, feeds) in enumerate(batches):
        progress(number)
        comparison.add(run_session(first, feeds), run_session(second, feeds), feeds, samples)
        total += samples
    return total


def rows_of(feeds: Feeds) -> int:
    """How many samples random inputs are, of which nothing is known: the longest first axis."""
    return max((len(value) for value in feeds.values() if value.ndim), default=1)
