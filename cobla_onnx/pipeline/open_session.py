"""Open a session: read the model and the samples, analyse the model, time its layers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.allocation import Budget
from cobla_onnx.calibration.batching import Batching, choose_batching
from cobla_onnx.calibration.data.dataset import Dataset
from cobla_onnx.calibration.data.evidence import lack_of_evidence
from cobla_onnx.calibration.data.labels import labels_of_batches
from cobla_onnx.calibration.evaluation.choosing import Chooser, Compared, look_at
from cobla_onnx.calibration.evaluation.measured_model import MeasuredModel, measured_model
from cobla_onnx.calibration.evaluation.output_choice import resolve_outputs
from cobla_onnx.calibration.evaluation.probe import Probe
from cobla_onnx.calibration.heads import importances
from cobla_onnx.calibration.moments import ALL_UNITS, LIMIT
from cobla_onnx.calibration.statistics import Seen
from cobla_onnx.graph.io.digest import model_content
from cobla_onnx.graph.layers import Layer, find_layers
from cobla_onnx.latency.timing import Stopwatch
from cobla_onnx.options import Settings, memory_bytes
from cobla_onnx.pipeline.analysis import Reach, analyse
from cobla_onnx.pipeline.budget_errors import explain
from cobla_onnx.pipeline.calibrated import Calibrated
from cobla_onnx.pipeline.inputs import (
    ModelSource,
    available_cores,
    known_shapes,
    naming,
    open_in_order,
    open_samples,
    sample_labels,
)
from cobla_onnx.pipeline.select import Selection
from cobla_onnx.pipeline.session import Study
from cobla_onnx.pipeline.timed import Timed, open_profile
from cobla_onnx.runtime.cache import Cache, digest
from cobla_onnx.runtime.context import RunContext
from cobla_onnx.runtime.machine import convolution_block
from cobla_onnx.runtime.pool import Pool, choose_pool, one_thread
from cobla_onnx.runtime.progress import Progress
from cobla_onnx.runtime.providers import CPU, execution_provider, give_memory_back
from cobla_onnx.variants.base import Asked
from cobla_onnx.variants.low_rank.ranks import EVERY_RANK, rank_rule

__all__ = ["open_study"]

# Number of samples that show the shapes and types of the outputs.
EXAMPLES = 6


@contextmanager
def open_study(
    model: ModelSource,
    settings: Settings,
    *,
    macs_needed: bool = False,
    times_needed: bool = False,
    budgets: Sequence[Budget] = (),
) -> Iterator[Study]:
    """Load a model and analyse it; the study is valid within the context.

    Parameters
    ----------
    model : ModelProto or path
        It is not changed.
    settings : Settings
    macs_needed : bool
        Whether there is a MAC budget: it is an error if MACs are not known, and ranks follow
        the grid for all budgets.
    times_needed : bool
        Whether there is a latency budget: layers are timed, and those that would not be faster
        stay whole. The settings must then measure latency.
    budgets : sequence of Budget
        The budgets that will be asked for, if known. If none can be met, the error is raised
        before anything is run on data; if some need ranks off the grid, they are added.

    Raises
    ------
    UsageError, ModelError, DataError, BudgetError
        See `cobla_onnx.errors`.
    """
    started = time.perf_counter()
    source = None if isinstance(model, onnx.ModelProto) else Path(model)
    notify = settings.progress or (lambda stage, done, total: None)
    notify("open model and data", 0, 1)
    proto, order = open_in_order(model)
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
        shapes, notes = known_shapes(settings, dataset)
        refine = settings.rank_multiple == "auto"
        measured, looking, classes = None, None, None
        if dataset is not None:
            classes = sample_labels(settings.labels, dataset)
            choices = resolve_outputs(settings.outputs, [o.name for o in proto.graph.output])
            ignored = frozenset(name for name, choice in choices.items() if choice.how == "ignore")
            notify("where the loss is taken", 0, 1)
            measured = _measured(proto, dataset, threads, ignored)
            notify("where the loss is taken", 1, 1)
            chooser = Chooser.of(
                measured.model,
                settings.loss,
                choices=choices,
                labelled=classes is not None,
                shown=measured.outputs,
            )
            looking = _Looking(
                proto, measured, dataset, settings, threads, chooser, pool, kept, notify, classes
            )
        analysis = analyse(
            proto,
            Selection(settings.include, settings.exclude, settings.min_size),
            Asked(settings.scheme, rule),
            context=RunContext(threads, pool, kept, notify),
            input_shapes=shapes,
            macs_needed=macs_needed or times_needed,
            see=looking,
            weigh=needed != "weights",
            reach=Reach(
                budgets,
                refine,
                # All ranks were tried then.
                lambda error, found: explain(
                    error, proto, found, settings, EVERY_RANK if refine else rule
                ),
            ),
            unmeasured=() if measured is None or needed == "weights" else measured.unmeasured,
        )
        if dataset is not None and looking is not None:
            told = (
                *notes,
                *dataset.notes,
                *looking.batching.notes,
                *lack_of_evidence(dataset),
                *looking.compared.notes,
            )
            analysis = replace(analysis, notes=(*analysis.notes, *told))
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
        if dataset is not None and looking is not None:
            notify("outputs of the original", 0, 1)
            calibrated = Calibrated(
                proto,
                analysis,
                dataset,
                looking.batching.size,
                settings.loss,
                threads,
                notify,
                classes,
                settings.refit,
                pool,
                kept,
                measured,
                looking.compared,
                looking.batching.taps,
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
                order,
            )
        finally:
            if analysis.seen is not None:
                analysis.seen.close()


def _measured(
    model: onnx.ModelProto, dataset: Dataset, threads: int, ignored: frozenset[str]
) -> MeasuredModel:
    """Choose where the loss is taken, from the graph and a few samples."""
    examples = list(dataset.batches(dataset.calibration[:EXAMPLES], 1))
    layers = find_layers(model).layers
    return measured_model(model, layers, examples, ignored=ignored, threads=threads)


@dataclass
class _Looking:
    """Runs the original: what samples need, what its outputs are like, then what layers read.

    It is called after the costs alone have shown that a budget can be met, since all three run
    the model on data.

    Attributes
    ----------
    batching : Batching
        How samples are batched; set by the call.
    compared : Compared
        How outputs are compared; set by the call.
    """

    model: onnx.ModelProto
    measured: MeasuredModel
    dataset: Dataset
    settings: Settings
    threads: int
    chooser: Chooser
    pool: Pool
    cache: Cache | None
    progress: Progress
    labels: NDArray[np.int64] | None
    batching: Batching = field(init=False)
    compared: Compared = field(init=False)

    def __call__(self, layers: Sequence[Layer]) -> Seen:
        self.progress("size of a run", 0, 1)
        self.batching = choose_batching(
            self.model,
            self.measured.model,
            layers,
            self.dataset,
            self.settings.batch,
            memory_bytes(self.settings.memory_limit),
            threads=self.threads,
            gradient=self.settings.needed == "loss",
        )
        self.progress("size of a run", 1, 1)
        self.pool.runs = self.batching.at_once
        give_memory_back(self.batching.gives_back)
        batch = self.batching.size
        self.compared = look_at(
            self.measured.model,
            self.dataset,
            batch,
            self.threads,
            self.chooser,
            partial(self.progress, "survey"),
        )
        if self.labels is not None:
            self._refuse_unfit(self.labels, batch)
        # Samples may have been left out: both belong to the remaining ones.
        samples = self.dataset.calibration
        key = ""
        if self.cache is not None:
            key = digest(model_content(self.model), self.dataset.content(samples), batch)
        return Seen(
            self.model,
            layers,
            lambda: self.dataset.batches(samples, batch),
            pool=self.pool,
            cache=self.cache,
            key=key,
            progress=partial(self.progress, "second moments"),
            importance=importances(self.measured.model, layers, self.compared.curvatures),
            limit=min(LIMIT, self.batching.sums // 2),
            together=min(ALL_UNITS, self.batching.sums),
            taps=self.batching.taps,
        )

    def _refuse_unfit(self, labels: NDArray[np.int64], batch: int) -> None:
        """Raise on labels that do not fit the output, before any long computation."""
        group = next(self.dataset.groups(self.dataset.selection, batch))
        Probe(
            self.measured.model,
            (),
            self.dataset.batches(group, batch),
            self.compared.measures,
            self.threads,
            labels=labels_of_batches(labels, [group]),
        )
