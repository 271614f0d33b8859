"""What layers saw: patches against onnxruntime, errors against what factors really lose."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from cobla_onnx import Budget, compress
from cobla_onnx.calibration.moment import Moment
from cobla_onnx.calibration.moments import collect_moments
from cobla_onnx.calibration.patches import patch_of
from cobla_onnx.calibration.statistics import Seen
from cobla_onnx.calibration.sums import JointSum, MomentSum
from cobla_onnx.errors import DataError, ModelError
from cobla_onnx.graph.layers import Layer, find_layers, read_bias, read_weight
from cobla_onnx.runtime.pool import Pool
from cobla_onnx.runtime.session import open_session, run_session
from cobla_onnx.variants.low_rank.from_data import FactorsFromData
from cobla_onnx.variants.low_rank.matricisation import schemes_for
from cobla_onnx.variants.low_rank.shrinkage import FLOOR
from cobla_onnx.variants.low_rank.svd import factorize
from tests.builders import model_of, random_array
from tests.spectra import spectrum


def conv_model(
    kernel: tuple[int, ...],
    *,
    group: int = 1,
    channels: int = 3,
    outputs: int = 5,
    bias: bool = True,
    **attributes: object,
) -> onnx.ModelProto:
    weights = {"w": random_array(group * outputs, channels, *kernel, seed=1)}
    names = ["x", "w"]
    if bias:
        weights["b"] = random_array(group * outputs, seed=2)
        names.append("b")
    node = helper.make_node("Conv", names, ["y"], "conv", group=group, **attributes)
    size: list[int | str] = ["N", group * channels, *[9] * len(kernel)]
    return model_of([node], weights, {"x": size}, ["y"])


def product_model(kind: str, **flags: int) -> onnx.ModelProto:
    right = kind != "matmul left"
    inputs: list[int | str] = [4, 7] if flags.get("transA" if right else "transB") else [7, 4]
    if not right:
        inputs = inputs[::-1]
    wide = [4, 5] if right else [5, 4]
    if flags.get("transB" if right else "transA"):
        wide = wide[::-1]
    operator = "MatMul" if kind.startswith("matmul") else "Gemm"
    operands = ["x", "w"] if right else ["w", "x"]
    node = helper.make_node(operator, operands, ["y"], "product", **flags)
    return model_of([node], {"w": random_array(*wide, seed=1)}, {"x": inputs}, ["y"])


def only_layer(model: onnx.ModelProto) -> Layer:
    (layer,) = find_layers(model).layers
    return layer


def data_for(model: onnx.ModelProto, seed: int = 3, batch: int = 6) -> dict[str, np.ndarray]:
    value = model.graph.input[0]
    dims = [d.dim_value or batch for d in value.type.tensor_type.shape.dim]
    # A mean that is not zero, so that centring makes a difference.
    return {value.name: random_array(*dims, seed=seed) + np.float32(0.5)}


def check_patches(model: onnx.ModelProto) -> None:
    """Rows of the weight times the patches are the outputs, position by position."""
    layer = only_layer(model)
    feeds = data_for(model)
    patch = patch_of(model, layer, layer.uses[0])
    output = run_session(open_session(model, 1), feeds)["y"]
    vectors = np.concatenate(list(patch.vectors(feeds["x"])), axis=2)
    rows = schemes_for(layer)[0].rows_of(read_weight(model, layer))
    expected = patch.outputs(output)
    bias = read_bias(model, layer)
    if bias is not None:
        expected = expected - bias.reshape(*expected.shape[:2], 1)
    assert vectors.shape[1] == patch.size
    np.testing.assert_allclose(rows @ vectors, expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(schemes_for(layer)[0].weight_of(rows), read_weight(model, layer))


@given(
    kernel=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    group=st.integers(1, 2),
    padding=st.sampled_from(["NOTSET", "uneven", "SAME_UPPER", "SAME_LOWER", "VALID"]),
)
@settings(max_examples=40, deadline=None)
def test_patches_of_convolutions(kernel, stride, dilation, group, padding):
    n = len(kernel)
    attributes: dict[str, object] = {"strides": [stride] * n, "dilations": [dilation] * n}
    if padding == "uneven":
        attributes["pads"] = [1] * n + [2] * n
    elif padding != "NOTSET":
        attributes["auto_pad"] = padding
    if padding.startswith("SAME"):
        attributes["dilations"] = [1] * n
    check_patches(conv_model(tuple(kernel), group=group, **attributes))


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("matmul", {}),
        ("matmul left", {}),
        ("gemm", {}),
        ("gemm", {"transB": 1}),
        ("gemm", {"transA": 1}),
        ("gemm", {"transA": 1, "transB": 1}),
    ],
)
def test_patches_of_products(kind, flags):
    check_patches(product_model(kind, **flags))


def test_a_stack_of_matrices_has_a_moment_each():
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "product")
    weights = {"w": random_array(3, 4, 5)}
    check_patches(model_of([node], weights, {"x": [2, 3, 7, 4]}, ["y"]))


def test_large_batches_are_cut_into_chunks(monkeypatch):
    monkeypatch.setattr("cobla_onnx.graph.operators.patches.CHUNK", 100)
    check_patches(conv_model((3, 3), pads=[1, 1, 1, 1]))
    check_patches(product_model("gemm"))


def test_moments_do_not_depend_on_batches_or_groups():
    model = conv_model((3, 3), group=2)
    layer = only_layer(model)
    patch = patch_of(model, layer, layer.uses[0])
    data = data_for(model, batch=12)["x"]

    def moment(size: int, limit: int) -> Moment:
        def batches():
            return ({"x": data[i : i + size]} for i in range(0, 12, size))

        store = collect_moments(model, [patch, patch], batches, pool=Pool(), limit=limit)
        return store.get([patch])

    whole, parts = moment(12, 1 << 30), moment(5, 1)
    vectors = np.concatenate(list(patch.vectors(data)), axis=2).astype(np.float64)
    for found in (whole, parts):
        assert found.count == vectors.shape[2]
        np.testing.assert_allclose(found.mean, vectors.mean(axis=2), rtol=1e-10, atol=1e-12)
        expected = vectors @ vectors.swapaxes(1, 2) / found.count
        np.testing.assert_allclose(found.second, expected, rtol=1e-10, atol=1e-12)


def test_many_samples_need_few_positions_of_each_and_parts_of_them_the_same_ones():
    model = conv_model((3, 3))
    layer = only_layer(model)
    data = random_array(6, *data_for(model, batch=1)["x"].shape[1:-2], 20, 20)
    positions = 18 * 18

    def seen(samples: int | None) -> Seen:
        return Seen(model, [layer], lambda: [{"x": data}], samples=samples)

    assert seen(None).moment(layer).count == 6 * positions
    many = seen(10_000)
    assert many.moment(layer).count == 6 * 64
    half = many.in_others([layer], lambda: [{"x": data[:3]}])
    other = many.in_others([layer], lambda: [{"x": data[3:]}])
    rest = many.without(half).moment(layer)
    assert rest.count == 3 * 64
    np.testing.assert_allclose(rest.second, other.moment(layer).second, rtol=1e-9, atol=1e-12)


def test_uses_of_a_shared_weight_are_seen_together():
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "one"),
        helper.make_node("MatMul", ["a", "w"], ["y"], "two"),
    ]
    model = model_of(nodes, {"w": random_array(4, 4)}, {"x": ["N", 4]}, ["y"])
    layer = only_layer(model)
    data = random_array(50, 4, seed=7)
    patches = [patch_of(model, layer, use) for use in layer.uses]
    store = collect_moments(model, patches, lambda: iter([{"x": data}]), pool=Pool())
    both = np.concatenate([data, data @ random_array(4, 4)]).astype(np.float64)
    found = store.get(patches)
    assert found.count == 100
    np.testing.assert_allclose(found.second[0], both.T @ both / 100, rtol=1e-5)


def real_loss(model: onnx.ModelProto, seen: Seen, scheme, rank: int, feeds) -> float:
    """Squared relative error of the layer's output, by running it."""
    layer = only_layer(model)
    (found,) = FactorsFromData(seen).approximate(layer, scheme, [rank])
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    tensors = {"w": found.weight} | ({} if found.bias is None else {"b": found.bias})
    for tensor in changed.graph.initializer:
        if tensor.name in tensors:
            array = np.asarray(tensors[tensor.name], np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    before = run_session(open_session(model, 1), feeds)["y"].astype(np.float64)
    after = run_session(open_session(changed, 1), feeds)["y"].astype(np.float64)
    if layer.bias is not None:
        power = np.square(before - before.mean(axis=(0, *range(2, before.ndim)), keepdims=True))
    else:
        power = np.square(before)
    return float(np.square(before - after).sum() / power.sum())


@pytest.fixture
def samples_alone(monkeypatch):
    """Moments as the samples make them, but for the floor."""

    def least(second, prior, effective, mean):
        return np.full(len(second), FLOOR)

    monkeypatch.setattr("cobla_onnx.variants.low_rank.shrinkage.shrinkage", least)


@pytest.mark.usefixtures("samples_alone")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("kernel", "group", "extra"),
    [
        ((3, 3), 1, {"pads": [1, 1, 1, 1]}),
        ((3, 3), 2, {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
        ((1, 1), 1, {}),
        ((3,), 1, {"pads": [1, 1]}),
    ],
)
def test_stated_errors_are_the_measured_ones(kernel, group, extra, bias):
    model = conv_model(kernel, group=group, channels=6, outputs=7, bias=bias, **extra)
    layer = only_layer(model)
    feeds = data_for(model, batch=20)
    seen = Seen(model, [layer], lambda: iter([feeds]))
    weight = read_weight(model, layer)
    for scheme in schemes_for(layer):
        full_rank = min(scheme.matrix_shape()[1:])
        found = spectrum(FactorsFromData(seen), layer, scheme, weight, full_rank)
        assert found is not None
        # Ranks at which the error is computed and not interpolated.
        for rank in {1, full_rank - 1, full_rank} - {0}:
            stated = found[1][rank]
            measured = real_loss(model, seen, scheme, rank, feeds)
            if rank == full_rank:
                assert measured < 1e-9
            elif rank == 1 or scheme.offsets == 1:
                assert measured == pytest.approx(stated, rel=1e-3, abs=1e-7), scheme.name
        values = found[0]
        assert (np.diff(values) <= 1e-9 * values[0]).all()
        if scheme.offsets > 1:
            # The discarded energy bounds the error, with one term for each offset.
            energy = np.square(values)
            outputs = run_session(open_session(model, 1), feeds)["y"]
            axes = (0, *range(2, outputs.ndim))
            power = float(np.square(outputs - outputs.mean(axes, keepdims=True)).sum())
            count = outputs[:, 0].size
            if bias:
                bound = scheme.offsets * energy[1:].sum() * count / power
                assert real_loss(model, seen, scheme, 1, feeds) <= bound * (1 + 1e-6)


@pytest.mark.usefixtures("samples_alone")
def test_weighted_factors_beat_plain_ones_and_wide_layers_agree():
    model = conv_model((3, 3), channels=6, outputs=7)
    layer = only_layer(model)
    mixing = random_array(6, 6, seed=9) * np.linspace(0.05, 2, 6)[:, None].astype(np.float32)
    data = np.einsum("ncij,cd->ndij", random_array(20, 6, 9, 9, seed=8), mixing)
    feeds = {"x": data.astype(np.float32)}
    scheme = schemes_for(layer)[0]
    assert scheme.name == "channel"
    seen = Seen(model, [layer], lambda: iter([feeds]))
    wide = Seen(model, [layer], lambda: iter([feeds]), wide=5)
    assert wide.is_wide(layer)
    assert not seen.is_wide(layer)
    weight = read_weight(model, layer)
    for one, other in zip(
        spectrum(FactorsFromData(seen), layer, scheme, weight, 7),
        spectrum(FactorsFromData(wide), layer, scheme, weight, 7),
        strict=True,
    ):  # fmt: skip
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6 * one[0])
    (a,), (b,) = (FactorsFromData(s).approximate(layer, scheme, [3]) for s in (seen, wide))
    np.testing.assert_allclose(a.weight, b.weight, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(a.bias, b.bias, rtol=1e-3, atol=1e-4)
    assert spectrum(FactorsFromData(wide), layer, schemes_for(layer)[2], weight, 7) is None
    u, s, v = np.linalg.svd(weight.reshape(7, -1), full_matrices=False)
    plain = (u[:, :3] * s[:3]) @ v[:3]
    patch = patch_of(model, layer, layer.uses[0])
    total = MomentSum(1, patch.size)
    for vectors in patch.vectors(feeds["x"]):
        total.add(vectors)
    second = total.moment().second[0]
    lost = [
        np.trace(d @ second @ d.T)
        for d in (weight.reshape(7, -1) - m.reshape(7, -1) for m in (plain, a.weight))
    ]
    assert lost[1] < lost[0]


def test_dead_inputs_leave_the_weight_to_be_approximated():
    model = conv_model((3, 3))
    layer = only_layer(model)
    feeds = {"x": np.zeros((2, 3, 9, 9), np.float32)}
    seen = Seen(model, [layer], lambda: iter([feeds]))
    weight = read_weight(model, layer)
    for scheme in schemes_for(layer):
        _, errors = spectrum(FactorsFromData(seen), layer, scheme, weight, 3)
        (found,) = FactorsFromData(seen).approximate(layer, scheme, [2])
        alone = factorize(scheme.matrix(weight), 2)
        expected = scheme.weight(alone.left @ alone.right)
        np.testing.assert_allclose(found.weight, expected, atol=1e-5)
        lost = np.square(weight - expected).sum() / np.square(weight).sum()
        if scheme.offsets == 1:
            assert errors[2] == pytest.approx(lost, rel=1e-4)


@given(
    groups=st.integers(1, 2),
    size=st.integers(1, 6),
    outputs=st.integers(1, 6),
    split=st.integers(0, 4),
    seed=st.integers(0, 99),
)
def test_joint_moments_are_blocks_of_the_moment_of_stacked_vectors(
    groups: int, size: int, outputs: int, split: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    samples, each = 5, 3
    pairs = rng.normal(size=(groups, size + outputs, samples * each)) + 1.0
    stacked = MomentSum(groups, size + outputs)
    stacked.add(pairs, each)
    sums = JointSum(groups, size, outputs), JointSum(groups, size, outputs)
    for total, part in zip(sums, np.split(pairs, [split * each], axis=2), strict=True):
        total.add(part[:, :size], part[:, size:], each)
    sums[0].merge(sums[1])
    found, whole = sums[0].joint(), stacked.moment()
    np.testing.assert_allclose(found.inputs.second, whole.second[:, :size, :size])
    np.testing.assert_allclose(found.cross, whole.second[:, size:, :size])
    np.testing.assert_allclose(found.covariance(), whole.covariance()[:, size:, :size], atol=1e-12)
    np.testing.assert_allclose(np.hstack([found.inputs.mean, found.mean]), whole.mean)
    assert found.inputs.count == samples * each


@given(
    groups=st.integers(1, 2),
    size=st.integers(1, 6),
    outputs=st.integers(1, 6),
    scale=st.sampled_from([1e-3, 1.0, 1e4]),
    all_of_them=st.sampled_from([1e-25, 1.0, 1e30]),
    seed=st.integers(0, 99),
)
def test_products_in_single_precision_err_by_its_rounding(
    groups: int, size: int, outputs: int, scale: float, all_of_them: float, seed: int
) -> None:
    """Relative to the vectors' lengths, however different those of the entries are."""
    rng = np.random.default_rng(seed)
    inputs = (rng.normal(size=(groups, size, 40)) + 1.0).astype(np.float32)
    inputs[:, 0] *= scale
    inputs *= np.float32(all_of_them)
    wanted = rng.normal(size=(groups, outputs, 40)).astype(np.float32)
    sums = [JointSum(groups, size, outputs, exact) for exact in (True, False)]
    for total in sums:
        total.add(inputs[:, :, :15], wanted[:, :, :15], 5)
        total.add(inputs[:, :, 15:], wanted[:, :, 15:], 5)
    exact, rounded = (total.joint() for total in sums)
    lengths, its = (np.sqrt(np.square(v, dtype=float).mean(axis=2)) for v in (inputs, wanted))
    for found, known, size_of in (
        (rounded.inputs.second, exact.inputs.second, lengths[:, :, None] * lengths[:, None, :]),
        (rounded.cross, exact.cross, its[:, :, None] * lengths[:, None, :]),
    ):
        assert (np.abs(found - known) <= 1e-6 * size_of).all()
    np.testing.assert_array_equal(rounded.inputs.mean, exact.inputs.mean)
    np.testing.assert_array_equal(rounded.mean, exact.mean)
    np.testing.assert_allclose(rounded.inputs.effective, exact.inputs.effective, rtol=1e-3)


@given(
    groups=st.integers(1, 2),
    size=st.integers(1, 5),
    outputs=st.integers(1, 4),
    seed=st.integers(0, 99),
    biased=st.booleans(),
    weighted=st.booleans(),
)
def test_errors_of_maps_follow_from_joint_moments(
    groups: int, size: int, outputs: int, seed: int, biased: bool, weighted: bool
) -> None:
    """All errors lack the same part, that of a map to nothing."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(groups, size, 12)) + 1.0
    wanted = rng.normal(size=(groups, outputs, 12)) - 2.0
    sums = JointSum(groups, size, outputs)
    sums.add(inputs, wanted)
    rows = rng.normal(size=(groups, outputs, size))
    bias = rng.normal(size=groups * outputs) if biased else None
    importance = rng.uniform(0.1, 2.0, groups * outputs) if weighted else None
    missed = wanted - rows @ inputs
    if bias is not None:
        missed -= bias.reshape(groups, outputs, 1)
    counted = np.ones((groups, outputs, 1))
    if importance is not None:
        counted = importance.reshape(groups, outputs, 1)
    expected = (counted * (np.square(missed) - np.square(wanted))).sum() / 12
    found = sums.joint().squared_error(rows, bias, importance)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


@given(groups=st.integers(1, 2), size=st.integers(1, 6), seed=st.integers(0, 99))
def test_a_part_is_subtracted_from_a_moment(groups: int, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    part, rest = rng.normal(size=(groups, size, 12)) + 1.0, rng.normal(size=(groups, size, 8))
    rest[-1] *= seed % 3  # Sometimes nothing but zeros.
    sums = [MomentSum(groups, size) for _ in range(3)]
    for total, vectors in zip(sums, (part, rest, np.concatenate([part, rest], 2)), strict=True):
        total.add(vectors)
    first, second, both = (total.moment() for total in sums)
    found = both.without(first)
    np.testing.assert_allclose(found.second, second.second, atol=1e-11)
    np.testing.assert_allclose(found.mean, second.mean, atol=1e-12)
    assert found.count == 8
    assert not found.second[-1].any() or seed % 3
    np.testing.assert_array_equal(found.effective, first.effective)
    nothing = both.without(both)
    assert not nothing.second.any()
    assert not nothing.effective.any()


def test_an_infinite_bias_is_named_where_it_is_read():
    nodes = [
        onnx.helper.make_node("Gemm", ["x", "v", "b"], ["h"], "first"),
        onnx.helper.make_node("MatMul", ["h", "w"], ["z"], "second"),
        onnx.helper.make_node("Tanh", ["z"], ["gate"]),
        onnx.helper.make_node("Add", ["x", "gate"], ["y"]),
    ]
    bias = np.r_[np.inf, np.zeros(11)].astype(np.float32)
    weights = {"v": random_array(12, 12, seed=1), "w": random_array(12, 12, seed=2), "b": bias}
    model = model_of(nodes, weights, {"x": ["N", 12]}, ["y"])
    cause = r"tensor 'h': is not finite, and weight 'b' of node 'first' holds infinity; export"
    with pytest.raises(ModelError, match=cause):
        compress(model, Budget(mem=0.5), data={"x": random_array(40, 12, seed=3)}, threads=1)


def test_what_is_not_finite_within_the_model_is_named():
    """A mask hides it from the outputs, and the layer behind it sees it all the same."""
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "v"], ["h"], "first"),
        onnx.helper.make_node("Sqrt", ["h"], ["root"]),
        onnx.helper.make_node("MatMul", ["root", "w"], ["z"], "second"),
        onnx.helper.make_node("IsNaN", ["z"], ["gone"]),
        onnx.helper.make_node("Where", ["gone", "h", "z"], ["y"]),
    ]
    weights = {"v": random_array(12, 12, seed=1), "w": random_array(12, 12, seed=2)}
    model = model_of(nodes, weights, {"x": ["N", 12]}, ["y"])
    with pytest.raises(DataError, match=r"tensor 'root': is not finite .* exclude="):
        compress(model, Budget(mem=0.5), data={"x": random_array(40, 12, seed=3)}, threads=1)
