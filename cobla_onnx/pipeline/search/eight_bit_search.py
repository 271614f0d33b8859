"""Search what computes in 8 bits, and in which ranges, by the loss on the samples held back."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

import onnx

from cobla_onnx.allocation.problem import Float64
from cobla_onnx.arithmetic.biases import biased_nodes, corrected_biases, with_biases
from cobla_onnx.arithmetic.nodes import carried_nodes, dynamic_nodes
from cobla_onnx.arithmetic.prepared import Prepared, prepare
from cobla_onnx.arithmetic.quantise import quantised, quantised_at_run_time
from cobla_onnx.arithmetic.ranges import METHODS, Method, Ranges, calibrated
from cobla_onnx.arithmetic.saturation import sums_saturate
from cobla_onnx.calibration.data.arrays import spread_over
from cobla_onnx.calibration.evaluation.quality import Quality
from cobla_onnx.errors import ModelError, VerificationError
from cobla_onnx.graph.first_axis import first_axes
from cobla_onnx.graph.io.model_file import stored_bytes
from cobla_onnx.pipeline.search.evidence import Evidence
from cobla_onnx.pipeline.search.floating import cheap_nodes, promising, takes_back
from cobla_onnx.report.arithmetic import ArithmeticReport
from cobla_onnx.runtime.session import Feeds
from cobla_onnx.runtime.shapes import model_costs
from cobla_onnx.text import finite
from cobla_onnx.wording import option_name

__all__ = ["EightBitSearch", "EightBits", "narrowed"]

# Most samples for histograms, which take a hundred times longer than the least and the largest.
HISTOGRAM_SAMPLES = 32
# Samples over which the means of nodes are taken; each has as many values as a channel has places.
BIAS_SAMPLES = 64


@dataclass(frozen=True)
class EightBits:
    """A model whose nodes compute in 8 bits.

    Attributes
    ----------
    source : ModelProto
        The model in floating point.
    model : ModelProto
    report : ArithmeticReport
    notes : tuple of str
        What the report says beside.
    """

    source: onnx.ModelProto
    model: onnx.ModelProto
    report: ArithmeticReport
    notes: tuple[str, ...] = ()


def narrowed(
    prepared: Prepared, ranges: Ranges | None, places: Sequence[int], *, reduced: bool = False
) -> onnx.ModelProto:
    """Let nodes compute in 8 bits in given ranges, or without any in those of each run.

    Parameters
    ----------
    prepared : Prepared
    ranges : Ranges or None
    places : sequence of int
        Nodes with weights; those between them that only carry numbers follow.
    reduced : bool
        Whether weights have 7 bits, for processors on which sums of pairs do not fit.
    """
    if ranges is None:
        return quantised_at_run_time(prepared, places, reduced=reduced)
    nodes = (*places, *carried_nodes(prepared.model, places))
    return quantised(prepared, ranges, nodes, reduced=reduced)


@dataclass(frozen=True)
class _Judged:
    """A model, its losses on the samples held back, and what else was measured there."""

    model: onnx.ModelProto
    losses: Float64
    quality: Quality

    @property
    def loss(self) -> float:
        loss = float(self.losses.mean())
        return loss if math.isfinite(loss) else math.inf


@dataclass
class EightBitSearch:
    """Tries ranges, nodes and biases, and keeps what loses least.

    Attributes
    ----------
    evidence : Evidence
    prepared : Prepared
        Of `source`.
    source : ModelProto
        In floating point.
    most : int or None
        Bytes of weights that the result may have.
    is_fast : callable
        Whether a model with single nodes in floating point is fast enough.
    timed : bool
        Whether it was measured how many of the first nodes are faster in floating point.
    candidates : dict of str to float
        What was tried, and its loss.
    done : int
        Models that were judged.
    """

    evidence: Evidence
    prepared: Prepared
    source: onnx.ModelProto
    most: int | None
    is_fast: Callable[[onnx.ModelProto], bool] = lambda model: True
    timed: bool = False
    candidates: dict[str, float] = field(default_factory=dict)
    done: int = 0

    def result(self, everything: Sequence[int], after: Sequence[int]) -> EightBits:
        """Choose among nodes, of which those `after` the first ones are faster in 8 bits."""
        before = self._judge(self.source)
        products = dynamic_nodes(self.source, everything)
        weighted = products or after
        slow = set(everything) - set(weighted)
        method, ranges, best = self._dynamic(products) if products else self._by_ranges(weighted)
        if math.isinf(best.loss) and not math.isinf(before.loss):
            raise VerificationError(
                f"{option_name('arithmetic', 'int8')}: on the samples held back the model in 8 "
                "bits gives outputs that are no numbers; nothing was written, give "
                f"{option_name('arithmetic', 'keep')}"
            )
        left, best = self._left(method, ranges, best, weighted, before.loss)
        chosen = [node for node in weighted if node not in left]
        corrected = 0
        if ranges is not None:
            best, corrected = self._corrected(method, ranges, best, weighted, chosen)
        losses = self.candidates.items()
        report = ArithmeticReport(
            nodes=len(chosen),
            carried=0 if products else len(carried_nodes(self.prepared.model, chosen)),
            left=tuple(map(self._shown, sorted({*left, *slow}))),
            ranges=method,
            biases=corrected,
            candidates={name: finite(loss) for name, loss in losses},
            reduced=sums_saturate(),
            loss_before=before.loss,
            loss=best.loss,
            quality_before=before.quality,
            quality=best.quality,
        )
        self.evidence.context.progress("8-bit arithmetic", self.done, self.done)
        notes = () if ranges is not None else _of_batches(self.source)
        return EightBits(self.source, best.model, report, notes)

    def _left(
        self,
        method: str,
        ranges: Ranges | None,
        best: _Judged,
        weighted: Sequence[int],
        before: float,
    ) -> tuple[list[int], _Judged]:
        """Leave single nodes in floating point where that takes back much of the loss."""
        shapes, threads = self.evidence.analysis.input_shapes, self.evidence.context.threads
        _, macs, _ = model_costs(self.source, shapes, needed=False, threads=threads)
        if macs is None:
            return [], best
        cheap, room = cheap_nodes(self.source, macs, weighted, self.timed)

        def without(places: Collection[int]) -> list[int]:
            return [node for node in weighted if node not in places]

        alone = dict[int, _Judged]()

        def losses(places: Sequence[int]) -> Float64 | None:
            if not (nodes := without(places)):
                return None
            other = self._with(ranges, nodes)
            if len(places) == 1 and all(other.loss < each.loss for each in alone.values()):
                # Looked at again first. One is kept, since it may be large.
                alone.clear()
                alone[places[0]] = other
            return other.losses

        found = promising(cheap, losses, best.losses, best.loss - before)
        left = list[int]()
        for place in found:
            nodes = without([*left, place])
            if not nodes or macs[place] > room:
                continue
            known = None if left else alone.pop(place, None)
            other = known or self._with(ranges, nodes)
            self.candidates[f"{method}, without {self._shown(place)}"] = other.loss
            gains = takes_back(best.losses, other.losses, best.loss - before)
            if gains and self._fits(other.model):
                left.append(place)
                room -= macs[place]
                best = other
        return left, best

    def _corrected(
        self,
        method: str,
        ranges: Ranges,
        best: _Judged,
        weighted: Sequence[int],
        chosen: Sequence[int],
    ) -> tuple[_Judged, int]:
        """Correct biases, unless that loses more; also return how many were."""
        found = biased_nodes(self.source, weighted)
        if not found:
            return best, 0
        names = self.prepared.names
        # All names stay, since nodes are looked up by them.
        narrow = self._quantised(replace(self.prepared, given=frozenset()), ranges, chosen)
        dataset, judge = self.evidence.dataset, self.evidence.judge
        samples = spread_over(dataset.calibration, BIAS_SAMPLES)
        biases = corrected_biases(
            self.source,
            narrow,
            found,
            {place: names[place] for place in found},
            lambda: judge.batches(samples),
        )
        outputs = self.evidence.measured.model.graph.output
        prepared = prepare(with_biases(self.source, biases), outputs)
        other = self._judge(self._quantised(prepared, ranges, chosen))
        self.candidates[f"{method}, biases corrected"] = other.loss
        # It costs nothing, so that it need not gain more than the noise.
        return (other, len(found)) if other.loss < best.loss else (best, 0)

    def _fits(self, model: onnx.ModelProto) -> bool:
        """Whether a model keeps to the bytes and the time that it may take."""
        return (self.most is None or stored_bytes(model) <= self.most) and self.is_fast(model)

    def _dynamic(self, products: Sequence[int]) -> tuple[str, None, _Judged]:
        judged = self._with(None, products)
        self.candidates["dynamic"] = judged.loss
        return "dynamic", None, judged

    def _by_ranges(self, weighted: Sequence[int]) -> tuple[str, Ranges, _Judged]:
        found = list[tuple[str, Ranges, _Judged]]()
        nodes = (*weighted, *carried_nodes(self.prepared.model, weighted))
        operators = {self.source.graph.node[place].op_type for place in nodes}
        for method in METHODS:
            ranges = calibrated(self.prepared, self._batches(method), method, operators)
            if ranges is None:
                self.candidates[method] = math.inf
                continue
            judged = self._with(ranges, weighted)
            self.candidates[method] = judged.loss
            found.append((method, ranges, judged))
        return min(found, key=lambda entry: entry[2].loss)

    def _batches(self, method: Method) -> Iterator[Feeds]:
        dataset, judge = self.evidence.dataset, self.evidence.judge
        if method == "min-max":
            return iter(judge.batches(dataset.calibration))
        # All tensors of a batch are held at a time.
        return dataset.batches(spread_over(dataset.calibration, HISTOGRAM_SAMPLES), 1)

    def _with(self, ranges: Ranges | None, weighted: Sequence[int]) -> _Judged:
        return self._judge(self._quantised(self.prepared, ranges, weighted))

    def _quantised(
        self, prepared: Prepared, ranges: Ranges | None, weighted: Sequence[int]
    ) -> onnx.ModelProto:
        return narrowed(prepared, ranges, weighted, reduced=sums_saturate())

    def _judge(self, model: onnx.ModelProto) -> _Judged:
        self.done += 1
        self.evidence.context.progress("8-bit arithmetic", self.done - 1, self.done)
        try:
            return _Judged(model, *self.evidence.judged_model(model))
        except ModelError as error:
            raise VerificationError(
                f"{option_name('arithmetic', 'int8')}: onnxruntime does not run the model in 8 "
                f"bits: {error.message}; nothing was written, give "
                f"{option_name('arithmetic', 'keep')}"
            ) from error

    def _shown(self, place: int) -> str:
        node = self.source.graph.node[place]
        return str(node.name or node.output[0])


def _of_batches(model: onnx.ModelProto) -> tuple[str, ...]:
    """Note that ranges of each run are those of all its samples, unless a run has one."""
    sizes = {v.name: v.type.tensor_type.shape.dim[:1] for v in model.graph.input}
    kinds = first_axes(model)
    if all(
        kind == "other" or any(size.dim_value == 1 for size in sizes[name])
        for name, kind in kinds.items()
    ):
        return ()
    return (
        "the ranges of a run are those of all its samples together: beside much larger ones a "
        "sample loses more; run one sample at a time where that matters, or give "
        f"{option_name('arithmetic', 'keep')}",
    )
