"""Weights of models: their types in the checkpoint, their counts, and weights that stay on disk."""
