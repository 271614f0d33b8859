"""The same input, options and versions give the same bytes, whatever the threads."""

from __future__ import annotations

import os
import subprocess

import numpy as np
import onnx
import pytest

from cobla_onnx import Budget, compress
from tests.cli.test_command import COMMAND


def test_one_and_two_threads_decide_and_write_the_same(demo_model, tmp_path):
    written = []
    for threads, environment in ((1, "1"), (2, "2"), (2, "1")):
        out = tmp_path / f"{threads}-{environment}.onnx"
        done = subprocess.run(
            [COMMAND, demo_model, out, "--mem", "0.5", "-q", "--threads", str(threads)],
            env={**os.environ, "OPENBLAS_NUM_THREADS": environment, "PYTHONHASHSEED": environment},
            cwd=tmp_path,
        )
        assert done.returncode == 0
        written.append(out.read_bytes())
    assert written[0] == written[1] == written[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar_resnet20-12fca82f", "squeezenet1.1_fp32", "mnist"])
def test_real_models_on_one_and_two_threads(assets, name):
    """Same plan; factors differ in last bits at most, and on these not at all so far."""
    path = assets / "models" / f"{name}.onnx"
    one, two = (compress(path, Budget(mem=0.5), threads=threads) for threads in (1, 2))
    assert one.plan == two.plan
    pairs = zip(one.model.graph.initializer, two.model.graph.initializer, strict=True)
    for first, second in pairs:
        a, b = onnx.numpy_helper.to_array(first), onnx.numpy_helper.to_array(second)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(np.abs(a).max(initial=1e-30)))
