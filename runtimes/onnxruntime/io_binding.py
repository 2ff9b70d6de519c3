"""ONNX Runtime I/O binding: repeated inference on device-resident inputs, and decoding with an in-place KV cache."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from runtimes.base.protocols import DTypes, Feeds, RuntimesError, Shapes, check_feeds, first_line
from runtimes.onnxruntime.kv_cache_io import MASK, TOKEN_AXIS, TOKENS


class BoundCall:
    """Device-resident inputs and outputs of a session; each call runs one inference on them.

    ONNX Runtime allocates the outputs in the first call, when their shapes become known; later calls reuse the
    buffers. A decode step, whose keys and values are outputs, therefore copies nothing to the host and allocates
    nothing. Outputs in `shared` use the buffer of an input: each call writes the same new tokens behind the same past.
    """

    def __init__(
        self,
        live: Callable[[], Any],
        outputs: tuple[str, ...],
        feeds: Feeds,
        device: str,
        shared: Mapping[str, str] | None = None,
    ) -> None:
        import onnxruntime as ort

        self._live, self._names = live, outputs
        shared = {} if shared is None else shared
        copies = {key: np.array(value, order="C") for key, value in feeds.items() if key not in shared.values()}
        copies |= {key: _lengthened(feeds[key], feeds[MASK].shape[1]) for key in shared.values()}
        # Keep a reference: on the CPU the binding reads this memory without owning it.
        self._inputs = {key: ort.OrtValue.ortvalue_from_numpy(value, device, 0) for key, value in copies.items()}
        self._outputs: dict[str, Any] = {}
        self._binding = live().io_binding()
        for key, value in self._inputs.items():
            self._binding.bind_ortvalue_input(key, value)
        for key in outputs:
            if key in shared:
                self._binding.bind_ortvalue_output(key, self._inputs[shared[key]])
            else:
                self._binding.bind_output(key, device, 0)

    def __call__(self) -> None:
        """Run one inference."""
        with run_errors():
            self._live().run_with_iobinding(self._binding)
            self._binding.synchronize_outputs()
        if not self._outputs:
            self._keep()

    def outputs(self) -> dict[str, npt.NDArray[Any]]:
        """Return copies of the outputs of the last call; an empty dict before the first call."""
        return {key: value.numpy().copy() for key, value in self._outputs.items()}

    def _keep(self) -> None:
        """Bind the output buffers of the first call, so that later calls reuse them."""
        self._outputs = dict(zip(self._names, self._binding.get_outputs(), strict=True))
        for key, value in self._outputs.items():
            self._binding.bind_ortvalue_output(key, value)


class BoundRows:
    """One inference split by rows into several bound calls."""

    def __init__(self, parts: Sequence[BoundCall]) -> None:
        self._parts = parts

    def __call__(self) -> None:
        """Run all parts in order."""
        for part in self._parts:
            part()

    def outputs(self) -> dict[str, npt.NDArray[Any]]:
        """Return copies of the outputs of the last call, concatenated by rows; an empty dict before the first call."""
        outputs = [part.outputs() for part in self._parts]
        return {key: np.concatenate([rows[key] for rows in outputs]) for key in outputs[0]}


class InPlaceKVCache:
    """A KV cache of fixed capacity that the model updates in place, without copying its content.

    The first call is the prefill of the prompt; later calls decode one or more tokens for every row. With several rows,
    decode one token a call: ONNX Runtime supports several new tokens behind a cache for one row only.
    """

    def __init__(
        self,
        live: Callable[[], Any],
        shared: Mapping[str, str],
        sizes: Mapping[str, tuple[int, ...]],
        signature: tuple[DTypes, Shapes],
    ) -> None:
        """Allocate the buffers.

        Args:
            live: Returns the open session; raises RuntimesError once it is closed.
            shared: Map from each present output to the past input whose buffer it shares.
            sizes: Shapes of the buffers, [rows, heads, capacity in tokens, width].
            signature: Dtypes and shapes of the inputs other than the cache.
        """
        import onnxruntime as ort

        self.tokens = 0  # tokens of each row in the cache, padding included
        self._live, self._signature = live, signature
        self._capacity = min(size[TOKEN_AXIS] for size in sizes.values())
        buffers = {name: np.zeros(size, dtype=np.float32) for name, size in sizes.items()}
        self._buffers = {name: ort.OrtValue.ortvalue_from_numpy(value, "cpu", 0) for name, value in buffers.items()}
        self._outputs = {present: self._buffers[past] for present, past in shared.items()}

    def __call__(self, feeds: Feeds) -> dict[str, npt.NDArray[Any]]:
        """Append tokens to the cache and return the model's outputs for them, without the cache.

        Args:
            feeds: All inputs except the cache; the attention mask covers the cached and the new tokens.

        Raises:
            RuntimesError: The mask does not match the cached and new tokens, or the cache is full; or as Engine.run.
        """
        feeds = check_feeds(feeds, *self._signature)
        new, total = feeds[TOKENS].shape[1], feeds[MASK].shape[1]
        if total != self.tokens + new or total > self._capacity:
            raise RuntimesError(
                f"Found {new} new tokens and an attention mask of {total} behind a cache of {self.tokens}; expected a "
                f"mask of {self.tokens + new}, and at most {self._capacity}."
            )
        session = self._live()
        binding = session.io_binding()
        arrays = {name: np.ascontiguousarray(value) for name, value in feeds.items()}  # must outlive the run
        for name, value in arrays.items():
            binding.bind_cpu_input(name, value)
        for name, buffer in self._buffers.items():
            binding.bind_ortvalue_input(name, buffer)
        for name, buffer in self._outputs.items():
            binding.bind_ortvalue_output(name, buffer)
        names = [value.name for value in session.get_outputs() if value.name not in self._outputs]
        for name in names:
            binding.bind_output(name, "cpu")
        with run_errors():
            session.run_with_iobinding(binding)
        self.tokens = total
        outputs = binding.get_outputs()[len(self._outputs) :]
        return {name: value.numpy().copy() for name, value in zip(names, outputs, strict=True)}


@contextlib.contextmanager
def run_errors() -> Iterator[None]:
    """Convert ONNX Runtime's run-time exceptions to a RuntimesError of one sentence."""
    try:
        yield
    except RuntimesError:
        raise
    except Exception as error:  # the classes of ONNX Runtime's errors have no common base but Exception
        raise RuntimesError(f"ONNX Runtime failed while running: {first_line(error)}.") from error


def _lengthened(past: npt.NDArray[Any], length: int) -> npt.NDArray[Any]:
    """Return a copy of `past`, zero-padded along the token axis to `length`."""
    longer = np.zeros((*past.shape[:TOKEN_AXIS], length, *past.shape[TOKEN_AXIS + 1 :]), dtype=past.dtype)
    longer[:, :, : past.shape[TOKEN_AXIS]] = past
    return longer
