"""Adaptation of the remaining weights to the outputs of the original."""
