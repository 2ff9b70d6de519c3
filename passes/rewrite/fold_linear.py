"""Folding of scales, shifts and adjacent linear maps: exact algebra that only removes work at run time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from passes.analysis.site_location import SCALINGS
from passes.base import Rewritten
from passes.execute.offloaded_weights import is_offloaded
from passes.graph.edit import insert_call, insert_constant, remove_dead, replace_all_uses
from passes.graph.graph import ADDS, attribute, is_sum, value_of
from passes.graph.sites import aten

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import fx

    from passes.graph.graph import Graph

LINEAR = aten.linear.default
LAYER_NORM = aten.layer_norm.default


@dataclass(frozen=True)
class FoldLinear:
    """Rewrite pass that folds scales, shifts and linear maps into the preceding linear map or norm.

    Before::

        %m = linear(%g, W, b); %s = mul(%m, ls); %f = linear(%s, A, c); %y = add(%x, %f)

    After::

        %f = linear(%g, A diag(ls) W, A (ls * b) + c); %y = add(%x, %f)

    Two consecutive linear maps become one only if the product has no more weights than both. Two consecutive residual
    linear maps x + A x (two replaced sites) become one. A constant added to the trunk is folded into the bias of the
    projection that was added before it. Nothing is folded across a norm or an activation, which are not linear, or into
    a value with another consumer, which would see the change. Products are computed in float64.
    """

    rewrites: ClassVar[bool] = True
    needs_data: ClassVar[bool] = False

    def run(self, graph: Graph, data: Iterable[Mapping[str, torch.Tensor]] | None = None) -> Rewritten:
        """Fold until no rule applies. Return the names of the removed nodes."""
        folded: list[str] = []
        while True:
            removed = next((name for node in graph.nodes() for rule in RULES if (name := rule(graph, node))), None)
            if removed is None:
                break
            remove_dead(graph)
            folded.append(removed)
        return Rewritten(changed=tuple(folded))


Rule = Callable[["Graph", "fx.Node"], str | None]


@dataclass(frozen=True)
class _Linear:
    """Operands of a linear node: its input, weight [out, in] and bias [out], in float64."""

    node: fx.Node
    source: fx.Node
    weight: torch.Tensor
    bias: torch.Tensor | None


def _linear(graph: Graph, node: object) -> _Linear | None:
    """Return the operands of a linear node with constant weights; None for any other node."""
    if getattr(node, "target", None) is not LINEAR or node.kwargs:  # type: ignore[attr-defined]
        return None
    source, weight, bias = (*node.args, None)[:3]  # type: ignore[attr-defined]
    tensors = [_constant(graph, argument) for argument in (weight, bias)]
    if tensors[0] is None or (bias is not None and tensors[1] is None):
        return None
    return _Linear(node, source, tensors[0], tensors[1])  # type: ignore[arg-type]


def _constant(graph: Graph, node: object) -> torch.Tensor | None:
    if getattr(node, "op", None) != "get_attr":
        return None
    tensor = attribute(graph, node)  # type: ignore[arg-type]
    if is_offloaded(tensor):  # folding would load the weight into memory
        return None
    return tensor.detach().double() if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() else None


def _operands(graph: Graph, node: fx.Node) -> tuple[fx.Node, torch.Tensor] | None:
    """Return the computed operand and the per-feature constant of a sum or product; None for any other node."""
    if len(node.args) != 2 or node.kwargs:
        return None
    for operand, other in (node.args, node.args[::-1]):
        constant = _constant(graph, other)
        one_axis = constant is not None and constant.numel() == constant.shape[-1:].numel()
        if constant is not None and one_axis and getattr(operand, "op", None) == "call_function":
            return (operand, constant.reshape(-1)) if _same_type(node, operand) else None  # type: ignore[arg-type,return-value]
    return None


def _same_type(left: fx.Node, right: fx.Node) -> bool:
    """Return whether two values have the same dtype and shape. A constant that broadcasts or promotes is not folded."""
    types = [
        (getattr(value, "dtype", None), str(getattr(value, "shape", ""))) for value in map(value_of, (left, right))
    ]
    return types[0] == types[1]


def _has_one_user(node: fx.Node) -> bool:
    return len(node.users) == 1


def _replace_by_linear(
    graph: Graph, old: fx.Node, source: fx.Node, weight: torch.Tensor, bias: torch.Tensor | None, like: fx.Node
) -> str:
    """Replace `old` by a new linear map with the weight dtype of `like`. Return the name of `old`."""
    dtype = attribute(graph, like.args[1]).dtype  # type: ignore[arg-type]
    name = str(like.args[1].target).rpartition(".")[0] or like.name  # type: ignore[union-attr]
    parts = [insert_constant(graph, f"{name}.weight", weight.to(dtype), before=old)]
    if bias is not None:
        parts.append(insert_constant(graph, f"{name}.bias", bias.to(dtype), before=old))
    replace_all_uses(graph, old, insert_call(graph, LINEAR, source, *parts, before=old))
    return old.name


def scale_after_linear(graph: Graph, node: fx.Node) -> str | None:
    """Fold a scale (LayerScale, or a fitted scale) into the preceding linear map."""
    operands = _operands(graph, node) if node.target in SCALINGS else None
    inner = None if operands is None else _linear(graph, operands[0])
    if (
        operands is None
        or inner is None
        or not _has_one_user(inner.node)
        or operands[1].numel() not in (1, len(inner.weight))
    ):
        return None
    scale = operands[1].expand(len(inner.weight))
    bias = None if inner.bias is None else scale * inner.bias
    return _replace_by_linear(graph, node, inner.source, scale[:, None] * inner.weight, bias, inner.node)


def shift_after_linear(graph: Graph, node: fx.Node) -> str | None:
    """Fold an added constant into the bias of the preceding linear map."""
    operands = _operands(graph, node) if node.target in ADDS else None
    inner = None if operands is None else _linear(graph, operands[0])
    if operands is None or inner is None or not _has_one_user(inner.node) or operands[1].numel() != len(inner.weight):
        return None
    bias = operands[1] if inner.bias is None else inner.bias + operands[1]
    return _replace_by_linear(graph, node, inner.source, inner.weight, bias, inner.node)


def shift_after_sum(graph: Graph, node: fx.Node) -> str | None:
    """Fold a constant added to the trunk into the bias of a projection that is a term of the trunk."""
    operands = _operands(graph, node) if node.target in ADDS else None
    if operands is None or not is_sum(operands[0]) or not _has_one_user(operands[0]):
        return None
    for term in operands[0].all_input_nodes:
        inner = _linear(graph, term)
        once = _has_one_user(term) and operands[0].args.count(term) == 1
        if inner is not None and once and operands[1].numel() == len(inner.weight):
            bias = operands[1] if inner.bias is None else inner.bias + operands[1]
            _replace_by_linear(graph, term, inner.source, inner.weight, bias, inner.node)
            replace_all_uses(graph, node, operands[0])
            return node.name
    return None


def linear_after_linear(graph: Graph, node: fx.Node) -> str | None:
    """Fold two consecutive linear maps into one, unless the product has more weights than both."""
    if node.target is not LINEAR or getattr(node.args[0], "target", None) is not LINEAR:
        return None  # before reading any weight
    outer, inner = _linear(graph, node), _linear(graph, node.args[0])
    if outer is None or inner is None or not _has_one_user(inner.node):
        return None
    weight = outer.weight @ inner.weight
    if weight.numel() > outer.weight.numel() + inner.weight.numel():
        return None
    bias = outer.bias
    if inner.bias is not None:
        bias = outer.weight @ inner.bias if bias is None else outer.weight @ inner.bias + bias
    return _replace_by_linear(graph, node, inner.source, weight, bias, node)


def residual_after_residual(graph: Graph, node: fx.Node) -> str | None:
    """Fold two consecutive residual linear maps.

    With y = x + A x + a and z = y + B y + b, z = x + (A + B + BA) x + (a + B a + b).
    """
    outer, first = _residual(graph, node)
    if outer is None or first is None or set(first.users) != {node, outer.node}:
        return None
    inner, trunk = _residual(graph, first)
    if inner is None or trunk is None or not _has_one_user(inner.node):
        return None
    weight = inner.weight + outer.weight + outer.weight @ inner.weight
    bias = outer.bias
    if inner.bias is not None:
        bias = inner.bias + outer.weight @ inner.bias + (0.0 if bias is None else bias)
    _replace_by_linear(graph, inner.node, trunk, weight, bias, inner.node)
    replace_all_uses(graph, node, first)
    return node.name


def _residual(graph: Graph, node: fx.Node) -> tuple[_Linear | None, fx.Node | None]:
    """Return the linear map and the trunk of ``x + linear(x)``; two None for any other node."""
    if is_sum(node):
        for branch, trunk in (node.args[:2], node.args[1::-1]):
            assert isinstance(branch, torch.fx.Node)
            assert isinstance(trunk, torch.fx.Node)
            if not _has_one_user(branch) or trunk not in branch.all_input_nodes:
                continue
            linear = _linear(graph, branch)
            if linear is not None and linear.source is trunk and len(linear.weight) == linear.weight.shape[1]:
                return linear, trunk
    return None, None


def affine_after_norm(graph: Graph, node: fx.Node) -> str | None:
    """Fold a scale or a shift into the weight and bias of the preceding layer norm."""
    operands = _operands(graph, node) if node.target in SCALINGS | ADDS else None
    norm = None if operands is None else operands[0]
    if operands is None or norm is None or norm.target is not LAYER_NORM or not _has_one_user(norm):
        return None
    if len(norm.args) < 4 or norm.kwargs:
        return None
    weight, bias = (_constant(graph, argument) for argument in norm.args[2:4])
    if weight is None or bias is None or weight.shape != operands[1].shape:
        return None
    scaling = node.target in SCALINGS
    weight, bias = (weight * operands[1], bias * operands[1]) if scaling else (weight, bias + operands[1])
    dtype = attribute(graph, norm.args[2]).dtype  # type: ignore[arg-type]
    parts = [insert_constant(graph, f"{norm.name}.{name}", value.to(dtype), before=norm)
             for name, value in (("weight", weight), ("bias", bias))]  # fmt: skip
    new = insert_call(graph, LAYER_NORM, *norm.args[:2], *parts, *norm.args[4:], before=norm)
    replace_all_uses(graph, node, new)
    return node.name


RULES: tuple[Rule, ...] = (
    scale_after_linear,
    shift_after_linear,
    shift_after_sum,
    linear_after_linear,
    residual_after_residual,
    affine_after_norm,
)
