"""Schemas of the model's own files in an exported folder, as far as the model card reads them.

The files are written by timm, transformers and sentence-transformers, which add keys of their own. A file that does not
fit its schema counts as missing: the card then gives no recipe for the preprocessing, and states that.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, JsonValue, TypeAdapter, with_config
from typing_extensions import TypedDict

from compressor.workspace.json_files import JsonFileError, read_json

_OPEN = ConfigDict(extra="allow")
Side = Annotated[int, Field(ge=1, le=1_000_000)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Sides = dict[str, Side | None]
Channels = Annotated[list[Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=1)]


@with_config(_OPEN)
class TimmConfig(TypedDict, total=False):
    """The ``pretrained_cfg`` of timm's config.json."""

    input_size: tuple[Side, Side, Side]
    mean: Channels
    std: Channels
    crop_mode: str | None
    crop_pct: Positive | None
    interpolation: str
    license: str | None


@with_config(_OPEN)
class Input(TypedDict):
    """The shape of a sample and the type of an input of a user's module."""

    shape: list[Annotated[int, Field(ge=0)]]
    dtype: Annotated[str, Field(pattern=r"^torch\.[a-z0-9_]+$")]


@with_config(_OPEN)
class Config(TypedDict, total=False):
    """config.json of timm, of transformers or of a user's module."""

    pretrained_cfg: TimmConfig | None
    architectures: list[str] | None
    max_position_embeddings: int | None
    eos_token_id: int | list[int] | None
    bos_token_id: int | list[int] | None
    vision_config: dict[str, JsonValue] | None
    vision_start_token_id: int
    vision_end_token_id: int
    num_query_tokens: int
    model_type: str
    inputs: dict[str, Input]


@with_config(_OPEN)
class GenerationConfig(TypedDict, total=False):
    """generation_config.json of transformers."""

    eos_token_id: int | list[int] | None
    suppress_tokens: list[int] | None
    begin_suppress_tokens: list[int] | None
    bad_words_ids: list[list[int]] | None


@with_config(_OPEN)
class Processor(TypedDict, total=False):
    """preprocessor_config.json of transformers."""

    image_processor_type: str | None
    feature_extractor_type: str | None
    do_resize: bool | None
    do_center_crop: bool | None
    do_rescale: bool | None
    do_normalize: bool | None
    do_pad: bool | None
    size: Sides | None
    crop_size: Sides | None
    rescale_factor: float | None
    resample: int | None
    image_mean: Channels | None
    image_std: Channels | None


@with_config(_OPEN)
class AddedToken(TypedDict):
    """A token of tokenizer.json outside of the vocabulary, or a special token of tokenizer_config.json."""

    content: str


@with_config(_OPEN)
class NumberedToken(AddedToken):
    """A token of tokenizer.json with its id."""

    id: int


@with_config(_OPEN)
class Vocabulary(TypedDict, total=False):
    """The model of tokenizer.json: ids by token, or tokens with scores in the order of their ids."""

    vocab: dict[str, int] | list[tuple[str, float]]


@with_config(_OPEN)
class TemplateToken(TypedDict):
    """A special token in the template of tokenizer.json."""

    id: str


@with_config(_OPEN)
class TemplatePiece(TypedDict, total=False):
    """A part of the template of tokenizer.json: a special token, or the place of a text."""

    SpecialToken: TemplateToken


@with_config(_OPEN)
class TemplateIds(TypedDict):
    """The ids of a special token of the template of tokenizer.json."""

    ids: list[int]


@with_config(_OPEN)
class PostProcessor(TypedDict, total=False):
    """The part of tokenizer.json that adds special tokens to a text; only templates have these fields."""

    single: list[TemplatePiece]
    special_tokens: dict[str, TemplateIds]


@with_config(_OPEN)
class TokenizerFile(TypedDict, total=False):
    """tokenizer.json of the library tokenizers."""

    added_tokens: list[NumberedToken]
    model: Vocabulary
    post_processor: PostProcessor | None


@with_config(_OPEN)
class TokenizerConfig(TypedDict, total=False):
    """tokenizer_config.json of transformers."""

    model_max_length: int | float | None
    pad_token: str | AddedToken | None
    eos_token: str | AddedToken | None
    padding_side: Literal["right", "left"]
    truncation_side: Literal["right", "left"]


@with_config(_OPEN)
class SentenceConfig(TypedDict, total=False):
    """sentence_bert_config.json of sentence-transformers."""

    max_seq_length: int | None


@with_config(_OPEN)
class PromptConfig(TypedDict, total=False):
    """config_sentence_transformers.json of sentence-transformers."""

    prompts: dict[str, str] | None
    default_prompt_name: str | None


_SCHEMAS: Mapping[str, TypeAdapter[Any]] = {
    "config.json": TypeAdapter(Config),
    "generation_config.json": TypeAdapter(GenerationConfig),
    "preprocessor_config.json": TypeAdapter(Processor),
    "tokenizer.json": TypeAdapter(TokenizerFile),
    "tokenizer_config.json": TypeAdapter(TokenizerConfig),
    "sentence_bert_config.json": TypeAdapter(SentenceConfig),
    "config_sentence_transformers.json": TypeAdapter(PromptConfig),
}


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """Return the content of one of the files above; empty if it is missing or does not fit its schema."""
    try:
        content: dict[str, Any] = read_json(folder / name, _SCHEMAS[name], remedy="export the model again")
    except (FileNotFoundError, JsonFileError):
        return {}
    return content
