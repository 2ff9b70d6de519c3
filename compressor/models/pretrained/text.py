"""Models of transformers that take texts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from compressor.limitations import Limitation
from compressor.models.base import Model, ModelError, OtherInputsError, as_numpy, first_line
from compressor.models.preprocess import Preprocess, Tokenise
from compressor.models.pretrained.loaded import Loaded
from compressor.models.pretrained.processors import save, tokenizer_of
from compressor.models.pretrained.signature import (
    Signature,
    other_features,
    other_inputs,
    signature_of,
    with_own_output,
)
from compressor.models.text import sentence_transformers
from compressor.models.text.aligned_tokens import tokenize_aligned
from compressor.models.text.end_tokens import at_end_token, with_end_token
from compressor.models.text.experts import use_writable_experts
from compressor.models.text.kv_cache import with_cache
from compressor.models.text.padding import (
    LEFT,
    Padding,
    allow_batches,
    causal_padding,
    encode,
    find_causal_padding,
    find_padding,
)
from compressor.models.text.probe import (
    TOKENS,
    accepts,
    calling,
    computes_with,
    position_limit,
    text,
    vocabulary,
    without_cache,
)
from compressor.workspace.folder_errors import name_of
from compressor.workspace.json_files import OBJECT, JsonFileError, read_json
from passes.execute.offloaded_weights import is_offloaded

EXAMPLE_TOKENS = 16
USUAL = 2048  # maximum number of tokens of a text, if the maximum length of the model is unknown
UNLIMITED = 10**6  # tokenizers without a limit report a number like 1e30


def wrap(loaded: Loaded) -> Model:
    """Return the model, with its tokenizer; a language model has its KV cache.

    Raises:
        ModelError: the module does not give the outputs of its task for a text, or its cache cannot be detected, or is
            wanted for texts of one length.
    """
    if loaded.sequence_length is not None and loaded.task == "text-generation" and loaded.cache:
        raise ModelError(
            f"--sequence-length {loaded.sequence_length} exports calls with one number of tokens, and a KV cache grows "
            "with every token; pass --no-cache too, or leave --sequence-length out."
        )
    with at_end_token(loaded.module, loaded.task) as reads_end:
        model = _wrapped(loaded)
    if reads_end:
        return with_end_token(model)
    return model if loaded.task != "text-generation" else with_cache(model, loaded.cache)


def _wrapped(loaded: Loaded) -> Model:
    """Return the model without its KV cache."""
    module, location, task = loaded.module, loaded.location, loaded.task
    experts = use_writable_experts(module)
    tokenizer = tokenizer_of(location, loaded.options)
    if tokenizer is not None:
        sentence_transformers.prepare_tokenizer(tokenizer, loaded.sentence_files, location)
    shortest = _shortest_text(module, task, location)
    inputs = text_inputs(module, tokenizer, location, shortest)
    signature = _signature(module, task, inputs, shortest)
    longest = max_length(module, tokenizer, loaded.sentence_files)
    length = loaded.sequence_length
    if length is not None:
        _check_length(module, signature.call, inputs, length, longest, location)
        longest = length
        if tokenizer is not None:
            tokenizer.model_max_length = length
    lengths = _Lengths(shortest, longest, length)
    padding, padding_limitations = _padding(module, signature, inputs, tokenizer, task, lengths)
    example = _text_example(module, inputs, lengths)
    return Model(
        **loaded.fields,
        call=signature.call,
        inputs=inputs,
        outputs=signature.outputs,
        answer=signature.answer,
        stacked=signature.outputs[1:] if task == "question-answering" else (),
        example=example,
        dynamic_axes={name: {0: "batch"} | ({1: "sequence"} if length is None else {}) for name in inputs},
        preprocess=replace(text_preprocess(inputs, example, tokenizer, longest, padding), padded=length),
        save=partial(save, module, tokenizer, loaded.sentence_files),
        tokenizer=tokenizer,
        limitations=(
            *text_limitations(tokenizer, inputs, longest),
            *padding_limitations,
            *_of_one_length(length, tokenizer),
            *experts,
            *other_features(signature),
            *other_inputs(module, inputs),
        ),
        class_names=loaded.class_names,
    )


@dataclass(frozen=True)
class _Lengths:
    """Numbers of tokens: the least that a module takes, the most (None: unknown), that of all texts (None: any)."""

    shortest: int
    longest: int | None
    fixed: int | None


def _check_length(
    module: Any, call: Callable[..., Any], inputs: tuple[str, ...], length: int, longest: int | None, location: str
) -> None:
    """Check that a module takes texts of a number of tokens.

    Raises:
        ModelError: it has fewer positions, or fails on them.
    """
    if longest is not None and length > longest:
        raise ModelError(
            f"--sequence-length {length}, but {location} takes at most {longest} tokens; give {longest} or less."
        )
    values = text(length)
    values["token_type_ids"] = torch.zeros_like(values["input_ids"])
    try:
        with calling(module):
            call(module, *(values[name] for name in inputs))
    except Exception as error:  # modules raise errors of all kinds
        raise ModelError(
            f"--sequence-length {length}, but {location} fails on texts of {length} tokens ({first_line(error)}); give "
            "another number of tokens."
        ) from error


def _of_one_length(length: int | None, tokenizer: Any) -> Iterator[Limitation]:
    """Yield the limitation of a model that is exported for texts of one length; none for others."""
    if length is not None:
        rows = "shorter ones are padded, longer ones truncated" if tokenizer is not None else "give rows of as many"
        yield Limitation("length of texts", f"the export takes only texts of {length} tokens; {rows}")


def _signature(module: Any, task: str, inputs: tuple[str, ...], tokens: int) -> Signature:
    """Return the outputs of a module for a text."""
    values = text(tokens)
    values["token_type_ids"] = torch.zeros_like(values["input_ids"])
    with calling(module):
        return with_own_output(signature_of(task, inputs), module, {name: values[name] for name in inputs})


def text_limitations(tokenizer: Any, inputs: tuple[str, ...], longest: int | None) -> Iterator[Limitation]:
    """Yield the limitations of a text model."""
    if tokenizer is None:
        yield Limitation("tokenizer", "the model has no tokenizer, so the data must be token ids")
        return
    if tokenizer.pad_token is None:
        yield Limitation("padding token", "the tokenizer has none and no end token; padding is masked")
    elif tokenizer.pad_token == tokenizer.eos_token:
        yield Limitation("padding token", f"the end token {tokenizer.eos_token} is used for padding and is masked")
    left_out = [name for name in tokenizer.model_input_names if name not in inputs]
    if left_out:
        yield Limitation(f"input {', '.join(left_out)}", "the tokenizer returns it, but the export does not take it")
    if longest is None:
        yield Limitation(
            "length", f"the maximum number of tokens of the model is unknown, so texts are truncated to {USUAL} tokens"
        )


def _shortest_text(module: Any, task: str, location: str) -> int:
    """Return the number of tokens of the shortest text for which a module gives the outputs of a task.

    It is that of the usual probe, or a larger one up to that of the example for a module that fails on less, such as
    CANINE, which pools four characters into one, and Funnel, whose last block has no relative positions for four
    tokens.

    Raises:
        OtherInputsError: it fails on all of them, or returns other outputs. Encoder-decoders also need the tokens of
            the decoder, or an end token in every text; CLIP also needs an image; an encoder can return a pooled output
            only.
    """
    signature = signature_of(task, ("input_ids",))
    first: Exception | None = None
    for tokens in range(TOKENS, EXAMPLE_TOKENS + 1):
        try:
            with calling(module):
                signature.call(module, text(tokens)["input_ids"])
        except Exception as error:  # modules raise errors of all kinds
            first = error if first is None else first
        else:
            return tokens
    assert first is not None
    if (objects := _objects(module)) is not None:
        raise OtherInputsError(
            f"{location} is a {type(module).__name__}, whose forward takes {objects}, and a file takes tensors alone; "
            "pass the part that you need, such as its encoder of images, as a module of your own, "
            "package.module:factory, whose forward takes tensors."
        ) from first
    raise OtherInputsError(
        f"{location} is a {type(module).__name__}, which does not give {' and '.join(signature.outputs)} for any "
        f"text of token ids alone ({first_line(first)}); pass it as a module of your own, package.module:factory, "
        "whose forward takes tensors and returns the output that you need."
    ) from first


def _objects(module: Any) -> str | None:
    """Return the arguments that a module without token ids needs and that are no tensors, with their classes.

    Trackers of objects in videos take a session, which holds the frames, the prompts and what came of earlier frames.
    Return None for a module that takes token ids, or needs none of them.
    """
    taken = inspect.signature(module.forward).parameters
    named = [each for each in taken.values() if each.kind is each.POSITIONAL_OR_KEYWORD and each.default is each.empty]
    kinds = {each.name: getattr(each.annotation, "__name__", str(each.annotation)) for each in named}
    found = [f"{name} of the class {kind}" for name, kind in kinds.items() if "Tensor" not in kind and kind != "_empty"]
    return " and ".join(found) if found and "input_ids" not in taken else None


def text_inputs(module: Any, tokenizer: Any, location: str, tokens: int = TOKENS) -> tuple[str, ...]:
    """Return the names of the inputs that the tokenizer returns and the module uses, on a text of `tokens` tokens.

    Raises:
        ModelError: the module fails on a text with an attention mask or token types, though it takes them.
    """
    offered = tokenizer.model_input_names if tokenizer is not None else ["input_ids", "attention_mask"]
    inputs = text(tokens)
    ids = {"input_ids": inputs["input_ids"], **without_cache(module)}
    type_ids = torch.zeros_like(inputs["input_ids"])
    try:
        with calling(module):
            takes_mask = "attention_mask" in offered and accepts(
                module, ids, "attention_mask", inputs["attention_mask"]
            )
            takes_types = "token_type_ids" in offered and computes_with(module, ids, "token_type_ids", type_ids)
    except Exception as error:  # modules raise errors of all kinds
        raise ModelError(
            f"{location} is a {type(module).__name__}, which takes a text but fails on one with an attention mask or "
            f"token types ({first_line(error)}); check its config, or pass it as a module of your own, "
            "package.module:factory."
        ) from error
    used = {"input_ids": True, "attention_mask": takes_mask, "token_type_ids": takes_types}
    return tuple(name for name, is_used in used.items() if is_used)


def _text_example(module: Any, inputs: tuple[str, ...], lengths: _Lengths) -> dict[str, torch.Tensor]:
    """Return two rows of tokens, the second with padding, so that the mask is not constant.

    Raises:
        ModelError: the config has no size of the vocabulary.
    """
    size = vocabulary(module, lengths.shortest)
    if size is None:
        raise ModelError(
            f"the config of a {type(module).__name__} has no vocab_size, from which the token ids of the example are "
            "drawn; add it to config.json, or pass the model as a module of your own, package.module:factory, with "
            "example inputs."
        )
    tokens = EXAMPLE_TOKENS if lengths.longest is None else min(EXAMPLE_TOKENS, lengths.longest)
    tokens = tokens if lengths.fixed is None else lengths.fixed
    ids = torch.randint(0, size, (2, tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, max(1, tokens * 3 // 4) :] = 0
    values = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    return {name: values[name] for name in inputs}


def _padding(
    module: Any,
    signature: Signature,
    inputs: tuple[str, ...],
    tokenizer: Any,
    task: str,
    lengths: _Lengths,
) -> tuple[Padding | None, list[Limitation]]:
    """Return the padding of texts, and its limitations; the files of the tokenizer are made to agree with it.

    Texts below the number of tokens that the module takes are padded to it, or all to one number.
    """
    config = module.config.get_text_config()
    position, shortest = signature.outputs.index(signature.answer), lengths.shortest

    def answer(feeds: dict[str, npt.NDArray[Any]]) -> torch.Tensor:
        with torch.inference_mode():
            return signature.call(module, *(torch.from_numpy(feeds[name]) for name in inputs))[position]

    if tokenizer is None:
        limits = allow_batches(answer, config, inputs, shortest)
        return None, [*limits, *(_least(shortest, "give rows of no less") if lengths.fixed is None else [])]
    if task == "text-generation":
        if any(map(is_offloaded, module.parameters())):  # the check needs values
            return replace(causal_padding(tokenizer, config), least=lengths.fixed or 0), []
        padding, limitations = find_causal_padding(answer, tokenizer, config, inputs, lengths.longest, lengths.fixed)
        if padding.side == LEFT:
            tokenizer.padding_side = LEFT
        return padding, limitations
    least = 0 if shortest == TOKENS else shortest
    padding, limitations = find_padding(answer, tokenizer, config, inputs, lengths.longest, least, lengths.fixed)
    if lengths.fixed is None:
        limitations += _least(shortest, "shorter texts are padded to it")
    tokenizer.padding_side = padding.side
    if padding.token in tokenizer.all_special_ids and padding.token != tokenizer.pad_token_id:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding.token)
    return padding, limitations


def _least(shortest: int, consequence: str) -> list[Limitation]:
    """Return the limitation of a model that fails on texts of a few tokens; none for others."""
    if shortest == TOKENS:
        return []
    return [Limitation("least length", f"the model fails on texts of less than {shortest} tokens; {consequence}")]


def text_preprocess(
    inputs: tuple[str, ...],
    example: dict[str, torch.Tensor],
    processor: Any,
    longest: int | None,
    padding: Padding | None,
) -> Preprocess:
    """Return what makes inputs of texts; without a tokenizer, the data must be token ids."""
    arrays = as_numpy(example)
    if processor is None or padding is None:
        return Preprocess(inputs, "text", arrays, longest=longest)
    limit = USUAL if longest is None else longest
    return Preprocess(
        inputs,
        "text",
        arrays,
        text=_truncating(processor, inputs, padding, limit),
        align=partial(tokenize_aligned, processor, inputs, limit, padding.least) if processor.is_fast else None,
        special=frozenset(processor.all_special_ids),
        unknown=_unknown(processor),
        tokenizer=f"{type(processor).__name__} of {name_of(str(processor.name_or_path))}",
        mask_token=processor.mask_token_id,
        class_first=getattr(processor, "cls_token_id", None) is not None,
        whole=partial(_untruncated, processor, inputs),
        cut=partial(_truncating, processor, inputs, padding),
        lengths=partial(_lengths, processor),
        longest=longest,
        limit=limit,
        left_padding=padding.token if padding.side == LEFT else None,
    )


def _unknown(tokenizer: Any) -> int | None:
    """Return the token id of unknown words; None if it also ends, pads or masks texts, as in GPT-2."""
    others = (f"{role}_token_id" for role in ("bos", "eos", "pad", "cls", "sep", "mask"))
    token = tokenizer.unk_token_id
    return None if token in [getattr(tokenizer, name, None) for name in others] else token


def _tokens(
    tokenizer: Any, inputs: tuple[str, ...], padding: Padding, longest: int, texts: list[str], second: list[str] | None
) -> dict[str, npt.NDArray[Any]]:
    encoded = encode(tokenizer, texts, second, inputs, truncation=True, max_length=longest)
    rows = {name: encoded[name] for name in inputs if name in encoded}
    return dict(padding.pad(rows, tokenizer.pad_token_type_id))


def _truncating(tokenizer: Any, inputs: tuple[str, ...], padding: Padding, longest: int) -> Tokenise:
    return partial(_tokens, tokenizer, inputs, padding, longest)


def _untruncated(tokenizer: Any, inputs: tuple[str, ...], text: str) -> dict[str, npt.NDArray[Any]]:
    """Tokenize a text of any length, without the tokenizer's warning about the maximum length of the model."""
    encoded = encode(tokenizer, [text], None, inputs)
    return {name: np.array(encoded[name][0], dtype=np.int64) for name in inputs if name in encoded}


