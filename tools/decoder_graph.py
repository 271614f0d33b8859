"""The graph of a small decoder as exporters write it, around weights that are given.

Blocks of attention and two layers, each after a normalisation, as in GPT-2 (Radford et al.
2019), with keys, queries and values from three layers. The table of tokens is also the output
layer, through a Transpose. Inputs and outputs are those of a generation loop: token ids, a mask
over past and present, positions, and keys and values of the past.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

__all__ = ["Sizes", "decoder_graph", "first_weights"]

Weights = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Sizes:
    """How large a decoder is."""

    tokens: int = 896
    positions: int = 128
    width: int = 80
    heads: int = 5
    blocks: int = 2


def first_weights(sizes: Sizes, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Draw weights to begin with, by the names that they have in the graph."""
    generator, width = np.random.default_rng(seed), sizes.width

    def normal(*shape: int, spread: float = 0.02) -> NDArray[np.float32]:
        return generator.normal(0, spread, shape).astype(np.float32)

    found = {
        "embed_tokens.weight": normal(sizes.tokens, width),
        "embed_positions.weight": normal(sizes.positions, width),
    }
    # What is added to the stream of states is smaller the more blocks add to it.
    added = 0.02 / np.sqrt(2 * sizes.blocks)
    for block in range(sizes.blocks):
        for name, (rows, columns, spread) in {
            "attn.q_proj": (width, width, 0.02),
            "attn.k_proj": (width, width, 0.02),
            "attn.v_proj": (width, width, 0.02),
            "attn.out_proj": (width, width, added),
            "fc1": (width, 4 * width, 0.02),
            "fc2": (4 * width, width, added),
        }.items():
            found[f"layers.{block}.{name}.weight"] = normal(rows, columns, spread=spread)
            found[f"layers.{block}.{name}.bias"] = np.zeros(columns, np.float32)
    norms = [f"layers.{b}.{name}" for b in range(sizes.blocks) for name in ("norm1", "norm2")]
    for name in (*norms, "final_norm"):
        found[f"{name}.weight"] = np.ones(width, np.float32)
        found[f"{name}.bias"] = np.zeros(width, np.float32)
    return found


