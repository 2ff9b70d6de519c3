"""Models of transformers: hub ids and ``save_pretrained`` folders, with their tokenizer or image processor."""

from __future__ import annotations

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
from compressor.models.base import Model, ModelError, as_numpy, fixed_size, load_error_reason, no_language_model
from compressor.models.kv_cache import with_cache
from compressor.models.lazy_weights import module_on_disk
from compressor.models.preprocess import Preprocess, Tokenise
from compressor.models.probe import accepts, calling, computes_with, text
from compressor.workspace.json_files import OBJECT, JsonFileError, read_json

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
# Files in which sentence-transformers stores how an embedding is computed from the model's output.
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
USUAL = 2048  # maximum number of tokens of a text, if the maximum length of the model is unknown
IMAGE_DEFAULTS = {"image_size": 224, "num_channels": 3}  # if the config lacks them, as the configs of ResNets do
UNLIMITED = 10**6  # tokenizers without a limit report a number like 1e30


def load(
    location: str,
    *,
    task: str | None,
    revision: str | None,
    random_weights: bool,
    trust_remote_code: bool,
    cache: bool = True,
    on_disk: bool = False,
) -> Model:
    """Load a transformers model with the head that its config names, or with the head for `task`.

    With `on_disk`, the weights stay in their files, see `compressor.models.lazy_weights`. Without `cache`, a language
    model is traced without its KV cache.

    Raises:
        ModelError: config or weights cannot be read, the architecture needs code from the repository, its head is not
            supported, or the cache of a language model cannot be detected.
    """
    if revision is not None and Path(location).is_dir():
        raise ModelError(f"{location} is a local folder, so it has no revision {revision!r}; leave --revision out.")
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    with quiet():
        try:
            config = transformers.AutoConfig.from_pretrained(location, **options)
            sentence_files = _sentence_files(location, revision)
            resolved_task = task or _task(config, sentence_files, location)
            if on_disk:
                if resolved_task != "text-generation":
                    raise no_language_model(location, f"a model for {resolved_task}")
                module = module_on_disk(_kind(config, resolved_task), config, location, options)
                return _wrap(module.eval(), location, resolved_task, options, sentence_files, random_weights, (), cache)
            module, missing, left_out = _module(location, config, resolved_task, random_weights, options)
        except ModelError:
            raise
        except Exception as error:  # transformers does not wrap hub, file and shape errors
            raise ModelError(f"transformers could not load {location}: {load_error_reason(error)}.") from error
        model = _wrap(
            module.eval().float(), location, resolved_task, options, sentence_files, random_weights, missing, cache
        )
        return replace(model, limitations=(*model.limitations, *_left_out(left_out)))


def _sentence_files(location: str, revision: str | None) -> dict[str, Path]:
    """Return the files of sentence-transformers in the folder or hub repository of the model, by name."""
    paths = {name: _optional(location, name, revision) for name in SENTENCE}
    return {name: path for name, path in paths.items() if path is not None}


def _optional(location: str, name: str, revision: str | None) -> Path | None:
    """Return the path of a file of a local folder or of a hub repository; None if the file does not exist."""
    if Path(location).is_dir():
        path = Path(location) / name
        return path if path.is_file() else None
    return cached(location, name, revision)


def _task(config: Any, sentence_files: dict[str, Path], location: str) -> str:
    """Return the task of the head that the config names.

    Raises:
        ModelError: the head is not supported.
    """
    architecture = (config.architectures or [""])[0]
    # A cross-encoder also has files of sentence-transformers, but it scores a pair instead of embedding a sentence.
    embeds = "modules.json" in sentence_files or "config_sentence_transformers.json" in sentence_files
    if embeds and not architecture.endswith("ForSequenceClassification"):
        return "sentence-similarity"
    for ending, task in HEADS.items():
        if architecture.endswith(ending):
            return task
    features = "image-feature-extraction" if hasattr(config, "image_size") else "feature-extraction"
    if architecture and not _is_bare(architecture):
        raise ModelError(
            f"{location} is a {architecture}, a head that is not supported; expected one of "
            f"{', '.join(f'...{ending}' for ending in HEADS)}, or pass --task {features} to export the model without "
            "its head."
        )
    return features


def _module(
    location: str, config: Any, task: str, random_weights: bool, options: dict[str, Any]
) -> tuple[torch.nn.Module, tuple[str, ...], tuple[str, ...]]:
    """Return the module, the missing keys of the checkpoint, and its unexpected keys."""
    kind = _kind(config, task)
    if random_weights:
        torch.manual_seed(0)
        return with_random_weights(kind, config), (), ()
    module, info = kind.from_pretrained(location, **options, dtype=torch.float32, output_loading_info=True)
    return module, tuple(sorted(info["missing_keys"])), tuple(sorted(info["unexpected_keys"]))


