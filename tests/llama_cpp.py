"""Small Llamas as folders of transformers with tokenizers that a GGUF file can hold."""

import numpy as np
import torch
import transformers

from compressor import models
from compressor.lower.trace import trace
from passes.graph.sites import find_sites
from tests.gguf_files import MERGES, TOKENS, VOCABULARY, small

SPACE = "▁"
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
JOINED = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), (SPACE, "hello"), ("w", "o")]
CHARACTERS = [SPACE, *"abcdehlorw"]
ENDS = {"bos_token": "<s>", "eos_token": "</s>"}


def byte_level():
    """Return a byte-level BPE tokenizer, as of GPT-2, with the tokens of `tests.gguf_files`."""
    vocabulary = {token: number for number, token in enumerate(TOKENS)}
    merges = [tuple(merge.split()) for merge in MERGES]
    return transformers.GPT2Tokenizer(vocab=vocabulary, merges=merges, **ENDS, unk_token="</s>")


def sentencepiece():
    """Return a BPE tokenizer with byte fallback, as of Llama 2."""
    texts = [*PIECES, *CHARACTERS, *("".join(pair) for pair in JOINED)]
    vocabulary = {text: number for number, text in enumerate(texts)}
    return transformers.LlamaTokenizer(vocab=vocabulary, merges=JOINED, **ENDS, unk_token="<unk>")


def saved(folder, module=None, tokenizer=None):
    """Write a model with its tokenizer in the format of transformers."""
    (small(num_hidden_layers=4) if module is None else module).save_pretrained(folder)
    (byte_level() if tokenizer is None else tokenizer).save_pretrained(folder)
    return folder


class Traced:
    """A loaded and traced model with its sites."""

    def __init__(self, spec, **options):
        self.model = models.load(spec, **options)
        self.graph = trace(self.model)
        self.sites = find_sites(self.graph)

    def named(self, *places):
        """Return sites by block and kind, such as ``(2, "attention")``; a number alone is a whole block."""
        blocks = list(dict.fromkeys(site.block for site in self.sites))
        wanted = {(blocks[place], kind) for place, kind in (each for each in places if isinstance(each, tuple))}
        whole = {blocks[place] for place in places if isinstance(place, int)}
        return tuple(site for site in self.sites if (site.block, site.kind) in wanted or site.block in whole)


def tokens(rows=2, length=9, seed=1):
    """Return random tokens [rows, length] and a mask of ones."""
    ids = torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed)).numpy()
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}
