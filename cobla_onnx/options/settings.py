"""The options of compression, each written once, as a field of `Settings`.

The command line, ``--config`` and the signatures of the Python API are derived from the fields;
tests hold the tables of the documentation against them.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from cobla_onnx.calibration.evaluation.output_choice import LossName, Outputs
from cobla_onnx.errors import UsageError
from cobla_onnx.options.checking import check_declared
from cobla_onnx.options.combined import check_combined
from cobla_onnx.options.declaring import Command, flag, option
from cobla_onnx.options.values import BatchSize, memory_bytes
from cobla_onnx.runtime.progress import Progress
from cobla_onnx.wording import option_name

if TYPE_CHECKING:
    from cobla_onnx.calibration.data.labels import Labels
    from cobla_onnx.calibration.data.readers import ImageOptions
    from cobla_onnx.distillation.passes import Passes
    from cobla_onnx.variants.low_rank.ranks import RankMultiple
    from cobla_onnx.variants.storage.precision import Precision
else:
    # The command line evaluates the annotations; importing these modules takes a second.
    Labels = ImageOptions = Any
    Passes = Literal["auto"] | int
    RankMultiple = Literal["auto"] | int
    Precision = Literal["keep", "auto"] | tuple[int, ...]

__all__ = [
    "ArithmeticName",
    "ImageFlags",
    "ObjectiveName",
    "Settings",
    "options_of",
]

ObjectiveName: TypeAlias = Literal["auto", "weights", "output", "loss"]
ArithmeticName: TypeAlias = Literal["keep", "int8", "auto"]

# From some thousands of threads on, onnxruntime does not return; and a rank that no layer has.
MOST_THREADS, MOST_RANK = 1024, 1_000_000
# Which commands have an option.
EVERY: tuple[Command, ...] = ("compress", "advise", "inspect", "sweep", "compare")
ANALYSE: tuple[Command, ...] = ("compress", "advise", "inspect", "sweep")
JUDGE: tuple[Command, ...] = ("compress", "advise", "sweep")
OUTPUTS: tuple[Command, ...] = ("compress", "advise", "sweep", "compare")
RUN: tuple[Command, ...] = ("compress", "sweep", "compare")
SEARCH: tuple[Command, ...] = ("compress", "sweep")


@dataclass(frozen=True)
class ImageFlags:
    """``images`` on the command line: a flag for each field of `ImageOptions`.

    None stands for its default.
    """

    mean: tuple[float, ...] | None = flag(
        None, "--mean", "Images: taken off each channel, after --scale.", "M[,M,M]"
    )
    std: tuple[float, ...] | None = flag(
        None, "--std", "Images: each channel is divided by it, last.", "S[,S,S]"
    )
    scale: float = flag(1.0, "--scale", "Images: pixels (0 to 255) are multiplied by it.", "F")
    channel_order: Literal["rgb", "bgr"] = flag(
        "rgb", "--channel-order", "Images: order of the model's channels."
    )
    layout: Literal["nchw", "nhwc"] = flag("nchw", "--layout", "Images: order of the model's axes.")


@dataclass(frozen=True)
class Settings:
    """How to compress, apart from the budget; `cobla_onnx.compress` documents each field.

    ``call`` is how it was asked for, for the report.

    Raises
    ------
    UsageError
        If a value is not one of those declared, or needs another that is not given.
    """

    solver: Literal["slsqp", "milp"] = option(
        SEARCH,
        "search",
        "slsqp",
        "--solver",
        "slsqp: relaxed masks, then rounding; milp: integer only.",
    )
    objective: ObjectiveName = option(
        SEARCH,
        "search",
        "auto",
        "--objective",
        "weights: no data needed; output: each layer measured with --data; loss: the "
        "network's loss by its gradient, slower.",
    )
    input_shapes: Mapping[str, Sequence[int]] | None = option(
        EVERY,
        "layers",
        None,
        "--input-shape",
        "Shape of an input with unknown axes.",
        "NAME:D,D",
    )
    include: Sequence[str] = option(
        ANALYSE, "layers", (), "--include", "Only layers that match, or of a file.", "GLOB|@FILE"
    )
    exclude: Sequence[str] = option(
        ANALYSE, "layers", (), "--exclude", "Leave layers that match, or of a file.", "GLOB|@FILE"
    )
    min_size: int = option(
        ANALYSE, "layers", 0, "--min-size", "Leave layers with fewer weights.", "N", minimum=0
    )
    deduplicate: bool = option(
        ANALYSE,
        "layers",
        True,
        "--deduplicate/--no-deduplicate",
        "Store once what the model stores more than once.",
    )
    scheme: Literal["auto", "spatial", "channel", "input"] = option(
        ANALYSE,
        "layers",
        "auto",
        "--scheme",
        "How convolutions are unfolded; auto chooses per layer.",
    )
    data: Any = option(
        EVERY,
        "data",
        None,
        "--data",
        "Unlabelled samples: .npz, .npy, a folder of images or of test_data_set_*.",
        "PATH",
    )
    samples: int | None = option(
        EVERY,
        "data",
        None,
        "--samples",
        "Use at most N samples.",
        "N",
        minimum=2,
    )
    batch: BatchSize = option(
        EVERY,
        "data",
        "auto",
        "--batch",
        "Samples that are run at a time; auto: as many as --memory-limit allows, 16 at most.",
        "auto|N",
        minimum=1,
    )
    memory_limit: int | str | None = option(
        EVERY,
        "data",
        None,
        "--memory-limit",
        "Memory to take at most, such as 1500MB; by default 2GB more than the model has.",
        "SIZE",
    )
    images: ImageOptions | None = option(EVERY, "data", None, parts=ImageFlags)
    labels: Labels | str | os.PathLike[str] | None = option(
        JUDGE,
        "data",
        None,
        "--labels",
        "Classes of the samples, .csv, .npy or .npz: the loss is the cross-entropy.",
        "FILE",
    )
    loss: LossName = option(
        JUDGE,
        "data",
        "auto",
        "--loss",
        "How outputs are compared with the original's.",
    )
    outputs: Outputs = option(
        OUTPUTS,
        "data",
        (),
        "--output",
        "How an output counts: classes, values or ignore; if some are named alone, only "
        "those count. Repeatable.",
        "NAME[=HOW][:AXIS]",
    )
    refit: bool = option(
        SEARCH,
        "data",
        True,
        "--refit/--no-refit",
        "With data: refit layers to changed inputs.",
    )
    distil: Passes | None = option(
        SEARCH,
        "data",
        None,
        "--distil",
        "With --data: what is stored learns from the original's outputs, N passes or as many as "
        "help.",
        "auto|N",
        minimum=1,
    )
    augment: str | None = option(
        SEARCH,
        "data",
        None,
        "--augment",
        "With --distil: images may be flipped left to right, and moved by N pixels.",
        "flip,crop:N",
    )
    time_limit: float | None = option(
        SEARCH,
        "search",
        None,
        "--time-limit",
        "Of the search of --objective loss, and of --distil.",
        "SECONDS",
        minimum=0,
    )
    precision: Precision = option(
        SEARCH,
        "search",
        "keep",
        "--precision",
        "Weights and factors in fewer bits, where that loses less: auto, or e.g. 8,4.",
        "keep|auto|LIST",
    )
    arithmetic: ArithmeticName = option(
        SEARCH,
        "speed",
        "keep",
        "--arithmetic",
        "int8: compute in 8 bits what can be, with --data; auto: where --latency gains by it.",
    )
    storage: Literal["auto", "cast", "qdq"] = option(
        SEARCH,
        "search",
        "auto",
        "--storage",
        "cast: fewer bits are decoded as the model opens; qdq: 8 bits by DequantizeLinear, for "
        "products in 8 bits; auto: cast, 4 bits as UINT4 from opset 21 on.",
    )
    rank_multiple: RankMultiple = option(
        SEARCH,
        "speed",
        "auto",
        "--rank-multiple",
        "Ranks are multiples of N; auto: as the CPU likes them, every rank with --mem alone.",
        "auto|N",
        minimum=1,
        maximum=MOST_RANK,
    )
    provider: str | None = option(
        RUN,
        "speed",
        None,
        "--provider",
        "onnxruntime's execution provider; the CPU's if none.",
        "NAME",
    )
    profile: str | os.PathLike[str] | None = option(
        SEARCH,
        "speed",
        None,
        "--profile",
        "Measured times: read if the file is there, and kept for the next run.",
        "FILE.json",
    )
    measure_latency: bool = option(
        SEARCH,
        "speed",
        False,
        "--measure-latency",
        "Time original and result; with --latency that is always done.",
    )
    seed: int = option(
        RUN,
        "run",
        0,
        "--seed",
        "For random inputs, and the order in which --distil takes the samples.",
        minimum=0,
    )
    threads: int | None = option(
        EVERY,
        "run",
        None,
        "--threads",
        "Threads; as many as there are cores.",
        "N",
        minimum=1,
        maximum=MOST_THREADS,
    )
    workers: int | None = option(
        SEARCH,
        "run",
        None,
        "--workers",
        "Processes that share the work, each one thread.",
        "N",
        minimum=1,
        maximum=MOST_THREADS,
    )
    executor: Executor | None = option(SEARCH, "run", None)
    dask: str | None = option(
        SEARCH,
        "run",
        None,
        "--dask",
        "Share the work over the dask cluster of a scheduler.",
        "ADDRESS",
    )
    cache: str | os.PathLike[str] | None = option(
        SEARCH,
        "run",
        None,
        "--cache",
        "Keep spectra, factors and what data told there: the next budget is quicker.",
        "DIR",
    )
    progress: Progress | None = option(EVERY, "run", None)
    call: str | None = None

    @classmethod
    def of(cls, command: Command, given: Mapping[str, Any], **more: Any) -> Settings:
        """Make settings from the keywords of an API function, and from what it adds itself.

        Raises
        ------
        TypeError
            If the function has no such option.
        """
        known = {field.name for field in options_of(command)}
        for name in given:
            if name not in known:
                raise TypeError(f"{command}() got an unexpected keyword argument {name!r}")
        return cls(**{**given, **more})

    def __post_init__(self) -> None:
        check_declared(type(self), vars(self))
        check_combined(self)
        memory_bytes(self.memory_limit)

    @property
    def resolved_objective(self) -> Literal["weights", "output", "loss"]:
        """The objective, ``auto`` resolved.

        Raises
        ------
        UsageError
            If it needs data and there is none.
        """
        if self.objective in ("output", "loss") and self.data is None:
            raise UsageError(
                f"{option_name('objective', self.objective)}: needs data; give "
                f"{option_name('data')}, or {option_name('objective', 'weights')}"
            )
        if self.objective == "auto":
            return "weights" if self.data is None else "output"
        return self.objective


def options_of(command: Command) -> list[dataclasses.Field[Any]]:
    """Return the fields of `Settings` that a command has, in the order of its signature."""
    return [
        field
        for field in dataclasses.fields(Settings)
        if "option" in field.metadata and command in field.metadata["option"].commands
    ]
