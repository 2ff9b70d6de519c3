"""Samples, split into calibration, validation and test data."""
