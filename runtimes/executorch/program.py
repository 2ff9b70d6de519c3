"""Conversion of a saved torch.export program to a .pte file: quantization, bounded sizes, lowering to XNNPACK."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from runtimes.base.json_text import JsonTextError, parse
from runtimes.base.protocols import BuildError, BuildOptions, first_line
from runtimes.torch.internals import expression, hint

FACTS = "compressor"  # the constant method that returns names, dtypes and sizes of inputs and outputs as JSON
NAMES = "compressor.json"  # the file in the saved program with the names of its inputs and outputs


_NAMES = TypeAdapter(dict[str, list[str]])


def opened(path: Path) -> tuple[Any, dict[str, list[str]]]:
    """Load a saved program and the names of its inputs and outputs."""
    import torch

    extra = {NAMES: ""}
    try:
        program = torch.export.load(path, extra_files=extra)
    except Exception as error:  # torch's errors have no common base
        raise BuildError(f"torch.export cannot read {path.name}: {first_line(error)}.") from error
    if not extra[NAMES]:
        raise BuildError(f"{path.name} does not name its inputs and outputs; expected {NAMES} in the file.")
    try:
        return program, parse(extra[NAMES], _NAMES)
    except JsonTextError as error:
        raise BuildError(f"{path.name}: {NAMES} in the file holds other values than expected ({error}).") from error


def lower_to_pte(program: Any, names: dict[str, list[str]], options: BuildOptions) -> bytes:
    """Lower a program to the bytes of a .pte file; its method `compressor` returns names, dtypes and sizes as JSON."""
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    axes = _inputs(program)
    example, largest = _example(axes, options), _largest(axes, program.range_constraints, options)
    with torch.no_grad():
        module = _quantized(program.module(check_guards=False), example, names["inputs"], options)
        bounded = torch.export.export(module, example, dynamic_shapes=_dynamic_shapes(axes, largest), strict=False)
        bounded = bounded.run_decompositions(_decompositions())
    facts = {
        **names,
        "dtypes": _by_name(names, [str(tensor.dtype).removeprefix("torch.") for tensor in example]),
        "shapes": _by_name(names, [tuple(map(_fixed, tensor.shape)) for tensor in _inputs(bounded)]),
        "largest": _by_name(names, largest),
        "precision": options.precision,
    }
    edge = to_edge_transform_and_lower(
        bounded, partitioner=[XnnpackPartitioner()], constant_methods={FACTS: json.dumps(facts)}
    )
    return bytes(edge.to_executorch().buffer)


def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Return the decompositions of attention and matmul into operators that XNNPACK runs.

    ExecuTorch's own decompositions run outside of XNNPACK and double the latency of DeiT-Tiny.
    """
    import torch

    return {
        torch.ops.aten.scaled_dot_product_attention.default: _attention,
        torch.ops.aten.matmul.default: _product,
    }


def _product(a: Any, b: Any) -> Any:
    """Compute a @ b of two 4-axis tensors with equal leading axes by one bmm, without redundant expand copies."""
    import torch

    if a.dim() != 4 or b.dim() != 4 or list(map(str, a.shape[:2])) != list(map(str, b.shape[:2])):
        return NotImplemented
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).view(*a.shape[:-1], b.shape[-1])


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Compute softmax(scale query key^T) value, with zeros for fully masked rows, as in torch.

    Only the cases without a mask or with a boolean mask are handled. The other cases stay with ExecuTorch, which
    detects fully masked rows afterwards.
    """
    import torch

    if dropout_p or is_causal or enable_gqa or (attn_mask is not None and attn_mask.dtype != torch.bool):
        return NotImplemented
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = _product(query * query.new_full((1, 1, 1, 1), factor), key.transpose(-2, -1))
    if scores is NotImplemented:
        return NotImplemented
    if attn_mask is None:
        return _product(torch.softmax(scores, -1), value)
    visible = attn_mask.to(query.dtype)
    # -1e30 is below any score but finite: a fully masked row gives no NaN, and the product with `visible` zeroes it.
    return _product(torch.softmax(scores + (visible - 1) * 1e30, -1) * visible, value)


def _by_name(names: dict[str, list[str]], values: list[Any]) -> dict[str, Any]:
    return dict(zip(names["inputs"], values, strict=True))


def _inputs(program: Any) -> list[Any]:
    """Return the program's inputs in order, as fake tensors with symbolic sizes of dynamic axes."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    return [nodes[key].meta["val"] for key in program.graph_signature.user_inputs]


