"""State that a model passes to its next call, such as a KV cache.

The cache of a layer is removed together with the attention that reads it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

from passes.graph.edit import replace_input, set_inputs_and_outputs
from passes.graph.graph import ancestors_of, aten, output_values, value_of

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import fx

    from passes.graph.graph import Graph


def remove_dead_state(graph: Graph) -> tuple[str, ...]:
    """Remove the state that no other output depends on, after the branch that read it was dropped.

    The remaining state takes over the names that become free, so that the layers stay numbered without a gap. If the
    layers differ in the number or the width of their heads, each keeps its name, because the name identifies its
    shape. If a node still reads the length of a removed input, it reads that of a remaining input instead.

    Returns:
        The former names of the removed outputs.
    """
    if not graph.state:
        return ()
    outputs = dict(zip(graph.outputs, output_values(graph), strict=True))
    inputs = dict(zip(graph.inputs, graph.placeholders(), strict=True))
    needed = ancestors_of([node for name, node in outputs.items() if name not in graph.state])
    pairs = list(graph.state.items())
    kept = [(present, past) for present, past in pairs if _is_alive(outputs[present], inputs[past], needed)]
    removed = tuple(present for present, past in pairs if (present, past) not in kept)
    if not removed:
        return ()
    remaining = [inputs[past] for _, past in kept]
    for present in removed:
        _read_size_from_another(graph, inputs[graph.state[present]], remaining)
    same_heads = len({tuple(map(str, value_of(inputs[past]).shape[1::2])) for _, past in pairs}) == 1
    renamed = dict(zip(kept, pairs if same_heads else kept, strict=False))
    graph.state = dict(renamed.values())
    set_inputs_and_outputs(
        graph,
        {node: name for name, node in inputs.items() if name not in dict(pairs).values()}
        | {inputs[past]: renamed[present, past][1] for present, past in kept},
        {name: node for name, node in outputs.items() if name not in dict(pairs)}
        | {renamed[present, past][0]: outputs[present] for present, past in kept},
    )
    return removed


def _is_alive(present: fx.Node, past: fx.Node, needed: Collection[fx.Node]) -> bool:
    """Return whether an output depends on a state: on the new one, or on values of the old one, not its sizes alone.

    The state of a convolution is cut off behind what the layer computes, so no other output depends on the new one.
    """
    return present in needed or any(user in needed for user in past.users if user.target is not aten.sym_size.int)


def bytes_per_token(graph: Graph) -> int:
    """Return the bytes by which the state of one row grows with each token; 0 for a graph without state.

    The state of a convolution does not grow.
    """
    values = dict(zip(graph.outputs, map(value_of, output_values(graph)), strict=True))
    states = (values[name] for name in graph.state if any(not isinstance(size, int) for size in values[name].shape[1:]))
    return sum(value.itemsize * math.prod(size for size in value.shape if isinstance(size, int)) for value in states)


def _read_size_from_another(graph: Graph, node: fx.Node, others: Collection[fx.Node]) -> None:
    """Let the `sym_size` nodes that read `node` read another state input with the same size."""
    for reader in list(node.users):
        if reader.target is aten.sym_size.int:
            size = value_of(reader)
            for other in others:
                if dict(enumerate(map(str, value_of(other).shape))).get(cast(int, reader.args[1])) == str(size):
                    replace_input(graph, reader, node, other)
                    break
