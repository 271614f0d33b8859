"""Distillation: what is stored for the layers learns from the outputs of the original."""
