"""CPU properties that running times depend on, and the return of freed memory to the system."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from pathlib import Path

import numpy as np

__all__ = [
    "convolution_block",
    "cpu_name",
    "processor",
    "return_freed_memory",
    "return_large_arrays",
]

# Bytes from which an array goes back to the system as soon as it is freed, and the number of this
# setting in glibc's malloc.h.
LARGE, M_MMAP_THRESHOLD = 1 << 21, -3


def processor() -> str:
    """Name of the processor, without starting a process as `platform.processor` does.

    Empty if the system does not say.
    """
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return os.environ.get("PROCESSOR_IDENTIFIER", "")


def cpu_name() -> str:
    """Model of the CPU and its architecture, as the system names them."""
    features = "AVX-512" if convolution_block() == 16 else ""
    return " ".join(part for part in (processor(), platform.machine(), features) if part)


def convolution_block() -> int:
    """Channels that onnxruntime convolves at a time on this CPU, in single precision.

    16 with AVX-512, and 8 on all others (MLAS, ``MlasNchwcGetBlockSize``). numpy tells
    what the CPU has, since it chooses its own loops by that.
    """
    extensions = (np.show_config(mode="dicts") or {}).get("SIMD Extensions", {})
    found = [*extensions.get("baseline", []), *extensions.get("found", [])]
    wide = any(name == "X86_V4" or name.startswith("AVX512") for name in found)
    return 16 if wide else 8


def return_freed_memory() -> None:
    """Give memory that was freed back to the system, where the C library keeps it.

    glibc keeps what lies below anything that is still held, for each thread apart: of arrays of
    some megabytes many times what is in use.
    """
    if sys.platform == "linux":
        # Other C libraries do not have it.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def return_large_arrays() -> None:
    """Have large arrays go back to the system as soon as they are freed, until the process ends.

    By itself glibc raises the size from which they do with every such array, up to 32 MB, and what
    is freed of smaller ones stays in pieces between what is held. Small models would pay for it
    with time, an eighth of a run.
    """
    if sys.platform == "linux":
        setting = getattr(ctypes.CDLL(None), "mallopt", None)
        if setting is not None:
            setting(M_MMAP_THRESHOLD, LARGE)
