"""Target openvino: the ONNX file converted to OpenVINO IR and run on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import util
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from runtimes.base.encoder_decoder import EncoderDecoderEngine
from runtimes.base.layer_counts import count_layers
from runtimes.base.part_files import STEMS, open_parts
from runtimes.base.protocols import (
    BuildError,
    BuildOptions,
    Closing,
    DTypes,
    Feeds,
    Int8Style,
    LayerCounts,
    RuntimesError,
    RuntimeUnavailable,
    Shapes,
    check_feeds,
)
from runtimes.base.registry import check_available
from runtimes.base.vision_language import VisionLanguageEngine

name = "openvino"
description = "OpenVINO on the CPU; writes openvino_model.xml and .bin beside model.onnx"
devices = ("cpu",)
source: Literal[".onnx"] = ".onnx"
precisions = {"cpu": ("fp32", "fp16", "bf16", "int8")}
own = ("fp16", "bf16")
int8 = Int8Style(activations="uint8", convolutions=False, quantizers=("compressor", "nncf"))

NOTED = ("compressor", "precision")  # path of the build precision in the rt_info of the IR
OUTPUTS = ("compressor", "outputs")  # path of the names of the outputs
NO_LAYERS = ("Const", "Input", "Output")
PRODUCTS = ("FullyConnected", "MatMul", "Convolution", "Deconvolution")
BYTES = ("u8", "i8")
ATTENTIONS = ("ScaledDotProductAttention", "ScaledDotProductAttentionWithKVCache", "SDPA")
FILE = "openvino_model.xml"  # the file name that optimum-intel's OVModel classes expect
PART = "openvino_{}.xml"  # and those of a model of several files


def missing() -> str | None:
    """Return None if OpenVINO can be used, else the reason and the command that fixes it."""
    if util.find_spec("openvino") is None:
        return "openvino is not installed; pip install openvino"
    return None


def build(source: Path, out: Path, options: BuildOptions) -> Path:
    """Convert an ONNX file to OpenVINO IR in the folder `out` and return the path of the .xml file.

    fp16 stores the weights in 16 bits and computes in 32 if the processor has no 16-bit arithmetic; all other
    precisions store the weights unchanged. bf16 affects only the computation; the file records it for load().

    Raises:
        RuntimeUnavailable: OpenVINO or the device is not available.
        BuildError: OpenVINO refused the model.
    """
    check_available(name, missing(), devices, options)
    import openvino

    try:
        core = openvino.Core()
        _check_processor(core, options.precision)
        model = core.read_model(str(source))
        model.set_rt_info(options.precision, [*NOTED])
        model.set_rt_info(",".join(map(_port_name, model.outputs)), [*OUTPUTS])
        file = out / (PART.format(source.stem) if source.stem in STEMS else FILE)
        openvino.save_model(model, str(file), compress_to_fp16=options.precision == "fp16")
    except RuntimeError as error:
        raise BuildError(f"OpenVINO cannot read {source.name}: {_reason(error)}.") from error
    return file


def load(path: Path, options: BuildOptions) -> OpenVinoEngine | EncoderDecoderEngine | VisionLanguageEngine:
    """Compile the IR that build() wrote for low latency, in its build precision; or all files of a model of several.

    Raises:
        RuntimeUnavailable: OpenVINO or the device is not available.
        BuildError: OpenVINO refused the model.
    """
    check_available(name, missing(), devices, options)
    several = open_parts(path, partial(_load_file, options=options))
    return _load_file(path, options) if several is None else several


def _load_file(path: Path, options: BuildOptions) -> OpenVinoEngine:
    import openvino

    if not path.is_file():
        raise BuildError(f"There is no OpenVINO model {path}.")
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if options.threads is not None:
        settings["INFERENCE_NUM_THREADS"] = options.threads
    try:
        core = openvino.Core()
        model = core.read_model(str(path))
        # Explicit, because by default OpenVINO computes float32 models in bfloat16 if the processor supports it.
        settings["INFERENCE_PRECISION_HINT"] = "bf16" if _build_precision(model) == "bf16" else "f32"
        return OpenVinoEngine(core.compile_model(model, "CPU", settings), _output_names(model))
    except RuntimeError as error:
        raise BuildError(f"OpenVINO cannot compile {path.name}: {_reason(error)}.") from error


def layers(path: Path, options: BuildOptions) -> LayerCounts:
    """Return the layers of the model after fusion, as OpenVINO compiled it for this CPU.

    Raises:
        RuntimesError: As in load().
    """
    check_available(name, missing(), devices, options)
    with _load_file(path, options) as engine:
        nodes = [layer for layer in engine.described() if layer["layerType"] not in NO_LAYERS]
    kinds = [layer["layerType"] for layer in nodes]
    # A fused attention is one node, or one generated kernel that lists the layers it was made from.
    fused = any(
        kind in ATTENTIONS or (kind == "Subgraph" and "softmax" in layer["originalLayersNames"].lower())
        for kind, layer in zip(kinds, nodes, strict=True)
    )
    rows = list(zip(kinds, ((precision,) for precision in _precisions(nodes)), strict=True))
    return count_layers(rows, fused_attention=fused or (False if "Softmax" in kinds else None))


def _precisions(nodes: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the precision of each layer; bytes without a product of bytes are masks, which OpenVINO keeps in u8."""
    found = [layer["runtimePrecision"] for layer in nodes]
    if any(layer["layerType"] in PRODUCTS and layer["runtimePrecision"] in BYTES for layer in nodes):
        return found
    return ["boolean" if precision in BYTES else precision for precision in found]


