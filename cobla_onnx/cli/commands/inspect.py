"""``cobla-onnx inspect IN``: what could be done."""

from __future__ import annotations

from cobla_onnx.cli import parameters, terminal

__all__ = ["inspect"]


@parameters.takes_options("inspect")
def inspect(
    input: parameters.Input,
    options: parameters.Given,
    shown: parameters.Shown,
) -> None:
    """Show layers, costs, spectra and what is within reach.

    For each layer that can be compressed: the ranks that make it smaller, and how its
    singular values fall. For every other node with weights: why it is left alone.
    """
    from cobla_onnx.pipeline.inspect import inspect as run

    with terminal.progress(shown.quiet, shown.verbose) as progress:
        found = run(input, **options, progress=progress)
    terminal.result(found, json=shown.json, quiet=shown.quiet)
