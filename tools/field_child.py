"""Run a command; print its exit code, time, processor time, peak memory and last words as JSON.

    python tools/field_child.py SECONDS COMMAND...

It is stopped after so many seconds. Only the standard library is loaded, so that this process
is smaller than any that it measures.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time


def main(limit: float, command: list[str]) -> dict[str, object]:
    """Run the command; see above."""
    started = time.monotonic()
    row: dict[str, object] = {}
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True
        )
        while True:
            # Unlike getrusage for all children, this is of one child and what it waited for.
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() - started > limit and "stopped_after" not in row:
                os.killpg(child.pid, signal.SIGKILL)
                row["stopped_after"] = limit
            time.sleep(0.05)
        child.returncode = os.waitstatus_to_exitcode(status)
        row |= {
            "exit_code": child.returncode,
            "seconds": round(time.monotonic() - started, 1),
            "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
            "peak_mb": round(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6),
        }
        said.seek(0)
        if child.returncode:
            row["said"] = said.read().decode(errors="replace")[-2000:]
    return row


if __name__ == "__main__":
    print(json.dumps(main(float(sys.argv[1]), sys.argv[2:])))
