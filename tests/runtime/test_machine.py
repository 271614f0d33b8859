import subprocess
import sys

import pytest

HELD = """
import numpy as np
from cobla_onnx.runtime.machine import return_large_arrays

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

return_large_arrays()
np.ones(30_000_000, np.uint8).sum()
before, large, small = resident(), [], []
for _ in range(30):
    large.append(np.ones(4_000_000, np.uint8))
    small.append(bytearray(100_000))
large.clear()
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_large_arrays_go_back_between_small_ones_that_are_held():
    # Without the call 124 MB stay.
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20_000_000
