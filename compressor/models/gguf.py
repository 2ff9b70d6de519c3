"""GGUF files, as llama.cpp has them: transformers reads them, and quantized weights become float32.

A file brings its config and its tokenizer as plain values, so that nothing of it is executed. It is read apart from
the folder it lies in: an adapter, a config or a tokenizer beside it belongs to some other model.
"""

from __future__ import annotations

import contextlib
import copy
import math
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers

from compressor.internals.gguf import bounded_reader
from compressor.internals.transformers import quiet, with_random_weights, without_bar
from compressor.limitations import Limitation
from compressor.models.base import Model, ModelError, why
from compressor.models.transformers import _kind, _task, _wrap

SUFFIX = ".gguf"
MAGIC = b"GGUF"
CAUSAL = "text-generation"
# Of Llama 3.1 and 3.2, whose files hold what comes of them and not the numbers themselves.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
GPT2 = ("gpt-2", "gpt2")  # as files name GPT-2's way of splitting texts
FLOATS = ("F64", "F32", "F16", "BF16")
FREQUENCIES = "rope_freqs.weight"
_INSTALL = "install them with `pip install 'compressor-ai[gguf]'` (or `pip install gguf accelerate`)"
_OWN_FILES = "pass the model in transformers' own files, a hub id or a save_pretrained folder"


def file_of(spec: str | Path) -> Path | None:
    """The GGUF file that a MODEL argument names: itself, or the only one in a folder without config.json.

    Raises:
        ModelError: the folder holds several.
    """
    path = Path(spec)
    if path.is_file():
        return path if path.suffix.lower() == SUFFIX else None
    if not path.is_dir() or (path / "config.json").exists():
        return None
    files = sorted(each for each in path.iterdir() if each.suffix.lower() == SUFFIX and each.is_file())
    if len(files) > 1:
        raise ModelError(
            f"{path} holds {len(files)} GGUF files ({', '.join(each.name for each in files)}); pass the file that is "
            "meant instead of the folder."
        )
    return files[0] if files else None


def quantization_of(spec: str | Path) -> str:
    """Types of the tensors in a GGUF file, those that hold most values first: ``Q4_1 (210 tensors), F32 (61)``.

    Args:
        spec: the file, or the folder that holds it.

    Raises:
        ModelError: there is no such file, it cannot be read, or the package gguf is missing.
    """
    path = file_of(spec)
    if path is None:
        raise ModelError(f"{spec} is neither a {SUFFIX} file nor a folder with one and no config.json.")
    return _types(_read(path).tensors.values())


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
    """Load a GGUF file, its weights in float32 whatever they are stored as; from then on it is one of transformers.

    `trust_remote_code` changes nothing: such a file brings no code. Without `cache` a language model is traced without
    its KV cache.

    Raises:
        ModelError: the packages are missing, the file is damaged, transformers cannot read it or would leave a part
            of it out, or an option is given that such a file does not go with.
    """
    path = Path(where)
    if revision is not None:
        raise ModelError(f"{where} is a local file, so it has no revision {revision!r}; leave --revision out.")
    if on_disk:
        raise ModelError(
            f"--max-memory reads weights from safetensors files as they are, but those of {where} are packed as GGUF "
            "has them; leave it out, or save the model with save_pretrained once and pass that folder."
        )
    found = _read(path)
    _check_complete(path, found)
    with quiet(), without_bar(), _empty_folder(path.stem) as empty:
        # An absolute name is taken for what it is, and the folder has nothing else to offer.
        options = {"gguf_file": str(path.resolve())}
        try:
            config = _config(path, found, empty, options)
            chosen = task or _task_of(config, where)
            module, untrained = _module(_kind(config, chosen), config, random_weights, empty, options)
        except ModelError:
            raise
        except Exception as error:  # transformers lets errors of files and shapes through as they are
            raise ModelError(
                f"transformers could not read {where}, a GGUF file of the architecture {found.architecture} "
                f"({_reason(error)}); {_OWN_FILES}."
            ) from error
        if not random_weights:
            _check_all_taken(path, found, module, chosen)
        _be_one_of_transformers(module, path)
        own = {"revision": None, "trust_remote_code": False, **options}
        model = _wrap(module.eval().float(), empty, chosen, own, {}, random_weights, untrained, cache)
    if model.tokenizer is not None:
        model.tokenizer.name_or_path = path.stem
    return replace(model, limitations=(*_limitations(found, model), *model.limitations))


def _reason(error: Exception) -> str:
    # That message refers to a table that transformers has logged.
    return "its tensors are not of the shapes its metadata says" if "mismatched_sizes" in str(error) else why(error)


@contextlib.contextmanager
def _empty_folder(name: str) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        inner = Path(folder) / name
        inner.mkdir()
        yield str(inner)


