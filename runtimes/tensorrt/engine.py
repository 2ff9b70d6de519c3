"""An open TensorRT engine, its device memory and its stream; see runtimes.tensorrt for what has been checked of it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from runtimes.base.protocols import Closing, DTypes, Feeds, RuntimesError, Shapes, first_line, taken

if TYPE_CHECKING:
    import tensorrt as trt

Shape = tuple[int, ...]

ALIGNMENT = 256
"""Bytes; what TensorRT asks of every address."""


class Refused(Exception):
    """TensorRT returned nothing or False where it had to return something; the message says what is missing."""


@dataclass
class _Bound:
    """Feeds on the device, with room for what comes out; `held` gives it back."""

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
    ) -> None:
        import tensorrt as trt

        super().__init__((engine, context))
        names = [engine.get_tensor_name(place) for place in range(engine.num_io_tensors)]
        self._device, self._keep, self._said = device, keep, said
        self._active: _Bound | None = None
        self._last: _Bound | None = None
        self._all: list[_Bound] = []
        fed = {key for key in names if engine.get_tensor_mode(key) == trt.TensorIOMode.INPUT}
        dtypes = {key: _dtype(engine, key) for key in names}
        self.inputs: tuple[str, ...] = tuple(key for key in names if key in fed)
        self.outputs: tuple[str, ...] = tuple(key for key in names if key not in fed)
        self.input_dtypes: DTypes = {key: dtypes[key] for key in self.inputs}
        self.input_shapes: Shapes = {key: _sizes(engine, key) for key in self.inputs}
        self._output_dtypes = {key: dtypes[key] for key in self.outputs}

    def run(self, feeds: Feeds) -> dict[str, npt.NDArray[Any]]:
        """Run one inference from host memory to host memory."""
        self._live()
        feeds = taken(feeds, self.input_dtypes, self.input_shapes)
        bound = self._last
        if bound is None or bound.shapes != _shapes(feeds):
            self._last = None
            if bound is not None:
                self._release(bound)
            bound = self._last = self._reserve(feeds)
        self._upload(bound, feeds)
        self._execute(bound)
        found = {key: np.empty(bound.outputs[key], self._output_dtypes[key]) for key in self.outputs}
        for key, value in found.items():
            self._device.download(value, bound.addresses[key])
        self._device.wait()
        return found

    def bind(self, feeds: Feeds) -> Callable[[], None]:
        """Copy the feeds to the device; each call of the result is one inference on them, its outputs staying there.

        The device memory is given back by close().
        """
        self._live()
        feeds = taken(feeds, self.input_dtypes, self.input_shapes)
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
        """Return what TensorRT's inspector says of the engine, as JSON.

        With free sizes it tells no types before they are set, so those that the engine is quickest at are set.

        Raises:
            RuntimesError: it makes no inspector.
        """
        import tensorrt as trt

        engine, context = self._live()
        self._active = None
        for key in self.inputs:
            shape = tuple(engine.get_tensor_profile_shape(key, 0)[1])
            if not context.set_input_shape(key, shape):
                raise RuntimesError(f"TensorRT does not take its own usual shape {list(shape)} for {key!r}.")
        inspector = engine.create_engine_inspector()
        if inspector is None:
            raise RuntimesError(f"TensorRT makes no inspector: {reason(self._said, 'no reason given')}.")
        inspector.execution_context = context
        return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))

    def close(self) -> None:
        """Give back memory, stream, context and engine. Closing twice is allowed."""
        for bound in list(self._all):
            self._release(bound)
        self._device.held.close()
        self._last = None
        # In this order: a context must not outlive its engine, nor the engine its runtime and logger.
        engine = None if self._opened is None else self._opened[0]
        super().close()
        del engine
        self._keep = ()

    def _reserve(self, feeds: Feeds) -> _Bound:
        """Tell the context the shapes and find room for every input and output; on failure nothing stays reserved."""
        _, context = self._live()
        self._active = None
        with contextlib.ExitStack() as held:
            bound = _Bound(_shapes(feeds), held)
            self._set_shapes(bound)
            for key in self.outputs:
                bound.outputs[key] = _known(key, tuple(context.get_tensor_shape(key)))
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
        self._device.wait()  # until then the copies must live

    def _execute(self, bound: _Bound) -> None:
        _, context = self._live()
        if self._active is not bound:
            self._active = None
            self._set_shapes(bound)
            self._set_addresses(bound)
            self._active = bound
        if not context.execute_async_v3(self._device.stream):
            raise RuntimesError(f"TensorRT stopped: {reason(self._said, 'it gives no reason')}.")

    def _set_shapes(self, bound: _Bound) -> None:
        engine, context = self._live()
        for key, shape in bound.shapes.items():
            if not context.set_input_shape(key, shape):
                least, _, most = (list(size) for size in engine.get_tensor_profile_shape(key, 0))
                raise RuntimesError(
                    f"Input {key!r}: found shape {list(shape)}; this engine was built for {least} to {most}: "
                    "stay within, or build it again for other sizes."
                )
        unset = list(context.infer_shapes())
        if unset:
            raise RuntimesError(f"TensorRT cannot find the output shapes: {', '.join(unset)} has no shape.")

    def _set_addresses(self, bound: _Bound) -> None:
        _, context = self._live()
        for key, address in bound.addresses.items():
            if not context.set_tensor_address(key, address):
                raise RuntimesError(f"TensorRT takes no memory for {key!r}: {reason(self._said, 'no reason given')}.")


class Device:
    """The GPU's memory and one stream of its own; every failure is a RuntimesError."""

    def __init__(self, held: contextlib.ExitStack) -> None:
        from cuda.bindings import runtime

        self.cuda: Any = runtime
        self.held = held
        stream = self._call("cudaStreamCreate")
        held.callback(self._free, "cudaStreamDestroy", stream)
        self._stream = stream
        self.stream = int(stream)

    def reserve(self, size: int, held: contextlib.ExitStack) -> int:
        """Return the address of new memory of at least one byte, which `held` gives back."""
        address = int(self._call("cudaMalloc", max(size, 1)))
        held.callback(self._free, "cudaFree", address)
        if address % ALIGNMENT:
            raise RuntimesError(f"CUDA gave memory at {address}; TensorRT needs a multiple of {ALIGNMENT}.")
        return address

    def upload(self, address: int, value: npt.NDArray[Any]) -> None:
        """Start to copy an array, contiguous and alive until wait(), to the device."""
        kind = self.cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, value.ctypes.data, value.nbytes, kind, self._stream)

    def download(self, value: npt.NDArray[Any], address: int) -> None:
        """Start to copy from the device into an array, complete after wait()."""
        kind = self.cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", value.ctypes.data, address, value.nbytes, kind, self._stream)

    def wait(self) -> None:
        """Return when all that was started is complete."""
        self._call("cudaStreamSynchronize", self._stream)

    def _call(self, function: str, *arguments: Any) -> Any:
        """Call CUDA, whose functions return an error code followed by the result, if there is one."""
        code, *result = getattr(self.cuda, function)(*arguments)
        if code != self.cuda.cudaError_t.cudaSuccess:
            raise RuntimesError(f"CUDA stopped at {function}: {self._text(code)}.")
        return result[0] if result else None

    def _text(self, code: Any) -> str:
        _, text = self.cuda.cudaGetErrorString(code)
        return str(text.decode() if isinstance(text, bytes) else text)

    def _free(self, function: str, thing: Any) -> None:
        # Its code is left alone: it repeats the error of an earlier call, which has been raised.
        getattr(self.cuda, function)(thing)


