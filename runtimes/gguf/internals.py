"""The C API of llama.cpp (llama.h), called by ctypes in the library of PyPI's xllamacpp; seen in 2026.10.11549.

The Python class of xllamacpp, its server, returns sampled tokens and the most probable ones beside them. Perplexity and
next-token agreement need the logits of every token of a text, which only the C API gives.

Structs move between releases of llama.cpp. Nothing here depends on where their fields lie, with three exceptions that
are checked when the library or a context is opened:

- The parameters of models and contexts are those that llama.cpp returns as its defaults, in a buffer that is larger
  than the struct. The first four numbers of a context's parameters are set: they must hold the documented defaults
  before, and the open context must report the new values.
- A batch is the one that llama.cpp allocates; its pointers must be set where they are expected.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from runtimes.base.protocols import BuildError, RuntimesError

PACKAGE = "xllamacpp"
ERROR = 4  # GGML_LOG_LEVEL_ERROR
DEFAULTS = (512, 2048, 512, 1)  # n_ctx, n_batch, n_ubatch and n_seq_max of llama_context_default_params()
TOKENS_AT_ONCE = 512  # llama.cpp's n_ubatch: tokens that it computes at a time
PADDED_TO = 256  # a context has a multiple of this many tokens
UPDATE = f"install a release that this version of Compressor was tried with (pip install '{PACKAGE}==2026.10.11549')"


class _Params(ctypes.Structure):
    """Parameters of llama.cpp, in a buffer that is larger than the struct of any release."""

    _fields_ = (("numbers", ctypes.c_uint32 * 512),)


class _Batch(ctypes.Structure):
    """llama_batch: tokens with position, sequences and whether their logits are computed."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


_Log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_FLOATS = ctypes.POINTER(ctypes.c_float)
# Name, type of the result (c_void_p for handles) and types of the arguments, as in llama.h.
_FUNCTIONS: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
    ("llama_backend_init", None, ()),
    ("llama_batch_free", None, (_Batch,)),
    ("llama_batch_init", _Batch, (ctypes.c_int32, ctypes.c_int32, ctypes.c_int32)),
    ("llama_context_default_params", _Params, ()),
    ("llama_decode", ctypes.c_int32, (ctypes.c_void_p, _Batch)),
    ("llama_free", None, (ctypes.c_void_p,)),
    ("llama_get_logits_ith", _FLOATS, (ctypes.c_void_p, ctypes.c_int32)),
    ("llama_get_memory", ctypes.c_void_p, (ctypes.c_void_p,)),
    ("llama_init_from_model", ctypes.c_void_p, (ctypes.c_void_p, _Params)),
    ("llama_memory_clear", None, (ctypes.c_void_p, ctypes.c_bool)),
    ("llama_memory_seq_rm", ctypes.c_bool, (ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32)),
    ("llama_model_default_params", _Params, ()),
    ("llama_model_free", None, (ctypes.c_void_p,)),
    ("llama_model_get_vocab", ctypes.c_void_p, (ctypes.c_void_p,)),
    ("llama_model_load_from_file", ctypes.c_void_p, (ctypes.c_char_p, _Params)),
    ("llama_n_batch", ctypes.c_uint32, (ctypes.c_void_p,)),
    ("llama_n_ctx", ctypes.c_uint32, (ctypes.c_void_p,)),
    ("llama_n_seq_max", ctypes.c_uint32, (ctypes.c_void_p,)),
    ("llama_set_n_threads", None, (ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32)),
    ("llama_state_seq_get_size", ctypes.c_size_t, (ctypes.c_void_p, ctypes.c_int32)),
    ("llama_synchronize", None, (ctypes.c_void_p,)),
    (
        "llama_tokenize",
        ctypes.c_int32,
        (
            ctypes.c_void_p,
            ctypes.c_char_p,
            ctypes.c_int32,
            ctypes.POINTER(ctypes.c_int32),
            ctypes.c_int32,
            ctypes.c_bool,
            ctypes.c_bool,
        ),
    ),
    ("llama_vocab_n_tokens", ctypes.c_int32, (ctypes.c_void_p,)),
)


