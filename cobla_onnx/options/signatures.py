"""Signatures of the Python API, derived from the fields of `Settings`.

Functions take ``**options``; `takes_options` sets the signature that ``help()`` and the
documentation show, which lists them one by one. Type checkers do not run it, so the keywords
and their types are repeated here for them; a test compares both.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, cast

from cobla_onnx.options.declaring import Command
from cobla_onnx.options.settings import ArithmeticName, ObjectiveName, options_of
from cobla_onnx.options.values import BatchSize

if TYPE_CHECKING:
    from cobla_onnx.calibration.data.labels import Labels
    from cobla_onnx.calibration.data.readers import ImageOptions
    from cobla_onnx.calibration.evaluation.output_choice import LossName, Outputs
    from cobla_onnx.distillation.passes import Passes
    from cobla_onnx.runtime.progress import Progress
    from cobla_onnx.variants.low_rank.ranks import RankMultiple
    from cobla_onnx.variants.storage.precision import Precision

__all__ = ["AdviseOptions", "InspectOptions", "SearchOptions", "takes_options"]

Function = TypeVar("Function", bound=Callable[..., Any])


class InspectOptions(TypedDict, total=False):
    """Options of `inspect`, for type checkers: the types of the fields, which a test compares."""

    input_shapes: Mapping[str, Sequence[int]] | None
    include: Sequence[str]
    exclude: Sequence[str]
    min_size: int
    deduplicate: bool
    scheme: Literal["auto", "spatial", "channel", "input"]
    data: Any
    samples: int | None
    batch: BatchSize
    memory_limit: int | str | None
    images: ImageOptions | None
    threads: int | None
    progress: Progress | None


class AdviseOptions(InspectOptions, total=False):
    """Options of `advise`, for type checkers: those of `inspect`, and how outputs count."""

    labels: Labels | str | os.PathLike[str] | None
    loss: LossName
    outputs: Outputs


class SearchOptions(AdviseOptions, total=False):
    """Options of `compress` and `sweep`, for type checkers: those of `advise`, and more."""

    solver: Literal["slsqp", "milp"]
    objective: ObjectiveName
    refit: bool
    distil: Passes | None
    augment: str | None
    time_limit: float | None
    precision: Precision
    arithmetic: ArithmeticName
    storage: Literal["auto", "cast", "qdq"]
    rank_multiple: RankMultiple
    provider: str | None
    profile: str | os.PathLike[str] | None
    measure_latency: bool
    seed: int
    workers: int | None
    executor: Executor | None
    dask: str | None
    cache: str | os.PathLike[str] | None


def takes_options(command: Command, own_after: str | None = None) -> Callable[[Function], Function]:
    """Give a function that takes ``**options`` the signature that lists them.

    Parameters
    ----------
    own_after : str, optional
        The option after which its own keywords are listed; before all others if it is None.
    """

    def with_signature(function: Function) -> Function:
        signature = inspect.signature(function)
        own = list(signature.parameters.values())[:-1]
        plain = [p for p in own if p.kind is not inspect.Parameter.KEYWORD_ONLY]
        fields = options_of(command)
        listed = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=field.type,
            )
            for field in fields
        ]
        at = 0 if own_after is None else [field.name for field in fields].index(own_after) + 1
        parameters = [*plain, *listed[:at], *own[len(plain) :], *listed[at:]]
        cast(Any, function).__signature__ = signature.replace(parameters=parameters)
        return function

    return with_signature
