"""Calibration: run a model on samples, and collect what compression decisions need."""