class _Library:
    """The functions of llama.h, and the errors that llama.cpp logs."""

    def __init__(self, path: Path) -> None:
        self.errors: list[str] = []
        try:
            opened = ctypes.CDLL(str(path))
            for name, result, arguments in _FUNCTIONS:
                function = getattr(opened, name)
                function.restype, function.argtypes = result, list(arguments)
                setattr(self, name, function)
            set_log = opened.llama_log_set
        except (OSError, AttributeError) as error:
            raise RuntimesError(f"{PACKAGE} does not give the C API of llama.cpp ({error}); {UPDATE}.") from error
        self._log = _Log(self._logged)  # kept, because llama.cpp calls it as long as the process lives
        set_log.argtypes = [_Log, ctypes.c_void_p]
        set_log(self._log, None)
        atexit.register(set_log, _Log(), None)  # what llama.cpp logs after Python has ended goes to stderr
        self.llama_backend_init()
        self._check()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def _logged(self, level: int, text: bytes, _: Any) -> None:
        if level == ERROR:
            self.errors.append(text.decode(errors="replace").strip())

    def _check(self) -> None:
        """Refuse a release whose structs begin otherwise than here."""
        found = tuple(self.llama_context_default_params().numbers[: len(DEFAULTS)])
        batch = self.llama_batch_init(1, 0, 1)
        pointers = (batch.token, batch.pos, batch.n_seq_id, batch.seq_id, batch.logits)
        if found != DEFAULTS or batch.n_tokens or batch.embd or not all(map(bool, pointers)):
            raise RuntimesError(
                f"the structs of llama.cpp in this release of {PACKAGE} are not those expected (a context begins with "
                f"{found} instead of {DEFAULTS}); {UPDATE}."
            )
        self.llama_batch_free(batch)

    def reason(self) -> str:
        """Return the first error since the last call, and forget all."""
        text = next(iter(self.errors), "llama.cpp gives no reason").rstrip(".")
        self.errors.clear()
        return text


def library_file() -> Path | None:
    """Return the shared library of the installed xllamacpp; None if there is none."""
    spec = find_spec(PACKAGE)
    folders = () if spec is None else spec.submodule_search_locations or ()
    files = (file for folder in folders for file in sorted(Path(folder).glob(f"{PACKAGE}*")))
    return next((file for file in files if file.suffix in (".so", ".pyd", ".dylib")), None)


@functools.cache
def _library() -> Any:
    path = library_file()
    if path is None:
        raise RuntimesError(f"{PACKAGE} is not installed: pip install {PACKAGE}.")
    return _Library(path)


