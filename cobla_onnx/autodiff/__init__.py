"""Automatic differentiation: the gradient of an ONNX graph as an ONNX graph."""

from __future__ import annotations

from cobla_onnx.autodiff.gradient import GradientGraph, differentiate, gradient_graph
from cobla_onnx.autodiff.masks import MaskedWeight
from cobla_onnx.autodiff.measures import LossKind

__all__ = ["GradientGraph", "LossKind", "MaskedWeight", "differentiate", "gradient_graph"]
