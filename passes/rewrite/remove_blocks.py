"""Take blocks out of a stack as wholes, as leaving a layer out of a checkpoint does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from passes.base import PassError, Rewritten
from passes.graph.edit import bypass, remove_dead
from passes.graph.graph import needed_by, value_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch
    from torch import fx

    from passes.graph.graph import Graph


@dataclass(frozen=True)
class RemoveBlocks:
    """Take out what is left of blocks whose branches were dropped: the norms that a post-norm block puts behind sums.

    `paths` are the modules of the blocks, as `Site.block` has them. A pre-norm block is gone with its branches.

    Before, where the block's own branches are gone::

        %a = layer_norm(%x, block.norm1); %b = layer_norm(%a, block.norm2); return linear(%b)

    After::

        return linear(%x)
    """

    paths: tuple[str, ...]

    rewrites: ClassVar[bool] = True
    needs_data: ClassVar[bool] = False

    def run(self, graph: Graph, data: Iterable[Mapping[str, torch.Tensor]] | None = None) -> Rewritten:
        """Edit the graph; returns the paths of the blocks that had left something.

        Raises:
            PassError: more of a block is left than a chain from its input to its output, or others read its weights.
        """
        changed = tuple(path for path in self.paths if _weights(graph, path))
        for path in changed:
            _remove(graph, path)
        return Rewritten(changed)


def weights_read(graph: Graph) -> frozenset[str]:
    """Names of the model's parameters and buffers that the graph reads."""
    read = (str(node.target) for node in graph.nodes() if node.op == "get_attr")
    return frozenset(name.removeprefix(graph.prefix) for name in read)


def _weights(graph: Graph, path: str) -> set[fx.Node]:
    prefix = f"{graph.prefix}{path}."
    return {node for node in graph.nodes() if node.op == "get_attr" and str(node.target).startswith(prefix)}


def _remove(graph: Graph, path: str) -> None:
    left = _weights(graph, path)
    chain = {reader for weight in left for reader in weight.users}
    first = [source for node in chain for source in node.all_input_nodes if source.op != "get_attr"]
    ends = [node for node in chain if not chain.issuperset(node.users)]
    starts = [node for node in first if node not in chain and not needed_by([node]) & chain]
    if len(starts) != 1 or len(ends) != 1 or not _alike(starts[0], ends[0]):
        raise PassError(f"{path} cannot be taken out as a whole: other blocks read what it computes; drop others.")
    bypass(graph, ends[0], starts[0])
    remove_dead(graph)
    if _weights(graph, path):
        raise PassError(f"{path} cannot be taken out as a whole: other blocks read its weights; drop others.")


def _alike(left: fx.Node, right: fx.Node) -> bool:
    """Whether two values have one shape; as text, because comparing symbolic sizes would fix them."""
    return str(getattr(value_of(left), "shape", left)) == str(getattr(value_of(right), "shape", right))
