"""Fold what is linear into the linear map beside it: exact algebra that costs nothing at run time, and often saves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from passes.analysis.site_location import SCALINGS
from passes.base import Rewritten
from passes.execute.offloaded_weights import is_offloaded
from passes.graph.edit import bypass, insert_call, insert_constant, remove_dead
from passes.graph.graph import ADDS, attribute, is_sum, value_of
from passes.graph.sites import aten

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import fx

    from passes.graph.graph import Graph

LINEAR = aten.linear.default
LAYER_NORM = aten.layer_norm.default


@dataclass(frozen=True)
class Fuse:
    """Fold scales, shifts and linear maps into a linear map or a norm that they follow.

    Before::

        %m = linear(%g, W, b); %s = mul(%m, ls); %f = linear(%s, A, c); %y = add(%x, %f)

    After::

        %f = linear(%g, A diag(ls) W, A (ls * b) + c); %y = add(%x, %f)

    Two linear maps on top of each other become one only where that takes fewer multiply-adds. A linear map beside its
    own input, twice in a row (two replaced sites), becomes one; a constant added to the trunk goes into the bias of
    the projection that was added before it. Nothing is folded past a norm or an activation, which are not linear, nor
    into a value that has another reader, which would see the change. Products are computed in float64.
    """

    rewrites: ClassVar[bool] = True
    needs_data: ClassVar[bool] = False

    def run(self, graph: Graph, data: Iterable[Mapping[str, torch.Tensor]] | None = None) -> Rewritten:
        """Edit the graph; returns the names of the nodes that were folded away."""
        folded: list[str] = []
        while True:
            found = next((name for node in graph.nodes() for rule in RULES if (name := rule(graph, node))), None)
            if found is None:
                break
            remove_dead(graph)
            folded.append(found)
        return Rewritten(changed=tuple(folded))


Rule = Callable[["Graph", "fx.Node"], str | None]


@dataclass(frozen=True)
class _Linear:
    """The parts of a linear node: its input, weight [out, in] and bias [out], in float64."""

    node: fx.Node
    source: fx.Node
    weight: torch.Tensor
    bias: torch.Tensor | None


def _linear(graph: Graph, node: object) -> _Linear | None:
    """A linear node with constant weights."""
    if getattr(node, "target", None) is not LINEAR or node.kwargs:  # type: ignore[attr-defined]
        return None
    source, weight, bias = (*node.args, None)[:3]  # type: ignore[attr-defined]
    tensors = [_constant(graph, each) for each in (weight, bias)]
    if tensors[0] is None or (bias is not None and tensors[1] is None):
        return None
    return _Linear(node, source, tensors[0], tensors[1])  # type: ignore[arg-type]


def _constant(graph: Graph, node: object) -> torch.Tensor | None:
    if getattr(node, "op", None) != "get_attr":
        return None
    found = attribute(graph, node)  # type: ignore[arg-type]
    if is_offloaded(found):  # a weight that stays on disk stays as it is
        return None
    return found.detach().double() if isinstance(found, torch.Tensor) and found.is_floating_point() else None


def _operands(graph: Graph, node: fx.Node) -> tuple[fx.Node, torch.Tensor] | None:
    """The moving operand and the constant of a sum or product of the two; the constant one value a feature."""
    if len(node.args) != 2 or node.kwargs:
        return None
    for moving, other in (node.args, node.args[::-1]):
        constant = _constant(graph, other)
        one_axis = constant is not None and constant.numel() == constant.shape[-1:].numel()
        if constant is not None and one_axis and getattr(moving, "op", None) == "call_function":
            return (moving, constant.reshape(-1)) if _same_form(node, moving) else None  # type: ignore[arg-type,return-value]
    return None


def _same_form(left: fx.Node, right: fx.Node) -> bool:
    """Whether two values have one type and shape: a constant that widens either has to stay."""
    forms = [
        (getattr(value, "dtype", None), str(getattr(value, "shape", ""))) for value in map(value_of, (left, right))
    ]
    return forms[0] == forms[1]


def _alone(node: fx.Node) -> bool:
    return len(node.users) == 1


def _replaced(
    graph: Graph, old: fx.Node, source: fx.Node, weight: torch.Tensor, bias: torch.Tensor | None, like: fx.Node
) -> str:
    """Put a new linear map in the place of `old`, with weights in the type of `like`'s weight."""
    dtype = attribute(graph, like.args[1]).dtype  # type: ignore[arg-type]
    name = str(like.args[1].target).rpartition(".")[0] or like.name  # type: ignore[union-attr]
    parts = [insert_constant(graph, f"{name}.weight", weight.to(dtype), before=old)]
    if bias is not None:
        parts.append(insert_constant(graph, f"{name}.bias", bias.to(dtype), before=old))
    bypass(graph, old, insert_call(graph, LINEAR, source, *parts, before=old))
    return old.name


