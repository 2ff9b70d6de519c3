"""Target executorch: an exported program as a .pte file for phones and boards, with XNNPACK's kernels on the CPU.

ExecuTorch plans its memory while building, so every free axis gets an upper bound there: the largest of
`BuildOptions.batches` for the first axis, of `BuildOptions.lengths` for the others. All sizes up to that run.

Its Python runtime has one pool of threads for the whole process, which open engines hold on to. `BuildOptions.threads`
sets it while no engine is open; an engine that asks for another number beside an open one is refused.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import os
import sys
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import util
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from runtimes.base import (
    BuildError,
    BuildOptions,
    Closing,
    DTypes,
    Feeds,
    Int8Style,
    RuntimesError,
    Shapes,
    first_line,
    need,
    taken,
)

name = "executorch"
description = (
    "ExecuTorch with XNNPACK on the CPU, for phones and boards; writes model.pte, batch up to the largest stated"
)
devices = ("cpu",)
source: Literal[".pt2"] = ".pt2"
precisions = MappingProxyType({"cpu": ("fp32", "int8", "int8-dynamic")})
own = ("int8", "int8-dynamic")
int8 = Int8Style(activations="int8", convolutions=False)

FILE = "model.pte"
FACTS = "compressor"  # the constant method that says what the file's tensors are called and how large they may be
NAMES = "compressor.json"


def missing() -> str | None:
    """Return None where ExecuTorch can be used, else the reason and the command that changes it."""
    if util.find_spec("executorch") is None:
        return "executorch is not installed; pip install executorch torchao"
    if util.find_spec("torchao") is None:
        return "torchao is not installed, which executorch quantizes with; pip install torchao"
    return None


def build(source: Path, out: Path, options: BuildOptions) -> Path:
    """Lower a saved torch.export program to `out`/model.pte in the precision asked for, and return its path.

    int8 quantizes the inputs, weights and outputs of Linear layers, all else stays in float32. Weights are symmetric
    with a scale per output channel; inputs and outputs have one scale and zero point each, from `options.samples`,
    because XNNPACK has no static int8 product with a float32 result. int8-dynamic quantizes inputs and weights only,
    the inputs with a scale per row, found at run time.

    Raises:
        RuntimeUnavailable: ExecuTorch or the device is not there.
        BuildError: The file is no such program, ExecuTorch refused it, or int8 was asked for without samples.
    """
    need(name, missing(), devices, options)
    if options.precision not in precisions["cpu"]:
        known = ", ".join(precisions["cpu"])
        raise BuildError(f"Target {name} has no precision {options.precision!r}; expected one of: {known}.")
    if options.precision == "int8" and options.samples is None:
        raise BuildError("int8 needs samples to calibrate with; found none.")
    with _quiet():
        program, facts = _opened(source)
        try:
            written = _lowered(program, facts, options)
        except Exception as error:  # its errors have no common base
            raise BuildError(f"ExecuTorch cannot build {source.name}: {first_line(error)}.") from error
    path = out / FILE
    path.write_bytes(written)
    return path


def load(path: Path, options: BuildOptions) -> ExecutorchEngine:
    """Open the file that build() wrote.

    Raises:
        RuntimeUnavailable: ExecuTorch or the device is not there.
        RuntimesError: Open engines hold a pool with another number of threads.
        BuildError: The file is none that build() wrote.
    """
    need(name, missing(), devices, options)
    if not path.is_file():
        raise BuildError(f"There is no ExecuTorch program {path}.")
    with _quiet():
        from executorch.runtime import Runtime

        _resize(_pool(), options.threads)
        try:
            program = Runtime.get().load_program(path)
            if not {FACTS, "forward"} <= program.method_names:
                raise BuildError(f"{path.name} was not written by this target: it does not name its inputs.")
            facts = json.loads(program.load_method(FACTS).execute([])[0])
            engine = ExecutorchEngine(program, program.load_method("forward"), facts)
        except RuntimeError as error:
            raise BuildError(f"ExecuTorch cannot open {path.name}: {first_line(error)}.") from error
    _pool().engines.add(engine)
    return engine


class ExecutorchEngine(Closing[Any]):
    """A loaded ExecuTorch method; see runtimes.base.Engine. Sizes beyond those planned for raise RuntimesError."""

    def __init__(self, program: Any, method: Any, facts: dict[str, Any]) -> None:
        super().__init__((method, program))
        self.inputs: tuple[str, ...] = tuple(facts["inputs"])
        self.outputs: tuple[str, ...] = tuple(facts["outputs"])
        self.input_dtypes: DTypes = {key: np.dtype(facts["dtypes"][key]) for key in self.inputs}
        self.input_shapes: Shapes = {key: tuple(facts["shapes"][key]) for key in self.inputs}
        self._largest: dict[str, tuple[int, ...]] = {key: tuple(facts["largest"][key]) for key in self.inputs}

    def run(self, feeds: Feeds) -> dict[str, npt.NDArray[Any]]:
        """Run one inference from host memory to host memory."""
        found = self._execute(self._tensors(feeds))
        return {key: value.numpy() for key, value in zip(self.outputs, found, strict=True)}  # ExecuTorch made a copy

    def bind(self, feeds: Feeds) -> Callable[[], None]:
        """Copy the feeds into tensors; each call of the result is one inference on them."""
        tensors = self._tensors(feeds)

        def step() -> None:
            self._execute(tensors)

        return step

    def _tensors(self, feeds: Feeds) -> list[Any]:
        import torch

        self._live()
        feeds = taken(feeds, self.input_dtypes, self.input_shapes)
        for key, value in feeds.items():
            if any(size > most for size, most in zip(value.shape, self._largest[key], strict=True)):
                raise RuntimesError(
                    f"Input {key!r}: found shape {list(value.shape)}; expected at most {list(self._largest[key])}, "
                    "which the file was built for."
                )
        return [torch.from_numpy(np.array(feeds[key], order="C")) for key in self.inputs]

    def _execute(self, tensors: list[Any]) -> list[Any]:
        method, _ = self._live()
        try:
            return list(method.execute(tensors))
        except RuntimeError as error:
            raise RuntimesError(f"ExecuTorch failed while running: {first_line(error)}.") from error


@dataclass(frozen=True)
class _Pool:
    """The process's pool of threads: its first size, and the engines that hold its address."""

    first: int
    engines: weakref.WeakSet[ExecutorchEngine] = field(default_factory=weakref.WeakSet)


