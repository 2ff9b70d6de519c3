"""Recurrences over the tokens of a text as one operator, ``compressor::recurrence``.

Mamba, Mamba-2, RecurrentGemma, lightning attention (MiniMax), gated delta networks and Kimi's delta attention keep a
matrix S for each head, with a row for each entry of a key and a column for each entry of a value. Every token changes
it,

    S <- diag(decay) S,    S <- S + key (value - rate (key S)),    output = query S,

where the first four have no rate (0): Mamba's channels are the heads, with one value each. Transformers computes this
in a Python loop over the tokens, or over blocks of them, which torch.export writes out for one number of tokens. While
a model is traced, its functions are therefore replaced by those of this module, which call the operator; in ONNX it is
a Scan.

Sources: Gu and Dao 2023 (arXiv:2312.00752), Dao and Gu 2024 (arXiv:2405.21060), De et al. 2024 (arXiv:2402.19427),
Yang, Kautz and Hatamizadeh 2024 (arXiv:2412.06464), Qin et al. 2024 (arXiv:2401.04658).
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.nn import functional

from compressor.internals.transformers import GRIFFIN, LIGHTNING, with_names

Tensor = torch.Tensor


@torch.library.custom_op(
    "compressor::recurrence",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor decay, Tensor? rate, Tensor state) -> (Tensor, Tensor)",
)
def recurrence(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, rate: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the outputs [rows, tokens, heads, values] and the last state [rows, heads, keys, values].

    Args:
        query: [rows, tokens, heads, keys]; an axis of heads, here and below, may have size 1.
        key: [rows, tokens, heads, keys].
        value: [rows, tokens, heads, values].
        decay: factor of the state, [rows, tokens, heads, keys or 1].
        rate: what a token takes of the old value under its key, [rows, tokens, heads, 1]; None for nothing.
        state: before the first token, [rows, heads, keys, values].
    """
    return _computed(query, key, value, decay, rate, state)


