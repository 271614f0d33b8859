"""``cobla-onnx [compress] IN OUT``: the main job."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Optional

import typer

from cobla_onnx.cli import parameters, parsing, terminal

__all__ = ["compress"]


@dataclass(frozen=True)
class Limits:
    """Budgets, or what may be lost."""

    mem: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(metavar="F", help="Keep at most this fraction of the weights' bytes."),
    ] = None
    mac: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(metavar="F", help="Keep at most this fraction of the MACs."),
    ] = None
    latency: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(metavar="F", help="Take at most this fraction of the time, measured here."),
    ] = None
    max_drop: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="P%",
            help="With --data: the smallest model that loses at most this fraction of agreement, "
            "of accuracy with --labels, or relative error.",
        ),
    ] = None


@dataclass(frozen=True)
class Files:
    """Which files are written, and how; and the plan that is read."""

    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Do everything but write the model.")
    ] = False
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Allow OUT to be the same file as IN.")
    ] = False
    external_data: parameters.ExternalData = "auto"
    report: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="Write the report, as .html, .md or .json."),
    ] = None
    history: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            metavar="FILE.csv", help="Write steps of --objective loss, passes of --distil."
        ),
    ] = None
    plan_out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE.json", help="Write what becomes of each layer, to be edited."),
    ] = None
    plan_in: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE.json", help="Apply such a plan; limits that are set hold."),
    ] = None


@parameters.takes_options("compress")
def compress(
    input: Annotated[Path, typer.Argument(metavar="IN", help="The ONNX model to compress.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Where to write the result.")],
    limits: Limits,
    options: parameters.Given,
    files: Files,
    shown: parameters.Shown,
    read: parameters.Read,
) -> None:
    """Write a smaller ONNX model that was verified in onnxruntime.

    At least one of --mem, --mac, --latency, --max-drop and --plan-in is needed; limits are
    hard.
    """
    from cobla_onnx.pipeline.compress import compress as run
    from cobla_onnx.pipeline.result import check_paths
    from cobla_onnx.report.files import report_writer

    if files.report is not None:
        report_writer(files.report)
    written = [
        ("--report", files.report),
        ("--history", files.history),
        ("--plan-out", files.plan_out),
        ("--profile", options["profile"]),
    ]
    check_paths(input, output, written, read, in_place=files.in_place)
    from cobla_onnx.allocation import Budget
    from cobla_onnx.plan import Plan

    plan = None if files.plan_in is None else Plan.read(files.plan_in)
    fractions = {"mem": limits.mem, "mac": limits.mac, "latency": limits.latency}
    limited = any(fraction is not None for fraction in fractions.values())
    with terminal.progress(shown.quiet, shown.verbose) as progress:
        result = run(
            input,
            Budget(**fractions) if limited else None,
            **options,
            max_drop=parsing.fraction("--max-drop", limits.max_drop),
            plan=plan,
            progress=progress,
        )
        if not files.dry_run:
            if progress is not None:
                progress("write", 0, 1)
            result.save(output, external_data=files.external_data)
            if progress is not None:
                progress("write", 1, 1)
    with terminal.already_written("nothing" if files.dry_run else str(output)):
        if files.report is not None:
            result.save_report(files.report, sys.argv)
        if files.history is not None:
            result.save_history(files.history)
        if files.plan_out is not None:
            result.plan.save(files.plan_out)
    last = "dry run: nothing was written" if files.dry_run else f"written: {output}"
    terminal.result(result.report, json=shown.json, quiet=shown.quiet, last=last)
