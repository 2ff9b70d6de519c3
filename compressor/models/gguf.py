"""GGUF files of llama.cpp, read by transformers; quantized weights are dequantized to float32.

A GGUF file stores its config and tokenizer as plain values, so no code is executed. Other files in its folder, such as
an adapter, a config or a tokenizer, belong to other models and are ignored.
"""

from __future__ import annotations

import contextlib
import copy
import math
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers

from compressor.internals.gguf import bounded_reader, read_once
from compressor.internals.transformers import quiet, with_random_weights, without_bar
from compressor.limitations import Limitation
from compressor.models.base import Model, ModelError, load_error_reason
from compressor.models.pretrained.loaded import Loaded
from compressor.models.transformers import class_of, task_of, wrap
from compressor.models.weights.config_checks import check_counts, check_parameters
from compressor.models.weights.stored_dtypes import exact_dtypes

SUFFIX = ".gguf"
MAGIC = b"GGUF"
CAUSAL = "text-generation"
# RoPE parameters of Llama 3.1 and 3.2. Their files store only the frequency divisors that follow from these.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
GPT2 = ("gpt-2", "gpt2")  # names of GPT-2's pre-tokenizer in GGUF files
FLOATS = ("F64", "F32", "F16", "BF16")
HALVES = {"BF16": torch.bfloat16, "F16": torch.float16}
# transformers refers to a table in its log instead.
OTHER_SHAPES = "the shapes of its tensors do not match its metadata"
FREQUENCIES = "rope_freqs.weight"
_INSTALL = "install them with `pip install 'compressor-ai[gguf]'` (or `pip install gguf accelerate`)"
_OWN_FILES = "pass the model in the format of transformers, as a hub id or a save_pretrained folder"


def file_of(spec: str | Path) -> Path | None:
    """Return the GGUF file of a MODEL argument: the file itself, or the only one in a folder without config.json.

    Return None for any other argument.

    Raises:
        ModelError: the folder contains several GGUF files.
    """
    path = Path(spec)
    if path.is_file():
        return path if path.suffix.lower() == SUFFIX else None
    if not path.is_dir() or (path / "config.json").exists():
        return None
    files = sorted(file for file in path.iterdir() if file.suffix.lower() == SUFFIX and file.is_file())
    if len(files) > 1:
        raise ModelError(
            f"{path} contains {len(files)} GGUF files ({', '.join(file.name for file in files)}); pass one of the "
            "files instead of the folder."
        )
    return files[0] if files else None


def quantization_of(spec: str | Path) -> str:
    """Return the tensor types of a GGUF file by descending number of values: ``Q4_1 (210 tensors), F32 (61)``.

    Args:
        spec: the file, or the folder that contains it.

    Raises:
        ModelError: there is no such file, it cannot be read, or the package gguf is missing.
    """
    path = file_of(spec)
    if path is None:
        raise ModelError(f"{spec} is neither a {SUFFIX} file nor a folder with a {SUFFIX} file and no config.json.")
    return _types(_read(path).tensors.values())


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
    """Load a GGUF file as a transformers model with float32 weights.

    `trust_remote_code` has no effect, because a GGUF file contains no code. Without `cache`, a language model is traced
    without its KV cache.

    Raises:
        ModelError: a package is missing, the file is damaged, transformers cannot read it or would ignore a part of it,
            or an option does not apply to GGUF files.
    """
    path = Path(location)
    if revision is not None:
        raise ModelError(f"{location} is a local file, so it has no revision {revision!r}; leave --revision out.")
    if on_disk:
        raise ModelError(
            f"--max-memory reads weights from safetensors files as they are, but {location} is a GGUF file; leave "
            "--max-memory out, or save the model with save_pretrained once and pass that folder."
        )
    _check_packages(path)
    with quiet(), without_bar(), read_once() as reader, _empty_folder(path.stem) as empty:
        content = _read(path, reader)
        _check_complete(path, content)
        # transformers uses an absolute path as it is, and the empty folder provides no other files.
        options = {"gguf_file": str(path.resolve())}
        try:
            config = _config(path, content, empty, options)
            resolved_task = task or _task_of(config, location)
            check_counts(config, location)
            kind = class_of(config, resolved_task)
            check_parameters(partial(with_random_weights, kind, config), location, random_weights=random_weights)
            module, untrained = _module(kind, config, random_weights, empty, options)
        except ModelError:
            raise
        except Exception as error:  # transformers does not wrap file and shape errors
            raise ModelError(
                _unreadable(
                    location, content, OTHER_SHAPES if "mismatched_sizes" in str(error) else load_error_reason(error)
                )
            ) from error
        if not random_weights:
            _check_all_loaded(path, content, module, resolved_task)
        _clear_quantization(module, path)
        _check_shapes(location, content, module)
        own = {"revision": None, "trust_remote_code": False, **options}
        model = wrap(Loaded(module.eval().float(), empty, resolved_task, own, {}, random_weights, untrained, cache))
    if model.tokenizer is not None:
        model.tokenizer.name_or_path = path.stem
    stored = {kind for kind, _ in content.tensors.values()}
    narrower = [] if random_weights else [dtype for kind, dtype in HALVES.items() if kind in stored]
    return replace(
        model,
        limitations=(*_limitations(content, model), *model.limitations),
        dtypes=exact_dtypes(model.module, narrower),
        gguf_file=path,
    )


