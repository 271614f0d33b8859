"""Stop what takes too long: one thread watches all runs, since one for each costs as much as some.

A small model runs in less time than a thread takes to start and to end.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["at_most"]

# Seconds between two looks at the clock, and what one may be late by before the process counts as
# having been stopped, by Ctrl-Z or a debugger, which is no time that a run took.
LOOK, STOPPED = 1.0, 1.0


class _Watch:
    """Calls back for those entries whose time is over."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._entries: dict[object, tuple[float, Callable[[], object]]] = {}
        self._thread: threading.Thread | None = None
        # When the thread looks next; it sleeps on where an entry is gone before that.
        self._next = float("inf")

    def add(self, seconds: float, late: Callable[[], object]) -> object:
        """Call `late` after some seconds unless the entry is removed; return the entry."""
        entry, end = object(), time.monotonic() + seconds
        with self._changed:
            self._entries[entry] = end, late
            if self._thread is None or not self._thread.is_alive():
                # A process that was forked has no thread but its own.
                self._next = end
                self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
                self._thread.start()
            elif end < self._next:
                self._next = end
                self._changed.notify()
        return entry

    def remove(self, entry: object) -> None:
        """Forget an entry."""
        with self._changed:
            self._entries.pop(entry, None)

    def _look(self) -> None:
        with self._changed:
            while True:
                left = self._next - time.monotonic()
                if left > 0:
                    self._rest(left)
                    continue
                now = time.monotonic()
                for entry, (end, late) in list(self._entries.items()):
                    if end <= now:
                        del self._entries[entry]
                        late()
                self._next = min((end for end, _ in self._entries.values()), default=float("inf"))

    def _rest(self, left: float) -> None:
        """Wait for a look's time or for a change; what the process was stopped for is no delay."""
        if not self._entries:
            self._changed.wait(min(left, threading.TIMEOUT_MAX))
            return
        end = time.monotonic() + min(left, LOOK)
        self._changed.wait(min(left, LOOK))
        lost = time.monotonic() - end
        if lost > STOPPED:
            self._entries = {key: (at + lost, late) for key, (at, late) in self._entries.items()}
            self._next += lost


_watch = _Watch()


@contextmanager
def at_most(seconds: float, late: Callable[[], object]) -> Iterator[None]:
    """Call `late` from another thread if the block takes longer than this.

    Parameters
    ----------
    seconds : float
    late : callable
        Returns at once.
    """
    entry = _watch.add(seconds, late)
    try:
        yield
    finally:
        _watch.remove(entry)
