"""``cobla-onnx inspect`` and `cobla_onnx.inspect`."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import helper, parser

from cobla_onnx import Budget, compress, errors, inspect
from cobla_onnx.cli.parsing import layer_names
from cobla_onnx.graph.inventory import Reason
from cobla_onnx.report.inspection import sparkline
from cobla_onnx.report.sensitivity import COLUMNS
from tests.builders import model_of, random_array, small_network
from tests.cli.test_command import ROOT, run, run_here


@pytest.fixture(scope="module")
def found():
    return inspect(small_network(), threads=1)


def test_numbers_are_those_of_the_weights(found):
    by_name = {layer.name: layer for layer in found.layers}
    conv = by_name["conv2"]
    assert (conv.op, conv.shape, conv.params) == ("Conv", (24, 16, 3, 3), 24 * 16 * 9)
    assert conv.bytes == 4 * conv.params
    assert conv.macs == conv.params * 6 * 6
    (channel,) = [scheme for scheme in conv.schemes if scheme.name == "channel"]
    assert channel.break_even_memory == pytest.approx(conv.params / (16 * 9 + 24))
    assert channel.most == int(channel.break_even_memory)
    weight = next(t for t in small_network().graph.initializer if t.name == "w2")
    matrix = onnx.numpy_helper.to_array(weight).reshape(24, -1).astype(np.float64)
    values = np.linalg.svd(matrix, compute_uv=False)
    np.testing.assert_allclose(channel.singular_values, values / values[0], rtol=1e-3)
    energy = 1 - np.cumsum(values**2) / np.sum(values**2)
    assert channel.error_ranks["0.3"] == np.argmax(np.sqrt(energy.clip(0)) <= 0.3) + 1
    half = conv.params // 2 // (16 * 9 + 24)
    assert channel.half_error == pytest.approx(np.sqrt(energy[half - 1]), abs=1e-6)


def test_the_least_is_reachable_and_nothing_below(found):
    for name in ("mem", "mac"):
        least = found.least[name]
        for multiple in ("auto", 1):
            options = {"threads": 1, "rank_multiple": multiple, "solver": "milp"}
            result = compress(small_network(), Budget(**{name: least}), **options)
            assert result.report.budget[name].reached <= least
            with pytest.raises(errors.BudgetError):
                compress(small_network(), Budget(**{name: least - 0.01}), **options)


def test_what_is_left_alone_has_a_reason():
    nodes = [
        helper.make_node("Conv", ["x", "d"], ["a"], "depthwise", group=8, pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["a", "w"], ["y"], "wide"),
    ]
    weights = {"d": random_array(8, 1, 3, 3), "w": random_array(32, 8, 3, 3)}
    found = inspect(model_of(nodes, weights, {"x": [1, 8, 9, 9]}, ["y"]), threads=1)
    assert [(item.name, item.reason) for item in found.left_alone] == [
        ("depthwise", Reason.UNASKED.value)
    ]
    assert [layer.name for layer in found.layers] == ["wide"]


def test_unknown_macs_are_said_to_be_unknown():
    model = small_network()
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = "size"
    del model.graph.value_info[:]
    found = inspect(model, threads=1)
    assert found.mac_total is None
    assert set(found.least) == {"mem"}
    wanted = "MACs are not known; to count them fill in the ? of --input-shape x:1,3,?,?"
    assert wanted in found.notes


def test_spectra_with_data_are_those_of_outputs():
    data = {"x": random_array(12, 3, 12, 12, seed=8)}
    found = inspect(small_network(), data=data, threads=1)
    assert found.measured_by == "outputs"
    blind = inspect(small_network(), threads=1)
    assert found.layers[0].schemes[0].half_error != blind.layers[0].schemes[0].half_error


def test_sparklines():
    assert sparkline([]) == ""
    assert sparkline([1.0] * 50) == "█" * 10
    assert sparkline([1.0, 0.0]) == "█▁"


def test_the_command(demo_model, tmp_path):
    done = run("inspect", demo_model, "--exclude", "stage1/*")
    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "left alone: 2 x excluded by option" in done.stdout
    assert "least reachable: --mem" in done.stdout
    content = json.loads(run_here("inspect", demo_model, "--json").stdout)
    assert content["schema_version"] == 1
    assert len(content["layers"]) == 9
    assert content["mem_total"] == compress(demo_model, Budget(mem=1)).report.budget["mem"].before
    assert run_here("inspect", tmp_path / "missing.onnx").returncode == 2
    data = ROOT / "models" / "digits_calibration.npz"
    assert "on the data" in run_here("inspect", demo_model, "--data", data, "--samples", 20).stdout


@pytest.mark.parametrize(
    ("nodes", "stored", "reasons"),
    [
        (
            "d = DequantizeLinear(w, s) y = MatMul(x, d)",
            "int8[2, 2] w = {1, 2, 3, 4}, float s = {1}",
            r"1 x weight is quantised; bytes: 8 in DequantizeLinear\); compress the model before",
        ),
        (
            "q, s, z = DynamicQuantizeLinear(x) i = MatMulInteger(q, w, z) "
            "f = Cast <to = 1> (i) y = Mul(f, s)",
            "int8[2, 2] w = {1, 2, 3, 4}",
            r"1 x MatMulInteger: weight is quantised; bytes: 4 in .*\); compress the model before",
        ),
        (
            "a = Relu(w) b = Relu(r) y, h, c = LSTM <hidden_size = 1> (x, a, b)",
            "float[1, 4, 2] w = {1, 1, 1, 1, 1, 1, 1, 1}, float[1, 4, 1] r = {1, 1, 1, 1}",
            r"2 x weight is not constant; bytes: 48 in Relu\); only Conv",
        ),
    ],
)
def test_a_refusal_says_why_no_layer_can_be_cut(nodes, stored, reasons):
    rank = "T, N, 2" if "LSTM" in nodes else "N, 2"
    out = "T, D, N, 1" if "LSTM" in nodes else "N, 2"
    model = parser.parse_model(f"""
        <ir_version: 8, opset_import: ["": 17]>
        whole (float[{rank}] x) => (float[{out}] y) <{stored}> {{ {nodes} }}""")
    with pytest.raises(errors.BudgetError, match=reasons):
        compress(model, Budget(mem=0.7))


SAMPLES = {"x": random_array(24, 3, 12, 12, seed=5)}


@pytest.fixture(scope="module")
def sensitive():
    return inspect(small_network(), data=SAMPLES, sensitivity=True, threads=1)


def test_layers_are_in_the_order_of_their_loss_for_each_byte(sensitive):
    found = sensitive.sensitivity
    assert found.measured_by == "loss"
    assert found.samples > 0
    assert {layer.name for layer in found.layers} == {layer.name for layer in sensitive.layers}
    losses = [-1.0 if x.ranks is None else x.ranks.per_megabyte for x in found.layers]
    assert losses == sorted(losses, reverse=True)
    assert max(losses) > 0
    for layer in found.layers:
        for lever in ("ranks", "bits"):
            one = getattr(layer, lever)
            if one is not None:
                assert layer.bytes - one.saved <= found.kept[lever] * layer.bytes
                assert one.per_megabyte == pytest.approx(1e6 * one.loss / one.saved)


def test_the_loss_of_a_layer_without_data_is_its_weight_error():
    """By the spectrum that inspect shows: the energy beyond the rank."""
    found = inspect(small_network(), include=["conv2"], sensitivity=True, threads=1)
    (layer,), (inspected,) = found.sensitivity.layers, found.layers
    assert found.sensitivity.measured_by == "weights"
    name, rank = layer.ranks.variant.split()
    (scheme,) = [one for one in inspected.schemes if one.name == name]
    values = np.array(scheme.singular_values)
    beyond = (values[int(rank) :] ** 2).sum() / (values**2).sum()
    assert layer.ranks.loss == pytest.approx(beyond, rel=1e-2)


@pytest.mark.parametrize("data", [None, SAMPLES])
def test_all_else_is_as_without_sensitivities(data):
    plain = inspect(small_network(), data=data, threads=1)
    more = inspect(small_network(), data=data, threads=1, sensitivity=True)
    assert plain.sensitivity is None
    assert replace(more, sensitivity=None) == plain


def test_the_csv_says_what_to_exclude(tmp_path):
    model, table, few = (tmp_path / name for name in ("m.onnx", "layers.csv", "few.csv"))
    network = small_network()
    for node in network.graph.node:
        # A name with all that a CSV has to quote.
        node.name = node.name.replace("conv2", '@a, "b"[0]/*')
    onnx.save(network, model)
    done = run_here("inspect", model, "--csv", table)
    assert (done.returncode, "--sensitivity" in done.stderr) == (2, True)
    done = run_here("inspect", model, "--sensitivity", "--csv", table, "--json")
    assert done.returncode == 0, done.stderr
    rows = list(csv.reader(table.read_text().splitlines()))
    assert tuple(rows[0]) == COLUMNS
    names = [layer["name"] for layer in json.loads(done.stdout)["sensitivity"]["layers"]]
    assert [row[0] for row in rows[1:]] == names
    assert '@a, "b"[0]/*' in names
    few.write_text("".join(table.read_text().splitlines(keepends=True)[:3]))
    left = json.loads(run_here("inspect", model, "--exclude", f"@{few}", "--json").stdout)
    assert {layer["name"] for layer in left["layers"]} == set(names[2:])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"layer\n", "names no layer"),
        ("a.txt", b"\xff", "cannot be read"),
        ("b", None, ""),
    ],
)
def test_a_file_of_names_that_cannot_be_used_is_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(errors.UsageError, match=f"--exclude @.*{message}"):
        layer_names("--exclude", [f"@{tmp_path / name}"])


def test_names_stand_for_themselves_and_files_for_their_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo*\n")
    assert layer_names("--exclude", ["[@]x", f"@{tmp_path / 'a.txt'}"]) == ("[@]x", "one", "two*")
    (tmp_path / "b.txt").write_text("one\ntwo\n", encoding="utf-8-sig")
    assert layer_names("--exclude", [f"@{tmp_path / 'b.txt'}"]) == ("one", "two")
