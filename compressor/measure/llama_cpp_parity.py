"""Compare a GGUF file in llama.cpp with torch: its logits, its next tokens and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from compressor.quality.parity import REPORT_IT, Array, Parity, Reference, check_parity
from compressor.quality.torch_reference import channel_axes, torch_outputs
from runtimes.gguf.target import LlamaCpp

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compressor.models import Model
    from passes.graph.graph import Graph
    from runtimes.base.protocols import Engine, Feeds

# Largest difference, relative to the scale of the channel. llama.cpp rounds keys and values to F16 (2^-11 of a value):
# 2e-3 on SmolLM2-135M with float32 weights. A wrong order of rows or a missing block is off by 0.5 or more.
TOLERANCE = 2e-2
CHARACTERS = 2000  # of a text that the tokenizers are compared on


def llama_cpp_parity(graph: Graph, engine: Engine, feeds: Feeds, model: Model, path: Path) -> Parity:
    """Compare the logits of the tokens that are attended to.

    Args:
        graph: computes the expected logits.
        engine: the float file, open in llama.cpp.
        feeds: a batch of samples.
        model: the model, whose tokenizer is compared with that of the file.
        path: the file.

    Returns:
        The parity, with the agreement of next tokens and tokenizers as notes.

    Raises:
        ParityError: the logits differ by more than `TOLERANCE`.
    """
    assert isinstance(engine, LlamaCpp)
    (output,) = engine.outputs
    expected = torch_outputs(graph, {name: torch.from_numpy(value) for name, value in feeds.items()})[output]
    attended = feeds["attention_mask"].astype(bool)
    expected = np.where(attended[..., None], expected, 0.0)
    found = engine.run(feeds)
    axes = {output: channel_axes(graph)[output]}
    reference = Reference.of({output: expected}, axes, allowed=TOLERANCE)
    parity = check_parity(reference, lambda: found, name=path.name, advice=REPORT_IT)
    notes = (_next_tokens(expected[attended], found[output][attended]), *_tokenizers(engine, feeds, model))
    return Parity(output, parity.difference, parity.rows, notes)


def _next_tokens(expected: Array, found: Array) -> str:
    """Return how often the most probable next token is the same, and how close torch's logits are elsewhere.

    Args:
        expected: torch's logits [tokens, vocabulary].
        found: those of llama.cpp.
    """
    theirs, ours = found.argmax(-1), expected.argmax(-1)
    other = np.flatnonzero(theirs != ours)
    text = (
        f"the float file in llama.cpp, which keeps keys and values as F16, predicts torch's next token at "
        f"{len(ours) - len(other)} of {len(ours)} tokens"
    )
    if not len(other):
        return text
    gaps = expected[other, ours[other]] - expected[other, theirs[other]]
    return f"{text}; at the others torch's two logits differ by at most {float(gaps.max()):.2g}"


def _tokenizers(engine: LlamaCpp, feeds: Feeds, model: Model) -> Iterator[str]:
    """Yield a note if llama.cpp tokenizes a sample otherwise than the model's tokenizer."""
    rows = zip(feeds["input_ids"], feeds["attention_mask"], strict=True)
    texts = [
        model.tokenizer.decode(ids[mask.astype(bool)], skip_special_tokens=True)[:CHARACTERS] for ids, mask in rows
    ]
    other = [
        text for text in texts if engine.tokenize(text) != model.tokenizer(text, add_special_tokens=False).input_ids
    ]
    if other:
        yield (
            f"llama.cpp splits {len(other)} of {len(texts)} sample texts into other tokens than the tokenizer of "
            "transformers does, so prompts as text may be answered differently"
        )
