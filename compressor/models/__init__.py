"""Model loading: resolves a MODEL argument to a source and loads the model; each source has its own module."""

from __future__ import annotations

import difflib
import importlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from compressor.choices import TASKS, ImageSize
from compressor.models.base import (
    LEFT_OUT,
    Model,
    ModelError,
    NoImageSizeError,
    NoSequenceLengthError,
    load_error_reason,
    no_language_model,
)
from compressor.models.problem_type import with_problem_type
from compressor.workspace.json_files import OBJECT, JsonFileError, read_json
from compressor.workspace.manifest import LOADED
from compressor.workspace.special_files import first_special

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["SAMPLE", "TASKS", "Model", "ModelError", "load"]

SAMPLE = Path(__file__).parent.parent / "sample"
_EXPECTED = (
    "expected a timm name, a hub id owner/name, a folder with config.json, a .gguf file, or package.module:factory"
)
_PICKLE = (
    "a pickled module is not opened, because reading it may run code; load it in Python and pass the module to "
    "compressor.export, or write a package.module:factory"
)
_FILES = {
    ".onnx": "Compressor writes ONNX files and does not read them; pass the model that the file was exported from",
    ".safetensors": "a weights file alone is not a model; pass the folder that contains it and config.json",
    ".json": "pass the folder that contains it",
} | dict.fromkeys((".pt", ".pth", ".bin", ".ckpt", ".pkl"), _PICKLE)
_DAMAGED = "download the model again"
_ADAPTER = "adapter_config.json"
_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def load(
    spec: str | Path | torch.nn.Module | None = None,
    *,
    task: str | None = None,
    revision: str | None = None,
    random_weights: bool = False,
    trust_remote_code: bool = False,
    example_inputs: object = None,
    on_disk: bool = False,
    cache: bool = True,
    problem_type: str | None = None,
    image_size: ImageSize = None,
    sequence_length: int | None = None,
) -> Model:
    """Load a model in evaluation mode, float32.

    Args:
        spec: a timm name, a hub id (timm or transformers), a local folder of either kind, a .gguf file or the folder
            that contains one, ``package.module:factory`` (a callable that returns a module and its example inputs), a
            module, or None for the embedded sample.
        task: one of `TASKS`; by default the task that the model's config implies.
        revision: branch, tag or commit of a hub id.
        random_weights: build the architecture without reading weights, for measuring speed.
        trust_remote_code: allow a transformers repository to run its own code.
        example_inputs: for a module: a tensor, a tuple of tensors or a dict of tensors; the first axis is the batch.
        on_disk: leave the weights on disk and read them when needed; transformers language models only.
        cache: trace a causal language model with its KV cache; it is an error if none is detected.
        problem_type: one of `PROBLEM_TYPES` for image and text classifiers; by default that of the config.
        image_size: height and width of the images, or ``dynamic``; by default those of the model's preprocessing.
        sequence_length: number of tokens of every text, or of samples or frames of every clip; by default any.

    Raises:
        ModelError: the model, task or problem type is unknown, a file cannot be read, or weights are missing or not
            finite.
    """
    if task is not None and task not in TASKS:
        raise ModelError(f"unknown task {task!r}; expected one of {', '.join(TASKS)}.")
    if isinstance(spec, torch.nn.Module):
        module_source = _source("user_module")
        module_source.refuse(type(spec).__name__, revision=revision, random_weights=random_weights)
        model: Model = module_source.wrap(spec, example_inputs, task=task, cache=cache)
    else:
        source, location = _locate(str(spec or SAMPLE), revision, random_weights)
        if on_disk:
            streamed = _on_disk(
                source, location, task=task, revision=revision, trust_remote_code=trust_remote_code, cache=cache
            )
            return with_problem_type(streamed, problem_type)
        model = _source(source).load(
            location,
            task=task,
            revision=revision,
            random_weights=random_weights,
            trust_remote_code=trust_remote_code,
            cache=cache,
            **({"image_size": image_size} if source in ("timm", "transformers") else {}),
            **({"sequence_length": sequence_length} if source == "transformers" else {}),
        )
    of_images = model.preprocess.kind == "image" and model.source in ("timm", "transformers")
    if image_size is not None and not (of_images or model.preprocess.sized):
        raise NoImageSizeError(
            f"--image-size is for image models of timm and transformers; {model.name} is a model of {model.source} for "
            f"{model.task}: leave --image-size out{', its example inputs set the size' * (model.source == 'module')}."
        )
    if sequence_length is not None and model.preprocess.padded != sequence_length:
        raise NoSequenceLengthError(
            f"--sequence-length is for models of transformers that take texts alone or sound alone; {model.name} is a "
            f"model of {model.source} for {model.task}: leave --sequence-length out"
            f"{', its example inputs and its code set the length' * (model.source == 'module')}."
        )
    _check_finite(model)
    if not cache and model.task != "text-generation" and LEFT_OUT not in model.limitations:
        raise ModelError(
            f"--no-cache is for language models, but the task of {model.name} is {model.task}; leave --no-cache out."
        )
    return with_problem_type(model, problem_type)


