"""The model description that every model source returns, and helpers that the sources share."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt
import torch

from compressor.choices import ENCODER_DECODER_TASKS, VISION_LANGUAGE, ZERO_SHOT
from compressor.errors import CompressorError
from compressor.limitations import Limitation
from compressor.workspace.json_files import OBJECT, read_json

if TYPE_CHECKING:
    from compressor.models.class_names import ClassNames
    from compressor.models.preprocess import Preprocess

CONFIGS = ("config.json", "generation_config.json")
LONGEST = 200
RECOMPUTES = "so every new token recomputes the whole text"
LEFT_OUT = Limitation("KV cache", f"left out by --no-cache, {RECOMPUTES}")
PER_IMAGE = "logits_per_image"  # [images, texts]: the similarities of a model with two towers
_UNREACHABLE = "the hub cannot be reached and no copy is cached; connect to the network, or pass a downloaded folder"


class ModelError(CompressorError):
    """A MODEL argument that cannot be loaded."""


class OtherInputsError(ModelError):
    """A model that fails on the inputs that its task has."""


class NoImageSizeError(ModelError):
    """A size of images for a model that takes none."""


class NoSequenceLengthError(ModelError):
    """A number of tokens or samples for a model that takes neither texts nor sound of any length."""


@dataclass(frozen=True)
class EvaluatedOutput:
    """The output of a model that quality is measured on.

    Attributes:
        outputs: names of all outputs, in order.
        answer: name of the output.
        stacked: names of further outputs that are evaluated with it.
        places: names of outputs with indices of tokens, [rows, remaining tokens], of a model that drops tokens; the
            answer is for those of the shortest. At a dropped token it is that at the last one that remains before it.
        to_logits: the function that turns the output into logits, of a model that returns probabilities.
    """

    outputs: tuple[str, ...]
    answer: str
    stacked: tuple[str, ...] = ()
    places: tuple[str, ...] = ()
    to_logits: Callable[[Any], Any] | None = None

    def of(self, outputs: Mapping[str, Any]) -> Any:
        """Return it from outputs by name; several outputs [rows, ...] become [rows, outputs, ...]."""
        value = self._returned(outputs)
        return value if self.to_logits is None else self.to_logits(value)

    def _returned(self, outputs: Mapping[str, Any]) -> Any:
        """Return it as the model returns it."""
        places = [outputs[name] for name in self.places if name in outputs]
        if places:
            shortest = min(places, key=lambda each: int(each.shape[1]))
            return at_every_token(np.asarray(outputs[self.answer]), np.asarray(shortest))
        if not self.stacked:
            return outputs[self.answer]
        values = [outputs[name] for name in (self.answer, *self.stacked)]
        return torch.stack(values, 1) if isinstance(values[0], torch.Tensor) else np.stack(values, 1)

    def evaluated_in(self, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return it from the outputs of a graph, in the order of `outputs`.

        A rewritten graph may lack the last ones, such as the cache of an attention that was removed.
        """
        return torch.as_tensor(self.of(dict(zip(self.outputs, outputs, strict=False))))


