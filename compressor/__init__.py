"""A deployment compiler for pretrained transformers: drop redundant branches, export, and measure what it cost."""

__version__ = "0.1.0"
