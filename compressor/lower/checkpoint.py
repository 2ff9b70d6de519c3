"""Target `transformers`: no engine, but a plain checkpoint that lacks whole blocks, for `from_pretrained`.

A config of transformers says how many layers there are, so whole blocks can go and nothing else. The weights are those
of the rewritten graph, under the names that they have in the shorter model. That this model computes the same is held
against the graph afterwards: layers whose arithmetic depends on their number show there.
"""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from compressor.choices import TRANSFORMERS
from compressor.errors import CompressorError
from compressor.settings import INSTEAD, ONLY_BLOCKS

if TYPE_CHECKING:
    import torch

    from compressor.models import Model
    from passes.graph.graph import Graph, Site
    from passes.plan.plan import Plan

CONFIG: Literal["/config.json"] = "/config.json"
COUNT = "num_hidden_layers"  # every config of transformers answers to it, whatever its own field is called
ADVICE = (
    "a config of its architecture cannot say which blocks are gone; drop others (--drop block:N), or choose another "
    "--target"
)


class CheckpointError(CompressorError):
    """What is to be changed cannot be said by a checkpoint of transformers."""


# ----------------------------------------------------------------------------------------------------- what it can say


def check_model(model: Model) -> None:
    """Refuse a model that `from_pretrained` opens with code of its own, or not at all.

    Raises:
        CheckpointError: it is such a model.
    """
    origin = type(model.module).__module__.split(".")[0]
    if model.source != "transformers" or origin != "transformers":
        found = f"a model of {model.source}" if model.source != "transformers" else "code from its own repository"
        raise CheckpointError(
            f"--target {TRANSFORMERS} writes checkpoints for from_pretrained of transformers; {model.name} is {found}: "
            "choose another --target."
        )


