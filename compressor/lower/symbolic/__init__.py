"""Replacements of Python code that hides sizes from torch.export while a model is traced."""
