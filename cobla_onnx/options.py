"""How to compress, apart from the budget: what `open_study` is told."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from cobla_onnx.calibration.data.labels import Labels
from cobla_onnx.calibration.data.readers import ImageOptions
from cobla_onnx.calibration.evaluation.loss import LossName
from cobla_onnx.calibration.evaluation.output_choice import Outputs
from cobla_onnx.errors import UsageError
from cobla_onnx.runtime.progress import Progress
from cobla_onnx.variants.low_rank.ranks import RankMultiple

__all__ = ["BatchSize", "ObjectiveName", "Settings", "check_batch", "memory_bytes"]

BatchSize: TypeAlias = Literal["auto"] | int
ObjectiveName: TypeAlias = Literal["auto", "weights", "output", "loss"]


UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}
UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


def check_batch(batch: object) -> None:
    """Check a number of samples that run at a time.

    Raises
    ------
    UsageError
        If it is neither ``auto`` nor a whole number from 1 on.
    """
    if batch != "auto" and (not isinstance(batch, int) or isinstance(batch, bool) or batch < 1):
        raise UsageError(f"--batch {batch}: give auto, or a whole number from 1 on")


def memory_bytes(limit: int | str | None) -> int | None:
    """Bytes of a limit such as ``2GB``, ``1500MB`` or ``2000000000``.

    Raises
    ------
    UsageError
        If it is not one.

    Examples
    --------
    >>> memory_bytes("1.5GB"), memory_bytes("2 GiB"), memory_bytes(100)
    (1500000000, 2147483648, 100)
    """
    if limit is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(limit).strip().lower(), re.ASCII)
    size = int(float(found[1]) * UNITS.get(found[2], 0)) if found else 0
    if not size:
        raise UsageError(
            f"--memory-limit {limit}: is no number of bytes; write e.g. 2GB, 1500MB or 2000000000"
        )
    return size


@dataclass(frozen=True)
class Settings:
    """How to compress, apart from the budget; `cobla_onnx.compress` documents each field.

    ``call`` is how it was asked for, for the report.

    Raises
    ------
    UsageError
        If one needs another that is not given.
    """

    solver: Literal["slsqp", "milp"] = "slsqp"
    objective: ObjectiveName = "auto"
    input_shapes: Mapping[str, Sequence[int]] | None = None
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    min_size: int = 0
    scheme: Literal["auto", "spatial", "channel", "input"] = "auto"
    data: Any = None
    samples: int | None = None
    batch: BatchSize = "auto"
    memory_limit: int | str | None = None
    images: ImageOptions | None = None
    labels: Labels | str | os.PathLike[str] | None = None
    loss: LossName = "auto"
    outputs: Outputs = ()
    refit: bool = True
    time_limit: float | None = None
    rank_multiple: RankMultiple = "auto"
    provider: str | None = None
    profile: str | os.PathLike[str] | None = None
    measure_latency: bool = False
    seed: int = 0
    threads: int | None = None
    workers: int | None = None
    executor: Executor | None = None
    dask: str | None = None
    cache: str | os.PathLike[str] | None = None
    progress: Progress | None = None
    call: str | None = None

    def __post_init__(self) -> None:
        if self.labels is not None and self.data is None:
            raise UsageError("--labels: are those of the data; give --data too")
        if self.outputs and self.data is None:
            raise UsageError("--output: says how data is compared; give --data too")
        check_batch(self.batch)
        memory_bytes(self.memory_limit)
        if self.profile is not None and not self.measure_latency:
            raise UsageError("--profile: is of times; give --latency or --measure-latency too")

    @property
    def needed(self) -> Literal["weights", "output", "loss"]:
        """The objective, ``auto`` resolved.

        Raises
        ------
        UsageError
            If it needs data and there is none.
        """
        if self.objective in ("output", "loss") and self.data is None:
            raise UsageError(
                f"--objective {self.objective}: needs data; give --data, or --objective weights"
            )
        if self.objective == "auto":
            return "weights" if self.data is None else "output"
        return self.objective
