"""An open TensorRT engine with its device memory and CUDA stream; runtimes.tensorrt.target states what is tested.

Nothing here imports the library: engines of TensorRT and of TensorRT for RTX have the same methods.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from runtimes.base.protocols import Closing, DTypes, Feeds, RuntimesError, Shapes, check_feeds, first_line

if TYPE_CHECKING:
    import tensorrt as trt

Shape = tuple[int, ...]

ALIGNMENT = 256
"""Alignment in bytes that TensorRT requires of every device address."""


# Types of inputs and outputs by TensorRT's names. TensorRT and TensorRT for RTX are two libraries with the same names.
NUMPY = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "INT32": np.int32,
    "INT64": np.int64,
    "BOOL": np.bool_,
}


class Refused(Exception):
    """TensorRT returned None or False instead of a result; the message names the missing result."""


@dataclass
class _Bound:
    """Device memory of the inputs and outputs of one call; closing `held` frees it."""

    shapes: dict[str, Shape]
    held: contextlib.ExitStack
    addresses: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, Shape] = field(default_factory=dict)


class TensorRTEngine(Closing["tuple[trt.ICudaEngine, trt.IExecutionContext]"]):
    """An open TensorRT engine with one execution context and one CUDA stream; see runtimes.base.Engine."""

    def __init__(
        self,
        engine: trt.ICudaEngine,
        context: trt.IExecutionContext,
        device: Device,
        *,
        keep: tuple[object, ...],
        said: list[str],
        json: trt.LayerInformationFormat,
    ) -> None:
        super().__init__((engine, context))
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self._device, self._keep, self._said, self._json = device, keep, said, json
        self._active: _Bound | None = None
        self._last: _Bound | None = None
        self._all: list[_Bound] = []
        inputs = {key for key in names if engine.get_tensor_mode(key).name == "INPUT"}
        dtypes = {key: _dtype(engine, key) for key in names}
        self.inputs: tuple[str, ...] = tuple(key for key in names if key in inputs)
        self.outputs: tuple[str, ...] = tuple(key for key in names if key not in inputs)
        self.input_dtypes: DTypes = {key: dtypes[key] for key in self.inputs}
        self.input_shapes: Shapes = {key: _sizes(engine, key) for key in self.inputs}
        self._output_dtypes = {key: dtypes[key] for key in self.outputs}

    def run(self, feeds: Feeds) -> dict[str, npt.NDArray[Any]]:
        """Run one inference from host memory to host memory."""
        self._live()
        feeds = check_feeds(feeds, self.input_dtypes, self.input_shapes)
        bound = self._last
        if bound is None or bound.shapes != _shapes(feeds):
            self._last = None
            if bound is not None:
                self._release(bound)
            bound = self._last = self._reserve(feeds)
        self._upload(bound, feeds)
        self._execute(bound)
        outputs = {key: np.empty(bound.outputs[key], self._output_dtypes[key]) for key in self.outputs}
        for key, value in outputs.items():
            self._device.download(value, bound.addresses[key])
        self._device.wait()
        return outputs

    def bind(self, feeds: Feeds) -> Callable[[], None]:
        """Copy the feeds to the device and return a function that runs one inference; outputs stay on the device.

        close() frees the device memory.
        """
        self._live()
        feeds = check_feeds(feeds, self.input_dtypes, self.input_shapes)
        bound = self._reserve(feeds)
        try:
            self._upload(bound, feeds)
        except RuntimesError:
            self._release(bound)
            raise

        def step() -> None:
            self._execute(bound)
            self._device.wait()

        return step

    def described(self) -> str:
        """Return the report of TensorRT's engine inspector as JSON.

        With dynamic shapes the inspector reports types only after the input shapes are set, so this method sets the
        usual shapes.

        Raises:
            RuntimesError: TensorRT rejected the usual shapes or created no inspector.
        """
        engine, context = self._live()
        self._active = None
        for key in self.inputs:
            shape = self.usual_shape(key)
            if not context.set_input_shape(key, shape):
                raise RuntimesError(f"TensorRT rejected the usual shape {list(shape)} of input {key!r}.")
        inspector = engine.create_engine_inspector()
        if inspector is None:
            raise RuntimesError(f"TensorRT created no inspector: {reason(self._said, 'no reason given')}.")
        inspector.execution_context = context
        return str(inspector.get_engine_information(self._json))

    def usual_shape(self, key: str) -> Shape:
        """Return the shape of an input that the engine is optimized for."""
        engine, _ = self._live()
        return tuple(engine.get_tensor_profile_shape(key, 0)[1])

    def close(self) -> None:
        """Free memory, stream, context and engine. Closing twice is allowed."""
        for bound in list(self._all):
            self._release(bound)
        self._device.held.close()
        self._last = None
        # The context must not outlive its engine, nor the engine its runtime and logger.
        engine = None if self._opened is None else self._opened[0]
        super().close()
        del engine
        self._keep = ()

    def _reserve(self, feeds: Feeds) -> _Bound:
        """Set the shapes and allocate device memory for all inputs and outputs; on failure free all of it."""
        _, context = self._live()
        self._active = None
        with contextlib.ExitStack() as held:
            bound = _Bound(_shapes(feeds), held)
            self._set_shapes(bound)
            for key in self.outputs:
                bound.outputs[key] = _static(key, tuple(context.get_tensor_shape(key)))
            dtypes = {**self.input_dtypes, **self._output_dtypes}
            for key, shape in {**bound.shapes, **bound.outputs}.items():
                bound.addresses[key] = self._device.reserve(math.prod(shape) * dtypes[key].itemsize, held)
            self._set_addresses(bound)
            bound.held = held.pop_all()
        self._all.append(bound)
        self._active = bound
        return bound

    def _release(self, bound: _Bound) -> None:
        if self._active is bound:
            self._active = None
        self._all.remove(bound)
        bound.held.close()

    def _upload(self, bound: _Bound, feeds: Feeds) -> None:
        copies = {key: np.ascontiguousarray(value) for key, value in feeds.items()}
        for key, value in copies.items():
            self._device.upload(bound.addresses[key], value)
        self._device.wait()  # `copies` must live until the upload is complete

    def _execute(self, bound: _Bound) -> None:
        _, context = self._live()
        if self._active is not bound:
            self._active = None
            self._set_shapes(bound)
            self._set_addresses(bound)
            self._active = bound
        if not context.execute_async_v3(self._device.stream):
            raise RuntimesError(f"TensorRT failed while running: {reason(self._said, 'no reason given')}.")

    def _set_shapes(self, bound: _Bound) -> None:
        engine, context = self._live()
        for key, shape in bound.shapes.items():
            if not context.set_input_shape(key, shape):
                least, _, most = (list(size) for size in engine.get_tensor_profile_shape(key, 0))
                raise RuntimesError(
                    f"Input {key!r}: found shape {list(shape)}; this engine was built for {least} to {most}: "
                    "use sizes in this range, or build it again for other sizes."
                )
        unset = list(context.infer_shapes())
        if unset:
            raise RuntimesError(f"TensorRT cannot infer the output shapes: input {', '.join(unset)} has no shape.")

    def _set_addresses(self, bound: _Bound) -> None:
        _, context = self._live()
        for key, address in bound.addresses.items():
            if not context.set_tensor_address(key, address):
                raise RuntimesError(
                    f"TensorRT rejected the address of {key!r}: {reason(self._said, 'no reason given')}."
                )


class Device:
    """Memory of the GPU and one CUDA stream; every failure raises a RuntimesError."""

    def __init__(self, held: contextlib.ExitStack) -> None:
        from cuda.bindings import runtime

        self.cuda: Any = runtime
        self.held = held
        stream = self._call("cudaStreamCreate")
        held.callback(self._free, "cudaStreamDestroy", stream)
        self._stream = stream
        self.stream = int(stream)

    def reserve(self, size: int, held: contextlib.ExitStack) -> int:
        """Allocate `size` bytes, at least one, and return the address; closing `held` frees the memory."""
        address = int(self._call("cudaMalloc", max(size, 1)))
        held.callback(self._free, "cudaFree", address)
        if address % ALIGNMENT:
            raise RuntimesError(f"CUDA allocated memory at {address}; TensorRT needs a multiple of {ALIGNMENT}.")
        return address

    def upload(self, address: int, value: npt.NDArray[Any]) -> None:
        """Start copying an array to the device; it must be contiguous and live until wait() returns."""
        kind = self.cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, value.ctypes.data, value.nbytes, kind, self._stream)

    def download(self, value: npt.NDArray[Any], address: int) -> None:
        """Start copying from the device into an array; the copy is complete after wait()."""
        kind = self.cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", value.ctypes.data, address, value.nbytes, kind, self._stream)

    def wait(self) -> None:
        """Wait until all operations of the stream are complete."""
        self._call("cudaStreamSynchronize", self._stream)

    def _call(self, function: str, *arguments: Any) -> Any:
        """Call a CUDA function and return its result, if any; raise RuntimesError for an error code."""
        code, *result = getattr(self.cuda, function)(*arguments)
        if code != self.cuda.cudaError_t.cudaSuccess:
            raise RuntimesError(f"CUDA failed in {function}: {self._text(code)}.")
        return result[0] if result else None

    def _text(self, code: Any) -> str:
        _, text = self.cuda.cudaGetErrorString(code)
        return str(text.decode() if isinstance(text, bytes) else text)

    def _free(self, function: str, resource: Any) -> None:
        # The error code is ignored: it repeats the error of an earlier call, which was raised.
        getattr(self.cuda, function)(resource)


def _dtype(engine: trt.ICudaEngine, key: str) -> np.dtype[Any]:
    """Return the NumPy dtype of an input or output."""
    kind = engine.get_tensor_dtype(key)
    if engine.get_tensor_location(key).name == "HOST":
        raise Refused(f"{key!r} is in host memory, as shape tensors are, which is not supported")
    if kind.name not in NUMPY:
        raise Refused(f"{key!r} has type {kind.name}, which has no NumPy dtype")
    return np.dtype(NUMPY[kind.name])


def _sizes(engine: trt.ICudaEngine, key: str) -> tuple[int | None, ...]:
    return tuple(None if size == -1 else size for size in engine.get_tensor_shape(key))


def _shapes(feeds: Feeds) -> dict[str, Shape]:
    return {key: tuple(value.shape) for key, value in feeds.items()}


def _static(key: str, shape: Shape) -> Shape:
    if -1 in shape:
        raise RuntimesError(f"Output {key!r} has a data-dependent shape, {list(shape)}, which is not supported.")
    return shape


def reason(errors: list[str], default: str) -> str:
    """Return the first line of the last error that TensorRT logged, or `default` if there is none."""
    return first_line(Refused(errors[-1])) if errors else default