def _on_disk(
    source: str, location: str, *, task: str | None, revision: str | None, trust_remote_code: bool, cache: bool
) -> Model:
    """Load a model whose weights stay on disk. Damaged weights are only detected when the model runs."""
    if source not in ("transformers", "gguf"):
        raise no_language_model(location, f"a model of {source}")
    model: Model = _source(source).load(
        location,
        task=task,
        revision=revision,
        random_weights=False,
        trust_remote_code=trust_remote_code,
        cache=cache,
        on_disk=True,
    )
    return model


def _source(name: str) -> ModuleType:
    return importlib.import_module(f"compressor.models.{name}")


def _locate(spec: str, revision: str | None, random_weights: bool) -> tuple[str, str]:
    """Return the source that loads `spec`, and the location to pass to its loader."""
    folder = Path(spec)
    if folder.is_dir():
        return _in_folder(folder)
    if folder.is_file() and folder.suffix.lower() == ".gguf":
        return "gguf", spec
    if (fault := first_special([folder])) is not None:
        raise ModelError(f"{fault}; {_EXPECTED}.")
    if folder.is_file() and folder.name.startswith("adapter_model."):
        raise _is_adapter(spec, "")
    if folder.exists():
        raise ModelError(f"{spec} is a file; {_FILES.get(folder.suffix.lower(), _EXPECTED)}.")
    if _FACTORY.fullmatch(spec):
        return "user_module", spec
    if _is_timm_name(spec):
        return "timm", spec
    if spec.count("/") == 1 and not spec.startswith(("/", ".")):
        return _hub_source(spec, revision)
    if folder.is_absolute() or spec.startswith((".", "~")):
        raise ModelError(f"there is no folder {spec}; {_EXPECTED}.")
    raise ModelError(f"no model named {spec!r}; {_did_you_mean(spec)}{_EXPECTED}.")


def _in_folder(folder: Path) -> tuple[str, str]:
    if (fault := first_special([*folder.iterdir(), *folder.glob("*/*")])) is not None:
        raise ModelError(f"the model's {fault}; copy the model again, or remove it.")
    if (link := _broken_link(folder)) is not None:
        raise ModelError(f"{link} is a link that leads nowhere; copy the model with the files that its links lead to.")
    try:
        config = read_json(folder / "config.json", OBJECT, remedy=_DAMAGED)
    except FileNotFoundError:
        file = _gguf_in(folder)
        if file is not None:
            return "gguf", str(file)
        _check_no_adapter(folder)
        if (folder / "modules.json").is_file():  # says that its modules are not supported or not in this folder
            _source("text.sentence_transformers").read_modules(folder / "modules.json", str(folder))
        raise ModelError(
            f"{folder} contains no config.json; expected a timm folder, a save_pretrained folder, or a folder with a "
            ".gguf file."
        ) from None
    except JsonFileError as error:
        raise ModelError(str(error)) from error
    _check_no_adapter(folder)
    return _config_source(config, str(folder)), str(folder)


