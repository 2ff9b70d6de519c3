"""Sentence embeddings, computed as sentence-transformers computes them from the modules that ``modules.json`` lists.

The modules follow release 6.2 of sentence-transformers; files of older releases are read too. Its code is not needed,
and a name in a file only selects an entry of a table in this module.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from compressor.limitations import Limitation
from compressor.models.base import Model, ModelError, load_error_reason
from compressor.models.preprocess import Preprocess, Tokenise
from compressor.workspace.json_files import JSON, JsonFileError, read_json

MODULES = "modules.json"
SETTINGS = "config_sentence_transformers.json"
ENCODER_SETTINGS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
HEAD = "sentence_head"  # name of the submodule that computes the embedding from the hidden states
WITHOUT = "pass --task feature-extraction to export the hidden states without the embedding"

TOKENS, EMBEDDING = "token_embeddings", "sentence_embedding"
KINDS = {
    "Transformer": "transformer",
    "Pooling": "pooling",
    "Dense": "dense",
    "LayerNorm": "layer_norm",
    "Dropout": "dropout",
    "Normalize": "normalize",
}
PACKAGES = ("models", "base.modules", "sentence_transformer.modules")  # of Python, by release
# Name in `pooling_mode`, and the flag of older releases, in the order in which the library concatenates them.
POOLINGS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
ACTIVATIONS: Mapping[str, type[torch.nn.Module]] = {
    kind.__name__: kind
    for kind in (
        torch.nn.CELU, torch.nn.ELU, torch.nn.GELU, torch.nn.Hardsigmoid, torch.nn.Hardswish, torch.nn.Hardtanh,
        torch.nn.Identity, torch.nn.LeakyReLU, torch.nn.LogSigmoid, torch.nn.Mish, torch.nn.ReLU, torch.nn.ReLU6,
        torch.nn.SELU, torch.nn.Sigmoid, torch.nn.SiLU, torch.nn.Softplus, torch.nn.Softsign, torch.nn.Tanh,
        torch.nn.Tanhshrink,
    )
}  # fmt: skip
# Settings of the transformer that do not change what `encode` returns.
WITHOUT_EFFECT = ("unpad_inputs", "query_length", "document_length", "query_expansion")

Find = Callable[[str], Path | None]
Features = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Listed:
    """An entry of ``modules.json``: the kind of a module, the folder of its files, and its place in the list."""

    kind: str
    path: str
    position: int

    @property
    def name(self) -> str:
        """Name of the submodule, such as ``2_Dense``."""
        return f"{self.position}_{self.kind}"

    @property
    def config(self) -> str:
        """Name of its config file."""
        return f"{self.path}/config.json"


# --------------------------------------------------------------------------------------------------------------- files


def find_files(find: Find) -> dict[str, Path]:
    """Return the JSON files of sentence-transformers by name, without the weights of its modules.

    Args:
        find: returns the path of a file of the model by its name, None if the model does not have it.
    """
    names = [MODULES, SETTINGS, ENCODER_SETTINGS[0]]
    files = {name: path for name in names if (path := find(name)) is not None}
    if MODULES not in files:
        return files
    names = [*ENCODER_SETTINGS[1:]] if ENCODER_SETTINGS[0] not in files else []
    names += [each.config for each in _listed(files[MODULES])]
    return files | {name: path for name in names if (path := find(name)) is not None}


def _listed(path: Path) -> list[Listed]:
    """Return the entries of ``modules.json`` that are supported and have a folder; none if it is damaged."""
    try:
        return [each for each in read_modules(path, "") if each.path]
    except ModelError:
        return []  # `embedding` reports it; a model with another head does not need these files


def read_modules(path: Path, location: str) -> list[Listed]:
    """Read ``modules.json``.

    Args:
        path: the file.
        location: the model in messages.

    Raises:
        ModelError: a module is not supported, its folder is not a plain relative path, or the first module is not a
            Transformer whose files are in the folder of the model.
    """
    content = _json(path, MODULES, location, list)
    modules = [_entry(entry, position, location) for position, entry in enumerate(content)]
    if [each.kind for each in modules].count("Transformer") != 1 or modules[0].kind != "Transformer":
        raise ModelError(
            f"{MODULES} of {location} lists {', '.join(each.kind for each in modules) or 'no modules'}; expected "
            f"one Transformer, which is the first; {WITHOUT}."
        )
    if modules[0].path:
        raise ModelError(
            f"{MODULES} of {location} has its Transformer in {modules[0].path}, but expected in the folder of the "
            "model; load and save the model with a newer release of sentence-transformers."
        )
    return modules


def _entry(entry: Any, position: int, location: str) -> Listed:
    kind, path = (entry.get(key) if isinstance(entry, dict) else None for key in ("type", "path"))
    names = {
        f"sentence_transformers.{package}.{name}": known
        for known, file in KINDS.items()
        for package in PACKAGES
        for name in (known, f"{known}.{known}", f"{file}.{known}")
    }
    if not isinstance(kind, str) or kind not in names:
        raise ModelError(
            f"{MODULES} of {location} lists a module of type {kind}, which is not supported; expected "
            f"{', '.join(KINDS)} of sentence-transformers; {WITHOUT}."
        )
    if not isinstance(path, str) or not re.fullmatch(r"|\w[\w.-]*(/\w[\w.-]*)*", path):
        raise ModelError(f"{MODULES} of {location} has the path {path!r}; expected a name such as 1_Pooling.")
    return Listed(names[kind], path, position)


def _json(path: Path, name: str, location: str, kind: type) -> Any:
    try:
        content = read_json(path, JSON, remedy="download the model again")
    except (FileNotFoundError, JsonFileError) as error:
        raise ModelError(f"{name} of {location} cannot be read as JSON: {error}") from error
    if not isinstance(content, kind):
        raise ModelError(
            f"{name} of {location} holds a {type(content).__name__}; expected a {kind.__name__} as "
            "sentence-transformers writes it."
        )
    return content


def _config(files: Mapping[str, Path], name: str, location: str) -> dict[str, Any]:
    """Return the content of a config file; an empty dict if the model does not have it."""
    content: dict[str, Any] = _json(files[name], name, location, dict) if name in files else {}
    return content


def _encoder_settings(files: Mapping[str, Path], location: str) -> tuple[str, dict[str, Any]]:
    """Return the name and the content of the settings of the transformer; an empty dict without a file."""
    name = next((name for name in ENCODER_SETTINGS if name in files), ENCODER_SETTINGS[0])
    return name, _config(files, name, location)


# ------------------------------------------------------------------------------------------------------------- modules


class Pooling(torch.nn.Module):
    """Pooling of hidden states over the tokens of a text: ``sentence_transformers.models.Pooling``.

    Args:
        modes: keys of `POOLINGS`; their results are concatenated.
        prompt: number of tokens at the start of every text that are not pooled.
        padded_left: whether padding may precede the tokens of a text.
    """

    def __init__(self, modes: Sequence[str], prompt: int, padded_left: bool) -> None:
        super().__init__()
        self.modes, self.prompt, self.padded_left = tuple(modes), prompt, padded_left

    def forward(self, features: Features) -> None:
        """Add the embedding [batch, modes x width] of the hidden states [batch, tokens, width]."""
        states, mask = features[TOKENS], features["attention_mask"]
        first, positions = mask.argmax(1, keepdim=True), torch.arange(states.shape[1], device=states.device)[None]
        pooled = mask * (positions >= first + self.prompt).to(mask.dtype) if self.prompt else mask
        weights = pooled * (positions + 1 - first).to(mask.dtype)
        features[EMBEDDING] = torch.cat([self._pool(mode, states, pooled, weights) for mode in self.modes], -1)

    def _pool(self, mode: str, states: torch.Tensor, mask: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if mode == "cls":
            anywhere = self.padded_left or self.prompt
            return _token(states, mask.argmax(1)) if anywhere else states[:, 0]
        if mode == "lasttoken":
            last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
            return _token(states * mask.unsqueeze(-1), last)
        if mode == "max":
            return states.masked_fill(mask.unsqueeze(-1) == 0, -torch.inf).amax(1)
        counted = weights if mode == "weightedmean" else mask
        total = counted.sum(1, keepdim=True).clamp(min=1e-9)
        return (states * counted.unsqueeze(-1)).sum(1) / (total.sqrt() if mode == "mean_sqrt_len_tokens" else total)


def _token(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return the hidden state [batch, width] of one token of each row."""
    return states.gather(1, index[:, None, None].expand(-1, 1, states.shape[-1])).squeeze(1)


