"""Encoder-decoder models of transformers: from texts to texts, and from speech to texts."""
