"""Nodes that compute in 8 bits, between QuantizeLinear and DequantizeLinear."""
