"""A pool of worker processes that ends with its caller, however the caller ends."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import parent_process
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

__all__ = ["interrupts_wait", "open_processes"]


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """Let Ctrl-C wait until the block is left.

    A pool that is interrupted while it starts a process or its own thread cannot be shut down.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        # Only the main thread is interrupted, and only by a handler.
        yield
        return
    came: list[tuple[int, Any]] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            handler(*came[0])


class _Worker(SpawnProcess):
    """A process that never hears Ctrl-C, not even while it starts: the main process ends it."""

    def start(self) -> None:
        if not hasattr(signal, "pthread_sigmask"):
            super().start()
            return
        # What is blocked stays blocked in the new process; for us it waits until the end.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Spawned(SpawnContext):
    """Starts processes, and remembers them."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[SpawnProcess] = []

    def Process(self, *args: Any, **kwargs: Any) -> SpawnProcess:  # type: ignore[override]  # noqa: N802
        process = _Worker(*args, **kwargs)
        self.started.append(process)
        return process


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when the main one is gone, even if it was killed: nobody else would."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _stop_reading(executor: ProcessPoolExecutor) -> None:
    """Let a pool without workers end though it still has more work than a pipe holds.

    Its thread would wait forever for a reader (https://github.com/python/cpython/issues/94777);
    Python does this itself from 3.11.5 on.
    """
    if sys.version_info < (3, 11, 5):
        queue: Any = getattr(executor, "_call_queue", None)
        with contextlib.suppress(AttributeError, OSError):
            queue._reader.close()


@contextmanager
def open_processes(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Open a pool; when an error or an interrupt leaves it, its processes are ended at once."""
    context = _Spawned()
    executor = ProcessPoolExecutor(workers, context, _begin_worker)
    try:
        yield executor
    except BaseException:
        # Do not wait for what nobody wants any more.
        for process in context.started:
            # Not those that could not be started.
            if process.is_alive():
                process.terminate()
        _stop_reading(executor)
        raise
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
