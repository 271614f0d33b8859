"""Start a study: open the model and the samples, analyse, time the layers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import onnx

from cobla_onnx.allocation.grid import rank_rule
from cobla_onnx.analysis import analyse
from cobla_onnx.cache import Cache, digest
from cobla_onnx.calibrated import Calibrated
from cobla_onnx.calibration.batching import Batching, choose_batching
from cobla_onnx.calibration.dataset import Dataset
from cobla_onnx.calibration.loss import LossName
from cobla_onnx.calibration.moments import LIMIT
from cobla_onnx.calibration.seen import Seen
from cobla_onnx.graph.content import model_content
from cobla_onnx.graph.layers import Layer, find_layers
from cobla_onnx.latency.timing import Stopwatch
from cobla_onnx.machine import convolution_block
from cobla_onnx.opening import (
    ModelSource,
    available_cores,
    naming,
    open_model,
    open_samples,
    sample_labels,
)
from cobla_onnx.parallel import Pool, choose_pool, one_thread
from cobla_onnx.progress import Progress
from cobla_onnx.runtime import CPU, execution_provider
from cobla_onnx.settings import Settings, memory_bytes
from cobla_onnx.study import Study
from cobla_onnx.timed import Timed, open_profile

__all__ = ["open_study"]


@contextmanager
def open_study(
    model: ModelSource,
    settings: Settings,
    *,
    macs_needed: bool = False,
    times_needed: bool = False,
) -> Iterator[Study]:
    """Load a model and analyse it; the study holds as long as the context.

    Parameters
    ----------
    model : ModelProto or path
        It is not changed.
    settings : Settings
    macs_needed : bool
        Whether there is a budget of MACs: it is an error if they are not known, and ranks
        follow the grid for all budgets.
    times_needed : bool
        Whether there is a budget of time: layers are timed, and those left whole that would
        not be faster. The settings must measure latency then.

    Raises
    ------
    UsageError, ModelError, DataError
        See `cobla_onnx.errors`.
    """
    started = time.perf_counter()
    source = None if isinstance(model, onnx.ModelProto) else Path(model)
    notify = settings.progress or (lambda stage, done, total: None)
    notify("open model and data", 0, 1)
    proto = open_model(model)
    threads = settings.threads or available_cores()
    needed = settings.needed
    kept = None if settings.cache is None else Cache(settings.cache)
    with (
        naming(source),
        one_thread,
        choose_pool(threads, settings.workers, settings.executor, settings.dask) as pool,
        execution_provider(settings.provider) as provider,
        open_samples(proto, settings) as dataset,
    ):
        notify("open model and data", 1, 1)
        profile = open_profile(settings.profile, threads) if settings.measure_latency else None
        rule = rank_rule(
            settings.rank_multiple,
            mac=macs_needed,
            latency=times_needed,
            block=convolution_block(),
            cpu=provider == CPU,
        )
        batching = None
        if dataset is not None:
            notify("size of a run", 0, 1)
            batching = _batching(proto, dataset, settings, threads)
            notify("size of a run", 1, 1)
            pool.runs = batching.at_once
        analysis = analyse(
            proto,
            input_shapes=settings.input_shapes,
            include=settings.include,
            exclude=settings.exclude,
            min_size=settings.min_size,
            scheme=settings.scheme,
            macs_needed=macs_needed or times_needed,
            threads=threads,
            progress=notify,
            see=None
            if dataset is None or batching is None
            else _see(proto, dataset, batching, pool, kept, notify),
            weigh=needed != "weights",
            ranks=rule,
            pool=pool,
            cache=kept,
        )
        if batching is not None:
            analysis = replace(analysis, notes=analysis.notes + batching.notes)
        timed = None
        if profile is not None:
            timed = Timed(
                proto,
                analysis,
                profile,
                settings.profile,
                settings.seed,
                notify,
                Stopwatch(threads),
            )
            if times_needed:
                analysis = timed.table()
        calibrated = None
        if dataset is not None and batching is not None:
            classes = sample_labels(settings.labels, dataset)
            measure: LossName = settings.loss if classes is None else "ce"
            notify("outputs of the original", 0, 1)
            calibrated = Calibrated(
                proto,
                analysis,
                dataset,
                batching.size,
                measure,
                threads,
                notify,
                classes,
                settings.refit,
                pool,
                kept,
            )
            notify("outputs of the original", 1, 1)
        seconds = time.perf_counter() - started
        try:
            yield Study(
                proto,
                source,
                analysis,
                calibrated,
                settings,
                threads,
                pool,
                kept,
                seconds,
                notify,
                rule,
                timed,
            )
        finally:
            if analysis.seen is not None:
                analysis.seen.close()


def _batching(
    model: onnx.ModelProto, dataset: Dataset, settings: Settings, threads: int
) -> Batching:
    return choose_batching(
        model,
        find_layers(model).layers,
        dataset,
        settings.batch,
        memory_bytes(settings.memory_limit),
        threads=threads,
        gradient=settings.needed == "loss",
    )


def _see(
    model: onnx.ModelProto,
    dataset: Dataset,
    batching: Batching,
    pool: Pool,
    cache: Cache | None,
    progress: Progress,
) -> Callable[[Sequence[Layer]], Seen]:
    key = ""
    if cache is not None:
        key = digest(model_content(model), dataset.content(dataset.calibration), batching.size)

    def see(layers: Sequence[Layer]) -> Seen:
        return Seen(
            model,
            layers,
            lambda: dataset.batches(dataset.calibration, batching.size),
            pool=pool,
            cache=cache,
            key=key,
            progress=partial(progress, "second moments"),
            limit=min(LIMIT, batching.sums),
        )

    return see
