"""Compress ONNX models by low-rank factorisation under hard budgets."""

__version__ = "0.1.0"
