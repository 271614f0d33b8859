"""Kernels, strides, dilations and pads, drawn for rules that move a window."""

from __future__ import annotations

from hypothesis import strategies as st


@st.composite
def windows(draw, padded=True):
    axes = draw(st.integers(1, 3))
    values = {
        "kernel_shape": [draw(st.integers(1, 3)) for _ in range(axes)],
        "strides": [draw(st.integers(1, 3)) for _ in range(axes)],
        "dilations": [draw(st.integers(1, 2)) for _ in range(axes)],
    }
    sizes = [draw(st.integers(5, 6)) if axes < 3 else 5 for _ in range(axes)]
    if padded:
        values["pads"] = [draw(st.integers(0, 2)) for _ in range(2 * axes)]
    return sizes, values
