"""Checks of a file before any other library works on it."""
