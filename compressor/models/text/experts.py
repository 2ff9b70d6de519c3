"""Mixtures of experts, computed in a form that can be exported."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from compressor.limitations import Limitation
from passes.execute.offloaded_weights import is_offloaded

WRITABLE = "batched_mm"  # the one form of transformers without a loop over the experts and without grouped_mm
STACKED = 3  # axes of the weights of all experts together
COUNTS = ("total_experts", "num_experts")  # of a class, with experts that compute nothing
PROBED, SAME = 5, 1e-4  # tokens of the comparison with a class; of the largest value, as sums have another order
ROUTED = ["hidden_states", "top_k_index", "top_k_weights"]
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
    loops = _with_every_expert(module)
    stacked = [weight for part in module.modules() if _is_mixture(part) for weight in _stacked(part)]
    if loops or not stacked:
        return loops
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


def _with_every_expert(module: Any) -> tuple[Limitation, ...]:
    """Let classes that loop over the chosen experts, as DBRX does, compute all of them; return what that costs.

    Which experts a text needs is known at run time alone, so no graph can hold such a loop. A class whose loop computes
    something else is left alone; it cannot be traced, which is refused.
    """
    counts = list[int]()
    for part in module.modules():
        count = next((each for name in COUNTS if isinstance(each := getattr(part, name, None), int)), 0)
        if count and _loops(part) and _computes_the_same(part, count, _width(module)):
            part.forward = partial(_every_expert, part, count)
            counts.append(count)
    if not counts:
        return ()
    reason = f"its class loops over those that were chosen, so an engine computes all {max(counts)} for every token"
    if any(map(is_offloaded, module.parameters())):
        reason += (
            "; this form was not compared with the class, because the weights stay on disk: compare a smaller model of "
            "the same class without --max-memory"
        )
    return (Limitation("mixture of experts", reason),)


def _loops(part: torch.nn.Module) -> bool:
    """Return whether a module is a mixture of experts without the other forms, with which transformers wraps others."""
    forward = type(part).forward
    routed = list(inspect.signature(part.forward).parameters) == ROUTED
    return _is_mixture(part) and routed and not hasattr(forward, "__wrapped__")


def _every_expert(
    part: torch.nn.Module,
    count: int,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Return what the forward of a class does, by calling it once with all tokens for each expert.

    Args:
        part: the experts.
        count: their number.
        hidden_states: [..., width].
        top_k_index: the experts of each token, [tokens, chosen].
        top_k_weights: their weights.
    """
    flat = hidden_states.reshape(-1, hidden_states.shape[-1])
    found, ones = torch.zeros_like(flat), torch.ones_like(top_k_weights[:, :1])
    for number in range(count):
        weights = (top_k_weights * (top_k_index == number)).sum(-1, keepdim=True)
        with _OneExpert(number):
            own = type(part).forward(part, flat, torch.full_like(top_k_index[:, :1], number), ones)
        found = found + own.reshape(flat.shape) * weights
    return found.reshape(hidden_states.shape)


def _computes_the_same(part: torch.nn.Module, count: int, width: int) -> bool:
    """Return whether `_every_expert` gives what the class does for a few random tokens [tokens, width].

    Weights that stay on disk are not read for it.
    """
    if any(map(is_offloaded, part.parameters())):
        return True
    seeded = torch.Generator().manual_seed(0)
    states = torch.randn(PROBED, width, generator=seeded)
    weights, chosen = torch.rand(PROBED, count, generator=seeded).topk(min(2, count))
    try:
        with torch.no_grad():
            expected = type(part).forward(part, states, chosen, weights).reshape(states.shape)
            found = _every_expert(part, count, states, chosen, weights)
        return bool((found - expected).abs().max() <= SAME * expected.abs().max())
    except Exception:  # modules raise errors of all kinds
        return False


def _width(module: Any) -> int:
    """Return the width of the tokens of a model; 0 if its config does not state it, so that nothing can be compared."""
    width = getattr(module.config.get_text_config(), "hidden_size", None)
    return width if isinstance(width, int) else 0


class _Number(int):
    """The number of an expert, where a class expects a tensor with it."""

    def item(self) -> int:
        """Return the number."""
        return int(self)

    def __getitem__(self, _: Any) -> int:
        """Return the number."""
        return int(self)


class _OneExpert(TorchFunctionMode):
    """Answers which experts were chosen by one number, and which tokens chose it by all of them."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.nonzero:
            return [_Number(self.number)]
        if func is torch.where and len(args) == 1:
            tokens = torch.arange(args[0].shape[-1])
            return torch.zeros_like(tokens), tokens
        return func(*args, **({} if kwargs is None else kwargs))
