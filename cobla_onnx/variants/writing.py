"""How codes are written into a model: which types hold them, and which operators decode them.

=============  ============================================  ======================================
way            codes                                         nodes before the layer
=============  ============================================  ======================================
`PLANES_WAY`   bytes of packed fields, or int8               Cast, arithmetic, Gather, Mul
`NIBBLES`      UINT4, from opset 21 on                       Cast, Gather, Mul
`DEQUANTIZE`   int8, with one scale or one along an axis     DequantizeLinear
=============  ============================================  ======================================

The first two are computed by onnxruntime when it opens the model. The third one it computes in
every run, but for matrix products, where it becomes a product in 8 bits (`FUSED`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import onnx
import onnxruntime

from cobla_onnx.graph.protos import opset_of

__all__ = [
    "DEQUANTIZE",
    "FUSED",
    "NIBBLES",
    "PLANES_WAY",
    "Storage",
    "Way",
    "Writing",
    "dequantizes_axis",
    "takes_nibbles",
]

Storage: TypeAlias = Literal["auto", "cast", "qdq"]
Way: TypeAlias = Literal["planes", "nibbles", "dequantize"]

PLANES_WAY: Way = "planes"
NIBBLES: Way = "nibbles"
DEQUANTIZE: Way = "dequantize"

FUSED = 5e-2
"""Tolerance of a layer whose weight onnxruntime reads in DequantizeLinear, once it is optimised.

It multiplies matrices in 8 bits then (MatMulNBits), inputs too, rounded in blocks of 32: by up to
0.8 % of the largest output on random numbers. The tolerance is for finding kernels that are wrong.
"""

# The opsets from which DequantizeLinear is there, has scales along an axis, and types of 4 bits
# are; and the IR version that has these.
DEQUANTIZE_FROM, AXIS_FROM, NIBBLES_FROM, NIBBLES_IR = 10, 13, 21, 10
# The first onnxruntime that casts types of 4 bits.
CASTS_NIBBLES = (1, 23)


@dataclass(frozen=True)
class Writing:
    """What decides how codes are written.

    Attributes
    ----------
    storage : {'auto', 'cast', 'qdq'}
        ``cast``: by operators that every opset has. ``auto``: with UINT4, too, where model and
        onnxruntime have it. ``qdq``: by DequantizeLinear, where it can say the same.
    opset, ir_version : int
        Of the model.
    """

    storage: Storage
    opset: int
    ir_version: int

    @classmethod
    def into(cls, model: onnx.ModelProto, storage: Storage) -> Writing:
        """Return how codes are written into a model."""
        return cls(storage, opset_of(model), model.ir_version)


def takes_nibbles(writing: Writing) -> bool:
    """Whether 4 bits are written as UINT4."""
    version = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
    return (
        writing.storage != "cast"
        and writing.opset >= NIBBLES_FROM
        and writing.ir_version >= NIBBLES_IR
        and version >= CASTS_NIBBLES
    )


def dequantizes_axis(writing: Writing, scale: tuple[int, ...]) -> int | None:
    """Axis along which DequantizeLinear would have a weight's scales; None if it is not to.

    Parameters
    ----------
    scale : tuple of int
        Shape of the scales, which broadcasts over the weight's. Where all are 1 the axis is 0.
    """
    along = [axis for axis, length in enumerate(scale) if length > 1]
    least = AXIS_FROM if along else DEQUANTIZE_FROM
    if writing.storage != "qdq" or writing.opset < least or len(along) > 1:
        return None
    return along[0] if along else 0