@functools.cache
def _pool() -> _Pool:
    """The record of the one pool there is: ExecuTorch replaces it under engines that still use it."""
    from executorch.extension.pybindings import portable_lib

    return _Pool(portable_lib._threadpool_get_thread_count())


def _resize(pool: _Pool, threads: int | None) -> None:
    """Give the pool the number of threads asked for, or that it began with; an open engine's is left alone."""
    from executorch.extension.pybindings import portable_lib

    found = portable_lib._threadpool_get_thread_count()
    wanted = pool.first if threads is None else threads
    if found == wanted:
        return
    if not any(engine._opened is not None for engine in pool.engines):
        portable_lib._unsafe_reset_threadpool(wanted)
    elif threads is not None:
        raise RuntimesError(
            f"Found threads={threads} beside an open engine with {found}; executorch has one pool for the process: "
            "close that engine first, or give both the same number."
        )


def _opened(path: Path) -> tuple[Any, dict[str, list[str]]]:
    """The saved program, and the names of its inputs and outputs."""
    import torch

    extra = {NAMES: ""}
    try:
        program = torch.export.load(path, extra_files=extra)
    except Exception as error:  # torch's errors have no common base
        raise BuildError(f"torch.export cannot read {path.name}: {first_line(error)}.") from error
    if not extra[NAMES]:
        raise BuildError(f"{path.name} does not name its inputs and outputs; expected {NAMES} in it.")
    return program, json.loads(extra[NAMES])


def _lowered(program: Any, facts: dict[str, list[str]], options: BuildOptions) -> bytes:
    """The .pte file of a program."""
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    axes = _inputs(program)
    example, largest = _example(axes, options), _largest(axes, program.range_constraints, options)
    with torch.no_grad():
        module = _quantized(program.module(check_guards=False), example, facts["inputs"], options)
        bounded = torch.export.export(module, example, dynamic_shapes=_free(axes, largest), strict=False)
        bounded = bounded.run_decompositions(_decompositions())
    stated = {
        **facts,
        "dtypes": _by_name(facts, [str(tensor.dtype).removeprefix("torch.") for tensor in example]),
        "shapes": _by_name(facts, [tuple(map(_fixed, tensor.shape)) for tensor in _inputs(bounded)]),
        "largest": _by_name(facts, largest),
        "precision": options.precision,
    }
    edge = to_edge_transform_and_lower(
        bounded, partitioner=[XnnpackPartitioner()], constant_methods={FACTS: json.dumps(stated)}
    )
    return bytes(edge.to_executorch().buffer)


def _decompositions() -> dict[Any, Callable[..., Any]]:
    """How products are written before ExecuTorch does it: its own way puts an eighth of a model outside of XNNPACK."""
    import torch

    return {
        torch.ops.aten.scaled_dot_product_attention.default: _attention,
        torch.ops.aten.matmul.default: _product,
    }


