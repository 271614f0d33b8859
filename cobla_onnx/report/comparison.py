"""Result of comparing two models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cobla_onnx.calibration.evaluation.outputs import OutputComparison
from cobla_onnx.latency import timing
from cobla_onnx.report.serialise import Exported

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["ModelComparison", "ModelFacts"]


@dataclass(frozen=True)
class ModelFacts:
    """Size and speed of one of the models.

    Attributes
    ----------
    path : str or None
    file_bytes : int or None
        Of the file and its data files; None for a model in memory.
    weight_bytes : int
    macs : int or None
        Of one sample; None if they are not known.
    nodes : int
    latency_ms : tuple of three float
        Median, 10th and 90th percentile of the time of a run.
    """

    path: str | None
    file_bytes: int | None
    weight_bytes: int
    macs: int | None
    nodes: int
    latency_ms: tuple[float, float, float]


@dataclass(frozen=True)
class ModelComparison(Exported):
    """Result of `compare`; the second model is measured against the first.

    Attributes
    ----------
    first, second : ModelFacts
    outputs : tuple of OutputComparison
    data : str
        Source of the inputs; ``random`` says little about real data.
    samples : int
    latency : timing.Comparison
        Times of runs in turn, in milliseconds.
    timed_shapes : dict of str to tuple
        Shapes of the inputs of the timed runs.
    threads : int
    provider : str
        onnxruntime's execution provider.
    onnxruntime : str
        Its version.
    notes : tuple of str
    """

    first: ModelFacts
    second: ModelFacts
    outputs: tuple[OutputComparison, ...]
    data: str
    samples: int
    latency: timing.Comparison
    timed_shapes: dict[str, tuple[int, ...]]
    threads: int
    provider: str
    onnxruntime: str
    notes: tuple[str, ...]

    def __rich__(self) -> RenderableType:
        from cobla_onnx.report.comparison_table import comparison_table

        return comparison_table(self)