def _unreadable(location: str, content: _Content, reason: str) -> str:
    return (
        f"transformers could not read {location}, a GGUF file of the architecture {content.architecture} ({reason}); "
        f"{_OWN_FILES}."
    )


@contextlib.contextmanager
def _empty_folder(name: str) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        inner = Path(folder) / name
        inner.mkdir()
        yield str(inner)


def _limitations(content: _Content, model: Model) -> Iterator[Limitation]:
    """Yield the differences between the file and the model that it was converted from."""
    packed = [stored for stored in content.tensors.values() if stored[0] not in FLOATS]
    if packed and not model.random_weights:
        yield Limitation(
            "weight precision",
            f"the file stores the weights as {_types(packed)}; they were dequantized to float32, also in a checkpoint",
        )
    ahead = [name for name in content.tensors if _block(name) >= _layers(model.module)]
    if ahead:
        yield Limitation("multi-token prediction", f"its {len(ahead)} tensors in the file are left out")
    if (
        model.tokenizer is not None
        and content.pre_tokenizer is not None
        and content.pre_tokenizer not in _pre_tokenizers()
    ):
        yield Limitation(
            "pre-tokenizer",
            f"transformers does not support the file's pre-tokenizer {content.pre_tokenizer} and uses that of GPT-2, "
            "so some texts may be tokenized differently",
        )


# --------------------------------------------------------------------------------------------- content of the file


@dataclass(frozen=True)
class _Content:
    """The metadata of a GGUF file that is checked before transformers reads it.

    Attributes:
        architecture: llama.cpp's name of the architecture.
        tensors: tensor name to type and number of values.
        parts: number of files that the model is split into.
        scaling: kind and factor of the position scaling, if any.
        frequencies: divisors of the rotary frequencies, if any.
        pre_tokenizer: name of the pre-tokenizer of a byte-level BPE tokenizer; None for other tokenizers.
    """

    architecture: str
    tensors: dict[str, tuple[str, int]]
    parts: int
    scaling: tuple[str, float] | None
    frequencies: torch.Tensor | None
    pre_tokenizer: str | None


def _types(tensors: Iterable[tuple[str, int]]) -> str:
    """Format tensor types with the number of tensors of each, by descending number of values."""
    counts, values = Counter[str](), Counter[str]()
    for kind, count in tensors:
        counts[kind] += 1
        values[kind] += count
    first, *others = [kind for kind, _ in values.most_common()]
    return ", ".join([f"{first} ({counts[first]} tensors)", *(f"{kind} ({counts[kind]})" for kind in others)])


