"""Operators that multiply their data with a weight."""
