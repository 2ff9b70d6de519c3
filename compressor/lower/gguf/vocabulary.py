"""The tokenizer and the chat template of a model as metadata of a GGUF file."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from compressor.choices import GGUF
from compressor.internals.gguf import bounded_reader
from compressor.internals.transformers import quiet
from compressor.lower.gguf.rules import GgufError
from compressor.workspace.json_files import OBJECT, read_json

if TYPE_CHECKING:
    from compressor.models import Model

PREFIX = "tokenizer."
# Names that llama.cpp has for the splits of texts that transformers knows too; of several names of one, the usual one.
NAMED_SPLITS = ("llama-bpe", "tekken", "qwen2", "gpt-4o")
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
LOWEST = -1e6  # score of a token that no merge makes
ADVICE = "choose another --target, or give the model as the .gguf file that others converted"


def check_tokenizer(model: Model) -> None:
    """Refuse a model whose tokenizer a GGUF file cannot hold, before a search.

    Raises:
        GgufError: the model has no tokenizer, or one of a kind that this package does not convert.
    """
    if model.gguf_file is None:
        with _files(model) as folder:
            _kind(model, folder)


def add_vocabulary(writer: Any, model: Model, rows: int) -> None:
    """Write tokenizer and chat template: those of the model's own GGUF file, else of its tokenizer.json.

    Args:
        writer: a `gguf.GGUFWriter`.
        model: the model.
        rows: rows of the embedding; tokens without a text fill the vocabulary up to them.

    Raises:
        GgufError: the tokenizer cannot be converted.
    """
    if model.gguf_file is not None:
        for field in bounded_reader(model.gguf_file).fields.values():
            if field.name.startswith(PREFIX):
                array = field.types[-1] if len(field.types) > 1 else None
                writer.add_key_value(field.name, field.contents(), field.types[0], array)
        return
    with _files(model) as folder:
        _add_converted(writer, model, Path(folder), rows)


def _files(model: Model) -> tempfile.TemporaryDirectory[str]:
    """Return a temporary folder with the files of the model's tokenizer and config."""
    folder = tempfile.TemporaryDirectory()
    with quiet():
        model.save(Path(folder.name))
    return folder


def _kind(model: Model, folder: str) -> tuple[dict[str, Any], str, str]:
    """Return the content of tokenizer.json, and llama.cpp's names of the tokenizer and of its pre-tokenizer."""
    path = Path(folder, "tokenizer.json")
    if model.tokenizer is None or not path.is_file():
        raise GgufError(f"--target {GGUF} needs the tokenizer of {model.name} as a tokenizer.json; {ADVICE}.")
    content = cast(dict[str, Any], read_json(path, OBJECT, remedy="save the tokenizer again"))
    inner = content["model"]
    if inner["type"] == "BPE" and inner.get("byte_fallback"):
        return content, "llama", "default"
    if inner["type"] == "BPE" and (content.get("decoder") or {}).get("type") == "ByteLevel":
        return content, "gpt2", _pre_tokenizer(model, content)
    raise GgufError(
        f"--target {GGUF}: the tokenizer of {model.name} is {inner['type']}, and this package converts byte-level BPE "
        f"and BPE with byte fallback; {ADVICE}."
    )


