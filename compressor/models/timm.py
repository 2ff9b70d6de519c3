"""Models of timm: by name, from the hub, or from a local folder in timm's format."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import timm
import torch
from huggingface_hub import try_to_load_from_cache
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from compressor.choices import DYNAMIC, ImageSize
from compressor.internals.timm import save_config_for_hf
from compressor.limitations import Limitation
from compressor.models import class_names
from compressor.models.base import Model, ModelError, as_numpy, first_line, load_error_reason
from compressor.models.image_size import (
    Sizing,
    cannot_take,
    other_sizes,
    refusal,
    repeated,
    statistics_limitation,
    text,
    unused_pixels,
    wrong_statistics,
)
from compressor.models.preprocess import Preprocess
from compressor.models.weights.config_checks import check_counts, check_parameters
from compressor.models.weights.stored_dtypes import dtypes_in
from compressor.workspace.folder_errors import name_of
from compressor.workspace.json_files import OBJECT, read_json

TASKS = ("image-classification", "image-feature-extraction")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # names of the weights in a folder or repository, in timm's order
PREPROCESSING = ("input_size", "mean", "std", "interpolation", "crop_pct")  # what timm takes from a config, or assumes
NO_CLASSIFIER = Limitation(
    "classifier", "the checkpoint has no classifier (num_classes is 0), so its features are exported"
)


def load(
    location: str,
    *,
    task: str | None,
    revision: str | None,
    random_weights: bool,
    trust_remote_code: bool,
    cache: bool = True,
    image_size: ImageSize = None,
) -> Model:
    """Load a timm model as a classifier, or as a feature extractor if `task` is image-feature-extraction.

    It takes images of `image_size`, by default those of its preprocessing. timm resamples position embeddings while it
    loads the weights; those of a dynamic size are interpolated in `forward`.

    Raises:
        ModelError: the weights cannot be read, or the task is not an image task.
    """
    resolved_task = task or "image-classification"
    if resolved_task not in TASKS:
        raise ModelError(
            f"{location} is a timm model, which does not support the task {resolved_task}; expected "
            "image-classification or image-feature-extraction."
        )
    folder = Path(location)
    if revision is not None and not location.startswith("hf-hub:"):
        raise ModelError(
            f"{location} is not a hub id, so it has no revision {revision!r}; leave --revision out, or pass owner/name."
        )
    name = f"local-dir:{location}" if folder.is_dir() else location
    if revision is not None:
        name = f"{name}@{revision}"
    label = name_of(folder) if folder.is_dir() else location.removeprefix("hf-hub:")
    _check_config(folder, random_weights)
    try:
        sized = _at_size(partial(timm.create_model, name, pretrained=not random_weights), image_size, label)
    except ModelError:
        raise
    except Exception as error:  # timm does not wrap hub, file, pickle and shape errors
        raise ModelError(
            f"timm could not load {location}: {load_error_reason(error)}{_tags(location, error)}."
        ) from error
    if task == "image-classification" and getattr(sized.module, "num_classes", 0) == 0:
        raise ModelError(f"{location} has no classifier (num_classes is 0); leave --task out, or choose another model.")
    model = _wrap(sized, label, resolved_task, location, revision, random_weights, requested_task=task)
    model = replace(model, limitations=(*model.limitations, *_assumed(folder, sized.module)))
    return model if random_weights else replace(model, dtypes=_dtypes(sized.module, location, revision))


def _assumed(folder: Path, module: torch.nn.Module) -> tuple[Limitation, ...]:
    """Return the limitation that the config of a local folder lacks values of the preprocessing, which timm has.

    A config without ``pretrained_cfg`` holds its fields itself, as timm's older ones do.
    """
    if not (folder / "config.json").is_file():
        return ()
    config: dict[str, Any] = read_json(folder / "config.json", OBJECT, remedy="download the model again")
    facts = config.get("pretrained_cfg") or config
    used = resolve_model_data_config(module)
    absent = [name for name in PREPROCESSING if facts.get(name) is None]
    if not absent:
        return ()
    values = ", ".join(f"{name} {_brief(used[name])}" for name in absent)
    return (
        Limitation(
            "preprocessing of the images",
            f"the config has no {', '.join(absent)}, so timm's defaults are assumed ({values}); if the model was "
            "trained with others, add them to pretrained_cfg in config.json",
        ),
    )


def _brief(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def _dtypes(module: torch.nn.Module, location: str, revision: str | None) -> dict[str, torch.dtype]:
    """Return the types of the weights in a local folder or in the cache of the hub, by their paths in the module.

    Return an empty dictionary for weights in files of other names, such as those of a web address.
    """
    folder, hub_id = Path(location), _hub_id(module, location)
    repository, _, tag = (hub_id or "").partition("@")
    for name in WEIGHTS:
        path: Any = folder / name
        if not folder.is_dir():
            path = repository and try_to_load_from_cache(repository, name, revision=revision or tag or None)
        if isinstance(path, str | Path) and path and Path(path).is_file():
            stored = dtypes_in([Path(path)])
            return {name: stored[name] for name in module.state_dict() if name in stored}
    return {}


def _check_config(folder: Path, random_weights: bool) -> None:
    """Check the counts in the config of a local folder before the model is built.

    Raises:
        ModelError: a count cannot be that of a model, or does not belong to the weights.
    """
    if not (folder / "config.json").is_file():
        return
    config: dict[str, Any] = read_json(folder / "config.json", OBJECT, remedy="download the model again")
    sizes = config.get("model_args") or {}
    if not isinstance(sizes, dict) or not isinstance(config.get("architecture"), str):
        raise ModelError(f"config.json of {folder} has other fields than timm writes; download the model again.")
    check_counts(sizes, str(folder))
    check_counts({name: config.get(name) for name in ("img_size", "image_size")}, str(folder))
    facts = config.get("pretrained_cfg")
    check_counts({"image_size": facts.get("input_size") if isinstance(facts, dict) else None}, str(folder))
    number = {"num_classes": config["num_classes"]} if type(config.get("num_classes")) is int else {}
    build = partial(timm.create_model, config["architecture"], pretrained=False, **(number | sizes))
    check_parameters(build, str(folder), random_weights=random_weights)


def _tags(location: str, error: Exception) -> str:
    """Return the available pretrained tags if the error is about an unknown tag."""
    if "pretrained tag" not in str(error):
        return ""
    return f"; expected one of {', '.join(timm.list_pretrained(location.split('.', maxsplit=1)[0] + '.*'))}"


@dataclass(frozen=True)
class _Sized:
    """A timm model at the size of an export.

    Attributes:
        module: the model.
        options: arguments of `timm.create_model` that set its size.
        sizing: the size.
        limitations: what was assumed or differs.
    """

    module: torch.nn.Module
    options: dict[str, Any]
    sizing: Sizing
    limitations: tuple[Limitation, ...] = ()


def _at_size(create: Callable[..., torch.nn.Module], image_size: ImageSize, name: str) -> _Sized:
    """Create a model at the requested size, or at that of its preprocessing.

    Raises:
        ModelError: the model does not take the size, or no other sizes if it is dynamic.
    """
    if image_size is None:
        return _at_own_size(create, name)
    options = {"dynamic_img_size": True} if image_size == DYNAMIC else {"img_size": image_size}
    module, accepted = _create(create, options)
    channels, *own = resolve_model_data_config(module)["input_size"]
    if image_size == DYNAMIC:
        size = (own[0], own[1])
        sizing = Sizing(size, other_sizes(_classify, module, channels, size, name))
        return _Sized(module, accepted, sizing, tuple(sizing.limitations(channels)))
    reason = refusal(_classify, module, channels, image_size)
    if reason is not None:
        raise cannot_take(name, image_size, reason)
    sizing = Sizing(image_size)
    limits = [*sizing.limitations(channels), *unused_pixels(_classify, module, channels, image_size)]
    if tuple(own) != image_size:
        limits.append(
            Limitation(
                "image size of the config",
                f"the preprocessing gives {text(own)} pixels and --image-size is {text(image_size)}, which is used; "
                "position embeddings are resampled by timm",
            )
        )
    return _Sized(module, accepted, sizing, tuple(limits))


def _at_own_size(create: Callable[..., torch.nn.Module], name: str) -> _Sized:
    """Create a model at the size of its preprocessing, even if it was built for another size."""
    module, options = _create(create, {})
    channels, height, width = resolve_model_data_config(module)["input_size"]
    size = (height, width)
    differs: tuple[Limitation, ...] = ()
    reason = refusal(_classify, module, channels, size)
    if reason is not None:
        module, options = _create(create, {"img_size": size})
        if refusal(_classify, module, channels, size) is not None:
            raise cannot_take(name, size, reason)
        differs = (
            Limitation(
                "image size of the config",
                f"the model is built for another size ({reason}) and its preprocessing gives {text(size)} pixels, "
                "which is used; position embeddings are resampled by timm",
            ),
        )
    sizing = Sizing(size)
    edge = unused_pixels(_classify, module, channels, size)
    return _Sized(module, options, sizing, (*sizing.limitations(channels), *edge, *differs))


def _create(create: Callable[..., torch.nn.Module], options: dict[str, Any]) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Create a model with options, without those that its class does not have, such as the size of a ConvNeXt."""
    try:
        module = create(**options)
    except TypeError as error:
        if not any(name in str(error) for name in options):
            raise
        module, options = create(), {}
    return module.eval().float(), options


