"""Part `joined` of benchmarks/corrections.py: two adjacent blocks computed side by side, and their MLPs made one.

FlattenGPT (arXiv 2602.08858) computes the attentions of two blocks from the same input, and their MLPs from the sum:
as many multiply-adds in a shorter chain. The MLPs are then one of twice the width, of which half of the neurons are
kept by their ridge leverage, with output weights fitted by ridge regression to the state of the original.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from paired import Bench, Variant, attentions_and_mlps
from torch import fx

from compressor.heal.closed_form import STRENGTHS
from compressor.quality.evaluate import tensor_batches
from passes.execute.interpreter import PartialRun
from passes.graph.edit import (
    insert_call,
    insert_constant,
    move_before,
    remove_dead,
    replace_all_uses,
    replace_input,
    set_arguments,
)
from passes.graph.graph import Graph, Site, ancestors_of, aten, attribute

LEVERAGE = 1e-3  # ridge strength of the leverage, relative to the mean variance of the neurons
FREE = ("drop", "constant", "scale")  # actions without multiply-adds
DROPPED = "one MLP dropped"
REPLACED = "one MLP dropped, or replaced without multiply-adds"
REFITTED = "the first MLP dropped, output weights of the second refitted"
Pair = tuple[Site, Site]  # the attention and the MLP of a block
Neurons = Mapping[str, torch.Tensor]  # positions of the neurons that are kept, by MLP


def in_parallel(graph: Graph, first: Pair, second: Pair, *, mlps: bool) -> Graph:
    """Return a fork in which both attentions of two adjacent blocks read the state before the first.

    Before::

        %a = add(%x, attention(%x)); %b = add(%a, mlp(%a)); %c = add(%b, attention'(%b)); %d = add(%c, mlp'(%c))

    After, where %m is %a, or %b without `mlps`::

        %a = add(add(%x, attention(%x)), attention'(%x)); %b = add(%a, mlp(%a)); %d = add(%b, mlp'(%m))

    Args:
        graph: traced graph with both blocks.
        first: attention and MLP of the earlier block.
        second: those of the block that follows.
        mlps: whether the second MLP reads the same input as the first.
    """
    fork = graph.fork()
    nodes = {node.name: node for node in fork.nodes()}
    before, middle = nodes[first[0].trunk], nodes[first[0].root]
    outer, late = nodes[second[0].trunk], nodes[second[0].root]
    _read_instead(fork, outer, before, nodes[second[0].add])
    attention, order = ancestors_of({nodes[second[0].branch]}), fork.nodes()
    start = next(position for position, node in enumerate(order) if middle in node.all_input_nodes)
    reader = order[start]
    move_before([node for node in order[start:] if node in attention], reader)
    both = insert_call(fork, aten.add.Tensor, middle, nodes[second[0].branch], before=reader)
    for user in [user for user in middle.users if user is not both]:
        replace_input(fork, user, middle, both)
    if mlps:
        _read_instead(fork, late, both, nodes[second[1].add])
    replace_all_uses(fork, late, outer)
    remove_dead(fork)
    fork.check()
    return fork


def _read_instead(graph: Graph, old: fx.Node, new: fx.Node, sum_of_both: fx.Node) -> None:
    """Let all readers of a state but the sum after its branch read another one."""
    for user in [user for user in old.users if user is not sum_of_both]:
        replace_input(graph, user, old, new)


def hidden(graph: Graph, mlp: Site) -> fx.Node:
    """Return the node of the neurons of an MLP: what its last linear map reads."""
    return next(node for node in graph.nodes() if node.name == mlp.branch).all_input_nodes[0]


class Shrink:
    """Regression of the state after MLPs on their neurons, over the calibration samples on which no effect is measured.

    Args:
        bench: model and data.
        graph: graph whose MLPs are shrunk. All of them are terms of one sum.
        mlps: the MLPs; `root` of the last one is that sum, in the original and in the graph.
    """

    def __init__(self, bench: Bench, graph: Graph, mlps: tuple[Site, ...]) -> None:
        self.bench, self.graph, self.mlps, end = bench, graph, mlps, mlps[-1].root
        inside = [hidden(graph, mlp).name for mlp in mlps]
        now = PartialRun(graph, {end, *inside, *(mlp.branch for mlp in mlps)})
        before = PartialRun(bench.subject.graph, {end})
        self.rows, self.h, self.t, self.hh, self.th = 0, *(torch.zeros((), dtype=torch.float64) for _ in range(4))
        for feeds in tensor_batches(bench.fitting):
            values, goal = now.run(feeds), before.run(feeds)[end]
            target = goal - values[end] + sum(values[mlp.branch] for mlp in mlps)
            h, t = (each.flatten(0, -2).double() for each in (torch.cat([values[name] for name in inside], -1), target))
            self.rows += len(h)
            self.h, self.t = self.h + h.sum(0), self.t + t.sum(0)
            self.hh, self.th = self.hh + h.T @ h, self.th + t.T @ h

    def kept(self, count: int) -> torch.Tensor:
        """Return the positions of the neurons of the highest ridge leverage, in order."""
        centred = self.hh - torch.outer(self.h, self.h) / self.rows
        ridge = LEVERAGE * centred.diagonal().mean() * torch.eye(len(centred), dtype=torch.float64)
        leverage = (centred @ torch.linalg.inv(centred + ridge)).diagonal()
        return leverage.topk(count).indices.sort().values

    def shrunk(self, kept: torch.Tensor) -> Graph:
        """Return the fork with only these neurons whose ridge strength gives the least divergence."""
        forks = {strength: self._fork(kept, *self.output(kept, strength)) for strength in STRENGTHS}
        return forks[self.bench.least(forks)]

    def output(self, kept: torch.Tensor, strength: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return output weights [width, neurons] and bias [width]; the ridge penalises the change of the weights."""
        seconds = [node for mlp in self.mlps for node in self.graph.nodes() if node.name == mlp.branch]
        old = torch.cat([attribute(self.graph, node.all_input_nodes[1]).detach() for node in seconds], 1).double()[
            :, kept
        ]
        centred = (self.hh - torch.outer(self.h, self.h) / self.rows)[kept][:, kept]
        mixed = (self.th - torch.outer(self.t, self.h) / self.rows)[:, kept]
        ridge = strength * centred.diagonal().mean() * torch.eye(len(centred), dtype=torch.float64)
        weight = old + torch.linalg.solve(centred + ridge, (mixed - old @ centred).T).T
        return weight, (self.t - weight @ self.h[kept]) / self.rows

    def _fork(self, kept: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Graph:
        fork, start = self.graph.fork(), 0
        for number, mlp in enumerate(self.mlps):
            stop = start + hidden(self.graph, mlp).meta["val"].shape[-1]
            mine = (kept >= start) & (kept < stop)
            _narrow(fork, mlp, kept[mine] - start, weight[:, mine], bias if not number else bias * 0)
            start = stop
        remove_dead(fork)
        fork.check()
        return fork


def _narrow(graph: Graph, mlp: Site, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Keep some neurons of an MLP of two linear maps around one function, and replace its output weights."""
    second = next(node for node in graph.nodes() if node.name == mlp.branch)
    (between,) = second.all_input_nodes[:1]
    first = between.all_input_nodes[0]
    source, *parameters = first.all_input_nodes
    narrowed = [
        insert_constant(graph, f"{mlp.name}.in", attribute(graph, each).detach()[rows].clone(), before=first)
        for each in parameters
    ]
    set_arguments(graph, first, source, *narrowed)
    set_arguments(graph, between, first, *between.args[1:])
    made = [
        insert_constant(graph, f"{mlp.name}.out", each.float().contiguous(), before=second) for each in (weight, bias)
    ]
    set_arguments(graph, second, between, *made)


def variants(bench: Bench, first: Pair, second: Pair) -> Iterator[tuple[str, Variant]]:
    """Yield the variants of two adjacent blocks by name, some of which are compared with others of equal cost."""
    original, mlps = bench.subject.graph, (first[1], second[1])
    both = in_parallel(original, first, second, mlps=True)
    yield "attentions in parallel", Variant(in_parallel(original, first, second, mlps=False))
    yield "attentions and MLPs in parallel", Variant(both)
    free = {
        f"{mlp.name} {action}": bench.rewriter.changed(original, mlp.name, action) for mlp in mlps for action in FREE
    }
    drops = {name: graph for name, graph in free.items() if name.endswith("drop")}
    best, best_drop = bench.least(free), bench.least(drops)
    yield DROPPED, Variant(drops[best_drop], told={"changed": best_drop})
    yield REPLACED, Variant(free[best], told={"changed": best})
    width = hidden(original, second[1]).meta["val"].shape[-1]
    alone = Shrink(bench, drops[f"{first[1].name} drop"], (second[1],))
    yield REFITTED, Variant(alone.shrunk(torch.arange(width)), (DROPPED, REPLACED))
    halves = Shrink(bench, both, mlps)
    yield "joined, half of the neurons", Variant(halves.shrunk(halves.kept(width)), (DROPPED, REPLACED, REFITTED))


def joined(bench: Bench) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure every third pair of adjacent blocks, from the second on."""
    blocks = attentions_and_mlps(bench.subject.sites)
    for first, second in list(itertools.pairwise(blocks))[1::3]:
        yield f"{first[0].block} and {second[0].block}", bench.judged(dict(variants(bench, first, second)))
