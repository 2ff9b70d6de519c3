"""The attentions of a language model that read a KV cache, in order."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch

from passes.base import PassError
from passes.graph.graph import output_values, value_of
from passes.graph.sites import find_sites

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import fx

    from passes.graph.graph import Graph, Site

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class CachedAttention:
    """One attention with a KV cache.

    Attributes:
        depth: number of blocks before it in the model as it was loaded, by the name of its module.
        trunk: the value that enters its block, ``[B, S, D]``.
        keys: the keys of the new tokens, ``[B, kv heads, S, d]``, as the cache stores them.
        past: the input with the keys of earlier tokens.
        joined: the keys of all tokens.
        site: its site.
    """

    depth: int
    trunk: fx.Node
    keys: fx.Node
    past: fx.Node
    joined: fx.Node
    site: Site

    def fused(self, region: Sequence[fx.Node]) -> fx.Node:
        """Return its scaled_dot_product_attention.

        Args:
            region: the nodes that are computed from the trunk, in order.

        Raises:
            PassError: it has none, or the cache holds no keys that its queries are multiplied by.
        """
        reached = {self.joined}
        for node in region:
            if not reached.intersection(node.all_input_nodes):
                continue
            if node.target == ATTENTION and node.args[1] in reached:
                _check_widths(self, node)
                return node
            reached.add(node)
        raise PassError(
            f"{self.site.name} has no scaled_dot_product_attention, whose scores rank image tokens; choose the method "
            "norm or random."
        )


def _check_widths(attention: CachedAttention, fused: fx.Node) -> None:
    queries, keys = value_of(fused.args[0]).shape, value_of(attention.keys).shape  # type: ignore[arg-type]
    if len(queries) != 4 or queries[3] != keys[3] or queries[1] % keys[1]:
        raise PassError(
            f"{attention.site.name} has queries {list(queries)} and a cache of keys {list(keys)}; expected as many "
            "features for each head, to rank image tokens by attention. Choose the method norm or random."
        )


def cached_attentions(graph: Graph) -> tuple[CachedAttention, ...]:
    """Return the attentions of a language model that have a KV cache of their own, in order.

    Raises:
        PassError: the graph has none.
    """
    index = {node: position for position, node in enumerate(graph.nodes())}
    named = {node.name: node for node in index}
    sites = [site for site in find_sites(graph) if site.kind == "attention"]
    found = []
    for past, (keys, joined) in _caches(graph).items():
        around = [site for site in sites if index[named[site.trunk]] < index[keys] < index[named[site.add]]]
        if around:
            site = around[-1]
            found.append(CachedAttention(_depth(site.block), named[site.trunk], keys, past, joined, site))
    if not found:
        raise PassError(
            "found no attention with a KV cache; expected the language model of a vision-language model. Image tokens "
            "are dropped from its prompt."
        )
    return tuple(sorted(found, key=lambda each: index[each.keys]))


def _caches(graph: Graph) -> Mapping[fx.Node, tuple[fx.Node, fx.Node]]:
    """Map the input of each cache of keys to the new keys and to all keys."""
    outputs = dict(zip(graph.outputs, output_values(graph), strict=True))
    inputs = dict(zip(graph.inputs, graph.placeholders(), strict=True))
    caches: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    for present, past in graph.state.items():
        joined = outputs[present]
        parts = cast("tuple[fx.Node, ...]", joined.args[0]) if joined.target == aten.cat.default else ()
        if present.endswith(".key") and past in inputs and len(parts) == 2 and parts[0] is inputs[past]:
            caches[inputs[past]] = (parts[1], joined)
    return caches


def _depth(block: str) -> int:
    """Return the last number of a module path.

    >>> _depth("model.language_model.layers.8")
    8
    """
    numbers = re.findall(r"\d+", block)
    if not numbers:
        raise PassError(f"the block {block!r} of an attention has no number; expected such as model.layers.8.")
    return int(numbers[-1])
