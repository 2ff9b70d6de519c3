"""The model description that every model source returns, and helpers that the sources share."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compressor.errors import CompressorError
from compressor.limitations import Limitation
from compressor.workspace.json_files import OBJECT, read_json

if TYPE_CHECKING:
    from compressor.models.preprocess import Preprocess

CONFIGS = ("config.json", "generation_config.json")
LONGEST = 200
_UNREACHABLE = "the hub cannot be reached and no copy is cached; connect to the network, or pass a downloaded folder"


class ModelError(CompressorError):
    """A MODEL argument that cannot be loaded."""


@dataclass(frozen=True)
class Model:
    """A module with the metadata and functions that export and evaluation need.

    Attributes:
        module: the torch module, in evaluation mode.
        call: calls the module with its inputs in order and returns its outputs in order.
        answer: name of the output that quality is measured on.
        example: input name to tensor, with a batch size of two.
        dynamic_axes: input name to {axis: name}, e.g. ``{0: "batch", 1: "sequence"}``.
        untrained: names of the parameters that the checkpoint lacks; a traced graph must not read them.
        save: writes the model's config and preprocessing files into a folder, under the file names of its library.
        hub_id: hub repository of the weights; None for other sources.
        random_weights: no checkpoint was read, so quality must not be reported.
        tokenizer: transformers tokenizer of a text model; None if the model has none.
        state: output name to the input name that it feeds in the next call, such as the KV cache.
        limitations: features that the model lacks here, and properties that were assumed.
    """

    name: str
    source: str
    task: str
    module: torch.nn.Module
    call: Callable[..., tuple[torch.Tensor, ...]]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    answer: str
    example: dict[str, torch.Tensor]
    dynamic_axes: dict[str, dict[int, str]]
    preprocess: Preprocess
    save: Callable[[Path], None]
    untrained: tuple[str, ...] = ()
    revision: str | None = None
    hub_id: str | None = None
    random_weights: bool = False
    tokenizer: Any = None
    state: Mapping[str, str] = field(default_factory=dict)
    limitations: tuple[Limitation, ...] = ()

    def classes(self) -> int | None:
        """Return the number of classes of a classifier, the last axis of its output; None for other tasks."""
        if not self.task.endswith("classification"):
            return None
        with torch.inference_mode():
            return int(self.call(self.module, *self.example.values())[self.outputs.index(self.answer)].shape[-1])


def fixed_size(images: torch.Tensor) -> Limitation:
    """Return the limitation of a model that takes images of one size only.

    Args:
        images: example inputs [batch, channels, height, width].
    """
    channels, height, width = images.shape[1:]
    return Limitation(
        "image size", f"the export takes only images of {height} x {width} pixels with {channels} channels"
    )


def as_numpy(example: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return the example inputs as NumPy arrays."""
    return {name: tensor.numpy() for name, tensor in example.items()}


def disable_use_cache(folder: Path) -> None:
    """Set ``use_cache`` to false in the configs of a folder, for a model without attention layers.

    Generation then passes the whole text in every call. Optimum's classes ignore this field and need
    ``use_cache=False`` as an argument.
    """
    for path in (folder / name for name in CONFIGS):
        if path.is_file():
            content = read_json(path, OBJECT, remedy="download the model again") | {"use_cache": False}
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def first_line(error: BaseException) -> str:
    """Return the first line of an error message, at most 200 characters.

    If the first line ends with a colon, the second line is appended.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" .")]
    if not lines:
        return type(error).__name__
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return text.rstrip(".") if len(text) <= LONGEST else f"{text[:LONGEST].rstrip(' .')} ..."


def no_language_model(location: str, kind: str) -> ModelError:
    """Return the error for a model of another kind whose weights are to stay on disk."""
    return ModelError(
        f"--max-memory is for language models of transformers, whose layers run one at a time from their files, but "
        f"{location} is {kind}; leave --max-memory out."
    )


def load_error_reason(error: BaseException) -> str:
    """Return the reason why a library could not load a model, with the remedy if the cause is recognized."""
    text = str(error).lower()
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in text or "weights only" in text:
        return "its weights are a pickle that runs code when it is read, which is refused; convert it to safetensors"
    if "trust_remote_code" in text:
        return "its repository contains custom code, which is not run; pass --trust-remote-code if you trust its author"
    return hub_error_reason(error) or first_line(error)


def hub_error_reason(error: BaseException) -> str | None:
    """Return the reason and the remedy of a failed download; None if the error does not come from the hub client."""
    from huggingface_hub import errors

    meanings: tuple[tuple[type[Exception], str], ...] = (
        (errors.GatedRepoError, "access is restricted; request it on the hub, then log in with `hf auth login`"),
        (errors.RepositoryNotFoundError, "the hub has no such repository, or it is private; check the name"),
        (errors.RevisionNotFoundError, "the repository has no such revision; check --revision"),
        (errors.LocalEntryNotFoundError, _UNREACHABLE),
        (errors.OfflineModeIsEnabled, _UNREACHABLE),
        (errors.EntryNotFoundError, "the repository lacks a required file; expected a timm or transformers model"),
        (errors.HFValidationError, "the name is not valid on the hub; expected owner/name"),
        (ConnectionError, _UNREACHABLE),
    )
    meaning = next((text for kind, text in meanings if isinstance(error, kind)), None)
    cause = error.__cause__ or error.__context__
    return meaning if meaning is not None or cause is None else hub_error_reason(cause)
