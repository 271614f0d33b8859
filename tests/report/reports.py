"""Reports to render: a real one, and one with everything in it that a file could do."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from cobla_onnx import Budget, Plan, compress
from cobla_onnx.allocation.sqp import Step
from cobla_onnx.plan import Decision
from cobla_onnx.report.model import LatencyReport, LayerLatency, Report, Spread
from tests.builders import small_network

HOSTILE = "</script><img src=x onerror=document.title='owned'>\x1b[2J\u202e|`*_[a](b)"


@lru_cache(maxsize=1)
def small_report() -> Report:
    return compress(small_network(), Budget(mem=0.5, mac=0.7), rank_multiple=1).report


@lru_cache(maxsize=1)
def full_report() -> Report:
    """Return a report with hostile names, 300 layers, notes, a history and a latency."""
    report = small_report()
    layers = []
    for number in range(300):
        layer = report.layers[number % len(report.layers)]
        layers.append(replace(layer, name=f"{number}/{HOSTILE}"))
    skipped = replace(
        layers[0], decision="skipped", reason=HOSTILE, scheme=None, rank=None, spectrum=None
    )
    spread = Spread(median=12.5, low=12.1, high=13.0)
    verification = report.verification
    assert verification is not None
    outputs = tuple(replace(output, name=HOSTILE) for output in verification.outputs)
    return replace(
        report,
        input=f"models/{HOSTILE}.onnx",
        layers=(*layers, skipped),
        verification=replace(verification, outputs=outputs),
        notes=(HOSTILE, "second note"),
        command=f"cobla-onnx '{HOSTILE}' out.onnx",
        history=tuple(
            Step("slsqp", n, 2.0 / (n + 1) if n != 3 else float("inf"), None, {}, 0.1 * n)
            for n in range(12)
        ),
        latency=LatencyReport(
            threads=2,
            provider=HOSTILE,
            repeats=30,
            before_ms=spread,
            after_ms=spread,
            ratio=0.71,
            ratio_low=0.69,
            ratio_high=0.73,
            predicted_ratio=0.7,
            layers=(LayerLatency(HOSTILE, 3.0, 1.5),),
        ),
    )


@lru_cache(maxsize=1)
def stored_report() -> Report:
    """Return a report of one layer that is factorised, one in fewer bits and one that is whole."""
    decisions = (
        Decision("conv1"),
        Decision("conv2", "channel", 2),
        Decision("fc", "stored", 4),
    )
    return compress(small_network(), plan=Plan(decisions), threads=1).report
