"""How a run computes: threads, workers, cache and progress, as one object."""

from __future__ import annotations

from dataclasses import dataclass, field

from cobla_onnx.runtime.cache import Cache
from cobla_onnx.runtime.pool import Pool
from cobla_onnx.runtime.progress import Progress, silent

__all__ = ["RunContext"]


@dataclass(frozen=True)
class RunContext:
    """What computations share; none of it changes a result, apart from rounding.

    Attributes
    ----------
    threads : int
        Of onnxruntime.
    pool : Pool
        Runs units of work, by default one after the other.
    cache : Cache, optional
    progress : callable
        Called with (stage, done, total).
    """

    threads: int = 1
    pool: Pool = field(default_factory=Pool)
    cache: Cache | None = None
    progress: Progress = silent
