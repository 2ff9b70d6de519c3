"""Target tensorrt."""
