"""Operators that hold weights, a module for each; importing this package fills the registry."""

from __future__ import annotations

from cobla_onnx.graph.operators.base import register
from cobla_onnx.graph.operators.convolution import Convolution
from cobla_onnx.graph.operators.gather import Lookup
from cobla_onnx.graph.operators.product import Product
from cobla_onnx.graph.operators.recurrent import InputWeight, StateWeight
from cobla_onnx.graph.operators.transposed_convolution import TransposedConvolution

register(Convolution())
register(TransposedConvolution())
register(Product())
register(Lookup())
register(InputWeight())
register(StateWeight())
