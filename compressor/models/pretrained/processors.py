"""Tokenizers, image processors and feature extractors of a checkpoint, read from it and written into an export."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from compressor.internals.transformers import cached
from compressor.limitations import Limitation
from compressor.models.base import ModelError, load_error_reason
from compressor.workspace.json_files import OBJECT, read_json

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
)
TEXT_SIZES = ("hidden_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads")
NAMED = 3  # tokens in a sentence
SIDES = ("padding_side", "truncation_side")
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def optional_file(location: str, name: str, revision: str | None) -> Path | None:
    """Return the path of a file of a local folder or of a hub repository; None if the file does not exist."""
    if Path(location).is_dir():
        path = Path(location) / name
        return path if path.is_file() else None
    return cached(location, name, revision)


def image_processor(location: str, options: dict[str, Any]) -> Any:
    """Return the image processor of a checkpoint; None if it has none."""
    try:
        return transformers.AutoImageProcessor.from_pretrained(location, **options)
    # transformers does not wrap the errors of damaged files. Without an image processor, float arrays work as data.
    except Exception as error:
        _check_absent("image processor", PROCESSOR_FILES, location, options, error)
        return None


def video_processor(location: str, options: dict[str, Any]) -> Any:
    """Return the video processor of a checkpoint or, in older ones, its image processor; None if it has neither."""
    try:
        return transformers.AutoVideoProcessor.from_pretrained(location, **options)
    except Exception:  # older checkpoints have an image processor, which takes the frames of a clip
        return image_processor(location, options)


def feature_extractor(location: str, options: dict[str, Any]) -> Any:
    """Return the feature extractor of a checkpoint; None if it has none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # AST's own settings leave some mel filters empty
            return transformers.AutoFeatureExtractor.from_pretrained(location, **options)
    except Exception as error:  # transformers does not wrap the errors of damaged files
        _check_absent("feature extractor", PROCESSOR_FILES, location, options, error)
        return None


def tokenizer_of(location: str, options: dict[str, Any]) -> Any:
    """Return the tokenizer of a checkpoint, with a padding token; None if it has none."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(location, **options)
    except Exception as error:  # as above; without a tokenizer, token ids still work as data
        _check_absent("tokenizer", TOKENIZER_FILES, location, options, error)
        return None
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        return None  # without files, transformers creates an empty tokenizer that knows no word
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokens_without_embedding(module: Any, tokenizer: Any) -> Iterator[Limitation]:
    """Yield a limitation if the tokenizer has token ids for which the model has no embedding."""
    rows = None if tokenizer is None else _embeddings(module)
    if rows is None:
        return
    beyond = sorted((token_id, token) for token, token_id in tokenizer.get_vocab().items() if token_id >= rows)
    if beyond:
        tokens = ", ".join(token for _, token in beyond[:NAMED]) + (", ..." if len(beyond) > NAMED else "")
        yield Limitation(
            "tokens of the tokenizer",
            f"it has ids up to {beyond[-1][0]}, but the model has embeddings up to {rows - 1}, so it fails on texts "
            f"with {len(beyond)} of its tokens ({tokens}); use the tokenizer that belongs to the model",
        )


def _embeddings(module: Any) -> int | None:
    """Return the number of token embeddings of a model, or None if it does not say."""
    try:
        table = module.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        table = None
    if isinstance(table, torch.nn.Embedding):
        return table.num_embeddings
    return getattr(module.config.get_text_config(decoder=True), "vocab_size", None)


def processor_of(location: str, options: dict[str, Any]) -> Any:
    """Return the processor of images and texts of a checkpoint; None if it has none."""
    try:
        processor = transformers.AutoProcessor.from_pretrained(location, **options)
    except Exception as error:  # as above; without a processor, arrays of all inputs still work as data
        _check_absent("processor", PROCESSOR_FILES, location, options, error)
        return None
    return processor if hasattr(processor, "image_processor") and hasattr(processor, "tokenizer") else None


def _check_absent(
    kind: str, names: tuple[str, ...], location: str, options: dict[str, Any], error: BaseException
) -> None:
    """Check that a preprocessor that could not be loaded has no files, so that broken files are not ignored.

    Raises:
        ModelError: one of the files exists.
    """
    present = [name for name in names if optional_file(location, name, options["revision"]) is not None]
    if present:
        raise ModelError(
            f"the {kind} of {location} cannot be read ({present[0]}: {load_error_reason(error)}); repair the file, or "
            "remove it and pass preprocessed model inputs as data."
        ) from error


def save(module: Any, processor: Any, sentence_files: dict[str, Path], folder: Path) -> None:
    """Write config, preprocessor, generation config and files of sentence-transformers into a folder."""
    module.config.save_pretrained(folder)
    if processor is not None:
        _state_sides(processor)
        _forget_last_call(processor)
        processor.save_pretrained(folder)
        _use_older_tokenizer_class(folder / "tokenizer_config.json")
    if getattr(module, "generation_config", None) is not None and module.can_generate():
        module.generation_config.save_pretrained(folder)
    for name, original in sentence_files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(original.read_bytes())


def save_sound(module: Any, extractor: Any, tokenizer: Any, folder: Path) -> None:
    """Write config, tokenizer and feature extractor into a folder."""
    save(module, tokenizer, {}, folder)
    if extractor is not None:
        extractor.save_pretrained(folder)


def save_vision_language(module: Any, processor: Any, folder: Path) -> None:
    """Write config, generation config, and the processor with its tokenizer and image processor into a folder."""
    save(module, processor, {}, folder)
    if module.config.model_type == "qwen2_vl":
        _repeat_text_sizes(folder / "config.json")


def _repeat_text_sizes(path: Path) -> None:
    """Repeat the sizes of a language model beside its config of texts.

    There the hub's configs of Qwen2-VL have them, and transformers.js reads them for the empty cache; transformers 5
    writes them into ``text_config`` alone.
    """
    content = read_json(path, OBJECT, remedy="export the model again")
    text = content["text_config"]
    assert isinstance(text, dict)
    own = {name: text[name] for name in TEXT_SIZES}
    path.write_text(json.dumps(own | content, indent=2) + "\n", encoding="utf-8")


def _state_sides(processor: Any) -> None:
    """Have a tokenizer write the sides on which it pads and cuts.

    transformers writes them only if the files of the tokenizer stated them: neither those of a class, such as XLNet's,
    which pads on the left, nor those that were set later.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    stated = getattr(tokenizer, "init_kwargs", None)
    if isinstance(stated, dict):
        stated |= {name: value for name in SIDES if (value := getattr(tokenizer, name, None)) is not None}


def _forget_last_call(processor: Any) -> None:
    """Have a tokenizer write no truncation and no padding into tokenizer.json.

    transformers sets both at every call, and writes those of the last one, such as the length of the texts that were
    scored. The library tokenizers, which reads the file alone, would cut and pad by them.
    """
    backend = getattr(getattr(processor, "tokenizer", processor), "backend_tokenizer", None)
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()


def _use_older_tokenizer_class(path: Path) -> None:
    """Replace a tokenizer class that transformers 4, which Optimum needs, does not have by an equivalent one."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if '"TokenizersBackend"' in text:
        path.write_text(text.replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'), encoding="utf-8")
