"""A weight that is stored in few bits, and the nodes that decode it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from cobla_onnx.graph.layers import Layer, Use
from cobla_onnx.variants.low_rank.matricisation import schemes_for
from cobla_onnx.variants.names import Names
from cobla_onnx.variants.replacement import Replacement, narrowed, narrowed_bias
from cobla_onnx.variants.storage.coding import Coded
from cobla_onnx.variants.storage.decoding import (
    DOMAIN,
    constant_bytes,
    decoder,
    decoder_inputs,
    decoder_nodes,
)
from cobla_onnx.variants.storage.packing import pack, packed_bytes
from cobla_onnx.variants.storage.precision import HALF

__all__ = ["StoredWeight", "coded_weight", "half_weight", "stored_bytes"]


def stored_bytes(layer: Layer, bits: int) -> int:
    """Bytes of a layer's weight in so many bits, with all that decodes it; never too few.

    A function of the model is counted for each layer that reads it.
    """
    if bits == HALF:
        return 2 * layer.params
    groups, outputs = schemes_for(layer)[0].rows_of(np.empty(layer.shape, np.bool_)).shape[:2]
    scales = 4 * int(groups) * int(outputs)
    if bits == 8:
        return layer.params + scales
    # Levels, shape and count.
    read_once = (4 << bits) + 8 * (len(layer.shape) + 1) + constant_bytes(bits)
    return packed_bytes(layer.params, bits) + scales + read_once


@dataclass(frozen=True)
class StoredWeight(Replacement):
    """A weight in few bits, and the layer's node as it was.

    Attributes
    ----------
    layer, arrays, bias
        As those of `Replacement`; the arrays are those of `decoder_inputs`, or ``half``.
    bits : int
    coded : Coded or None
        None for half precision.
    """

    bits: int
    coded: Coded | None

    def dense(self) -> NDArray[Any]:
        """Return the weight as it is decoded."""
        if self.coded is None:
            return self.arrays["half"].astype(np.float32)
        return schemes_for(self.layer)[0].weight_of(self.coded.dense())

    def shared(
        self, stored: Mapping[str, str], names: Names
    ) -> tuple[list[onnx.NodeProto], dict[str, str]]:
        """Build the nodes that decode the weight, once for all uses."""
        weight = names.tensor(f"{self.layer.name}/decoded")
        name = names.node(f"{self.layer.name}/decode")
        if self.coded is None:
            cast = helper.make_node("Cast", [stored["half"]], [weight], name, to=TensorProto.FLOAT)
            return [cast], {"weight": weight}
        wanted = decoder_inputs(self.bits)
        if names.takes_functions:
            function = decoder(self.bits, names.opset)
            names.functions.append(function)
            inputs = [stored[part] for part in wanted]
            node = helper.make_node(function.name, inputs, [weight], name, domain=DOMAIN)
            return [node], {"weight": weight}
        inputs_by_name = {part: stored[part] for part in wanted}

        def unique(part: str) -> str:
            return names.tensor(f"{self.layer.name}/{part}")

        count = self.layer.params
        nodes = decoder_nodes(self.bits, names.opset, inputs_by_name, weight, unique, count)
        for node in nodes:
            node.name = names.node(f"{self.layer.name}/decode")
        return nodes, {"weight": weight}

    def nodes(
        self,
        node: onnx.NodeProto,
        use: Use,
        operands: Mapping[str, str],
        rest: Sequence[str],
        names: Names,
    ) -> list[onnx.NodeProto]:
        """Return the layer's own node, which reads the decoded weight."""
        result = onnx.NodeProto()
        result.CopyFrom(node)
        result.input[self.layer.weight_input] = operands["weight"]
        del result.input[2:]
        result.input.extend(rest)
        return [result]


def half_weight(layer: Layer, weight: NDArray[Any], bias: NDArray[Any] | None) -> StoredWeight:
    """Store a weight in half precision.

    Raises
    ------
    ModelError
        If a number of it overflows.
    """
    half = narrowed(layer, weight, np.dtype(np.float16), "its weight")
    return StoredWeight(layer, {"half": half}, narrowed_bias(layer, bias), HALF, None)


def coded_weight(layer: Layer, coded: Coded, bias: NDArray[Any] | None) -> StoredWeight:
    """Store the codes of a weight, in the shape in which the layer's nodes read it."""
    scheme, bits = schemes_for(layer)[0], coded.bits
    codes = scheme.weight_of(coded.codes)
    scale = _broadcastable(
        scheme.weight_of(np.broadcast_to(coded.scales[:, :, None], coded.codes.shape).copy())
    )
    if bits == 8:
        shifted = (codes.astype(np.int16) - 128).astype(np.int8)
        arrays = {"codes": np.ascontiguousarray(shifted), "scale": scale}
    else:
        planes = {f"plane_{k}": plane for k, plane in enumerate(pack(codes, bits))}
        arrays = {
            **planes,
            "levels": coded.levels,
            "scale": scale,
            "shape": np.array(layer.shape, np.int64),
            "count": np.array([codes.size], np.int64),
        }
    return StoredWeight(layer, arrays, narrowed_bias(layer, bias), bits, coded)


def _broadcastable(array: NDArray[Any]) -> NDArray[Any]:
    """Cut the axes along which an array does not change to a length of 1."""
    for axis in range(array.ndim):
        first = array.take([0], axis)
        if np.array_equal(np.broadcast_to(first, array.shape), array):
            array = first
    return np.ascontiguousarray(array)
