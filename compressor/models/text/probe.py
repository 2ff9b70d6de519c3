"""Detection of the inputs that a module takes, and of its maximum number of tokens, by calling it on a short text.

The signature of `forward` is not reliable. It changes between releases (``past_key_values`` became ``cache`` in
transformers 5.24), wrappers hide it, and ``**kwargs`` accepts any name and may ignore it.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from compressor.choices import ENCODER_DECODER_TASKS, VISION_LANGUAGE
from passes.execute.offloaded_weights import is_offloaded
from passes.graph.cached_functions import forget_results
from passes.torch_internals import FakeTensorMode

if TYPE_CHECKING:
    from compressor.models.base import Model

PRODUCTS = frozenset(
    ["linear", "matmul", "__matmul__", "mm", "addmm", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention"]
    + [f"conv{axes}d" for axes in (1, 2, 3)]
)
TEXTS_ALONE = "pass --task text-generation to export it for texts alone"
USE_CACHE, SAMPLE = "use_cache", "sample"
CHARACTERS = sys.maxunicode + 1
TASKS_OF_TOKENS = ("text-generation", "fill-mask", VISION_LANGUAGE, *ENCODER_DECODER_TASKS)  # logits of a vocabulary
TOKENS = 3  # of the text; with one token less, two remain, which do not broadcast


def text(tokens: int = TOKENS) -> dict[str, torch.Tensor]:
    """Return a text that repeats the token 0, [1, tokens], without padding."""
    ones = torch.ones(1, tokens, dtype=torch.int64)
    return {"input_ids": torch.zeros_like(ones), "attention_mask": ones}


@contextlib.contextmanager
def calling(module: torch.nn.Module) -> Iterator[None]:
    """Disable gradients for calls of a module; propagate only shapes if its weights stay on disk."""
    shapes_only = any(map(is_offloaded, module.parameters()))
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        if shapes_only:
            stack.enter_context(forget_results(module))
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


def without_cache(module: Any) -> dict[str, bool]:
    """Return the arguments with which a module makes no cache, and adds no noise; empty if it does neither.

    Caches of layers that are all recurrent fail where a model asks them for their length. A model may take the argument
    by its keywords, and then its config has it.
    """
    taken = inspect.signature(module.forward).parameters
    keywords = any(each.kind is each.VAR_KEYWORD for each in taken.values())
    made = USE_CACHE in taken or (keywords and hasattr(getattr(module, "config", None), USE_CACHE))
    return ({USE_CACHE: False} if made else {}) | ({SAMPLE: False} if adds_noise(module) else {})


def adds_noise(module: Any) -> bool:
    """Return whether a module adds noise to its latents unless it is told not to, as the codec of VibeVoice does."""
    argument = inspect.signature(module.forward).parameters.get(SAMPLE)
    return argument is not None and argument.default is True


def call_without_cache(module: Any, **values: Any) -> tuple[Any, dict[str, bool]]:
    """Return the output of a module that makes no cache, and the argument that tells it so.

    A class that hands its keywords on to a part, beside an argument of its own that says whether to keep a cache (the
    encoder of Mimi), cannot be told. It must not be called with it while it is traced.
    """
    told = without_cache(module)
    try:
        return module(**values, **told), told
    except TypeError as error:
        if f"multiple values for keyword argument '{USE_CACHE}'" not in str(error):
            raise
    del told[USE_CACHE]
    return module(**values, **told), told


def reads_texts_alone(module: Any) -> bool:
    """Return whether a language model for images or sound gives the logits of a text [1, tokens, vocabulary] alone.

    It may be called with shapes alone, so what its functions cache is forgotten.
    """
    if getattr(module.config, "is_encoder_decoder", False):
        return False
    try:
        with forget_results(module), calling(module):
            logits = module(input_ids=text()["input_ids"], **without_cache(module))["logits"]
    except Exception:  # modules raise errors of all kinds
        return False
    return tuple(logits.shape[:2]) == (1, TOKENS)


def vocabulary(module: Any, tokens: int) -> int | None:
    """Return the number of token ids that a module takes, of which its config may state none.

    CANINE hashes the characters of Unicode into its embeddings, so it takes the last one too.

    Args:
        module: a module of transformers.
        tokens: number of tokens of a text that it takes.

    Returns:
        None if the config states no number, and the module has an embedding that ends before the last character.
    """
    stated = getattr(module.config.get_text_config(), "vocab_size", None)
    if stated is not None:
        return int(stated)
    try:
        with calling(module):
            module(input_ids=torch.full((1, tokens), CHARACTERS - 1), **without_cache(module))
    except Exception:  # modules raise errors of all kinds
        return None
    return CHARACTERS


def logits_per_token(model: Model) -> int | None:
    """Return the number of logits that a model of texts gives for each token; None if it gives none, or fails.

    A config of transformers states it as the size of the vocabulary. Other modules are called with their example.
    """
    if model.task not in TASKS_OF_TOKENS:
        return None
    config: Any = getattr(model.module, "config", None)
    if hasattr(config, "get_text_config"):
        stated = getattr(config.get_text_config(decoder=True), "vocab_size", None)
        if stated is not None:
            return int(stated)
    try:
        with calling(model.module):
            outputs = model.call(model.module, *(model.example[name] for name in model.inputs))
    except Exception:  # modules raise errors of all kinds; the trace reports this one
        return None
    return int(outputs[model.outputs.index(model.answer)].shape[-1])


def accepts(module: Any, inputs: Mapping[str, Any], name: str, value: torch.Tensor) -> bool:
    """Return whether a module can be called with an input of this name.

    Args:
        module: the module to call.
        inputs: the other inputs.
        name: name of the input.
        value: value of the input.
    """
    try:
        module(**inputs, **{name: value})
    except TypeError:
        return False
    return True


def computes_with(module: Any, inputs: Mapping[str, Any], name: str, value: torch.Tensor) -> bool:
    """Return whether a module uses an input of this name.

    A module that uses it accepts one value per token and fails with one value less. A module that accepts and ignores
    any keyword argument does not fail.

    Args:
        module: the module to call.
        inputs: the other inputs.
        name: name of the input.
        value: value of the input, [1, tokens].
    """
    if not accepts(module, inputs, name, value):
        return False
    try:
        module(**inputs, **{name: value[:, 1:]})
    except (RuntimeError, IndexError, ValueError):
        return True
    return False


class _EndOfLookupsError(Exception):
    """Ends a call before its first product of matrices."""


class _Lookups(TorchFunctionMode):
    """Records for every lookup of a call how many rows of the table are behind the largest index.

    The call ends before its first product of matrices, because embeddings are looked up before, and a call of many
    tokens then costs almost nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows_left: list[int] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in PRODUCTS:
            raise _EndOfLookupsError
        if name == "embedding":
            self.rows_left.append(len(args[1]) - 1 - int(args[0].max()))
        elif name == "index_select":
            self.rows_left.append(args[0].shape[args[1]] - 1 - int(args[2].max()))
        return func(*args, **({} if kwargs is None else kwargs))


