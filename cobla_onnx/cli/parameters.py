"""The options that commands share, each declared once.

A command annotates its parameter with the option, ``data: options.Data = None``. Options of
one command alone are declared there.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

import typer

from cobla_onnx import __version__
from cobla_onnx.cli.config import read_config


class Solver(str, Enum):
    """Choices of --solver."""

    slsqp = "slsqp"
    milp = "milp"


class Objective(str, Enum):
    """Choices of --objective."""

    auto = "auto"
    weights = "weights"
    output = "output"
    loss = "loss"


class Loss(str, Enum):
    """Choices of --loss."""

    auto = "auto"
    kl = "kl"
    mse = "mse"
    ce = "ce"


class ChannelOrder(str, Enum):
    """Choices of --channel-order."""

    rgb = "rgb"
    bgr = "bgr"


class ExternalData(str, Enum):
    """Choices of --external-data."""

    auto = "auto"
    always = "always"
    never = "never"


class Layout(str, Enum):
    """Choices of --layout."""

    nchw = "nchw"
    nhwc = "nhwc"


class Scheme(str, Enum):
    """Choices of --scheme."""

    auto = "auto"
    spatial = "spatial"
    channel = "channel"
    input = "input"


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cobla-onnx {__version__}")
        raise typer.Exit


Input = Annotated[Path, typer.Argument(metavar="IN", help="The ONNX model.")]

# Calibration data.
DataPath = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--data",
        metavar="PATH",
        help="Unlabelled samples: .npz, .npy, a folder of images or of test_data_set_*.",
    ),
]
Samples = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--samples", metavar="N", help="Use at most N samples.", min=2),
]
Batch = Annotated[
    str,
    typer.Option(
        "--batch",
        metavar="auto|N",
        help="Samples that are run at a time; auto: as many as --memory-limit allows, 16 at most.",
    ),
]
MemoryLimit = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--memory-limit",
        metavar="SIZE",
        help="Memory to take at most, such as 1500MB; by default 2GB more than the model has.",
        show_default=False,
    ),
]
Mean = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--mean", metavar="M[,M,M]", help="Images: taken off each channel, after --scale."
    ),
]
Std = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--std", metavar="S[,S,S]", help="Images: each channel is divided by it, last."),
]
Scale = Annotated[
    float,
    typer.Option("--scale", metavar="F", help="Images: pixels (0 to 255) are multiplied by it."),
]
ChannelOrderOption = Annotated[
    ChannelOrder, typer.Option("--channel-order", help="Images: order of the model's channels.")
]
LayoutOption = Annotated[
    Layout, typer.Option("--layout", help="Images: order of the model's axes.")
]
LabelsFile = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--labels",
        metavar="FILE",
        help="Classes of the samples, .csv, .npy or .npz: the loss is the cross-entropy.",
    ),
]
LossOption = Annotated[
    Loss, typer.Option("--loss", help="How outputs are compared with the original's.")
]
OutputsOption = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--output",
        metavar="NAME[=HOW][:AXIS]",
        help="How an output counts: classes, values or ignore; if some are named alone, only "
        "those count. Repeatable.",
    ),
]

# Which layers, and how.
InputShapes = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--input-shape", metavar="NAME:D,D", help="Shape of an input with unknown axes."),
]
Include = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--include", metavar="GLOB", help="Only layers of this name, or that match."),
]
Exclude = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--exclude", metavar="GLOB", help="Leave layers of this name, or that match."),
]
MinSize = Annotated[
    int,
    typer.Option("--min-size", metavar="N", help="Leave layers with fewer weights.", min=0),
]
SchemeOption = Annotated[
    Scheme,
    typer.Option("--scheme", help="How convolutions are unfolded; auto chooses per layer."),
]

# How ranks and factors are found.
ObjectiveOption = Annotated[
    Objective,
    typer.Option(
        "--objective",
        help="weights: no data needed; output: each layer measured with --data; loss: the "
        "network's loss by its gradient, slower.",
    ),
]
SolverOption = Annotated[
    Solver,
    typer.Option("--solver", help="slsqp: relaxed masks, then rounding; milp: integer only."),
]
TimeLimit = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(
        "--time-limit", metavar="SECONDS", help="With --objective loss: of its search.", min=0
    ),
]
Refit = Annotated[
    bool,
    typer.Option("--refit/--no-refit", help="With data: refit factors to changed inputs."),
]

# Speed.
RankMultiple = Annotated[
    str,
    typer.Option(
        "--rank-multiple",
        metavar="auto|N",
        help="Ranks are multiples of N; auto: as the CPU likes them, every rank with --mem alone.",
    ),
]
Provider = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--provider", metavar="NAME", help="onnxruntime's execution provider; the CPU's if none."
    ),
]
ProfileFile = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--profile",
        metavar="FILE.json",
        help="Measured times: read if the file is there, and kept for the next run.",
    ),
]
MeasureLatency = Annotated[
    bool,
    typer.Option(
        "--measure-latency", help="Time original and result; with --latency that is always done."
    ),
]

# The run.
Seed = Annotated[
    int, typer.Option("--seed", help="For the random inputs of the verification.", min=0)
]
Threads = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--threads", metavar="N", help="Threads; as many as there are cores.", min=1),
]
Workers = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        "--workers", metavar="N", help="Processes that share the work, each one thread.", min=1
    ),
]
Dask = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--dask", metavar="ADDRESS", help="Share the work over the dask cluster of a scheduler."
    ),
]
CacheFolder = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--cache",
        metavar="DIR",
        help="Keep spectra, factors and what data told there: the next budget is quicker.",
    ),
]
ExternalDataOption = Annotated[
    ExternalData,
    typer.Option(
        "--external-data",
        help="Weights in a file beside OUT; auto: as they were, or if over 2 GB.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for scripts.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Print each stage with its time to stderr.")
]
Config = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--config",
        metavar="FILE.toml",
        callback=read_config,
        is_eager=True,
        help="Options from a file; those on the command line win.",
    ),
]
Debug = Annotated[bool, typer.Option("--debug", hidden=True)]
Version = Annotated[
    bool,
    typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
]
