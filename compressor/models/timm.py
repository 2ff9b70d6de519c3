"""Models of timm: by name, from the hub, or from a local folder in timm's format."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from compressor.internals.timm import save_config_for_hf
from compressor.limitations import Limitation
from compressor.models.base import Model, ModelError, as_numpy, fixed_size, load_error_reason
from compressor.models.config_checks import check_counts, check_parameters
from compressor.models.preprocess import Preprocess

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
) -> Model:
    """Load a timm model as a classifier, or as a feature extractor if `task` is image-feature-extraction.

    Raises:
        ModelError: the weights cannot be read, or the task is not an image task.
    """
    resolved_task = task or "image-classification"
    if not resolved_task.startswith("image"):
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
    _check_config(folder, random_weights)
    try:
        module = timm.create_model(name, pretrained=not random_weights).eval().float()
    except Exception as error:  # timm does not wrap hub, file, pickle and shape errors
        raise ModelError(
            f"timm could not load {location}: {load_error_reason(error)}{_tags(location, error)}."
        ) from error
    if task == "image-classification" and getattr(module, "num_classes", 0) == 0:
        raise ModelError(f"{location} has no classifier (num_classes is 0); leave --task out, or choose another model.")
    label = folder.name if folder.is_dir() else location.removeprefix("hf-hub:")
    return _wrap(module, label, resolved_task, location, revision, random_weights, requested_task=task)


def _check_config(folder: Path, random_weights: bool) -> None:
    """Check the counts in the config of a local folder before the model is built.

    Raises:
        ModelError: a count cannot be that of a model, or does not belong to the weights.
    """
    if not (folder / "config.json").is_file():
        return
    config = json.loads((folder / "config.json").read_bytes())
    sizes = config.get("model_args") or {}
    check_counts(sizes, str(folder))
    check_counts({name: config.get(name) for name in ("img_size", "image_size")}, str(folder))
    number = {"num_classes": config["num_classes"]} if type(config.get("num_classes")) is int else {}
    build = partial(timm.create_model, config["architecture"], pretrained=False, **(number | sizes))
    check_parameters(build, str(folder), random_weights=random_weights)


def _tags(location: str, error: Exception) -> str:
    """Return the available pretrained tags if the error is about an unknown tag."""
    if "pretrained tag" not in str(error):
        return ""
    return f"; expected one of {', '.join(timm.list_pretrained(location.split('.', maxsplit=1)[0] + '.*'))}"


def _wrap(
    module: torch.nn.Module,
    name: str,
    task: str,
    location: str,
    revision: str | None,
    random_weights: bool,
    *,
    requested_task: str | None,
) -> Model:
    config = resolve_model_data_config(module)
    example = {"pixel_values": torch.rand(2, *config["input_size"], generator=torch.Generator().manual_seed(0))}
    classifies = task == "image-classification" and getattr(module, "num_classes", 0) > 0
    if not classifies:
        task = "image-feature-extraction"
    return Model(
        name=name,
        source="timm",
        task=task,
        module=module,
        call=_classify if classifies else _features,
        inputs=("pixel_values",),
        outputs=("logits",) if classifies else ("last_hidden_state", "pooler_output"),
        answer="logits" if classifies else "pooler_output",
        example=example,
        dynamic_axes={"pixel_values": {0: "batch"}},
        preprocess=_preprocess(config, example),
        save=partial(_save, module, location),
        revision=revision,
        hub_id=None if random_weights else _hub_id(module, location),
        random_weights=random_weights,
        limitations=(
            fixed_size(example["pixel_values"]),
            *(() if classifies or requested_task is not None else (NO_CLASSIFIER,)),
        ),
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


def _preprocess(config: dict[str, Any], example: dict[str, torch.Tensor]) -> Preprocess:
    transform = create_transform(**config, is_training=False)

    def image(pil_image: Image.Image) -> npt.NDArray[np.float32]:
        pixels: npt.NDArray[np.float32] = transform(pil_image).numpy()
        return pixels

    mode = "L" if config["input_size"][0] == 1 else "RGB"
    return Preprocess(("pixel_values",), "image", as_numpy(example), image=image, image_mode=mode)


def _save(module: torch.nn.Module, location: str, folder: Path) -> None:
    original = Path(location) / "config.json"
    if original.is_file():
        shutil.copyfile(original, folder / "config.json")
    else:
        save_config_for_hf(module, folder / "config.json")
