"""Checkpoints without the dropped blocks or branches (target `transformers`).

A config of transformers states the number of layers, so a checkpoint for `from_pretrained` can leave out whole blocks
and nothing else. Llama and Mistral models without single attentions or MLPs are written in the form that serving
engines open, see `compressor.lower.nemotron_nas`.

The weights are those of the rewritten graph, under their names in the shorter model, in the types of the original
checkpoint. A parity check compares the checkpoint with the graph afterwards. It detects layers whose arithmetic depends
on their number.
"""

from __future__ import annotations

import copy
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compressor.choices import TRANSFORMERS
from compressor.errors import CompressorError
from compressor.lower.nemotron_nas import checkpoint as nemotron_nas
from compressor.settings import BLOCKS_ADVICE, ONLY_BLOCKS, ONLY_DROPS

if TYPE_CHECKING:
    import torch

    from compressor.models import Model
    from passes.graph.graph import Graph, Site
    from passes.plan.plan import Plan

CONFIG: Literal["/config.json"] = "/config.json"
COUNT = "num_hidden_layers"  # every config of transformers has this attribute; some map it to a field of another name
ADVICE = (
    "a config of its architecture cannot describe the model without the removed blocks; drop others (--drop block:N), "
    "or choose another --target"
)


class CheckpointError(CompressorError):
    """A change of the model that a checkpoint of transformers cannot express."""


# -------------------------------------------------------------------------------------------------------------- checks


def check_model(model: Model, drop: str) -> None:
    """Refuse a model that no checkpoint can describe, and a ``--drop`` that a checkpoint of it cannot express.

    Raises:
        CheckpointError: the model is not of transformers, its code is from its own repository, or `drop` asks for
            single branches of a model that has to keep its blocks whole.
    """
    from compressor.models.text.nemotron_nas import DeciLMForCausalLM

    origin = type(model.module).__module__.split(".")[0]
    known = origin == "transformers" or isinstance(model.module, DeciLMForCausalLM)
    if model.source != "transformers" or not known:
        kind = f"is a model of {model.source}" if model.source != "transformers" else "has code from its own repository"
        raise CheckpointError(
            f"--target {TRANSFORMERS} writes checkpoints for from_pretrained of transformers; {model.name} {kind}: "
            "choose another --target."
        )
    counted = re.fullmatch(r"(?:([a-z]+):)?\d+%?", drop.strip())
    reason = nemotron_nas.why_not(model.module)
    if counted is not None and counted[1] != "block" and reason is not None:
        raise CheckpointError(f"{ONLY_BLOCKS}, because {reason}; found --drop {drop}: {BLOCKS_ADVICE}.")


def kept_sites(sites: Sequence[Site], model: Model) -> dict[str, str]:
    """Return the sites that no plan may drop alone, with the reason; empty for a model that drops whole blocks."""
    return {} if drops_blocks(model) else nemotron_nas.first_attention(sites)


def drops_blocks(model: Model) -> bool:
    """Return whether a checkpoint of the model can leave out whole blocks only."""
    return nemotron_nas.why_not(model.module) is not None


def check_blocks(sites: Sequence[Site], model: Model) -> None:
    """Refuse a model whose blocks are not entries of one list, before a search tries to drop them.

    Raises:
        CheckpointError: the blocks are in several lists or in none, or the config does not count them.
    """
    blocks = tuple(dict.fromkeys(site.block for site in sites))
    _check_one_list(blocks, model)
    stack_of(model.module, blocks[:1])


def _check_one_list(blocks: Sequence[str], model: Model) -> None:
    stages = dict.fromkeys(block.rpartition(".")[0] for block in blocks)
    if len(stages) > 1:
        raise CheckpointError(
            f"{ONLY_BLOCKS}, of one list of blocks; {model.name} has several ({', '.join(list(stages)[:2])}): "
            "choose another --target."
        )


