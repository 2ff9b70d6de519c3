"""Models of transformers: hub ids and ``save_pretrained`` folders, with their tokenizer or image processor."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

from compressor.choices import CTC, ImageSize
from compressor.internals.transformers import cached, quiet, with_random_weights
from compressor.limitations import Limitation
from compressor.models import class_names
from compressor.models.audio.features import find_features
from compressor.models.audio.inputs import find_inputs, frames_of, takes_series, takes_sound
from compressor.models.base import Model, ModelError, as_numpy, first_line, load_error_reason, no_language_model
from compressor.models.config_shapes import CLIPS
from compressor.models.encoder_decoder import parts as encoder_decoder
from compressor.models.image_size import CONFIG_SIZE, Call, SizedModel, Sizing, fit_statistics, pixels, sized_model
from compressor.models.image_size import text as size_text
from compressor.models.preprocess import Preprocess, Tokenise
from compressor.models.text import nemotron_nas, sentence_transformers
from compressor.models.text.aligned_tokens import tokenize_aligned
from compressor.models.text.experts import use_writable_experts
from compressor.models.text.kv_cache import with_cache
from compressor.models.text.padding import Padding, allow_batches, causal_padding, encode, find_padding
from compressor.models.text.probe import accepts, calling, computes_with, position_limit, text
from compressor.models.video.inputs import find_input, takes_videos
from compressor.models.weights.config_checks import check_counts, check_parameters
from compressor.models.weights.lazy_weights import module_on_disk
from compressor.models.weights.stored_dtypes import dtypes_by_path, dtypes_in, weight_files
from compressor.workspace.json_files import OBJECT, JsonFileError, read_json

HEADS = {
    "ForImageClassification": "image-classification",
    "ForImageClassificationWithTeacher": "image-classification",
    "ForSequenceClassification": "text-classification",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForQuestionAnsweringSimple": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForSemanticSegmentation": "image-segmentation",
    "ForDepthEstimation": "depth-estimation",
    "ForAudioClassification": "audio-classification",
    "ForAudioFrameClassification": "audio-frame-classification",
    "ForCTC": CTC,
    "ForVideoClassification": "video-classification",
}
AUTO = {
    "image-classification": "AutoModelForImageClassification",
    "text-classification": "AutoModelForSequenceClassification",
    "text-generation": "AutoModelForCausalLM",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "fill-mask": "AutoModelForMaskedLM",
    "image-segmentation": "AutoModelForSemanticSegmentation",
    "depth-estimation": "AutoModelForDepthEstimation",
    "audio-classification": "AutoModelForAudioClassification",
    "audio-frame-classification": "AutoModelForAudioFrameClassification",
    CTC: "AutoModelForCTC",
    encoder_decoder.TEXT: "AutoModelForSeq2SeqLM",
    encoder_decoder.SPEECH: "AutoModelForSpeechSeq2Seq",
    "video-classification": "AutoModelForVideoClassification",
}
# The outputs of heads that are evaluated, by their names in transformers; those of all other heads are hidden states.
OUTPUTS = {
    "image-classification": ("logits",),
    "text-classification": ("logits",),
    "text-generation": ("logits",),
    "token-classification": ("logits",),
    "fill-mask": ("logits",),
    "image-segmentation": ("logits",),
    "question-answering": ("start_logits", "end_logits"),
    "depth-estimation": ("predicted_depth",),
    "audio-classification": ("logits",),
    "audio-frame-classification": ("logits",),
    CTC: ("logits",),
    "video-classification": ("logits",),
}
# Inputs of another kind than texts or images alone, by their names in transformers.
OTHER_INPUTS = {
    "pixel_values": "images",
    "pixel_values_videos": "videos",
    "visual_embeds": "features of images",
    "bbox": "positions on a page",
    "input_features": "sound",
    "input_values": "sound",
    "input_ids": "texts",
}
DECODER_IDS = "decoder_input_ids"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
)
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
EXAMPLE_TOKENS = 16
USUAL = 2048  # maximum number of tokens of a text, if the maximum length of the model is unknown
IMAGE_DEFAULTS = {"image_size": 224, "num_channels": 3}  # if the config lacks them, as the configs of ResNets do
UNLIMITED = 10**6  # tokenizers without a limit report a number like 1e30


def load(
    location: str,
    *,
    task: str | None,
    revision: str | None,
    random_weights: bool,
    trust_remote_code: bool,
    cache: bool = True,
    on_disk: bool = False,
    image_size: ImageSize = None,
) -> Model:
    """Load a transformers model with the head that its config names, or with the head for `task`.

    With `on_disk`, the weights stay in their files, see `compressor.models.weights.lazy_weights`. Without `cache`, a
    language model is traced without its KV cache. An image model takes images of `image_size`, by default those of its
    image processor.

    Raises:
        ModelError: config or weights cannot be read, the architecture needs code from the repository, its head is not
            supported, or the cache of a language model cannot be detected.
    """
    if revision is not None and Path(location).is_dir():
        raise ModelError(f"{location} is a local folder, so it has no revision {revision!r}; leave --revision out.")
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    nemotron_nas.register()
    with quiet():
        try:
            config = transformers.AutoConfig.from_pretrained(location, **options)
            sentence_files = sentence_transformers.find_files(partial(_optional, location, revision=revision))
            resolved_task = _ctc_or(task, config) or _task(config, sentence_files, location)
            check_counts(config, location)
            if isinstance(config, nemotron_nas.NemotronNasConfig):
                nemotron_nas.block_shapes(config, location)
            kind = _kind(config, resolved_task)
            if not trust_remote_code:  # transformers would ask on the terminal whether to run the code
                check_parameters(partial(with_random_weights, kind, config), location, random_weights=random_weights)
            if on_disk:
                if resolved_task != "text-generation":
                    raise no_language_model(location, f"a model for {resolved_task}")
                module = module_on_disk(kind, config, location, options)
                model = _wrap(module.eval(), location, resolved_task, options, sentence_files, False, (), cache)
                return replace(model, dtypes=_dtypes(module, location, revision))
            module, missing, left_out = _module(location, config, resolved_task, random_weights, options)
        except ModelError:
            raise
        except Exception as error:  # transformers does not wrap hub, file and shape errors
            raise ModelError(f"transformers could not load {location}: {load_error_reason(error)}.") from error
        model = _wrap(
            module.eval().float(),
            location,
            resolved_task,
            options,
            sentence_files,
            random_weights,
            missing,
            cache,
            image_size,
        )
        dtypes = {} if random_weights else _dtypes(module, location, revision)
        return replace(model, limitations=(*model.limitations, *_left_out(left_out)), dtypes=dtypes)


def _dtypes(module: torch.nn.Module, location: str, revision: str | None) -> dict[str, torch.dtype]:
    """Return the types of the weights in the files of a checkpoint, by their paths in the module."""
    return dtypes_by_path(dtypes_in(weight_files(location, revision)), module)


def _optional(location: str, name: str, revision: str | None) -> Path | None:
    """Return the path of a file of a local folder or of a hub repository; None if the file does not exist."""
    if Path(location).is_dir():
        path = Path(location) / name
        return path if path.is_file() else None
    return cached(location, name, revision)


def _ctc_or(task: str | None, config: Any) -> str | None:
    """Return a given task; of speech recognition, for which the hub has one name, that of a CTC head if it has one."""
    ctc = task == encoder_decoder.SPEECH and (config.architectures or [""])[0].endswith("ForCTC")
    return CTC if ctc else task


def _task(config: Any, sentence_files: dict[str, Path], location: str) -> str:
    """Return the task of the head that the config names.

    Raises:
        ModelError: the head is not supported.
    """
    architecture = (config.architectures or [""])[0]
    from_to = encoder_decoder.task_of(config, architecture, location)
    if from_to is not None:
        return from_to
    # A cross-encoder also has files of sentence-transformers, but it scores a pair instead of embedding a sentence.
    embeds = "modules.json" in sentence_files or "config_sentence_transformers.json" in sentence_files
    if embeds and not architecture.endswith("ForSequenceClassification"):
        return "sentence-similarity"
    for ending, task in HEADS.items():
        if architecture.endswith(ending):
            sound = task == "text-classification" and takes_sound(getattr(transformers, architecture, None))
            return "audio-classification" if sound else task  # Wav2Vec2ForSequenceClassification classifies sound
    images = hasattr(config, "image_size") and not any(hasattr(config, name) for name in CLIPS)
    features = "image-feature-extraction" if images else "feature-extraction"
    if architecture and not _is_bare(architecture):
        raise ModelError(
            f"{location} is a {architecture}, a head that is not supported; expected one of "
            f"{', '.join(f'...{ending}' for ending in HEADS)}, or pass --task {features} to export the model without "
            "its head."
        )
    return features


def _module(
    location: str, config: Any, task: str, random_weights: bool, options: dict[str, Any]
) -> tuple[torch.nn.Module, tuple[str, ...], tuple[str, ...]]:
    """Return the module, the missing keys of the checkpoint, and its unexpected keys."""
    kind = _kind(config, task)
    if random_weights:
        with torch.random.fork_rng(devices=[]):  # the random state of the caller stays as it is
            torch.manual_seed(0)
            return with_random_weights(kind, config), (), ()
    module, info = kind.from_pretrained(location, **options, dtype=torch.float32, output_loading_info=True)
    return module, tuple(sorted(info["missing_keys"])), tuple(sorted(info["unexpected_keys"]))


def _kind(config: Any, task: str) -> Any:
    """Return the class that loads a model for a task."""
    return getattr(transformers, AUTO[task]) if task in AUTO else _headless((config.architectures or [""])[0])


def _headless(architecture: str) -> Any:
    """Return the class of that name if its output is hidden states, such as T5EncoderModel; AutoModel otherwise.

    The name comes from a file, so it must not select any other object of the package transformers.
    """
    named = getattr(transformers, architecture, None)
    model = isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)
    return named if model and _is_bare(architecture) else transformers.AutoModel


def _is_bare(architecture: str) -> bool:
    """Return whether the output of a class of this name is hidden states."""
    return architecture.endswith(("Model", "Encoder", "Backbone")) and not architecture.endswith(
        ("HeadModel", "HeadsModel")
    )


@dataclass(frozen=True)
class _Signature:
    """The output names of a module for a task, and the function that computes them."""

    outputs: tuple[str, ...]
    answer: str
    call: Callable[..., tuple[torch.Tensor, ...]]


def _wrap(
    module: Any,
    location: str,
    task: str,
    options: dict[str, Any],
    sentence_files: dict[str, Path],
    random_weights: bool,
    untrained: tuple[str, ...],
    cache: bool = True,
    image_size: ImageSize = None,
) -> Model:
    if task in encoder_decoder.TASKS:
        return _wrap_encoder_decoder(module, location, task, options, random_weights, untrained, cache)
    if takes_videos(module):
        return _wrap_videos(module, location, task, options, random_weights, untrained)
    if takes_sound(module) or takes_series(module):
        return _wrap_sound(module, location, task, options, random_weights, untrained)
    image = module.main_input_name == "pixel_values"
    experts = use_writable_experts(module)
    processors = _image_processor(location, options) if image else _tokenizer(location, options)
    if not image and processors is not None:
        sentence_transformers.prepare_tokenizer(processors, sentence_files, location)
    if not image:
        _check_text_model(module, task, location)
    inputs = ("pixel_values",) if image else _text_inputs(module, processors, location)
    signature = _signature(task, inputs)
    sized = _sized(module, signature.call, processors, image_size, location) if image else None
    longest = None if image else _max_length(module, processors, sentence_files)
    padding, padding_limitations = _padding(module, signature, inputs, processors, task, image)
    example = _text_example(module, inputs, longest) if sized is None else sized.sizing.example(_channels(module))
    axes: dict[str, dict[int, str]] = {name: {0: "batch", 1: "sequence"} for name in inputs}
    if sized is not None:
        axes, processors = sized.sizing.axes, sized.processor
    model = Model(
        **_facts(module, location, task, options, random_weights, untrained),
        call=signature.call if sized is None else sized.call,
        inputs=inputs,
        outputs=signature.outputs,
        answer=signature.answer,
        stacked=signature.outputs[1:] if task == "question-answering" else (),
        example=example,
        dynamic_axes=axes,
        preprocess=(
            _text_preprocess(inputs, example, processors, longest, padding)
            if sized is None
            else _image_preprocess(module, processors, sized.sizing)
        ),
        save=partial(_save, module, processors, sentence_files),
        tokenizer=None if image else processors,
        sizes=() if sized is None else sized.sizing.checked,
        interpolates=sized is not None and sized.interpolates,
        limitations=(
            *(
                _image_limitations(module, sized)
                if sized is not None
                else (*_text_limitations(processors, inputs, longest), *padding_limitations, *experts)
            ),
            *_other_inputs(module, inputs),
        ),
        class_names=_class_names(module.config) if task.endswith("classification") else None,
    )
    if task == "sentence-similarity":
        find = partial(_optional, location, revision=options["revision"])
        return sentence_transformers.embedding(model, sentence_files, find, location)
    return model if task != "text-generation" else with_cache(model, cache)


def _facts(
    module: Any, location: str, task: str, options: dict[str, Any], random_weights: bool, untrained: tuple[str, ...]
) -> dict[str, Any]:
    """Return the fields of a `Model` that do not depend on its kind."""
    folder = Path(location).is_dir()
    return {
        "name": Path(location).name if folder else location,
        "source": "transformers",
        "task": task,
        "module": module,
        "untrained": untrained,
        "revision": options["revision"],
        "hub_id": None if random_weights or folder else location,
        "random_weights": random_weights,
    }


def _wrap_encoder_decoder(
    module: Any,
    location: str,
    task: str,
    options: dict[str, Any],
    random_weights: bool,
    untrained: tuple[str, ...],
    cache: bool,
) -> Model:
    tokenizer = _tokenizer(location, options)
    features = _feature_extractor(location, options) if task == encoder_decoder.SPEECH else None
    # The mask is an input, because the decoder needs it for padded sources.
    inputs = ("input_features",) if task == encoder_decoder.SPEECH else ("input_ids", "attention_mask")
    parts = encoder_decoder.parts_of(module, task, inputs, tokenizer, location, cache=cache)
    encoder = module.get_encoder() if hasattr(module.get_encoder(), "config") else module
    longest = None if task == encoder_decoder.SPEECH else _max_length(encoder, tokenizer, {})
    source = {name: value for name, value in parts.data_example.items() if name in inputs}
    padding = causal_padding(tokenizer, module.config) if tokenizer is not None else None
    preprocess = (
        Preprocess(parts.call.data_inputs, "tensor", as_numpy(parts.data_example))
        if task == encoder_decoder.SPEECH
        else _text_preprocess(inputs, source, tokenizer, longest, padding)
    )
    return Model(
        **_facts(module, location, task, options, random_weights, untrained),
        call=parts.call.call,
        inputs=parts.call.inputs,
        outputs=parts.call.outputs,
        answer="logits",
        example=parts.call.example(parts.data_example),
        dynamic_axes=parts.call.dynamic_axes,
        preprocess=replace(
            preprocess,
            inputs=parts.call.data_inputs,
            example=as_numpy(parts.data_example),
            complete=parts.call.complete,
            decoder=parts.decoder,
        ),
        save=partial(_save_sound, module, features, tokenizer),
        tokenizer=tokenizer,
        state=parts.call.state,
        limitations=tuple(_text_limitations(tokenizer, inputs, longest)) if task == encoder_decoder.TEXT else (),
    )


def _wrap_sound(
    module: Any, location: str, task: str, options: dict[str, Any], random_weights: bool, untrained: tuple[str, ...]
) -> Model:
    """Return the model of a module that takes sound or a time series, with its feature extractor."""
    extractor, tokenizer = _feature_extractor(location, options), _tokenizer(location, options)
    features = None if extractor is None else find_features(extractor, module.main_input_name)
    found = find_inputs(module, lambda names: _signature(task, names).call, features, location)
    signature = _signature(task, found.names)
    frames = frames_of(module, signature.call, found, signature.outputs.index(signature.answer))
    return Model(
        **_facts(module, location, task, options, random_weights, untrained),
        call=signature.call,
        inputs=found.names,
        outputs=signature.outputs,
        answer=signature.answer,
        example=found.example,
        dynamic_axes=found.axes,
        preprocess=found.preprocess(frames),
        save=partial(_save_sound, module, extractor, tokenizer),
        limitations=(*found.limitations, *_other_inputs(module, found.names)),
        class_names=_class_names(module.config) if task.endswith("classification") else None,
    )


def _wrap_videos(
    module: Any, location: str, task: str, options: dict[str, Any], random_weights: bool, untrained: tuple[str, ...]
) -> Model:
    """Return the model of a module that takes videos, with its video processor."""
    processor = _video_processor(location, options)
    signature = _signature(task, (module.main_input_name,))
    found = find_input(module, signature.call, processor, location)
    return Model(
        **_facts(module, location, task, options, random_weights, untrained),
        call=signature.call,
        inputs=(found.name,),
        outputs=signature.outputs,
        answer=signature.answer,
        example={found.name: found.example},
        dynamic_axes={found.name: {0: "batch"}},
        preprocess=found.preprocess,
        save=partial(_save, module, processor, {}),
        limitations=(*found.limitations, *_other_inputs(module, (found.name,))),
        class_names=_class_names(module.config) if task.endswith("classification") else None,
    )


def _video_processor(location: str, options: dict[str, Any]) -> Any:
    try:
        return transformers.AutoVideoProcessor.from_pretrained(location, **options)
    except Exception:  # older checkpoints have an image processor, which takes the frames of a clip
        return _image_processor(location, options)


def _feature_extractor(location: str, options: dict[str, Any]) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # AST's own settings leave some mel filters empty
            return transformers.AutoFeatureExtractor.from_pretrained(location, **options)
    except Exception as error:  # transformers does not wrap the errors of damaged files
        _check_absent("feature extractor", PROCESSOR_FILES, location, options, error)
        return None


def _save_sound(module: Any, extractor: Any, tokenizer: Any, folder: Path) -> None:
    _save(module, tokenizer, {}, folder)
    if extractor is not None:
        extractor.save_pretrained(folder)


def _class_names(config: Any) -> class_names.ClassNames | None:
    return class_names.with_synsets(class_names.from_config(config, config.num_labels))


def _left_out(names: tuple[str, ...]) -> Iterator[Limitation]:
    """Yield a limitation if the checkpoint has weights that the model does not use, such as those of another head."""
    if names:
        yield Limitation(
            "weights left out", f"{len(names)} tensors of the checkpoint, the first of which is {names[0]}"
        )


def _image_limitations(module: Any, sized: SizedModel) -> Iterator[Limitation]:
    """Yield the limitations of an image model."""
    if sized.processor is None:
        yield Limitation("preprocessing", "the model has no image processor, so the data must be preprocessed arrays")
    config = _vision_config(module)
    yield from sized.limitations
    for name, assumed in IMAGE_DEFAULTS.items():
        if getattr(config, name, None) is None:
            known = name == "image_size" and sized.sizing.size != _configured_size(module)
            used = f"{size_text(sized.sizing.size)} is used" if known else f"{assumed} is assumed"
            yield Limitation(f"{name} of the config", f"the config does not specify it, so {used}")


def _text_limitations(tokenizer: Any, inputs: tuple[str, ...], longest: int | None) -> Iterator[Limitation]:
    """Yield the limitations of a text model."""
    if tokenizer is None:
        yield Limitation("tokenizer", "the model has no tokenizer, so the data must be token ids")
        return
    if tokenizer.pad_token is None:
        yield Limitation("padding token", "the tokenizer has none and no end token; padding is masked")
    elif tokenizer.pad_token == tokenizer.eos_token:
        yield Limitation("padding token", f"the end token {tokenizer.eos_token} is used for padding and is masked")
    left_out = [name for name in tokenizer.model_input_names if name not in inputs]
    if left_out:
        yield Limitation(f"input {', '.join(left_out)}", "the tokenizer returns it, but the export does not take it")
    if longest is None:
        yield Limitation(
            "length", f"the maximum number of tokens of the model is unknown, so texts are truncated to {USUAL} tokens"
        )


def _other_inputs(module: Any, inputs: tuple[str, ...]) -> Iterator[Limitation]:
    """Yield a limitation for what the forward of a module takes besides its inputs, such as the images of LLaVA."""
    own = inspect.signature(module.forward).parameters
    left_out = [name for name in OTHER_INPUTS if name in own and name not in inputs]
    if left_out:
        kinds = " and ".join(dict.fromkeys(OTHER_INPUTS[name] for name in left_out))
        yield Limitation(f"input {', '.join(left_out)}", f"the model also takes {kinds}, but the export does not")
    if DECODER_IDS in own and DECODER_IDS not in inputs:
        yield Limitation(
            f"input {DECODER_IDS}", "the export does not take it; the decoder reads the text of the encoder, shifted"
        )


def _signature(task: str, inputs: tuple[str, ...]) -> _Signature:
    names = OUTPUTS.get(task)
    if names is not None:
        extra = {"use_cache": False} if task == "text-generation" else {}
        return _Signature(names, names[0], partial(_head_outputs, inputs=inputs, names=names, extra=extra))
    return _Signature(("last_hidden_state",), "last_hidden_state", partial(_hidden, inputs=inputs))


def _head_outputs(
    module: Any, *tensors: torch.Tensor, inputs: tuple[str, ...], names: tuple[str, ...], extra: dict[str, Any]
) -> tuple[torch.Tensor, ...]:
    returned = module(**dict(zip(inputs, tensors, strict=True)), **extra)
    return tuple(returned[name] for name in names)


def _hidden(module: Any, *tensors: torch.Tensor, inputs: tuple[str, ...]) -> tuple[torch.Tensor, ...]:
    return (module(**dict(zip(inputs, tensors, strict=True))).last_hidden_state,)


def _check_text_model(module: Any, task: str, location: str) -> None:
    """Check that a module gives the outputs of a task for token ids alone.

    Encoder-decoders also need the tokens of the decoder, or an end token in every text; CLIP also needs an image; an
    encoder can return a pooled output only.

    Raises:
        ModelError: it fails, or returns other outputs.
    """
    signature = _signature(task, ("input_ids",))
    try:
        with calling(module):
            signature.call(module, text()["input_ids"])
    except Exception as error:  # modules raise errors of all kinds
        raise ModelError(
            f"{location} is a {type(module).__name__}, which does not give {' and '.join(signature.outputs)} for any "
            f"text of token ids alone ({first_line(error)}); pass it as a module of your own, package.module:factory, "
            "whose forward takes tensors and returns the output that you need."
        ) from error


def _text_inputs(module: Any, tokenizer: Any, location: str) -> tuple[str, ...]:
    """Return the names of the inputs that the tokenizer returns and the module uses.

    Raises:
        ModelError: the module fails on a text with an attention mask or token types, though it takes them.
    """
    offered = tokenizer.model_input_names if tokenizer is not None else ["input_ids", "attention_mask"]
    inputs = text()
    ids = {"input_ids": inputs["input_ids"]}
    type_ids = torch.zeros_like(inputs["input_ids"])
    try:
        with calling(module):
            takes_mask = "attention_mask" in offered and accepts(
                module, ids, "attention_mask", inputs["attention_mask"]
            )
            takes_types = "token_type_ids" in offered and computes_with(module, ids, "token_type_ids", type_ids)
    except Exception as error:  # modules raise errors of all kinds
        raise ModelError(
            f"{location} is a {type(module).__name__}, which takes a text but fails on one with an attention mask or "
            f"token types ({first_line(error)}); check its config, or pass it as a module of your own, "
            "package.module:factory."
        ) from error
    used = {"input_ids": True, "attention_mask": takes_mask, "token_type_ids": takes_types}
    return tuple(name for name, is_used in used.items() if is_used)


def _vision_config(module: Any) -> Any:
    return getattr(module.config, "vision_config", module.config)


def _channels(module: Any) -> int:
    return int(getattr(_vision_config(module), "num_channels", None) or IMAGE_DEFAULTS["num_channels"])


def _configured_size(module: Any) -> tuple[int, int]:
    size = getattr(_vision_config(module), "image_size", None) or IMAGE_DEFAULTS["image_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _sized(module: Any, call: Call, processor: Any, image_size: ImageSize, location: str) -> SizedModel:
    """Return the model at the requested size of images, or at that of its image processor."""
    channels = _channels(module)
    _, limits = fit_statistics(processor, channels)
    sized = sized_model(module, call, processor, _configured_size(module), channels, image_size, location)
    own = sized.limitations
    if getattr(_vision_config(module), "image_size", None) is None:  # there is no size that could differ
        own = tuple(limitation for limitation in own if limitation.feature != CONFIG_SIZE)
    return replace(sized, limitations=(*own, *limits))


def _text_example(module: Any, inputs: tuple[str, ...], longest: int | None) -> dict[str, torch.Tensor]:
    """Return two rows of tokens, the second with padding, so that the mask is not constant."""
    vocabulary = module.config.get_text_config().vocab_size
    tokens = EXAMPLE_TOKENS if longest is None else min(EXAMPLE_TOKENS, longest)
    ids = torch.randint(0, vocabulary, (2, tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, tokens * 3 // 4 :] = 0
    values = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    return {name: values[name] for name in inputs}


def _image_processor(location: str, options: dict[str, Any]) -> Any:
    try:
        return transformers.AutoImageProcessor.from_pretrained(location, **options)
    # transformers does not wrap the errors of damaged files. Without an image processor, float arrays work as data.
    except Exception as error:
        _check_absent("image processor", PROCESSOR_FILES, location, options, error)
        return None


def _check_absent(
    kind: str, names: tuple[str, ...], location: str, options: dict[str, Any], error: BaseException
) -> None:
    """Check that a preprocessor that could not be loaded has no files, so that broken files are not ignored.

    Raises:
        ModelError: one of the files exists.
    """
    present = [name for name in names if _optional(location, name, options["revision"]) is not None]
    if present:
        raise ModelError(
            f"the {kind} of {location} cannot be read ({present[0]}: {load_error_reason(error)}); repair the file, or "
            "remove it and pass preprocessed model inputs as data."
        ) from error


def _tokenizer(location: str, options: dict[str, Any]) -> Any:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(location, **options)
    except Exception as error:  # as above; without a tokenizer, token ids still work as data
        _check_absent("tokenizer", TOKENIZER_FILES, location, options, error)
        return None
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        return None  # without files, transformers creates an empty tokenizer that knows no word
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _padding(
    module: Any, signature: _Signature, inputs: tuple[str, ...], tokenizer: Any, task: str, image: bool
) -> tuple[Padding | None, list[Limitation]]:
    """Return the padding of texts, and its limitations; the files of the tokenizer are made to agree with it."""
    if image:
        return None, []
    config = module.config.get_text_config()
    position = signature.outputs.index(signature.answer)

    def answer(feeds: dict[str, npt.NDArray[Any]]) -> torch.Tensor:
        with torch.inference_mode():
            return signature.call(module, *(torch.from_numpy(feeds[name]) for name in inputs))[position]

    if tokenizer is None:
        return None, allow_batches(answer, config, inputs)
    if task == "text-generation":
        return causal_padding(tokenizer, config), []
    padding, limitations = find_padding(answer, tokenizer, config, inputs)
    tokenizer.padding_side = padding.side
    if padding.token in tokenizer.all_special_ids and padding.token != tokenizer.pad_token_id:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(padding.token)
    return padding, limitations


def _image_preprocess(module: Any, processor: Any, sizing: Sizing) -> Preprocess:
    channels = _channels(module)
    refused, _ = fit_statistics(processor, channels)
    convert = None if processor is None or refused else partial(pixels, processor)
    arrays = as_numpy(sizing.prepared(channels))
    return Preprocess(("pixel_values",), "image", arrays, image=convert, no_image=refused)


def _text_preprocess(
    inputs: tuple[str, ...],
    example: dict[str, torch.Tensor],
    processor: Any,
    longest: int | None,
    padding: Padding | None,
) -> Preprocess:
    arrays = as_numpy(example)
    if processor is None or padding is None:
        return Preprocess(inputs, "text", arrays, longest=longest)
    limit = USUAL if longest is None else longest
    return Preprocess(
        inputs,
        "text",
        arrays,
        text=_truncating(processor, inputs, padding, limit),
        align=partial(tokenize_aligned, processor, inputs, limit) if processor.is_fast else None,
        special=frozenset(processor.all_special_ids),
        unknown=_unknown(processor),
        tokenizer=f"{type(processor).__name__} of {Path(str(processor.name_or_path)).name}",
        mask_token=processor.mask_token_id,
        class_first=getattr(processor, "cls_token_id", None) is not None,
        whole=partial(_untruncated, processor, inputs),
        cut=partial(_truncating, processor, inputs, padding),
        lengths=partial(_lengths, processor),
        longest=longest,
        limit=limit,
    )


def _unknown(tokenizer: Any) -> int | None:
    """Return the token id of unknown words; None if it also ends, pads or masks texts, as in GPT-2."""
    others = (f"{role}_token_id" for role in ("bos", "eos", "pad", "cls", "sep", "mask"))
    token = tokenizer.unk_token_id
    return None if token in [getattr(tokenizer, name, None) for name in others] else token


def _tokens(
    tokenizer: Any, inputs: tuple[str, ...], padding: Padding, longest: int, texts: list[str], second: list[str] | None
) -> dict[str, npt.NDArray[Any]]:
    encoded = encode(tokenizer, texts, second, inputs, truncation=True, max_length=longest)
    rows = {name: encoded[name] for name in inputs if name in encoded}
    return dict(padding.pad(rows, tokenizer.pad_token_type_id))


def _truncating(tokenizer: Any, inputs: tuple[str, ...], padding: Padding, longest: int) -> Tokenise:
    return partial(_tokens, tokenizer, inputs, padding, longest)


def _untruncated(tokenizer: Any, inputs: tuple[str, ...], text: str) -> dict[str, npt.NDArray[Any]]:
    """Tokenize a text of any length, without the tokenizer's warning about the maximum length of the model."""
    encoded = encode(tokenizer, [text], None, inputs)
    return {name: np.array(encoded[name][0], dtype=np.int64) for name in inputs if name in encoded}


