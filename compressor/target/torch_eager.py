"""A torch module as an engine: the baseline of those who deploy what they trained, eager or through torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from compressor.models import Model
from compressor.models.base import first_line
from runtimes.base.protocols import BuildError, BuildOptions, Closing, DTypes, Feeds, Shapes, taken

SHAPES = 64  # for which one process compiles
Call = Callable[..., tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Module:
    """A loaded model that can be opened like an engine.

    `backend` is what compiles for torch.compile. `compiled` keeps what it made, by the shapes of the inputs: an engine
    is opened anew for each burst of a timing, and compiling takes a minute.
    """

    model: Model
    compiles: bool = False
    backend: str = "inductor"
    compiled: dict[tuple[tuple[int, ...], ...], Call] = field(default_factory=dict)

    def open(self, options: BuildOptions) -> TorchEngine:
        """Open it on the CPU, with so many threads.

        Raises:
            BuildError: another device was asked for.
        """
        if options.device != "cpu":
            raise BuildError(f"torch models are timed on the CPU only, found {options.device!r}; leave them out.")
        return TorchEngine(self, options.threads)

    def call(self, tensors: tuple[torch.Tensor, ...]) -> Call:
        """What computes the outputs of inputs of these shapes."""
        if not self.compiles:
            return self._eager
        shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        if shapes not in self.compiled:
            self.compiled[shapes] = self._compiled(tensors)
        return self.compiled[shapes]

    def _eager(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.model.call(self.model.module, *tensors)

    def _compiled(self, tensors: tuple[torch.Tensor, ...]) -> Call:
        """Compiled for these very shapes, and run once, so that no timing holds the compiling.

        Raises:
            BuildError: torch.compile failed, as it does without a C++ compiler.
        """
        try:
            made: Call = torch.compile(self._eager, dynamic=False, backend=self.backend)
            # Beyond eight shapes or models dynamo would go back to eager, silently, and that would be what is timed.
            settings: Any = torch.compiler.config  # its patch() is put there at run time
            with settings.patch(recompile_limit=SHAPES, fail_on_recompile_limit_hit=True):
                made(*tensors)
        except Exception as error:  # whatever the compiler behind it raises
            raise BuildError(
                f"torch.compile cannot compile {self.model.name} ({first_line(error)}); leave out --compile."
            ) from error
        return made


class TorchEngine(Closing[Module]):
    """An open torch module; see runtimes.base.Engine. Threads are those of the process, and put back by close()."""

    def __init__(self, module: Module, threads: int | None) -> None:
        super().__init__(module)
        self._threads_before = torch.get_num_threads()
        if threads is not None:
            torch.set_num_threads(threads)
        model = module.model
        self.inputs, self.outputs = model.inputs, model.outputs
        self.input_dtypes: DTypes = {name: value.numpy().dtype for name, value in model.example.items()}
        self.input_shapes: Shapes = {
            name: tuple(None if axis in model.dynamic_axes[name] else size for axis, size in enumerate(value.shape))
            for name, value in model.example.items()
        }

    def run(self, feeds: Feeds) -> dict[str, npt.NDArray[Any]]:
        """Run one inference from host memory to host memory."""
        found = self._step(feeds)()
        return {name: value.numpy() for name, value in zip(self.outputs, found, strict=True)}

    def bind(self, feeds: Feeds) -> Callable[[], None]:
        """Copy the feeds to tensors; each call of the result is one inference on them."""
        step = self._step(feeds)

        def run() -> None:
            self._live()
            step()

        return run

    def close(self) -> None:
        """Put the threads of the process back. Closing twice is allowed."""
        if self._opened is not None:
            torch.set_num_threads(self._threads_before)
        super().close()

    def _step(self, feeds: Feeds) -> Callable[[], tuple[torch.Tensor, ...]]:
        module = self._live()
        feeds = taken(feeds, self.input_dtypes, self.input_shapes)
        tensors = tuple(torch.from_numpy(np.array(feeds[name], order="C")) for name in self.inputs)
        with torch.inference_mode():
            call = module.call(tensors)

        def step() -> tuple[torch.Tensor, ...]:
            with torch.inference_mode():
                return call(*tensors)

        return step
