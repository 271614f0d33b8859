"""What people would use instead, measured as our own results are: onnxruntime's quantisers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx

from cobla_onnx.arithmetic.prepared import Prepared, in_a_file, prepare
from cobla_onnx.arithmetic.quantisers import QUANTISERS, Quantiser
from cobla_onnx.errors import CoblaError, ModelError
from cobla_onnx.graph.io.disk import bytes_of, files_of
from cobla_onnx.graph.io.model_file import load_model, stored_bytes
from cobla_onnx.graph.io.save import ExternalData, save_model, saved_bytes
from cobla_onnx.graph.subgraph import prefix
from cobla_onnx.pipeline.search.evidence import Evidence
from cobla_onnx.pipeline.session import Session
from cobla_onnx.report.sweep import SweepPoint
from cobla_onnx.runtime.temporary import temporary_folder

__all__ = ["alternatives"]


def alternatives(
    session: Session, folder: Path | None, stem: str, external_data: ExternalData
) -> Iterator[SweepPoint]:
    """Make, judge and weigh the model that each of onnxruntime's quantisers makes.

    Ranges follow from the calibration split, losses and quality are those on the selection split,
    by the probe that judges the session's own results.

    Parameters
    ----------
    session : Session
        With calibration data.
    folder : Path, optional
        The models are written there.
    stem : str
        Of the names of their files.

    Yields
    ------
    SweepPoint
        What fails is a point without figures that says why.
    """
    evidence = session.evidence
    assert evidence is not None
    measured = evidence.measured.model.graph.output
    prepared = prepare(session.written, measured)
    with in_a_file(prepared.model) as source:
        maker = _Maker(session, evidence, prepared, source, external_data)
        for number, quantiser in enumerate(QUANTISERS):
            session.notify("compare with onnxruntime", number, len(QUANTISERS))
            name = f"{stem}-onnxruntime-{quantiser.slug}.onnx"
            yield maker.point(quantiser, None if folder is None else folder / name)
        session.notify("compare with onnxruntime", len(QUANTISERS), len(QUANTISERS))


@dataclass(frozen=True)
class _Maker:
    session: Session
    evidence: Evidence
    prepared: Prepared
    source: Path
    external_data: ExternalData

    def point(self, quantiser: Quantiser, target: Path | None) -> SweepPoint:
        """Return the point of a quantiser; its model is written to `target`, if that is given."""
        method = f"onnxruntime {quantiser.name}"
        try:
            return self._measured(quantiser, method, target)
        except CoblaError as error:
            return SweepPoint(None, method=method, refused=error.in_flags())

    def _measured(self, quantiser: Quantiser, method: str, target: Path | None) -> SweepPoint:
        dataset, judge = self.evidence.dataset, self.evidence.judge
        with temporary_folder("quantised") as folder:
            path = folder / "made.onnx"
            quantiser.write(self.source, path, lambda: judge.batches(dataset.calibration))
            model = load_model(path)
            losses, quality = self.evidence.judged_model(model)
            loss = float(losses.mean())
            if not (math.isfinite(loss) and math.isfinite(quality.after)):
                raise ModelError("on the samples held back its outputs are no numbers")
            own = self._with_own_outputs(model)
            if target is None:
                size = saved_bytes(own, self.external_data)
            else:
                save_model(own, target, self.external_data, lambda _: None)
                size = bytes_of(files_of(target))
            analysis = self.session.analysis
            return SweepPoint(
                None,
                mem=stored_bytes(own) / analysis.mem_total,
                # They put other arithmetic in the place of products, and leave none out.
                mac=None if analysis.mac_total is None else 1.0,
                latency=self._latency(own),
                loss=loss,
                quality=quality,
                file=None if target is None else str(target),
                file_bytes=size,
                method=method,
            )

    def _with_own_outputs(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """Drop outputs at which only the loss is taken, and what makes nothing else."""
        own = {value.name for value in self.prepared.original.graph.output}
        outputs = [value for value in model.graph.output if value.name in own]
        if len(outputs) == len(model.graph.output):
            return model
        part = prefix(model, own)
        # With types and shapes, which parts of a model do not declare.
        del part.graph.output[:]
        part.graph.output.extend(outputs)
        return part

    def _latency(self, model: onnx.ModelProto) -> float | None:
        times = self.session.times
        if times is None:
            return None
        seen = self.session.followed.as_seen(model)
        return times.report(seen, None, None, None)[0].ratio
