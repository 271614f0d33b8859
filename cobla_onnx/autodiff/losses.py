"""The loss as nodes of the graph, and its derivative with respect to each output of the model.

The same formulas as `calibration.evaluation.loss`, in the graph's own precision. With p the
target's and q the model's distribution along the measure's axis:

=======================  ==========================  ==============================
kind                     loss of a position          derivative w.r.t. the output
=======================  ==========================  ==============================
``probabilities``        sum p log(p / q)            -p / q
``logits``               the same of softmaxes       softmax(output) - p
``ce-probabilities``     -sum p log q                -p / q
``ce-logits``            the same of a softmax       softmax(output) sum(p) - p
``binary-...``           -p log q                    (q - p) / (q (1 - q)),
                         - (1 - p) log(1 - q)        of logits q - p
``mse``                  sum scale (q - p)^2         2 scale (q - p)
``either``               half of that, and half of   the sum of both derivatives
                         |centred(q - p)|^2 / spread
=======================  ==========================  ==============================

Further axes are averaged: over the positions in the mask, if there is one, and with labels over
the positions whose label counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cobla_onnx.autodiff.emitter import Emitter
from cobla_onnx.autodiff.measures import TINY, Measure
from cobla_onnx.autodiff.vjp.registry import Sizes
from cobla_onnx.errors import UsageError

__all__ = ["Losses", "write_losses"]

# Stands for minus infinity where both logits are: their difference is to be 0 and not NaN.
LOW = -1e30


@dataclass(frozen=True)
class Losses:
    """What `write_losses` wrote.

    Attributes
    ----------
    loss : str
        Loss of each sample, shape (samples,).
    samples : int
    seeds : dict of str to str
        For each output, the derivative of the sum of `loss` by it.
    targets, powers : dict of str to str
        For each output, the inputs for its target (of its shape) and, for ``mse`` without a
        scale, for the mean square of the targets (a scalar).
    """

    loss: str
    samples: int
    seeds: dict[str, str]
    targets: dict[str, str]
    powers: dict[str, str]


def write_losses(
    g: Emitter, measures: Mapping[str, Measure], shapes: Mapping[str, Sizes]
) -> Losses:
    """Write the losses of outputs of known shapes, and their derivatives.

    An output that is not batched along its first axis counts as one sample: its mean is
    added to every sample's loss.
    """
    lengths = {name: (shapes[name] or (1,))[0] for name in measures}
    samples = min(lengths.values())
    terms: list[str] = []
    seeds: dict[str, str] = {}
    targets: dict[str, str] = {}
    powers: dict[str, str] = {}
    for name, measure in measures.items():
        targets[name] = g.name(f"target/{name}")
        if measure.kind in ("mse", "either"):
            if measure.scale is None:
                powers[name] = g.name(f"power/{name}")
            term, seed = _squares(g, name, shapes[name], targets[name], measure, powers)
        elif measure.kind.startswith("binary"):
            term, seed = _binary(g, name, shapes[name], targets[name], measure)
        else:
            term, seed = _divergence(g, name, shapes[name], targets[name], measure)
        if lengths[name] != samples:
            seed = g.mul(seed, samples / lengths[name])
            term = g.expand(g.mean(term, [0], keep=True), [samples])
        terms.append(term)
        seeds[name] = seed
    loss = g.name("loss")
    g.named(loss, g.total(terms))
    return Losses(loss, samples, seeds, targets, powers)


def _squares(
    g: Emitter, q: str, shape: Sizes, p: str, measure: Measure, powers: Mapping[str, str]
) -> tuple[str, str]:
    """Scaled squared error of each sample, and its derivative."""
    length = (shape or (1,))[0]
    elements = math.prod(shape) // max(length, 1)
    difference = g.sub(q, p)
    if measure.suppressed:
        difference = g.op("Where", g.op("IsInf", p), 0.0, difference)
    if measure.scale is None:
        scaled = g.div(g.mul(difference, 1.0 / max(elements, 1)), g.op("Max", powers[q], TINY))
    else:
        scaled = g.mul(difference, _slices(g, measure, len(shape)))
        scaled = g.mul(scaled, _share(g, shape, measure, p))

    def total(product: str) -> str:
        return g.sum(g.reshape(product, [length, elements]), [1])

    term, seed = total(g.mul(difference, scaled)), g.mul(scaled, 2.0)
    if measure.kind == "mse":
        return term, seed
    centred = g.sub(difference, g.mean(difference, [1], keep=True))
    about = g.mul(centred, 1.0 / measure.spread)
    both = g.add(term, total(g.mul(centred, about)))
    return g.mul(both, 0.5), g.add(g.mul(seed, 0.5), about)


def _slices(g: Emitter, measure: Measure, rank: int) -> str:
    """Scale of each slice, to be broadcast over the output."""
    assert measure.scale is not None
    scale = np.array(measure.scale, g.dtype)
    if measure.axis is None:
        return g.constant(scale.reshape([1] * rank))
    return g.constant(scale.reshape(-1, *[1] * (rank - measure.axis - 1)))


def _share(g: Emitter, shape: Sizes, measure: Measure, target: str) -> str | float:
    """Weight of each position in its sample's mean; a number, or a tensor to be broadcast."""
    others = [size for axis, size in enumerate(shape) if axis and axis != measure.axis]
    counted = _counted(g, measure, target)
    if measure.mask is None and counted is None:
        return 1.0 / max(math.prod(others), 1)
    repeated = 1
    if measure.mask is not None:
        mask = g.reshape(g.float(measure.mask), [*shape[:2], *[1] * (len(shape) - 2)])
        repeated = 1 if counted is not None else math.prod(others) // max(shape[1], 1)
        counted = mask if counted is None else g.mul(counted, mask)
    assert counted is not None
    number = g.op("Max", g.sum(counted, list(range(1, len(shape))), keep=True), 1.0)
    return g.div(counted, g.mul(number, max(repeated, 1)))


