"""The command line: parse options, call the API, show the report. No logic."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from cobla_onnx import __version__
from cobla_onnx.errors import CoblaError, UsageError
from cobla_onnx.names import safe_text

if TYPE_CHECKING:
    from cobla_onnx.progress import Progress

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


class Solver(str, Enum):
    """Choices of --solver."""

    slsqp = "slsqp"
    milp = "milp"


class ObjectiveName(str, Enum):
    """Choices of --objective."""

    auto = "auto"
    weights = "weights"
    output = "output"
    loss = "loss"


class LossName(str, Enum):
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


class SchemeName(str, Enum):
    """Choices of --scheme."""

    auto = "auto"
    spatial = "spatial"
    channel = "channel"
    input = "input"


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cobla-onnx {__version__}")
        raise typer.Exit


def _input_shapes(entries: list[str]) -> dict[str, tuple[int, ...]]:
    """Parse ``name:1,3,224,224``; the name itself may hold colons."""
    shapes = {}
    for entry in entries:
        name, colon, sizes = entry.rpartition(":")
        parts = sizes.split(",")
        if not colon or not name or not all(p.isdecimal() and int(p) > 0 for p in parts):
            raise UsageError(
                f"--input-shape {entry}: is not NAME:SIZE,SIZE,...; write e.g. image:1,3,224,224"
            )
        shapes[name] = tuple(int(part) for part in parts)
    return shapes


def _image_options(
    mean: str | None, std: str | None, scale: float, order: ChannelOrder, layout: Layout
) -> Any:
    from cobla_onnx.calibration.readers import ImageOptions

    return ImageOptions(
        mean=_numbers("--mean", mean, 0.0),
        std=_numbers("--std", std, 1.0),
        scale=scale,
        channel_order=order.value,
        layout=layout.value,
    )


def _numbers(option: str, text: str | None, default: float) -> tuple[float, ...]:
    if text is None:
        return (default,)
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(
            f"{option} {text}: is not a number, or one for each channel separated by commas; "
            f"write e.g. {option} 104,117,123"
        ) from error


@app.command()
def compress(
    input: Annotated[Path, typer.Argument(metavar="IN", help="The ONNX model to compress.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Where to write the result.")],
    mem: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(metavar="F", help="Keep at most this fraction of the weights' bytes."),
    ] = None,
    mac: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(metavar="F", help="Keep at most this fraction of the MACs."),
    ] = None,
    data: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            metavar="PATH",
            help="Unlabelled samples: .npz, .npy, a folder of images or of test_data_set_*.",
        ),
    ] = None,
    samples: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(metavar="N", help="Use at most N samples.", min=2),
    ] = None,
    batch: Annotated[
        int, typer.Option(metavar="N", help="Samples that are run at a time.", min=1)
    ] = 16,
    mean: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="M[,M,M]", help="Images: taken off each channel, after --scale."),
    ] = None,
    std: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="S[,S,S]", help="Images: each channel is divided by it, last."),
    ] = None,
    scale: Annotated[
        float, typer.Option(metavar="F", help="Images: pixels (0 to 255) are multiplied by it.")
    ] = 1.0,
    channel_order: Annotated[
        ChannelOrder, typer.Option(help="Images: order of the model's channels.")
    ] = ChannelOrder.rgb,
    layout: Annotated[
        Layout, typer.Option(help="Images: order of the model's axes.")
    ] = Layout.nchw,
    labels: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            metavar="FILE",
            help="Classes of the samples, .csv, .npy or .npz: the loss is the cross-entropy.",
        ),
    ] = None,
    loss: Annotated[
        LossName, typer.Option(help="How outputs are compared with the original's.")
    ] = LossName.auto,
    refit: Annotated[
        bool,
        typer.Option("--refit/--no-refit", help="With data: refit factors to changed inputs."),
    ] = True,
    solver: Annotated[
        Solver, typer.Option(help="slsqp: relaxed masks, then rounding; milp: integer only.")
    ] = Solver.slsqp,
    objective: Annotated[
        ObjectiveName,
        typer.Option(
            help="weights: no data needed; output: each layer measured with --data; loss: the "
            "network's loss by its gradient, slower."
        ),
    ] = ObjectiveName.auto,
    time_limit: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(metavar="SECONDS", help="With --objective loss: of its search.", min=0),
    ] = None,
    input_shape: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(metavar="NAME:D,D", help="Shape of an input with unknown axes."),
    ] = None,
    include: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(metavar="GLOB", help="Only layers whose name matches."),
    ] = None,
    exclude: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(metavar="GLOB", help="Leave layers whose name matches."),
    ] = None,
    min_size: Annotated[
        int, typer.Option(metavar="N", help="Leave layers with fewer weights.", min=0)
    ] = 0,
    scheme: Annotated[
        SchemeName, typer.Option(help="How convolutions are unfolded; auto chooses per layer.")
    ] = SchemeName.auto,
    seed: Annotated[
        int, typer.Option(help="For the random inputs of the verification.", min=0)
    ] = 0,
    threads: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(metavar="N", help="Threads; as many as there are cores.", min=1),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Do everything but write the model.")
    ] = False,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Allow OUT to be the same file as IN.")
    ] = False,
    external_data: Annotated[
        ExternalData,
        typer.Option(help="Weights in a file beside OUT; auto: as they were, or if over 2 GB."),
    ] = ExternalData.auto,
    report: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="Write the report, as .html, .md or .json."),
    ] = None,
    history: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE.csv", help="Write the steps of --objective loss as CSV."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    debug: Annotated[bool, typer.Option("--debug", hidden=True)] = False,
    version: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = None,
) -> None:
    """Write a smaller, low-rank ONNX model that was verified in onnxruntime.

    At least one of --mem and --mac is needed; both are hard limits.
    """
    from cobla_onnx.compression import compress as run
    from cobla_onnx.result import check_paths

    shapes = _input_shapes(input_shape or [])
    check_paths(input, output, report, history, in_place=in_place)
    from cobla_onnx.allocation import Budget

    budget = Budget(mem=mem, mac=mac)
    images = _image_options(mean, std, scale, channel_order, layout)
    with _progress(quiet) as progress:
        result = run(
            input,
            budget,
            solver=solver.value,
            objective=objective.value,
            input_shapes=shapes,
            include=include or (),
            exclude=exclude or (),
            min_size=min_size,
            scheme=scheme.value,
            data=data,
            samples=samples,
            batch=batch,
            images=images,
            labels=labels,
            loss=loss.value,
            refit=refit,
            time_limit=time_limit,
            seed=seed,
            threads=threads,
            progress=progress,
        )
    if not dry_run:
        result.save(output, external_data=external_data.value)
    if report is not None:
        result.save_report(report, sys.argv)
    if history is not None:
        result.save_history(history)
    if not quiet:
        _print(result.report)
        typer.echo("dry run: nothing was written" if dry_run else f"written: {output}")


@contextmanager
def _progress(quiet: bool) -> Iterator[Progress | None]:
    """Show a bar on stderr while a stage runs, if somebody watches."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def advance(stage: str, done: int, total: int) -> None:
            name = stage.partition(":")[0]
            if name not in tasks:
                tasks[name] = bar.add_task(stage, total=total)
            bar.update(tasks[name], description=stage, completed=done, total=total)

        yield advance


def _print(report: Any) -> None:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        # A pipe has no width: wide enough that no column is cut.
        console = Console(width=160)
    console.print(report)


def main() -> None:
    """Run the command line; turn errors into one line and an exit code."""
    try:
        app(standalone_mode=True)
    except CoblaError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted; nothing was written", 130)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        _fail(
            f"a bug in cobla-onnx {__version__}: {type(error).__name__}: {error}; "
            "run again with --debug and report the traceback",
            1,
        )


def _fail(message: str, code: int) -> None:
    sys.stderr.write(f"error: {safe_text(message, 2000)}\n")
    sys.exit(code)
