"""What onnxruntime's quantiser prints is kept from the terminal, and what others print is not."""

from __future__ import annotations

import logging
import sys
import threading

from cobla_onnx.arithmetic.prepared import quietly


def in_a_thread(function) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def test_what_this_thread_prints_and_logs_is_not_seen(capsys, caplog):
    with quietly():
        sys.stdout.write("Finding optimal threshold\n")
        logging.warning("Please consider pre-processing")
        logging.getLogger("onnxruntime.quantization").error("Inferred shape")
    sys.stdout.write("after\n")
    assert capsys.readouterr().out == "after\n"
    assert not caplog.records


def test_what_other_threads_print_and_log_is_seen(capsys, caplog):
    def speak():
        sys.stdout.write("from a thread\n")
        logging.warning("a warning of it")

    with quietly():
        in_a_thread(speak)
    assert capsys.readouterr().out == "from a thread\n"
    assert caplog.messages == ["a warning of it"]


def test_threads_take_turns_and_leave_all_as_it_was(capsys):
    """The first to begin would end before the second, and put back what that had replaced."""
    root, theirs = logging.getLogger(), logging.getLogger("onnxruntime")
    before = sys.stdout, root.level, theirs.level, list(root.handlers), list(root.filters)
    waits, inside = threading.Event(), list[int]()

    def work(number: int) -> None:
        with quietly():
            inside.append(number)
            sys.stdout.write("nothing of this")
            waits.wait(0.05)
            inside.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inside[::2] == inside[1::2]
    after = sys.stdout, root.level, theirs.level, list(root.handlers), list(root.filters)
    assert after == before
    assert capsys.readouterr().out == ""
