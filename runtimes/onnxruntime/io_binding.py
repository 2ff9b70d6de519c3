"""Inferences of ONNX Runtime on values that stay where it runs: the same one again and again, or a text that grows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from runtimes.base.protocols import DTypes, Feeds, RuntimesError, Shapes, first_line, taken
from runtimes.onnxruntime.kv_cache_io import LENGTH_AXIS, MASK, TOKENS


class Bound:
    """Feeds that lie where a session runs; each call is one inference on them, from there to buffers that stay there.

    ONNX Runtime allocates the outputs at the first call, which knows their shapes; every further one writes the same
    buffers. So a step of generation, whose keys and values are outputs, goes through no host array and allocates none.
    Outputs that may share a buffer with an input do: each call then writes the same new tokens behind the same past.
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
        # Held here to keep it alive: on the CPU the binding reads its memory without owning it.
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
        """Copies of the outputs of the last call; none before the first."""
        return {key: value.numpy().copy() for key, value in self._outputs.items()}

    def _keep(self) -> None:
        """Let further calls write where the first one did."""
        self._outputs = dict(zip(self._names, self._binding.get_outputs(), strict=True))
        for key, value in self._outputs.items():
            self._binding.bind_ortvalue_output(key, value)


class Several:
    """One inference in parts, each with some of the rows."""

    def __init__(self, parts: Sequence[Bound]) -> None:
        self._parts = parts

    def __call__(self) -> None:
        """Run all parts, one after the other."""
        for part in self._parts:
            part()

    def outputs(self) -> dict[str, npt.NDArray[Any]]:
        """Copies of the outputs of the last call, all rows together; none before the first."""
        found = [part.outputs() for part in self._parts]
        return {key: np.concatenate([each[key] for each in found]) for key in found[0]}


class Cache:
    """Keys and values of texts that grow, in buffers as long as they may get; no call copies what is in them.

    A call is one or more tokens for every text: first the prompt, then what follows, token by token where there are
    several texts. ONNX Runtime takes several tokens behind others for one text only.
    """

    def __init__(
        self,
        live: Callable[[], Any],
        shared: Mapping[str, str],
        sizes: Mapping[str, tuple[int, ...]],
        told: tuple[DTypes, Shapes],
    ) -> None:
        """Make it.

        Args:
            live: gives the session, as long as it is open.
            shared: which output is written to the buffer of which input.
            sizes: shapes of the buffers.
            told: types and shapes of the other inputs.
        """
        import onnxruntime as ort

        self.tokens = 0  # of each text, padding included
        self._live, self._told = live, told
        self._most = min(size[LENGTH_AXIS] for size in sizes.values())
        buffers = {name: np.zeros(size, dtype=np.float32) for name, size in sizes.items()}
        self._buffers = {name: ort.OrtValue.ortvalue_from_numpy(value, "cpu", 0) for name, value in buffers.items()}
        self._outputs = {present: self._buffers[past] for present, past in shared.items()}

    def __call__(self, feeds: Feeds) -> dict[str, npt.NDArray[Any]]:
        """Read further tokens and return the model's outputs for them, but for the cache.

        Args:
            feeds: all inputs but the cache; the mask covers every token so far.

        Raises:
            RuntimesError: the tokens do not go on where those before ended, or are too many; or as Engine.run.
        """
        feeds = taken(feeds, *self._told)
        new, every = feeds[TOKENS].shape[1], feeds[MASK].shape[1]
        if every != self.tokens + new or every > self._most:
            raise RuntimesError(
                f"Found {new} tokens and a mask of {every} behind a cache of {self.tokens}; expected a mask of all of "
                f"them, and at most {self._most}."
            )
        session = self._live()
        binding = session.io_binding()
        read = {name: np.ascontiguousarray(value) for name, value in feeds.items()}  # held until it was run
        for name, value in read.items():
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
        self.tokens = every
        found = binding.get_outputs()[len(self._outputs) :]
        return {name: value.numpy().copy() for name, value in zip(names, found, strict=True)}


@contextlib.contextmanager
def run_errors() -> Iterator[None]:
    """Make one sentence of what ONNX Runtime raises while running."""
    try:
        yield
    except RuntimesError:
        raise
    except Exception as error:  # the classes of ONNX Runtime's errors have no common base but Exception
        raise RuntimesError(f"ONNX Runtime stopped: {first_line(error)}.") from error


def _lengthened(past: npt.NDArray[Any], length: int) -> npt.NDArray[Any]:
    """A past with room for the tokens that come, so many in all."""
    longer = np.zeros((*past.shape[:LENGTH_AXIS], length, *past.shape[LENGTH_AXIS + 1 :]), dtype=past.dtype)
    longer[:, :, : past.shape[LENGTH_AXIS]] = past
    return longer