def _check_no_adapter(folder: Path) -> None:
    """Refuse an adapter, also beside the files of its base: transformers would leave it out without peft."""
    if (folder / _ADAPTER).is_file():
        raise _is_adapter(str(folder), _base_of(folder / _ADAPTER))


def _is_adapter(location: str, base: str) -> ModelError:
    """Return the error for an adapter of peft, such as LoRA, whose weights are only differences to a base model."""
    return ModelError(
        f"{location} is an adapter of peft{base}, not a whole model; merge it with peft's merge_and_unload "
        "(PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(merged)), and pass the merged "
        "folder with the base's tokenizer or image processor."
    )


def _base_of(file: Path) -> str:
    """Return the base model of an adapter as a clause; empty if its config does not name one."""
    try:
        base = read_json(file, OBJECT, remedy=_DAMAGED).get("base_model_name_or_path")
    except (FileNotFoundError, JsonFileError):
        return ""
    return f" for {base}" if isinstance(base, str) and base else ""


def _broken_link(folder: Path) -> Path | None:
    """Return a config or a weight file that is a link to nothing, or to itself."""
    links = (path for path in folder.iterdir() if path.suffix in LOADED and path.is_symlink())
    return next((path for path in links if not path.exists()), None)


def _gguf_in(folder: Path) -> Path | None:
    file: Path | None = _source("gguf").file_of(folder)
    return file


def _config_source(config: object, location: str) -> str:
    if isinstance(config, dict) and isinstance(config.get("model_type"), str):  # also of a model of timm in a wrapper
        return "transformers"
    if isinstance(config, dict) and isinstance(config.get("architecture"), str):
        return "timm"
    raise ModelError(
        f'config.json of {location} names neither timm\'s "architecture" nor transformers\' "model_type"; '
        "for a custom model, pass package.module:factory."
    )


def _hub_source(spec: str, revision: str | None) -> tuple[str, str]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        path = hf_hub_download(spec, "config.json", revision=revision)
    except Exception as error:  # the hub client raises a dozen types: offline, gated, missing, wrong revision
        reached = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
        if reached and (adapter := _adapter_on_hub(spec, revision)) is not None:
            raise _is_adapter(spec, _base_of(adapter)) from error
        raise ModelError(
            f"{spec!r} is not a local folder and could not be fetched from the hub: {load_error_reason(error)}."
        ) from error
    try:
        config = read_json(Path(path), OBJECT, remedy=_DAMAGED)
    except (FileNotFoundError, JsonFileError) as error:
        raise ModelError(f"the config.json of {spec} cannot be used: {error}") from error
    source = _config_source(config, spec)
    return source, f"hf-hub:{spec}" if source == "timm" else spec


def _adapter_on_hub(spec: str, revision: str | None) -> Path | None:
    """Return the adapter config of a hub repository without config.json; None if it has none or is out of reach."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(spec, _ADAPTER, revision=revision))
    except Exception:  # as above; the first error is the one to report
        return None


def _is_timm_name(spec: str) -> bool:
    import timm

    return bool(timm.is_model(spec.split(".", maxsplit=1)[0]))


def _did_you_mean(spec: str) -> str:
    import timm

    normalized, names = spec.lower().replace("-", "_"), timm.list_models()
    prefixed = [name for name in names if name.startswith(normalized)]
    close = prefixed[:3] or difflib.get_close_matches(normalized, names, n=3)
    return f"did you mean {', '.join(close)}? " if close else ""


@torch.no_grad()
def _check_finite(model: Model) -> None:
    for name, parameter in model.module.named_parameters():
        if not torch.isfinite(parameter).all():
            count = int((~torch.isfinite(parameter)).sum())
            raise ModelError(
                f"{model.name}: {count} of {parameter.numel()} values of {name} are NaN or infinite; "
                "the checkpoint is damaged."
            )
