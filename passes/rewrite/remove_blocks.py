"""Removal of whole blocks, equivalent to leaving their layers out of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from passes.base import PassError, Rewritten
from passes.graph.edit import remove_dead, replace_all_uses
from passes.graph.graph import ancestors_of, value_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch
    from torch import fx

    from passes.graph.graph import Graph


@dataclass(frozen=True)
class RemoveBlocks:
    """Rewrite pass that removes the rest of blocks whose branches were dropped.

    A post-norm block leaves the norms after its sums; a pre-norm block leaves nothing. `paths` are the module paths of
    the blocks, as in `Site.block`.

    Before, with the branches of the block dropped::

        %a = layer_norm(%x, block.norm1); %b = layer_norm(%a, block.norm2); return linear(%b)

    After::

        return linear(%x)
    """

    paths: tuple[str, ...]

    rewrites: ClassVar[bool] = True
    needs_data: ClassVar[bool] = False

    def run(self, graph: Graph, data: Iterable[Mapping[str, torch.Tensor]] | None = None) -> Rewritten:
        """Remove the blocks. Return the paths of the blocks that had nodes left.

        Raises:
            PassError: the rest of a block is not a chain from its input to its output, or others read its weights.
        """
        changed = tuple(path for path in self.paths if _weights(graph, path))
        for path in changed:
            _remove(graph, path)
        return Rewritten(changed)


def weights_read(graph: Graph) -> frozenset[str]:
    """Return the names of the parameters and buffers of the model that the graph reads."""
    read = (str(node.target) for node in graph.nodes() if node.op == "get_attr")
    return frozenset(name.removeprefix(graph.prefix) for name in read)


def _weights(graph: Graph, path: str) -> set[fx.Node]:
    prefix = f"{graph.prefix}{path}."
    return {node for node in graph.nodes() if node.op == "get_attr" and str(node.target).startswith(prefix)}


def _remove(graph: Graph, path: str) -> None:
    weights = _weights(graph, path)
    chain = {user for weight in weights for user in weight.users}
    sources = [source for node in chain for source in node.all_input_nodes if source.op != "get_attr"]
    ends = [node for node in chain if not chain.issuperset(node.users)]
    starts = [node for node in sources if node not in chain and not ancestors_of([node]) & chain]
    if len(starts) != 1 or len(ends) != 1 or not _same_shape(starts[0], ends[0]):
        raise PassError(f"{path} cannot be removed as a whole: other blocks read values inside it; drop other sites.")
    replace_all_uses(graph, ends[0], starts[0])
    remove_dead(graph)
    if _weights(graph, path):
        raise PassError(f"{path} cannot be removed as a whole: other blocks read its weights; drop other sites.")


def _same_shape(left: fx.Node, right: fx.Node) -> bool:
    """Return whether two values have the same shape, compared as text so that symbolic sizes are not specialized."""
    return str(getattr(value_of(left), "shape", left)) == str(getattr(value_of(right), "shape", right))
