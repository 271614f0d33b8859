"""Layers in bodies: compressed like others, and proved each on data of its own."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from cobla_onnx import Budget, compress, inspect
from cobla_onnx.errors import BudgetError, UsageError, VerificationError
from cobla_onnx.graph.bodies import all_nodes
from cobla_onnx.graph.layers import find_layers, read_weight
from cobla_onnx.graph.macs import fixed_input_shapes
from cobla_onnx.graph.opening import opened
from cobla_onnx.pipeline.body_proof import checked, prove_in_bodies
from cobla_onnx.pipeline.verification import verify
from cobla_onnx.variants.low_rank.matricisation import schemes_for
from cobla_onnx.variants.low_rank.nodes import make_replacement
from cobla_onnx.variants.low_rank.svd import factorize
from cobla_onnx.variants.replacement import Replacement
from cobla_onnx.variants.rewrite import rewrite
from cobla_onnx.variants.storage.stored import half_weight
from tests.bodies import MODELS, choice, loop, recurrent
from tests.graph.test_opening import feeds_of, outputs_of

LEVELS = (
    onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
)


def replaced(model: onnx.ModelProto, rank: int | None = None, scheme: int = 0) -> list[Replacement]:
    """Factors of all layers, of full rank unless one is given."""
    result = []
    for layer in find_layers(model).layers:
        schemes = schemes_for(layer)
        chosen = schemes[scheme % len(schemes)]
        matrix = chosen.matrix(read_weight(model, layer))
        full = min(matrix.shape[1:])
        result.append(make_replacement(layer, chosen, factorize(matrix, min(rank or full, full))))
    return result


def run_at(model: onnx.ModelProto, level: onnxruntime.GraphOptimizationLevel, seed: int):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = level, 4
    content = model.SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return session.run(["y"], feeds_of(model, seed))[0]


@pytest.mark.parametrize("name", MODELS)
def test_at_full_rank_the_output_is_the_same_whatever_onnxruntime_does_to_the_graph(name):
    original = MODELS[name]()
    model = opened(original)
    for scheme in range(2):
        result = rewrite(model, replaced(model, None, scheme))
        onnx.checker.check_model(result, full_check=True)
        before, after = (Counter(n.op_type for n in all_nodes(m.graph)) for m in (model, result))
        assert after.total() - after["Constant"] > before.total() - before["Constant"]
        for level in LEVELS:
            for seed in range(3):
                expected = run_at(original, level, seed)
                np.testing.assert_allclose(run_at(result, level, seed), expected, atol=3e-5)


@settings(max_examples=12)
@given(st.sampled_from(sorted(MODELS)), st.integers(1, 8), st.integers(0, 2))
def test_any_rank_and_scheme_is_proved(name, rank, scheme):
    model = opened(MODELS[name]())
    replacements = replaced(model, rank, scheme)
    result = rewrite(model, replacements)
    found = verify(model, result, replacements, fixed_input_shapes(model, {}))
    assert 0 <= found.rewrite_max_error < 1e-5
    assert found.network_error is not None


@pytest.mark.parametrize("name", ["If", "Loop", "Scan", "nested"])
def test_a_wrong_factor_of_a_layer_in_a_body_is_found_also_where_its_branch_is_not_taken(name):
    model = opened(MODELS[name]())
    replacements = replaced(model, 4)
    for wrong in (r for r in replacements if r.layer.in_body):
        result = rewrite(model, replacements)
        assert prove_in_bodies(model, result, replacements, 1) < 1e-5
        stored = {tensor.name: tensor for tensor in result.graph.initializer}
        tensor = stored[f"{wrong.layer.name}/second_factor"]
        array = numpy_helper.to_array(tensor).copy()
        array.ravel()[0] += 1
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        with pytest.raises(VerificationError, match="differ from the dense weight"):
            prove_in_bodies(model, result, replacements, 1)


@pytest.mark.parametrize("precision", ["keep", "auto"])
@pytest.mark.parametrize("op", ["LSTM", "GRU", "RNN"])
def test_both_weights_of_a_recurrent_node_in_a_branch_are_proved(op, precision):
    model = recurrent(op)
    mem = 0.8 if precision == "keep" else 0.4
    result = compress(model, Budget(mem=mem), precision=precision, threads=1)
    changed = {d.layer.rsplit("/")[-1] for d in result.plan.decisions if d.scheme}
    assert changed == ({"W"} if precision == "keep" else {"W", "R"})
    for seed in range(3):
        before, after = (outputs_of(m, seed) for m in (model, result.model))
        assert np.abs(after - before).max() < (0.6 if precision == "keep" else 0.25)


@pytest.mark.parametrize("wrong", ["W", "R"])
def test_a_wrong_weight_of_a_recurrent_node_in_a_branch_is_found(wrong):
    model = opened(recurrent())
    layers = {layer.name[-1]: layer for layer in find_layers(model).layers}
    scheme = schemes_for(layers["W"])[0]
    factors = factorize(scheme.matrix(read_weight(model, layers["W"])), 6)
    pair = make_replacement(layers["W"], scheme, factors)
    halved = half_weight(layers["R"], read_weight(model, layers["R"]), None)
    replacements = [pair, halved]
    result = rewrite(model, replacements)
    assert prove_in_bodies(model, result, replacements, 1) < 1e-5
    tensor = next(
        t for t in result.graph.initializer if t.name.startswith(f"{layers[wrong].name}/")
        and len(t.dims) > 1
    )  # fmt: skip
    array = numpy_helper.to_array(tensor).copy()
    array.ravel()[:3] += 3
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    with pytest.raises(VerificationError, match="differ from the dense weight"):
        prove_in_bodies(model, result, replacements, 1)


@pytest.mark.parametrize("precision", ["keep", "auto"])
@pytest.mark.parametrize("name", MODELS)
def test_a_budget_reaches_layers_in_bodies(name, precision):
    model = MODELS[name]()
    mem = 0.7 if precision == "keep" else 0.4
    result = compress(model, Budget(mem=mem), precision=precision, threads=1)
    assert result.report.budget["mem"].reached <= mem
    onnx.checker.check_model(result.model, full_check=True)
    changed = {d.layer for d in result.plan.decisions if d.scheme}
    assert changed
    holders = [n.op_type for n in model.graph.node if n.op_type in ("If", "Loop", "Scan")]
    left = [n.op_type for n in result.model.graph.node if n.op_type in ("If", "Loop", "Scan")]
    assert left == holders
    again = inspect(result.model)
    assert again.least["mem"] <= 1
    assert not any(function.domain == "somebody" for function in result.model.functions)


@pytest.mark.parametrize(("mem", "precision"), [(0.8, "keep"), (0.4, (8,))])
def test_a_weight_that_the_main_graph_and_branches_read_is_proved_in_both(mem, precision):
    model = choice()
    model.graph.node[-1].input[1] = "shared"
    result = compress(model, Budget(mem=mem), precision=precision, threads=1)
    assert result.report.budget["mem"].reached <= mem
    prepared = opened(model)
    replacements = replaced(prepared, 4)
    (shared,) = [r for r in replacements if len(r.layer.uses) == 3]
    assert [use.holder is None for use in shared.layer.uses].count(True) == 1
    shapes = fixed_input_shapes(prepared, {})
    result = rewrite(prepared, replacements)
    assert verify(prepared, result, replacements, shapes).rewrite_max_error < 1e-5
    (last,) = [node for node in result.graph.node if "y" in node.output]
    # Factors of another layer, of the same size.
    last.input[1] = last.input[1].replace(shared.layer.name, replacements[0].layer.name)
    with pytest.raises(VerificationError, match="tensor 'y': its new nodes differ"):
        verify(prepared, result, replacements, shapes)


def test_new_nodes_that_overflow_are_said_to():
    values = {"y": np.array([1e38, 2.0], np.float32), "new": np.array([np.inf, 2], np.float32)}
    with pytest.raises(VerificationError, match=r"'y': its new nodes overflow .* by exclude="):
        checked(values, "y", "new", 1e-4)
    with pytest.raises(VerificationError, match="differ from the dense weight by inf"):
        checked(values, "new", "y", 1e-4)


def test_a_model_that_stays_as_it_is_is_what_was_given():
    for make in MODELS.values():
        model = make()
        result = compress(model, Budget(mem=1.0), threads=1)
        assert result.report.unchanged
        assert result.model.SerializeToString() == model.SerializeToString()


def test_names_of_layers_in_bodies_are_good_for_patterns_and_plans():
    left_out = compress(choice(), Budget(mem=0.8), exclude=["choice.then_branch/*"], threads=1)
    decided = {d.layer for d in left_out.plan.decisions}
    assert decided == {"choice.else_branch/hidden", "choice.else_branch/last", "outer"}
    again = compress(choice(), plan=left_out.plan, threads=1)
    assert again.model.SerializeToString() == left_out.model.SerializeToString()
    with pytest.raises(UsageError, match=r"did you mean choice\.else_branch/hidden"):
        compress(choice(), Budget(mem=0.8), exclude=["choice.else_branch/hiden"], threads=1)


def test_macs_in_bodies_are_counted_once_and_the_report_says_so():
    found = inspect(loop())
    # Step: 2 x 16 x 16; convolution: 2 samples, 16 channels, 16 places, 3 taps.
    assert found.mac_total == 2 * 16 * 16 + 2 * 16 * 16 * 3
    assert any("of one pass each" in note for note in found.notes)


@pytest.mark.parametrize("taken", [True, False])
def test_what_is_wrong_in_a_branch_is_found_though_the_inputs_take_the_other(taken):
    model = opened(choice())
    replacements = replaced(model, 4)
    result = rewrite(model, replacements)
    data = np.abs(feeds_of(model)["x"]) * np.float32(-1 if taken else 1)

    def batches():
        return [(1, {"x": data})]

    assert verify(model, result, replacements, {}, data=("held-back", batches)).outputs
    (holder,) = [node for node in result.graph.node if node.op_type == "If"]
    branch = next(a.g for a in holder.attribute if a.name.startswith("then") == taken)
    last = next(node for node in branch.node if branch.output[0].name in node.output)
    first = next(node for node in branch.node if last.input[0] in node.output)
    # The hidden layer is left out.
    inside = next(node for node in branch.node if first.input[0] in node.output)
    first.input[0] = inside.input[0]
    with pytest.raises(VerificationError):
        verify(model, result, replacements, {}, data=("held-back", batches))


def test_layers_whose_macs_are_not_known_count_for_bytes_alone():
    model = loop()
    body = model.graph.node[0].attribute[0].g
    for value in (body.input[2], *body.output[1:]):
        value.type.tensor_type.ClearField("shape")
    found = inspect(model)
    assert found.mac_total is None
    assert len(found.layers) == 2
    assert any("in bodies are not known, and not counted" in note for note in found.notes)
    assert compress(model, Budget(mem=0.8), threads=1).report.budget["mem"].reached <= 0.8
    unknown = (
        r"the MACs of 2 layers in bodies are not known, .* state the shapes of what the bodies"
    )
    with pytest.raises(BudgetError, match=unknown):
        compress(model, Budget(mac=0.8), threads=1)
