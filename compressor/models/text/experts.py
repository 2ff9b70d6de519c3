"""Mixtures of experts, computed in a form that can be exported."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compressor.limitations import Limitation

if TYPE_CHECKING:
    import torch

WRITABLE = "batched_mm"  # the one form of transformers without a loop over the experts and without grouped_mm
STACKED = 3  # axes of the weights of all experts together
CHOSEN = ("num_experts_per_tok", "moe_topk", "top_k_experts", "moe_top_k", "moe_k")


def use_writable_experts(module: Any) -> tuple[Limitation, ...]:
    """Let the experts of a model of transformers be computed with batched matrix products.

    The usual form, ``grouped_mm``, has no ONNX operator. The batched one reads the weights of the chosen experts for
    each token, which suits the generation of single tokens and takes much memory for a long prompt.

    Args:
        module: a model of transformers; its experts are switched in place.

    Returns:
        The limitation that states this memory; none for a model without experts, or whose experts have one form only.
    """
    if not hasattr(module, "set_experts_implementation"):
        return ()
    stacked = [weight for part in module.modules() if _is_mixture(part) for weight in _stacked(part)]
    if not stacked:
        return ()
    try:
        module.set_experts_implementation(WRITABLE)
    except ValueError:  # the class has no other form than its own
        return ()
    config = module.config.get_text_config()
    chosen = next((count for name in CHOSEN if isinstance(count := getattr(config, name, None), int)), None)
    megabytes = max(weight.numel() // len(weight) for weight in stacked) * 4 / 1e6
    if chosen is None:
        size = f"chosen experts for each token, up to {megabytes:,.3g} MB for each of them (the config names no number)"
    else:
        size = f"{chosen} chosen experts for each token, up to {chosen * megabytes:,.3g} MB a token"
    reason = (
        f"an engine reads the weights of the {size} in float32, so that a long prompt takes much memory; send it in "
        "parts"
    )
    return (Limitation("mixture of experts", reason),)


def _is_mixture(part: torch.nn.Module) -> bool:
    return type(part).__name__.endswith("Experts")


def _stacked(part: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return the weights of a module that hold all experts, [experts, out, in]."""
    return [weight for weight in part.parameters(recurse=False) if weight.ndim == STACKED]
