"""From a saved torch.export program to ExecuTorch's file: quantized if asked, sizes bounded, lowered to XNNPACK."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.base.protocols import BuildError, BuildOptions, first_line
from runtimes.torch.internals import expression, hint

FACTS = "compressor"  # the constant method that says what the file's tensors are called and how large they may be
NAMES = "compressor.json"  # where the saved program says what its inputs and outputs are called


def opened(path: Path) -> tuple[Any, dict[str, list[str]]]:
    """The saved program, and the names of its inputs and outputs."""
    import torch

    extra = {NAMES: ""}
    try:
        program = torch.export.load(path, extra_files=extra)
    except Exception as error:  # torch's errors have no common base
        raise BuildError(f"torch.export cannot read {path.name}: {first_line(error)}.") from error
    if not extra[NAMES]:
        raise BuildError(f"{path.name} does not name its inputs and outputs; expected {NAMES} in it.")
    return program, json.loads(extra[NAMES])


def lowered(program: Any, names: dict[str, list[str]], options: BuildOptions) -> bytes:
    """The .pte file of a program, in which its names, dtypes and sizes are what the method `compressor` returns."""
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    axes = _inputs(program)
    example, largest = _example(axes, options), _largest(axes, program.range_constraints, options)
    with torch.no_grad():
        module = _quantized(program.module(check_guards=False), example, names["inputs"], options)
        bounded = torch.export.export(module, example, dynamic_shapes=_free(axes, largest), strict=False)
        bounded = bounded.run_decompositions(_decompositions())
    stated = {
        **names,
        "dtypes": _by_name(names, [str(tensor.dtype).removeprefix("torch.") for tensor in example]),
        "shapes": _by_name(names, [tuple(map(_fixed, tensor.shape)) for tensor in _inputs(bounded)]),
        "largest": _by_name(names, largest),
        "precision": options.precision,
    }
    edge = to_edge_transform_and_lower(
        bounded, partitioner=[XnnpackPartitioner()], constant_methods={FACTS: json.dumps(stated)}
    )
    return bytes(edge.to_executorch().buffer)


def _decompositions() -> dict[Any, Callable[..., Any]]:
    """How products are written before ExecuTorch does it: its own way, outside of XNNPACK, doubles DeiT-Tiny's time."""
    import torch

    return {
        torch.ops.aten.scaled_dot_product_attention.default: _attention,
        torch.ops.aten.matmul.default: _product,
    }


def _product(a: Any, b: Any) -> Any:
    """One batched product of two tensors of 4 axes, without the copies to a common shape that they have already."""
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
    """softmax(scale query key^T) value, where rows that are masked throughout become zero, as torch has it.

    Only for no mask or one of truth values; anything else is left to ExecuTorch, which looks for such rows afterwards.
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
    seen = attn_mask.to(query.dtype)
    # Far below any score, far above minus infinity: a row of these alone has no NaN, and `seen` takes it out again.
    return _product(torch.softmax(scores + (seen - 1) * 1e30, -1) * seen, value)


def _by_name(names: dict[str, list[str]], values: list[Any]) -> dict[str, Any]:
    return dict(zip(names["inputs"], values, strict=True))


def _inputs(program: Any) -> list[Any]:
    """The program's inputs in order, as fake tensors: free axes are symbols."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    return [nodes[key].meta["val"] for key in program.graph_signature.user_inputs]


def _fixed(size: Any) -> int | None:
    return size if isinstance(size, int) else None


def _bound(axis: int, options: BuildOptions) -> int:
    return (options.lengths if axis else options.batches)[2]


def _largest(inputs: list[Any], ranges: Any, options: BuildOptions) -> list[tuple[int, ...]]:
    """Per input the largest size of each axis: what was asked for, or less where the model takes less."""

    def most(axis: int, size: Any) -> int:
        if isinstance(size, int):
            return size
        known = ranges.get(expression(size))
        return int(min([_bound(axis, options)] + ([known.upper] if known is not None else [])))

    return [tuple(most(axis, size) for axis, size in enumerate(tensor.shape)) for tensor in inputs]


def _example(inputs: list[Any], options: BuildOptions) -> tuple[Any, ...]:
    """Zeros of the sizes that the program was exported with, or of the largest where that is less.

    Axes that are computed from others, such as a mask over cache and tokens, follow those.
    """
    import torch

    limit: dict[Any, int] = {}
    for tensor in inputs:
        for axis, size in enumerate(tensor.shape):
            if not isinstance(size, int) and (symbol := expression(size)).is_Symbol:
                limit[symbol] = min(limit.get(symbol, hint(size)), _bound(axis, options))
    sizes = [[s if isinstance(s, int) else int(expression(s).subs(limit)) for s in tensor.shape] for tensor in inputs]
    return tuple(torch.zeros(size, dtype=tensor.dtype) for size, tensor in zip(sizes, inputs, strict=True))


def _free(inputs: list[Any], largest: list[tuple[int, ...]]) -> Any:
    """Which axes torch.export leaves free, and up to which size; those of at most one element are fixed."""
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
    """The module with quantized Linear layers, or as it is for fp32."""
    if options.precision == "fp32":
        return module
    import torch
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as xnnpack
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    dynamic = options.precision == "int8-dynamic"
    style = xnnpack.get_symmetric_quantization_config(is_per_channel=True, is_dynamic=dynamic)
    quantizer = xnnpack.XNNPACKQuantizer().set_operator_type(torch.ops.aten.linear.default, style)
    prepared = prepare_pt2e(module, quantizer)
    if options.samples is None or dynamic:
        prepared(*example)  # the ranges of the weights are read off in a run
    else:
        for feeds in options.samples():
            prepared(*(torch.from_numpy(np.array(feeds[key])) for key in names))
    return convert_pt2e(prepared)
