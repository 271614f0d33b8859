"""Evaluate a model with other weights: the loss, its gradient, quality."""