def _dtype(engine: trt.ICudaEngine, key: str) -> np.dtype[Any]:
    """Return the NumPy dtype of an input or output."""
    import tensorrt as trt

    kind = engine.get_tensor_dtype(key)
    if engine.get_tensor_location(key) == trt.TensorLocation.HOST:
        raise Refused(f"{key!r} lies in host memory, as shapes do, which is not supported")
    try:
        dtype: np.dtype[Any] = np.dtype(trt.nptype(kind))
    except TypeError as error:
        raise Refused(f"{key!r} has type {kind}, which NumPy does not know") from error
    return dtype


def _sizes(engine: trt.ICudaEngine, key: str) -> tuple[int | None, ...]:
    return tuple(None if size == -1 else size for size in engine.get_tensor_shape(key))


def _shapes(feeds: Feeds) -> dict[str, Shape]:
    return {key: tuple(value.shape) for key, value in feeds.items()}


def _known(key: str, shape: Shape) -> Shape:
    if -1 in shape:
        raise RuntimesError(
            f"Output {key!r} has a size that depends on the data, {list(shape)}; that is not supported."
        )
    return shape


def reason(said: list[str], otherwise: str) -> str:
    """Return the last error that TensorRT logged."""
    return first_line(Refused(said[-1])) if said else otherwise