def scale_after_linear(graph: Graph, node: fx.Node) -> str | None:
    """LayerScale, or a fitted scale, behind a linear map."""
    found = _operands(graph, node) if node.target in SCALINGS else None
    inner = None if found is None else _linear(graph, found[0])
    if found is None or inner is None or not _alone(inner.node) or found[1].numel() not in (1, len(inner.weight)):
        return None
    scale = found[1].expand(len(inner.weight))
    bias = None if inner.bias is None else scale * inner.bias
    return _replaced(graph, node, inner.source, scale[:, None] * inner.weight, bias, inner.node)


def shift_after_linear(graph: Graph, node: fx.Node) -> str | None:
    """A constant behind a linear map."""
    found = _operands(graph, node) if node.target in ADDS else None
    inner = None if found is None else _linear(graph, found[0])
    if found is None or inner is None or not _alone(inner.node) or found[1].numel() != len(inner.weight):
        return None
    bias = found[1] if inner.bias is None else inner.bias + found[1]
    return _replaced(graph, node, inner.source, inner.weight, bias, inner.node)


def shift_after_sum(graph: Graph, node: fx.Node) -> str | None:
    """A constant added to a trunk whose last term is a projection goes into that projection's bias."""
    found = _operands(graph, node) if node.target in ADDS else None
    if found is None or not is_sum(found[0]) or not _alone(found[0]):
        return None
    for term in found[0].all_input_nodes:
        inner = _linear(graph, term)
        once = _alone(term) and found[0].args.count(term) == 1
        if inner is not None and once and found[1].numel() == len(inner.weight):
            bias = found[1] if inner.bias is None else inner.bias + found[1]
            _replaced(graph, term, inner.source, inner.weight, bias, inner.node)
            bypass(graph, node, found[0])
            return node.name
    return None


def linear_after_linear(graph: Graph, node: fx.Node) -> str | None:
    """Two linear maps on top of each other, where one of both takes fewer multiply-adds."""
    if node.target is not LINEAR or getattr(node.args[0], "target", None) is not LINEAR:
        return None  # told before any weight is read
    outer, inner = _linear(graph, node), _linear(graph, node.args[0])
    if outer is None or inner is None or not _alone(inner.node):
        return None
    weight = outer.weight @ inner.weight
    if weight.numel() > outer.weight.numel() + inner.weight.numel():
        return None
    bias = outer.bias
    if inner.bias is not None:
        bias = outer.weight @ inner.bias if bias is None else outer.weight @ inner.bias + bias
    return _replaced(graph, node, inner.source, weight, bias, node)


def residual_after_residual(graph: Graph, node: fx.Node) -> str | None:
    """Two sites in a row that are linear: with y = x + A x + a and z = y + B y + b, z = x + (A + B + BA) x + c."""
    outer, first = _residual(graph, node)
    if outer is None or first is None or set(first.users) != {node, outer.node}:
        return None
    inner, trunk = _residual(graph, first)
    if inner is None or trunk is None or not _alone(inner.node):
        return None
    weight = inner.weight + outer.weight + outer.weight @ inner.weight
    bias = outer.bias
    if inner.bias is not None:
        bias = inner.bias + outer.weight @ inner.bias + (0.0 if bias is None else bias)
    _replaced(graph, inner.node, trunk, weight, bias, inner.node)
    bypass(graph, node, first)
    return node.name


def _residual(graph: Graph, node: fx.Node) -> tuple[_Linear | None, fx.Node | None]:
    """The linear map and the trunk of ``x + linear(x)``."""
    if is_sum(node):
        for branch, trunk in (node.args[:2], node.args[1::-1]):
            assert isinstance(branch, torch.fx.Node)
            assert isinstance(trunk, torch.fx.Node)
            if not _alone(branch) or trunk not in branch.all_input_nodes:
                continue
            found = _linear(graph, branch)
            if found is not None and found.source is trunk and len(found.weight) == found.weight.shape[1]:
                return found, trunk
    return None, None


def affine_after_norm(graph: Graph, node: fx.Node) -> str | None:
    """A scale or a shift behind a layer norm with weights goes into them."""
    found = _operands(graph, node) if node.target in SCALINGS | ADDS else None
    norm = None if found is None else found[0]
    if found is None or norm is None or norm.target is not LAYER_NORM or not _alone(norm):
        return None
    if len(norm.args) < 4 or norm.kwargs:
        return None
    weight, bias = (_constant(graph, each) for each in norm.args[2:4])
    if weight is None or bias is None or weight.shape != found[1].shape:
        return None
    scaling = node.target in SCALINGS
    weight, bias = (weight * found[1], bias * found[1]) if scaling else (weight, bias + found[1])
    dtype = attribute(graph, norm.args[2]).dtype  # type: ignore[arg-type]
    parts = [insert_constant(graph, f"{norm.name}.{name}", value.to(dtype), before=norm)
             for name, value in (("weight", weight), ("bias", bias))]  # fmt: skip
    new = insert_call(graph, LAYER_NORM, *norm.args[:2], *parts, *norm.args[4:], before=norm)
    bypass(graph, node, new)
    return node.name


RULES: tuple[Rule, ...] = (
    scale_after_linear,
    shift_after_linear,
    shift_after_sum,
    linear_after_linear,
    residual_after_residual,
    affine_after_norm,
)
