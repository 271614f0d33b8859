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

FOREVER = threading.TIMEOUT_MAX


class _Watch:
    """Calls back for those entries whose time is over."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._entries: dict[object, tuple[float, Callable[[], object]]] = {}
        self._thread: threading.Thread | None = None
        # When the first entry ends, as far as the thread knows, and when it means to look again.
        self._next = self._due = float("inf")
        # Whether no entry has come since the last look.
        self._quiet = False

    def add(self, seconds: float, late: Callable[[], object]) -> object:
        """Call `late` after some seconds unless the entry is removed; return the entry."""
        entry, now = object(), time.monotonic()
        end = now + seconds
        with self._changed:
            self._entries[entry] = end, late
            self._quiet = False
            if self._thread is None or not self._thread.is_alive():
                # A process that was forked has no thread but its own.
                self._next, self._due = end, now
                self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
                self._thread.start()
            elif end < self._next:
                self._next, self._due = end, now
                self._changed.notify()
        return entry

    def remove(self, entry: object) -> None:
        """Forget an entry."""
        with self._changed:
            self._entries.pop(entry, None)

    def _look(self) -> None:
        with self._changed:
            while True:
                now = time.monotonic()
                self._make_up_for(now - self._due)
                for entry, (end, late) in list(self._entries.items()):
                    if end <= now:
                        del self._entries[entry]
                        late()
                if self._entries:
                    self._next = min(end for end, _ in self._entries.values())
                elif self._quiet:
                    # Not before a second without entries: to wake the thread costs as much as
                    # a small model's run.
                    self._next = float("inf")
                rest = min(self._next - now, LOOK if self._next < float("inf") else FOREVER)
                self._quiet = True
                self._due = now + rest
                self._changed.wait(rest)

    def _make_up_for(self, lost: float) -> None:
        """Give all entries the seconds that the thread is late by, if the process was stopped."""
        if lost > STOPPED:
            self._entries = {key: (end + lost, late) for key, (end, late) in self._entries.items()}


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