def _limitations(found: _Content, model: Model) -> Iterator[Limitation]:
    """What the file lacks of the model that it was made from."""
    packed = [each for each in found.tensors.values() if each[0] not in FLOATS]
    if packed and not model.random_weights:
        yield Limitation(
            "precision of the weights", f"the file holds them as {_types(packed)}, dequantized to float32 here"
        )
    ahead = [name for name in found.tensors if _block(name) >= _layers(model.module)]
    if ahead:
        yield Limitation("blocks that guess several tokens ahead", f"{len(ahead)} tensors of the file are left out")
    if model.tokenizer is not None and found.splitting is not None and found.splitting not in _splittings():
        yield Limitation(
            "pre-tokenizer",
            f"transformers does not know the file's ({found.splitting}) and splits texts as GPT-2 does, so that tokens "
            "of some may differ",
        )


# ----------------------------------------------------------------------------------------------- what the file says


@dataclass(frozen=True)
class _Content:
    """What is asked of a file before transformers reads it.

    `tensors` are the type and the number of values of each; `parts` is how many files the model is split into,
    `scaling` how positions are scaled (kind and factor), `frequencies` what rotary frequencies are divided by,
    `splitting` how texts are split before the merges of a byte-level tokenizer.
    """

    architecture: str
    tensors: dict[str, tuple[str, int]]
    parts: int
    scaling: tuple[str, float] | None
    frequencies: torch.Tensor | None
    splitting: str | None


def _types(tensors: Iterable[tuple[str, int]]) -> str:
    """Types of tensors and how many are of each, those that hold most values first."""
    counts, values = Counter[str](), Counter[str]()
    for kind, count in tensors:
        counts[kind] += 1
        values[kind] += count
    first, *others = [kind for kind, _ in values.most_common()]
    return ", ".join([f"{first} ({counts[first]} tensors)", *(f"{kind} ({counts[kind]})" for kind in others)])


def _read(path: Path) -> _Content:
    """The head of a file; of the weights, which stay on disk, the few that scale rotary frequencies.

    Raises:
        ModelError: a package is missing, or the file is none of this kind, damaged or cut short.
    """
    absent = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if absent:
        raise ModelError(
            f"{path} is a GGUF file, for which transformers needs the packages gguf and accelerate, but "
            f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed; {_INSTALL}."
        )
    with path.open("rb") as file:
        begin = file.read(len(MAGIC))
    if begin != MAGIC:
        raise ModelError(
            f"{path} is no GGUF file: it begins with {begin!r} and not with {MAGIC!r}; fetch it again (a pointer of "
            "Git LFS or an error page may have been saved in its place)."
        )
    try:
        return _content(bounded_reader(path))
    except (ValueError, IndexError, KeyError, OverflowError, TypeError) as error:
        raise ModelError(
            f"{path} cannot be read as GGUF ({why(error)}): it is damaged, cut short, or newer than the installed "
            "package gguf; fetch it again, or update the package."
        ) from error


def _content(reader: Any) -> _Content:
    def value(key: str, default: Any) -> Any:
        field = reader.get_field(key)
        return default if field is None else field.contents()

    architecture = str(value("general.architecture", "(none named)"))
    kind = value(f"{architecture}.rope.scaling.type", "none")
    factor = float(value(f"{architecture}.rope.scaling.factor", value(f"{architecture}.rope.scale_linear", 1.0)))
    divisors = [each.data for each in reader.tensors if each.name == FREQUENCIES]
    return _Content(
        architecture,
        {each.name: (each.tensor_type.name, int(each.n_elements)) for each in reader.tensors},
        int(value("split.count", 1)),
        # The older key names no kind: linear was the only one.
        None if factor == 1 else ("linear" if kind == "none" else str(kind), factor),
        torch.tensor(divisors[0].copy()) if divisors else None,
        value("tokenizer.ggml.pre", "default") if value("tokenizer.ggml.model", None) == "gpt2" else None,
    )


def _check_complete(path: Path, found: _Content) -> None:
    if found.parts > 1:
        raise ModelError(
            f"{path} is one of {found.parts} files that the model is split into; join them with "
            "`llama-gguf-split --merge` and pass the file that comes of it."
        )
    if not found.tensors:
        raise ModelError(f"{path} holds no weights, only a config or a tokenizer; pass the file with the weights.")


# -------------------------------------------------------------------------------------- what transformers makes of it