class Feature(torch.nn.Module):
    """A module that computes one feature from another."""

    def __init__(self, source: str, destination: str) -> None:
        super().__init__()
        self.source, self.destination = source, destination

    def forward(self, features: Features) -> None:
        """Replace or add the feature."""
        features[self.destination] = self.computed(features[self.source])

    def computed(self, value: torch.Tensor) -> torch.Tensor:
        """Return the value itself, as dropout does after training."""
        return value


class Normalize(Feature):
    """Division by the Euclidean norm: ``sentence_transformers.models.Normalize``."""

    def computed(self, value: torch.Tensor) -> torch.Tensor:
        """Return vectors [..., width] of norm 1."""
        return torch.nn.functional.normalize(value, p=2, dim=-1)


class LayerNorm(Feature):
    """Layer normalization: ``sentence_transformers.models.LayerNorm``."""

    def __init__(self, width: int) -> None:
        super().__init__(EMBEDDING, EMBEDDING)
        self.norm = torch.nn.LayerNorm(width)

    def computed(self, value: torch.Tensor) -> torch.Tensor:
        """Return the normalized value [..., width]."""
        normalized: torch.Tensor = self.norm(value)
        return normalized


class Dense(Feature):
    """A linear layer with an activation: ``sentence_transformers.models.Dense``.

    Its parameters have the names that the library gives them.
    """

    def __init__(
        self, source: str, destination: str, widths: tuple[int, int], bias: bool, activation: str, residual: bool
    ) -> None:
        super().__init__(source, destination)
        self.linear = torch.nn.Linear(*widths, bias=bias)
        self.activation_function = ACTIVATIONS[activation]()
        self.adds = residual
        if residual and widths[0] != widths[1]:
            self.residual = torch.nn.Linear(*widths, bias=False)

    def computed(self, value: torch.Tensor) -> torch.Tensor:
        """Map [..., in_features] to [..., out_features]."""
        mapped: torch.Tensor = self.activation_function(self.linear(value))
        if not self.adds:
            return mapped
        return mapped + (self.residual(value) if hasattr(self, "residual") else value)


