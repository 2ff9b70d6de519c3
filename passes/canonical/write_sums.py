"""Residual sums that a model writes by other operators than a plain addition."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from passes.base import Rewritten
from passes.graph.coverage import between
from passes.graph.edit import insert_call, remove_dead, replace_all_uses
from passes.graph.graph import ADDS, Graph, aten, unscaled, value_of
from passes.graph.sites import computes_maps, find_sites

SUBTRACTIONS = frozenset({aten.sub.Tensor, aten.sub_.Tensor})
MIXTURES = frozenset({aten.lerp.Scalar, aten.lerp.Tensor, aten.lerp_.Scalar, aten.lerp_.Tensor})
PRODUCTS = {
    aten.addcmul.default: aten.mul.Tensor,
    aten.addcmul_.default: aten.mul.Tensor,
    aten.addcdiv.default: aten.div.Tensor,
    aten.addcdiv_.default: aten.div.Tensor,
}
REDUCTIONS = frozenset({aten.sum.dim_IntList, aten.mean.dim})
SPELLINGS = ADDS | SUBTRACTIONS | MIXTURES | PRODUCTS.keys() | REDUCTIONS

Write = Callable[..., fx.Node]


@dataclass(frozen=True)
class WriteSums:
    """Rewrite pass that writes the sums of residual branches as plain additions, by which sites are found.

    Only sums that make a site with a linear map, a convolution or an attention are rewritten; other differences and
    mixtures stay.

    Before::

        %y = add(%x, %f, alpha=0.5); %z = lerp(%y, %g, 0.3); %w = sum(stack([%z, %h]), [0])

    After::

        %y = add(%x, mul(%f, 0.5)); %z = add(%y, mul(sub(%g, %y), 0.3)); %w = add(%z, %h)

    ``x - f`` becomes ``x + (-f)``, ``addcmul(x, f, g)`` becomes ``x + f * g``, the mean of a stack its sum divided by
    the number of its terms. The branch of a ``lerp`` is the whole step ``w (g - x)``, so that dropping it leaves x.
    """

    rewrites: ClassVar[bool] = True
    needs_data: ClassVar[bool] = False

    def run(self, graph: Graph, data: Iterable[Mapping[str, torch.Tensor]] | None = None) -> Rewritten:
        """Edit the graph. Return the names of the nodes that were replaced."""
        trial = graph.fork()
        written = {name: _write(trial, node) for name, node in _spelled(trial).items()}
        remove_dead(trial)  # the operators that were replaced still read the branches
        sums = _sums_of_sites(trial)
        wanted = [name for name, added in written.items() if not sums.isdisjoint(added)]
        spelled = _spelled(graph)
        for name in wanted:
            _write(graph, spelled[name])
        if wanted:
            remove_dead(graph)
        return Rewritten(changed=tuple(wanted))


def _sums_of_sites(graph: Graph) -> set[str]:
    """Return the names of the sums of branches that hold a linear map, a convolution or an attention.

    The step of a recurrence subtracts the largest value so far, which depends on weights too (RWKV).
    """
    nodes = {node.name: node for node in graph.nodes()}
    return {
        name
        for site in find_sites(graph)
        if computes_maps(tuple(between(unscaled(nodes[site.trunk]), nodes[site.branch])))
        for name in (site.add, site.root)
    }


def has_other_sums(graph: Graph) -> bool:
    """Return whether a graph adds values of one shape by another operator than a plain addition."""
    return bool(_spelled(graph))


def _spelled(graph: Graph) -> dict[str, fx.Node]:
    return {node.name: node for node in graph.nodes() if node.target in SPELLINGS and _terms(node)}


def _terms(node: fx.Node) -> tuple[fx.Node, ...]:
    """Return the values that an operator adds, subtracts or mixes, none if it is a plain addition or of other kind."""
    if not isinstance(value_of(node), torch.Tensor) or not value_of(node).is_floating_point():
        return ()
    if node.target in REDUCTIONS:
        return _stacked(node)
    if node.target in ADDS and node.kwargs.get("alpha", 1) == 1:
        return ()
    terms = node.args[:2]
    if not all(isinstance(term, fx.Node) for term in terms):
        return ()
    return terms if all(_shape(term) == _shape(node) for term in _summands(node)) else ()  # type: ignore[return-value]


def _summands(node: fx.Node) -> list[fx.Node]:
    """Return the operands that must have the shape of the result: of a product beside a term, the term alone."""
    count = 1 if node.target in PRODUCTS else 2
    return [term for term in node.args[:count] if isinstance(term, fx.Node)]


def _stacked(node: fx.Node) -> tuple[fx.Node, ...]:
    """Return the values that are stacked along the one axis that an operator then reduces, none in other cases."""
    stack, axes, *others = node.args
    if not isinstance(stack, fx.Node) or stack.target is not aten.stack.default or others or node.kwargs:
        return ()
    axis = stack.args[1] if len(stack.args) > 1 else stack.kwargs.get("dim", 0)
    rank = value_of(stack).ndim
    if not isinstance(axes, (list, tuple)) or [each % rank for each in axes] != [axis % rank]:
        return ()
    terms = tuple(stack.args[0])  # type: ignore[arg-type]
    return terms if len(terms) > 1 else ()


def _write(graph: Graph, node: fx.Node) -> set[str]:
    """Insert the plain additions of a node before it, let its consumers read the last; return their names."""
    inserted: list[fx.Node] = []

    def write(target: Callable[..., Any], *args: Any) -> fx.Node:
        inserted.append(insert_call(graph, target, *args, before=node))
        return inserted[-1]

    if node.target in REDUCTIONS:
        _reduce(node, write)
    else:
        write(aten.add.Tensor, node.args[0], _added(node, write))
    replace_all_uses(graph, node, inserted[-1])
    return {each.name for each in inserted if each.target is aten.add.Tensor}


def _added(node: fx.Node, write: Write) -> fx.Node:
    """Insert what a node adds to its first operand."""
    first, second, *others = node.args
    if node.target in PRODUCTS:
        return _scaled(write(PRODUCTS[node.target], second, others[0]), node.kwargs.get("value", 1), write)
    if node.target in MIXTURES:
        return write(aten.mul.Tensor, write(aten.sub.Tensor, second, first), others[0])
    alpha = node.kwargs.get("alpha", 1)
    if node.target in SUBTRACTIONS:
        return write(aten.neg.default, second) if alpha == 1 else _scaled(second, -alpha, write)  # type: ignore[operator]
    return _scaled(second, alpha, write)


def _scaled(value: Any, factor: Any, write: Write) -> fx.Node:
    scaled: fx.Node = value if factor == 1 else write(aten.mul.Tensor, value, factor)
    return scaled


def _reduce(node: fx.Node, write: Write) -> None:
    """Insert the sum of the values that a node reduces, divided by their number if it takes their mean."""
    total, *others = _terms(node)
    for each in others:
        total = write(aten.add.Tensor, total, each)
    if node.target is aten.mean.dim:
        write(aten.div.Tensor, total, len(others) + 1)


def _shape(node: fx.Node) -> str:
    """Return a shape as text, because comparing symbolic sizes would specialise them."""
    return str(getattr(value_of(node), "shape", None))
