"""Private APIs of timm that `compressor` uses.

They were checked with timm 1.0.31. tests/test_internals.py tests each name with the installed release.
"""

from __future__ import annotations

# Writes the config.json of a model without its weights; the public `timm.models.save_for_hf` also writes the weights.
# Without the config, an exported folder would not specify the image preprocessing.
from timm.models._hub import save_config_for_hf

__all__ = ["save_config_for_hf"]