class SentenceHead(torch.nn.Module):
    """The modules of a sentence embedding after the transformer, in order.

    Args:
        modules: the modules by the entries of ``modules.json``.
        width: number of values to which the embedding is truncated; None keeps all.
    """

    def __init__(self, modules: Mapping[Listed, torch.nn.Module], width: int | None) -> None:
        super().__init__()
        self.folders = {listed.name: listed.path for listed in modules}
        self.width = width
        for listed, module in modules.items():
            self.add_module(listed.name, module)

    def forward(self, states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Return the embedding [batch, width] of hidden states [batch, tokens, width] with a mask [batch, tokens]."""
        ones = torch.ones_like(states[..., 0])
        features = {TOKENS: states, "attention_mask": ones if mask is None else mask.to(states.dtype)}
        for module in self.children():
            module(features)
        return features[EMBEDDING][..., : self.width]


# ------------------------------------------------------------------------------------------------------------- reading


class _Reader:
    """Builds the modules of a model from their configs and checks that they fit together."""

    def __init__(self, files: Mapping[str, Path], find: Find | None, location: str, prompt: int, left: bool) -> None:
        self.files, self.find, self.location = files, find, location
        self.prompt, self.left = prompt, left
        self.widths: dict[str, int] = {}

    def head(self, modules: Sequence[Listed], width: int, truncated: int | None) -> SentenceHead:
        """Return the modules for hidden states of a width, without the Transformer itself.

        Raises:
            ModelError: a config or the weights of a module do not fit.
        """
        self.widths = {TOKENS: width}
        built = {each: self._module(each) for each in modules if each.kind != "Transformer"}
        if EMBEDDING not in self.widths:
            kinds = ", ".join(each.kind for each in modules)
            raise ModelError(
                f"{MODULES} of {self.location} lists {kinds}, which compute no sentence embedding; expected a Pooling; "
                f"{WITHOUT}."
            )
        return SentenceHead(built, truncated).eval()

    def _module(self, listed: Listed) -> torch.nn.Module:
        config = _config(self.files, listed.config, self.location) if listed.path else {}
        if not config and listed.kind in ("Pooling", "Dense", "LayerNorm"):
            raise ModelError(f"{self.location} has no {listed.config}, which {MODULES} refers to; add the file.")
        module: torch.nn.Module = getattr(self, f"_{KINDS[listed.kind]}")(listed, config)
        if self.find is not None and module.state_dict():
            self._load(module, listed)
        return module

    def _pooling(self, listed: Listed, config: dict[str, Any]) -> Pooling:
        names = ("word_embedding_dimension", "embedding_dimension", "include_prompt", "pooling_mode")
        self._check_keys(listed, config, (*names, *POOLINGS.values()))
        modes = pooling_modes(config)
        if not modes:
            raise ModelError(
                f"{listed.config} of {self.location} switches every pooling off; expected one of {', '.join(POOLINGS)}."
            )
        unknown = [mode for mode in modes if mode not in POOLINGS]
        if unknown:
            raise ModelError(
                f"{listed.config} of {self.location} sets the pooling {', '.join(unknown)}; expected "
                f"{', '.join(POOLINGS)}; {WITHOUT}."
            )
        prompt = 0 if config.get("include_prompt", True) else self.prompt
        self.widths[EMBEDDING] = len(modes) * self._width(listed, TOKENS)
        return Pooling(modes, prompt, self.left)

    def _dense(self, listed: Listed, config: dict[str, Any]) -> Dense:
        names = ("in_features", "out_features", "bias", "activation_function", "use_residual")
        self._check_keys(listed, config, (*names, "module_input_name", "module_output_name"))
        source, destination = self._names(listed, config)
        activation = config.get("activation_function", "torch.nn.modules.activation.Tanh")
        name = str(activation).rpartition(".")[2]
        if name not in ACTIVATIONS or str(activation) not in _spellings(ACTIVATIONS[name]):
            raise ModelError(
                f"{listed.config} of {self.location} has the activation function {activation}; expected one of "
                f"torch.nn: {', '.join(ACTIVATIONS)}; {WITHOUT}."
            )
        widths = self._sizes(listed, config, "in_features", "out_features")
        self._check_width(listed, source, widths[0])
        self.widths[destination] = widths[1]
        residual = bool(config.get("use_residual", False))
        return Dense(source, destination, widths, bool(config.get("bias", True)), name, residual)

    def _layer_norm(self, listed: Listed, config: dict[str, Any]) -> LayerNorm:
        self._check_keys(listed, config, ("dimension",))
        (width,) = self._sizes(listed, config, "dimension")
        self._check_width(listed, EMBEDDING, width)
        return LayerNorm(width)

    def _dropout(self, listed: Listed, config: dict[str, Any]) -> Feature:
        self._check_keys(listed, config, ("dropout",))
        self._width(listed, EMBEDDING)
        return Feature(EMBEDDING, EMBEDDING)

    def _normalize(self, listed: Listed, config: dict[str, Any]) -> Normalize:
        self._check_keys(listed, config, ("module_input_name", "module_output_name"))
        source, destination = self._names(listed, config)
        self.widths[destination] = self._width(listed, source)
        return Normalize(source, destination)

    def _names(self, listed: Listed, config: dict[str, Any]) -> tuple[str, str]:
        """Return the names of the features that a module reads and writes."""
        source = config.get("module_input_name") or EMBEDDING
        destination = config.get("module_output_name") or source
        self._width(listed, source)
        return source, destination

    def _width(self, listed: Listed, feature: str) -> int:
        if feature not in self.widths:
            raise ModelError(
                f"{listed.name} of {self.location} reads {feature}, which no module before it computes; expected "
                f"{' or '.join(self.widths)}; {WITHOUT}."
            )
        return self.widths[feature]

    def _check_width(self, listed: Listed, feature: str, width: int) -> None:
        if self._width(listed, feature) != width:
            raise ModelError(
                f"{listed.config} of {self.location} is for a width of {width}, but {feature} has "
                f"{self.widths[feature]}; the files are of different models."
            )

    def _sizes(self, listed: Listed, config: dict[str, Any], *names: str) -> tuple[Any, ...]:
        sizes = tuple(config.get(name) for name in names)
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ModelError(f"{listed.config} of {self.location} needs positive numbers for {', '.join(names)}.")
        return sizes

    def _check_keys(self, listed: Listed, config: dict[str, Any], known: Sequence[str]) -> None:
        unknown = sorted(set(config) - set(known))
        if unknown:
            raise ModelError(
                f"{listed.config} of {self.location} sets {', '.join(unknown)}, which is not supported; expected only "
                f"{', '.join(known)}; {WITHOUT}."
            )

    def _load(self, module: torch.nn.Module, listed: Listed) -> None:
        """Load the weights of a module from safetensors, or from a pickle that is restricted to tensors."""
        assert self.find is not None
        names = [f"{listed.path}/{name}" for name in ("model.safetensors", "pytorch_model.bin")]
        found = [(name, path) for name in names if listed.path and (path := self.find(name)) is not None]
        if not found:
            raise ModelError(f"{self.location} has no {names[0]} and no {names[1]}, which {MODULES} refers to.")
        name, path = found[0]
        try:
            weights = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
            module.load_state_dict({key: value.float() for key, value in weights.items()})
        except Exception as error:  # neither library wraps the errors of a damaged file
            raise ModelError(f"{name} of {self.location} cannot be loaded: {load_error_reason(error)}.") from error


def _spellings(kind: type[torch.nn.Module]) -> tuple[str, ...]:
    return (f"{kind.__module__}.{kind.__name__}", f"torch.nn.{kind.__name__}", f"torch.nn.modules.{kind.__name__}")


def pooling_modes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the poolings of a config in either format; ``mean`` is on unless it is switched off, as in the library."""
    named = config.get("pooling_mode")
    if named:
        return tuple(map(str, named)) if isinstance(named, list) else (str(named),)
    return tuple(mode for mode, flag in POOLINGS.items() if config.get(flag, mode == "mean"))


# --------------------------------------------------------------------------------------------------------------- model


def prepare_tokenizer(tokenizer: Any, files: Mapping[str, Path], location: str) -> None:
    """Apply the settings of sentence-transformers to a tokenizer: its maximum length, and lower case.

    Args:
        tokenizer: a tokenizer of transformers, which is changed.
        files: the files of `find_files`.
        location: the model in messages.
    """
    _, settings = _encoder_settings(files, location)
    if settings.get("max_seq_length"):
        tokenizer.model_max_length = int(settings["max_seq_length"])
    if not settings.get("do_lower_case"):
        return
    if not tokenizer.is_fast:
        raise ModelError(f"{location} lower-cases texts, but has a slow tokenizer; save it with a tokenizer.json.")
    from tokenizers import normalizers

    backend = tokenizer.backend_tokenizer
    given = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *given])


