"""Runs that take too long are stopped, others are not."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from cobla_onnx.runtime.watch import STOPPED, _Watch, at_most


def test_what_takes_too_long_is_told_once():
    told = threading.Semaphore(0)
    with at_most(0.05, told.release):
        assert told.acquire(timeout=10)
        assert not told.acquire(timeout=0.2)


def test_what_ends_in_time_is_not_told():
    told = threading.Event()
    with at_most(0.1, told.set):
        pass
    assert not told.wait(0.3)


def test_a_shorter_limit_is_kept_beside_a_longer_one():
    late, early = threading.Event(), threading.Event()
    with at_most(600, late.set), at_most(0.05, early.set):
        assert early.wait(10)
        assert not late.is_set()


def test_limits_of_many_threads_are_kept_by_one():
    told = []
    before = threading.active_count()

    def run(number):
        with at_most(0.05 if number % 2 else 600, lambda: told.append(number)):
            time.sleep(0.3)

    threads = [threading.Thread(target=run, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    assert threading.active_count() <= before + len(threads) + 1
    for thread in threads:
        thread.join()
    assert sorted(told) == [1, 3, 5, 7]


SCRIPT = """
import threading
from cobla_onnx.runtime.watch import at_most

told = threading.Event()
with at_most(3, told.set):
    print("running", flush=True)
    input()
    print("late" if told.is_set() else "in time", flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="this system stops no processes")
def test_the_time_that_the_process_was_stopped_is_no_time_of_a_run():
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout.readline() == "running\n"
        os.kill(child.pid, signal.SIGSTOP)
        time.sleep(3.5)
        os.kill(child.pid, signal.SIGCONT)
        # As long as the clock is looked at again after that.
        time.sleep(0.2)
        told, _ = child.communicate("\n")
    assert told == "in time\n"


def test_a_stop_before_the_first_look_is_no_time_of_a_run():
    watch, told = _Watch(), threading.Event()
    # The thread that looks at the clock waits for this lock, as if the process were stopped.
    with watch._changed:
        watch.add(1, told.set)
        time.sleep(STOPPED + 0.3)
    assert not told.wait(0.4)
    assert told.wait(10)
