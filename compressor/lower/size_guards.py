"""Sizes of the inputs for which a traced graph holds, where forward branches on a size.

torch.export follows one side of a branch such as ``if x.shape[1] > 16`` and records the condition as a guard. The graph
computes something else than the module where a guard is false, so guards are compared with the sizes of the data.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.export import ExportedProgram

from compressor.data.splits import Data
from compressor.errors import CompressorError
from compressor.limitations import Limitation
from compressor.lower.symbolic.truths import FixedTruth
from compressor.models import Model
from compressor.models.base import most_tokens
from passes.torch_internals import guards, holds
from runtimes.base.encoder_decoder import DECODER_IDS

_SIZE = re.compile(r"L\['tensors'\]\[(\d+)\]\.size\(\)\[(\d+)\]")
_BLOCK = re.compile(r" % (\d+)\)")
_LEAST = re.compile(rf"{_SIZE.pattern} >=? \d+|\d+ <=? {_SIZE.pattern}")
_ONE = re.compile(r"\) == 1$")
_MULTIPLE = re.compile(rf"\({_SIZE.pattern}{_BLOCK.pattern} == 0")
# Sizes at which a condition is evaluated: one that holds for all of them restricts nothing. torch.export takes batches
# of at least two rows.
BATCHES = (2, 3, 4, 5, 8, 16, 32, 64, 512)
FEWEST = (1, 2, 3)  # tokens of short texts, at which a condition is evaluated
ANY_LENGTH = ("text", "audio", "tensor")  # kinds of data whose shorter samples are tried
LONGER = (0, 1, 2, 3, 5, 8, 13, 64, 301)  # added to the sizes of the other dynamic axes of the example
REMEDY = "compute both sides with tensor operators (torch.where) in forward"


class SizeError(CompressorError):
    """A model that branches on a size, and data or a batch for which the other side was not traced."""


@dataclass(frozen=True)
class SizeGuard:
    """A condition on sizes of the inputs.

    Attributes:
        code: the condition as torch.export writes it.
        inputs: names of the inputs in their order.
    """

    code: str
    inputs: tuple[str, ...]

    @property
    def block(self) -> int | None:
        """Return the number of which a size has to be a multiple, or must be none; None for other conditions."""
        found = _BLOCK.search(self.code)
        return None if found is None else int(found[1])

    @property
    def wants_multiples(self) -> bool:
        """Return whether it is that one size is a multiple of a block."""
        return _MULTIPLE.fullmatch(self.code) is not None

    @property
    def counts_one(self) -> bool:
        """Return whether it is that a number is 1, such as that of blocks of tokens; torch.export fixes that."""
        return _ONE.search(self.code) is not None

    @property
    def is_least(self) -> bool:
        """Return whether it is that one size is at least a number."""
        return _LEAST.fullmatch(self.code) is not None

    @property
    def sized(self) -> tuple[str, int]:
        """Return the input and the axis of the first size that it compares."""
        (position, axis), *_ = _SIZE.findall(self.code)
        return self.inputs[int(position)], int(axis)

    @property
    def axes(self) -> set[int]:
        """Return the axes whose sizes it compares."""
        return {int(axis) for _, axis in _SIZE.findall(self.code)}

    def holds(self, feeds: Mapping[str, torch.Tensor]) -> bool:
        """Return whether the condition is true for the sizes of these inputs."""
        return holds(self.code, [feeds[name] for name in self.inputs])

    def __str__(self) -> str:
        """Return the condition with the names of the inputs, such as ``axis 1 of input_ids <= 16``."""
        return _SIZE.sub(lambda found: f"axis {found[2]} of {self.inputs[int(found[1])]}", self.code)


def size_guards(program: ExportedProgram, model: Model) -> tuple[SizeGuard, ...]:
    """Return the conditions of a program that restrict sizes.

    That two inputs have the same size restricts nothing, and neither does the number of tokens that the model takes,
    nor a condition that holds at all sizes of `BATCHES` and `LONGER`, and at a multiple of the block of tokens that it
    names. Where it is that a size is at least a number, it restricts shorter texts and clips (`fewer_counts`).

    Raises:
        SizeError: a condition restricts the batch, which is dynamic in every export.
    """
    known = [limit for limit in (model.preprocess.longest, most_tokens(model)) if limit is not None]
    found = []
    for code in guards(program):
        guard = SizeGuard(code, model.inputs)
        limit = re.search(r"<= (\d+)$", code)
        if (" == " in code and len(_SIZE.findall(code)) > 1) or (limit and known and int(limit[1]) >= min(known)):
            continue
        if 0 in guard.axes and not all(guard.holds(_example(model, batch, 0)) for batch in BATCHES):
            raise SizeError(
                f"{model.name} branches on the batch size, and was traced only for {guard}, expected the same "
                f"computation for every batch; {REMEDY}."
            )
        longer = all(guard.holds(_example(model, batch, more)) for batch in BATCHES for more in _further(model, guard))
        if not longer or (guard.is_least and counts_tokens(model, guard, ANY_LENGTH) and fewer_counts(model, guard)):
            found.append(guard)
    return tuple(found)


def _further(model: Model, guard: SizeGuard) -> tuple[int, ...]:
    """Return what is added to the sizes of the example: `LONGER`, and what makes them one and two blocks more."""
    if guard.block is None:
        return LONGER
    name, axis = guard.sized
    rest = -int(model.example[name].shape[axis]) % guard.block
    return (*LONGER, rest, rest + guard.block)


def other_counts(model: Model, guard: SizeGuard) -> list[int]:
    """Return the numbers of tokens of `_further` at which a condition is false, up to the most that the model takes."""
    name, axis = guard.sized
    tokens = int(model.example[name].shape[axis])
    most = model.preprocess.longest
    counts = sorted({tokens + more for more in _further(model, guard) if most is None or tokens + more <= most})
    return [count for count in counts if not guard.holds(with_tokens(model, guard, count))]


def fewer_counts(model: Model, guard: SizeGuard) -> list[int]:
    """Return numbers of tokens, samples or frames below that of the example at which a condition is false."""
    name, axis = guard.sized
    counts = shorter_counts(int(model.example[name].shape[axis]))
    return [count for count in counts if not guard.holds(with_tokens(model, guard, count))]


def shorter_counts(size: int) -> list[int]:
    """Return some numbers of tokens, samples or frames below a size.

    >>> shorter_counts(16)
    [1, 2, 3, 4, 8, 15]
    """
    return sorted({count for count in (*FEWEST, size // 4, size // 2, size - 1) if 0 < count < size})


def counts_tokens(model: Model, guard: SizeGuard, kinds: Sequence[str] = ("text",)) -> bool:
    """Return whether a condition is on the number of tokens of a text, and no cache has another number of them.

    With other `kinds` of data it is on their dynamic axes, such as that of the samples of sound.
    """
    name, axis = guard.sized
    cached = bool(model.state) and DECODER_IDS not in model.inputs
    return model.preprocess.kind in kinds and not cached and axis in model.dynamic_axes.get(name, {})


def with_tokens(model: Model, guard: SizeGuard, tokens: int) -> dict[str, torch.Tensor]:
    """Return the example of a model with another number of tokens on the axis of a condition, and all of its name.

    The tokens are repeated, and so is the mask.
    """
    name, axis = guard.sized
    kind = model.dynamic_axes[name][axis]
    feeds = dict(model.example)
    for each, axes in model.dynamic_axes.items():
        for place, other in axes.items():
            if other == kind:
                size = feeds[each].shape[place]
                feeds[each] = feeds[each].index_select(place, torch.arange(tokens) % size)
    return feeds


def _example(model: Model, batch: int, more: int) -> dict[str, torch.Tensor]:
    """Return example inputs without values, of another batch size and with `more` on the other dynamic axes.

    The attention mask of a model with a KV cache is as long as the cache and the new tokens together.
    """
    feeds = {}
    for name in model.inputs:
        dynamic = model.dynamic_axes.get(name, {})
        shape = [
            batch if axis == 0 and axis in dynamic else size + (more if axis in dynamic else 0)
            for axis, size in enumerate(model.example[name].shape)
        ]
        feeds[name] = torch.empty(shape, device="meta")
    caches = [name for name in model.state.values() if name in feeds and len(model.dynamic_axes[name]) > 1]
    of_decoder = DECODER_IDS not in feeds  # the mask of an encoder-decoder is that of the encoder
    if caches and "attention_mask" in feeds and of_decoder:
        (axis,) = (axis for axis in model.dynamic_axes[caches[0]] if axis != 0)
        length = feeds[caches[0]].shape[axis] + feeds["input_ids"].shape[1]
        feeds["attention_mask"] = torch.empty((len(feeds["attention_mask"]), length), device="meta")
    return feeds


def check_sizes(
    conditions: tuple[SizeGuard | FixedTruth, ...],
    model: Model,
    data: Data,
    option: Callable[[Model], str | None] = lambda _: None,
) -> Iterator[Limitation]:
    """Compare the sizes of all samples with the conditions, and yield a limitation for each of them.

    Values of truth cannot be compared without a call for each sample; they are limitations alone.

    Args:
        conditions: the conditions under which the graph of the model holds.
        model: the model.
        data: the samples.
        option: returns the option with which the model is exported otherwise, a clause; None without one.

    Raises:
        SizeError: a sample has a size for which the model was not traced.
    """
    found = [each for each in conditions if isinstance(each, SizeGuard)]
    parts = data.parts if found else ()
    for batch in (batch for part in parts for batch in part.batches(1)):
        feeds = {name: torch.from_numpy(value) for name, value in batch.feeds.items()}
        for guard in found:
            if not guard.holds(feeds):
                own = [name for name in feeds if name not in model.state.values()]
                shapes = ", ".join(f"{name} {list(feeds[name].shape)}" for name in own)
                padded = f"rows padded to a multiple of {guard.block}" if guard.wants_multiples else "data of one side"
                raise SizeError(
                    f"{model.name} branches on the size of its inputs, and was traced only for {guard}, but sample "
                    f"{batch.ids[0]} of {data.source} has {shapes}; {option(model) or REMEDY}, or give {padded}."
                )
    for guard in found:
        yield Limitation(
            "sizes of the inputs",
            f"forward branches on a size, so the engine computes what the model does only for {guard}",
        )
    for truth in conditions:
        if isinstance(truth, FixedTruth):
            yield Limitation(
                "values of the inputs",
                f"forward branches on {truth} in all trial calls, and the engine computes what the model does only "
                "then",
            )
