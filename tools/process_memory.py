"""The peak memory of a process that does nothing but what is measured."""

from __future__ import annotations

from pathlib import Path

__all__ = ["peak"]


def peak() -> int:
    """Peak memory of this process in bytes (Linux); not getrusage's, which a child inherits."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(row.split()[1]) * 1024 for row in status.splitlines() if "VmHWM" in row)