def _product(a: Any, b: Any) -> Any:
    """One batched product of two tensors of 4 axes, without the copies to a common shape that they have already."""
    import torch

    if a.dim() != 4 or b.dim() != 4 or list(map(str, a.shape[:2])) != list(map(str, b.shape[:2])):
        return NotImplemented
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """softmax(scale query key^T) value, where rows that are masked throughout become zero, as torch has it.

    Only for no mask or one of truth values; anything else is left to ExecuTorch, which looks for such rows afterwards.
    """
    import torch

    if dropout_p or is_causal or enable_gqa or (attn_mask is not None and attn_mask.dtype != torch.bool):
        return NotImplemented
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = _product(query * query.new_full((1, 1, 1, 1), factor), key.transpose(-2, -1))
    if scores is NotImplemented:
        return NotImplemented
    if attn_mask is None:
        return _product(torch.softmax(scores, -1), value)
    seen = attn_mask.to(query.dtype)
    # Far below any score, far above minus infinity: a row of these alone has no NaN, and `seen` takes it out again.
    return _product(torch.softmax(scores + (seen - 1) * 1e30, -1) * seen, value)


def _by_name(facts: dict[str, list[str]], values: list[Any]) -> dict[str, Any]:
    return dict(zip(facts["inputs"], values, strict=True))


def _inputs(program: Any) -> list[Any]:
    """The program's inputs in order, as fake tensors: free axes are symbols."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    return [nodes[key].meta["val"] for key in program.graph_signature.user_inputs]


def _fixed(size: Any) -> int | None:
    return size if isinstance(size, int) else None


def _bound(axis: int, options: BuildOptions) -> int:
    return (options.lengths if axis else options.batches)[2]


def _largest(inputs: list[Any], ranges: Any, options: BuildOptions) -> list[tuple[int, ...]]:
    """Per input the largest size of each axis: what was asked for, or less where the model takes less."""

    def most(axis: int, size: Any) -> int:
        if isinstance(size, int):
            return size
        known = ranges.get(size.node.expr)
        return int(min([_bound(axis, options)] + ([known.upper] if known is not None else [])))

    return [tuple(most(axis, size) for axis, size in enumerate(tensor.shape)) for tensor in inputs]


def _example(inputs: list[Any], options: BuildOptions) -> tuple[Any, ...]:
    """Zeros of the sizes that the program was exported with, or of the largest where that is less.

    Axes that are computed from others, such as a mask over cache and tokens, follow those.
    """
    import torch

    limit: dict[Any, int] = {}
    for tensor in inputs:
        for axis, size in enumerate(tensor.shape):
            if not isinstance(size, int) and size.node.expr.is_Symbol:
                held = limit.get(size.node.expr, size.node.hint)
                limit[size.node.expr] = min(held, _bound(axis, options))
    sizes = [[s if isinstance(s, int) else int(s.node.expr.subs(limit)) for s in tensor.shape] for tensor in inputs]
    return tuple(torch.zeros(size, dtype=tensor.dtype) for size, tensor in zip(sizes, inputs, strict=True))


def _free(inputs: list[Any], largest: list[tuple[int, ...]]) -> Any:
    """Which axes torch.export leaves free, and up to which size; those of at most one element are fixed."""
    from torch.export import Dim

    axes = [
        {
            axis: Dim.DYNAMIC(max=most)
            for axis, (size, most) in enumerate(zip(tensor.shape, sizes, strict=True))
            if not isinstance(size, int) and most > 1
        }
        for tensor, sizes in zip(inputs, largest, strict=True)
    ]
    return tuple(axes)


def _quantized(module: Any, example: tuple[Any, ...], names: list[str], options: BuildOptions) -> Any:
    """The module with quantized Linear layers, or as it is for fp32."""
    if options.precision == "fp32":
        return module
    import torch
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as xnnpack
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    dynamic = options.precision == "int8-dynamic"
    style = xnnpack.get_symmetric_quantization_config(is_per_channel=True, is_dynamic=dynamic)
    quantizer = xnnpack.XNNPACKQuantizer().set_operator_type(torch.ops.aten.linear.default, style)
    prepared = prepare_pt2e(module, quantizer)
    if options.samples is None or dynamic:
        prepared(*example)  # the ranges of the weights are read off in a run
    else:
        for feeds in options.samples():
            prepared(*(torch.from_numpy(np.array(feeds[key])) for key in names))
    return convert_pt2e(prepared)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's warnings, log and native messages about processor files from the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), _muted(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(io.StringIO()):  # some of its native messages take the way through Python
                yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _muted() -> Iterator[None]:
    """Point file descriptor 2 elsewhere: native code writes to it without asking Python."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with tempfile.TemporaryFile() as aside:
            os.dup2(aside.fileno(), 2)
            yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
