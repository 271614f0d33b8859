"""One tensor that is stored in few bits: its arrays, and the nodes that decode it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from cobla_onnx.graph.layers import Layer
from cobla_onnx.variants.names import Names
from cobla_onnx.variants.replacement import narrowed
from cobla_onnx.variants.storage.coding import INTEGERS, nearest, signed
from cobla_onnx.variants.storage.decoding import (
    DOMAIN,
    decoder,
    decoder_inputs,
    decoder_nodes,
)
from cobla_onnx.variants.storage.packing import (
    Count,
    filling,
    pack,
    packed_bytes,
    plane_names,
    unpack,
)
from cobla_onnx.variants.storage.precision import HALF
from cobla_onnx.variants.writing import (
    DEQUANTIZE,
    NIBBLES,
    PLANES_WAY,
    Way,
    Writing,
    dequantizes_axis,
    takes_nibbles,
)

__all__ = ["LEVEL", "StoredTensor", "coded_tensor", "half_tensor", "tensor_bytes"]

LEVEL = "level"
"""Part of what learns: numbers over their scales, before they are rounded to levels."""


def tensor_bytes(count: Count, scales: Count, axes: int, bits: int) -> Count:
    """Bytes of a tensor in so many bits, with all that decodes it; as UINT4 a few less.

    Parameters
    ----------
    count : int or int64 array
        Number of its elements; of an array, the bytes for each number.
    scales : int or int64 array
        Number of its scales.
    axes : int
    bits : int
    """
    if bits == HALF:
        return 2 * count
    if bits == 8:
        return count + 4 * scales
    # Levels and shape, and the count where it is read.
    read_once = (4 << bits) + 8 * axes - 8 * (-filling(count, bits) // 8)
    return packed_bytes(count, bits) + 4 * scales + read_once


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in few bits.

    Attributes
    ----------
    bits : int
    arrays : mapping of str to array
        Those of `decoder_inputs`, or ``half``; to be dequantised, ``codes`` and ``scale``.
    shape : tuple of int
        Of the tensor.
    way : {'planes', 'nibbles', 'dequantize'}
        How it is written, see `writing`.
    axis : int
        That of the scales, where it is dequantised.
    """

    bits: int
    arrays: Mapping[str, NDArray[Any]]
    shape: tuple[int, ...]
    way: Way = PLANES_WAY
    axis: int = 0

    @property
    def values(self) -> NDArray[np.float32]:
        """The tensor as it is decoded."""
        if self.bits == HALF:
            return self.arrays["half"].astype(np.float32)
        scale = self.arrays["scale"]
        if self.way == DEQUANTIZE and scale.ndim:
            lengths = (-1 if axis == self.axis else 1 for axis in range(len(self.shape)))
            scale = scale.reshape(*lengths)
        return np.asarray(self._levels[self._codes] * scale)

    @property
    def nibbles(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the arrays that hold two numbers of a UINT4 tensor in a byte."""
        return {"codes": self.shape} if self.way == NIBBLES else {}

    def written(self, writing: Writing) -> StoredTensor:
        """Return the tensor as it is written into a model."""
        if self.bits == 8:
            axis = dequantizes_axis(writing, self.arrays["scale"].shape)
            if axis is None:
                return self
            # Of a single scale: without an axis, which opsets before 13 do not have.
            scale = self.arrays["scale"].reshape(-1 if self.arrays["scale"].size > 1 else ())
            arrays = {**self.arrays, "scale": scale}
            return replace(self, arrays=arrays, way=DEQUANTIZE, axis=axis)
        if self.bits == 4 and takes_nibbles(writing):
            kept = {part: self.arrays[part] for part in ("levels", "scale")}
            return replace(self, arrays={"codes": self.arrays["plane_0"], **kept}, way=NIBBLES)
        return self

    @property
    def learnable(self) -> dict[str, NDArray[Any]]:
        """What may take other values: numbers in half precision, or `LEVEL` and scales.

        The first are numbers over their scales, which count as the levels nearest to them.
        """
        if self.bits == HALF:
            return {"half": self.arrays["half"]}
        return {LEVEL: self._levels[self._codes], "scale": self.arrays["scale"]}

    @property
    def _levels(self) -> NDArray[np.float32]:
        return INTEGERS if self.bits == 8 else np.asarray(self.arrays["levels"], np.float32)

    @property
    def _codes(self) -> NDArray[np.uint8]:
        if self.bits == 8:
            return (self.arrays["codes"].astype(np.int16) + 128).astype(np.uint8)
        parts = ("codes",) if self.way == NIBBLES else plane_names(self.bits)
        planes = [self.arrays[part] for part in parts]
        return unpack(planes, self.bits, math.prod(self.shape)).reshape(self.shape)

    def _nearest(self, parts: Mapping[str, NDArray[Any]]) -> NDArray[np.integer[Any]]:
        return nearest(self._levels, parts[LEVEL]) if LEVEL in parts else self._codes

    def with_parts(self, layer: Layer, parts: Mapping[str, NDArray[Any]]) -> StoredTensor:
        """Return the same with other values of `learnable`, rounded.

        Raises
        ------
        ModelError
            If a value overflows its type.
        """
        what = "what is stored for its weight"
        if self.bits == HALF:
            return half_tensor(layer, parts["half"], what) if parts else self
        scale = narrowed(layer, parts.get("scale", self.arrays["scale"]), np.dtype("f"), what)
        codes = self._nearest(parts).astype(np.uint8)
        return coded_tensor(codes, self._levels, np.broadcast_to(scale, codes.shape))

    def as_read(self, parts: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Return the tensor that values of `learnable` stand for, codes rounded to levels."""
        if self.bits == HALF:
            return np.asarray(parts["half"], np.float32)
        scale = parts.get("scale", self.arrays["scale"])
        return np.asarray(self._levels[self._nearest(parts)] * scale, np.float32)

    def pulled_back(
        self, parts: Mapping[str, NDArray[Any]], gradient: NDArray[Any]
    ) -> dict[str, NDArray[Any]]:
        """Return derivatives by values of `learnable`, from that by the tensor.

        Rounding counts as if it changed nothing: the straight-through estimator (Bengio et al.
        2013, arXiv 1308.3432, section 4), as used for weights by Jacob et al. 2018 (arXiv
        1712.05877), section 3.
        """
        if self.bits == HALF:
            return {"half": gradient}
        scale = parts.get("scale", self.arrays["scale"])
        by_scale = gradient * self._levels[self._nearest(parts)]
        axes = tuple(axis for axis, size in enumerate(scale.shape) if size == 1)
        return {LEVEL: gradient * scale, "scale": by_scale.sum(axis=axes, keepdims=True)}

    def decode(
        self, stored: Mapping[str, str], label: str, names: Names
    ) -> tuple[list[onnx.NodeProto], str]:
        """Build the nodes that decode the tensor, and name it.

        Parameters
        ----------
        stored : mapping of str to str
            For each of the arrays, the name of its initializer.
        label : str
            Begins the names of what is added.
        names : Names
        """
        result, name = names.tensor(f"{label}/decoded"), names.node(f"{label}/decode")
        if self.bits == HALF:
            cast = helper.make_node("Cast", [stored["half"]], [result], name, to=TensorProto.FLOAT)
            return [cast], result
        if self.way == DEQUANTIZE:
            along: dict[str, Any] = {"axis": self.axis} if self.arrays["scale"].ndim else {}
            inputs = [stored["codes"], stored["scale"]]
            return [helper.make_node("DequantizeLinear", inputs, [result], name, **along)], result
        nibbles, cut = self.way == NIBBLES, "count" in self.arrays
        wanted = decoder_inputs(self.bits, nibbles, cut)
        if names.takes_functions:
            function = names.function(decoder(self.bits, names.opset, nibbles, cut))
            inputs = [stored[part] for part in wanted]
            return [helper.make_node(function, inputs, [result], name, domain=DOMAIN)], result

        def unique(part: str) -> str:
            return names.tensor(f"{label}/{part}")

        count, given = math.prod(self.shape), {part: stored[part] for part in wanted}
        nodes = decoder_nodes(self.bits, names.opset, given, result, unique, count, nibbles)
        for node in nodes:
            node.name = names.node(f"{label}/decode")
        return nodes, result


def half_tensor(layer: Layer, array: NDArray[Any], what: str) -> StoredTensor:
    """Store a tensor of a layer in half precision.

    Parameters
    ----------
    what : str
        What it is, for the error.

    Raises
    ------
    ModelError
        If a number of it overflows.
    """
    half = narrowed(layer, array, np.dtype(np.float16), what)
    return StoredTensor(HALF, {"half": half}, half.shape)


def coded_tensor(
    codes: NDArray[np.uint8], levels: NDArray[np.float32], scales: NDArray[np.float32]
) -> StoredTensor:
    """Store the codes of a tensor.

    Parameters
    ----------
    codes : uint8 array
        In the shape of the tensor.
    levels : float32 array, shape (2 ** bits,)
    scales : float32 array, shape of `codes`
        It is stored once along axes on which it does not depend.
    """
    bits, scale = (len(levels) - 1).bit_length(), _broadcastable(scales)
    if bits == 8:
        arrays = {"codes": np.ascontiguousarray(signed(codes)), "scale": scale}
        return StoredTensor(bits, arrays, codes.shape)
    arrays = {
        **dict(zip(plane_names(bits), pack(codes, bits), strict=True)),
        "levels": levels,
        "scale": scale,
        "shape": np.array(codes.shape, np.int64),
    }
    if filling(codes.size, bits):
        arrays["count"] = np.array([codes.size], np.int64)
    return StoredTensor(bits, arrays, codes.shape)


def _broadcastable(array: NDArray[Any]) -> NDArray[Any]:
    """Cut the axes along which an array does not change to a length of 1."""
    for axis in range(array.ndim):
        first = array.take([0], axis)
        if np.array_equal(np.broadcast_to(first, array.shape), array):
            array = first
    return np.ascontiguousarray(array)
