"""Hold a folder to the rules by which serving engines read ``nemotron-nas`` checkpoints.

None of the engines is run. The rules are those of their source code:

- vLLM 0.33.0: `vllm/model_executor/models/nemotron_nas.py`
- SGLang 0.5.23: `sglang/srt/models/nemotron_nas.py`, `sglang/srt/configs/model_config.py`
- TensorRT-LLM, branch main of 2026: `tensorrt_llm/_torch/models/modeling_nemotron_nas.py`
- llama.cpp of August 2026: `conversion/deci.py`, `gguf-py/gguf/vocab.py`, `src/models/deci.cpp`

The first three take the config from transformers, which has no class for this model type. NVIDIA's checkpoints bring
one as code. The model card registers a class instead, because the folder holds no code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.models.text.block_configs import ARCHITECTURE, MODEL_TYPE, mlp_width
from compressor.workspace.json_files import OBJECT, read_json

BPE_TOKENS = 128_256  # of Llama 3; the converter of llama.cpp writes a byte-level vocabulary of this size only
_DAMAGED = "export the model again"
CONVERTED_ROPE = ("default", "llama3")  # llama.cpp's converter writes the parameters of no other kind


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds.

    Attributes:
        config: the content of config.json.
        tensors: the shapes of all weights by name.
        tokenizer: the content of tokenizer.json; empty without one.
        code: the names of files with code.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, tuple[int, ...]]
    tokenizer: Mapping[str, Any]
    code: tuple[str, ...]

    @staticmethod
    def read(folder: Path) -> Checkpoint:
        """Read a folder; of the weights, only the names and shapes.

        Raises:
            JsonFileError: a JSON file is damaged.
            FileNotFoundError: the folder has no config.json.
        """
        from safetensors import safe_open

        tensors: dict[str, tuple[int, ...]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="numpy") as file:
                tensors |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        config: dict[str, Any] = read_json(folder / "config.json", OBJECT, remedy=_DAMAGED)
        tokenizer: dict[str, Any] = {}
        if (folder / "tokenizer.json").is_file():
            tokenizer = read_json(folder / "tokenizer.json", OBJECT, remedy=_DAMAGED)
        return Checkpoint(config, tensors, tokenizer, tuple(sorted(path.name for path in folder.glob("*.py"))))

    @property
    def blocks(self) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
        """The entries of attention and MLP of each block."""
        return [(entry["attention"], entry["ffn"]) for entry in self.config["block_configs"]]

    @property
    def head_width(self) -> int:
        """Number of features of a head."""
        config = self.config
        return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


Rule = Callable[[Checkpoint], Iterator[str]]


def serving(folder: Path) -> dict[str, Any]:
    """Return the ``serving`` part of a report: for each engine, why it does not open the folder, or None if it does.

    Return an empty mapping for a checkpoint of another form.
    """
    checkpoint = Checkpoint.read(folder)
    if checkpoint.config.get("model_type") != MODEL_TYPE:
        return {}
    return {"serving": {"form": MODEL_TYPE, "engines": verdicts(checkpoint)}}


def verdicts(checkpoint: Checkpoint) -> dict[str, str | None]:
    """Return for each engine the first of its rules that a checkpoint breaks, as a clause; None if it breaks none."""
    fault = next(_form(checkpoint), None)  # the other rules read the entries that this one checks
    if fault is not None:
        return dict.fromkeys(ENGINES, fault)
    return {
        engine: next((reason for rule in rules for reason in rule(checkpoint)), None)
        for engine, rules in ENGINES.items()
    }


# ------------------------------------------------------------------------------------------------ rules of all engines


def _form(checkpoint: Checkpoint) -> Iterator[str]:
    config = checkpoint.config
    if config.get("architectures") != [ARCHITECTURE] or config.get("model_type") != MODEL_TYPE:
        yield f"config.json does not name {ARCHITECTURE} and {MODEL_TYPE}"
    entries = config.get("block_configs")
    if not isinstance(entries, list) or len(entries) != config.get("num_hidden_layers"):
        yield "block_configs does not have an entry for each layer"
        return
    for number, entry in enumerate(entries):
        parts = [entry.get(name) if isinstance(entry, Mapping) else None for name in ("attention", "ffn")]
        if not all(isinstance(part, Mapping) and isinstance(part.get("no_op"), bool) for part in parts):
            yield f"block {number} does not state attention.no_op and ffn.no_op"
            return


def _no_code(checkpoint: Checkpoint) -> Iterator[str]:
    if checkpoint.code or "auto_map" in checkpoint.config:
        yield f"the folder holds code ({', '.join(checkpoint.code) or 'auto_map in config.json'}), which it should not"


def _silu(checkpoint: Checkpoint) -> Iterator[str]:
    found = checkpoint.config.get("hidden_act")
    if found != "silu":
        yield f"it has the activation silu only, and the config names {found}"


def _groups(checkpoint: Checkpoint) -> Iterator[str]:
    heads = checkpoint.config["num_attention_heads"]
    for number, (attention, _) in enumerate(checkpoint.blocks):
        group = attention.get("n_heads_in_group")
        if not attention["no_op"] and (type(group) is not int or group < 1 or heads % group):
            yield f"n_heads_in_group of block {number} is {group}, no divisor of {heads} heads"


def _no_window(checkpoint: Checkpoint) -> Iterator[str]:
    windows = [attention.get("window_length") for attention, _ in checkpoint.blocks]
    if checkpoint.config.get("sliding_window") is not None or any(windows):
        yield "it has no sliding window, and the config names one"


def _tensors(checkpoint: Checkpoint) -> Iterator[str]:
    expected, found = dict(_expected(checkpoint)), checkpoint.tensors
    if checkpoint.config.get("tie_word_embeddings") and "lm_head.weight" not in found:
        expected.pop("lm_head.weight")
    for name in [*expected, *found]:
        if name not in found:
            yield f"the weights {name} are missing"
        elif name not in expected:
            yield f"the weights {name} belong to no branch of the config"
        elif found[name] != expected[name]:
            shapes = f"{list(found[name])}, but the config implies {list(expected[name])}"
            yield f"the weights {name} have the shape {shapes}"


def _expected(checkpoint: Checkpoint) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the weights that a config implies, with their shapes."""
    config = checkpoint.config
    hidden, heads, head = config["hidden_size"], config["num_attention_heads"], checkpoint.head_width
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    yield "lm_head.weight", (config["vocab_size"], hidden)
    yield "model.norm.weight", (hidden,)
    for number, (attention, ffn) in enumerate(checkpoint.blocks):
        block = f"model.layers.{number}"
        if not attention["no_op"]:
            yield f"{block}.input_layernorm.weight", (hidden,)
            keys = heads // attention["n_heads_in_group"] * head
            shapes = {
                "q": (heads * head, hidden),
                "k": (keys, hidden),
                "v": (keys, hidden),
                "o": (hidden, heads * head),
            }
            yield from _layers(f"{block}.self_attn", shapes, biased=config.get("attention_bias", False))
        if not ffn["no_op"]:
            yield f"{block}.post_attention_layernorm.weight", (hidden,)
            width = _width(ffn, hidden)
            shapes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
            yield from _layers(f"{block}.mlp", shapes, biased=config.get("mlp_bias", False))