def _lengths(tokenizer: Any, texts: list[str], second: list[str] | None) -> list[int]:
    """Return the numbers of tokens of texts of any length, with the special tokens."""
    return [len(row) for row in encode(tokenizer, texts, second, ())["input_ids"]]


def max_length(module: Any, tokenizer: Any, sentence_files: dict[str, Path]) -> int | None:
    """Return the maximum number of tokens: the minimum of the limits of tokenizer, positions and sentence-transformers.

    The limit of the positions is the number in the config or, where the module has fewer, that of the module, which its
    tokenizer is then made to agree with. Return None if there is no limit.
    """
    config = module.config.get_text_config()
    stated = [getattr(tokenizer, "model_max_length", None), getattr(config, "max_position_embeddings", None)]
    limits_file = sentence_files.get("sentence_bert_config.json")
    if limits_file is not None:
        stated.append(_sentence_config(limits_file).get("max_seq_length"))
    limits = [limit for limit in stated if limit is not None and limit > 0]  # XLNet's config has -1
    learned = position_limit(module, getattr(config, "pad_token_id", None))
    if learned is not None and learned < min(limits, default=UNLIMITED):
        limits.append(learned)
        if tokenizer is not None:
            tokenizer.model_max_length = learned
    longest = min(limits, default=UNLIMITED)
    return int(longest) if longest < UNLIMITED else None


def _sentence_config(path: Path) -> dict[str, Any]:
    """Read a JSON file of sentence-transformers.

    Raises:
        ModelError: it is no JSON object.
    """
    try:
        return read_json(path, OBJECT, remedy="download the model again")
    except (FileNotFoundError, JsonFileError) as error:
        raise ModelError(str(error)) from error
