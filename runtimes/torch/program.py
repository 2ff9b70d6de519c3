"""Signatures of exported programs, and their conversion to other precisions, for target torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import util
from typing import TYPE_CHECKING, Any, TypeAlias

from pydantic import TypeAdapter

from runtimes.base.json_text import parse
from runtimes.base.protocols import BuildError, Feeds, RuntimesError
from runtimes.torch.internals import expression, tree_map

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

NAMES = "compressor.json"  # the file in an exported program that holds the names of its inputs and outputs
# Operators dominated by matrix products or convolutions.
PRODUCTS = ("linear", "matmul", "bmm", "mm", "addmm", "baddbmm", "conv1d", "conv2d", "scaled_dot_product_attention")
Samples: TypeAlias = Callable[[], Iterator[Feeds]]
# An axis size: a number; a linear expression {symbol: coefficient}, in which "" is the constant term; or None for any.
Size: TypeAlias = int | dict[str, int] | None
SIGNATURE_NAMES: TypeAdapter[Mapping[str, Sequence[str]]] = TypeAdapter(dict[str, list[str]])


@dataclass(frozen=True)
class Input:
    """One input of a program: name, NumPy dtype and axis sizes."""

    name: str
    dtype: str
    sizes: tuple[Size, ...]

    @property
    def shape(self) -> tuple[int | None, ...]:
        """The axis sizes, with None for a dynamic axis."""
        return tuple(size if isinstance(size, int) else None for size in self.sizes)


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs of a program, stored in the engine's file.

    Attributes:
        inputs: The inputs in the program's order.
        outputs: The output names in the program's order.
        most: The upper bound of each bounded symbol.
    """

    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    most: Mapping[str, int]

    def to_json(self) -> str:
        """Return the signature as JSON.

        >>> original = Signature((Input("x", "float32", ({"s0": 1}, 8)),), ("y",), {"s0": 64})
        >>> Signature.of_json(original.to_json()) == original
        True
        """
        return json.dumps(asdict(self))

    @staticmethod
    def of_json(text: str) -> Signature:
        """Read the result of to_json(). Raise JsonTextError for any other text."""
        return parse(text, _SIGNATURE)

    def check(self, feeds: Feeds) -> None:
        """Check that the dynamic sizes of all inputs agree; compiled code would read out of bounds otherwise.

        Raises:
            RuntimesError: Two axes with the same symbol differ, or a size exceeds the program's upper bound.
        """
        sizes = [
            (entry.name, axis, size, feeds[entry.name].shape[axis])
            for entry in self.inputs
            for axis, size in enumerate(entry.sizes)
            if isinstance(size, dict)
        ]
        # The first axis whose size is the symbol alone determines the symbol's value.
        values = {next(iter(size)): actual for _, _, size, actual in reversed(sizes) if list(size.values()) == [1]}
        for name, axis, size, actual in sizes:
            expected = _value(size, values)
            if expected not in (None, actual):
                raise RuntimesError(
                    f"Input {name!r}: found size {actual} of axis {axis}; expected {expected}, as in the other inputs."
                )
            symbol = next(iter(size))
            if values.get(symbol) == actual and actual > self.most.get(symbol, actual):
                raise RuntimesError(
                    f"Input {name!r}: found size {actual} of axis {axis}; expected at most {self.most[symbol]}."
                )


_SIGNATURE = TypeAdapter(Signature)


def _value(size: Mapping[str, int], values: Mapping[str, int]) -> int | None:
    if not set(size) - {""} <= set(values):
        return None
    return sum(factor * (values[symbol] if symbol else 1) for symbol, factor in size.items())


