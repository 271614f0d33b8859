"""Compressed models in onnxruntime-web: under node, and the demo's page in a headless browser.

``npm install onnxruntime-web`` in a folder of your own, then set ``NODE_PATH`` to its
``node_modules``.
"""

from __future__ import annotations

import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest

from cobla_onnx import Budget, Plan, compress
from cobla_onnx.plan import Decision
from cobla_onnx.runtime.session import open_session, run_session
from tests.builders import random_array, small_network
from tests.conftest import ROOT
from tests.report.browser import run_browser

DEMO = ROOT / "docs" / "demo"
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


@pytest.fixture(scope="module")
def small_digits(tmp_path_factory, demo_model) -> Path:
    """The demo model, compressed as the page's recipe says, but for the refit."""
    if missing():
        pytest.skip(missing())
    data = ROOT / "models" / "digits_calibration.npz"
    path = tmp_path_factory.mktemp("demo") / "small.onnx"
    options = {"precision": "auto", "refit": False, "samples": 64, "threads": 1}
    compress(demo_model, Budget(mem=0.1), data=data, **options).save(path)
    return path


READ = """
const ort = require("onnxruntime-web"), fs = require("fs");
const [script, paths, boards] = process.argv.slice(1).map((each) => JSON.parse(each));
const { reader } = require(script);
ort.env.wasm.numThreads = 1;
(async () => {
  const found = [];
  for (const path of paths) {
    const session = await ort.InferenceSession.create(fs.readFileSync(path));
    for (const board of JSON.parse(fs.readFileSync(boards))) {
      const image = reader.shrink(Float32Array.from(board), 64);
      found.push(await reader.read(ort, session, image), Array.from(image));
    }
  }
  console.log(JSON.stringify([found, reader.shrink(new Float32Array(64 * 64), 64)]));
})();
"""


@pytest.mark.slow
def test_the_demo_reads_digits_as_onnxruntime_does(small_digits, demo_model, tmp_path):
    content = np.load(ROOT / "models" / "digits_test.npz")
    images, labels = content["image"][:20, 0], content["labels"][:20]
    # As they would be drawn: four times as large, and not in the middle.
    boards = np.zeros((20, 64, 64), np.float32)
    boards[:, :48, 16:] = np.kron(images, np.ones((1, 3, 3), np.float32))
    (tmp_path / "boards.json").write_text(json.dumps(boards.reshape(20, -1).tolist()))
    models = [demo_model, small_digits]
    arguments = [DEMO / "reader.js", list(map(str, models)), tmp_path / "boards.json"]
    texts = [json.dumps(each if isinstance(each, list) else str(each)) for each in arguments]
    done = subprocess.run(
        ["node", "-e", READ, *texts], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found, nothing = json.loads(done.stdout.splitlines()[-1])
    assert nothing is None
    answers, shrunk = np.array(found[::2]).reshape(2, 20, 10), np.array(found[1::2], np.float32)
    for path, answered in zip(models, answers, strict=True):
        feeds = {"image": shrunk[:20].reshape(-1, 1, 16, 16)}
        logits = run_session(open_session(onnx.load(path), 1), feeds)["logits"]
        expected = np.exp(logits - logits.max(1, keepdims=True))
        np.testing.assert_allclose(answered, expected / expected.sum(1, keepdims=True), atol=1e-4)
        assert np.mean(answered.argmax(1) == labels) >= 0.8


DRAWN = """<script>
const wait = setInterval(() => {
  if (state.textContent !== "Ready.") return;
  clearInterval(wait);
  board.setPointerCapture = () => {};
  const at = (kind, x, y) => board.dispatchEvent(Object.defineProperties(
    new PointerEvent(kind, { buttons: kind === "pointerup" ? 0 : 1, pointerId: 1 }),
    { offsetX: { value: x }, offsetY: { value: y } }));
  const side = board.clientWidth, corners = [[.25, .15], [.75, .15], [.45, .9]];
  at("pointerdown", .25 * side, .15 * side);
  corners.forEach(([x, y]) => at("pointermove", x * side, y * side));
  at("pointerup", .45 * side, .9 * side);
}, 50);
</script>"""


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.mark.slow
def test_the_page_reads_what_is_drawn(small_digits, tmp_path):
    demo = tmp_path / "docs" / "demo"
    shutil.copytree(DEMO, demo, ignore=shutil.ignore_patterns("*.onnx"))
    shutil.copy(small_digits, demo)
    (tmp_path / "models").symlink_to(ROOT / "models")
    (tmp_path / "node_modules").symlink_to(os.environ["NODE_PATH"])
    page = demo / "index.html"
    page.write_text(page.read_text("utf-8").replace("</body>", f"{DRAWN}</body>"), "utf-8")
    handler = functools.partial(_Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}/docs/demo/index.html"
        options = ("--virtual-time-budget=20000", "--dump-dom", address)
        done = run_browser(tmp_path / "profile", "light", *options)
        server.shutdown()
    assert re.findall(r'data-answer="(-?\d+)"', done.stdout) == ["7", "7"]
