"""Vision-language models as three files, named as transformers.js and Optimum name them."""

from __future__ import annotations

IDS, MASK = "input_ids", "attention_mask"
# Values at which the graph of a whole model is cut; in the files, the embeddings of tokens are inputs_embeds too.
FEATURES, TEXT_EMBEDS, EMBEDS = "image_features", "text_embeds", "inputs_embeds"
PIXELS = "pixel_values"