def check_plan(plan: Plan, sites: Sequence[Site], model: Model) -> None:
    """Refuse a plan that does anything but drop whole blocks of one stack, or branches that a checkpoint can lack.

    Raises:
        CheckpointError: the message names the first branch or block that the plan changes otherwise.
    """
    for name, action in plan.changes.items():
        if action != "drop":
            raise CheckpointError(f"{ONLY_DROPS}; the plan has {action} at {name}: {BLOCKS_ADVICE}.")
    reason = nemotron_nas.why_not(model.module)
    blocks = {block: [site.name for site in members] for block, members in groupby(sites, key=lambda site: site.block)}
    removed = [block for block, names in blocks.items() if set(names) & set(plan.dropped)]
    if removed:
        _check_one_list(tuple(blocks), model)
    for block in removed:
        kept = [name for name in blocks[block] if name not in plan.dropped]
        if kept and reason is not None:
            dropped = next(name for name in blocks[block] if name in plan.dropped)
            raise CheckpointError(
                f"{ONLY_BLOCKS}, because {reason}; the plan drops {dropped} but keeps {kept[0]}: {BLOCKS_ADVICE}."
            )
    whole = [block for block in removed if set(blocks[block]) <= set(plan.dropped)]
    if whole:
        stack_of(model.module, whole)
    if reason is None and (first := nemotron_nas.missing_first(plan, sites)) is not None:
        raise CheckpointError(
            f"the plan drops {first}, but {nemotron_nas.FIRST}: keep it, drop its whole block, or choose another "
            "--target."
        )


@dataclass(frozen=True)
class Stack:
    """The list of blocks that a config counts.

    Attributes:
        path: module path of the list.
        length: number of blocks in the original model.
        removed: numbers of the removed blocks.
        config: the config that counts them.
    """

    path: str
    length: int
    removed: frozenset[int]
    config: Any

    @property
    def kept(self) -> tuple[int, ...]:
        """Numbers of the remaining blocks."""
        return tuple(number for number in range(self.length) if number not in self.removed)


def stack_of(module: torch.nn.Module, removed: Sequence[str]) -> Stack:
    """Return the stack that contains the removed blocks.

    Args:
        module: a model of transformers.
        removed: module paths of the blocks.

    Raises:
        CheckpointError: a block is no entry of a list, the blocks are in several lists, the config does not count the
            blocks of the list, or no block would be left.
    """
    split_paths = [path.rpartition(".") for path in removed]
    loose = [path for path, (_, _, last) in zip(removed, split_paths, strict=True) if not last.isdigit()]
    if loose:
        raise CheckpointError(
            f"{ONLY_BLOCKS}; {loose[0]} is no entry of a list of blocks (or shares its weights with another): "
            "choose another --target."
        )
    path = split_paths[0][0]
    length = len(list(module.get_submodule(path).children()))
    config = _owner(module, path).config
    count = getattr(config, COUNT, None)
    if {parent for parent, _, _ in split_paths} != {path} or count != length:
        raise CheckpointError(
            f"{ONLY_BLOCKS}; the config of {type(module).__name__} counts {count} layers, which are not the {length} "
            f"blocks in {path}: the model has several stages or repeats a pattern of blocks; choose another --target."
        )
    if len(removed) == length:
        raise CheckpointError(f"--target {TRANSFORMERS}: no block of {path} would be left; drop fewer.")
    return Stack(path, length, frozenset(int(last) for _, _, last in split_paths), config)


def _owner(module: torch.nn.Module, path: str) -> Any:
    """Return the innermost module that has a config and contains the list of blocks at `path`."""
    parts = path.split(".")
    ancestors = [module, *(module.get_submodule(".".join(parts[:end])) for end in range(1, len(parts)))]
    return next(inner for inner in reversed(ancestors) if hasattr(inner, "config"))


# ------------------------------------------------------------------------------------------------------------- writing