def signature(program: ExportedProgram, names: Mapping[str, Sequence[str]]) -> Signature:
    """Return the signature of an exported program; `names` maps "inputs" and "outputs" to names in order."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    values = [nodes[key].meta["val"] for key in program.graph_signature.user_inputs]
    inputs = (
        Input(name, str(value.dtype).removeprefix("torch."), tuple(map(_size, value.shape)))
        for name, value in zip(names["inputs"], values, strict=True)
    )
    bounds = {str(symbol): _bound(interval.upper) for symbol, interval in program.range_constraints.items()}
    most = {symbol: bound for symbol, bound in bounds.items() if bound is not None}
    return Signature(tuple(inputs), tuple(names["outputs"]), most)


def _size(size: Any) -> Size:
    if isinstance(size, int):
        return size
    terms = expression(size).as_coefficients_dict()
    if not all(term == 1 or term.is_symbol for term in terms):
        return None
    return {"" if term == 1 else str(term): int(times) for term, times in terms.items()}


def _bound(upper: Any) -> int | None:
    """Return an upper bound as int; None for an infinite one, which is a type of torch or of sympy."""
    return int(upper) if getattr(upper, "is_Integer", False) and upper < 2**31 else None


def cast_products(program: ExportedProgram, precision: str) -> ExportedProgram:
    """Return the program with matrix products, convolutions and attention in bfloat16 or float16 (`precision`).

    These operators take most of the time. Norms, softmax outside of attention, the residual stream, inputs and outputs
    stay in float32, so float32 casts in the program stay correct and the small range of float16 is no problem.
    Each weight gets a cast node, which the compiler folds into the weight.
    """
    import torch

    aten = torch.ops.aten
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    products = {getattr(aten, key).default for key in PRODUCTS}

    def lower(value: Any) -> Any:
        return value.to(low) if isinstance(value, torch.Tensor) and value.dtype == torch.float32 else value

    class Products(torch.fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            if target not in products:
                return super().call_function(target, args, kwargs)
            args, kwargs = tree_map(lower, (args, kwargs))
            result = super().call_function(target, args, kwargs)
            return result.to(torch.float32) if result.dtype == low else result

    class Module(torch.nn.Module):
        def __init__(self, inner: torch.fx.GraphModule) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *tensors: torch.Tensor) -> Any:
            return Products(self.inner).run(*tensors)

    return _export_again(Module(_module(program)), program, packed=True)


def quantize_int8(
    program: ExportedProgram, *, dynamic: bool, names: Sequence[str], samples: Samples | None
) -> ExportedProgram:
    """Return the program with its Linear layers in int8, quantized by torchao for Inductor's x86 kernels.

    Weights are symmetric int8 per channel, activations uint8 per tensor. Static activation ranges come from histograms
    of the calibration samples. Dynamic ranges come from the tensor at run time, over all rows of a batch.

    Raises:
        BuildError: torchao or samples are missing, or the model has no Linear layer.
    """
    if util.find_spec("torchao") is None:
        raise BuildError("Target torch with int8 needs torchao, which is not installed; pip install torchao.")
    if not dynamic and samples is None:
        raise BuildError("Target torch needs calibration samples for int8; found none: use --data, or int8-dynamic.")
    import torch
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    config = x86.get_default_x86_inductor_quantization_config(is_dynamic=dynamic)
    quantizer.set_function_type_qconfig(torch.nn.functional.linear, config)
    prepared = prepare_pt2e(_module(program), quantizer)
    assert program.example_inputs is not None
    # The weight observers need one run even without samples.
    if dynamic or samples is None:
        prepared(*program.example_inputs[0])
    else:
        for feeds in samples():
            prepared(*(torch.tensor(feeds[name]) for name in names))
    converted = convert_pt2e(prepared)
    if not any("dequantize" in str(node.target) for node in converted.graph.nodes):
        raise BuildError("The model has no Linear layer, and target torch quantizes only these to int8; use fp32.")
    return _export_again(converted, program)


def _module(program: ExportedProgram) -> torch.fx.GraphModule:
    return program.module(check_guards=False)


def _export_again(module: torch.nn.Module, program: ExportedProgram, *, packed: bool = False) -> ExportedProgram:
    """Export a module with the inputs of `program`; `packed` means that it takes them as *tensors."""
    import torch

    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    shapes = tuple(
        {
            axis: torch.export.Dim.DYNAMIC
            for axis, size in enumerate(nodes[key].meta["val"].shape)
            if not isinstance(size, int)
        }
        for key in program.graph_signature.user_inputs
    )
    assert program.example_inputs is not None
    dynamic_shapes = {"tensors": shapes} if packed else shapes
    return torch.export.export(module, program.example_inputs[0], dynamic_shapes=dynamic_shapes, strict=False)
