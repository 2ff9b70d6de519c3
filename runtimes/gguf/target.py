"""Target gguf: a GGUF file of a language model, which llama.cpp, Ollama and LM Studio open; run here by llama.cpp."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from runtimes.base.protocols import (
    PAST,
    BuildError,
    BuildOptions,
    Closing,
    DTypes,
    Feeds,
    Int8Style,
    LayerCounts,
    RuntimesError,
    Shapes,
    check_feeds,
)
from runtimes.base.registry import check_available
from runtimes.gguf.internals import PACKAGE, TOKENS_AT_ONCE, Context, LoadedModel, library_file
from runtimes.gguf.quantization import PRECISIONS, cached_values, rewrite, types

name = "gguf"
description = "a GGUF file for llama.cpp, Ollama and LM Studio; Llama and Mistral; run here by llama.cpp on the CPU"
devices = ("cpu",)
source: Literal[".gguf"] = ".gguf"
precisions = {"cpu": ("fp32", "fp16", "int8", "int4")}
own = ("fp16", "int8", "int4")
# No int8 ONNX file is written for this target.
int8 = Int8Style(activations="int8", convolutions=False)

FILE = "model.gguf"
CACHE_VALUE = 2  # bytes: llama.cpp keeps keys and values as F16 unless it is told otherwise


def missing() -> str | None:
    """Return None if llama.cpp can be used, else what to install."""
    absent = [package for package in ("gguf", PACKAGE) if util.find_spec(package) is None]
    if absent:
        return f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed; pip install gguf {PACKAGE}"
    if library_file() is None:
        return f"the installed {PACKAGE} holds no library of llama.cpp; pip install --force-reinstall {PACKAGE}"
    return None


def build(source: Path, out: Path, options: BuildOptions) -> Path:
    """Write `out`/model.gguf in a precision from a float GGUF file.

    Raises:
        BuildError: llama.cpp cannot open the file.
    """
    check_available(name, missing(), devices, options)
    built = out / FILE
    if options.precision == "fp32":
        if not source.is_file():
            raise BuildError(f"there is no file {source.name}; export the model again.")
        shutil.copyfile(source, built)
    else:
        rewrite(source, built, options.precision)
    LoadedModel(built).close()
    return built


def load(path: Path, options: BuildOptions) -> LlamaCpp:
    """Open a GGUF file in llama.cpp."""
    check_available(name, missing(), devices, options)
    return LlamaCpp(path, options.threads or physical_cores())


def layers(path: Path, options: BuildOptions) -> LayerCounts | None:
    """Count the matrices of the file by the precision that they are stored in; llama.cpp reports no layers."""
    kinds, stored = Counter[str](), Counter[str]()
    for tensor, kind in types(path):
        kinds[tensor.removesuffix(".weight").rpartition(".")[2]] += 1
        stored[PRECISIONS.get(kind, "other")] += 1
    return LayerCounts(sum(kinds.values()), dict(stored.most_common()), dict(kinds.most_common()), None)


def physical_cores() -> int:
    """Return the number of physical cores that this process may use; of logical ones where the system does not say."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    siblings = (Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list") for core in usable)
    return len({path.read_text() if path.is_file() else str(path) for path in siblings})


