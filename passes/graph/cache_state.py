"""State that a model passes to its next call, such as a KV cache.

The cache of a layer is removed together with the attention that reads it. An encoder-decoder has two kinds: the cache
of a self-attention is an input and an output of the graph, and that of a cross-attention is an output alone, which
later calls read instead of computing it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

from passes.graph.edit import replace_input, set_inputs_and_outputs
from passes.graph.graph import ancestors_of, aten, output_values, value_of

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from torch import fx

    from passes.graph.graph import Graph


def remove_dead_state(graph: Graph) -> tuple[str, ...]:
    """Remove the state that no other output depends on, after the branch that read it was dropped.

    If no input of state would remain and a node still reads its length, as that of positions does, the first one stays.

    The remaining state takes over the names that become free, so that the layers stay numbered without a gap. If the
    layers differ in the number or the width of their heads, each keeps its name, because the name identifies its
    shape. If a node still reads a size of a removed input, it reads that of a remaining input instead.

    Returns:
        The former names of the removed outputs.
    """
    if not graph.state:
        return ()
    outputs = dict(zip(graph.outputs, output_values(graph), strict=True))
    inputs = dict(zip(graph.inputs, graph.placeholders(), strict=True))
    needed = ancestors_of([node for name, node in outputs.items() if name not in graph.state])
    pairs = list(graph.state.items())
    kept = [(present, past) for present, past in pairs if _is_alive(outputs[present], inputs.get(past), needed)]
    if not any(past in inputs for _, past in kept):
        kept = [*_that_tell_the_length(pairs, inputs, needed), *kept]
    removed = tuple(present for present, past in pairs if (present, past) not in kept)
    if not removed:
        return ()
    pasts = {past for _, past in pairs}
    remaining = [inputs[past] for _, past in kept if past in inputs]
    remaining += [node for name, node in inputs.items() if name not in pasts]  # as many rows, if no state remains
    for present in removed:
        if graph.state[present] in inputs:
            _read_size_from_another(graph, inputs[graph.state[present]], remaining)
    renamed: dict[tuple[str, str], tuple[str, str]] = {}
    for are_inputs in (True, False):
        renamed |= _renumbered([pair for pair in pairs if (pair[1] in inputs) == are_inputs], kept, outputs)
    graph.state = dict(renamed.values())
    set_inputs_and_outputs(
        graph,
        {node: name for name, node in inputs.items() if name not in dict(pairs).values()}
        | {inputs[past]: renamed[present, past][1] for present, past in kept if past in inputs},
        {name: node for name, node in outputs.items() if name not in dict(pairs)}
        | {renamed[present, past][0]: outputs[present] for present, past in kept},
    )
    return removed


def _is_alive(present: fx.Node, past: fx.Node | None, needed: Collection[fx.Node]) -> bool:
    """Return whether an output depends on a state: on the new one, or on values of the old one, not its sizes alone.

    The state of a convolution is cut off behind what the layer computes, so no other output depends on the new one.
    """
    readers = () if past is None else past.users
    return present in needed or any(user in needed for user in readers if user.target is not aten.sym_size.int)


def _that_tell_the_length(
    pairs: Sequence[tuple[str, str]], inputs: Mapping[str, fx.Node], needed: Collection[fx.Node]
) -> list[tuple[str, str]]:
    """Return the first pair of state if a needed node reads a length of any; nothing otherwise."""
    own = [(present, past) for present, past in pairs if past in inputs]
    lengths = (reader for _, past in own for reader in inputs[past].users if reader.target is aten.sym_size.int)
    return own[:1] if any(reader in needed and reader.args[1] != 0 for reader in lengths) else []


def _renumbered(
    pairs: Sequence[tuple[str, str]], kept: Collection[tuple[str, str]], outputs: Mapping[str, fx.Node]
) -> dict[tuple[str, str], tuple[str, str]]:
    """Return new names for the state that is kept: the first ones, or its own where the heads of layers differ."""
    remaining = [pair for pair in pairs if pair in kept]
    heads = {tuple(map(str, value_of(outputs[present]).shape[1::2])) for present, _ in pairs}
    return dict(zip(remaining, pairs if len(heads) == 1 else remaining, strict=False))


def bytes_per_token(graph: Graph) -> int:
    """Return the bytes by which the state of one row grows with each token; 0 for a graph without state.

    The state of a convolution does not grow. Of a model with an encoder, the state of the decoder's
    self-attentions counts.
    """
    values = dict(zip(graph.outputs, map(value_of, output_values(graph)), strict=True))
    own = (values[name] for name, past in graph.state.items() if past in graph.inputs)
    states = (value for value in own if any(not isinstance(size, int) for size in value.shape[1:]))
    return sum(value.itemsize * math.prod(size for size in value.shape if isinstance(size, int)) for value in states)


def bytes_per_source_token(graph: Graph) -> int:
    """Return the bytes of the caches of cross-attentions for each token of a source; 0 for a graph without any."""
    values = dict(zip(graph.outputs, map(value_of, output_values(graph)), strict=True))
    states = [values[name] for name, past in graph.state.items() if past not in graph.inputs]
    return sum(value.itemsize * int(value.shape[1]) * int(value.shape[3]) for value in states)


def _read_size_from_another(graph: Graph, node: fx.Node, others: Collection[fx.Node]) -> None:
    """Let the `sym_size` nodes that read `node` read another input with the same size."""
    for reader in list(node.users):
        if reader.target is aten.sym_size.int:
            size = value_of(reader)
            for other in others:
                if dict(enumerate(map(str, value_of(other).shape))).get(cast(int, reader.args[1])) == str(size):
                    replace_input(graph, reader, node, other)
                    break
