"""``cobla-onnx sweep IN --mem 0.3:0.9:7``: what each budget would cost in quality."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, Optional

import typer

from cobla_onnx.cli import parameters as options
from cobla_onnx.cli import parsing, terminal

__all__ = ["sweep"]


def sweep(
    input: options.Input,
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
        typer.Option(metavar="FOLDER", help="Write the models there."),
    ] = None,
    csv: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE.csv", help="Write the table as CSV."),
    ] = None,
    plot: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(metavar="FILE", help="Draw the points, as .svg or .png; repeatable."),
    ] = None,
    data: options.DataPath = None,
    samples: options.Samples = None,
    batch: options.Batch = "auto",
    memory_limit: options.MemoryLimit = None,
    mean: options.Mean = None,
    std: options.Std = None,
    scale: options.Scale = 1.0,
    channel_order: options.ChannelOrderOption = options.ChannelOrder.rgb,
    layout: options.LayoutOption = options.Layout.nchw,
    labels: options.LabelsFile = None,
    loss: options.LossOption = options.Loss.auto,
    outputs: options.OutputsOption = None,
    refit: options.Refit = True,
    solver: options.SolverOption = options.Solver.slsqp,
    objective: options.ObjectiveOption = options.Objective.auto,
    time_limit: options.TimeLimit = None,
    input_shape: options.InputShapes = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    min_size: options.MinSize = 0,
    scheme: options.SchemeOption = options.Scheme.auto,
    rank_multiple: options.RankMultiple = "auto",
    provider: options.Provider = None,
    profile: options.ProfileFile = None,
    measure_latency: options.MeasureLatency = False,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    workers: options.Workers = None,
    dask: options.Dask = None,
    cache: options.CacheFolder = None,
    external_data: options.ExternalDataOption = options.ExternalData.auto,
    json: options.Json = False,
    config: options.Config = None,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
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
    from cobla_onnx.allocation import Budget
    from cobla_onnx.pipeline.result import check_written
    from cobla_onnx.pipeline.sweep import sweep as run

    check_written([input], [("--csv", csv), *(("--plot", path) for path in plot or ())])
    combined = itertools.product(*(values or (None,) for values in grid))
    budgets = [Budget(mem=m, mac=c, latency=t) for m, c, t in combined]
    shapes = parsing.input_shapes(input_shape)
    images = parsing.image_options(mean, std, scale, channel_order, layout)
    with terminal.progress(quiet, verbose) as progress:
        found = run(
            input,
            budgets,
            out_dir=out_dir,
            external_data=external_data.value,
            solver=solver.value,
            objective=objective.value,
            input_shapes=shapes,
            include=include or (),
            exclude=exclude or (),
            min_size=min_size,
            scheme=scheme.value,
            data=data,
            samples=samples,
            batch=parsing.batch_size(batch),
            memory_limit=memory_limit,
            images=images,
            labels=labels,
            loss=loss.value,
            outputs=outputs or (),
            refit=refit,
            time_limit=time_limit,
            rank_multiple=parsing.rank_multiple(rank_multiple),
            provider=provider,
            profile=profile,
            measure_latency=measure_latency,
            seed=seed,
            threads=threads,
            workers=workers,
            dask=dask,
            cache=cache,
            progress=progress,
        )
    if csv is not None:
        found.save_csv(csv)
    for path in plot or ():
        found.save_plot(path)
    terminal.result(found, json=json, quiet=quiet)