class _Graph:
    """Nodes that are written one after another, named by where they stand."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, NDArray[Any]] = {}

    def op(self, kind: str, *inputs: Any, at: str, gives: str = "", **attributes: Any) -> str:
        """Write a node that gives one tensor; inputs that are no names become constants."""
        names = [self._named(value, f"/{at}/Constant") for value in inputs]
        output = gives or f"/{at}/{kind}_output_0"
        self.nodes.append(helper.make_node(kind, names, [output], f"/{at}/{kind}", **attributes))
        return output

    def _named(self, value: Any, name: str) -> str:
        if isinstance(value, str):
            return value
        array = np.asarray(value, None if isinstance(value, np.generic) else np.int64)
        while name in self.constants:
            name += "_"
        self.constants[name] = array
        return name

    def linear(self, x: str, name: str) -> str:
        """Write a layer as exporters do for states of three axes."""
        product = self.op("MatMul", x, f"{name}.weight", at=name.replace(".", "/"))
        return self.op("Add", product, f"{name}.bias", at=name.replace(".", "/"))

    def norm(self, x: str, name: str) -> str:
        """Write a normalisation."""
        inputs = (x, f"{name}.weight", f"{name}.bias")
        return self.op("LayerNormalization", *inputs, at=name.replace(".", "/"), axis=-1)


def decoder_graph(sizes: Sizes, weights: Weights) -> onnx.ModelProto:
    """Return a decoder with such weights, opset 18.

    Inputs are ``input_ids`` and ``position_ids`` (batch, length), ``attention_mask`` (batch,
    past + length), all int64, and for each block ``past_key_values.N.key`` and ``.value``
    (batch, heads, past, features). Outputs are ``logits`` (batch, length, tokens) and
    ``present.N.key`` and ``.value`` (batch, heads, past + length, features).
    """
    g = _Graph()
    tokens = g.op("Gather", "embed_tokens.weight", "input_ids", at="embed_tokens")
    places = g.op("Gather", "embed_positions.weight", "position_ids", at="embed_positions")
    x, hidden = g.op("Add", tokens, places, at="embed"), _hidden(g)
    for block in range(sizes.blocks):
        at = f"layers.{block}"
        attended = _attention(g, sizes, g.norm(x, f"{at}.norm1"), block, hidden)
        x = g.op("Add", x, attended, at=f"layers/{block}/residual1")
        inner = _gelu(g, g.linear(g.norm(x, f"{at}.norm2"), f"{at}.fc1"), f"layers/{block}/act")
        x = g.op("Add", x, g.linear(inner, f"{at}.fc2"), at=f"layers/{block}/residual2")
    turned = g.op("Transpose", "embed_tokens.weight", at="lm_head", perm=[1, 0])
    g.op("MatMul", g.norm(x, "final_norm"), turned, at="lm_head", gives="logits")
    return _model(g, sizes, weights)


def _hidden(g: _Graph) -> str:
    """Write what is added to scores: 0 where a token looks, else as good as minus infinity."""
    length, total = (
        g.op("Gather", g.op("Shape", name, at=f"mask/{name}"), 1, at=f"mask/{name}", axis=0)
        for name in ("input_ids", "attention_mask")
    )
    past = g.op("Sub", total, length, at="mask/past")
    keys = g.op("Range", 0, total, 1, at="mask/keys")
    queries = g.op("Range", past, total, 1, at="mask/queries")
    column = g.op("Unsqueeze", queries, [1], at="mask/queries")
    before = g.op("LessOrEqual", keys, column, at="mask/causal")
    given = g.op("Cast", "attention_mask", at="mask/given", to=TensorProto.BOOL)
    given = g.op("Unsqueeze", given, [1, 2], at="mask/given")
    seen = g.op("And", before, given, at="mask")
    return g.op("Where", seen, np.float32(0), np.float32(-1e9), at="mask")


def _attention(g: _Graph, sizes: Sizes, x: str, block: int, hidden: str) -> str:
    """Write attention; keys and values are joined to those of the past."""
    at, features = f"layers/{block}/attn", sizes.width // sizes.heads
    parts = {}
    for part in "qkv":
        states = g.linear(x, f"layers.{block}.attn.{part}_proj")
        states = g.op("Reshape", states, [0, 0, sizes.heads, features], at=f"{at}/{part}")
        parts[part] = g.op("Transpose", states, at=f"{at}/{part}", perm=[0, 2, 1, 3])
    for part, name in (("k", "key"), ("v", "value")):
        past, present = f"past_key_values.{block}.{name}", f"present.{block}.{name}"
        inputs = (past, parts[part])
        parts[part] = g.op("Concat", *inputs, at=f"{at}/{part}", gives=present, axis=2)
    keys = g.op("Transpose", parts["k"], at=f"{at}/scores", perm=[0, 1, 3, 2])
    queries = g.op("Mul", parts["q"], np.float32(features**-0.5), at=f"{at}/scale")
    scores = g.op("MatMul", queries, keys, at=f"{at}/scores")
    scores = g.op("Add", scores, hidden, at=f"{at}/scores")
    shares = g.op("Softmax", scores, at=f"{at}/shares", axis=-1)
    mixed = g.op("MatMul", shares, parts["v"], at=f"{at}/mix")
    mixed = g.op("Transpose", mixed, at=f"{at}/mix", perm=[0, 2, 1, 3])
    mixed = g.op("Reshape", mixed, [0, 0, sizes.width], at=f"{at}/mix")
    return g.linear(mixed, f"layers.{block}.attn.out_proj")


def _gelu(g: _Graph, x: str, at: str) -> str:
    """Write the activation of Hendrycks and Gimpel 2016 in the nodes of opsets before 20."""
    error = g.op("Erf", g.op("Div", x, np.float32(np.sqrt(2)), at=at), at=at)
    shifted = g.op("Add", error, np.float32(1), at=at)
    halved = g.op("Mul", x, shifted, at=at)
    return g.op("Mul", halved, np.float32(0.5), at=f"{at}/half")


def _model(g: _Graph, sizes: Sizes, weights: Weights) -> onnx.ModelProto:
    def value(name: str, kind: int, *shape: int | str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    def cache(kind: str, length: str) -> list[onnx.ValueInfoProto]:
        shape = ("batch", sizes.heads, length, sizes.width // sizes.heads)
        names = [f"{kind}.{b}.{part}" for b in range(sizes.blocks) for part in ("key", "value")]
        return [value(name, TensorProto.FLOAT, *shape) for name in names]

    total, integer = "past_length + length", TensorProto.INT64
    inputs = [
        value("input_ids", integer, "batch", "length"),
        value("attention_mask", integer, "batch", total),
        value("position_ids", integer, "batch", "length"),
        *cache("past_key_values", "past_length"),
    ]
    logits = value("logits", TensorProto.FLOAT, "batch", "length", sizes.tokens)
    arrays = {**weights, **g.constants}
    stored = [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()]
    graph = helper.make_graph(
        g.nodes, "decoder", inputs, [logits, *cache("present", total)], stored
    )
    opset = [helper.make_opsetid("", 18)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=8, producer_name="cobla-onnx")
    onnx.checker.check_model(model, full_check=True)
    return model