def _counted(g: Emitter, measure: Measure, target: str) -> str | None:
    """1 at positions with a label that counts, else 0; None where nothing is labelled."""
    if not measure.labelled:
        return None
    if measure.axis is None:
        return g.float(g.op("Not", g.op("Less", target, 0.0)))
    return g.sum(target, [measure.axis], keep=True)


def _binary(g: Emitter, q: str, shape: Sizes, p: str, measure: Measure) -> tuple[str, str]:
    """Cross-entropy of one probability to 0 or 1, and its derivative."""
    length = (shape or (1,))[0]
    elements = math.prod(shape) // max(length, 1)
    if measure.of_logits:
        each = g.sub(g.op("Softplus", q), g.mul(p, q))
        seed = g.sub(g.op("Sigmoid", q), p)
    else:
        q = g.op("Min", g.op("Max", q, TINY), 1.0 - np.finfo(g.dtype).eps)
        rest, miss = g.sub(1.0, q), g.sub(1.0, p)
        each = g.neg(g.add(g.mul(p, g.op("Log", q)), g.mul(miss, g.op("Log", rest))))
        seed = g.div(g.sub(q, p), g.mul(q, rest))
    share = _share(g, shape, measure, p)
    term = g.sum(g.reshape(g.mul(each, share), [length, elements]), [1])
    return term, g.mul(seed, share)


def _divergence(g: Emitter, q: str, shape: Sizes, p: str, measure: Measure) -> tuple[str, str]:
    """Divergence of each sample between distributions along an axis, and its derivative."""
    axis = measure.axis
    if axis is None or axis >= len(shape):
        raise UsageError(
            f"output {q!r} of shape {list(shape)} has no classes along axis {axis}; "
            "choose the loss 'mse' for it"
        )
    cross_entropy, logits = measure.kind.startswith("ce"), measure.of_logits
    if logits:
        log_q = g.op("LogSoftmax", q, axis=axis)
        log_p = "" if cross_entropy else g.op("LogSoftmax", p, axis=axis)
        if measure.suppressed:
            log_q, log_p = (name and g.op("Max", name, LOW) for name in (log_q, log_p))
    else:
        log_q = g.op("Log", g.op("Max", q, TINY))
        p = p if cross_entropy else g.op("Max", p, TINY)
        log_p = "" if cross_entropy else g.op("Log", p)
    weight = g.op("Exp", log_p) if logits and not cross_entropy else p
    each = g.mul(weight, g.neg(log_q) if cross_entropy else g.sub(log_p, log_q))
    if logits:
        soft = g.op("Exp", log_q)
        if cross_entropy:
            soft = g.mul(soft, g.sum(weight, [axis], keep=True))
        seed = g.sub(soft, weight)
    else:
        seed = g.masked(g.neg(g.div(weight, g.op("Max", q, TINY))), g.op("Greater", q, TINY))
    further = list(range(1, len(shape)))
    if math.prod(shape[1:]) == shape[axis]:
        return g.sum(each, further), seed
    share = _share(g, shape, measure, p)
    each = g.mul(g.sum(each, [axis], keep=True), share)
    return g.sum(each, further), g.mul(seed, share)
