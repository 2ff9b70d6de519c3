"""Models of timm: by name, from the hub, or from a local folder in timm's own format."""

from __future__ import annotations

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
from compressor.models.base import Model, ModelError, as_numpy, fixed_size, why
from compressor.models.preprocess import Preprocess

NO_CLASSIFIER = Limitation("classifier", "the checkpoint has none (num_classes is 0), so its features are exported")


def load(
    where: str,
    *,
    task: str | None,
    revision: str | None,
    random_weights: bool,
    trust_remote_code: bool,
    cache: bool = True,
) -> Model:
    """Load a timm model as a classifier, or as a feature extractor when `task` asks for it.

    Raises:
        ModelError: the weights cannot be read, or the task is not one of images.
    """
    chosen = task or "image-classification"
    if not chosen.startswith("image"):
        raise ModelError(
            f"{where} is a timm model, which cannot do {chosen}; expected image-classification or "
            "image-feature-extraction."
        )
    folder = Path(where)
    if revision is not None and not where.startswith("hf-hub:"):
        raise ModelError(
            f"{where} is no hub id, so it has no revision {revision!r}; leave --revision out, or pass owner/name."
        )
    name = f"local-dir:{where}" if folder.is_dir() else where
    if revision is not None:
        name = f"{name}@{revision}"
    try:
        module = timm.create_model(name, pretrained=not random_weights).eval().float()
    except Exception as error:  # timm lets hub, file, pickle and shape errors through as they are
        raise ModelError(f"timm could not load {where}: {why(error)}{_tags(where, error)}.") from error
    if task == "image-classification" and getattr(module, "num_classes", 0) == 0:
        raise ModelError(f"{where} has no classifier (num_classes is 0); leave --task out, or choose another model.")
    label = folder.name if folder.is_dir() else where.removeprefix("hf-hub:")
    return _wrap(module, label, chosen, where, revision, random_weights, asked=task)


def _tags(where: str, error: Exception) -> str:
    """The tags there are, where the one asked for does not exist."""
    if "pretrained tag" not in str(error):
        return ""
    return f"; expected one of {', '.join(timm.list_pretrained(where.split('.', maxsplit=1)[0] + '.*'))}"


def _wrap(
    module: torch.nn.Module,
    name: str,
    task: str,
    where: str,
    revision: str | None,
    random_weights: bool,
    *,
    asked: str | None,
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
        save=partial(_save, module, where),
        revision=revision,
        hub_id=None if random_weights else _hub_id(module, where),
        random_weights=random_weights,
        limitations=(
            fixed_size(example["pixel_values"]),
            *(() if classifies or asked is not None else (NO_CLASSIFIER,)),
        ),
    )


def _hub_id(module: Any, where: str) -> str | None:
    """The repository that timm took the weights from; None for a folder's."""
    if Path(where).is_dir():
        return None
    found = where.removeprefix("hf-hub:") if where.startswith("hf-hub:") else module.pretrained_cfg.get("hf_hub_id")
    return str(found) if found else None


def _classify(module: torch.nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (module(pixels),)


def _features(module: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    features = module.forward_features(pixels)
    return features, module.forward_head(features, pre_logits=True)


def _preprocess(config: dict[str, Any], example: dict[str, torch.Tensor]) -> Preprocess:
    transform = create_transform(**config, is_training=False)

    def image(picture: Image.Image) -> npt.NDArray[np.float32]:
        pixels: npt.NDArray[np.float32] = transform(picture).numpy()
        return pixels

    mode = "L" if config["input_size"][0] == 1 else "RGB"
    return Preprocess(("pixel_values",), "image", as_numpy(example), image=image, image_mode=mode)


def _save(module: torch.nn.Module, where: str, folder: Path) -> None:
    original = Path(where) / "config.json"
    if original.is_file():
        shutil.copyfile(original, folder / "config.json")
    else:
        save_config_for_hf(module, folder / "config.json")
