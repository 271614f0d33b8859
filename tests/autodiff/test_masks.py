"""Mask gradients against the contraction of the dense gradient, for every scheme."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from cobla_onnx.autodiff.gradient import GradientGraph, differentiate
from cobla_onnx.autodiff.masks import MaskedWeight
from cobla_onnx.graph.layers import Layer, find_layers, read_weight
from cobla_onnx.runtime.session import open_session, run_session
from cobla_onnx.variants.low_rank.matricisation import Scheme, schemes_for
from cobla_onnx.variants.low_rank.nodes import factor_nodes
from tests.builders import model_of, random_array

node = helper.make_node


def factors(weight: np.ndarray, scheme: Scheme, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Matrix factors (groups, rows, rank) and (groups, rank, columns)."""
    left, values, right = np.linalg.svd(scheme.matrix(weight), full_matrices=False)
    return left[:, :, :rank] * values[:, None, :rank], right[:, :rank]


def masked(model: onnx.ModelProto, layer: Layer, scheme: Scheme, rank: int) -> tuple[Any, ...]:
    """MaskedWeight of a layer, its feeds and its matrix factors."""
    left, right = factors(read_weight(model, layer), scheme, rank)
    first, second = scheme.fold(left, right)
    names = f"first/{layer.source}", f"second/{layer.source}"
    pairs = factor_nodes(model, layer, scheme, *names)
    mask = MaskedWeight(layer.source, *names, first.shape, second.shape, pairs)
    feeds = {n: np.ascontiguousarray(a) for n, a in zip(names, (first, second), strict=True)}
    return mask, feeds, left, right


def run(graph: GradientGraph, feeds: dict[str, np.ndarray]) -> dict[str, Any]:
    return run_session(open_session(graph.model, 1, optimized=True), feeds)


def network() -> onnx.ModelProto:
    """Convolutions of all kinds, then products."""
    nodes = [
        node("Conv", ["x", "w1"], ["c1"], strides=[2, 1], pads=[1, 2, 0, 1]),
        node("Sigmoid", ["c1"], ["s1"]),
        node("Conv", ["s1", "w2", "b2"], ["c2"], group=2, dilations=[1, 2], pads=[1, 0, 1, 1]),
        node("Tanh", ["c2"], ["s2"]),
        node("Conv", ["s2", "w3"], ["c3"]),
        node("Conv", ["c3", "w3"], ["c4"]),
        node("GlobalAveragePool", ["c4"], ["g"]),
        node("Flatten", ["g"], ["f"]),
        node("Gemm", ["f", "w4", "b4"], ["d"], transB=1),
        node("Tanh", ["d"], ["t"]),
        node("MatMul", ["t", "w5"], ["y"]),
    ]
    weights = {
        "w1": random_array(6, 4, 3, 3, seed=1) / 4,
        "w2": random_array(8, 3, 3, 2, seed=2) / 4,
        "b2": random_array(8, seed=3),
        "w3": random_array(8, 8, 1, 1, seed=4) / 2,
        "w4": random_array(7, 8, seed=5),
        "b4": random_array(7, seed=6),
        "w5": random_array(7, 5, seed=7),
    }
    return model_of(nodes, weights, {"x": ["N", 4, 9, 8]}, ["y"])


@pytest.mark.parametrize("kind", ["spatial-hw", "spatial-wh", "channel", "input"])
def test_masks_of_all_schemes(kind):
    model, batch = network(), 3
    layers = find_layers(model).layers
    assert [layer.source for layer in layers] == ["w1", "w2", "w3", "w4", "w5"]
    chosen = [
        next((s for s in schemes_for(layer) if s.name == kind), schemes_for(layer)[0])
        for layer in layers
    ]
    parts = [masked(model, la, s, 3) for la, s in zip(layers, chosen, strict=True)]
    weights = {layer.source: read_weight(model, layer) for layer in layers}
    feeds = {"x": random_array(batch, 4, 9, 8), "target/y": random_array(batch, 5, seed=9)}
    for part in parts:
        feeds |= part[1]

    def gradients(size: int) -> GradientGraph:
        return differentiate(
            model,
            {"y": "logits"},
            list(weights),
            masks=[part[0] for part in parts],
            input_shapes={"x": [size, 4, 9, 8]},
        )

    whole, single = gradients(batch), gradients(1)
    together = run(whole, {**feeds, **weights})
    apart = [
        run(single, {**feeds, **weights, **{n: feeds[n][i : i + 1] for n in ("x", "target/y")}})
        for i in range(batch)
    ]
    for layer, scheme, (_, _, left, right) in zip(layers, chosen, parts, strict=True):
        name = layer.source
        found = together[whole.mask_gradients[name]]
        groups, rank = left.shape[0], left.shape[2]
        assert found.shape == (batch, groups * rank)
        for sample, alone in enumerate(apart):
            dense = scheme.matrix(alone[single.gradients[name]])
            expected = np.einsum("gij,gir,grj->gr", dense, left, right).reshape(-1)
            np.testing.assert_allclose(found[sample], expected, rtol=1e-3, atol=1e-5)
            np.testing.assert_allclose(
                alone[single.mask_gradients[name]][0], expected, rtol=1e-3, atol=1e-5
            )


