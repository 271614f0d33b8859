"""The same bytes however the work is shared; clear errors when a worker is lost."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.context import SpawnProcess
from pathlib import Path

import numpy as np
import onnx
import pytest
from threadpoolctl import threadpool_info

from cobla_onnx import Budget, compress
from cobla_onnx.errors import ModelError, UsageError
from cobla_onnx.runtime.pool import Pool, choose_pool, executor_pool, open_pool
from cobla_onnx.runtime.transfer import Carried, Shared
from tests.cli.test_command import COMMAND


def square(number: int) -> int:
    return number * number


def blas_threads(_: int) -> int:
    return max(i["num_threads"] for i in threadpool_info() if i["user_api"] == "blas")


def total(unit: tuple[Carried, int]) -> float:
    return float(unit[0].array.sum()) + unit[1]


def fail(number: int) -> int:
    if number == 3:
        raise ModelError(f"layer {number}: is not well")
    return number


def die(number: int) -> int:
    if number == 3:
        os._exit(1)
    return number


@pytest.fixture(scope="module")
def processes():
    with choose_pool(2, workers=2) as pool:
        yield pool


def pools(processes):
    yield Pool()
    yield processes
    with open_pool(3) as pool:
        yield pool
    with ThreadPoolExecutor(2) as executor, executor_pool(executor) as pool:
        yield pool


def test_results_are_in_order_and_units_taken_as_needed(processes):
    taken = []

    def units():
        for number in range(40):
            taken.append(number)
            yield number

    for pool in pools(processes):
        taken.clear()
        results = pool.map(square, units())
        assert next(results) == 0
        assert len(taken) <= 2 * pool.width + 1
        assert list(results) == [n * n for n in range(1, 40)]


def test_no_more_units_are_taken_than_allowed(processes):
    for pool in pools(processes):
        taken = []
        results = pool.map(square, (taken.append(n) or n for n in range(9)), at_most=1)
        for number, result in enumerate(results):
            assert result == number**2
            assert len(taken) == number + 1


def test_small_results_wait_for_an_earlier_one_without_keeping_others_from_running():
    first = threading.Event()

    def work(number):
        if number == 0:
            assert first.wait(60), "the last unit has to run while the first one does"
        elif number == 5:
            first.set()
        return number

    with open_pool(2) as pool:
        assert list(pool.map(work, range(6), at_most=2, small=True)) == list(range(6))


def test_no_more_units_with_small_results_run_than_allowed(processes):
    for pool in pools(processes):
        taken = []
        results = pool.map(square, (taken.append(n) or n for n in range(9)), 1, small=True)
        for number, result in enumerate(results):
            assert result == number**2
            assert len(taken) == number + 1


def test_every_unit_has_one_thread_of_linear_algebra(processes):
    np.ones((8, 8)) @ np.ones((8, 8))
    for pool in pools(processes):
        assert set(pool.map(blas_threads, range(4))) == {1}


def test_errors_of_units_come_back_as_they_are(processes):
    for pool in pools(processes):
        with pytest.raises(ModelError, match="layer 3: is not well"):
            list(pool.map(fail, range(6)))
        assert list(pool.map(square, range(3))) == [0, 1, 4], "the pool goes on"


def test_a_lost_worker_is_a_clear_error():
    with (
        pytest.raises(UsageError, match=r"workers=2: a worker has ended .* fewer workers"),
        choose_pool(1, workers=2) as pool,
    ):
        list(pool.map(die, range(6)))


def test_mapped_arrays_travel_as_places_in_files(processes, tmp_path):
    array = np.arange(1 << 18, dtype=np.float32)
    path = tmp_path / "weights"
    path.write_bytes(b"header" + array.tobytes())
    mapped = np.memmap(path, np.uint8, "r", 6).view(np.float32).reshape(512, 512)
    carried = processes.carry(mapped)
    assert len(pickle.dumps(carried)) < 1000
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(carried)).array, mapped)
    assert len(pickle.dumps(processes.carry(mapped.T))) > array.nbytes, "its bytes, in its order"
    for pool in pools(processes):
        found = list(pool.map(total, ((pool.carry(mapped), n) for n in range(3))))
        assert found == [float(mapped.sum()) + n for n in range(3)]


def holder(unit: tuple) -> tuple[int, int]:
    shared, number = unit
    return os.getpid(), id(shared.built(np.multiply.outer, 2)) * 0 + int(shared.value()[number])


def test_shared_values_reach_all_workers(processes):
    for pool in pools(processes):
        shared = pool.share(np.arange(10))
        found = list(pool.map(holder, ((shared, n) for n in range(10))))
        assert [number for _, number in found] == list(range(10))


def test_one_pool_at_a_time():
    with pytest.raises(UsageError, match="workers= and dask: exclude each other"):
        choose_pool(1, workers=2, dask="tcp://127.0.0.1:1")


def written(model, **options) -> bytes:
    data = Path(model).with_name("digits_calibration.npz")
    result = compress(model, Budget(mem=0.4), data=data, samples=24, solver="milp", **options)
    return result.model.SerializeToString(deterministic=True)


@pytest.fixture(scope="module")
def alone(demo_model):
    return written(demo_model, threads=1)


@pytest.mark.parametrize("options", [{"threads": 2}, {"workers": 1}, {"workers": 2}], ids=str)
def test_the_same_bytes_however_the_work_is_shared(demo_model, alone, options):
    assert written(demo_model, **options) == alone


@pytest.mark.slow
def test_an_executor_of_the_caller(demo_model, alone):
    with ProcessPoolExecutor(2, get_context("spawn")) as executor:
        assert written(demo_model, threads=1, executor=executor) == alone
        assert executor.submit(square, 3).result() == 9, "it is left open"


@pytest.mark.slow
def test_dask(demo_model, alone):
    distributed = pytest.importorskip("distributed", reason="dask is not installed")
    with (
        distributed.LocalCluster(
            2, threads_per_worker=1, dashboard_address=None, silence_logs=50
        ) as cluster,
    ):
        assert written(demo_model, threads=1, dask=cluster.scheduler_address) == alone
        with distributed.Client(cluster) as client:
            executor = client.get_executor()
            assert written(demo_model, threads=1, executor=executor) == alone


@pytest.mark.slow
def test_a_lost_dask_worker_is_a_clear_error():
    distributed = pytest.importorskip("distributed", reason="dask is not installed")
    with (
        distributed.LocalCluster(
            1, threads_per_worker=1, dashboard_address=None, silence_logs=50
        ) as cluster,
        pytest.raises(UsageError, match=r"dask=.*: a worker has ended"),
        choose_pool(1, dask=cluster.scheduler_address) as pool,
    ):
        list(pool.map(die, range(3, 6)))


@pytest.mark.slow
def test_dask_where_nobody_answers(demo_model, tmp_path):
    pytest.importorskip("distributed", reason="dask is not installed")
    out = tmp_path / "out.onnx"
    done = subprocess.run(
        [COMMAND, demo_model, out, "--mem", "0.5", "--dask", "tcp://127.0.0.1:9"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "error: --dask tcp://127.0.0.1:9: no scheduler answers there" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_dask_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with (
        pytest.raises(UsageError, match=r"pip install 'cobla-onnx\[distributed\]'"),
        choose_pool(1, dask="tcp://127.0.0.1:9"),
    ):
        pass


def test_the_command_with_workers_and_mapped_weights(demo_model, tmp_path):
    model = tmp_path / "model.onnx"
    onnx.save(onnx.load(demo_model), model, save_as_external_data=True, size_threshold=0)
    results = []
    for more in ([], ["--workers", "2"]):
        out = tmp_path / f"out{len(more)}.onnx"
        done = subprocess.run(
            [COMMAND, model, out, "--mem", "0.5", "-q", "--external-data", "never", *more],
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (0, "")
        results.append(out.read_bytes())
    assert results[0] == results[1]


SLOW = """
import sys, time, threading
from cobla_onnx.runtime.pool import choose_pool
if __name__ == "__main__":
    with choose_pool(1, workers=2) as pool:
        print("ready", flush=True)
        for _ in pool.map(time.sleep, [0.01] * 4 + [600.0] * 4):
            print("first", flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
@pytest.mark.parametrize("how", ["main process", "terminal", "killed"])
def test_workers_end_with_the_main_process(tmp_path, how):
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    child = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert child.stdout is not None
    child.stdout.readline()
    child.stdout.readline()
    time.sleep(0.5)
    workers = _children(child.pid)
    assert len(workers) >= 2
    if how == "terminal":
        os.killpg(child.pid, signal.SIGINT)
    else:
        child.send_signal(signal.SIGINT if how == "main process" else signal.SIGKILL)
    errors = _last_words(child)
    assert how == "killed" or errors.rstrip().endswith("KeyboardInterrupt")
    deadline = time.monotonic() + 10
    while any(map(_runs, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_runs, workers))


def test_a_process_that_cannot_be_started_ends_the_pool(monkeypatch):
    begin, started = SpawnProcess.start, []

    def start(process):
        if started:
            raise OSError("no more processes")
        begin(process)
        started.append(process)

    monkeypatch.setattr(SpawnProcess, "start", start)
    with pytest.raises(OSError, match="no more processes"), choose_pool(1, workers=2) as pool:
        list(pool.map(time.sleep, [600.0, 600.0]))
    (process,) = started
    process.join(10)
    assert process.exitcode is not None


def test_an_interrupt_waits_until_a_unit_is_handed_over():
    handed = []

    class Interrupted(ThreadPoolExecutor):
        def submit(self, *args, **kwargs):
            signal.raise_signal(signal.SIGINT)
            handed.append(super().submit(*args, **kwargs))
            return handed[-1]

    with (
        pytest.raises(KeyboardInterrupt),
        Interrupted(1) as executor,
        choose_pool(1, executor=executor) as pool,
    ):
        list(pool.map(str, [1]))
    assert len(handed) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def _last_words(child: subprocess.Popen[str]) -> str:
    """What a process group wrote to stderr until its end, which comes in a minute."""
    watchdog = threading.Timer(60, os.killpg, (child.pid, signal.SIGKILL))
    watchdog.start()
    _, errors = child.communicate()
    watchdog.cancel()
    return errors


def _children(process: int) -> list[int]:
    found = Path(f"/proc/{process}/task/{process}/children")
    if not found.exists():
        pytest.skip("needs /proc to find the workers")
    return [int(word) for word in found.read_text().split()]


def _runs(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return "State:\tZ" not in status


def _has_files(folder: Path) -> bool:
    """Whether a folder in this one has files; folders may go while they are looked at."""
    with contextlib.suppress(FileNotFoundError):
        return any(folder.glob("*/*"))
    return False


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_an_interrupted_command_leaves_nothing(demo_model, tmp_path):
    data = Path(demo_model).with_name("digits_calibration.npz")
    out, temporary = tmp_path / "out.onnx", tmp_path / "tmp"
    temporary.mkdir()
    child = subprocess.Popen(
        [COMMAND, demo_model, out, "--mem", "0.3", "--data", data, "--workers", "2", "-q"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    deadline = time.monotonic() + 60
    while not _has_files(temporary) and time.monotonic() < deadline:
        time.sleep(0.01)
    # The model was handed over: the workers have begun, or are about to.
    os.killpg(child.pid, signal.SIGINT)
    errors = _last_words(child)
    assert child.returncode == 130, errors
    assert "Traceback" not in errors
    assert not out.exists()
    assert list(temporary.glob("cobla-onnx*")) == []


def test_what_was_built_is_dropped_where_it_is_shared_and_kept_by_workers():
    shared = Shared([1, 2], None)
    built = shared.built(list)
    assert shared.built(list) is built
    shared.rest()
    assert shared.built(list) is not built
    received = pickle.loads(pickle.dumps(shared))
    built = received.built(list)
    received.rest()
    assert received.built(list) is built == [1, 2]
