"""Calibration samples and labels."""
