"""The file ``genai_config.json``, with which ONNX Runtime GenAI opens the folder of a language model.

ONNX Runtime GenAI generates text with a KV cache. It numbers the caches from 0 without a gap, and all of them have the
same heads. A model without some attentions has that form too, because its remaining caches are numbered anew.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from compressor.limitations import Limitation
from passes.graph.graph import value_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from compressor.models import Model
    from passes.graph.graph import Graph

FILE = "genai_config.json"
TARGETS = {"onnxruntime": False, "onnxruntime_fused": True}  # target: whether past and present may share a buffer
INPUTS = {
    "input_ids": "input_ids",
    "attention_mask": "attention_mask",
    "position_ids": "position_ids",
    "past_key_names": "past_key_values.%d.key",
    "past_value_names": "past_key_values.%d.value",
}
OUTPUTS = {"logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value"}
# Options of generation that have the same names in transformers and in ONNX Runtime GenAI.
SEARCH = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "num_beams", "length_penalty")


def write(folder: Path, engine: str, target: str, device: str, model: Model, graph: Graph) -> tuple[Limitation, ...]:
    """Write the file into the folder of an export of a language model with a KV cache.

    Args:
        folder: output folder.
        engine: name of the file that ONNX Runtime opens.
        target: name of the target; nothing is written for targets other than `TARGETS`.
        device: device of the engine; the file selects ONNX Runtime's CPU provider.
        model: the model before the export.
        graph: the graph of the engine.

    Returns:
        The limitation that says why there is no file; none if there is one or none is expected.
    """
    if target not in TARGETS or not graph.state or model.has_parts:
        return ()
    reason = why_not(graph, model) if device == "cpu" else f"it was not tried with engines on {device}"
    if reason is not None:
        return (Limitation("ONNX Runtime GenAI", f"the folder has no {FILE}, because {reason}"),)
    (folder / FILE).write_text(json.dumps(content(engine, model, graph, shared=TARGETS[target]), indent=2) + "\n")
    return ()


def why_not(graph: Graph, model: Model) -> str | None:
    """Return why ONNX Runtime GenAI cannot open the engine of a graph, as a clause; None if it can."""
    if not hasattr(getattr(model.module, "config", None), "get_text_config"):
        return "the model has no config of transformers"
    expected = {name % layer for layer in range(len(graph.state) // 2) for name in _pasts()}
    if set(graph.state.values()) != expected:
        return "the caches of its layers are not numbered from 0 without a gap"
    if len({shape[1::2] for shape in _cache_shapes(graph)}) != 1:
        return "the caches of its layers differ in size"
    others = [name for name in graph.inputs if name not in (*INPUTS, *expected)]
    if others:
        return f"the model has the input {others[0]}"
    if model.preprocess.longest is None:
        return "the maximum number of tokens of the model is unknown"
    if _ends(model.module) is None:
        return "the model names no end token"
    return _different_heads(model.module)


def _different_heads(module: Any) -> str | None:
    """Return that the layers of a model differ in their heads, as a clause; None if they do not."""
    try:
        return None if module.config.get_text_config().num_attention_heads else "the model names no heads"
    except Exception:  # transformers 5.24 raises an error of its own where layers differ
        return "its layers differ in their number of heads"


def content(engine: str, model: Model, graph: Graph, *, shared: bool) -> dict[str, Any]:
    """Return the content of the file for a graph for which `why_not` returns None."""
    module: Any = model.module
    config, longest = module.config.get_text_config(), model.preprocess.longest
    generation = getattr(module, "generation_config", None)
    ends = _ends(module)
    assert ends is not None
    assert longest is not None
    (_, heads, _, width), *_ = _cache_shapes(graph)
    tokens = {"bos_token_id": config.bos_token_id, "eos_token_id": ends, "pad_token_id": config.pad_token_id}
    chosen = {name: getattr(generation, name, None) for name in SEARCH}
    return {
        "model": {
            "type": "decoder",
            "vocab_size": config.vocab_size,
            "context_length": longest,
            **{name: value for name, value in tokens.items() if value is not None},
            **({"pad_token_id": ends[0]} if config.pad_token_id is None else {}),
            "decoder": {
                "filename": engine,
                "session_options": {"provider_options": []},
                "hidden_size": config.hidden_size,
                "head_size": width,
                "num_attention_heads": config.num_attention_heads,
                "num_key_value_heads": heads,
                "num_hidden_layers": len(graph.state) // 2,  # those with a cache
                "inputs": {name: value for name, value in INPUTS.items() if "past" in name or name in graph.inputs},
                "outputs": OUTPUTS,
            },
        },
        "search": {
            "max_length": longest,
            "past_present_share_buffer": shared,
            **{name: value for name, value in chosen.items() if value is not None},
        },
    }


def _pasts() -> Sequence[str]:
    return INPUTS["past_key_names"], INPUTS["past_value_names"]


def _cache_shapes(graph: Graph) -> list[tuple[Any, ...]]:
    """Return the shapes of the inputs with the cache, [rows, heads, tokens, width]."""
    inputs = dict(zip(graph.inputs, graph.placeholders(), strict=True))
    return [tuple(value_of(inputs[name]).shape) for name in graph.state.values()]


def _ends(module: Any) -> list[int] | None:
    """Return the end tokens of a model of transformers; those of its generation config come first."""
    for config in (getattr(module, "generation_config", None), module.config.get_text_config()):
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            return list(found) if isinstance(found, list | tuple) else [int(found)]
    return None