class LoadedModel:
    """A GGUF file that llama.cpp has opened."""

    def __init__(self, path: Path) -> None:
        self.library = _library()
        self.library.errors.clear()
        self._contexts: list[Context] = []
        self.handle = self.library.llama_model_load_from_file(
            str(path).encode(), self.library.llama_model_default_params()
        )
        if not self.handle:
            raise BuildError(f"llama.cpp cannot open {path.name}: {self.library.reason()}.")
        self._vocabulary = self.library.llama_model_get_vocab(self.handle)

    @property
    def tokens(self) -> int:
        """The number of tokens in the vocabulary."""
        return int(self.library.llama_vocab_n_tokens(self._vocabulary))

    def context(self, sequences: int, length: int, threads: int) -> Context:
        """Return a new context for some sequences of at most `length` tokens each; the model frees it."""
        made = Context(self, sequences, length, threads)
        self._contexts.append(made)
        return made

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a text, without those that llama.cpp adds before and after it."""
        encoded = text.encode()
        room = (ctypes.c_int32 * (len(encoded) + 8))()
        count = self.library.llama_tokenize(self._vocabulary, encoded, len(encoded), room, len(room), False, False)
        return list(room[: max(count, 0)])

    def close(self) -> None:
        """Free the model and its contexts."""
        for context in self._contexts:
            context.close()
        self._contexts.clear()
        self.library.llama_model_free(self.handle)


class Context:
    """A KV cache of llama.cpp, and what computes on it."""

    def __init__(self, model: LoadedModel, sequences: int, length: int, threads: int) -> None:
        self._model, self._library = model, model.library
        self.room = -(-length // PADDED_TO) * PADDED_TO
        params = self._library.llama_context_default_params()
        wanted = (sequences * self.room, sequences * self.room, TOKENS_AT_ONCE, sequences)
        for place, number in enumerate(wanted):
            params.numbers[place] = number
        self._batches: list[_Batch] = []
        self._library.errors.clear()
        self.handle = self._library.llama_init_from_model(model.handle, params)
        if not self.handle:
            raise BuildError(
                f"llama.cpp makes no context of {sequences} x {self.room} tokens: {self._library.reason()}."
            )
        found = [int(getattr(self._library, f"llama_n_{name}")(self.handle)) for name in ("ctx", "batch", "seq_max")]
        if found != [wanted[0], wanted[1], wanted[3]]:
            raise RuntimesError(
                f"llama.cpp in this release of {PACKAGE} took other sizes of a context than were set (found {found}, "
                f"expected {[wanted[0], wanted[1], wanted[3]]}); {UPDATE}."
            )
        self._library.llama_set_n_threads(self.handle, threads, threads)
        self._memory = self._library.llama_get_memory(self.handle)

    def batch(self, rows: Sequence[npt.NDArray[Any]], starts: Sequence[int], outputs: Sequence[Sequence[int]]) -> Any:
        """Return a batch of tokens, to be decoded any number of times; the context frees it.

        Args:
            rows: new tokens of each sequence.
            starts: number of tokens of each sequence that the cache holds before.
            outputs: places in each row whose logits are computed.
        """
        total = sum(map(len, rows))
        made = self._library.llama_batch_init(max(total, 1), 0, 1)
        self._batches.append(made)
        made.n_tokens = total
        place = 0
        for sequence, (tokens, start, wanted) in enumerate(zip(rows, starts, outputs, strict=True)):
            for number, token in enumerate(tokens):
                made.token[place], made.pos[place] = int(token), start + number
                made.n_seq_id[place], made.seq_id[place][0] = 1, sequence
                made.logits[place] = 0
                place += 1
            for number in wanted:
                made.logits[place - len(tokens) + number] = 1
        return made

    def free(self, batch: Any) -> None:
        """Free a batch before the context is closed."""
        self._batches.remove(batch)
        self._library.llama_batch_free(batch)

    def decode(self, batch: Any) -> None:
        """Compute a batch; its tokens join the cache.

        Raises:
            RuntimesError: llama.cpp refuses it.
        """
        status = self._library.llama_decode(self.handle, batch)
        if status:
            raise RuntimesError(f"llama.cpp could not compute {batch.n_tokens} tokens (status {status}).")
        self._library.llama_synchronize(self.handle)

    def logits(self, place: int) -> npt.NDArray[np.float32]:
        """Return a view of the logits [vocabulary] of a token of the last batch, by its place in it."""
        values = self._library.llama_get_logits_ith(self.handle, place)
        return np.ctypeslib.as_array(values, (self._model.tokens,))

    def forget(self, sequence: int, start: int) -> None:
        """Remove the tokens of a sequence from position `start` on from the cache."""
        if not self._library.llama_memory_seq_rm(self._memory, sequence, start, -1):
            raise RuntimesError(f"llama.cpp could not remove tokens behind position {start} from its cache.")

    def clear(self) -> None:
        """Remove all tokens from the cache."""
        self._library.llama_memory_clear(self._memory, False)

    def state_bytes(self, sequence: int) -> int:
        """Return the bytes of a sequence as llama.cpp would store them: keys, values, and 12 bytes for each token."""
        return int(self._library.llama_state_seq_get_size(self.handle, sequence))

    def close(self) -> None:
        """Free the context and its batches. Closing twice is allowed."""
        if self.handle:
            for batch in self._batches:
                self._library.llama_batch_free(batch)
            self._batches.clear()
            self._library.llama_free(self.handle)
            self.handle = None