def position_limit(module: Any, padding: int | None) -> int | None:
    """Return the maximum number of tokens for which a module has learned positions; None if it has no such maximum.

    The maximum can be less than the number of positions in the config: RoBERTa begins at position 2, and with 514
    positions it takes 512 tokens. A table of positions is one in which an additional token needs the next row. The
    maximum is confirmed by a call with one token more, which fails.

    Args:
        module: a module of transformers; its weights may be on disk, because no product is computed.
        padding: token id of the padding, which may have no position.
    """
    token = 1 if padding == 0 else 0
    shorter, longer = (_rows_left(module, tokens, token) for tokens in (TOKENS, TOKENS + 1))
    if shorter is None or longer is None or len(shorter) != len(longer):
        return None
    limits = {TOKENS + left for left, next_left in zip(shorter, longer, strict=True) if next_left == left - 1}
    return next((limit for limit in sorted(limits) if _rows_left(module, limit + 1, token) is None), None)


def _rows_left(module: Any, tokens: int, token: int) -> list[int] | None:
    """Return the rows left in each table that a text looks up, in order; None if a lookup fails."""
    lookups = _Lookups()
    with torch.inference_mode(), lookups:
        try:
            module(input_ids=torch.full((1, tokens), token))
        except _EndOfLookupsError:
            pass
        except Exception:  # such as the ValueError of CLIP's text model for a text that is too long
            return None
    return lookups.rows_left