def _computed(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, rate: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    outputs = []
    for token in range(value.shape[1]):
        state = state * decay[:, token, ..., None]
        column, added = key[:, token, ..., None], value[:, token]
        if rate is not None:
            added = added - rate[:, token] * (column * state).sum(-2)
        state = state + column * added[..., None, :]
        outputs.append((query[:, token, ..., None] * state).sum(-2))
    return torch.stack(outputs, 1), state.clone(memory_format=torch.contiguous_format)


@recurrence.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, rate: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    return value.new_empty(value.shape), state.new_empty(state.shape)


def _keep(ctx: Any, inputs: tuple[Tensor | None, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Compute the outputs again, as their derivatives are those of the operators they consist of."""
    inputs = [None if each is None else each.detach().requires_grad_() for each in ctx.saved_tensors]
    with torch.enable_grad():
        outputs = _computed(*inputs)  # type: ignore[arg-type]
    known = [each for each in inputs if each is not None]
    found = iter(torch.autograd.grad(outputs, known, grads))
    return tuple(None if each is None else next(found) for each in inputs)


recurrence.register_autograd(_gradients, setup_context=_keep)
OPERATOR = torch.ops.compressor.recurrence.default


def as_operators(module: torch.nn.Module) -> contextlib.AbstractContextManager[None]:
    """Replace the recurrences that the classes of a module call, for as long as it is traced."""
    return with_names(
        module,
        {
            "mamba_selective_scan": _selective_scan,
            "mamba2_chunk_scan": _state_space,
            "torch_chunk_gated_delta_rule": _delta_rule,
            "chunk_kimi_delta_attention": _delta_rule,
            GRIFFIN: _linear_scan,
            LIGHTNING: _lightning_attention,
        },
    )


def _selective_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **_: Any,
) -> Any:
    """Compute Mamba's scan, with the arguments of ``mamba_selective_scan``.

    They are [rows, channels, tokens], of keys [rows, keys, tokens] (B, C), and of the decay [channels, keys] (A).
    """
    if delta_bias is not None:
        dt = dt + delta_bias[..., None]
    dt = functional.softplus(dt) if delta_softplus else dt
    steps = dt.transpose(1, 2)[..., None]  # [rows, tokens, channels, 1]
    values = steps * hidden_states.transpose(1, 2)[..., None]
    query, key = (each.transpose(1, 2)[:, :, None] for each in (C, B))
    found, state = recurrence(query, key, values, torch.exp(A * steps), None, _zeros(values, A.shape[-1]))
    output = found[..., 0].transpose(1, 2)
    if D is not None:
        output = output + hidden_states * D[:, None]
    if z is not None:
        output = output * functional.silu(z)
    return (output, state[..., 0]) if return_last_state else output


def _state_space(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **_: Any,
) -> Any:
    """Compute Mamba-2's scan, with the arguments of ``mamba2_chunk_scan``: [rows, tokens, heads, values], A [heads]."""
    if dt_bias is not None:
        dt = dt + dt_bias
    steps = torch.clamp(functional.softplus(dt) if dt_softplus else dt, dt_limit[0], dt_limit[1])[..., None]
    heads = hidden_states.shape[2]
    query, key = (each.repeat_interleave(heads // each.shape[2], dim=2) for each in (C, B))
    values = hidden_states * steps
    state = _zeros(values, key.shape[-1]) if initial_states is None else initial_states.transpose(2, 3)
    output, last = recurrence(query, key, values, torch.exp(A[:, None] * steps), None, state)
    if D is not None:
        output = output + hidden_states * D[..., None]
    return (output, last.transpose(2, 3)) if return_final_states else output


def _delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute the gated delta rule with the arguments of ``torch_chunk_gated_delta_rule``: [rows, tokens, heads, size].

    The logarithm of the decay, `g`, has one number for each head, or one for each entry of its keys as in Kimi's.
    """
    if use_qk_l2norm_in_kernel:
        query, key = (each * torch.rsqrt(each.square().sum(-1, keepdim=True) + 1e-6) for each in (query, key))
    heads = value.shape[2]
    query, key = (each.repeat_interleave(heads // each.shape[2], dim=2) for each in (query, key))
    rate, decay = beta[..., None], torch.exp(g if g.ndim == value.ndim else g[..., None])
    state = _zeros(value, key.shape[-1]) if initial_state is None else initial_state
    output, last = recurrence(query * query.shape[-1] ** -0.5, key, value * rate, decay, rate, state)
    return output, last if output_final_state else None


def _linear_scan(
    _: Any,
    hidden_states: Tensor,
    recurrent_gate: Tensor,
    reset: Tensor,
    recurrent_states: Tensor | None,
    acc_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Compute RecurrentGemma's recurrence: each channel, [rows, tokens, channels], is a head with one key and value."""
    values, decay = (each[..., None] for each in (hidden_states, recurrent_gate * ~reset))
    ones = torch.ones_like(values)
    state = _zeros(values, 1) if recurrent_states is None else recurrent_states[..., None, None]
    output, last = recurrence(ones, ones, values, decay, None, state)
    return output[..., 0], last[..., 0, 0]


def _lightning_attention(
    module: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any
) -> tuple[Tensor, Tensor]:
    """Compute the forward of MiniMax's lightning attention without a cache, of hidden states [rows, tokens, width].

    Transformers has no function for the recurrence alone, which it computes in blocks of 256 tokens. The mask, [rows,
    tokens], is 0 at padding, whose keys and values are zero.
    """
    states = module.act_fn(module.qkv_proj(hidden_states))
    if attention_mask is not None:
        states = states * attention_mask[:, :, None].to(states.dtype)
    states = states.unflatten(-1, (module.num_attention_heads, 3 * module.head_dim))
    query, key, value = states.split(module.head_dim, dim=-1)
    decay = torch.exp(-module.slope_rate[:, :, 0]).expand(*value.shape[:3], 1)
    output, last = recurrence(query, key, value, decay, None, _zeros(value, module.head_dim))
    gate = torch.sigmoid(module.output_gate(hidden_states))
    return module.out_proj(gate * module.norm(output.flatten(2))), last


def _zeros(values: Tensor, keys: int) -> Tensor:
    """Return a state of zeros for values [rows, tokens, heads, size]."""
    rows, _, heads, size = values.shape
    return values.new_zeros(rows, heads, keys, size)
