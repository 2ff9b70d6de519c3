"""Target torch."""