def embedding(model: Model, files: Mapping[str, Path], find: Find, location: str) -> Model:
    """Return a model of transformers with the sentence embedding as second output.

    The modules of the embedding become a submodule of the model.

    Args:
        model: a model with the output last_hidden_state.
        files: the files of `find_files`.
        find: returns the path of a file of the model by its name, None if the model does not have it.
        location: the model in messages.

    Raises:
        ModelError: the files describe an embedding that cannot be computed as sentence-transformers computes it.
    """
    settings = _config(files, SETTINGS, location)
    kind = settings.get("model_type") or "SentenceTransformer"
    if kind != "SentenceTransformer":
        raise ModelError(f"{SETTINGS} of {location} says that it is a {kind}, which gives no sentence embedding.")
    _check_encoder(files, location)
    returned = () if model.tokenizer is None else model.tokenizer.model_input_names
    if "attention_mask" in returned and "attention_mask" not in model.inputs:
        raise ModelError(
            f"{location} takes no attention mask, so padding would become part of the embedding; {WITHOUT}."
        )
    prompt = _prompt(settings, location)
    tokens = _prompt_tokens(model.tokenizer, prompt)
    left = model.tokenizer is None or model.tokenizer.padding_side == "left"
    reader = _Reader(files, None if model.random_weights else find, location, tokens, left)
    module: Any = model.module  # a model of transformers
    width = module.config.get_text_config().hidden_size
    assumed = None if MODULES in files else _assumed_mode(module.config)
    if assumed is not None:
        head = SentenceHead({Listed("Pooling", "1_Pooling", 1): Pooling((assumed,), 0, left)}, None).eval()
    else:
        with torch.random.fork_rng(devices=[]):  # weights that are not read are random, the same in every run
            torch.manual_seed(0)
            head = reader.head(read_modules(files[MODULES], location), width, settings.get("truncate_dim"))
    module.add_module(HEAD, head)
    return replace(
        model,
        outputs=("last_hidden_state", EMBEDDING),
        answer=EMBEDDING,
        call=partial(_embed, inputs=model.inputs),
        preprocess=with_prompt(model.preprocess, prompt),
        save=partial(_save, model.save, assumed, width),
        limitations=(*model.limitations, *_limitations(settings, assumed)),
    )