def _fixed(size: Any) -> int | None:
    return size if isinstance(size, int) else None


def _bound(axis: int, options: BuildOptions) -> int:
    return (options.lengths if axis else options.batches)[2]


def _largest(inputs: list[Any], ranges: Any, options: BuildOptions) -> list[tuple[int, ...]]:
    """Return the largest size of each axis of every input: the bound of `options` or of the program, if smaller."""

    def largest(axis: int, size: Any) -> int:
        if isinstance(size, int):
            return size
        bounds = ranges.get(expression(size))
        return int(min([_bound(axis, options)] + ([bounds.upper] if bounds is not None else [])))

    return [tuple(largest(axis, size) for axis, size in enumerate(tensor.shape)) for tensor in inputs]


def _example(inputs: list[Any], options: BuildOptions) -> tuple[Any, ...]:
    """Return zeros of the sizes that the program was exported with, limited to the largest sizes of `options`.

    Sizes that are expressions of others, such as that of a mask over cache and new tokens, are computed from those.
    """
    import torch

    limit: dict[Any, int] = {}
    for tensor in inputs:
        for axis, size in enumerate(tensor.shape):
            if not isinstance(size, int) and (symbol := expression(size)).is_Symbol:
                limit[symbol] = min(limit.get(symbol, hint(size)), _bound(axis, options))
    sizes = [[s if isinstance(s, int) else int(expression(s).subs(limit)) for s in tensor.shape] for tensor in inputs]
    return tuple(torch.zeros(size, dtype=tensor.dtype) for size, tensor in zip(sizes, inputs, strict=True))


def _dynamic_shapes(inputs: list[Any], largest: list[tuple[int, ...]]) -> Any:
    """Return the bounded `dynamic_shapes` argument of torch.export; axes of at most one element are static."""
    from torch.export import Dim

    axes = [
        {
            axis: Dim.DYNAMIC(max=most)
            for axis, (size, most) in enumerate(zip(tensor.shape, sizes, strict=True))
            if not isinstance(size, int) and most > 1
        }
        for tensor, sizes in zip(inputs, largest, strict=True)
    ]
    return tuple(axes)


def _quantized(module: Any, example: tuple[Any, ...], names: list[str], options: BuildOptions) -> Any:
    """Quantize the Linear layers of a module to the precision of `options`; return it unchanged for fp32."""
    if options.precision == "fp32":
        return module
    import torch
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as xnnpack
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    class LinearQuantizer(xnnpack.XNNPACKQuantizer):  # type: ignore[misc]
        """Leaves the graph as it is; XNNPACK's turns numbers in sums and products into floats, of indices too."""

        def transform_for_annotation(self, model: Any) -> Any:
            return model

    dynamic = options.precision == "int8-dynamic"
    style = xnnpack.get_symmetric_quantization_config(is_per_channel=True, is_dynamic=dynamic)
    quantizer = LinearQuantizer().set_operator_type(torch.ops.aten.linear.default, style)
    prepared = prepare_pt2e(module, quantizer)
    if options.samples is None or dynamic:
        prepared(*example)  # the weight observers need one run
    else:
        for feeds in options.samples():
            prepared(*(torch.from_numpy(np.array(feeds[key])) for key in names))
    return convert_pt2e(prepared)
