"""``cobla-onnx compare A B``: two models side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cobla_onnx.cli import parameters, terminal

__all__ = ["compare"]


@parameters.takes_options("compare")
def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="An ONNX model.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="One with the same inputs.")],
    options: parameters.Given,
    shown: parameters.Shown,
) -> None:
    """Compare outputs, size, MACs and latency of two models.

    Any two with the same inputs and outputs. Without --data inputs are random, which says
    little about real ones. Latency is that of one sample in onnxruntime on this machine,
    both models in turn.
    """
    from cobla_onnx.pipeline.compare import compare as run

    with terminal.progress(shown.quiet, shown.verbose) as progress:
        found = run(first, second, **options, progress=progress)
    terminal.result(found, json=shown.json, quiet=shown.quiet)