def _embed(module: Any, *tensors: torch.Tensor, inputs: tuple[str, ...]) -> tuple[torch.Tensor, ...]:
    """Return hidden states [batch, tokens, width] and embeddings [batch, width]."""
    feeds = dict(zip(inputs, tensors, strict=True))
    states = module(**feeds).last_hidden_state
    return states, getattr(module, HEAD)(states, feeds.get("attention_mask"))


def _check_encoder(files: Mapping[str, Path], location: str) -> None:
    """Refuse settings of the transformer that change what it computes."""
    name, settings = _encoder_settings(files, location)
    expected = {"transformer_task": "feature-extraction", "module_output_name": TOKENS}
    wrong = [key for key, value in expected.items() if settings.get(key, value) != value]
    modalities = settings.get("modality_config") or {}
    text = {"method": "forward", "method_output_name": "last_hidden_state"}
    if modalities and ("message" in modalities or modalities.get("text") != text):
        wrong.append("modality_config")
    known = {*expected, *WITHOUT_EFFECT, "modality_config", "max_seq_length", "do_lower_case"}
    wrong += [key for key in sorted(set(settings) - known) if settings[key]]
    if wrong:
        raise ModelError(
            f"{name} of {location} sets {', '.join(wrong)} to a value that is not supported; expected the hidden "
            f"states of a model that takes texts; {WITHOUT}."
        )