def write(graph: Graph, model: Model, path: Path) -> Path:
    """Write a graph as a checkpoint, without the blocks and branches whose weights the graph does not read.

    Every weight is written in its type in the original checkpoint (`Model.dtypes`), and the config states the type that
    holds most values. A graph that healing has changed must be rounded to these types before, see `rounded`.

    Args:
        graph: the traced model after all rewrites.
        model: the model that the graph was traced from.
        path: ``config.json`` in a folder, which is created. The files that belong to the model, such as those of the
            tokenizer, are written there too.

    Returns:
        `path`.

    Raises:
        CheckpointError: the config cannot describe the model without the removed blocks.
    """
    from compressor.internals.transformers import quiet
    from compressor.models.text import sentence_transformers
    from compressor.models.weights.lazy_weights import write_from_disk
    from passes.execute.offloaded_weights import is_offloaded

    path.parent.mkdir(exist_ok=True)
    with quiet():
        model.save(path.parent)
        weights = model.module.state_dict(keep_vars=True) | _weights(graph, model.module)
        shorter = _shorter_model(graph, model, weights)
        if any(map(is_offloaded, shorter.parameters())):
            write_from_disk(shorter, path.parent)
        else:
            shorter.save_pretrained(path.parent)
            _set_dtype(shorter.config, shorter)
            shorter.config.save_pretrained(path.parent)
        sentence_transformers.write_weights(model.module, _in_stored_types(weights, model), path.parent)
    for file in path.parent.rglob("*.safetensors"):
        shutil.copymode(path, file)  # safetensors lets only the owner read its files
    return path


def rounded(graph: Graph, model: Model) -> Graph:
    """Return a fork whose weights are rounded to their types in the checkpoint, as float32; only changed ones differ.

    Raises:
        CheckpointError: a weight is too large for its type.
    """
    from compressor.models.weights.stored_dtypes import as_stored
    from passes.graph.edit import replace_parameter

    fork = graph.fork()
    for name, weight in _weights(graph, model.module).items():
        stored = as_stored(weight.detach(), model.dtypes.get(name))
        if stored.dtype != weight.dtype and weight is not model.module.get_parameter(name):
            if not stored.isfinite().all():
                raise CheckpointError(
                    f"--target {TRANSFORMERS}: healing made values of {name} too large for {stored.dtype}, its type in "
                    "the checkpoint; leave --heal out, or choose another --target."
                )
            replace_parameter(fork, f"{graph.prefix}{name}", stored.to(weight.dtype))
    return fork


def _set_dtype(config: Any, module: torch.nn.Module) -> None:
    """State in a config and its parts the type that holds most values of the parameters.

    transformers opens all weights in this type by default.
    """
    values = Counter[Any]()
    for weight in module.parameters():
        values[weight.dtype] += weight.numel()
    parts = (getattr(config, name, None) for name in getattr(config, "sub_configs", {}))
    for each in (config, *(part for part in parts if part is not None)):
        each.dtype = values.most_common(1)[0][0]


def _in_stored_types(weights: Mapping[str, torch.Tensor], model: Model) -> dict[str, torch.Tensor]:
    """Return the weights in their types in the checkpoint; equal types share memory, and tied weights stay tied."""
    from compressor.models.weights.stored_dtypes import as_stored
    from passes.execute.offloaded_weights import is_offloaded

    stored: dict[int, torch.Tensor] = {}
    for name, weight in weights.items():
        if id(weight) not in stored:
            kept = is_offloaded(weight)  # its file has the type
            stored[id(weight)] = weight if kept else as_stored(weight.detach(), model.dtypes.get(name))
    return {name: stored[id(weight)] for name, weight in weights.items()}