def at_every_token(values: npt.NDArray[Any], places: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the values of all tokens from those of the tokens that remain.

    Args:
        values: [rows, remaining tokens, ...].
        places: indices of the remaining tokens, ascending, [rows, remaining tokens]; the last token remains.

    Returns:
        [rows, tokens, ...]; a dropped token has the value of the last remaining one before it.

    >>> at_every_token(np.array([[5, 7, 9]]), np.array([[0, 2, 3]])).tolist()
    [[5, 5, 7, 9]]
    """
    everywhere = np.arange(places[0, -1] + 1)
    sources = [np.searchsorted(row, everywhere, side="right") - 1 for row in places]
    return np.stack([value[source.clip(min=0)] for value, source in zip(values, sources, strict=True)])


@dataclass(frozen=True)
class Model:
    """A module with the metadata and functions that export and evaluation need.

    Attributes:
        module: the torch module, in evaluation mode.
        call: calls the module with its inputs in order and returns its outputs in order.
        answer: name of the output that quality is measured on.
        stacked: names of further outputs that are evaluated with it, such as the logits of the end of a span.
        places: names of the outputs with the indices of the tokens that remain, see `EvaluatedOutput`.
        to_logits: turns the evaluated output into logits; None if the model returns logits, or no classes.
        example: input name to tensor, with a batch size of two.
        dynamic_axes: input name to {axis: name}, e.g. ``{0: "batch", 1: "sequence"}``.
        untrained: names of the parameters that the checkpoint lacks; a traced graph must not read them.
        save: writes the model's config and preprocessing files into a folder, under the file names of its library.
        hub_id: hub repository of the weights; None for other sources.
        random_weights: no checkpoint was read, so quality must not be reported.
        tokenizer: transformers tokenizer of a text model; None if the model has none.
        problem_type: problem type of a classifier, as in configs of transformers; None for other tasks.
        state: output name to the input name that it feeds in the next call, such as the KV cache. The caches of
            cross-attentions are no inputs of an encoder-decoder, but of the file of its decoder.
        sizes: heights and widths at which a graph with dynamic height and width is compared with the module.
        interpolates: `call` makes a model of transformers interpolate its position embeddings.
        limitations: features that the model lacks here, and properties that were assumed.
        class_names: names of the classes of a classifier; None if the model does not name them.
        dtypes: types of the float weights in the checkpoint, by the path in the module, which holds them as float32;
            empty if there is no checkpoint or its types are unknown.
        gguf_file: the GGUF file that the model was read from; None for other sources.
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
    stacked: tuple[str, ...] = ()
    places: tuple[str, ...] = ()
    to_logits: Callable[[Any], Any] | None = None
    problem_type: str | None = None
    state: Mapping[str, str] = field(default_factory=dict)
    sizes: tuple[tuple[int, int], ...] = ()
    interpolates: bool = False
    limitations: tuple[Limitation, ...] = ()
    class_names: ClassNames | None = None
    gguf_file: Path | None = None

    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict, repr=False)

    @property
    def evaluated_output(self) -> EvaluatedOutput:
        """Return the output that quality is measured on."""
        return EvaluatedOutput(self.outputs, self.answer, self.stacked, self.places, self.to_logits)

    @property
    def is_encoder_decoder(self) -> bool:
        """Return whether the model has an encoder and a decoder, whose files are exported one by one."""
        return self.task in ENCODER_DECODER_TASKS

    @property
    def has_two_towers(self) -> bool:
        """Return whether the model has a tower of images and a tower of texts, each with a batch of its own."""
        return PER_IMAGE in self.outputs

    @property
    def is_vision_language(self) -> bool:
        """Return whether the model generates texts from images and texts."""
        return self.task == VISION_LANGUAGE

    @property
    def has_parts(self) -> bool:
        """Return whether the model is exported as one file for each of its parts."""
        return self.is_encoder_decoder or self.is_vision_language

    @overload
    def evaluated(self, outputs: Mapping[str, torch.Tensor]) -> torch.Tensor: ...

    @overload
    def evaluated(self, outputs: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[Any]: ...

    def evaluated(self, outputs: Mapping[str, Any]) -> Any:
        """Return the output that quality is measured on; several outputs [rows, ...] become [rows, outputs, ...]."""
        return self.evaluated_output.of(outputs)

    def evaluated_in(self, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the output that quality is measured on from the outputs of a graph, see `EvaluatedOutput`."""
        return self.evaluated_output.evaluated_in(outputs)

    def classes(self) -> int | None:
        """Return the number of classes, labels or numbers of a head that predicts them; None for other tasks.

        Raises:
            ModelError: the model fails on its example inputs.
        """
        if self.task == ZERO_SHOT:  # its classes are texts, which come with the data
            return None if self.class_names is None else len(self.class_names)
        axis = 1 if self.task == "image-segmentation" else -1
        if not (self.task.endswith("classification") or axis == 1):
            return None
        try:
            with torch.inference_mode():
                outputs = self.call(self.module, *self.example.values())
        except Exception as error:  # modules raise errors of all kinds
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in self.example.items())
            raise ModelError(
                f"{self.name} ({type(self.module).__name__}) fails on inputs of its own sizes, {shapes} "
                f"({first_line(error)}); check its config."
            ) from error
        return int(outputs[self.outputs.index(self.answer)].shape[axis])


class UndetectedCacheError(ModelError):
    """A language model whose KV cache is wanted but cannot be detected.

    Attributes:
        reason: what was found, a clause without a full stop.
        uncached: the model as `--no-cache` exports it.
    """

    def __init__(self, reason: str, uncached: Model) -> None:
        super().__init__(
            f"the KV cache of {uncached.name} could not be detected: {reason}; pass --no-cache to export without a "
            f"cache, {RECOMPUTES}."
        )
        self.reason = reason
        self.uncached = uncached


def fixed_size(images: torch.Tensor) -> Limitation:
    """Return the limitation of a model that takes images of one size only.

    Args:
        images: example inputs [batch, channels, height, width].
    """
    channels, height, width = images.shape[1:]
    noun = "channel" if channels == 1 else "channels"
    return Limitation("image size", f"the export takes only images of {height} x {width} pixels with {channels} {noun}")


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
    reason = hub_error_reason(error)
    if reason is None and isinstance(error, FileNotFoundError):  # safetensors sets no `filename`
        return f"{first_line(error)}, which another of its files names; copy the whole model again"
    return reason or first_line(error)


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


def most_tokens(model: Model) -> int | None:
    """Return the number of positions of a model of transformers; None if its config states no limit."""
    config = getattr(model.module, "config", None)
    if not hasattr(config, "max_position_embeddings"):  # that of a vision-language model has parts
        config = getattr(config, "text_config", None)
    most = getattr(config, "max_position_embeddings", None)
    return most if isinstance(most, int) else None


def copy_sharing_tensors(module: torch.nn.Module) -> torch.nn.Module:
    """Return a copy of a module with the same tensors as parameters and buffers.

    A module may keep tensors of a call, such as relative positions. Where a call is made with tensors without elements,
    a copy keeps them.
    """
    tensors = (*module.parameters(), *module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