@pytest.mark.parametrize("kind", ["spatial-hw", "spatial-wh", "channel", "input"])
def test_layers_that_run_through_their_factors(kind):
    """As the dense weight at the same masks: losses, and gradients by every mask."""
    model, batch = network(), 2
    layers = find_layers(model).layers
    generator = np.random.default_rng(0)
    feeds = {"x": random_array(batch, 4, 9, 8), "target/y": random_array(batch, 5, seed=9)}
    weights, beside, through, given = {}, [], [], {}
    for layer in layers:
        schemes = schemes_for(layer)
        scheme = next((s for s in schemes if s.name == kind), schemes[0])
        mask, factors_, left, right = masked(model, layer, scheme, 3)
        feeds |= factors_
        groups = left.shape[0]
        values = generator.uniform(0, 1, (groups, 3)).astype(np.float32)
        weights[layer.source] = scheme.weight((left * values[:, None]) @ right).astype(np.float32)
        given[f"mask/{layer.source}"] = values.reshape(-1)
        beside.append(mask)
        through.append(replace(mask, mask=f"mask/{layer.source}"))
    shapes = {"input_shapes": {"x": [batch, 4, 9, 8]}}
    dense = differentiate(model, {"y": "logits"}, masks=beside, **shapes)
    factored = differentiate(model, {"y": "logits"}, masks=through, **shapes)
    assert not {v.name for v in factored.model.graph.input} & set(weights)
    expected, found = run(dense, {**feeds, **weights}), run(factored, {**feeds, **given})
    np.testing.assert_allclose(found[factored.loss], expected[dense.loss], rtol=1e-4)
    for name in weights:
        actual = found[factored.mask_gradients[name]]
        assert np.abs(actual).max() > 0
        np.testing.assert_allclose(
            actual, expected[dense.mask_gradients[name]], rtol=1e-3, atol=1e-5
        )


def test_transposed_convolution_through_its_factors():
    nodes = [node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 1], pads=[1, 0, 0, 1])]
    model = model_of(nodes, {"w": random_array(4, 5, 3, 3)}, {"x": [2, 4, 5, 5]}, ["y"])
    (layer,) = find_layers(model).layers
    target = random_array(*shape_of(model), seed=3)
    for scheme in schemes_for(layer):
        mask, feeds, *_ = masked(model, layer, scheme, 3)
        graph = differentiate(model, {"y": "mse"}, masks=[replace(mask, mask="m")])
        feeds |= {"x": random_array(2, 4, 5, 5, seed=1), "target/y": target}
        feeds |= {"power/y": np.float32(1)[...]}

        def loss(m: np.ndarray, graph: GradientGraph = graph, feeds: Any = feeds) -> Any:
            found = run(graph, {**feeds, "m": m.astype(np.float32)})
            return found[graph.loss], found[graph.mask_gradients["w"]]

        middle = np.array([0.2, 0.7, 0.4])
        _, slope = loss(middle)
        for j in range(3):
            step = np.eye(3)[j] * 0.05
            difference = (loss(middle + step)[0] - loss(middle - step)[0]) / 0.1
            np.testing.assert_allclose(slope[:, j], difference, rtol=2e-3, atol=1e-4)


def shape_of(model: onnx.ModelProto) -> tuple[int, ...]:
    inferred = onnx.shape_inference.infer_shapes(model)
    return tuple(d.dim_value for d in inferred.graph.output[0].type.tensor_type.shape.dim)


def test_rows_that_were_flattened_belong_to_their_sample():
    nodes = [
        node("Reshape", ["x", "shape"], ["rows"]),
        node("MatMul", ["rows", "w"], ["p"]),
        node("Reshape", ["p", "back"], ["y"]),
    ]
    shapes = {"shape": np.array([-1, 4]), "back": np.array([2, -1])}
    weights = {"w": random_array(4, 3), **shapes}
    model = model_of(nodes, weights, {"x": [2, 5, 4]}, ["y"])
    (layer,) = find_layers(model).layers
    (scheme,) = schemes_for(layer)
    mask, feeds, left, right = masked(model, layer, scheme, 2)
    graph = differentiate(model, {"y": "mse"}, masks=[mask])
    x, target = random_array(2, 5, 4, seed=1), random_array(2, 15, seed=2)
    feeds |= {"x": x, "w": weights["w"], "target/y": target, "power/y": np.float32(2)[...]}
    found = run(graph, feeds)[graph.mask_gradients["w"]]
    dy = 2 * ((x @ weights["w"]).reshape(2, 15) - target) / (15 * 2.0)
    dense = np.einsum("npi,npj->nij", x, dy.reshape(2, 5, 3))
    expected = np.einsum("nij,ir,rj->nr", dense, left[0], right[0])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
