"""A small vision-language model, the graph of its language model, and PyramidDrop written as a plain loop over layers.

The loop shares nothing with the pass: it keeps the index of every token in the text, and makes rotary tables and masks
from it.
"""

import inspect

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, apply_rotary_pos_emb

from passes.base import apply
from passes.canonical.clean import Clean
from passes.execute.interpreter import run
from passes.graph.graph import Graph

WIDTH, HEADS, KV_HEADS, LAYERS, WORDS = 32, 4, 2, 4, 96
HEAD = WIDTH // HEADS
STATE = {
    f"present.{layer}.{part}": f"past_key_values.{layer}.{part}" for layer in range(LAYERS) for part in ("key", "value")
}
# The argument that takes the cache: since transformers 5.24, and before.
CACHE = "cache" if "cache" in inspect.signature(LlamaDecoderLayer.forward).parameters else "past_key_values"
DYNAMIC = torch.export.Dim.DYNAMIC


def vision_language_model(text=None):
    """Return a LLaVA with random weights; without `text`, its language model is a Llama with shared key heads."""
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS, "vocab_size": WORDS}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    config = (text or LlamaConfig)(**sizes, **heads, initializer_range=0.3)
    whole = LlavaConfig(vision_config=vision, text_config=config, image_token_index=5)
    return LlavaForConditionalGeneration(whole).eval()


def filled(keys, values):
    """Return a layer of a cache."""
    layer = DynamicLayer()
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    return layer


class WithCache(torch.nn.Module):
    """The language model with its cache as tensors."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *tensors):
        embeds, mask, positions, *past = tensors
        for part in past[1:]:
            torch._check(part.shape[2] == past[0].shape[2])
        cache = DynamicCache()
        cache.layers = [filled(*past[start : start + 2]) for start in range(0, len(past), 2)]
        given = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions, CACHE: cache}
        output = self.model(**given, use_cache=True)
        return output.logits, *(part for layer in cache.layers for part in (layer.keys, layer.values))


def traced(model):
    """Return the graph of the language model."""
    past = [torch.randn(2, KV_HEADS, 5, HEAD) for _ in STATE]
    mask = torch.ones(2, 12, dtype=torch.int64)
    example = (torch.randn(2, 7, WIDTH), mask, torch.arange(5, 12).repeat(2, 1), *past)
    axes = ({0: DYNAMIC, 1: DYNAMIC},) * 3 + ({0: DYNAMIC, 2: DYNAMIC},) * len(past)
    with torch.no_grad():
        program = torch.export.export(WithCache(model).eval(), example, dynamic_shapes={"tensors": axes}, strict=False)
    inputs = ("inputs_embeds", "attention_mask", "position_ids", *STATE.values())
    graph = Graph(program.module(check_guards=False), inputs, ("logits", *STATE), "model.", state=STATE)
    apply(Clean(), graph)
    return graph


def empty(graph, rows):
    """Return the state before the first call, for a number of rows."""
    past = {
        name: torch.zeros(rows, 0, dtype=torch.int64)
        if name.endswith(".tokens")
        else torch.zeros(rows, KV_HEADS, 0, HEAD)
        for name in graph.state.values()
    }
    return {name: past[name] for name in graph.inputs if name in past}


def feeds(graph, embeds, image, attended, state):
    """Return the inputs of one call: `attended` is the mask of all tokens so far, `image` that of the new ones."""
    positions = (attended.cumsum(1) - 1).clip(min=0)[:, -embeds.shape[1] :]
    new = {"inputs_embeds": embeds, "attention_mask": attended, "position_ids": positions, "image_token_mask": image}
    return {name: value for name, value in new.items() if name in graph.inputs} | state


def call(graph, given):
    """Return the outputs by name, and the state of the next call."""
    outputs = dict(zip(graph.outputs, run(graph, given), strict=True))
    return outputs, {past: outputs[present] for present, past in graph.state.items()}


class Pyramid:
    """PyramidDrop as a loop over the layers, for rows that have the same number of image tokens in each call."""

    def __init__(self, model, stages, method="attention"):
        self.text, self.head = model.model.language_model, model.lm_head
        self.stages, self.method = dict(stages), method
        self.window = getattr(self.text.config, "sliding_window", None)
        self.cache = DynamicCache()
        self.cached = [torch.zeros(0)] * len(self.text.layers)  # [rows, tokens], places in the text

    @torch.no_grad()
    def __call__(self, embeds, image, attended):
        """Return the logits of the remaining tokens."""
        rows, new = embeds.shape[:2]
        placed = torch.arange(attended.shape[1] - new, attended.shape[1]).repeat(rows, 1)
        positions = (attended.cumsum(1) - 1).clip(min=0)
        hidden, images = embeds, int(image.sum(1)[0])
        for number, layer in enumerate(self.text.layers):
            if number in self.stages:
                keep = int(images * self.stages[number])
                kept = self._kept(layer, hidden, placed, image, positions, attended, keep)
                hidden = hidden.gather(1, kept[..., None].expand(-1, -1, WIDTH))
                placed, image = placed.gather(1, kept), image.gather(1, kept)
            past = self.cached[number] if len(self.cached[number]) else placed[:, :0]
            self.cached[number] = torch.cat([past, placed], 1)
            tables = self.text.rotary_emb(hidden, positions.gather(1, placed))
            mask = self._mask(placed, self.cached[number], attended)
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_ids=positions.gather(1, placed),
                position_embeddings=tables,
                use_cache=True,
                **{CACHE: self.cache},
            )
        return self.head(self.text.norm(hidden))

    def _mask(self, queries, keys, attended):
        mask = (keys[:, None] <= queries[..., None]) & attended.bool().gather(1, keys)[:, None]
        if self.window is not None:
            mask &= queries[..., None] - keys[:, None] < self.window
        return mask[:, None]

    def _kept(self, layer, hidden, placed, image, positions, attended, keep):
        scores = self._scores(layer, hidden, placed, positions, attended)
        kept = []
        for row in range(len(hidden)):
            of_images = image[row].nonzero()[:, 0]
            best = of_images[scores[row, of_images].topk(keep).indices]
            kept.append(torch.cat([best, (image[row] == 0).nonzero()[:, 0]]).sort().values)
        return torch.stack(kept)

    def _scores(self, layer, hidden, placed, positions, attended):
        """Return the attention of the last token that is no padding, or minus the norm of keys, [rows, tokens]."""
        normed, attention = layer.input_layernorm(hidden), layer.self_attn
        shape = (*hidden.shape[:2], -1, HEAD)
        query = attention.q_proj(normed).view(shape).transpose(1, 2)
        key = attention.k_proj(normed).view(shape).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *self.text.rotary_emb(hidden, positions.gather(1, placed)))
        if self.method == "norm":
            return -key.norm(dim=-1).mean(1)
        scores = query @ key.repeat_interleave(HEADS // KV_HEADS, 1).transpose(2, 3) / HEAD**0.5
        scores = scores.masked_fill(~self._mask(placed, placed, attended), float("-inf")).softmax(-1).mean(1)
        real = attended.gather(1, placed) * torch.arange(1, placed.shape[1] + 1)
        return scores[torch.arange(len(hidden)), real.argmax(1)]