def _lengths(tokenizer: Any, texts: list[str], second: list[str] | None) -> list[int]:
    """Return the numbers of tokens of texts of any length, with the special tokens."""
    return [len(row) for row in encode(tokenizer, texts, second, ())["input_ids"]]


def _max_length(module: Any, tokenizer: Any, sentence_files: dict[str, Path]) -> int | None:
    """Return the maximum number of tokens: the minimum of the limits of tokenizer, positions and sentence-transformers.

    The limit of the positions is the number in the config or, where the module has fewer, that of the module, which its
    tokenizer is then made to agree with. Return None if there is no limit.
    """
    config = module.config.get_text_config()
    stated = [getattr(tokenizer, "model_max_length", None), getattr(config, "max_position_embeddings", None)]
    limits_file = sentence_files.get("sentence_bert_config.json")
    if limits_file is not None:
        stated.append(_sentence_config(limits_file).get("max_seq_length"))
    limits = [limit for limit in stated if limit is not None and limit > 0]  # XLNet's config has -1
    learned = position_limit(module, getattr(config, "pad_token_id", None))
    if learned is not None and learned < min(limits, default=UNLIMITED):
        limits.append(learned)
        if tokenizer is not None:
            tokenizer.model_max_length = learned
    longest = min(limits, default=UNLIMITED)
    return int(longest) if longest < UNLIMITED else None


def _sentence_config(path: Path) -> dict[str, Any]:
    """Read a JSON file of sentence-transformers.

    Raises:
        ModelError: it is no JSON object.
    """
    try:
        return read_json(path, OBJECT, remedy="download the model again")
    except (FileNotFoundError, JsonFileError) as error:
        raise ModelError(str(error)) from error


def _save(module: Any, processor: Any, sentence_files: dict[str, Path], folder: Path) -> None:
    module.config.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
        _use_older_tokenizer_class(folder / "tokenizer_config.json")
    if getattr(module, "generation_config", None) is not None and module.can_generate():
        module.generation_config.save_pretrained(folder)
    for name, original in sentence_files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(original.read_bytes())


def _use_older_tokenizer_class(path: Path) -> None:
    """Replace a tokenizer class that transformers 4, which Optimum needs, does not have by an equivalent one."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if '"TokenizersBackend"' in text:
        path.write_text(text.replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'), encoding="utf-8")
