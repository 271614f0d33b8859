"""Growth with layers and samples: the models are what they are said to be, the tables add up."""

import numpy as np
import onnx
import onnxruntime
import pytest


@pytest.fixture
def growth(tools):
    return tools("benchmark_growth")


def test_a_chain_has_so_many_layers_and_runs(growth):
    model = growth.chain(3)
    onnx.checker.check_model(model, full_check=True)
    assert sum(node.op_type == "Conv" for node in model.graph.node) == 3
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (logits,) = session.run(None, {"x": np.ones((2, 32, 16, 16), np.float32)})
    assert logits.shape == (2, 10)
    assert np.isfinite(logits).all()


def test_tables_say_what_each_more_takes(growth):
    rows = {
        f"{layers} | {samples}": {"exit_code": 0, "cpu_seconds": 2 + 0.5 * layers + 0.01 * samples}
        for layers, samples in growth.pairs()
    }
    assert len(rows) == 7
    layers, samples = growth.print_tables(rows).split("\n\n")
    assert layers.splitlines()[0] == "| layers, 64 samples | 8 | 16 | 32 | 64 |"
    assert layers.splitlines()[3] == "| of which each adds, ms |  | 500 | 500 | 500 |"
    assert samples.splitlines()[2] == "| seconds of the processor | 6.6 | 7.3 | 8.6 | 11.1 |"
    assert samples.splitlines()[3] == "| of which each adds, ms |  | 10 | 10 | 10 |"


def test_what_was_stopped_is_no_figure(growth):
    rows = {"8 | 64": {"exit_code": 0, "cpu_seconds": 4.0}, "16 | 64": {"exit_code": 1}}
    assert "| - | - | - |" in growth.print_tables(rows)
