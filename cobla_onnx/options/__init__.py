"""The options of compression, each declared once: type, default, flag, limits and help text."""

from cobla_onnx.options.checks import check_batch, memory_bytes
from cobla_onnx.options.settings import BatchSize, ObjectiveName, Settings

__all__ = ["BatchSize", "ObjectiveName", "Settings", "check_batch", "memory_bytes"]