def _config(path: Path, found: _Content, empty: str, options: dict[str, Any]) -> Any:
    """The config that transformers makes of a file, with the scaling of positions that it leaves out."""
    if find_spec("kernels") is not None and found.architecture in _fetching():
        raise ModelError(
            f"with the package kernels installed transformers fetches compiled code from the hub for GGUF files of "
            f"the architecture {found.architecture}, which is not run; uninstall kernels, or {_OWN_FILES}."
        )
    config = transformers.AutoConfig.from_pretrained(empty, **options)
    rotary = getattr(config, "rope_parameters", None) or {}
    if rotary.get("rope_type") != "default":  # it has none, or knows more of it than the file
        return config
    if found.scaling is not None:
        kind, factor = found.scaling
        if kind != "linear":
            raise _wrong(path, f"positions are scaled by {kind}")
        rotary = config.rope_parameters = {**rotary, "rope_type": "linear", "factor": factor}
    if found.frequencies is not None:
        scaled = _llama3(config, found.frequencies)
        if scaled is None or found.scaling is not None:
            raise _wrong(path, f"rotary frequencies are divided by {FREQUENCIES}, in another way than Llama 3's")
        config.rope_parameters = scaled
    if any(name.startswith("rope_factors_") for name in found.tensors):
        raise _wrong(path, "rotary frequencies are scaled for long texts")
    return config


def _wrong(path: Path, what: str) -> ModelError:
    return ModelError(f"{path}: {what}, which transformers leaves out, so that the outputs would differ; {_OWN_FILES}.")


def _fetching() -> frozenset[str]:
    """Architectures that transformers reads in a way of its own, which asks the hub for kernels (since 5.24)."""
    try:
        from transformers.integrations.gguf import GGUF_ARCHS
    except ImportError:
        return frozenset()
    return frozenset(GGUF_ARCHS)


def _splittings() -> frozenset[str]:
    """The ways of splitting texts that transformers knows, GPT-2's among them (since 5.24)."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:
        return frozenset(GPT2)
    return frozenset({*GPT2, *GGUF_PRE_TOKENIZER_SPLITS})


def _llama3(config: Any, divisors: torch.Tensor) -> dict[str, Any] | None:
    """The parameters of Llama 3's rotary frequencies, where these divisors are what they amount to.

    llama.cpp's converter writes the divisors alone; the largest is the factor.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled = copy.deepcopy(config)
    scaled.rope_parameters = {
        **config.rope_parameters, "rope_type": "llama3", "factor": round(float(divisors.max()), 3), **LLAMA3
    }  # fmt: skip
    width = config.head_dim
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
    expected = plain / ROPE_INIT_FUNCTIONS["llama3"](scaled, torch.device("cpu"))[0]
    same = expected.shape == divisors.shape and torch.allclose(expected, divisors.float(), rtol=1e-3)
    return dict(scaled.rope_parameters) if same else None


def _task_of(config: Any, where: str) -> str:
    """Text generation where the model can do it: files name no head."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return CAUSAL
    if config.is_encoder_decoder and not config.architectures:
        raise ValueError("it has an encoder and a decoder")
    return _task(config, {}, where)


def _module(
    kind: Any, config: Any, random_weights: bool, empty: str, options: dict[str, Any]
) -> tuple[torch.nn.Module, tuple[str, ...]]:
    """The module, and the names of the weights that the file does not hold."""
    if random_weights:
        torch.manual_seed(0)
        return with_random_weights(kind, config), ()
    # Before there was this class, weights were made floats always.
    floats = {"quantization_config": transformers.GgufConfig(dequantize=True)} if _can_stay_packed() else {}
    module, info = kind.from_pretrained(
        empty, config=config, dtype=torch.float32, output_loading_info=True, **options, **floats
    )
    return module, tuple(sorted(info["missing_keys"]))


def _can_stay_packed() -> bool:
    return hasattr(transformers, "GgufConfig")


def _check_all_taken(path: Path, found: _Content, module: Any, task: str) -> None:
    """Hold that every value of the file has a place in the module: transformers skips tensors without a word."""
    skipped = {FREQUENCIES}  # it is in the config
    if task != CAUSAL or module.config.get_text_config().tie_word_embeddings:
        skipped |= {"output.weight"}
    held = sum(
        count for name, (_, count) in found.tensors.items()
        if name not in skipped and _block(name) < _layers(module)
    )  # fmt: skip
    state = {id(value): value.numel() for value in module.state_dict(keep_vars=True).values()}
    if held > sum(state.values()):
        raise _wrong(path, f"it holds {held:,} weights, of which {type(module).__name__} has {sum(state.values()):,}")


def _layers(module: Any) -> int:
    return int(module.config.get_text_config().num_hidden_layers)


def _block(name: str) -> float:
    matched = re.match(r"blk\.(\d+)\.", name)
    return -math.inf if matched is None else int(matched[1])


def _be_one_of_transformers(module: Any, path: Path) -> None:
    """Take out what says that the weights are packed, and name the class as the files of `save_pretrained` do."""
    quantizer = getattr(module, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(module)
    for name in ("quantization_config", "_model_name_or_path"):
        vars(module.config).pop(name, None)
    module.config.architectures = [type(module).__name__]
    module.config.name_or_path = path.stem
