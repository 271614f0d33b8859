"""Let a model compute in 8 bits where it can."""

from __future__ import annotations

from collections.abc import Callable, Collection

import onnx

from cobla_onnx.arithmetic.gemms import with_plain_gemms
from cobla_onnx.arithmetic.nodes import (
    dynamic_nodes,
    require_opset,
    sole_readers,
    weighted_nodes,
    with_stored_weights,
)
from cobla_onnx.arithmetic.prepared import prepare
from cobla_onnx.arithmetic.ranges import stand_in_ranges
from cobla_onnx.errors import ModelError
from cobla_onnx.graph.io.model_file import stored_bytes
from cobla_onnx.graph.layers import Reason, find_layers
from cobla_onnx.pipeline.analysis import Analysis
from cobla_onnx.pipeline.search.eight_bit_search import EightBits, EightBitSearch, narrowed
from cobla_onnx.pipeline.search.evidence import Evidence
from cobla_onnx.wording import option_name

__all__ = [
    "can_compute",
    "computes_products",
    "in_eight_bits",
    "spared_outputs",
    "stand_in_eight_bits",
]


def in_eight_bits(
    evidence: Evidence,
    model: onnx.ModelProto,
    most: int | None = None,
    spared: Collection[str] = (),
    head: int | None = None,
    is_fast: Callable[[onnx.ModelProto], bool] = lambda model: True,
) -> EightBits:
    """Let a model compute in 8 bits where it can.

    First all nodes with weights, and those between them, with ranges by each of the methods, or of
    each run where nearly all of them are matrix products; then single ones are left in floating
    point where that takes back much of the loss and costs little. What was timed, `head`, is not
    asked again.

    Parameters
    ----------
    evidence : Evidence
        Ranges are those of the calibration split, choices those of the selection split.
    model : ModelProto
        In floating point, with the outputs of the original.
    most : int, optional
        Bytes of weights that the result may have.
    spared : collection of str
        What `spared_outputs` gives.
    head : int, optional
        Nodes from the first on that stay in floating point since that is faster, unless `most`
        has no room for them; None if it was not measured.
    is_fast : callable
        Whether a model with more of them in floating point is fast enough.

    Raises
    ------
    ModelError
        If no node can compute in 8 bits.
    VerificationError
        If onnxruntime does not run the result.
    """
    model, weighted = _ready(model, spared, evidence.model)
    prepared = prepare(model, evidence.measured.model.graph.output)
    search = EightBitSearch(evidence, prepared, model, most, is_fast, head is not None)
    after = _after(model, weighted, head or 0)
    if most is not None and after != weighted:
        narrow = narrowed(prepared, stand_in_ranges(prepared), after)
        after = after if stored_bytes(narrow) <= most else weighted
    return search.result(weighted, after)


def stand_in_eight_bits(
    model: onnx.ModelProto, spared: Collection[str] = (), head: int = 0
) -> onnx.ModelProto:
    """Return a model that stores as many bytes and takes the same time, whatever its ranges."""
    model, weighted = _ready(model, spared)
    prepared = prepare(model)
    products = dynamic_nodes(model, weighted)
    ranges = None if products else stand_in_ranges(prepared)
    return narrowed(prepared, ranges, products or _after(model, weighted, head))


def computes_products(model: onnx.ModelProto) -> bool:
    """Whether a model is made of matrix products, which take the ranges of each run in 8 bits.

    Raises
    ------
    ModelError
        If no node can compute in 8 bits.
    """
    return bool(dynamic_nodes(*_ready(model, ())))


def can_compute(model: onnx.ModelProto, spared: Collection[str] = ()) -> bool:
    """Whether any node of a model can compute in 8 bits.

    Raises
    ------
    ModelError
        If its opset is too old for any.
    """
    return bool(_written(model, spared)[1])


def _after(model: onnx.ModelProto, weighted: tuple[int, ...], head: int) -> tuple[int, ...]:
    """Return nodes without the first ones, and without those that share a weight with these.

    All of them if none would be left.
    """
    return sole_readers(model, weighted[head:]) or weighted


def spared_outputs(model: onnx.ModelProto, analysis: Analysis) -> frozenset[str]:
    """Return what layers write that options leave as they are: not in 8 bits either.

    Parameters
    ----------
    model : ModelProto
        The original.
    """
    reasons = (Reason.EXCLUDED, Reason.TOO_SMALL)
    names = {item.name for item in analysis.skipped if item.reason in reasons}
    layers = [layer for layer in find_layers(model).layers if layer.name in names]
    return frozenset(use.output for layer in layers for use in layer.uses)


def _ready(
    model: onnx.ModelProto, spared: Collection[str], original: onnx.ModelProto | None = None
) -> tuple[onnx.ModelProto, tuple[int, ...]]:
    """Do as `_written`, and refuse a model without nodes that can compute in 8 bits.

    With the original it is told where nodes of that could, whose weights are in fewer bits by now.
    """
    model, found = _written(model, spared)
    if not found:
        if original is not None and _written(original, spared)[1]:
            raise ModelError(
                f"{option_name('arithmetic', 'int8')}: all layers that could compute in 8 bits "
                "are stored in fewer bits, which are decoded to floating point; give "
                f"{option_name('arithmetic', 'keep')}, or a plan with a layer that has no bits"
            )
        fewer = ""
        if any(layer.type == onnx.TensorProto.FLOAT for layer in find_layers(model).layers):
            fewer = f", or {option_name('precision')} to store it in fewer bits"
        raise ModelError(
            f"{option_name('arithmetic', 'int8')}: the model has no Conv, ConvTranspose, Gemm or "
            "MatMul with a stored weight in single precision that nothing else reads (nor can a "
            "ConvTranspose in groups with a bias, a Gemm with one for each row, or what a body "
            "reads once it was moved); give "
            f"{option_name('arithmetic', 'keep')}{fewer}"
        )
    return model, found


def _written(
    model: onnx.ModelProto, spared: Collection[str]
) -> tuple[onnx.ModelProto, tuple[int, ...]]:
    """Write a model as the quantiser takes it; also return the nodes that can compute in 8 bits."""
    require_opset(model)
    model = with_plain_gemms(with_stored_weights(model), spared)
    return model, weighted_nodes(model, spared)
