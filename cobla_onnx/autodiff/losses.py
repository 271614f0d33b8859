"""The loss inside the graph, and its derivative by each output of the model.

The same formulas as `cobla_onnx.calibration.loss`, in the graph's own precision. With
classes along axis 1, p the target's and q the model's distribution:

=====================  ==========================  ==============================
kind                   loss of a sample            derivative by the output
=====================  ==========================  ==============================
``probabilities``      sum p log(p / q)            -p / q
``logits``             the same of softmaxes       softmax(output) - p
``ce-probabilities``   -sum p log q                -p / q
``ce-logits``          the same of a softmax       softmax(output) sum(p) - p
``mse``                mean (q - p)^2 / power      2 (q - p) / (elements power)
=====================  ==========================  ==============================

Further axes are averaged over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from cobla_onnx.autodiff.emitter import Emitter
from cobla_onnx.autodiff.vjp.registry import Sizes
from cobla_onnx.errors import UsageError

__all__ = ["KINDS", "TINY", "LossKind", "Losses", "write_losses"]

LossKind: TypeAlias = Literal["probabilities", "logits", "mse", "ce-probabilities", "ce-logits"]
KINDS = ("probabilities", "logits", "mse", "ce-probabilities", "ce-logits")
"""How an output is compared with its target."""

TINY = 1e-12
"""Probabilities and powers below count as this much."""


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
        For each output, the inputs for its target (of its shape) and, for ``mse``, for the
        mean square of the targets (a scalar).
    """

    loss: str
    samples: int
    seeds: dict[str, str]
    targets: dict[str, str]
    powers: dict[str, str]


def write_losses(g: Emitter, kinds: Mapping[str, LossKind], shapes: Mapping[str, Sizes]) -> Losses:
    """Write the losses of outputs of known shapes, and their derivatives.

    An output that is not batched along its first axis counts as one sample: its mean is
    added to every sample's loss.
    """
    lengths = {name: (shapes[name] or (1,))[0] for name in kinds}
    samples = min(lengths.values())
    terms: list[str] = []
    seeds: dict[str, str] = {}
    targets: dict[str, str] = {}
    powers: dict[str, str] = {}
    for name, kind in kinds.items():
        targets[name] = g.name(f"target/{name}")
        if kind == "mse":
            powers[name] = g.name(f"power/{name}")
            term, seed = _squares(g, name, shapes[name], targets[name], powers[name])
        else:
            term, seed = _divergence(g, name, shapes[name], targets[name], kind)
        if lengths[name] != samples:
            seed = g.mul(seed, samples / lengths[name])
            term = g.expand(g.mean(term, [0], keep=True), [samples])
        terms.append(term)
        seeds[name] = seed
    loss = g.name("loss")
    g.named(loss, g.total(terms))
    return Losses(loss, samples, seeds, targets, powers)


def _squares(g: Emitter, q: str, shape: Sizes, p: str, power: str) -> tuple[str, str]:
    """Squared error of each sample over its elements and the power, and its derivative."""
    length = (shape or (1,))[0]
    elements = math.prod(shape) // max(length, 1)
    difference = g.sub(q, p)
    scale = g.div(1.0 / max(elements, 1), g.op("Max", power, TINY))
    total = g.sum(g.reshape(g.square(difference), [length, elements]), [1])
    return g.mul(total, scale), g.mul(difference, g.mul(scale, 2.0))


def _divergence(g: Emitter, q: str, shape: Sizes, p: str, kind: LossKind) -> tuple[str, str]:
    """Divergence of each sample between distributions along axis 1, and its derivative."""
    if len(shape) < 2:
        raise UsageError(
            f"output {q!r} of shape {list(shape)} has no classes along axis 1; "
            "choose the loss 'mse' for it"
        )
    cross_entropy, logits = kind.startswith("ce"), kind.endswith("logits")
    if logits:
        log_q = g.op("LogSoftmax", q, axis=1)
        log_p = "" if cross_entropy else g.op("LogSoftmax", p, axis=1)
    else:
        log_q = g.op("Log", g.op("Max", q, TINY))
        p = p if cross_entropy else g.op("Max", p, TINY)
        log_p = "" if cross_entropy else g.op("Log", p)
    weight = g.op("Exp", log_p) if logits and not cross_entropy else p
    each = g.mul(weight, g.neg(log_q) if cross_entropy else g.sub(log_p, log_q))
    if logits:
        soft = g.op("Exp", log_q)
        if cross_entropy:
            soft = g.mul(soft, g.sum(weight, [1], keep=True))
        seed = g.sub(soft, weight)
    else:
        seed = g.masked(g.neg(g.div(weight, g.op("Max", q, TINY))), g.op("Greater", q, TINY))
    positions = math.prod(shape[2:])
    if positions != 1:
        seed = g.mul(seed, 1.0 / max(positions, 1))
    return g.mean(g.sum(each, [1]), range(1, len(shape) - 1)), seed
