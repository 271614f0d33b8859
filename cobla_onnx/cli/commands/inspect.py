"""``cobla-onnx inspect IN``: what could be done."""

from __future__ import annotations

from cobla_onnx.cli import parameters as options
from cobla_onnx.cli import parsing, terminal

__all__ = ["inspect"]


def inspect(
    input: options.Input,
    data: options.DataPath = None,
    samples: options.Samples = None,
    batch: options.Batch = "auto",
    memory_limit: options.MemoryLimit = None,
    mean: options.Mean = None,
    std: options.Std = None,
    scale: options.Scale = 1.0,
    channel_order: options.ChannelOrderOption = options.ChannelOrder.rgb,
    layout: options.LayoutOption = options.Layout.nchw,
    input_shape: options.InputShapes = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    min_size: options.MinSize = 0,
    scheme: options.SchemeOption = options.Scheme.auto,
    threads: options.Threads = None,
    json: options.Json = False,
    config: options.Config = None,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    debug: options.Debug = False,
) -> None:
    """Show layers, costs, spectra and what is within reach.

    For each layer that can be factorised: the ranks that make it smaller, and how its
    singular values fall. For every other node with weights: why it is left alone.
    """
    from cobla_onnx.pipeline.inspect import inspect as run

    shapes = parsing.input_shapes(input_shape)
    images = parsing.image_options(mean, std, scale, channel_order, layout)
    with terminal.progress(quiet, verbose) as progress:
        found = run(
            input,
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
            threads=threads,
            progress=progress,
        )
    terminal.result(found, json=json, quiet=quiet)
