"""Times of single layers in 8 bits, added up beside that of the whole model."""

from __future__ import annotations

import re

import numpy as np
import pytest

from cobla_onnx.graph.io.model_file import load_model
from cobla_onnx.graph.layers import find_layers
from cobla_onnx.latency.timing import Stopwatch
from tests.builders import small_network


class Counted(Stopwatch):
    """Takes a millisecond for each node that computes, ten for a call."""

    def times(self, models, feeds, *, seconds, least, most):
        row = []
        for model in models:
            kinds = [node.op_type for node in model.graph.node if node.op_type != "Identity"]
            pairs = sum(kind.endswith("Linear") for kind in kinds)
            row.append(0.01 + 1e-3 * (len(kinds) - pairs) + 1e-5 * pairs)
        return np.array([row] * least)


def test_layers_and_edges_are_added_up(tools):
    tool = tools("eight_bit_sums")
    model = small_network()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    floats, narrow, edges = tool.sums(model, Counted(1))
    assert len(find_layers(model).layers) == 3
    assert floats == pytest.approx(3 * 11.0)
    assert narrow > floats
    # Each layer's input and output, but for the model's own.
    assert edges == pytest.approx(4 * 0.01)


def test_the_whole_model_is_measured_beside_the_sums(tools, tmp_path, monkeypatch, capsys):
    tool = tools("eight_bit_sums")
    monkeypatch.setattr(tool, "Stopwatch", Counted)
    tool.main("digits", assets=tmp_path, wheels=tmp_path, threads=1)
    said = capsys.readouterr().out
    found = re.findall(r"^(?:by the sum|with a term|measured).*?: (-?[\d.]+)", said, re.MULTILINE)
    assert len(found) == 3
    assert float(found[1]) < float(found[0])
    nodes = len(load_model(tool.find_model(tool.TASKS[3], tmp_path, tmp_path)).graph.node)
    assert f"digits, 1 threads: {10 + nodes:.3g} ms" in said
