"""Workers that end with their pool, what a run stands on, and how far it is."""

from __future__ import annotations

import os
import signal
from contextlib import suppress

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

import cobla_onnx
from cobla_onnx.errors import PartError
from cobla_onnx.runtime.environment import machine, versions
from cobla_onnx.runtime.part_errors import part_error
from cobla_onnx.runtime.processes import interrupts_wait, open_processes
from cobla_onnx.runtime.progress import tracked
from tests.builders import model_of


def test_workers_are_gone_when_an_error_leaves_the_pool():
    with suppress(ZeroDivisionError), open_processes(1) as executor:
        worker = executor.submit(os.getpid).result()
        raise ZeroDivisionError
    assert worker != os.getpid()
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def test_an_interrupt_waits_until_the_block_is_left():
    done = False
    with suppress(KeyboardInterrupt), interrupts_wait():
        os.kill(os.getpid(), signal.SIGINT)
        done = True
    assert done


@given(st.lists(st.integers(), max_size=5))
def test_progress_is_told_before_the_first_and_after_each(items):
    told: list[tuple[int, int]] = []
    assert list(tracked(items, len(items), lambda *step: told.append(step))) == items
    assert told == [(done, len(items)) for done in range(len(items) + 1)]


def test_a_run_is_described_by_versions_and_a_machine_without_names():
    found = versions()
    assert found["cobla-onnx"] == cobla_onnx.__version__
    assert (found["numpy"], found["onnxruntime"]) == (np.__version__, onnxruntime.__version__)
    assert found["onnx"] == onnx.__version__
    assert set(machine()) == {"system", "architecture", "processor", "cores"}
    assert os.uname().nodename not in " ".join(machine().values())


def test_a_part_that_does_not_load_is_said_to_be_our_fault_at_its_node():
    nodes = [helper.make_node("Relu", ["x"], ["h"], "first")]
    nodes += [helper.make_node("Relu", ["h"], ["y"], "last")]
    part = model_of(nodes, {}, {"x": [1]}, ["y"])
    error = part_error(part, "the loss", "Node (first) failed")
    assert isinstance(error, PartError)
    assert "cut out for the loss at node 'first': Node (first) failed" in str(error)
    assert ", up to node 'last'" in str(part_error(part, "the loss", "failed"))
    assert "leave out --data, and report this with what --debug shows" in error.in_flags()
