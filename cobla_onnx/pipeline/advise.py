"""Which levers a model has and what they would lose: `advise` searches no plan and writes nothing.

One analysis proposes ranks and bits for every layer. For each lever, the linear relaxation of the
allocation gives the least loss at every budget at once, so that no budget is solved by itself.
"""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from cobla_onnx.allocation import Budget, allocate
from cobla_onnx.allocation.bound import Front
from cobla_onnx.graph.holders import bytes_elsewhere
from cobla_onnx.options import Settings
from cobla_onnx.options.flags import typed_options
from cobla_onnx.options.signatures import AdviseOptions, takes_options
from cobla_onnx.pipeline.analysis import Analysis
from cobla_onnx.pipeline.inputs import ModelSource
from cobla_onnx.pipeline.levers import Lever, levers_of, losses_of
from cobla_onnx.pipeline.open_session import open_session
from cobla_onnx.pipeline.session import Session
from cobla_onnx.report.advice import Advice, LayerShare, Outlook, Suggestion

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["advise"]

# Samples that are used unless a person says how many: the answer is wanted in a minute.
SAMPLES = 64
MEMORY = (0.75, 0.5, 0.35, 0.25, 0.2, 0.15, 0.125, 0.1, 0.075, 0.05)
MACS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
# Losses, in nats or as a share of the outputs' spread, that few people see, and that most do.
HARDLY, VISIBLY = 0.01, 0.1
# Layers that are named, by their share of the loss.
NAMED = 3


@takes_options("advise")
def advise(model: ModelSource, **options: Unpack[AdviseOptions]) -> Advice:
    """Predict what a model loses at a handful of budgets, by ranks, by bits and by both.

    Parameters
    ----------
    model : ModelProto or path
    input_shapes, include, exclude, min_size, deduplicate, scheme, data, batch, memory_limit
        As those of `compress`.
    samples : int, optional
        At most 64 if it is not given.
    images, labels, loss, outputs, threads, progress
        As those of `compress`.

    Returns
    -------
    Advice

    Raises
    ------
    UsageError, ModelError, DataError, WriteError
        See `cobla_onnx.errors`.

    Examples
    --------
    >>> from cobla_onnx import advise
    >>> found = advise("models/digits.onnx")
    >>> half = next(x for x in found.outlooks if (x.resource, x.kept) == ("mem", 0.5))
    >>> half.both <= half.bits < half.ranks
    True
    """
    settings = Settings.of("advise", options, precision="auto", refit=False)
    if settings.data is not None and settings.samples is None:
        settings = replace(settings, samples=SAMPLES)
    with open_session(model, settings, comparing=True) as session:
        return _advice(session)


def _advice(session: Session) -> Advice:
    analysis, evidence = session.analysis, session.evidence
    known = analysis.mac_total is not None
    constraints = analysis.constraints(Budget(mem=1.0, mac=1.0 if known else None))
    losses, samples = losses_of(session, constraints)
    levers = levers_of(session, losses)
    outlooks = tuple(_outlooks(analysis, levers))
    suggestions = tuple(_suggestions(session, outlooks))
    by_operator: Counter[str] = Counter()
    macs_by_operator: Counter[str] = Counter()
    for layer, macs in zip(analysis.layers, analysis.macs, strict=True):
        by_operator[layer.op] += layer.stored_bytes
        macs_by_operator[layer.op] += macs or 0
    return Advice(
        input=None if session.source is None else str(session.source),
        mem_total=analysis.mem_total,
        mac_total=analysis.mac_total,
        bytes_by_operator=dict(by_operator.most_common()),
        macs_by_operator=dict(macs_by_operator.most_common()) if known else {},
        elsewhere=bytes_elsewhere(session.model, [layer.source for layer in analysis.layers]),
        measured_by="weights" if evidence is None else "loss",
        samples=samples,
        outlooks=outlooks,
        limiting=() if evidence is None else _limiting(session, levers["both"], outlooks),
        suggestions=suggestions,
        notes=analysis.notes,
    )


def _outlooks(analysis: Analysis, levers: Mapping[str, Lever]) -> Iterable[Outlook]:
    resources: tuple[tuple[Literal["mem", "mac"], Sequence[float]], ...]
    resources = (("mem", MEMORY), *((("mac", MACS),) if analysis.mac_total is not None else ()))
    for resource, shares in resources:
        budget = Budget(**{resource: 1.0})
        fronts = {
            name: lever.front(*budget.constraints(lever.layers, analysis.totals, analysis.saved))
            for name, lever in levers.items()
        }
        for kept in shares:
            found = {name: _at(front, kept) for name, front in fronts.items()}
            if any(loss is not None for loss in found.values()):
                yield Outlook(resource, kept, **found)


