"""What every source of models returns."""

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

if TYPE_CHECKING:
    from compressor.models.preprocess import Preprocess

CONFIGS = ("config.json", "generation_config.json")
LONGEST = 200
_UNREACHABLE = "the hub cannot be reached and it was not downloaded before; connect, or pass a downloaded folder"


class ModelError(CompressorError):
    """A MODEL argument that cannot be loaded."""


@dataclass(frozen=True)
class Model:
    """A module with everything around it that export and evaluation need.

    Attributes:
        module: the torch module, in evaluation mode.
        call: calls the module with its inputs in order, returns the outputs in order.
        answer: name of the output that quality is judged by.
        example: input name to tensor, two samples.
        dynamic_axes: input name to {axis: name}, e.g. ``{0: "batch", 1: "sequence"}``.
        untrained: parameter names that the checkpoint did not hold; a traced graph must not read them.
        save: writes the model's config and preprocessing into a folder, under the ecosystem's own file names.
        hub_id: where the weights lie on the hub, if they come from there.
        random_weights: no checkpoint was read, so no quality may be stated.
        tokenizer: the tokenizer of transformers, where the model takes texts and has one.
        state: output name to the input name that it is in the next call, such as a key-value cache.
        limitations: what the model could have had and does not have here, and what was assumed of it.
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
        """Number of classes of a classifier, by its last weight; None for other tasks."""
        if not self.task.endswith("classification"):
            return None
        with torch.inference_mode():
            return int(self.call(self.module, *self.example.values())[self.outputs.index(self.answer)].shape[-1])


def fixed_size(pictures: torch.Tensor) -> Limitation:
    """The limitation of a model that takes pictures of one size.

    Args:
        pictures: example inputs [batch, channels, height, width].
    """
    channels, height, width = pictures.shape[1:]
    return Limitation(
        "size of the pictures", f"the export takes {height} x {width} with {channels} channels and no other"
    )


def as_numpy(example: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Example inputs as arrays."""
    return {name: tensor.numpy() for name, tensor in example.items()}


def without_cache(folder: Path) -> None:
    """Say in the configs of a folder that its model keeps no cache, as where every attention is gone.

    Generation then hands it the whole text each time. Optimum's classes do not ask the configs: whoever opens the
    folder with them gives ``use_cache=False``.
    """
    for path in (folder / name for name in CONFIGS):
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8")) | {"use_cache": False}
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def first_line(error: BaseException) -> str:
    """The first line of an error's text, with the next where it only announces it; at most 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" .")]
    if not lines:
        return type(error).__name__
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return text.rstrip(".") if len(text) <= LONGEST else f"{text[:LONGEST].rstrip(' .')} ..."


def no_language_model(where: str, kind: str) -> ModelError:
    """The refusal to leave the weights of another kind of model on disk."""
    return ModelError(
        f"--max-memory is for language models of transformers, whose layers are run one after the other from their "
        f"files; {where} is {kind}: leave it out."
    )


def why(error: BaseException) -> str:
    """Why a library could not load a model, in words that say what to do where the cause is a known one."""
    text = str(error).lower()
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in text or "weights only" in text:
        return "its weights are a pickle that runs code when it is read, which is refused; convert it to safetensors"
    if "trust_remote_code" in text:
        return "it brings code of its own, which is not run; pass --trust-remote-code if you trust its author"
    return of_hub(error) or first_line(error)


def of_hub(error: BaseException) -> str | None:
    """What a failed download means; None where the error is not one of the hub client's."""
    from huggingface_hub import errors

    meanings: tuple[tuple[type[Exception], str], ...] = (
        (errors.GatedRepoError, "access to it has to be asked for on the hub; do so, then log in with `hf auth login`"),
        (errors.RepositoryNotFoundError, "the hub has no such repository, or it is private; check the name"),
        (errors.RevisionNotFoundError, "the hub has the repository, but not that revision; check --revision"),
        (errors.LocalEntryNotFoundError, _UNREACHABLE),
        (errors.OfflineModeIsEnabled, _UNREACHABLE),
        (errors.EntryNotFoundError, "the repository lacks a needed file; expected a timm or transformers model"),
        (errors.HFValidationError, "that is no name the hub allows; expected owner/name"),
        (ConnectionError, _UNREACHABLE),
    )
    found = next((text for kind, text in meanings if isinstance(error, kind)), None)
    cause = error.__cause__ or error.__context__
    return found if found is not None or cause is None else of_hub(cause)
