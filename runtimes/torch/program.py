"""The program half of target torch: what an exported program takes, and the same program in another precision."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import util
from typing import TYPE_CHECKING, Any, TypeAlias

from runtimes.base.protocols import BuildError, Feeds, RuntimesError
from runtimes.torch.internals import expression, tree_map

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

NAMES = "compressor.json"  # the file in an exported program that holds the names of its inputs and outputs
# Operators whose time is that of a matrix product.
PRODUCTS = ("linear", "matmul", "bmm", "mm", "addmm", "baddbmm", "conv1d", "conv2d", "scaled_dot_product_attention")
Samples: TypeAlias = Callable[[], Iterator[Feeds]]
# A size: a number, or a sum of symbols ("" stands for one) as {symbol: how often}, or None for anything.
Size: TypeAlias = "int | dict[str, int] | None"


@dataclass(frozen=True)
class Input:
    """One input of a program: its name, its NumPy dtype and the sizes of its axes."""

    name: str
    dtype: str
    sizes: tuple[Size, ...]

    @property
    def shape(self) -> tuple[int | None, ...]:
        """The sizes, None for an axis that is not of one size."""
        return tuple(size if isinstance(size, int) else None for size in self.sizes)


@dataclass(frozen=True)
class Signature:
    """What a program takes and gives; travels in the engine's file.

    Attributes:
        inputs: in the order of the program.
        outputs: their names, in the order of the program.
        most: the largest value of each symbol that has one.
    """

    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    most: Mapping[str, int]

    def to_json(self) -> str:
        """Write it as JSON.

        >>> given = Signature((Input("x", "float32", ({"s0": 1}, 8)),), ("y",), {"s0": 64})
        >>> Signature.of_json(given.to_json()) == given
        True
        """
        return json.dumps(asdict(self))

    @staticmethod
    def of_json(text: str) -> Signature:
        """Read what to_json() wrote. Raises ValueError, KeyError or TypeError where it did not."""
        found = json.loads(text)
        inputs = (Input(each["name"], each["dtype"], tuple(each["sizes"])) for each in found["inputs"])
        return Signature(tuple(inputs), tuple(found["outputs"]), dict(found["most"]))

    def check(self, feeds: Feeds) -> None:
        """Refuse sizes that do not fit together: compiled code would read beyond the end of the smaller input.

        Raises:
            RuntimesError: two axes of one size differ, or one is larger than the program allows.
        """
        sizes = [
            (each.name, axis, size, feeds[each.name].shape[axis])
            for each in self.inputs
            for axis, size in enumerate(each.sizes)
            if isinstance(size, dict)
        ]
        # A symbol's value is that of the first axis that is the symbol alone.
        values = {next(iter(size)): found for _, _, size, found in reversed(sizes) if list(size.values()) == [1]}
        for name, axis, size, found in sizes:
            expected = _value(size, values)
            if expected not in (None, found):
                raise RuntimesError(f"Input {name!r}: found size {found} of axis {axis}; the others need {expected}.")
            symbol = next(iter(size))
            if values.get(symbol) == found and found > self.most.get(symbol, found):
                raise RuntimesError(
                    f"Input {name!r}: found size {found} of axis {axis}; expected at most {self.most[symbol]}."
                )


def _value(size: Mapping[str, int], values: Mapping[str, int]) -> int | None:
    if not set(size) - {""} <= set(values):
        return None
    return sum(times * (values[symbol] if symbol else 1) for symbol, times in size.items())


def signature(program: ExportedProgram, names: Mapping[str, Sequence[str]]) -> Signature:
    """What an exported program takes, under the names that came with it."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    values = [nodes[key].meta["val"] for key in program.graph_signature.user_inputs]
    inputs = (
        Input(name, str(value.dtype).removeprefix("torch."), tuple(map(_size, value.shape)))
        for name, value in zip(names["inputs"], values, strict=True)
    )
    most = {str(symbol): _bound(bounds.upper) for symbol, bounds in program.range_constraints.items()}
    return Signature(tuple(inputs), tuple(names["outputs"]), {key: top for key, top in most.items() if top is not None})


def _size(size: Any) -> Size:
    if isinstance(size, int):
        return size
    terms = expression(size).as_coefficients_dict()
    if not all(term == 1 or term.is_symbol for term in terms):
        return None
    return {"" if term == 1 else str(term): int(times) for term, times in terms.items()}


def _bound(upper: Any) -> int | None:
    """An upper bound as a number; torch has its own infinity for sizes, beside those of sympy."""
    return int(upper) if getattr(upper, "is_Integer", False) and upper < 2**31 else None


def in_products(program: ExportedProgram, precision: str) -> ExportedProgram:
    """The program with its matrix products, convolutions and attention in bfloat16 or float16, all else in float32.

    Those are what takes the time. Norms, softmax outside of attention and the residual stream stay in float32, and so
    do inputs and outputs: what a program writes as float32 in its operators stays right, and range is no matter.
    Weights are cast by an operator each, which the compiler folds into the weight.
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
            found = super().call_function(target, args, kwargs)
            return found.to(torch.float32) if found.dtype == low else found

    class Module(torch.nn.Module):
        def __init__(self, inner: torch.fx.GraphModule) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *tensors: torch.Tensor) -> Any:
            return Products(self.inner).run(*tensors)

    return _again(Module(_module(program)), program, packed=True)


def in_int8(
    program: ExportedProgram, *, dynamic: bool, names: Sequence[str], samples: Samples | None
) -> ExportedProgram:
    """The program with the products of its Linear layers in int8, quantized by torchao for Inductor's x86 kernels.

    Weights are int8 per channel, symmetric; activations uint8 per tensor, with ranges from histograms of the samples,
    or, dynamic, from the very tensor, all rows of a batch together.

    Raises:
        BuildError: torchao or samples are missing, or there is no Linear layer.
    """
    if util.find_spec("torchao") is None:
        raise BuildError("Target torch makes int8 with torchao, which is not installed; pip install torchao.")
    if not dynamic and samples is None:
        raise BuildError("Target torch finds the ranges of int8 on samples; found none, give --data or int8-dynamic.")
    import torch
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    config = x86.get_default_x86_inductor_quantization_config(is_dynamic=dynamic)
    quantizer.set_function_type_qconfig(torch.nn.functional.linear, config)
    prepared = prepare_pt2e(_module(program), quantizer)
    assert program.example_inputs is not None
    # One run in any case: ranges of weights are found while running too.
    if dynamic or samples is None:
        prepared(*program.example_inputs[0])
    else:
        for feeds in samples():
            prepared(*(torch.tensor(feeds[name]) for name in names))
    converted = convert_pt2e(prepared)
    if not any("dequantize" in str(node.target) for node in converted.graph.nodes):
        raise BuildError("The model has no Linear layer, which is what target torch computes in int8; take fp32.")
    return _again(converted, program)


def _module(program: ExportedProgram) -> torch.fx.GraphModule:
    return program.module(check_guards=False)


def _again(module: torch.nn.Module, program: ExportedProgram, *, packed: bool = False) -> ExportedProgram:
    """Export a module that takes what a program takes; `packed` says that it takes it as *tensors."""
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
    given = {"tensors": shapes} if packed else shapes
    return torch.export.export(module, program.example_inputs[0], dynamic_shapes=given, strict=False)
