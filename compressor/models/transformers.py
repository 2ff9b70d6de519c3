"""Models of transformers: hub ids and ``save_pretrained`` folders, with their own tokenizer or image processor."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from PIL import Image

from compressor.errors import DataError
from compressor.internals.transformers import cached, quiet, with_random_weights
from compressor.limitations import Limitation
from compressor.models.base import Model, ModelError, as_numpy, fixed_size, no_language_model, why
from compressor.models.kv_cache import with_cache
from compressor.models.lazy_weights import module_on_disk
from compressor.models.preprocess import Preprocess, Tokenise
from compressor.models.probe import accepts, calling, computes_with, text

HEADS = {
    "ForImageClassification": "image-classification",
    "ForImageClassificationWithTeacher": "image-classification",
    "ForSequenceClassification": "text-classification",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
}
AUTO = {
    "image-classification": "AutoModelForImageClassification",
    "text-classification": "AutoModelForSequenceClassification",
    "text-generation": "AutoModelForCausalLM",
}
# Where sentence-transformers says how its embedding is made of the model's answer.
SENTENCE = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
)
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
EXAMPLE_TOKENS = 16
USUAL = 2048  # tokens of a text at most, where nothing says what the model takes
IMAGE_DEFAULTS = {"image_size": 224, "num_channels": 3}  # where the config says nothing, as a ResNet's of its size
UNLIMITED = 10**6  # tokenizers without a limit name a number like 1e30


def load(
    where: str,
    *,
    task: str | None,
    revision: str | None,
    random_weights: bool,
    trust_remote_code: bool,
    cache: bool = True,
    on_disk: bool = False,
) -> Model:
    """Load a transformers model with the head its config names, or the one that `task` asks for.

    With `on_disk` its weights stay in their files, see `compressor.models.disk`. Without `cache` a language model is
    traced without its KV cache.

    Raises:
        ModelError: config or weights cannot be read, the architecture needs code from the repository, its head is not
            supported, or a language model's cache is not found.
    """
    if revision is not None and Path(where).is_dir():
        raise ModelError(f"{where} is a local folder, so it has no revision {revision!r}; leave --revision out.")
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    with quiet():
        try:
            config = transformers.AutoConfig.from_pretrained(where, **options)
            beside = _beside(where, revision)
            chosen = task or _task(config, beside, where)
            if on_disk:
                if chosen != "text-generation":
                    raise no_language_model(where, f"for {chosen}")
                module = module_on_disk(_kind(config, chosen), config, where, options)
                return _wrap(module.eval(), where, chosen, options, beside, random_weights, (), cache)
            module, absent, left_out = _module(where, config, chosen, random_weights, options)
        except ModelError:
            raise
        except Exception as error:  # transformers lets hub, file and shape errors through as they are
            raise ModelError(f"transformers could not load {where}: {why(error)}.") from error
        model = _wrap(module.eval().float(), where, chosen, options, beside, random_weights, absent, cache)
        return replace(model, limitations=(*model.limitations, *_left_out(left_out)))


def _beside(where: str, revision: str | None) -> dict[str, Path]:
    """The files of sentence-transformers that lie beside the model, by name: in a folder, or on the hub."""
    found = {name: _optional(where, name, revision) for name in SENTENCE}
    return {name: path for name, path in found.items() if path is not None}


def _optional(where: str, name: str, revision: str | None) -> Path | None:
    """A file of a local folder or of a hub repository; None where it has no such file."""
    if Path(where).is_dir():
        path = Path(where) / name
        return path if path.is_file() else None
    return cached(where, name, revision)


def _task(config: Any, beside: dict[str, Path], where: str) -> str:
    """The task of the head that the config names.

    Raises:
        ModelError: it is none of those that are supported.
    """
    architecture = (config.architectures or [""])[0]
    # A cross-encoder is of sentence-transformers too, but it judges a pair instead of embedding a sentence.
    embeds = "modules.json" in beside or "config_sentence_transformers.json" in beside
    if embeds and not architecture.endswith("ForSequenceClassification"):
        return "sentence-similarity"
    for ending, task in HEADS.items():
        if architecture.endswith(ending):
            return task
    features = "image-feature-extraction" if hasattr(config, "image_size") else "feature-extraction"
    if architecture and not _is_bare(architecture):
        raise ModelError(
            f"{where} is a {architecture}, a head that is not supported; expected one of "
            f"{', '.join(f'...{ending}' for ending in HEADS)}, or pass --task {features} for the features of the model "
            "without its head."
        )
    return features


def _module(
    where: str, config: Any, task: str, random_weights: bool, options: dict[str, Any]
) -> tuple[torch.nn.Module, tuple[str, ...], tuple[str, ...]]:
    """The module, the weights that its checkpoint lacks, and those that the module has no place for."""
    kind = _kind(config, task)
    if random_weights:
        torch.manual_seed(0)
        return with_random_weights(kind, config), (), ()
    module, found = kind.from_pretrained(where, **options, dtype=torch.float32, output_loading_info=True)
    return module, tuple(sorted(found["missing_keys"])), tuple(sorted(found["unexpected_keys"]))


def _kind(config: Any, task: str) -> Any:
    """The class that opens a model for a task."""
    return getattr(transformers, AUTO[task]) if task in AUTO else _headless((config.architectures or [""])[0])


def _headless(architecture: str) -> Any:
    """The class of that name if it answers with hidden states, such as T5EncoderModel; AutoModel otherwise.

    The name comes from a file, so it must not reach anything else that transformers holds.
    """
    named = getattr(transformers, architecture, None)
    model = isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)
    return named if model and _is_bare(architecture) else transformers.AutoModel


def _is_bare(architecture: str) -> bool:
    """Whether a class of this name answers with hidden states."""
    return architecture.endswith(("Model", "Encoder", "Backbone")) and not architecture.endswith(
        ("HeadModel", "HeadsModel")
    )


@dataclass(frozen=True)
class _Shape:
    """How a module of this task is called: its outputs, and the function that computes them."""

    outputs: tuple[str, ...]
    answer: str
    call: Callable[..., tuple[torch.Tensor, ...]]


def _wrap(
    module: Any,
    where: str,
    task: str,
    options: dict[str, Any],
    beside: dict[str, Path],
    random_weights: bool,
    untrained: tuple[str, ...],
    cache: bool = True,
) -> Model:
    image = module.main_input_name == "pixel_values"
    processors = _image_processor(where, options) if image else _tokenizer(where, options)
    inputs = ("pixel_values",) if image else _text_inputs(module, processors)
    example = _image_example(module) if image else _text_example(module, inputs)
    shape = _shape(module, task, inputs, where, beside)
    axes: dict[str, dict[int, str]] = {name: {0: "batch"} if image else {0: "batch", 1: "sequence"} for name in inputs}
    model = Model(
        name=Path(where).name if Path(where).is_dir() else where,
        source="transformers",
        task=task,
        module=module,
        call=shape.call,
        inputs=inputs,
        outputs=shape.outputs,
        answer=shape.answer,
        example=example,
        dynamic_axes=axes,
        preprocess=_preprocess(module, beside, inputs, example, processors, image),
        save=partial(_save, module, processors, beside),
        untrained=untrained,
        revision=options["revision"],
        hub_id=None if random_weights or Path(where).is_dir() else where,
        random_weights=random_weights,
        tokenizer=None if image else processors,
        limitations=tuple(
            _image_limitations(module, processors) if image else _text_limitations(module, processors, inputs, beside)
        ),
    )
    return model if task != "text-generation" else with_cache(model, cache)


def _left_out(names: tuple[str, ...]) -> Iterator[Limitation]:
    """The weights of a checkpoint that the loaded model has no place for, such as those of another head."""
    if names:
        yield Limitation("weights left out", f"{len(names)} tensors of the checkpoint, the first is {names[0]}")


def _image_limitations(module: Any, processor: Any) -> Iterator[Limitation]:
    """What is missing or assumed of a model that takes pictures."""
    if processor is None:
        yield Limitation(
            "preprocessing", "there is no image processor beside the model, so the data must be ready arrays"
        )
    config = _vision_config(module)
    yield fixed_size(next(iter(_image_example(module).values())))
    for name, assumed in IMAGE_DEFAULTS.items():
        if getattr(config, name, None) is None:
            yield Limitation(f"{name} of the pictures", f"the config does not say it, so {assumed} is assumed")


def _text_limitations(
    module: Any, tokenizer: Any, inputs: tuple[str, ...], beside: dict[str, Path]
) -> Iterator[Limitation]:
    """What is missing or assumed of a model that takes texts."""
    if tokenizer is None:
        yield Limitation("tokenizer", "there is none beside the model, so the data must be token ids")
        return
    if tokenizer.pad_token is None:
        yield Limitation(
            "padding", "the tokenizer has no padding token and no end token, so the data must be token ids"
        )
    elif tokenizer.pad_token == tokenizer.eos_token:
        yield Limitation("padding token", f"the end token {tokenizer.eos_token} pads, and is masked")
    left_out = [name for name in tokenizer.model_input_names if name not in inputs]
    if left_out:
        yield Limitation(f"input {', '.join(left_out)}", "the tokenizer gives it and the export does not take it")
    if _longest(module, tokenizer, beside) is None:
        yield Limitation("length", f"nothing says how many tokens the model takes; texts are cut at {USUAL}")


def _shape(module: Any, task: str, inputs: tuple[str, ...], where: str, beside: dict[str, Path]) -> _Shape:
    if task.endswith("classification") or task == "text-generation":
        extra = {"use_cache": False} if task == "text-generation" else {}
        return _Shape(("logits",), "logits", partial(_logits, inputs=inputs, extra=extra))
    if task == "sentence-similarity":
        embed = partial(_sentence, inputs=inputs, pooling=_pooling(where, beside))
        return _Shape(("last_hidden_state", "sentence_embedding"), "sentence_embedding", embed)
    return _Shape(("last_hidden_state",), "last_hidden_state", partial(_hidden, inputs=inputs))


def _logits(
    module: Any, *tensors: torch.Tensor, inputs: tuple[str, ...], extra: dict[str, Any]
) -> tuple[torch.Tensor, ...]:
    return (module(**dict(zip(inputs, tensors, strict=True)), **extra).logits,)


def _hidden(module: Any, *tensors: torch.Tensor, inputs: tuple[str, ...]) -> tuple[torch.Tensor, ...]:
    return (module(**dict(zip(inputs, tensors, strict=True))).last_hidden_state,)


def _sentence(module: Any, *tensors: torch.Tensor, inputs: tuple[str, ...], pooling: str) -> tuple[torch.Tensor, ...]:
    """Token states, and their pooled unit vector as sentence-transformers computes it."""
    feeds = dict(zip(inputs, tensors, strict=True))
    states = module(**feeds).last_hidden_state
    if pooling == "cls":
        pooled = states[:, 0]
    else:
        mask = feeds["attention_mask"].unsqueeze(-1).to(states.dtype)
        pooled = (states * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
    return states, torch.nn.functional.normalize(pooled, dim=-1)


def _pooling(where: str, beside: dict[str, Path]) -> str:
    """Pooling that sentence-transformers asks for; mean where it says nothing.

    Raises:
        ModelError: a pooling other than mean and class token.
    """
    name = "1_Pooling/config.json"
    if name not in beside:
        return "mean"
    config = json.loads(beside[name].read_text())
    modes = {
        key.removeprefix("pooling_mode_") for key, value in config.items() if value is True and "pooling_mode" in key
    }
    if modes == {"cls_token"}:
        return "cls"
    if modes == {"mean_tokens"}:
        return "mean"
    raise ModelError(
        f"{name} of {where} asks for pooling by {', '.join(sorted(modes))}; expected mean_tokens or cls_token."
    )


def _text_inputs(module: Any, tokenizer: Any) -> tuple[str, ...]:
    """The inputs that the tokenizer gives and the module computes with."""
    wanted = tokenizer.model_input_names if tokenizer is not None else ["input_ids", "attention_mask"]
    probed = text()
    ids = {"input_ids": probed["input_ids"]}
    with calling(module):
        takes_mask = "attention_mask" in wanted and accepts(module, ids, "attention_mask", probed["attention_mask"])
        typed = torch.zeros_like(probed["input_ids"])
        takes_types = "token_type_ids" in wanted and computes_with(module, ids, "token_type_ids", typed)
    taken = {"input_ids": True, "attention_mask": takes_mask, "token_type_ids": takes_types}
    return tuple(name for name, is_taken in taken.items() if is_taken)


def _vision_config(module: Any) -> Any:
    return getattr(module.config, "vision_config", module.config)


def _image_example(module: Any) -> dict[str, torch.Tensor]:
    config = _vision_config(module)
    size, channels = (getattr(config, name, None) or assumed for name, assumed in IMAGE_DEFAULTS.items())
    height, width = (size, size) if isinstance(size, int) else size
    noise = torch.rand(2, channels, height, width, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": noise}


def _text_example(module: Any, inputs: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Two rows of tokens, the second with padding so that the mask is not a constant."""
    vocabulary = module.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (2, EXAMPLE_TOKENS), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, EXAMPLE_TOKENS * 3 // 4 :] = 0
    values = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    return {name: values[name] for name in inputs}


