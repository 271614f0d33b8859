"""Options of compression, each declared once: defaults, flags and help texts of them."""

from cobla_onnx.options.settings import (
    BatchSize,
    ObjectiveName,
    Settings,
    check_batch,
    memory_bytes,
)

__all__ = ["BatchSize", "ObjectiveName", "Settings", "check_batch", "memory_bytes"]
