"""Ranges of a model's tensors, from calibration samples by onnxruntime's calibrators."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import onnx

from cobla_onnx.arithmetic.aliases import Aliases, alias
from cobla_onnx.arithmetic.nodes import CARRIED, MOVED, WEIGHTED, data_inputs, reader_counts
from cobla_onnx.arithmetic.prepared import Handed, Prepared, has_more_files, in_a_file, quietly
from cobla_onnx.graph.io.model_file import copy_without_initializers
from cobla_onnx.runtime.session import Feeds

__all__ = [
    "METHODS",
    "Method",
    "Ranges",
    "calibrated",
    "renamed_ranges",
    "stand_in_ranges",
    "with_common_ranges",
]

Method: TypeAlias = Literal["min-max", "entropy", "percentile"]
METHODS: tuple[Method, ...] = get_args(Method)
Ranges: TypeAlias = Any
"""`onnxruntime.quantization.TensorsData`."""


def calibrated(
    prepared: Prepared,
    batches: Iterable[Feeds],
    method: Method,
    operators: Collection[str] = (*WEIGHTED, *CARRIED),
) -> Ranges | None:
    """Run a model on samples and choose a range for each of its tensors.

    Parameters
    ----------
    batches : iterable of dict
        One after the other, so that tensors of one alone are held.
    method : {'min-max', 'entropy', 'percentile'}
        ``min-max``: all that was seen. ``entropy``: what loses least of the divergence between
        the histogram and its rounded one. ``percentile``: all but one value in 100,000.
    operators : collection of str
        Those whose tensors are wanted. What others compute may lie too far apart for a histogram.

    Returns
    -------
    TensorsData or None
        None where values are too far apart for a histogram, such as those of masks that take
        away the largest number from what is not to count.
    """
    from onnxruntime.quantization import CalibrationMethod, create_calibrator

    kinds = {
        "min-max": CalibrationMethod.MinMax,
        "entropy": CalibrationMethod.Entropy,
        "percentile": CalibrationMethod.Percentile,
    }
    # The range of a tensor that is never negative begins at 0; percentiles are symmetric unless
    # one says so.
    extra = {"symmetric": False}
    aliases = Aliases.of(prepared.model)
    with in_a_file(_under(aliases, prepared.model)) as path, quietly():
        calibrator = create_calibrator(
            path,
            sorted(operators),
            augmented_model_path=str(path.with_name("augmented.onnx")),
            calibrate_method=kinds[method],
            use_external_data_format=has_more_files(path),
            extra_options=extra,
        )
        try:
            # Such values overflow, too, before numpy refuses them.
            with np.errstate(over="ignore", invalid="ignore"):
                for feeds in batches:
                    # One by one: it keeps all tensors of what it is handed at a time.
                    given = {alias(name): value for name, value in feeds.items()}
                    calibrator.collect_data(Handed([given]))
                found = calibrator.compute_data()
            return renamed_ranges(found, aliases.names)
        except ValueError:
            if method == "min-max":
                raise
            return None
        finally:
            del calibrator


def _under(aliases: Aliases, model: onnx.ModelProto) -> onnx.ModelProto:
    copy = copy_without_initializers(model, ())
    aliases.give(copy)
    return copy


def renamed_ranges(ranges: Ranges, names: Mapping[str, str]) -> Ranges:
    """Return ranges under other names of the tensors; what is not among these keeps its own."""
    from onnxruntime.quantization import TensorsData

    found = {names.get(name, name): each for name, each in ranges.items()}
    return TensorsData(ranges.calibration_method, found)


def stand_in_ranges(prepared: Prepared) -> Ranges:
    """Return a range for every tensor, for models of which only bytes and times are asked."""
    from onnxruntime.quantization import CalibrationMethod, TensorsData

    names = dict.fromkeys(
        name for node in prepared.model.graph.node for name in (*node.input, *node.output) if name
    )
    names.update(dict.fromkeys(value.name for value in prepared.model.graph.input))
    # No two alike, as in a real model: to go from one range to another takes time.
    highest = np.linspace(1, 2, len(names), dtype=np.float32)
    found = {name: (-high, high) for name, high in zip(names, highest, strict=True)}
    return TensorsData(CalibrationMethod.MinMax, found)


def with_common_ranges(ranges: Ranges, model: onnx.ModelProto, places: Collection[int]) -> Ranges:
    """Give one range to what nodes only move, before and after.

    In ranges of their own, numbers would be rounded again on their way through Concat, number by
    number in one thread; so they are copied, and rounded once. A tensor that something else reads,
    too, keeps its own.

    Parameters
    ----------
    ranges : TensorsData
    model : ModelProto
    places : collection of int
        Of the nodes that compute in 8 bits or go with them.
    """
    from onnxruntime.quantization import TensorsData
    from onnxruntime.quantization.calibrate import TensorData

    graph = model.graph
    readers = reader_counts(model)
    together: dict[str, frozenset[str]] = {}
    for node in (graph.node[place] for place in sorted(places)):
        if node.op_type in MOVED:
            names = [name for name in data_inputs(node) if readers[name] == 1]
            known = [name for name in (*names, node.output[0]) if name in ranges]
            group = frozenset[str]().union(*(together.get(name, {name}) for name in known))
            together.update(dict.fromkeys(group, group))
    found = dict(ranges.items())
    for group in set(together.values()):
        lowest, highest = zip(*(ranges[name].range_value for name in group), strict=True)
        common = TensorData(lowest=np.min(lowest), highest=np.max(highest))
        found.update(dict.fromkeys(group, common))
    return TensorsData(ranges.calibration_method, found)