def _image_processor(where: str, options: dict[str, Any]) -> Any:
    try:
        return transformers.AutoImageProcessor.from_pretrained(where, **options)
    except (OSError, ValueError) as error:  # a folder without preprocessing: float arrays still work as data
        _check_absent("image processor", PROCESSOR_FILES, where, options, error)
        return None


def _check_absent(what: str, names: tuple[str, ...], where: str, options: dict[str, Any], error: BaseException) -> None:
    """Refuse files beside a model that cannot be read: without them the model would be another one.

    Raises:
        ModelError: one of the files is there.
    """
    there = [name for name in names if _optional(where, name, options["revision"]) is not None]
    if there:
        raise ModelError(
            f"the {what} of {where} cannot be read ({there[0]}: {why(error)}); repair the file, or remove it and give "
            "ready model inputs as data."
        ) from error


def _tokenizer(where: str, options: dict[str, Any]) -> Any:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, **options)
    except (OSError, ValueError, KeyError) as error:  # a folder without tokenizer: token ids still work as data
        _check_absent("tokenizer", TOKENIZER_FILES, where, options, error)
        return None
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        return None  # transformers makes one up where there are no files, for which every word is unknown
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _preprocess(
    module: Any,
    beside: dict[str, Path],
    inputs: tuple[str, ...],
    example: dict[str, torch.Tensor],
    processor: Any,
    image: bool,
) -> Preprocess:
    arrays = as_numpy(example)
    if image:
        convert = None if processor is None else partial(_pixels, processor)
        return Preprocess(inputs, "image", arrays, image=convert)
    longest = _longest(module, processor, beside)
    if processor is None:
        return Preprocess(inputs, "text", arrays, longest=longest)
    return Preprocess(
        inputs,
        "text",
        arrays,
        text=_cutting(processor, inputs, USUAL if longest is None else longest),
        class_first=getattr(processor, "cls_token_id", None) is not None,
        whole=partial(_whole, processor, inputs),
        cut=partial(_cutting, processor, inputs),
        longest=longest,
    )


