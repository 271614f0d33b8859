"""Onnxruntime's own quantisers on whole models, as people use them: what our results stand beside.

Each reads a file and writes one. What it wants that is not here, or cannot do, is a `ModelError`
with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import onnx

from cobla_onnx.arithmetic.nodes import BY_CHANNEL
from cobla_onnx.arithmetic.prepared import Handed, has_more_files, quietly
from cobla_onnx.arithmetic.saturation import sums_saturate
from cobla_onnx.errors import CoblaError, ModelError
from cobla_onnx.graph.opset import lifted
from cobla_onnx.graph.protos import opset_of
from cobla_onnx.runtime.session import Feeds
from cobla_onnx.text import first_line

__all__ = ["QUANTISERS", "Quantiser"]

Samples: TypeAlias = Callable[[], Iterable[Feeds]]
Make: TypeAlias = Callable[[Path, Path, Samples], None]


@dataclass(frozen=True)
class Quantiser:
    """A way of onnxruntime to make a model smaller; it takes the bytes that it takes.

    Attributes
    ----------
    name : str
        As people call it.
    slug : str
        The same in the name of a file.
    make : callable
        Takes the file to read, the one to write, and what gives batches of samples.
    """

    name: str
    slug: str
    make: Make

    def write(self, source: Path, target: Path, samples: Samples) -> None:
        """Quantise a file.

        Parameters
        ----------
        source, target : Path
            Large weights may be in further files beside them.
        samples : callable
            Gives the calibration samples, batch by batch.

        Raises
        ------
        ModelError
            If it fails, or needs what is not installed.
        """
        try:
            with quietly():
                self.make(source, target, samples)
        except CoblaError:
            raise
        except ImportError as error:
            package = (error.name or "a package").replace("_", "-")
            raise ModelError(f"needs {package}, which is not installed") from error
        except Exception as error:
            # These are others' scripts, which raise whatever comes up in them.
            raise ModelError(f"fails: {type(error).__name__}, {first_line(error)}") from error


def _static_qdq(source: Path, target: Path, samples: Samples) -> None:
    """Quantise activations (uint8) and weights (int8, by channel), with ranges from samples."""
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    beside = has_more_files(source)
    raised, prepared = target.with_name("raised.onnx"), target.with_name("prepared.onnx")
    quant_pre_process(
        _raised(source, raised), prepared, skip_symbolic_shape=True, save_as_external_data=beside
    )
    quantize_static(
        prepared,
        target,
        Handed(samples()),
        per_channel=True,
        # As onnxruntime advises for processors without 8-bit dot products.
        reduce_range=sums_saturate(),
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        use_external_data_format=beside,
    )


def _dynamic(source: Path, target: Path, _: Samples) -> None:
    """Quantise weights; activations are while the model runs."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    raised = _raised(source, target.with_name("raised.onnx"))
    nodes = onnx.load(raised, load_external_data=False).graph.node
    # onnxruntime has no convolution of signed weights with activations quantised as it runs.
    convolutions = any(node.op_type == "Conv" for node in nodes)
    quantize_dynamic(
        raised,
        target,
        weight_type=QuantType.QUInt8 if convolutions else QuantType.QInt8,
        use_external_data_format=has_more_files(source),
    )


def _matmul_nbits(bits: int, source: Path, target: Path, _: Samples) -> None:
    """Store the constant operands of products in fewer bits, in blocks."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(onnx.load(source), bits=bits)
    quantizer.process()
    made = quantizer.model.model
    if not any(node.op_type == "MatMulNBits" for node in made.graph.node):
        raise ModelError("finds nothing to do: the model has no MatMul with a constant operand")
    _save(made, target, has_more_files(source))


def _float16(source: Path, target: Path, _: Samples) -> None:
    """Convert weights and activations to half precision, but inputs and outputs."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    made = convert_float_to_float16(onnx.load(source), keep_io_types=True)
    _save(made, target, has_more_files(source))


def _raised(source: Path, target: Path) -> Path:
    """Bring a model to the opset that scales by channel need, as the documentation advises."""
    if opset_of(onnx.load(source, load_external_data=False)) >= BY_CHANNEL:
        return source
    _save(lifted(onnx.load(source), BY_CHANNEL), target, has_more_files(source))
    return target


def _save(model: Any, target: Path, beside: bool) -> None:
    onnx.save(model, target, save_as_external_data=beside, location=f"{target.stem}.data")


QUANTISERS: tuple[Quantiser, ...] = (
    Quantiser("static QDQ, U8S8", "static-qdq", _static_qdq),
    Quantiser("quantize_dynamic", "dynamic", _dynamic),
    Quantiser("MatMulNBits, 8 bits", "matmul-8-bits", partial(_matmul_nbits, 8)),
    Quantiser("MatMulNBits, 4 bits", "matmul-4-bits", partial(_matmul_nbits, 4)),
    Quantiser("float16", "float16", _float16),
)