def _at(front: Front, kept: float) -> float | None:
    """Least loss at a fraction; None if it is out of reach."""
    if kept < front.kept[-1]:
        return None
    return float(np.interp(kept, front.kept[::-1], front.losses[::-1]))


def _smallest(
    outlooks: Iterable[Outlook], resource: str, lever: str, most: float
) -> Outlook | None:
    """Return the smallest budget at which a lever loses at most so much."""
    fitting = [
        each
        for each in outlooks
        if each.resource == resource and (loss := getattr(each, lever)) is not None and loss <= most
    ]
    return min(fitting, key=lambda each: each.kept, default=None)


def _suggestions(session: Session, outlooks: tuple[Outlook, ...]) -> Iterable[Suggestion]:
    if not session.analysis.layers:
        return
    source = "IN.onnx" if session.source is None else shlex.quote(str(session.source))
    options = typed_options(session.settings, "advise", "compress")
    # Where no layer can be stored in fewer bits, it is not asked for.
    bits = " --precision auto" if any(x.bits is not None for x in outlooks) else ""
    if session.evidence is None:
        yield from _blind(source, options, bits, outlooks)
        return
    given = session.settings.data
    # Arrays and the like, from Python, have no name.
    data = shlex.quote(os.fspath(given)) if isinstance(given, str | os.PathLike) else "SAMPLES"
    data = f"{options} --data {data}".lstrip()
    safe = _smallest(outlooks, "mem", "both", HARDLY)
    small = _smallest(outlooks, "mem", "both", VISIBLY)
    further = None if small is safe else small
    for how, found in (("that hardly shows", safe), ("that shows, before refit", further)):
        if found is not None:
            yield Suggestion(
                f"cobla-onnx {source} OUT.onnx --mem {found.kept:g}{bits} {data}",
                f"the smallest of these budgets with a loss {how}",
                found.both,
            )
    faster = _smallest(outlooks, "mac", "ranks", VISIBLY)
    if faster is not None:
        yield Suggestion(
            f"cobla-onnx {source} OUT.onnx --mac {faster.kept:g} {data}",
            "the fewest MACs with a loss that shows, before refit",
            faster.ranks,
        )
    if session.least_memory() < 1.0:
        yield Suggestion(
            f"cobla-onnx {source} OUT.onnx --max-drop 1%{bits} {data}",
            "the smallest model that keeps 99 % of the answers, measured",
        )


def _blind(
    source: str, options: str, bits: str, outlooks: tuple[Outlook, ...]
) -> Iterable[Suggestion]:
    """Suggest what can be done without data."""
    yield Suggestion(
        f"cobla-onnx advise {source}{options} --data SAMPLES",
        "samples of what the model sees, without labels, tell what is lost",
    )
    kept, reason = 0.26, "about 8 bits for each weight, which most models hardly notice"
    by_bits = [x.kept for x in outlooks if x.resource == "mem" and x.bits is not None]
    if min(by_bits, default=1.0) > kept:
        # No weight has so few bits, or bytes that nothing compresses stand in the way.
        found = _smallest(outlooks, "mem", "both", HARDLY)
        if found is None:
            return
        kept, reason = found.kept, "the smallest of these budgets that hardly changes a weight"
    yield Suggestion(f"cobla-onnx {source} OUT.onnx --mem {kept:g}{bits}{options}", reason)


def _limiting(
    session: Session, lever: Lever, outlooks: tuple[Outlook, ...]
) -> tuple[LayerShare, ...]:
    """Name the layers that lose most at the smallest budget that is hardly to be noticed."""
    found = _smallest(outlooks, "mem", "both", HARDLY)
    if found is None:
        return ()
    analysis = session.analysis
    budget = Budget(mem=found.kept)
    constraints = budget.constraints(lever.layers, analysis.totals, analysis.saved)
    choices = allocate(lever.layers, lever.losses, constraints, solver="milp").choices
    lost = {
        layer.name: float(lever.losses.curve(index, choice.curve)[choice.level])
        for index, (layer, choice) in enumerate(zip(lever.layers, choices, strict=True))
        if choice is not None
    }
    total = sum(lost.values())
    bytes_of = {layer.name: layer.stored_bytes for layer in analysis.layers}
    most = sorted(lost, key=lambda name: -lost[name])[:NAMED]
    return tuple(LayerShare(name, lost[name] / total, bytes_of[name]) for name in most if total)
