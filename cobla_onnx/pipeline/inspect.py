"""What could be done to a model: `inspect` looks at it and changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from cobla_onnx.allocation import Budget
from cobla_onnx.allocation.budget import least_fraction
from cobla_onnx.allocation.problem import VariantCurve
from cobla_onnx.graph.holders import bytes_elsewhere
from cobla_onnx.graph.layers import Skipped
from cobla_onnx.options import Settings
from cobla_onnx.options.signatures import InspectOptions, takes_options
from cobla_onnx.pipeline.analysis import Analysis
from cobla_onnx.pipeline.inputs import ModelSource
from cobla_onnx.pipeline.layer_losses import layer_losses
from cobla_onnx.pipeline.open_session import open_session
from cobla_onnx.pipeline.session import Session
from cobla_onnx.report.inspection import InspectedLayer, InspectedScheme, Inspection, LeftAlone
from cobla_onnx.variants.registry import FAMILIES

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["inspect"]


@takes_options("inspect")
def inspect(
    model: ModelSource,
    *,
    sensitivity: bool = False,
    **options: Unpack[InspectOptions],
) -> Inspection:
    """Look at what could be done to a model; nothing is changed or written.

    Parameters
    ----------
    model : ModelProto or path
    sensitivity : bool
        Also predict, by the curves that `advise` has, what each layer loses for the bytes that it
        gives, by ranks and by bits.
    input_shapes, include, exclude, min_size, deduplicate, scheme, data, samples, batch, memory_limit, images, threads, progress
        As those of `compress`. With data, spectra are those of the layers' outputs.

    Returns
    -------
    Inspection

    Raises
    ------
    UsageError, ModelError, DataError, WriteError
        See `cobla_onnx.errors`.

    Examples
    --------
    >>> from cobla_onnx import inspect
    >>> found = inspect("models/digits.onnx")
    >>> found.layers[0].name, found.layers[0].op
    ('stem/conv', 'Conv')
    >>> found.least["mem"] < 0.05
    True
    """  # noqa: E501
    settings = Settings.of("inspect", options, precision="auto" if sensitivity else "keep")
    with open_session(model, settings, comparing=sensitivity) as session:
        found = _inspection(session)
        if sensitivity:
            found = replace(found, sensitivity=layer_losses(session))
    return found


def _by_ranks(analysis: Analysis) -> Analysis:
    """Return what is found where no fewer bits are there to be compared."""
    return analysis.with_levels(
        lambda _, __, curve: curve.levels[: 0 if FAMILIES[curve.family].needs_bits else None]
    )


def _inspection(session: Session) -> Inspection:
    analysis = _by_ranks(session.analysis)
    layers = [
        InspectedLayer(
            layer.name,
            layer.op,
            layer.shape,
            layer.params,
            layer.stored_bytes,
            macs,
            _schemes(curves.curves, layer.stored_bytes, macs),
        )
        for layer, curves, macs in zip(analysis.layers, analysis.curves, analysis.macs, strict=True)
    ]
    return Inspection(
        None if session.source is None else str(session.source),
        tuple(layers),
        tuple(map(_left_alone, analysis.skipped)),
        analysis.mem_total,
        analysis.mac_total,
        bytes_elsewhere(session.written, [layer.source for layer in analysis.layers]),
        _least(analysis),
        dict(analysis.input_shapes),
        "weights" if analysis.from_data is None else "outputs",
        analysis.notes,
    )


def _least(analysis: Analysis) -> dict[str, float]:
    """Least fractions within reach, by all ranks: where a grid keeps from it, more are added."""
    constraints = analysis.constraints(
        Budget(mem=1.0, mac=None if analysis.mac_total is None else 1.0)
    )
    return {c.name: least_fraction(c, analysis.curves) for c in constraints}


def _schemes(
    curves: Sequence[VariantCurve], size: int, macs: int | None
) -> tuple[InspectedScheme, ...]:
    found = [
        InspectedScheme(
            name=curve.scheme,
            full_rank=curve.most,
            break_even_memory=_rank_for(curve, size),
            break_even_macs=_ratio(macs, curve.per_level.get("mac")),
            most=int(curve.levels[-1]),
            half_error=_error_at(curve, int(_rank_for(curve, size // 2))),
            error_ranks={
                f"{error:g}": _rank_at(curve, error * error) for error in (0.3, 0.1, 0.03, 0.01)
            },
            singular_values=tuple(_relative(curve)),
        )
        for curve in curves
        if curve.spectrum is not None
    ]
    return tuple(sorted(found, key=lambda scheme: scheme.half_error))


def _rank_for(curve: VariantCurve, size: int) -> float:
    """Rank at which a layer takes so many bytes; 0 where no rank takes as few."""
    if "mem" in curve.per_level:
        return size / curve.per_level["mem"]
    levels, costs = curve.levels, curve.costs["mem"]
    each = (costs[-1] - costs[0]) / (levels[-1] - levels[0]) if len(levels) > 1 else costs[0]
    return max(float(levels[0] + (size - costs[0]) / each), 0.0)


def _ratio(whole: int | None, each: int | None) -> float | None:
    return whole / each if whole and each else None


def _error_at(curve: VariantCurve, rank: int) -> float:
    errors = curve.errors
    return float(np.sqrt(errors[min(rank, len(errors) - 1)]))


def _rank_at(curve: VariantCurve, error: float) -> int:
    """Least rank whose squared relative error is at most `error`; full rank has none."""
    return int(np.argmax(curve.errors <= error + 1e-12))


def _relative(curve: VariantCurve) -> list[float]:
    values = np.asarray(curve.spectrum, dtype=np.float64)
    largest = float(values.max(initial=0.0))
    return [float(f"{v:.4g}") for v in values / largest] if largest > 0 else [0.0] * len(values)


def _left_alone(item: Skipped) -> LeftAlone:
    return LeftAlone(item.name, item.op, str(item), item.params)