def check_blocks(sites: Sequence[Site], model: Model) -> None:
    """Refuse a model that is not one list of blocks, before a search tries which of them it can do without.

    Raises:
        CheckpointError: it is not, with the reason.
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
    """Refuse a plan that does anything but drop whole blocks of one stack.

    Raises:
        CheckpointError: names the branch or block at which it does.
    """
    for name, action in plan.changes.items():
        if action != "drop":
            raise CheckpointError(f"{ONLY_BLOCKS}; the plan has {action} at {name}: {INSTEAD}.")
    blocks = {block: [site.name for site in members] for block, members in groupby(sites, key=lambda site: site.block)}
    gone = [block for block, names in blocks.items() if set(names) & set(plan.dropped)]
    if gone:
        _check_one_list(tuple(blocks), model)
    for block in gone:
        kept = [name for name in blocks[block] if name not in plan.dropped]
        if kept:
            dropped = next(name for name in blocks[block] if name in plan.dropped)
            raise CheckpointError(f"{ONLY_BLOCKS}; the plan drops {dropped} but keeps {kept[0]}: {INSTEAD}.")
    if gone:
        stack_of(model.module, gone)


@dataclass(frozen=True)
class Stack:
    """The list of blocks that a config counts: where it is in the model, how long it was, and what is gone from it."""

    path: str
    length: int
    gone: frozenset[int]
    config: Any

    @property
    def kept(self) -> tuple[int, ...]:
        """Numbers of the blocks that stay."""
        return tuple(number for number in range(self.length) if number not in self.gone)


def stack_of(module: torch.nn.Module, gone: Sequence[str]) -> Stack:
    """The one stack that these blocks are entries of.

    Args:
        module: a model of transformers.
        gone: module paths of the blocks.

    Raises:
        CheckpointError: there is none, they are of several, or its config does not count its blocks.
    """
    places = [path.rpartition(".") for path in gone]
    loose = [path for path, (_, _, last) in zip(gone, places, strict=True) if not last.isdigit()]
    if loose:
        raise CheckpointError(
            f"{ONLY_BLOCKS}; {loose[0]} is no entry of a list of blocks (or shares its weights with another): "
            "choose another --target."
        )
    path, length = places[0][0], len(list(module.get_submodule(places[0][0]).children()))
    config = _owner(module, path).config
    count = getattr(config, COUNT, None)
    if {parent for parent, _, _ in places} != {path} or count != length:
        raise CheckpointError(
            f"{ONLY_BLOCKS}; the config of {type(module).__name__} counts {count} layers, which are not the {length} "
            f"blocks in {path}: it has several stages, or a pattern; choose another --target."
        )
    if len(gone) == length:
        raise CheckpointError(f"--target {TRANSFORMERS}: no block of {path} would be left; drop fewer.")
    return Stack(path, length, frozenset(int(last) for _, _, last in places), config)


def _owner(module: torch.nn.Module, path: str) -> Any:
    """The innermost module around a list of blocks that has a config of its own."""
    parts = path.split(".")
    around = [module, *(module.get_submodule(".".join(parts[:end])) for end in range(1, len(parts)))]
    return next(inner for inner in reversed(around) if hasattr(inner, "config"))


# ------------------------------------------------------------------------------------------------------------- writing


def write(graph: Graph, model: Model, path: Path) -> Path:
    """Write a graph that lacks some blocks of a model, or none, as a checkpoint.

    Args:
        graph: the traced model, rewritten.
        model: what it was traced from.
        path: of the config in a folder to be made, which gets the tokenizer, or whatever goes with the model, too.

    Returns:
        The path.

    Raises:
        CheckpointError: the blocks that are gone are of no stack that the config counts.
    """
    from compressor.internals.transformers import quiet
    from compressor.models.lazy_weights import write_from_disk
    from passes.execute.offloaded_weights import is_offloaded

    path.parent.mkdir(exist_ok=True)
    with quiet():
        model.save(path.parent)
        shorter = _shorter(graph, model.module)
        if any(map(is_offloaded, shorter.parameters())):
            write_from_disk(shorter, path.parent)
        else:
            shorter.save_pretrained(path.parent)
    for weights in path.parent.glob("*.safetensors"):
        shutil.copymode(path, weights)  # safetensors makes them readable by their owner alone
    return path


def _shorter(graph: Graph, module: Any) -> Any:
    """A model of the same class without the blocks of which the graph reads nothing, with the graph's weights.

    The weights are shared with the graph, not copied.
    """
    import torch

    gone = list(_unread_blocks(graph, module))
    caches = {name.split(".")[1] for name in graph.state}
    if not caches <= {str(number) for number in range(len(caches))}:  # of different sizes: each keeps its number
        raise CheckpointError(f"--target {TRANSFORMERS}: its layers keep caches of different sizes, so that {ADVICE}.")
    weights = module.state_dict(keep_vars=True) | _weights(graph, module)
    config = copy.deepcopy(module.config)
    if gone:
        stack = stack_of(module, gone)
        weights = dict(_renumbered(weights, stack))
        shorten(config if stack.config is module.config else _same(config, module.config, stack.config), stack)
    with torch.device("meta"):
        shorter = type(module)(config)
    try:
        shorter.load_state_dict(weights, assign=True)
    except RuntimeError as error:  # weights that the config does not foresee, or the other way round
        raise CheckpointError(f"--target {TRANSFORMERS}: {ADVICE}.") from error
    shorter.tie_weights()
    if getattr(module, "generation_config", None) is not None:
        shorter.generation_config = module.generation_config
    return shorter.eval()


def _unread_blocks(graph: Graph, module: torch.nn.Module) -> Iterator[str]:
    """Paths of entries of lists that have weights, none of which the graph reads."""
    import torch

    from passes.rewrite.remove_blocks import weights_read

    read = weights_read(graph)
    for path, stack in module.named_modules():
        for name, block in stack.named_children() if isinstance(stack, torch.nn.ModuleList) else ():
            own = [f"{path}.{name}.{inner}" for inner, _ in block.named_parameters()]
            if own and not read.intersection(own):
                yield f"{path}.{name}"


def _weights(graph: Graph, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights of the graph by their names in the module: healing may have changed them."""
    known = {f"{graph.prefix}{name}": name for name, _ in module.named_parameters(remove_duplicate=False)}
    found = graph.module.named_parameters(remove_duplicate=False)
    return {known[name]: weight for name, weight in found if name in known}


def _renumbered(weights: Mapping[str, torch.Tensor], stack: Stack) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights that stay, the blocks numbered without a gap."""
    places = {f"{stack.path}.{old}": f"{stack.path}.{new}" for new, old in enumerate(stack.kept)}
    within = re.compile(rf"({re.escape(stack.path)}\.\d+)\.(.+)")
    for name, weight in weights.items():
        matched = within.fullmatch(name)
        if matched is None:
            yield name, weight
        elif matched[1] in places:
            yield f"{places[matched[1]]}.{matched[2]}", weight


def _same(copied: Any, original: Any, part: Any) -> Any:
    """The part of a copied config that is in the place of a part of the original, such as a vision_config.

    Raises:
        CheckpointError: it is none of its parts, so that the checkpoint would not hold it.
    """
    names = [name for name, value in vars(original).items() if value is part]
    if not names:
        raise CheckpointError(f"{type(original).__name__} does not hold the config of the blocks; {INSTEAD}.")
    return getattr(copied, names[0])


def shorten(config: Any, stack: Stack) -> None:
    """Let a config count the blocks that stay, and keep their entries of what it lists layer by layer."""
    from compressor.internals.transformers import keep_stages

    for name, value in vars(config).items():
        if "layer" in name and isinstance(value, (list, tuple)) and len(value) == stack.length:
            setattr(config, name, type(value)(value[number] for number in stack.kept))
    setattr(config, COUNT, len(stack.kept))
    keep_stages(config, stack.length, len(stack.kept))
