"""``cobla-onnx advise IN``: what is worth running."""

from __future__ import annotations

from cobla_onnx.cli import parameters, terminal

__all__ = ["advise"]


@parameters.takes_options("advise")
def advise(
    input: parameters.Input,
    options: parameters.Given,
    shown: parameters.Shown,
) -> None:
    """Predict what each lever loses at a handful of budgets.

    Ranks, fewer bits, and both, for memory and MACs; then the commands that are worth
    running. Nothing is searched for and nothing is written.
    """
    from cobla_onnx.pipeline.advise import advise as run

    with terminal.progress(shown.quiet, shown.verbose) as progress:
        found = run(input, **options, progress=progress)
    terminal.result(found, json=shown.json, quiet=shown.quiet, last=found.commands())
