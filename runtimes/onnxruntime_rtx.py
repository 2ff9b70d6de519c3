"""Target onnxruntime_rtx: ONNX Runtime with NVIDIA's execution provider for RTX GPUs, which runs TensorRT for RTX.

Never run: the provider's library needs a driver even to be registered. This file follows its documentation (release
0.5) and the options stated in its wheel. Tests run it with ONNX Runtime's own CPU provider in place of NVIDIA's.

The engine is an ONNX file whose nodes are EPContext: the compiled model in ONNX Runtime's own form, which an
application opens as any other file. It is built for the GPU of this machine. The provider's option for other GPUs
(nv_target_sm) needs a device that is described when ONNX Runtime starts, which its Python package does not offer.

The Python package of ONNX Runtime allocates no memory on this provider's device, so every call copies its inputs and
outputs, and so does what is timed.
"""

from __future__ import annotations

import functools
from importlib import util
from pathlib import Path
from typing import Any, Literal

from runtimes.base.protocols import BuildError, BuildOptions, Int8Style, RuntimeUnavailable, first_line
from runtimes.base.registry import check_available
from runtimes.onnxruntime import target as onnxruntime
from runtimes.tensorrt import qdq_rules
from runtimes.tensorrt.build_steps import shape_range
from runtimes.tensorrt.target import cuda_devices

name = "onnxruntime_rtx"
description = "ONNX Runtime with NVIDIA TensorRT for RTX on CUDA; writes model.rtx.onnx (never run)"
devices = ("cuda",)
source: Literal[".onnx"] = ".onnx"
precisions = {"cuda": ("fp32", "fp16", "bf16", "fp8", "int8", "int4")}
own = ()
int8 = Int8Style(activations="int8", convolutions=True, rest="fp16", int4="DequantizeLinear")

PACKAGE = "onnxruntime-ep-nv-tensorrt-rtx-cu12"
MODULE = "onnxruntime_ep_nv_tensorrt_rtx"
PROVIDER = "NvTensorRTRTXExecutionProvider"
ASSIGNMENT = "session.record_ep_graph_assignment_info"
SUFFIX = ".rtx.onnx"


def missing() -> str | None:
    """Return None if the target can be used here, else the reason and what to install."""
    reason = onnxruntime.missing()
    if reason is not None:
        return reason
    if util.find_spec(MODULE) is None:
        return f"NVIDIA's execution provider is not installed; pip install {PACKAGE}"
    if not cuda_devices():
        return f"there is no NVIDIA GPU or no driver for it; with both: pip install {PACKAGE}"
    return None


def build(source: Path, out: Path, options: BuildOptions) -> Path:
    """Compile a model for the GPU of this machine, write `<name of the ONNX file>.rtx.onnx` and return its path.

    Raises:
        RuntimeUnavailable: ONNX Runtime, the provider or the GPU is not available.
        BuildError: The file violates a quantization rule, or ONNX Runtime refused it.
    """
    check_available(name, missing(), devices, options)
    qdq_rules.check(source)
    import onnxruntime as ort

    path = out / f"{source.stem}{SUFFIX}"
    part = path.with_name(f"{path.name}.part")
    try:
        compiler = ort.ModelCompiler(_session_options(options, _profile(source, options)), str(source), True)
        compiler.compile_to_file(str(part))
        part.replace(path)
    except OSError:
        raise
    except Exception as error:  # the classes of ONNX Runtime's errors have no common base but Exception
        raise BuildError(f"ONNX Runtime cannot compile {source.name} for RTX: {first_line(error)}.") from error
    finally:
        part.unlink(missing_ok=True)
    return path


def load(path: Path, options: BuildOptions) -> onnxruntime.OnnxRuntimeEngine:
    """Open a file that build() wrote.

    Raises:
        RuntimeUnavailable: ONNX Runtime, the provider or the GPU is not available.
        BuildError: ONNX Runtime refused the file, or would run a part of it on another device.
    """
    check_available(name, missing(), devices, options)
    if not path.is_file():
        raise BuildError(f"There is no engine {path}.")
    import onnxruntime as ort

    try:
        session = ort.InferenceSession(str(path), _session_options(options, {}))
    except Exception as error:
        raise BuildError(f"ONNX Runtime cannot open {path.name} for RTX: {first_line(error)}.") from error
    elsewhere = [each for each in session.get_provider_graph_assignment_info() if each.ep_name != PROVIDER]
    if elsewhere:
        kinds = sorted({node.op_type for part in elsewhere for node in part.get_nodes()})
        raise BuildError(
            f"NVIDIA's execution provider left {', '.join(kinds)} of {path.name} to {elsewhere[0].ep_name}."
        )
    return onnxruntime.OnnxRuntimeEngine(session, device="cpu")


def layers(path: Path, options: BuildOptions) -> None:
    """Return None: the provider does not report its layers."""


@functools.cache
def _devices() -> tuple[Any, ...]:
    """Register the provider's library, once in a process, and return its devices."""
    import onnxruntime as ort

    try:
        import onnxruntime_ep_nv_tensorrt_rtx as provider

        ort.register_execution_provider_library(PROVIDER, provider.get_library_path())
    except Exception as error:  # of the loader, of the provider and of ONNX Runtime
        reason = first_line(error)
        raise RuntimeUnavailable(f"NVIDIA's execution provider cannot be registered: {reason}.") from error
    found = tuple(device for device in ort.get_ep_devices() if device.ep_name == PROVIDER)
    if not found:
        raise RuntimeUnavailable("NVIDIA's execution provider finds no RTX GPU of Ampere or newer.")
    return found


def _session_options(options: BuildOptions, profile: dict[str, str]) -> Any:
    """Return the options of a session on the first device of the provider, with the sizes of the dynamic axes."""
    result = onnxruntime.session_options(options)
    result.add_session_config_entry(ASSIGNMENT, "1")
    result.add_provider_for_devices([_devices()[0]], profile)
    return result


def _profile(source: Path, options: BuildOptions) -> dict[str, str]:
    """Return the smallest, usual and largest shapes in the form of the provider's options; nothing if all are fixed."""
    import onnx

    graph = onnx.load(str(source), load_external_data=False).graph
    dims = {value.name: value.type.tensor_type.shape.dim for value in graph.input}
    shapes = {key: tuple(axis.dim_value if axis.HasField("dim_value") else -1 for axis in dims[key]) for key in dims}
    ranges = {key: shape_range(shape, options) for key, shape in shapes.items() if -1 in shape}
    return {
        f"nv_profile_{kind}_shapes": ",".join(f"{key}:{'x'.join(map(str, each[i]))}" for key, each in ranges.items())
        for i, kind in enumerate(("min", "opt", "max") if ranges else ())
    }
