"""Evaluate a model with replaced weights: its loss, the gradient of the loss, its quality."""
