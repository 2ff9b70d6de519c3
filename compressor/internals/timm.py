"""What `compressor` reads of timm's private parts.

It was seen in timm 1.0.31; of whichever is installed, tests/test_internals.py goes through it name by name.
"""

from __future__ import annotations

# Writes the config.json of a model without its weights, which the public `timm.models.save_for_hf` would write beside
# it. Without it, an exported folder would not say how pictures are prepared.
from timm.models._hub import save_config_for_hf

__all__ = ["save_config_for_hf"]
