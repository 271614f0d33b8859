"""The options of compression, each declared once: type, default, flag, limits and help text."""

from cobla_onnx.options.checking import check_declared
from cobla_onnx.options.settings import ObjectiveName, Settings
from cobla_onnx.options.values import BatchSize, memory_bytes

__all__ = ["BatchSize", "ObjectiveName", "Settings", "check_declared", "memory_bytes"]
