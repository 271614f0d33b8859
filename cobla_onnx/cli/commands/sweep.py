"""``cobla-onnx sweep IN --mem 0.3:0.9:7``: what each budget would cost in quality."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

from cobla_onnx.cli import parameters, parsing, terminal

__all__ = ["sweep"]


@parameters.takes_options("sweep")
def sweep(
    input: parameters.Input,
    mem: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="LOW:HIGH:N", help="Memory budgets; also 0.3,0.5,0.8."),
    ] = None,
    mac: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="LOW:HIGH:N", help="MAC budgets; with --mem all combinations."),
    ] = None,
    latency: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="LOW:HIGH:N", help="Budgets of time, measured here."),
    ] = None,
    out_dir: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            metavar="FOLDER", help="Write the models there, with front.csv and front.svg."
        ),
    ] = None,
    csv: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE.csv", help="Write the table as CSV."),
    ] = None,
    plot: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(metavar="FILE", help="Draw the points, as .svg or .png; repeatable."),
    ] = None,
    report: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            metavar="FILE.html", help="Write a page of the front; with --out-dir one of each model."
        ),
    ] = None,
    compare_with: Annotated[
        Optional[Literal["onnxruntime"]],  # noqa: UP045
        typer.Option(help="With --data: points of its quantisers, measured on the same samples."),
    ] = None,
    *,
    options: parameters.Given,
    external_data: parameters.ExternalData = "auto",
    shown: parameters.Shown,
    read: parameters.Read,
) -> None:
    """Compress to many budgets and show the Pareto front.

    The model is analysed once; every point is verified in onnxruntime. Loss and agreement
    are measured on samples of --data that are held back.
    """
    limits = (("--mem", mem), ("--mac", mac), ("--latency", latency))
    grid = [parsing.spread(option, text) for option, text in limits]
    for path in plot or ():
        from cobla_onnx.report.sweep_plot import check_plot

        check_plot(path)
    if report is not None:
        from cobla_onnx.report.sweep_page import check_page

        check_page(report)
    from cobla_onnx.allocation import Budget
    from cobla_onnx.pipeline.result import check_written
    from cobla_onnx.pipeline.sweep import sweep as run
    from cobla_onnx.pipeline.sweep import writable_folder

    if out_dir is not None:
        # Other files may go there, too.
        writable_folder(out_dir)
    plots = [("--plot", path) for path in plot or ()]
    written = [("--csv", csv), ("--report", report), ("--profile", options["profile"]), *plots]
    check_written(input, written, read)
    combined = itertools.product(*(values or (None,) for values in grid))
    budgets = [Budget(mem=m, mac=c, latency=t) for m, c, t in combined]
    with terminal.progress(shown.quiet, shown.verbose) as progress:
        found = run(
            input,
            budgets,
            out_dir=out_dir,
            compare_with=compare_with,
            external_data=external_data,
            **options,
            progress=progress,
        )
    with terminal.already_written("no models" if out_dir is None else f"models in {out_dir}"):
        if csv is not None:
            found.save_csv(csv)
        for path in plot or ():
            found.save_plot(path)
        if report is not None:
            found.save_report(report, sys.argv)
    terminal.result(found, json=shown.json, quiet=shown.quiet)