def _assumed_mode(config: Any) -> str:
    """Return the pooling of a model without ``modules.json``, as the library chooses it."""
    causal = (config.architectures or [""])[0].endswith("ForCausalLM") and getattr(config, "is_causal", True)
    return "lasttoken" if causal else "mean"


def _prompt(settings: Mapping[str, Any], location: str) -> str:
    """Return the text that `encode` puts in front of every text."""
    name, prompts = settings.get("default_prompt_name"), settings.get("prompts") or {}
    if name is not None and name not in prompts:
        raise ModelError(
            f"{SETTINGS} of {location} has the default prompt {name}; expected one of {', '.join(prompts) or 'none'}."
        )
    return "" if name is None else prompts[name] or ""


def _prompt_tokens(tokenizer: Any, prompt: str) -> int:
    """Return the number of tokens of the prompt at the start of a text, without a special token at its end."""
    if tokenizer is None or not prompt:
        return 0
    ids = tokenizer(prompt, truncation=True, max_length=tokenizer.model_max_length)["input_ids"]
    return len(ids) - (ids[-1] in tokenizer.all_special_ids)


def with_prompt(preprocess: Preprocess, prompt: str) -> Preprocess:
    """Return a copy of a preprocessing that puts the prompt in front of every text."""
    if not prompt or preprocess.text is None:
        return preprocess

    def prefixed(tokenise: Tokenise) -> Tokenise:
        return lambda texts, second: tokenise([prompt + text for text in texts], second)

    whole, cut = preprocess.whole, preprocess.cut
    return replace(
        preprocess,
        text=prefixed(preprocess.text),
        whole=None if whole is None else lambda text: whole(prompt + text),
        cut=None if cut is None else lambda length: prefixed(cut(length)),
    )