def _wrap(
    sized: _Sized,
    name: str,
    task: str,
    location: str,
    revision: str | None,
    random_weights: bool,
    *,
    requested_task: str | None,
) -> Model:
    module, sizing = sized.module, sized.sizing
    config = resolve_model_data_config(module)
    channels = config["input_size"][0]
    config, refused, fitted = _fitted(config | {"input_size": (channels, *sizing.size)})
    preprocess = _preprocess(config, as_numpy(sizing.prepared(channels)), refused)
    classifies = task == "image-classification" and getattr(module, "num_classes", 0) > 0
    if not classifies:
        task = "image-feature-extraction"
    names, inferred = class_names.of_timm(module) if classifies else (None, ())
    return Model(
        name=name,
        source="timm",
        task=task,
        module=module,
        call=_classify if classifies else _features,
        inputs=("pixel_values",),
        outputs=("logits",) if classifies else ("last_hidden_state", "pooler_output"),
        answer="logits" if classifies else "pooler_output",
        example=sizing.example(channels),
        dynamic_axes=sizing.axes,
        preprocess=preprocess,
        save=partial(_save, module, location, sized.options, config),
        revision=revision,
        hub_id=None if random_weights else _hub_id(module, location),
        random_weights=random_weights,
        sizes=sizing.checked,
        limitations=(
            *sized.limitations,
            *fitted,
            *(() if classifies or requested_task is not None else (NO_CLASSIFIER,)),
            *inferred,
        ),
        class_names=names,
    )


