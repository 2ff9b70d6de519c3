"""Einstein sums of two factors, as permutations around a linear map or a product of matrices."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import fx

from passes.analysis.token_axis import sizes_of
from passes.base import Rewritten
from passes.graph.edit import insert_call, remove_dead, replace_all_uses
from passes.graph.graph import Graph, aten

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

EINSUM = aten.einsum.default
EQUATION = re.compile(r"([a-zA-Z]+),([a-zA-Z]+)->([a-zA-Z]+)")


@dataclass(frozen=True)
class ExpandEinsum:
    """Rewrite pass that writes a sum of products over one index as a product of matrices.

    No token can be tracked through an einsum, no quantizer takes its weight, and engines recognise no attention in it.

    Before::

        %s = einsum("bihd,bjhd->bhij", [%q, %k])

    After::

        %s = matmul(permute(%q, [0, 2, 1, 3]), permute(%k, [0, 2, 3, 1]))

    A factor that shares no other index and has one of its own becomes the weight of a linear map. Sums of one factor
    with itself, over several indices, with an ellipsis, a repeated index in one factor, or an index that is missing in
    the result stay as they are.
    """

    rewrites: ClassVar[bool] = True
    needs_data: ClassVar[bool] = False

    def run(self, graph: Graph, data: Iterable[Mapping[str, torch.Tensor]] | None = None) -> Rewritten:
        """Edit the graph. Return the names of the sums that were replaced."""
        changed = []
        for node in graph.nodes():
            new = _expanded(graph, node) if node.target is EINSUM else None
            if new is not None:
                replace_all_uses(graph, node, new)
                changed.append(node.name)
        if changed:
            remove_dead(graph)
        return Rewritten(changed=tuple(changed))


def _expanded(graph: Graph, node: fx.Node) -> fx.Node | None:
    """Insert the product before an einsum; return the node that replaces it, or None if it stays."""
    equation, factors = node.args[0], node.all_input_nodes
    found = EQUATION.fullmatch(str(equation).replace(" ", ""))
    if found is None or len(factors) != 2 or any(len(set(letters)) != len(letters) for letters in found.groups()):
        return None
    left, right, result = found.groups()
    summed = set(left) & set(right) - set(result)
    if len(summed) != 1 or {*left, *right} != {*result, *summed} or _repeats(factors, left, right):
        return None
    (inner,), batch = summed, [letter for letter in result if letter in left and letter in right]
    rows, columns = ([letter for letter in result if letter in own and letter not in batch] for own in (left, right))
    one, other = factors
    if len(columns) != 1:  # the second factor is the one with a single index of its own
        one, other, left, right, rows, columns = other, one, right, left, columns, rows
    if len(columns) != 1 or (batch and not rows):
        return None
    if not batch:
        source = _permuted(graph, one, left, [*rows, inner], node)
        weight = _permuted(graph, other, right, [*columns, inner], node)
        product = insert_call(graph, aten.linear.default, source, weight, before=node)
        return _permuted(graph, product, "".join([*rows, *columns]), list(result), node)
    *outer, last = rows  # the second factor is repeated along the others
    source = _permuted(graph, one, left, [*outer, *batch, last, inner], node)
    weight = _permuted(graph, other, right, [*batch, inner, *columns], node)
    product = insert_call(graph, aten.matmul.default, source, weight, before=node)
    return _permuted(graph, product, "".join([*outer, *batch, last, *columns]), list(result), node)


def _repeats(factors: list[fx.Node], left: str, right: str) -> bool:
    """Return whether a factor has the size 1 along a shared index of another size, which an einsum repeats."""
    one, other = map(sizes_of, factors)
    pairs = [(one[left.index(letter)], other[right.index(letter)]) for letter in left if letter in right]
    return any((first == 1) != (second == 1) for first, second in pairs)


def _permuted(graph: Graph, value: fx.Node, letters: str, order: list[str], before: fx.Node) -> fx.Node:
    """Insert the permutation of a value from its letters to another order of them, unless it is the same."""
    dims = [letters.index(letter) for letter in order]
    if dims == sorted(dims):
        return value
    return insert_call(graph, aten.permute.default, value, dims, before=before)
