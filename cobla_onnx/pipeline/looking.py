"""Look at the original through data: where the loss is taken, how, and what layers read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.calibration.batching import Batching, choose_batching
from cobla_onnx.calibration.data.dataset import Dataset
from cobla_onnx.calibration.data.evidence import lack_of_evidence
from cobla_onnx.calibration.data.labels import labels_of_batches
from cobla_onnx.calibration.evaluation.caches import without_caches
from cobla_onnx.calibration.evaluation.choosing import Chooser, Compared, look_at
from cobla_onnx.calibration.evaluation.evaluator import Judge
from cobla_onnx.calibration.evaluation.measured_model import MeasuredModel, measured_model
from cobla_onnx.calibration.evaluation.output_choice import resolve_outputs
from cobla_onnx.calibration.evaluation.probe import Probe
from cobla_onnx.calibration.heads import importances
from cobla_onnx.calibration.statistics import Seen
from cobla_onnx.graph.io.digest import model_content
from cobla_onnx.graph.layers import Layer
from cobla_onnx.options import Settings, memory_bytes
from cobla_onnx.pipeline.analysis import Analysis
from cobla_onnx.pipeline.branches import Followed
from cobla_onnx.pipeline.inputs import sample_labels
from cobla_onnx.pipeline.search.evidence import Evidence
from cobla_onnx.runtime.cache import digest
from cobla_onnx.runtime.context import RunContext
from cobla_onnx.runtime.providers import give_memory_back

__all__ = ["Looking", "look_through"]

# Number of samples that show the shapes and types of the outputs.
EXAMPLES = 6


def look_through(
    followed: Followed, dataset: Dataset, settings: Settings, context: RunContext
) -> Looking:
    """Decide which outputs count and where the loss is taken."""
    model = followed.model
    labels = sample_labels(settings.labels, dataset)
    named = resolve_outputs(settings.outputs, [o.name for o in model.graph.output])
    choices, assumed = without_caches(named, model)
    ignored = frozenset(name for name, choice in choices.items() if choice.how == "ignore")
    context.progress("where the loss is taken", 0, 1)
    measured = _measured(followed, dataset, context.threads, ignored)
    context.progress("where the loss is taken", 1, 1)
    chooser = Chooser.of(
        measured.model,
        settings.loss,
        choices=choices,
        labelled=labels is not None,
        shown=measured.outputs,
    )
    return Looking(model, measured, dataset, settings, chooser, context, labels, assumed)


def _measured(
    followed: Followed, dataset: Dataset, threads: int, ignored: frozenset[str]
) -> MeasuredModel:
    """Choose where the loss is taken, from the graph and a few samples."""
    examples = list(dataset.batches(dataset.calibration[:EXAMPLES], 1))
    layers = [layer for layer in followed.inventory.layers if not layer.in_body]
    return measured_model(followed.model, layers, examples, ignored=ignored, threads=threads)


@dataclass
class Looking:
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
    chooser: Chooser
    context: RunContext
    labels: NDArray[np.int64] | None
    assumed: tuple[str, ...]
    batching: Batching = field(init=False)
    compared: Compared = field(init=False)

    def __call__(self, layers: Sequence[Layer]) -> Seen:
        """Run the original on the samples; the result takes statistics of the layers."""
        self.context.progress("size of a run", 0, 1)
        self.batching = choose_batching(
            self.model,
            self.measured.model,
            layers,
            self.dataset,
            self.settings.batch,
            memory_bytes(self.settings.memory_limit),
            threads=self.context.threads,
            gradient=self.settings.resolved_objective == "loss" or self.settings.distil is not None,
        )
        self.context.progress("size of a run", 1, 1)
        self.context.pool.runs = self.batching.at_once
        give_memory_back(self.batching.gives_back)
        batch = self.batching.size
        self.compared = look_at(
            self.measured.model,
            self.dataset,
            batch,
            self.context.threads,
            self.chooser,
            partial(self.context.progress, "survey"),
        )
        if self.labels is not None:
            self._refuse_unfit(self.labels, batch)
        # Samples may have been left out: both belong to the remaining ones.
        samples = self.dataset.calibration
        key = ""
        if self.context.cache is not None:
            key = digest(model_content(self.model), self.dataset.content(samples), batch)
        return Seen(
            self.model,
            layers,
            lambda: self.dataset.batches(samples, batch),
            pool=self.context.pool,
            cache=self.context.cache,
            key=key,
            progress=partial(self.context.progress, "second moments"),
            importance=importances(self.measured.model, layers, self.compared.curvatures),
            sums=self.batching.sums,
            taps=self.batching.taps,
            samples=len(samples),
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on the samples and on how outputs are compared, after the call."""
        return (
            *self.dataset.notes,
            *self.batching.notes,
            *lack_of_evidence(self.dataset),
            *self.assumed,
            *self.compared.notes,
        )

    def evidence(self, analysis: Analysis) -> Evidence:
        """Take the losses of the original on the samples, after the call."""
        self.context.progress("outputs of the original", 0, 1)
        judge = Judge(
            self.measured.model,
            analysis.layers,
            self.dataset,
            self.batching.size,
            self.settings.loss,
            self.context.threads,
            self.labels,
            self.compared,
        )
        found = Evidence(
            self.model, analysis, judge, self.measured, self.context, self.batching.taps
        )
        self.context.progress("outputs of the original", 1, 1)
        return found

    def _refuse_unfit(self, labels: NDArray[np.int64], batch: int) -> None:
        """Raise on labels that do not fit the output, before any long computation."""
        group = next(self.dataset.groups(self.dataset.selection, batch))
        Probe(
            self.measured.model,
            (),
            self.dataset.batches(group, batch),
            self.compared.measures,
            self.context.threads,
            labels=labels_of_batches(labels, [group]),
        )