class LlamaCpp(Closing[LoadedModel]):
    """A language model that is open in llama.cpp; see `runtimes.base.protocols.Engine`.

    llama.cpp keeps the KV cache itself, so that no input or output of the engine holds it. Where attention_mask is
    longer than input_ids, the feeds hold the earlier tokens as past_input_ids, and the cache is computed from them.
    """

    inputs = ("input_ids", "attention_mask")
    outputs = ("logits",)

    def __init__(self, path: Path, threads: int) -> None:
        super().__init__(LoadedModel(path))
        self._path = path
        self._threads = threads
        self._whole: Context | None = None
        self.input_dtypes: DTypes = dict.fromkeys(self.inputs, np.dtype(np.int64))
        self.input_shapes: Shapes = dict.fromkeys(self.inputs, (None, None))

    def run(self, feeds: Feeds) -> dict[str, npt.NDArray[Any]]:
        """Return the logits [rows, tokens, vocabulary] of input_ids; they are 0 at tokens that are not attended to."""
        model = self._live()
        past, ids, mask = self._checked(feeds)
        logits = np.zeros((*ids.shape, model.tokens), np.float32)
        for row, (tokens, attended) in enumerate(zip(np.concatenate([past, ids], 1), mask, strict=True)):
            places = np.flatnonzero(attended)
            context = self._one_row(len(places))
            for start in range(0, len(places), TOKENS_AT_ONCE):
                part = places[start : start + TOKENS_AT_ONCE]
                wanted = [number for number, place in enumerate(part) if place >= past.shape[1]]
                context.decode(batch := context.batch([tokens[part]], [start], [wanted]))
                for number in wanted:
                    logits[row, part[number] - past.shape[1]] = context.logits(number)
                context.free(batch)
        return {"logits": logits}

    def bind(self, feeds: Feeds) -> Callable[[], None]:
        """Compute the cache of past_input_ids; each call of the result then computes input_ids.

        As in generation, only the logits of the last token of each row are computed.
        """
        model = self._live()
        past, ids, mask = self._checked(feeds)
        before = [row[kept.astype(bool)] for row, kept in zip(past, mask[:, : past.shape[1]], strict=True)]
        new = [row[kept.astype(bool)] for row, kept in zip(ids, mask[:, past.shape[1] :], strict=True)]
        if not all(map(len, new)):
            raise RuntimesError("Found a row without tokens; expected at least one in each row.")
        longest = max(len(one) + len(other) for one, other in zip(before, new, strict=True))
        context = model.context(len(ids), longest, self._threads)
        nothing: list[list[int]] = [[] for _ in ids]
        if past.shape[1]:
            context.decode(context.batch(before, [0] * len(ids), nothing))
        starts = [len(row) for row in before]
        batch = context.batch(new, starts, [[len(row) - 1] for row in new])

        def step() -> None:
            self._live()
            context.decode(batch)
            if past.shape[1]:
                for sequence, start in enumerate(starts):
                    context.forget(sequence, start)
            else:
                context.clear()

        return step

    def generate(self, tokens: npt.NDArray[np.int64], count: int) -> list[int]:
        """Return the `count` most probable tokens behind the given ones [tokens], each chosen after those before it."""
        context = self._one_row(len(tokens) + count)
        new, made = [int(token) for token in tokens], list[int]()
        while True:
            start = len(tokens) + len(made) - len(new)
            batch = context.batch([np.array(new)], [start], [[len(new) - 1]])
            context.decode(batch)
            made.append(int(context.logits(len(new) - 1).argmax()))
            context.free(batch)
            if len(made) == count:
                return made
            new = made[-1:]

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a text, without those that llama.cpp adds before and after it."""
        return self._live().tokenize(text)

    def cache_bytes(self, rows: int, tokens: int) -> int:
        """Return the bytes of the keys and values of so many tokens in each of so many rows."""
        self._live()
        return rows * tokens * cached_values(self._path) * CACHE_VALUE

    def close(self) -> None:
        """Free the model, its caches and its threads. Closing twice is allowed."""
        if self._opened is not None:
            self._opened.close()
        super().close()

    def _one_row(self, tokens: int) -> Context:
        """Return an empty context for one row of so many tokens, the last one if it has the room."""
        if self._whole is None or self._whole.room < tokens:
            if self._whole is not None:
                self._whole.close()
            self._whole = self._live().context(1, tokens, self._threads)
        self._whole.clear()
        return self._whole

    def _checked(self, feeds: Feeds) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the earlier tokens, the new tokens and the mask of both, each [rows, tokens]."""
        checked = check_feeds(feeds, self.input_dtypes, self.input_shapes)
        ids, mask = checked["input_ids"], checked["attention_mask"]
        past = np.asarray(feeds.get(PAST, ids[:, :0]))
        expected = (len(ids), mask.shape[1] - ids.shape[1])
        if past.shape != expected:
            raise RuntimesError(
                f"Input {PAST!r}: found shape {list(past.shape)}; expected {list(expected)}, the tokens of "
                "attention_mask that come before input_ids."
            )
        return past, ids, mask