class OpenVinoEngine(Closing[Any]):
    """A compiled OpenVINO model with one inference request; see runtimes.base.Engine."""

    def __init__(self, compiled: Any, outputs: Sequence[str]) -> None:
        super().__init__(compiled.create_infer_request())
        self._ports = {_port_name(port): port for port in compiled.inputs}
        self.inputs: tuple[str, ...] = tuple(self._ports)
        self._ports |= dict(zip(outputs, compiled.outputs, strict=True))
        self.outputs: tuple[str, ...] = tuple(outputs)
        self.input_dtypes: DTypes = {
            key: np.dtype(self._ports[key].get_element_type().to_dtype()) for key in self.inputs
        }
        self.input_shapes: Shapes = {key: _shape(self._ports[key]) for key in self.inputs}

    def described(self) -> list[dict[str, str]]:
        """Return the runtime information of every executed node, such as "layerType" and "runtimePrecision"."""
        nodes = self._live().get_compiled_model().get_runtime_model().get_ordered_ops()
        return [{key: str(value.astype(str)) for key, value in node.get_rt_info().items()} for node in nodes]

    def run(self, feeds: Feeds) -> dict[str, npt.NDArray[Any]]:
        """Run one inference from host memory to host memory."""
        self.bind(feeds)()
        request = self._live()
        return {key: np.array(request.get_tensor(self._ports[key]).data) for key in self.outputs}

    def bind(self, feeds: Feeds) -> Callable[[], None]:
        """Copy the feeds into OpenVINO tensors and return a function that runs one inference on them."""
        import openvino

        request = self._live()
        feeds = check_feeds(feeds, self.input_dtypes, self.input_shapes)
        tensors = {key: openvino.Tensor(np.array(value, order="C")) for key, value in feeds.items()}
        for key, tensor in tensors.items():
            request.set_tensor(self._ports[key], tensor)

        def step(_held: object = tensors) -> None:
            try:
                self._live().infer()
            except RuntimeError as error:
                raise RuntimesError(f"OpenVINO failed while running: {_reason(error)}.") from error

        return step


def _check_processor(core: Any, precision: str) -> None:
    """Raise RuntimeUnavailable for bf16 on a processor without bfloat16 arithmetic."""
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise RuntimeUnavailable("This processor has no bfloat16 arithmetic; use fp32 or int8.")


def _build_precision(model: Any) -> str:
    """Return the precision that build() recorded in a model; "fp32" for an IR from another source."""
    return str(model.get_rt_info([*NOTED]).astype(str)) if model.has_rt_info([*NOTED]) else "fp32"


def _reason(error: BaseException) -> str:
    """Return the last line of an OpenVINO error; earlier lines name OpenVINO source files."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].rstrip(".!") if lines else type(error).__name__


def _port_name(port: Any) -> str:
    """Return the ONNX name of an input or output; OpenVINO may add other names."""
    return str(port.get_any_name())


def _output_names(model: Any) -> list[str]:
    """Return the names of the outputs in the ONNX file, which build() recorded: OpenVINO may name them after nodes."""
    if not model.has_rt_info([*OUTPUTS]):
        return [_port_name(port) for port in model.outputs]
    return str(model.get_rt_info([*OUTPUTS]).astype(str)).split(",")


def _shape(port: Any) -> tuple[int | None, ...]:
    return tuple(None if size.is_dynamic else int(size.get_length()) for size in port.get_partial_shape())
