"""Structural checks of a model, made before any other library works on it."""
