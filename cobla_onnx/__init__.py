"""Compress ONNX models, by low rank and fewer bits, under hard budgets.

>>> from cobla_onnx import Budget, compress
>>> result = compress("models/digits.onnx", Budget(mem=0.3))
>>> result.save("out.onnx")  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

__all__ = [
    "Budget",
    "Plan",
    "Report",
    "Result",
    "advise",
    "compare",
    "compress",
    "gradient_graph",
    "inspect",
    "sweep",
]

if TYPE_CHECKING:
    from cobla_onnx.allocation import Budget
    from cobla_onnx.autodiff import gradient_graph
    from cobla_onnx.pipeline.advise import advise
    from cobla_onnx.pipeline.compare import compare
    from cobla_onnx.pipeline.compress import compress
    from cobla_onnx.pipeline.inspect import inspect
    from cobla_onnx.pipeline.result import Result
    from cobla_onnx.pipeline.sweep import sweep
    from cobla_onnx.plan import Plan
    from cobla_onnx.report.model import Report

_HOMES = {
    "Budget": "cobla_onnx.allocation",
    "Plan": "cobla_onnx.plan",
    "Report": "cobla_onnx.report.model",
    "Result": "cobla_onnx.pipeline.result",
    "advise": "cobla_onnx.pipeline.advise",
    "compare": "cobla_onnx.pipeline.compare",
    "compress": "cobla_onnx.pipeline.compress",
    "gradient_graph": "cobla_onnx.autodiff",
    "inspect": "cobla_onnx.pipeline.inspect",
    "sweep": "cobla_onnx.pipeline.sweep",
}


def __getattr__(name: str) -> Any:
    """Import on first use: onnx, onnxruntime and scipy take a second or two to load."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
