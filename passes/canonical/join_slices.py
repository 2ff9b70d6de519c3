"""Values that are filled slice by slice, as one concatenation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx

from passes.base import Rewritten
from passes.graph.edit import insert_call, remove_dead, replace_all_uses
from passes.graph.graph import Graph, aten, value_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

SCATTER = aten.slice_scatter.default


@dataclass(frozen=True)
class JoinSlices:
    """Rewrite pass that concatenates the slices by which a whole value is filled.

    The keys of multi-head latent attention are filled so (DeepSeek). ONNX has no operator for it but ScatterND, which
    copies all elements by their positions, and no engine recognises the attention behind it.

    Before::

        %k = new_empty(%x, [b, h, n, 20]); %k1 = slice_scatter(%k, %left, 3, 0, 12)
        %k2 = slice_scatter(%k1, copy(slice(%k1, 3, 12), %right), 3, 12, 20)

    After::

        %k2 = cat([%left, expand(%right, [-1, h, -1, -1])], 3)

    Slices that leave a part of the value unchanged, have a step, have a size that is not a number, or are written
    through slices of other axes (``k[:, :4]`` in place of ``k[..., :4]``) stay as they are.
    """

    rewrites: ClassVar[bool] = True
    needs_data: ClassVar[bool] = False

    def run(self, graph: Graph, data: Iterable[Mapping[str, torch.Tensor]] | None = None) -> Rewritten:
        """Edit the graph; return the names of the last writes, which were replaced."""
        changed = []
        for node in graph.nodes():
            sources = _sources(node) if node.target is SCATTER else None
            if sources is None:
                continue
            whole = [_expanded(graph, source, before=node) for source in sources]
            replace_all_uses(graph, node, insert_call(graph, aten.cat.default, whole, _part(node)[1], before=node))
            changed.append(node.name)
        if changed:
            remove_dead(graph)
        return Rewritten(changed=tuple(changed))


def _sources(last: fx.Node) -> list[fx.Node] | None:
    """Return what the writes up to the last one write, if they fill an axis in order without a gap; None if not."""
    _, axis, _, _ = _part(last)
    shape = value_of(last).shape
    end, found, node = shape[axis], [], last
    while node.target is SCATTER:
        source, along, start, stop = _part(node)
        if not isinstance(end, int) or along != axis or start is None or min(stop, shape[axis]) != end:
            return None
        found.append(source)
        end, before = start, node.args[0]
        if end == 0:
            return found[::-1]
        assert isinstance(before, fx.Node)
        node = before
    return None


def _part(node: fx.Node) -> tuple[fx.Node, int, int | None, int]:
    """Return the source of a write, its axis from 0, its start (None if unknown, or with a step) and its end."""
    names = ("input", "src", "dim", "start", "end", "step")
    given: dict[str, Any] = {"dim": 0, "start": None, "end": None, "step": 1}
    given |= dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    size = value_of(node).shape[given["dim"]]
    start = 0 if given["start"] is None else given["start"]
    end = size if given["end"] is None else given["end"]
    known = given["step"] == 1 and all(isinstance(each, int) and each >= 0 for each in (start, end, size))
    axis = given["dim"] % value_of(node).ndim
    return given["src"], axis, start if known else None, end if known else -1


def _expanded(graph: Graph, source: fx.Node, *, before: fx.Node) -> fx.Node:
    """Return what a copy into a slice copies, expanded to the slice; any other source as it is."""
    if source.target is not aten.copy.default:
        return source
    copied = source.args[1]
    assert isinstance(copied, fx.Node)
    value, target = value_of(copied), value_of(source)
    if value.dtype != target.dtype or value.ndim != target.ndim:
        return source
    pairs = list(zip(value.shape, target.shape, strict=True))
    if any(own != size and not (own == 1 and isinstance(size, int)) for own, size in pairs):
        return source
    if all(own == size for own, size in pairs):
        return copied
    sizes = [-1 if own == size else size for own, size in pairs]
    return insert_call(graph, aten.expand.default, copied, sizes, before=before)