def _kind(config: Any, task: str) -> Any:
    """Return the class that loads a model for a task."""
    return getattr(transformers, AUTO[task]) if task in AUTO else _headless((config.architectures or [""])[0])


def _headless(architecture: str) -> Any:
    """Return the class of that name if its output is hidden states, such as T5EncoderModel; AutoModel otherwise.

    The name comes from a file, so it must not select any other object of the package transformers.
    """
    named = getattr(transformers, architecture, None)
    model = isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)
    return named if model and _is_bare(architecture) else transformers.AutoModel


def _is_bare(architecture: str) -> bool:
    """Return whether the output of a class of this name is hidden states."""
    return architecture.endswith(("Model", "Encoder", "Backbone")) and not architecture.endswith(
        ("HeadModel", "HeadsModel")
    )


@dataclass(frozen=True)
class _Signature:
    """The output names of a module for a task, and the function that computes them."""

    outputs: tuple[str, ...]
    answer: str
    call: Callable[..., tuple[torch.Tensor, ...]]


def _wrap(
    module: Any,
    location: str,
    task: str,
    options: dict[str, Any],
    sentence_files: dict[str, Path],
    random_weights: bool,
    untrained: tuple[str, ...],
    cache: bool = True,
) -> Model:
    image = module.main_input_name == "pixel_values"
    processors = _image_processor(location, options) if image else _tokenizer(location, options)
    inputs = ("pixel_values",) if image else _text_inputs(module, processors)
    example = _image_example(module) if image else _text_example(module, inputs)
    signature = _signature(module, task, inputs, location, sentence_files)
    axes: dict[str, dict[int, str]] = {name: {0: "batch"} if image else {0: "batch", 1: "sequence"} for name in inputs}
    model = Model(
        name=Path(location).name if Path(location).is_dir() else location,
        source="transformers",
        task=task,
        module=module,
        call=signature.call,
        inputs=inputs,
        outputs=signature.outputs,
        answer=signature.answer,
        example=example,
        dynamic_axes=axes,
        preprocess=_preprocess(module, sentence_files, inputs, example, processors, image),
        save=partial(_save, module, processors, sentence_files),
        untrained=untrained,
        revision=options["revision"],
        hub_id=None if random_weights or Path(location).is_dir() else location,
        random_weights=random_weights,
        tokenizer=None if image else processors,
        limitations=tuple(
            _image_limitations(module, processors)
            if image
            else _text_limitations(module, processors, inputs, sentence_files)
        ),
    )
    return model if task != "text-generation" else with_cache(model, cache)


def _left_out(names: tuple[str, ...]) -> Iterator[Limitation]:
    """Yield a limitation if the checkpoint has weights that the model does not use, such as those of another head."""
    if names:
        yield Limitation(
            "weights left out", f"{len(names)} tensors of the checkpoint, the first of which is {names[0]}"
        )


def _image_limitations(module: Any, processor: Any) -> Iterator[Limitation]:
    """Yield the limitations of an image model."""
    if processor is None:
        yield Limitation("preprocessing", "the model has no image processor, so the data must be preprocessed arrays")
    config = _vision_config(module)
    yield fixed_size(next(iter(_image_example(module).values())))
    for name, assumed in IMAGE_DEFAULTS.items():
        if getattr(config, name, None) is None:
            yield Limitation(f"{name} of the config", f"the config does not specify it, so {assumed} is assumed")


def _text_limitations(
    module: Any, tokenizer: Any, inputs: tuple[str, ...], sentence_files: dict[str, Path]
) -> Iterator[Limitation]:
    """Yield the limitations of a text model."""
    if tokenizer is None:
        yield Limitation("tokenizer", "the model has no tokenizer, so the data must be token ids")
        return
    if tokenizer.pad_token is None:
        yield Limitation(
            "padding", "the tokenizer has no padding token and no end token, so the data must be token ids"
        )
    elif tokenizer.pad_token == tokenizer.eos_token:
        yield Limitation("padding token", f"the end token {tokenizer.eos_token} is used for padding and is masked")
    left_out = [name for name in tokenizer.model_input_names if name not in inputs]
    if left_out:
        yield Limitation(f"input {', '.join(left_out)}", "the tokenizer returns it, but the export does not take it")
    if _max_length(module, tokenizer, sentence_files) is None:
        yield Limitation(
            "length", f"the maximum number of tokens of the model is unknown, so texts are truncated to {USUAL} tokens"
        )