def _hub_id(module: Any, location: str) -> str | None:
    """Return the hub repository of the weights; None for a local folder."""
    if Path(location).is_dir():
        return None
    hub_id = (
        location.removeprefix("hf-hub:") if location.startswith("hf-hub:") else module.pretrained_cfg.get("hf_hub_id")
    )
    return str(hub_id) if hub_id else None


def _classify(module: torch.nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (module(pixels),)


def _features(module: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    features = module.forward_features(pixels)
    return features, module.forward_head(features, pre_logits=True)


def _fitted(config: dict[str, Any]) -> tuple[dict[str, Any], str, tuple[Limitation, ...]]:
    """Fit mean and standard deviation to the channels of the model.

    Returns:
        The config; the reason why images cannot be preprocessed, empty if they can; and the limitations.
    """
    channels = config["input_size"][0]
    statistics = {name: config[name] for name in ("mean", "std")}
    wrong = [len(values) for values in statistics.values() if len(values) != channels]
    if not wrong:
        return config, "", ()
    fitted = {name: repeated(values, channels) for name, values in statistics.items()}
    if None in fitted.values():
        return config, wrong_statistics(wrong[0], channels), ()
    return config | fitted, "", (statistics_limitation(wrong[0], channels),)


def _preprocess(config: dict[str, Any], example: dict[str, Any], refused: str) -> Preprocess:
    if refused:
        return Preprocess(("pixel_values",), "image", example, no_image=refused)
    try:
        transform = create_transform(**config, is_training=False)
    except Exception as error:  # timm looks names up in dicts and computes with the values of the config unchecked
        raise ModelError(
            f"timm cannot make the preprocessing of the config ({type(error).__name__}: {first_line(error)}); correct "
            "pretrained_cfg in config.json."
        ) from error

    def image(picture: Image.Image | npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        source = torch.from_numpy(picture) if isinstance(picture, np.ndarray) else picture
        pixels: npt.NDArray[np.float32] = transform(source).numpy()
        return pixels

    return Preprocess(("pixel_values",), "image", example, image=image)


def _save(
    module: torch.nn.Module, location: str, options: dict[str, Any], config: dict[str, Any], folder: Path
) -> None:
    """Write config.json: that of the model, with the size and the normalization of this export."""
    original, written = Path(location) / "config.json", folder / "config.json"
    if original.is_file():
        shutil.copyfile(original, written)
    else:
        save_config_for_hf(module, written)
    content: dict[str, Any] = read_json(written, OBJECT, remedy="download the model again")
    if "pretrained_cfg" not in content:  # timm's older form: one dictionary
        content = {"architecture": content.pop("architecture"), "pretrained_cfg": content}
    before = dict(content["pretrained_cfg"])
    content["pretrained_cfg"] |= {name: list(config[name]) for name in ("input_size", "mean", "std") if name in before}
    if options or content["pretrained_cfg"] != before:
        content["model_args"] = content.get("model_args", {}) | options
        written.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