def _check_packages(path: Path) -> None:
    """Check that the packages are installed with which transformers reads GGUF files.

    Raises:
        ModelError: one is missing.
    """
    absent = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if absent:
        raise ModelError(
            f"{path} is a GGUF file, for which transformers needs the packages gguf and accelerate, but "
            f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed; {_INSTALL}."
        )


def _read(path: Path, reader: Callable[[Path], Any] = bounded_reader) -> _Content:
    """Read the metadata of a file. Of the weights, only the divisors of the rotary frequencies are read.

    Raises:
        ModelError: a package is missing, or the file is damaged, truncated or not a GGUF file.
    """
    _check_packages(path)
    with path.open("rb") as file:
        begin = file.read(len(MAGIC))
    if begin != MAGIC:
        raise ModelError(
            f"{path} is not a GGUF file: it begins with {begin!r} instead of {MAGIC!r}; download it again (a Git LFS "
            "pointer or an error page may have been saved in its place)."
        )
    try:
        return _content(reader(path))
    except (ValueError, IndexError, KeyError, OverflowError, TypeError) as error:
        raise ModelError(
            f"{path} cannot be read as GGUF ({load_error_reason(error)}): it is damaged, truncated, or newer than the "
            "installed package gguf; download it again, or update the package."
        ) from error


def _content(reader: Any) -> _Content:
    def value(key: str, default: Any) -> Any:
        field = reader.get_field(key)
        return default if field is None else field.contents()

    architecture = str(value("general.architecture", "(none named)"))
    kind = value(f"{architecture}.rope.scaling.type", "none")
    factor = float(value(f"{architecture}.rope.scaling.factor", value(f"{architecture}.rope.scale_linear", 1.0)))
    divisors = [tensor.data for tensor in reader.tensors if tensor.name == FREQUENCIES]
    return _Content(
        architecture,
        {tensor.name: (tensor.tensor_type.name, int(tensor.n_elements)) for tensor in reader.tensors},
        int(value("split.count", 1)),
        # The older key has no kind, because linear scaling was the only one.
        None if factor == 1 else ("linear" if kind == "none" else str(kind), factor),
        torch.tensor(divisors[0].copy()) if divisors else None,
        value("tokenizer.ggml.pre", "default") if value("tokenizer.ggml.model", None) == "gpt2" else None,
    )


def _check_complete(path: Path, content: _Content) -> None:
    if content.parts > 1:
        raise ModelError(
            f"{path} is one of {content.parts} files that the model is split into; merge them with "
            "`llama-gguf-split --merge` and pass the merged file."
        )
    if not content.tensors:
        raise ModelError(f"{path} contains no weights, only a config or a tokenizer; pass the file with the weights.")


# --------------------------------------------------------------------------------------- loading with transformers


def _config(path: Path, content: _Content, empty: str, options: dict[str, Any]) -> Any:
    """Return the config that transformers derives from a file, with the position scaling that it ignores added."""
    if find_spec("kernels") is not None and content.architecture in _kernel_architectures():
        raise ModelError(
            "the package kernels is installed, so transformers would download and run compiled code from the hub for "
            f"GGUF files of the architecture {content.architecture}; uninstall kernels, or {_OWN_FILES}."
        )
    config = transformers.AutoConfig.from_pretrained(empty, **options)
    rotary = getattr(config, "rope_parameters", None) or {}
    if rotary.get("rope_type") != "default":  # no RoPE, or a scaling that transformers has already read
        return config
    if content.scaling is not None:
        kind, factor = content.scaling
        if kind != "linear":
            raise _unsupported(path, f"positions are scaled by {kind}")
        rotary = config.rope_parameters = {**rotary, "rope_type": "linear", "factor": factor}
    if content.frequencies is not None:
        scaled = _llama3(config, content.frequencies)
        if scaled is None or content.scaling is not None:
            raise _unsupported(path, f"rotary frequencies are divided by {FREQUENCIES}, but not as in Llama 3")
        config.rope_parameters = scaled
    if any(name.startswith("rope_factors_") for name in content.tensors):
        raise _unsupported(path, "rotary frequencies are scaled for long texts")
    return config


