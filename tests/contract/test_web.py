"""Compressed models in onnxruntime-web, under node.

``npm install onnxruntime-web`` in a folder of your own, then set ``NODE_PATH`` to its
``node_modules``.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from functools import cache

import numpy as np
import pytest

from cobla_onnx import Plan, compress
from cobla_onnx.plan import Decision
from cobla_onnx.runtime.session import open_session, run_session
from tests.builders import random_array, small_network

RUN = """
const ort = require("onnxruntime-web");
const [path, shape, values] = process.argv.slice(1);
ort.env.wasm.numThreads = 1;
(async () => {
  const session = await ort.InferenceSession.create(require("fs").readFileSync(path));
  const x = new ort.Tensor("float32", Float32Array.from(JSON.parse(values)), JSON.parse(shape));
  const found = await session.run({ x });
  console.log(JSON.stringify(Array.from(found.logits.data)));
})();
"""


@cache
def missing() -> str:
    """Say what is not there, if anything."""
    if shutil.which("node") is None:
        return "node is not installed"
    asked = ["node", "-e", "require.resolve('onnxruntime-web')"]
    if subprocess.run(asked, capture_output=True, check=False).returncode:
        return "onnxruntime-web is not in NODE_PATH; npm install it"
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("ir_version", [7, 8])
@pytest.mark.parametrize("bits", [3, 8, 16])
def test_a_browser_gives_the_same(bits, ir_version, tmp_path):
    if missing():
        pytest.skip(missing())
    model = small_network()
    model.ir_version = ir_version
    plan = Plan((Decision("conv2", "channel", 2), Decision("fc", "stored", bits)))
    small = compress(model, plan=plan, threads=1).model
    path = tmp_path / "small.onnx"
    path.write_bytes(small.SerializeToString())
    x = random_array(2, 3, 12, 12)
    arguments = [path, json.dumps(x.shape), json.dumps(x.ravel().tolist())]
    done = subprocess.run(
        ["node", "-e", RUN, *arguments], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = np.array(json.loads(done.stdout.splitlines()[-1]))
    expected = run_session(open_session(small, 1), {"x": x})["logits"]
    np.testing.assert_allclose(found, expected.ravel(), rtol=1e-4, atol=1e-5)
