"""Derivative rules, one for each operator; importing this package fills the registry."""

from __future__ import annotations

from cobla_onnx.autodiff.vjp import (
    activation,
    arithmetic,
    convolution,
    normalization,
    pooling,
    product,
    reduction,
    resize,
    shape,
)
from cobla_onnx.autodiff.vjp.registry import FLAT, RULES, Gradients, NoRuleError, Step, find_rule

__all__ = [
    "FLAT",
    "RULES",
    "Gradients",
    "NoRuleError",
    "Step",
    "activation",
    "arithmetic",
    "convolution",
    "find_rule",
    "normalization",
    "pooling",
    "product",
    "reduction",
    "resize",
    "shape",
]