def _pixels(processor: Any, picture: Image.Image) -> npt.NDArray[np.float32]:
    pixels = processor(images=picture, return_tensors="pt")["pixel_values"][0]
    array: npt.NDArray[np.float32] = pixels.float().numpy()
    return array


def _tokens(
    tokenizer: Any, inputs: tuple[str, ...], longest: int, texts: list[str], second: list[str] | None
) -> dict[str, npt.NDArray[Any]]:
    if tokenizer.pad_token is None:
        raise DataError(
            "the tokenizer has no padding token and no end token, so texts make no batch; set its pad_token, or give "
            "token ids as .npy"
        )
    encoded = tokenizer(texts, second, padding=True, truncation=True, max_length=longest, return_tensors="np")
    return {name: encoded[name].astype(np.int64) for name in inputs}


def _cutting(tokenizer: Any, inputs: tuple[str, ...], longest: int) -> Tokenise:
    return partial(_tokens, tokenizer, inputs, longest)


def _whole(tokenizer: Any, inputs: tuple[str, ...], text: str) -> dict[str, npt.NDArray[Any]]:
    """However long it is: the tokenizer's warning that the model takes fewer tokens is none here."""
    encoded = tokenizer(text, verbose=False)
    return {name: np.array(encoded[name], dtype=np.int64) for name in inputs if name in encoded}


def _longest(module: Any, tokenizer: Any, beside: dict[str, Path]) -> int | None:
    """Most tokens the model takes: the least of what tokenizer, positions and sentence-transformers allow."""
    limits = [
        getattr(tokenizer, "model_max_length", 10**9),
        getattr(module.config, "max_position_embeddings", None) or 10**9,
    ]
    sentence = beside.get("sentence_bert_config.json")
    if sentence is not None:
        limits.append(json.loads(sentence.read_text()).get("max_seq_length") or 10**9)
    return int(min(limits)) if min(limits) < UNLIMITED else None


def _save(module: Any, processor: Any, beside: dict[str, Path], folder: Path) -> None:
    module.config.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
        _name_for_older(folder / "tokenizer_config.json")
    if getattr(module, "generation_config", None) is not None and module.can_generate():
        module.generation_config.save_pretrained(folder)
    for name, original in beside.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(original.read_bytes())


def _name_for_older(path: Path) -> None:
    """Name a tokenizer that is only a tokenizer.json by the class that transformers 4, and so Optimum, has too."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if '"TokenizersBackend"' in text:
        path.write_text(text.replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'), encoding="utf-8")
