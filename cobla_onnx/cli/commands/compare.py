"""``cobla-onnx compare A B``: two models side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cobla_onnx.cli import parameters as options
from cobla_onnx.cli import parsing, terminal

__all__ = ["compare"]


def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="An ONNX model.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="One with the same inputs.")],
    data: options.DataPath = None,
    samples: options.Samples = None,
    batch: options.Batch = "auto",
    memory_limit: options.MemoryLimit = None,
    mean: options.Mean = None,
    std: options.Std = None,
    scale: options.Scale = 1.0,
    channel_order: options.ChannelOrderOption = options.ChannelOrder.rgb,
    layout: options.LayoutOption = options.Layout.nchw,
    outputs: options.OutputsOption = None,
    input_shape: options.InputShapes = None,
    provider: options.Provider = None,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    json: options.Json = False,
    config: options.Config = None,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> None:
    """Compare outputs, size, MACs and latency of two models.

    Any two with the same inputs and outputs. Without --data inputs are random, which says
    little about real ones. Latency is that of one sample in onnxruntime on this machine,
    both models in turn.
    """
    from cobla_onnx.pipeline.compare import compare as run

    shapes = parsing.input_shapes(input_shape)
    images = parsing.image_options(mean, std, scale, channel_order, layout)
    with terminal.progress(quiet, verbose) as progress:
        found = run(
            first,
            second,
            input_shapes=shapes,
            data=data,
            samples=samples,
            batch=parsing.batch_size(batch),
            memory_limit=memory_limit,
            images=images,
            outputs=outputs or (),
            provider=provider,
            seed=seed,
            threads=threads,
            progress=progress,
        )
    terminal.result(found, json=json, quiet=quiet)