def _limitations(settings: Mapping[str, Any], assumed: str | None) -> Iterator[Limitation]:
    """Yield what is assumed, and the settings that the export does not use."""
    if assumed is not None:
        yield Limitation(
            "pooling",
            f"the model has no {MODULES}, so {assumed} pooling without normalization is assumed, as in "
            "sentence-transformers",
        )
    name = settings.get("default_prompt_name")
    prompts = {key: text for key, text in (settings.get("prompts") or {}).items() if text}
    if name in prompts:
        yield Limitation(
            "prompt",
            f"the default prompt {name} ({prompts[name]!r}) is put in front of every text; token ids must contain it",
        )
    others = sorted(set(prompts) - {name})
    if others:
        yield Limitation("other prompts", f"{', '.join(others)}: not used; put them in front of the texts of the data")
    similarity = settings.get("similarity_fn_name") or "cosine"
    if similarity != "cosine":
        yield Limitation(
            "similarity", f"the model compares embeddings by {similarity}, but quality here is that of their cosine"
        )


# ------------------------------------------------------------------------------------------------------------- writing


def _save(save: Callable[[Path], None], assumed: str | None, width: int, folder: Path) -> None:
    """Write the files of the model; write those of sentence-transformers, too, if the pooling was assumed."""
    save(folder)
    if assumed is None:
        return
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (kind, path) in enumerate((("Transformer", ""), ("Pooling", "1_Pooling")))
    ]
    flags = {flag: mode == assumed for mode, flag in POOLINGS.items()}
    contents = {MODULES: modules, "1_Pooling/config.json": {"word_embedding_dimension": width, **flags}}
    (folder / "1_Pooling").mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_weights(module: torch.nn.Module, weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write the weights of the modules of an embedding into the folders that ``modules.json`` names.

    Args:
        module: a model with or without an embedding.
        weights: its weights by name, which may differ from those in `module`.
        folder: the folder of the checkpoint.
    """
    head = getattr(module, HEAD, None)
    if head is None:
        return
    for name, part in head.named_children():
        keys = list(part.state_dict())
        if keys:
            path = folder / head.folders[name]
            path.mkdir(parents=True, exist_ok=True)
            tensors = {key: weights[f"{HEAD}.{name}.{key}"].detach().contiguous() for key in keys}
            save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
