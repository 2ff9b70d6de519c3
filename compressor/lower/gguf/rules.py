"""Models and plans that a GGUF file can express; everything else is refused before a search.

The rules are those of llama.cpp: a file of the architecture ``llama`` has equal blocks. One of the architecture
``deci`` (src/models/deci.cpp) has the number of heads of each block; a block without heads has no attention. Its MLP
cannot be left out alone: a block with attention and without an MLP would lose its attention too. The sizes of the heads
are read where the first block has heads, so its attention must stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from compressor.choices import GGUF
from compressor.errors import CompressorError
from compressor.settings import ATTENTION_ADVICE, ONLY_ATTENTION

if TYPE_CHECKING:
    from compressor.models import Model
    from passes.graph.graph import Site

CLASSES = ("LlamaForCausalLM", "MistralForCausalLM")
ROTARY = ("default", "linear", "llama3")
OTHER_FORMATS = "every other --target can express it"


class GgufError(CompressorError):
    """A model or a change of it that a GGUF file for llama.cpp cannot express."""


def check_model(model: Model) -> None:
    """Refuse a model that is no Llama or Mistral, or computes otherwise than llama.cpp computes these.

    Raises:
        GgufError: the message names the part that llama.cpp has no form for.
    """
    kind = type(model.module)
    if kind.__name__ not in CLASSES or not kind.__module__.startswith("transformers."):
        raise GgufError(
            f"--target {GGUF} writes language models of the classes {' and '.join(CLASSES)} of transformers; found "
            f"{kind.__name__}: choose another --target ({OTHER_FORMATS})."
        )
    reason = _unsupported(model.module.config)
    if reason is not None:
        raise GgufError(f"--target {GGUF}: {model.name} has {reason}; choose another --target ({OTHER_FORMATS}).")


def _unsupported(config: Any) -> str | None:
    """Return the part of a config that llama.cpp's Llama does not compute; None if it computes all."""
    rotary = getattr(config, "rope_parameters", None) or {}
    kind = rotary.get("rope_type", "default")
    if config.hidden_act != "silu":
        return f"the activation {config.hidden_act}, and llama.cpp computes silu"
    if kind not in ROTARY:
        return f"positions scaled by {kind}, and this package writes {', '.join(ROTARY)}"
    if float(rotary.get("partial_rotary_factor", 1.0)) != 1.0:
        return "rotary positions on a part of each head, which llama.cpp does not compute for Llamas"
    return None


def kept_sites(sites: Sequence[Site]) -> dict[str, str]:
    """Return the site that a ranking of single attentions leaves out, with the reason: the first attention."""
    first = next((site for site in sites if site.kind == "attention"), None)
    return {} if first is None else {first.name: "llama.cpp reads the size of the heads in the first block"}


def check_changes(changes: Mapping[str, str], sites: Sequence[Site]) -> None:
    """Refuse a plan that does anything but drop whole blocks and the attention of blocks.

    Args:
        changes: actions by the name of their site.
        sites: all sites of the model, in order.

    Raises:
        GgufError: the message names the first branch that the file cannot express, and what can.
    """
    for name, action in changes.items():
        if action != "drop":
            raise GgufError(f"{ONLY_ATTENTION}; the plan has {action} at {name}: {ATTENTION_ADVICE}.")
    left = 0
    for block, members in groupby(sites, key=lambda site: site.block):
        kept = [site for site in members if site.name not in changes]
        dropped = [site for site in sites if site.block == block and site.name in changes]
        if not kept:
            continue
        other = next((site for site in dropped if site.kind != "attention"), None)
        if other is not None:
            raise GgufError(
                f"{ONLY_ATTENTION}; the plan drops {other.name} but keeps {kept[0].name}, and llama.cpp leaves an MLP "
                f"out only together with its attention: {ATTENTION_ADVICE}."
            )
        if dropped and not left:
            raise GgufError(
                f"{ONLY_ATTENTION}; the plan drops {dropped[0].name} in the first block that is left, where llama.cpp "
                f"reads the size of the heads: keep it, or drop the whole block {block}."
            )
        left += 1
    if not left:
        raise GgufError(f"--target {GGUF}: no block would be left; drop fewer.")