def _signature(
    module: Any, task: str, inputs: tuple[str, ...], location: str, sentence_files: dict[str, Path]
) -> _Signature:
    if task.endswith("classification") or task == "text-generation":
        extra = {"use_cache": False} if task == "text-generation" else {}
        return _Signature(("logits",), "logits", partial(_logits, inputs=inputs, extra=extra))
    if task == "sentence-similarity":
        embed = partial(_sentence, inputs=inputs, pooling=_pooling(location, sentence_files))
        return _Signature(("last_hidden_state", "sentence_embedding"), "sentence_embedding", embed)
    return _Signature(("last_hidden_state",), "last_hidden_state", partial(_hidden, inputs=inputs))


def _logits(
    module: Any, *tensors: torch.Tensor, inputs: tuple[str, ...], extra: dict[str, Any]
) -> tuple[torch.Tensor, ...]:
    return (module(**dict(zip(inputs, tensors, strict=True)), **extra).logits,)


def _hidden(module: Any, *tensors: torch.Tensor, inputs: tuple[str, ...]) -> tuple[torch.Tensor, ...]:
    return (module(**dict(zip(inputs, tensors, strict=True))).last_hidden_state,)


def _sentence(module: Any, *tensors: torch.Tensor, inputs: tuple[str, ...], pooling: str) -> tuple[torch.Tensor, ...]:
    """Return hidden states and the pooled, normalized embedding, as sentence-transformers computes it."""
    feeds = dict(zip(inputs, tensors, strict=True))
    states = module(**feeds).last_hidden_state
    if pooling == "cls":
        pooled = states[:, 0]
    else:
        mask = feeds["attention_mask"].unsqueeze(-1).to(states.dtype)
        pooled = (states * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
    return states, torch.nn.functional.normalize(pooled, dim=-1)


def _pooling(location: str, sentence_files: dict[str, Path]) -> str:
    """Return the pooling of the sentence-transformers config, ``cls`` or ``mean``; ``mean`` without a config.

    Raises:
        ModelError: the config has another pooling.
    """
    name = "1_Pooling/config.json"
    if name not in sentence_files:
        return "mean"
    config = _sentence_config(sentence_files[name])
    modes = {
        key.removeprefix("pooling_mode_") for key, value in config.items() if value is True and "pooling_mode" in key
    }
    if modes == {"cls_token"}:
        return "cls"
    if modes == {"mean_tokens"}:
        return "mean"
    raise ModelError(
        f"{name} of {location} sets the pooling {', '.join(sorted(modes))}; expected mean_tokens or cls_token."
    )


def _text_inputs(module: Any, tokenizer: Any) -> tuple[str, ...]:
    """Return the names of the inputs that the tokenizer returns and the module uses."""
    offered = tokenizer.model_input_names if tokenizer is not None else ["input_ids", "attention_mask"]
    inputs = text()
    ids = {"input_ids": inputs["input_ids"]}
    with calling(module):
        takes_mask = "attention_mask" in offered and accepts(module, ids, "attention_mask", inputs["attention_mask"])
        type_ids = torch.zeros_like(inputs["input_ids"])
        takes_types = "token_type_ids" in offered and computes_with(module, ids, "token_type_ids", type_ids)
    used = {"input_ids": True, "attention_mask": takes_mask, "token_type_ids": takes_types}
    return tuple(name for name, is_used in used.items() if is_used)


def _vision_config(module: Any) -> Any:
    return getattr(module.config, "vision_config", module.config)


def _image_example(module: Any) -> dict[str, torch.Tensor]:
    config = _vision_config(module)
    size, channels = (getattr(config, name, None) or assumed for name, assumed in IMAGE_DEFAULTS.items())
    height, width = (size, size) if isinstance(size, int) else size
    noise = torch.rand(2, channels, height, width, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": noise}


def _text_example(module: Any, inputs: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Return two rows of tokens, the second with padding, so that the mask is not constant."""
    vocabulary = module.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (2, EXAMPLE_TOKENS), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, EXAMPLE_TOKENS * 3 // 4 :] = 0
    values = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    return {name: values[name] for name in inputs}


def _image_processor(location: str, options: dict[str, Any]) -> Any:
    try:
        return transformers.AutoImageProcessor.from_pretrained(location, **options)
    except (OSError, ValueError) as error:  # without an image processor, float arrays still work as data
        _check_absent("image processor", PROCESSOR_FILES, location, options, error)
        return None


def _check_absent(
    kind: str, names: tuple[str, ...], location: str, options: dict[str, Any], error: BaseException
) -> None:
    """Check that a preprocessor that could not be loaded has no files, so that broken files are not ignored.

    Raises:
        ModelError: one of the files exists.
    """
    present = [name for name in names if _optional(location, name, options["revision"]) is not None]
    if present:
        raise ModelError(
            f"the {kind} of {location} cannot be read ({present[0]}: {load_error_reason(error)}); repair the file, or "
            "remove it and pass preprocessed model inputs as data."
        ) from error


def _tokenizer(location: str, options: dict[str, Any]) -> Any:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(location, **options)
    except (OSError, ValueError, KeyError) as error:  # without a tokenizer, token ids still work as data
        _check_absent("tokenizer", TOKENIZER_FILES, location, options, error)
        return None
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        return None  # without files, transformers creates an empty tokenizer that knows no word
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _preprocess(
    module: Any,
    sentence_files: dict[str, Path],
    inputs: tuple[str, ...],
    example: dict[str, torch.Tensor],
    processor: Any,
    image: bool,
) -> Preprocess:
    arrays = as_numpy(example)
    if image:
        convert = None if processor is None else partial(_pixels, processor)
        return Preprocess(inputs, "image", arrays, image=convert)
    longest = _max_length(module, processor, sentence_files)
    if processor is None:
        return Preprocess(inputs, "text", arrays, longest=longest)
    return Preprocess(
        inputs,
        "text",
        arrays,
        text=_truncating(processor, inputs, USUAL if longest is None else longest),
        class_first=getattr(processor, "cls_token_id", None) is not None,
        whole=partial(_untruncated, processor, inputs),
        cut=partial(_truncating, processor, inputs),
        longest=longest,
    )


def _pixels(processor: Any, image: Image.Image) -> npt.NDArray[np.float32]:
    pixels = processor(images=image, return_tensors="pt")["pixel_values"][0]
    array: npt.NDArray[np.float32] = pixels.float().numpy()
    return array


def _tokens(
    tokenizer: Any, inputs: tuple[str, ...], longest: int, texts: list[str], second: list[str] | None
) -> dict[str, npt.NDArray[Any]]:
    if tokenizer.pad_token is None:
        raise DataError(
            "the tokenizer has no padding token and no end token, so texts cannot be batched; set its pad_token, or "
            "pass token ids as .npy"
        )
    encoded = tokenizer(texts, second, padding=True, truncation=True, max_length=longest, return_tensors="np")
    return {name: encoded[name].astype(np.int64) for name in inputs}


def _truncating(tokenizer: Any, inputs: tuple[str, ...], longest: int) -> Tokenise:
    return partial(_tokens, tokenizer, inputs, longest)


def _untruncated(tokenizer: Any, inputs: tuple[str, ...], text: str) -> dict[str, npt.NDArray[Any]]:
    """Tokenize a text of any length, without the tokenizer's warning about the maximum length of the model."""
    encoded = tokenizer(text, verbose=False)
    return {name: np.array(encoded[name], dtype=np.int64) for name in inputs if name in encoded}


def _max_length(module: Any, tokenizer: Any, sentence_files: dict[str, Path]) -> int | None:
    """Return the maximum number of tokens: the minimum of the limits of tokenizer, positions and sentence-transformers.

    Return None if there is no limit.
    """
    limits = [
        getattr(tokenizer, "model_max_length", 10**9),
        getattr(module.config, "max_position_embeddings", None) or 10**9,
    ]
    limits_file = sentence_files.get("sentence_bert_config.json")
    if limits_file is not None:
        longest = _sentence_config(limits_file).get("max_seq_length")
        if longest is not None and (not isinstance(longest, int) or longest < 1):
            raise ModelError(f"{limits_file}: max_seq_length is {longest!r}; expected a number of tokens or null.")
        limits.append(longest or 10**9)
    return int(min(limits)) if min(limits) < UNLIMITED else None


def _sentence_config(path: Path) -> dict[str, Any]:
    """Read a JSON file of sentence-transformers.

    Raises:
        ModelError: it is no JSON object.
    """
    try:
        return read_json(path, OBJECT, remedy="download the model again")
    except (FileNotFoundError, JsonFileError) as error:
        raise ModelError(str(error)) from error


def _save(module: Any, processor: Any, sentence_files: dict[str, Path], folder: Path) -> None:
    module.config.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
        _use_older_tokenizer_class(folder / "tokenizer_config.json")
    if getattr(module, "generation_config", None) is not None and module.can_generate():
        module.generation_config.save_pretrained(folder)
    for name, original in sentence_files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(original.read_bytes())


def _use_older_tokenizer_class(path: Path) -> None:
    """Replace a tokenizer class that transformers 4, which Optimum needs, does not have by an equivalent one."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if '"TokenizersBackend"' in text:
        path.write_text(text.replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'), encoding="utf-8")
