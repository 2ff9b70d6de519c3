"""Readers of sound: clips in folders and tables."""
