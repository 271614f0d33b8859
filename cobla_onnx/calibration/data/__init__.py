"""Calibration samples and labels: reading and checking."""
