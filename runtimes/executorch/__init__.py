"""Target executorch."""
