"""Dropping of image tokens at a few depths of a language model's prompt (PyramidDrop), with its KV cache."""