def _shorter_model(graph: Graph, model: Model, weights: Mapping[str, torch.Tensor]) -> Any:
    """Build a model without the blocks and branches whose weights the graph does not read.

    Weights that are stored as float32 are shared with the graph, not copied. The head of a sentence embedding is left
    out.
    """
    from compressor.models.text import sentence_transformers

    module: Any = model.module
    caches = {name.split(".")[1] for name in graph.state}
    if not caches <= {str(number) for number in range(len(caches))}:  # caches of different sizes keep their numbers
        raise CheckpointError(f"--target {TRANSFORMERS}: its layers keep caches of different sizes, so that {ADVICE}.")
    head = f"{sentence_transformers.HEAD}."
    own = {name: weight for name, weight in weights.items() if not name.startswith(head)}
    weights = _in_stored_types(own, model)
    try:
        if nemotron_nas.lacks_branches(graph, module):
            shorter: Any = nemotron_nas.shorter_model(graph, module, weights)
        else:
            shorter = _without_blocks(module, _unused_blocks(graph, module), weights)
    except RuntimeError as error:  # the module that the config describes has other weights
        raise CheckpointError(f"--target {TRANSFORMERS}: {ADVICE}.") from error
    shorter.tie_weights()
    if getattr(module, "generation_config", None) is not None:
        shorter.generation_config = module.generation_config
    return shorter.eval()


def _without_blocks(module: Any, removed: Sequence[str], weights: Mapping[str, torch.Tensor]) -> Any:
    """Build a model of the same class without some blocks.

    Raises:
        RuntimeError: the model that the config describes has other weights.
    """
    import torch

    config = copy.deepcopy(module.config)
    if removed:
        stack = stack_of(module, removed)
        weights = dict(_renumbered(weights, stack))
        set_layer_count(
            config if stack.config is module.config else _sub_config(config, module.config, stack.config), stack
        )
    with torch.device("meta"):
        shorter = type(module)(config)
    shorter.load_state_dict(weights, assign=True)
    return shorter


def _unused_blocks(graph: Graph, module: torch.nn.Module) -> list[str]:
    """Return the paths of the blocks, entries of a ModuleList with weights, of which the graph reads no weight."""
    import torch

    from passes.rewrite.remove_blocks import weights_read

    read, unused = weights_read(graph), []
    for path, stack in module.named_modules():
        for name, block in stack.named_children() if isinstance(stack, torch.nn.ModuleList) else ():
            own = [f"{path}.{name}.{inner}" for inner, _ in block.named_parameters()]
            if own and not read.intersection(own):
                unused.append(f"{path}.{name}")
    return unused


def _weights(graph: Graph, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights of the graph, which healing may have changed, by their names in the module."""
    names = {f"{graph.prefix}{name}": name for name, _ in module.named_parameters(remove_duplicate=False)}
    parameters = graph.module.named_parameters(remove_duplicate=False)
    return {names[name]: weight for name, weight in parameters if name in names}


def _renumbered(weights: Mapping[str, torch.Tensor], stack: Stack) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the remaining weights by name, with the remaining blocks numbered from 0 without gaps."""
    new_paths = {f"{stack.path}.{old}": f"{stack.path}.{new}" for new, old in enumerate(stack.kept)}
    block_weight = re.compile(rf"({re.escape(stack.path)}\.\d+)\.(.+)")
    for name, weight in weights.items():
        matched = block_weight.fullmatch(name)
        if matched is None:
            yield name, weight
        elif matched[1] in new_paths:
            yield f"{new_paths[matched[1]]}.{matched[2]}", weight


def _sub_config(copied: Any, original: Any, part: Any) -> Any:
    """Return the sub-config of `copied`, such as its vision_config, that corresponds to `part` of `original`.

    Raises:
        CheckpointError: `part` is no sub-config of `original`, so the checkpoint would not contain it.
    """
    names = [name for name, value in vars(original).items() if value is part]
    if not names:
        raise CheckpointError(f"{type(original).__name__} does not hold the config of the blocks; {BLOCKS_ADVICE}.")
    return getattr(copied, names[0])


def set_layer_count(config: Any, stack: Stack) -> None:
    """Set the number of layers in a config, and reduce its lists of one entry per layer to the remaining blocks."""
    from compressor.internals.transformers import keep_stages

    for name, value in vars(config).items():
        if "layer" in name and isinstance(value, (list, tuple)) and len(value) == stack.length:
            setattr(config, name, type(value)(value[number] for number in stack.kept))
    setattr(config, COUNT, len(stack.kept))
    keep_stages(config, stack.length, len(stack.kept))
