"""Write Llama and Mistral models without single attentions and MLPs as ``nemotron-nas`` checkpoints.

The weights keep their names, and those of absent branches are left out. Blocks without any branch are left out as a
whole, and the others are numbered without gaps. The folder holds no code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from compressor.models.text.block_configs import BlockShape
    from compressor.models.text.nemotron_nas import DeciLMForCausalLM
    from passes.graph.graph import Graph, Site
    from passes.plan.plan import Plan

LAYERS = "model.layers"
# Weights of a block by branch; the norm before a branch belongs to it.
BRANCHES = {"attention": ("self_attn", "input_layernorm"), "mlp": ("mlp", "post_attention_layernorm")}
FIRST = "serving engines need the attention of the first block (vLLM and llama.cpp)"
# Fields of a config that the other form states otherwise, or does not have.
_REPLACED = ("model_type", "architectures", "transformers_version", "sliding_window", "layer_types", "block_configs")


def why_not(module: Any) -> str | None:
    """Return why single branches of a model cannot be left out of a checkpoint, as a clause; None if they can be."""
    import transformers

    from compressor.models.text.nemotron_nas import DeciLMForCausalLM

    name = type(module).__name__
    if type(module) not in (transformers.LlamaForCausalLM, transformers.MistralForCausalLM, DeciLMForCausalLM):
        return f"the form that serving engines open with single branches left out is for Llama and Mistral, not {name}"
    if getattr(module.config, "sliding_window", None) is not None:
        return f"that form has no sliding window, and the attention of this {name} has one"
    if module.config.hidden_act != "silu":
        return f"that form has the activation silu, and this {name} has {module.config.hidden_act}"
    return None


def first_attention(sites: Sequence[Site]) -> dict[str, str]:
    """Return the attention of the first block with the reason why it has to stay."""
    return {site.name: FIRST for site in sites[:1] if site.kind == "attention"}


def missing_first(plan: Plan, sites: Sequence[Site]) -> str | None:
    """Return the attention that a plan drops from the first block that is left; None if it keeps it.

    A block of which every branch is dropped is no block of the checkpoint.
    """
    left = {site.block for site in sites if site.name not in plan.dropped}
    kept = [site for site in sites if site.block in left]
    dropped = kept and kept[0].kind == "attention" and kept[0].name in plan.dropped
    return kept[0].name if dropped else None


def lacks_branches(graph: Graph, module: torch.nn.Module) -> bool:
    """Return whether a block of the graph has one of the two branches without the other, or the module has the form."""
    from compressor.models.text.nemotron_nas import DeciLMForCausalLM

    if isinstance(module, DeciLMForCausalLM):
        return True
    return why_not(module) is None and any(len(branches) == 1 for branches in _branches(graph, module))


def shorter_model(graph: Graph, module: Any, weights: Mapping[str, torch.Tensor]) -> DeciLMForCausalLM:
    """Build a model with the branches whose weights a graph reads.

    Args:
        graph: the rewritten graph of the module.
        module: a model for which `why_not` returns None.
        weights: all weights of the module by name, in the types of the checkpoint; they are shared, not copied.

    Raises:
        RuntimeError: the model that the config describes has other weights.
    """
    import torch

    from compressor.models.text.nemotron_nas import DeciLMForCausalLM

    branches = _branches(graph, module)
    config = _config(module, branches)
    with torch.device("meta"):
        shorter = DeciLMForCausalLM(config)
    shorter.load_state_dict(dict(_kept(weights, branches)), assign=True)
    return shorter


def _branches(graph: Graph, module: torch.nn.Module) -> list[tuple[str, ...]]:
    """Return the branches of each block of which the graph reads weights."""
    from passes.rewrite.remove_blocks import weights_read

    read = weights_read(graph)

    def is_read(block: int, branch: str) -> bool:
        return any(name.startswith(f"{LAYERS}.{block}.{BRANCHES[branch][0]}.") for name in read)

    count = len(list(module.get_submodule(LAYERS).children()))
    return [tuple(branch for branch in BRANCHES if is_read(block, branch)) for block in range(count)]


def _config(module: Any, branches: Sequence[Sequence[str]]) -> Any:
    """Return the config of the model with these branches in its blocks."""
    from compressor.models.text.block_configs import BlockShape
    from compressor.models.text.nemotron_nas import NemotronNasConfig

    old = module.config
    shapes = [
        BlockShape(
            shape.key_value_heads if "attention" in kept else None, shape.width if "mlp" in kept else None
        ).to_config(old.num_attention_heads, old.hidden_size)
        for shape, kept in zip(_shapes(module), branches, strict=True)
        if kept
    ]
    fields = {key: value for key, value in old.to_dict().items() if key not in _REPLACED}
    return NemotronNasConfig(**fields | {"num_hidden_layers": len(shapes), "block_configs": shapes})


def _shapes(module: Any) -> tuple[BlockShape, ...]:
    """Return the shape of each block before the plan."""
    from compressor.models.text.block_configs import BlockShape
    from compressor.models.text.nemotron_nas import NemotronNasConfig, block_shapes

    config: Any = module.config
    if isinstance(config, NemotronNasConfig):
        shapes: tuple[BlockShape, ...] = block_shapes(config, type(module).__name__)
        return shapes
    whole = BlockShape(config.num_key_value_heads, config.intermediate_size)
    return (whole,) * int(config.num_hidden_layers)


def _kept(weights: Mapping[str, torch.Tensor], branches: Sequence[Sequence[str]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights of the remaining branches, with the remaining blocks numbered from 0 without gaps."""
    left = [block for block, kept in enumerate(branches) if kept]
    numbers = {block: number for number, block in enumerate(left)}
    owners = {part: branch for branch, parts in BRANCHES.items() for part in parts}
    for name, weight in weights.items():
        matched = re.fullmatch(rf"{re.escape(LAYERS)}\.(\d+)\.((\w+)\..+)", name)
        if matched is None:
            yield name, weight
        elif owners.get(matched[3], "") in branches[int(matched[1])]:
            yield f"{LAYERS}.{numbers[int(matched[1])]}.{matched[2]}", weight