def _unsupported(path: Path, feature: str) -> ModelError:
    return ModelError(f"{path}: {feature}, which transformers ignores, so the outputs would differ; {_OWN_FILES}.")


def _kernel_architectures() -> frozenset[str]:
    """Return the architectures for which transformers loads kernels from the hub (since 5.24)."""
    try:
        from transformers.integrations.gguf import GGUF_ARCHS
    except ImportError:
        return frozenset()
    return frozenset(GGUF_ARCHS)


def _pre_tokenizers() -> frozenset[str]:
    """Return the names of the pre-tokenizers that transformers supports (since 5.24), including that of GPT-2."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:
        return frozenset(GPT2)
    return frozenset({*GPT2, *GGUF_PRE_TOKENIZER_SPLITS})


def _llama3(config: Any, divisors: torch.Tensor) -> dict[str, Any] | None:
    """Return the RoPE parameters of Llama 3 that yield these frequency divisors; None if no such parameters exist.

    llama.cpp's converter writes only the divisors. The largest divisor is the scaling factor.
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


def _task_of(config: Any, location: str) -> str:
    """Return the task; text generation if the architecture supports it, because GGUF files do not name a head."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return CAUSAL
    if config.is_encoder_decoder and not config.architectures:
        raise ValueError("encoder-decoder models are not supported")
    return task_of(config, {}, location)


def _module(
    kind: Any, config: Any, random_weights: bool, empty: str, options: dict[str, Any]
) -> tuple[torch.nn.Module, tuple[str, ...]]:
    """Return the module, and the names of the weights that the file lacks."""
    if random_weights:
        with torch.random.fork_rng(devices=[]):  # the random state of the caller stays as it is
            torch.manual_seed(0)
            return with_random_weights(kind, config), ()
    # Releases without GgufConfig always dequantize.
    floats = {"quantization_config": transformers.GgufConfig(dequantize=True)} if _has_gguf_config() else {}
    module, info = kind.from_pretrained(
        empty, config=config, dtype=torch.float32, output_loading_info=True, **options, **floats
    )
    return module, tuple(sorted(info["missing_keys"]))


def _has_gguf_config() -> bool:
    return hasattr(transformers, "GgufConfig")


def _check_all_loaded(path: Path, content: _Content, module: Any, task: str) -> None:
    """Check that the module has as many values as the file, because transformers skips unknown tensors silently."""
    skipped = {FREQUENCIES}  # stored in the config instead
    if task != CAUSAL or module.config.get_text_config().tie_word_embeddings:
        skipped |= {"output.weight"}
    held = sum(
        count for name, (_, count) in content.tensors.items()
        if name not in skipped and _block(name) < _layers(module)
    )  # fmt: skip
    state = {id(value): value.numel() for value in module.state_dict(keep_vars=True).values()}
    if held > sum(state.values()):
        raise _unsupported(
            path, f"it stores {held:,} weights, but {type(module).__name__} takes only {sum(state.values()):,}"
        )


def _check_shapes(location: str, content: _Content, module: Any) -> None:
    """Check that every weight has the shape that its layer computes with.

    transformers 5.24 refuses tensors of other shapes, and 5.20 assigns them.
    """
    with torch.device("meta"):
        expected = type(module)(module.config).state_dict()
    if any(value.shape != expected[name].shape for name, value in module.state_dict().items() if name in expected):
        raise ModelError(_unreadable(location, content, OTHER_SHAPES))


def _layers(module: Any) -> int:
    return int(module.config.get_text_config().num_hidden_layers)


def _block(name: str) -> float:
    matched = re.match(r"blk\.(\d+)\.", name)
    return -math.inf if matched is None else int(matched[1])


def _clear_quantization(module: Any, path: Path) -> None:
    """Remove the quantization config, and set the class name and model name as `save_pretrained` expects them."""
    quantizer = getattr(module, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(module)
    for name in ("quantization_config", "_model_name_or_path"):
        vars(module.config).pop(name, None)
    module.config.architectures = [type(module).__name__]
    module.config.name_or_path = path.stem
