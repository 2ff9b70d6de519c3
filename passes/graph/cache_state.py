"""What a model hands to its next call, such as a key-value cache: it goes with the attention that it belongs to."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from passes.graph.edit import rewire, set_ends
from passes.graph.graph import aten, needed_by, output_values, value_of

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import fx

    from passes.graph.graph import Graph


def forget_unread(graph: Graph) -> tuple[str, ...]:
    """Take out the state that no answer needs any more, once the branch that read it is gone.

    The rest moves up to the names that become free, so that layers stay numbered without a gap; where layers keep
    different numbers of heads, or of other widths, each keeps its name, by which its shape is known. Where the length
    of an input that goes is still asked for, one that stays answers.

    Returns:
        The names of the outputs that went, as they were.
    """
    if not graph.state:
        return ()
    outputs = dict(zip(graph.outputs, output_values(graph), strict=True))
    inputs = dict(zip(graph.inputs, graph.placeholders(), strict=True))
    needed = needed_by([node for name, node in outputs.items() if name not in graph.state])
    pairs = list(graph.state.items())
    kept = [(after, before) for after, before in pairs if outputs[after] in needed]
    lost = tuple(after for after, before in pairs if (after, before) not in kept)
    if not lost:
        return ()
    staying = [inputs[before] for _, before in kept]
    for after in lost:
        _let_answer(graph, inputs[graph.state[after]], staying)
    alike = len({tuple(map(str, value_of(inputs[before]).shape[1::2])) for _, before in pairs}) == 1
    free = dict(zip(kept, pairs if alike else kept, strict=False))
    graph.state = dict(free.values())
    set_ends(
        graph,
        {node: name for name, node in inputs.items() if name not in dict(pairs).values()}
        | {inputs[before]: free[after, before][1] for after, before in kept},
        {name: node for name, node in outputs.items() if name not in dict(pairs)}
        | {free[after, before][0]: outputs[after] for after, before in kept},
    )
    return lost


def bytes_per_token(graph: Graph) -> int:
    """What the state grows by with each token of a row, in bytes; 0 where there is none."""
    values = dict(zip(graph.outputs, map(value_of, output_values(graph)), strict=True))
    kept = (values[name] for name in graph.state)
    return sum(value.itemsize * math.prod(size for size in value.shape if isinstance(size, int)) for value in kept)


def _let_answer(graph: Graph, node: fx.Node, others: Collection[fx.Node]) -> None:
    """Let the length of another state input be asked for instead of a node's."""
    for reader in list(node.users):
        if reader.target is aten.sym_size.int:
            size = value_of(reader)
            for other in others:
                if str(value_of(other).shape[reader.args[1]]) == str(size):
                    rewire(graph, reader, node, other)
                    break