def _layers(path: str, shapes: Mapping[str, tuple[int, int]], *, biased: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, shape in shapes.items():
        yield f"{path}.{name}_proj.weight", shape
        if biased:
            yield f"{path}.{name}_proj.bias", shape[:1]


def _width(ffn: Mapping[str, Any], hidden_size: int) -> int:
    if ffn.get("ffn_mult") is not None:
        return mlp_width(ffn["ffn_mult"], hidden_size)
    return int(ffn.get("intermediate_size") or 0)


# ----------------------------------------------------------------------------------------------- rules of some engines


def _first_attention(checkpoint: Checkpoint) -> Iterator[str]:
    if checkpoint.blocks[0][0]["no_op"]:
        yield "it needs the attention of the first block"


def _multiples(checkpoint: Checkpoint) -> Iterator[str]:
    for number, (_, ffn) in enumerate(checkpoint.blocks):
        if not ffn["no_op"] and ffn.get("ffn_mult") is None:
            width = ffn.get("intermediate_size")
            yield f"it reads the width of an MLP from ffn_mult, which has no value for the {width} of block {number}"


def _widths(checkpoint: Checkpoint) -> Iterator[str]:
    for number, (_, ffn) in enumerate(checkpoint.blocks):
        if not ffn["no_op"] and "ffn_mult" in ffn and ffn["ffn_mult"] is None:
            yield f"it reads ffn_mult of block {number}, which is null, before intermediate_size"
        elif not ffn["no_op"] and not _width(ffn, checkpoint.config["hidden_size"]):
            yield f"block {number} states no width of its MLP"


def _mapped(checkpoint: Checkpoint) -> Iterator[int]:
    """Yield the blocks with a linear map in place of a branch."""
    for number, parts in enumerate(checkpoint.blocks):
        if any(part.get("replace_with_linear") for part in parts):
            yield number


def _no_maps(checkpoint: Checkpoint) -> Iterator[str]:
    for number in _mapped(checkpoint):
        yield f"it has no linear maps, and block {number} has one in place of a branch"


def _unknown_maps(checkpoint: Checkpoint) -> Iterator[str]:
    for number in _mapped(checkpoint):
        yield f"it reads linear maps, as in block {number}, by rules that Compressor does not check"


def _one_group(checkpoint: Checkpoint) -> Iterator[str]:
    groups = {attention["n_heads_in_group"] for attention, _ in checkpoint.blocks if not attention["no_op"]}
    if len(groups) != 1:
        yield "it needs the same number of heads of keys and values in all attentions"


def _no_attention_bias(checkpoint: Checkpoint) -> Iterator[str]:
    if checkpoint.config.get("attention_bias"):
        yield "its attention has no biases"


def _no_mlp_bias(checkpoint: Checkpoint) -> Iterator[str]:
    if checkpoint.config.get("mlp_bias"):
        yield "its MLP has no biases"


def _all_keys(checkpoint: Checkpoint) -> Iterator[str]:
    for number, (attention, ffn) in enumerate(checkpoint.blocks):
        if not {"n_heads_in_group", "replace_with_linear"} <= attention.keys() or "ffn_mult" not in ffn:
            yield f"it reads n_heads_in_group, replace_with_linear and ffn_mult of each block; block {number} lacks one"
        elif (attention["n_heads_in_group"] is None) != attention["no_op"]:
            yield f"it tells attention by n_heads_in_group, which contradicts no_op in block {number}"
        elif (ffn["ffn_mult"] is None) != ffn["no_op"]:
            yield f"it tells an MLP by ffn_mult, which contradicts no_op in block {number}"
    if type(checkpoint.blocks[0][1].get("ffn_mult")) is int:
        yield "it needs a decimal point in the ffn_mult of the first block"


def _mlps_stay(checkpoint: Checkpoint) -> Iterator[str]:
    for number, (attention, ffn) in enumerate(checkpoint.blocks):
        if ffn["no_op"] and not attention["no_op"]:
            yield f"it would skip the attention of block {number} too, as that block has no MLP"


def _plain_heads(checkpoint: Checkpoint) -> Iterator[str]:
    plain = checkpoint.config["hidden_size"] // checkpoint.config["num_attention_heads"]
    if checkpoint.head_width != plain:
        yield f"it takes heads of {plain} features, and the config states head_dim {checkpoint.head_width}"


def _convertible_rope(checkpoint: Checkpoint) -> Iterator[str]:
    parameters = checkpoint.config.get("rope_parameters") or checkpoint.config.get("rope_scaling") or {}
    kind = parameters.get("rope_type", "default")
    if kind not in CONVERTED_ROPE:
        yield f"its converter writes the positions {' and '.join(CONVERTED_ROPE)}, and the config names {kind}"


def _convertible_tokenizer(checkpoint: Checkpoint) -> Iterator[str]:
    tokens, model = checkpoint.config["vocab_size"], checkpoint.tokenizer.get("model", {})
    if not model:
        yield "its converter needs a tokenizer.json"
    elif tokens != BPE_TOKENS and not (
        model.get("type") == "BPE"
        and model.get("byte_fallback")
        and (checkpoint.tokenizer.get("decoder") or {}).get("type") == "Sequence"
    ):
        yield (
            f"its converter takes the tokenizer of Llama 2, or a byte-level one of {BPE_TOKENS:,} tokens, and this one "
            f"has {tokens:,}"
        )


_COMMON: tuple[Rule, ...] = (_no_code, _silu, _no_window, _groups)
ENGINES: Mapping[str, tuple[Rule, ...]] = {
    "vLLM": (*_COMMON, _no_maps, _first_attention, _widths, _tensors),
    "SGLang": (*_COMMON, _no_maps, _one_group, _multiples, _no_mlp_bias, _tensors),
    "TensorRT-LLM": (*_COMMON, _unknown_maps, _multiples, _no_attention_bias, _no_mlp_bias, _tensors),
    "llama.cpp": (
        *_COMMON,
        _unknown_maps,
        _first_attention,
        _mlps_stay,
        _multiples,
        _all_keys,
        _plain_heads,
        _convertible_rope,
        _tensors,
        _convertible_tokenizer,
    ),
}
