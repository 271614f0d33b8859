"""``cobla-onnx inspect IN``: what could be done."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from cobla_onnx.cli import parameters, terminal
from cobla_onnx.errors import UsageError

__all__ = ["inspect"]


@parameters.takes_options("inspect")
def inspect(
    input: parameters.Input,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Also layers by loss per byte: ranks, bits.")
    ] = False,
    csv: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE.csv", help="Write those as CSV, for --exclude @FILE.csv."),
    ] = None,
    *,
    options: parameters.Given,
    shown: parameters.Shown,
    read: parameters.Read,
) -> None:
    """Show layers, costs, spectra and what is within reach.

    For each layer that can be compressed: the ranks that make it smaller, and how its
    singular values fall. For every other node with weights: why it is left alone.
    """
    from cobla_onnx.graph.io.model_file import write_atomically
    from cobla_onnx.pipeline.inspect import inspect as run
    from cobla_onnx.pipeline.result import check_written

    if csv is not None and not sensitivity:
        raise UsageError(f"--csv {csv}: is of the losses for each byte; give --sensitivity too")
    check_written(input, [("--csv", csv)], read)
    with terminal.progress(shown.quiet, shown.verbose) as progress:
        found = run(input, sensitivity=sensitivity, **options, progress=progress)
    if csv is not None and found.sensitivity is not None:
        write_atomically(csv, found.sensitivity.to_csv().encode())
    terminal.result(found, json=shown.json, quiet=shown.quiet)
