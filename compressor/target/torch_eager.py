"""Torch modules as engines, eager or through torch.compile: the baseline of a deployment without export."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from compressor.models import Model
from compressor.models.base import first_line
from runtimes.base.protocols import BuildError, BuildOptions, Closing, DTypes, Feeds, Shapes, check_feeds

SHAPES = 64  # largest number of input shapes that one process compiles
Call = Callable[..., tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class CallableModel:
    """What an engine needs of a `Model`, under the same names."""

    name: str
    module: torch.nn.Module
    call: Call
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    example: Mapping[str, torch.Tensor]
    dynamic_axes: Mapping[str, Mapping[int, str]]


@dataclass(frozen=True)
class Module:
    """A loaded model that can be opened as an engine.

    Attributes:
        model: the loaded model; in another process, what the engine needs of it.
        compiles: whether the module runs through torch.compile.
        backend: the backend of torch.compile.
        compiled: the compiled functions by the shapes of the inputs. They are kept because a timing opens an engine for
            each burst, and compiling takes a minute.
    """

    model: Model
    compiles: bool = False
    backend: str = "inductor"
    compiled: dict[tuple[tuple[int, ...], ...], Call] = field(default_factory=dict)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what an engine needs of the model; preprocessing and tokenizers cannot all be pickled."""
        model = self.model
        needed = CallableModel(
            model.name, model.module, model.call, model.inputs, model.outputs, model.example, model.dynamic_axes
        )
        return Module, (needed, self.compiles, self.backend)

    def open(self, options: BuildOptions) -> TorchEngine:
        """Open the model on the CPU with the threads of the options.

        Raises:
            BuildError: the options name another device.
        """
        if options.device != "cpu":
            raise BuildError(
                f"torch models are timed on the CPU only, found device {options.device!r}; leave them out."
            )
        return TorchEngine(self, options.threads)

    def call(self, tensors: tuple[torch.Tensor, ...]) -> Call:
        """Return the function that computes the outputs for inputs of these shapes."""
        if not self.compiles:
            return self._eager
        shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        if shapes not in self.compiled:
            self.compiled[shapes] = self._compiled(tensors)
        return self.compiled[shapes]

    def _eager(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.model.call(self.model.module, *tensors)

    def _compiled(self, tensors: tuple[torch.Tensor, ...]) -> Call:
        """Compile for exactly these shapes and run once, so that no timing includes the compilation.

        Raises:
            BuildError: torch.compile failed, as it does without a C++ compiler.
        """
        try:
            compiled: Call = torch.compile(self._eager, dynamic=False, backend=self.backend)
            # Beyond eight shapes or models dynamo would silently fall back to eager, which would then be timed.
            settings: Any = torch.compiler.config  # Any, because patch() is added at run time
            with settings.patch(recompile_limit=SHAPES, fail_on_recompile_limit_hit=True):
                compiled(*tensors)
        except Exception as error:  # the errors of the backends have no common base
            raise BuildError(
                f"torch.compile cannot compile {self.model.name} ({first_line(error)}); leave out --compile."
            ) from error
        return compiled


class TorchEngine(Closing[Module]):
    """An open torch module; see `runtimes.base.protocols.Engine`.

    The number of threads holds for the whole process; close() restores it.
    """

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
        outputs = self._step(feeds)()
        return {name: value.numpy() for name, value in zip(self.outputs, outputs, strict=True)}

    def bind(self, feeds: Feeds) -> Callable[[], None]:
        """Copy the feeds to tensors and return a function that runs one inference on them."""
        step = self._step(feeds)

        def run() -> None:
            self._live()
            step()

        return run

    def close(self) -> None:
        """Restore the number of threads of the process. Closing twice is allowed."""
        if self._opened is not None:
            torch.set_num_threads(self._threads_before)
        super().close()

    def _step(self, feeds: Feeds) -> Callable[[], tuple[torch.Tensor, ...]]:
        module = self._live()
        feeds = check_feeds(feeds, self.input_dtypes, self.input_shapes)
        tensors = tuple(torch.from_numpy(np.array(feeds[name], order="C")) for name in self.inputs)
        with torch.inference_mode():
            call = module.call(tensors)

        def step() -> tuple[torch.Tensor, ...]:
            with torch.inference_mode():
                return call(*tensors)

        return step
