"""Steps of a build that TensorRT and TensorRT for RTX share: parsing, sizes of the inputs, errors and files."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from runtimes.base.protocols import BuildError, BuildOptions, RuntimesError, first_line
from runtimes.tensorrt.engine import Refused, Shape, reason

if TYPE_CHECKING:
    import tensorrt as trt

T = TypeVar("T")
SCOPES = "pkg.torch.onnx.name_scopes"


def required(value: T | None, message: str) -> T:
    """Return `value`; raise Refused if it is None, which TensorRT's type stubs do not always declare."""
    if value is None:
        raise Refused(message)
    return value


@contextlib.contextmanager
def build_errors(failure: str, errors: list[str], *, library: str = "TensorRT") -> Iterator[None]:
    """Convert exceptions to a BuildError: `failure`, the exception's message and the library's last logged error."""
    try:
        yield
    except RuntimesError:
        raise
    except Exception as error:  # pybind raises TypeError, RuntimeError and others
        logged = f" ({library}: {reason(errors, '')})" if errors else ""
        raise BuildError(f"{failure}: {first_line(error)}{logged}.") from error


def parse(parser: trt.OnnxParser, onnx: Path) -> None:
    """Parse the file into the parser's network; by path, so that the parser finds external weights.

    Raises:
        Refused: The parser refused the file. The message names the layers of the model, where the file states them.
    """
    if parser.parse_from_file(str(onnx)):
        return
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    layers = layers_by_node(onnx)
    texts = dict.fromkeys(_refusal(error, layers) for error in errors)
    raise Refused("; ".join(" ".join(text.split()) for text in texts) or "its parser gives no reason")


def _refusal(error: trt.ParserError, layers: Mapping[str, str]) -> str:
    node, operator = error.node_name(), error.node_operator()
    if not operator:
        return f"{error.desc()}"  # of the file as a whole
    place = f"node {node!r} ({operator})" if node not in layers else f"layer {layers[node]}, node {node!r} ({operator})"
    if error.code().name == "UNSUPPORTED_NODE":
        return f"{place}: its parser does not support {operator} in this form, so write the layer with other operators"
    return f"{place}: {error.desc()}"


def layers_by_node(onnx: Path) -> dict[str, str]:
    """Return the qualified names of the torch modules of an ONNX file by the names of their nodes.

    torch.onnx writes the names of the enclosing modules into the metadata of each node, as a list whose last entry is
    the operation itself. The result is empty for a file of another origin.
    """
    import onnx as onnx_package

    layers = {}
    with contextlib.suppress(Exception):  # a file that cannot be read; the parser says why
        for node in onnx_package.load(str(onnx), load_external_data=False).graph.node:
            scopes = next((entry.value for entry in node.metadata_props if entry.key == SCOPES), "[]")
            modules = ast.literal_eval(scopes)[:-1]
            if modules and modules[-1]:
                layers[node.name] = str(modules[-1])
    return layers


def profile_of(
    builder: trt.Builder, network: trt.INetworkDefinition, options: BuildOptions
) -> trt.IOptimizationProfile | None:
    """Return the optimization profile of the dynamic inputs; None if every size is fixed.

    Raises:
        Refused: An input is a shape tensor.
    """
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    profile = required(builder.create_optimization_profile(), "it created no optimization profile")
    for tensor in inputs:
        if tensor.is_shape_tensor:
            raise Refused(f"input {tensor.name!r} is a shape tensor, which is not supported")
        if -1 in tuple(tensor.shape):
            profile.set_shape(tensor.name, *shape_range(tuple(tensor.shape), options))
    return profile if any(-1 in tuple(tensor.shape) for tensor in inputs) else None


def shape_range(shape: Shape, options: BuildOptions) -> tuple[Shape, Shape, Shape]:
    """Return the smallest, usual and largest shape: a dynamic first axis is the batch, any other a length."""

    def bound(i: int) -> Shape:
        sizes = (options.batches if axis == 0 else options.lengths for axis in range(len(shape)))
        return tuple(dynamic[i] if size == -1 else size for size, dynamic in zip(shape, sizes, strict=True))

    return bound(0), bound(1), bound(2)


def write_engine(path: Path, memory: trt.IHostMemory) -> None:
    """Write a file atomically, because load() would try to open an incomplete engine."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(memoryview(memory))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
