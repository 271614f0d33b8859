"""Compress ONNX models by low-rank factorisation under hard budgets.

>>> from cobla_onnx import Budget, compress
>>> result = compress("models/digits.onnx", Budget(mem=0.3))
>>> result.save("out.onnx")  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "Plan",
    "Report",
    "Result",
    "compare",
    "compress",
    "gradient_graph",
    "inspect",
    "sweep",
]

if TYPE_CHECKING:
    from cobla_onnx.allocation import Budget
    from cobla_onnx.autodiff import gradient_graph
    from cobla_onnx.compression import compress
    from cobla_onnx.inspection import inspect
    from cobla_onnx.pairing import compare
    from cobla_onnx.plan import Plan
    from cobla_onnx.report.model import Report
    from cobla_onnx.result import Result
    from cobla_onnx.sweeping import sweep

_HOMES = {
    "Budget": "cobla_onnx.allocation",
    "Plan": "cobla_onnx.plan",
    "Report": "cobla_onnx.report.model",
    "Result": "cobla_onnx.result",
    "compare": "cobla_onnx.pairing",
    "compress": "cobla_onnx.compression",
    "gradient_graph": "cobla_onnx.autodiff",
    "inspect": "cobla_onnx.inspection",
    "sweep": "cobla_onnx.sweeping",
}


def __getattr__(name: str) -> Any:
    """Import on first use: onnx, onnxruntime and scipy take a second or two to load."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
