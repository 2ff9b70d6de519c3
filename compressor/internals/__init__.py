"""Wrappers of private and unstable APIs of libraries, one module per library."""
