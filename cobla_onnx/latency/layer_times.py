"""Time of every layer at every candidate rank, interpolated from a few measurements."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx
import scipy
from numpy.typing import NDArray

from cobla_onnx.allocation import LayerCurves, VariantCurve
from cobla_onnx.allocation.problem import Float64
from cobla_onnx.graph.layers import Layer, Reason, Skipped, Use
from cobla_onnx.graph.macs import Shape
from cobla_onnx.latency.profile import WHOLE, Profile
from cobla_onnx.latency.single_layer import layer_key, micro_graph
from cobla_onnx.latency.timing import Stopwatch
from cobla_onnx.plan import Decision, Plan
from cobla_onnx.variants.base import LayerVariants
from cobla_onnx.variants.writing import Storage

__all__ = ["interpolated", "measure_layer", "sampled", "slowest_layers", "time_layers"]

# Ranks that are measured for each scheme.
POINTS = 6
# Seconds for each distinct layer, and how often each of its forms is run.
SECONDS, LEAST, MOST = 0.5, 7, 60

Form = tuple[str, int]
"""A scheme and a rank."""


def sampled(ranks: NDArray[np.int64]) -> list[int]:
    """Return the ranks to measure: evenly spread over the candidates, the ends among them."""
    places = np.linspace(0, len(ranks) - 1, min(POINTS, len(ranks))).round().astype(int)
    return [int(rank) for rank in ranks[places]]


def interpolated(
    ranks: NDArray[np.int64], known: Sequence[int], times: Sequence[int]
) -> NDArray[np.int64]:
    """Interpolate times in nanoseconds between measured ranks.

    More rank never takes less time: what noise says against it is averaged out by
    isotonic regression.

    Parameters
    ----------
    ranks : int64 array
        Within the range of `known`.
    known, times : sequence of int
        Ascending ranks and the times measured there.

    Returns
    -------
    int64 array, shape of `ranks`
    """
    rising: Float64 = scipy.optimize.isotonic_regression(np.asarray(times, dtype=np.float64)).x
    return np.maximum(np.interp(ranks, known, rising).round().astype(np.int64), 1)


def measure_layer(
    model: onnx.ModelProto,
    layer: Layer,
    forms: Sequence[Form],
    shapes: Mapping[str, Shape],
    profile: Profile,
    stopwatch: Stopwatch,
    storage: Storage = "auto",
) -> tuple[int, list[int]] | None:
    """Return the time of a layer as it is and in the given forms, over all its uses.

    What the profile does not hold is measured, interleaved with the whole layer, and added
    to it.

    Returns
    -------
    tuple of int and list of int, or None
        Nanoseconds; None if the shapes of a use are not known, or if nodes read the weight in
        several ways, which no model of one node shows.
    """
    if layer.readings:
        return None
    keys = [layer_key(model, layer, use, shapes) for use in layer.uses]
    known = [key for key in keys if key is not None]
    if len(known) < len(keys):
        return None
    for key, use in zip(known, layer.uses, strict=True):
        _measure_use(model, layer, use, key, forms, shapes, profile, stopwatch, storage)
    tables = [profile.layers[key] for key in known]
    return (
        sum(table[WHOLE] for table in tables),
        [sum(table[_form_key(form, storage)] for table in tables) for form in forms],
    )


def _measure_use(
    model: onnx.ModelProto,
    layer: Layer,
    use: Use,
    key: str,
    forms: Sequence[Form],
    shapes: Mapping[str, Shape],
    profile: Profile,
    stopwatch: Stopwatch,
    storage: Storage,
) -> None:
    table = profile.layers.setdefault(key, {})
    missing = [form for form in forms if _form_key(form, storage) not in table]
    if not missing and WHOLE in table:
        return
    alone = micro_graph(model, layer, use, shapes)
    models = [alone.model, *(alone.replaced(*form, storage) for form in missing)]
    times = stopwatch.times(models, None, seconds=SECONDS, least=LEAST, most=MOST)
    medians = np.nanmedian(times, axis=0)
    whole = table.setdefault(WHOLE, max(round(1e9 * float(medians[0])), 1))
    for form, median in zip(missing, medians[1:], strict=True):
        # By the ratio, so that all forms of a layer stay comparable.
        table[_form_key(form, storage)] = max(round(whole * float(median / medians[0])), 1)


def _form_key(form: Form, storage: Storage) -> str:
    """Describe a form in a profile; what is decoded when the model opens takes the same time."""
    scheme, level = form
    return f"{scheme}@{level}" + " qdq" * (storage == "qdq")


def time_layers(
    model: onnx.ModelProto,
    variants: Sequence[LayerVariants],
    shapes: Mapping[str, Shape],
    profile: Profile,
    stopwatch: Stopwatch,
    progress: Callable[[int, int], None] = lambda done, total: None,
    storage: Storage = "auto",
) -> tuple[tuple[LayerVariants, ...], tuple[Skipped, ...]]:
    """Give every candidate level its time; leave out those that are not faster.

    Parameters
    ----------
    shapes : mapping of str to Shape
        Of the model's tensors, as far as known.
    storage : {'auto', 'cast', 'qdq'}
        How fewer bits are written.

    Returns
    -------
    variants : tuple of LayerVariants
        Of the layers that some level makes faster.
    skipped : tuple of Skipped
        The others.
    """
    kept: list[LayerVariants] = []
    skipped: list[Skipped] = []
    for index, each in enumerate(variants):
        progress(index, len(variants))
        layer = each.layer
        timed = _timed(model, layer, each.curves, shapes, profile, stopwatch, storage)
        places = [] if timed is None else [i for i, c in enumerate(timed.curves) if len(c.levels)]
        if timed is None or not places:
            unknown = "read in several ways" if layer.readings else "shapes not known"
            detail = unknown if timed is None else "measured"
            skipped.append(Skipped(layer.name, layer.op, Reason.NOT_FASTER, detail, layer.params))
            continue
        curves = replace(timed, curves=tuple(timed.curves[i] for i in places))
        kept.append(replace(each, curves=curves, forms=tuple(each.forms[i] for i in places)))
    progress(len(variants), len(variants))
    return tuple(kept), tuple(skipped)


def _timed(
    model: onnx.ModelProto,
    layer: Layer,
    curves: LayerCurves,
    shapes: Mapping[str, Shape],
    profile: Profile,
    stopwatch: Stopwatch,
    storage: Storage,
) -> LayerCurves | None:
    """Put times on the curves of a layer; ranks that are not faster are left out."""
    forms = [(curve.scheme, rank) for curve in curves.curves for rank in sampled(curve.levels)]
    measured = measure_layer(model, layer, forms, shapes, profile, stopwatch, storage)
    if measured is None:
        return None
    whole, times = measured
    by_form = dict(zip(forms, times, strict=True))
    result: list[VariantCurve] = []
    for curve in curves.curves:
        known = sampled(curve.levels)
        along = interpolated(curve.levels, known, [by_form[curve.scheme, rank] for rank in known])
        faster = along < whole
        result.append(curve.with_cost("latency", along).only(faster))
    return replace(curves, curves=tuple(result), costs={**curves.costs, "latency": whole})


def slowest_layers(
    model: onnx.ModelProto,
    layers: Sequence[Layer],
    shapes: Mapping[str, Shape],
    plan: Plan,
    profile: Profile,
    stopwatch: Stopwatch,
    count: int = 10,
    storage: Storage = "auto",
) -> list[tuple[str, int, int]]:
    """Return the slowest of the layers that may be replaced, before and after a plan.

    Returns
    -------
    list of (name, nanoseconds before, nanoseconds after)
        Slowest first.
    """
    decisions = {d.layer: d for d in plan.decisions}
    timed = []
    for layer in layers:
        found = measure_layer(model, layer, (), shapes, profile, stopwatch)
        if found is not None:
            timed.append((found[0], layer))
    timed.sort(key=lambda entry: -entry[0])
    result = []
    for before, layer in timed[:count]:
        decision, after = decisions.get(layer.name, Decision(layer.name)), before
        if not decision.folded and decision.scheme is not None and decision.rank is not None:
            form = (decision.scheme, decision.rank)
            found = measure_layer(model, layer, [form], shapes, profile, stopwatch, storage)
            assert found is not None
            after = found[1][0]
        result.append((layer.name, before, after))
    return result