def _pre_tokenizer(model: Model, content: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of a byte-level pre-tokenizer.

    Raises:
        GgufError: llama.cpp has no such pre-tokenizer, as far as this package knows.
    """
    outer = content.get("pre_tokenizer") or {}
    parts = outer.get("pretokenizers", [outer])
    shapes = [_shape(part) for part in parts]
    splits = _splits()
    if content.get("normalizer") is not None:
        shapes.insert(0, f"normalized by {content['normalizer'].get('type')}")
    elif not outer.get("add_prefix_space"):
        if shapes == ["ByteLevel by GPT-2"]:
            return "gpt-2"
        if shapes == ["Digits", "ByteLevel by GPT-2"]:
            return "smollm"
        if len(shapes) == 2 and shapes[0] in splits and shapes[1] == "ByteLevel":
            chosen = splits[shapes[0]]
            # llama.cpp takes a whole word that is in the vocabulary before any merge with the first name alone.
            return chosen if chosen != "llama-bpe" or content["model"].get("ignore_merges") else "smaug-bpe"
    raise GgufError(
        f"--target {GGUF}: the tokenizer of {model.name} splits texts by {', '.join(shapes)}, for which this package "
        f"knows no name of llama.cpp; {ADVICE}."
    )


def _splits() -> dict[str, str]:
    """Return llama.cpp's name of each regular expression that splits texts (transformers knows them since 5.24)."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:
        return {}
    return {GGUF_PRE_TOKENIZER_SPLITS[name]: name for name in NAMED_SPLITS if name in GGUF_PRE_TOKENIZER_SPLITS}


def _shape(part: Mapping[str, Any]) -> str:
    """Return the kind of a pre-tokenizer, with what tells it from others of the kind."""
    kind = str(part.get("type", "nothing"))
    if kind == "ByteLevel" and part.get("use_regex", True):
        return "ByteLevel by GPT-2"
    if kind == "Digits" and not part.get("individual_digits"):
        return "Digits in groups"
    if kind == "Split":
        return str(part["pattern"].get("Regex", part["pattern"]))
    return kind


def _add_converted(writer: Any, model: Model, folder: Path, rows: int) -> None:
    import gguf

    content, kind, pre_tokenizer = _kind(model, str(folder))
    texts = {number: text for text, number in content["model"]["vocab"].items()}
    added = {token["id"]: token for token in content["added_tokens"]}
    texts |= {number: token["content"] for number, token in added.items()}
    if max(texts) >= rows:
        raise GgufError(
            f"--target {GGUF}: the tokenizer of {model.name} has {max(texts) + 1} tokens, and its embedding {rows} "
            f"rows; {ADVICE}."
        )
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list([texts.get(number, f"[PAD{number}]") for number in range(rows)])
    writer.add_token_types([_type(number, texts, added, content, kind) for number in range(rows)])
    if kind == "llama":
        ranks = _ranks(content["model"]["merges"])
        writer.add_token_scores([ranks.get(texts.get(number, ""), LOWEST) for number in range(rows)])
        writer.add_add_space_prefix(_begins_with_space(model))
    special = gguf.SpecialVocab(folder, load_merges=kind == "gpt2", n_vocab=rows)
    # The class reads these from the files and misses some, so they are those that the tokenizer really adds.
    tokens = model.tokenizer("a").input_ids
    special.add_special_token = {
        "bos": tokens[0] == model.tokenizer.bos_token_id,
        "eos": tokens[-1] == model.tokenizer.eos_token_id,
    }
    special.add_to_gguf(writer, quiet=True)


def _type(
    number: int, texts: Mapping[int, str], added: Mapping[int, Any], content: Mapping[str, Any], kind: str
) -> int:
    """Return the type of a token in llama.cpp's numbers."""
    import gguf

    types = gguf.TokenType
    text = texts.get(number)
    if text is None:
        return int(types.UNUSED)
    if kind == "llama" and text == content["model"].get("unk_token"):
        return int(types.UNKNOWN)
    if number in added:
        return int(types.CONTROL if added[number]["special"] else types.USER_DEFINED)
    return int(types.BYTE if kind == "llama" and BYTE.fullmatch(text) else types.NORMAL)


def _ranks(merges: list[Any]) -> dict[str, float]:
    """Return the score of each token that a merge makes: the earlier the merge, the higher.

    llama.cpp's SentencePiece tokenizer joins the pair whose token has the highest score, as BPE takes the first merge.
    """
    ranks: dict[str, float] = {}
    for rank, merge in enumerate(merges):
        left, right = merge if isinstance(merge, list) else merge.split(" ")
        ranks.setdefault(left + right, -float(rank))
    return ranks


def _begins_with_space(model: Model) -> bool:
    """Return whether the tokenizer puts a space before a text."""
    first = model.tokenizer("a", add_special_tokens=False).input_ids[0]
    return str(model.tokenizer.convert_ids_to_tokens(first)).startswith("▁")
