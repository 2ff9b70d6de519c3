"""Models of transformers: hub ids and ``save_pretrained`` folders, with their tokenizer or image processor."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

from compressor.choices import CTC, ZERO_SHOT, ImageSize
from compressor.internals.transformers import made_by, quiet, with_random_weights
from compressor.limitations import Limitation
from compressor.models import several_inputs
from compressor.models.audio.inputs import takes_series, takes_sound
from compressor.models.base import Model, ModelError, OtherInputsError, load_error_reason, no_language_model
from compressor.models.config_shapes import CLIPS, SOUND, main_input
from compressor.models.encoder_decoder import parts as encoder_decoder
from compressor.models.one_size import one_grid
from compressor.models.pretrained import encoder_decoder as pretrained_encoder_decoder
from compressor.models.pretrained import image, patches, sound, text, two_towers, video
from compressor.models.pretrained import vision_language as pretrained_vision_language
from compressor.models.pretrained.loaded import Loaded
from compressor.models.pretrained.processors import optional_file, tokens_without_embedding
from compressor.models.text import nemotron_nas, sentence_transformers
from compressor.models.text.probe import TEXTS_ALONE, reads_texts_alone
from compressor.models.video.inputs import takes_videos
from compressor.models.vision_language import parts as vision_language
from compressor.models.vision_language.padded_rows import padded_rows
from compressor.models.weights.config_checks import (
    check_counts,
    check_parameters,
    damaged_labels,
    damaged_weights,
)
from compressor.models.weights.lazy_weights import module_on_disk
from compressor.models.weights.quantized import check_floats, check_method, of_quantization, quantized
from compressor.models.weights.stored_dtypes import dtypes_by_path, dtypes_in, weight_files
from compressor.models.weights.unregistered import ADVICE, unregistered_weights
from passes.graph.cached_functions import forget_results
from passes.torch_internals import FakeTensorMode

GENERATION = "text-generation"
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
    "ForObjectDetection": "object-detection",
    "ForXVector": "audio-xvector",
    "ForNextSentencePrediction": "text-classification",
}
# Heads whose classes have names of their own, by the mapping of transformers that lists them.
LISTED = {
    "fill-mask": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "text-generation": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
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
    encoder_decoder.IMAGE: "AutoModelForImageTextToText",
    "video-classification": "AutoModelForVideoClassification",
    "object-detection": "AutoModelForObjectDetection",
    "audio-xvector": "AutoModelForAudioXVector",
    ZERO_SHOT: "AutoModelForZeroShotImageClassification",
    vision_language.TASK: "AutoModelForImageTextToText",
}
# Automatic classes of models that a class without a forward may join, the likeliest first.
PARTS = ("AutoModelForImageTextToText", "AutoModelForCausalLM")
FEATURES = ("feature-extraction", "image-feature-extraction", ZERO_SHOT)
TOKENS = {"input_ids", "decoder_input_ids"}  # inputs that are looked up in the embeddings of tokens


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
    sequence_length: int | None = None,
) -> Model:
    """Load a transformers model with the head that its config names, or with the head for `task`.

    With `on_disk`, the weights stay in their files, see `compressor.models.weights.lazy_weights`. Without `cache`, a
    language model is traced without its KV cache. An image model takes images of `image_size`, by default those of its
    image processor. A model of texts or of sound takes those of `sequence_length` alone, by default of any length.

    Raises:
        ModelError: config or weights cannot be read, the architecture needs code from the repository, its head is not
            supported, or the cache of a language model cannot be detected.
    """
    if revision is not None and Path(location).is_dir():
        raise ModelError(f"{location} is a local folder, so it has no revision {revision!r}; leave --revision out.")
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    nemotron_nas.register()
    config = None
    with quiet():
        try:
            config = transformers.AutoConfig.from_pretrained(location, **options)
            sentence_files = sentence_transformers.find_files(partial(optional_file, location, revision=revision))
            resolved_task = _whole(_ctc_or(task, config), config) or task_of(config, sentence_files, location)
            check_counts(config, location)
            if not random_weights:
                check_method(config, location, on_disk=on_disk)
            if isinstance(config, nemotron_nas.NemotronNasConfig):
                nemotron_nas.block_shapes(config, location)
            kind = class_of(config, resolved_task)
            if not trust_remote_code:  # transformers would ask on the terminal whether to run the code
                check_parameters(partial(with_random_weights, kind, config), location, random_weights=random_weights)
            if on_disk:
                if resolved_task != "text-generation":
                    raise no_language_model(location, f"a model for {resolved_task}")
                module = module_on_disk(kind, config, location, options)
                model = wrap(Loaded(module.eval(), location, resolved_task, options, sentence_files, cache=cache))
                return replace(model, dtypes=_dtypes(module, location, revision))
            module, missing, left_out = _module(location, config, resolved_task, random_weights, options)
            if not random_weights:
                check_floats(module, config, left_out, weight_files(location, revision), location)
        except ModelError:
            raise
        except Exception as error:  # transformers does not wrap hub, file and shape errors
            folder = Path(location)
            reason = damaged_labels(folder) or damaged_weights(folder) or load_error_reason(error)
            if isinstance(error, ImportError) and (said := quantized(config)) is not None:
                reason = f"{said} ({load_error_reason(error)})"
            raise ModelError(f"transformers could not load {location}: {reason}.") from error
        loaded = Loaded(
            module.eval().float(),
            location,
            resolved_task,
            options,
            sentence_files,
            random_weights,
            missing,
            cache,
            image_size,
            sequence_length,
        )
        model = wrap(loaded)
        packed = () if random_weights else of_quantization(config)
        dtypes = {} if random_weights or packed else _dtypes(module, location, revision)
        return replace(model, limitations=(*model.limitations, *packed, *_left_out(left_out)), dtypes=dtypes)


def _dtypes(module: torch.nn.Module, location: str, revision: str | None) -> dict[str, torch.dtype]:
    """Return the types of the weights in the files of a checkpoint, by their paths in the module."""
    return dtypes_by_path(dtypes_in(weight_files(location, revision)), module)


def _ctc_or(task: str | None, config: Any) -> str | None:
    """Return a given task; of speech recognition, for which the hub has one name, that of a CTC head if it has one."""
    ctc = task == encoder_decoder.SPEECH and (config.architectures or [""])[0].endswith("ForCTC")
    return CTC if ctc else task


def _whole(task: str | None, config: Any) -> str | None:
    """Return a given task; for the features of a model of images and texts, that of the whole model."""
    features = task == "feature-extraction" and _has_two_towers((config.architectures or [""])[0])
    return ZERO_SHOT if features else task


def _has_two_towers(architecture: str) -> bool:
    """Return whether a class gives features of images and of texts, as CLIP does, and no text from both."""
    if architecture in modeling_auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES.values():
        return True
    named = _named(architecture)
    return (
        architecture.endswith("Model") and hasattr(named, "get_text_features") and hasattr(named, "get_image_features")
    )


def task_of(config: Any, sentence_files: dict[str, Path], location: str) -> str:
    """Return the task of the head that the config names.

    Raises:
        ModelError: the head is not supported.
    """
    architecture = (config.architectures or [""])[0]
    _check_forward(architecture, config, location)
    if _has_two_towers(architecture):
        return ZERO_SHOT
    if _named(architecture) is not None and several_inputs.codebooks(config) is not None:
        return "feature-extraction"
    from_to = encoder_decoder.task_of(config, architecture)
    if from_to is not None:
        return from_to
    # A cross-encoder also has files of sentence-transformers, but it scores a pair instead of embedding a sentence.
    embeds = "modules.json" in sentence_files or "config_sentence_transformers.json" in sentence_files
    if embeds and not architecture.endswith("ForSequenceClassification"):
        return "sentence-similarity"
    head = _head(config, architecture)
    if head is not None:
        return head
    if vision_language.is_vision_language(architecture):
        return vision_language.TASK
    images = hasattr(config, "image_size") and not any(hasattr(config, name) for name in CLIPS)
    features = "image-feature-extraction" if images else "feature-extraction"
    if architecture and not _is_bare(architecture):
        if _reads_sound_and_texts(architecture):
            advice = _texts_alone(architecture, config) or "save its language model or its encoder of sound alone"
            raise ModelError(
                f"{location} is a {architecture}, a language model that reads sound beside its text, which is not "
                f"supported; {advice}, and pass that folder."
            )
        advice = _without_head(config, architecture, features)
        heads = f"expected one of {', '.join(f'...{ending}' for ending in HEADS)}, or " if "--task" in advice else ""
        raise ModelError(f"{location} is a {architecture}, a head that is not supported; {heads}{advice}.")
    return features


def _check_forward(architecture: str, config: Any, location: str) -> None:
    """Check that a class computes something itself; Bark and Qwen2.5-Omni call models of their own in `generate` alone.

    Raises:
        ModelError: it has no forward.
    """
    named = _named(architecture)
    if named is None or named.forward is not torch.nn.Module.forward:
        return
    parts = [part for part in vars(config).values() if isinstance(part, transformers.PreTrainedConfig)]
    kinds = (kind.__name__ for part in parts for name in PARTS for kind in made_by(getattr(transformers, name), part))
    part = next(kinds, None)
    advice = (
        "pass a part of it as a module of your own, package.module:factory, with example inputs"
        if part is None
        else f"save one of them, such as {part}.from_pretrained({location!r}).save_pretrained(FOLDER), and pass FOLDER"
    )
    what = "joins models and has no forward of its own" if parts else "has methods such as encode and no forward"
    raise ModelError(f"{location} is a {architecture}, which {what}; {advice}.")


def _without_head(config: Any, architecture: str, features: str) -> str:
    """Return what to do with a model whose head is not supported: a clause without a full stop.

    Some automatic models are the class with the head. It can then be exported if it takes token ids alone.
    """
    made = made_by(transformers.AutoModel, config)
    bare = any(kind.__name__ != architecture for kind in made) and not getattr(config, "is_encoder_decoder", False)
    if bare or hasattr(config, "auto_map"):
        return f"pass --task {features} to export the model without its head"
    own = [kind for kind in made if kind.__name__ == architecture]
    if any(_takes_ids_alone(kind, config) or takes_sound(kind) or _takes_images_alone(kind, config) for kind in own):
        return f"pass --task {features} to export the first output of the model as it is"
    return (
        "pass it as a module of your own, package.module:factory, whose forward takes tensors and returns the output "
        "that you need, as no model of transformers has its features without that head"
    )


def _takes_ids_alone(kind: Any, config: Any) -> bool:
    """Return whether the main input of a class is token ids of a known vocabulary, and it reads no images or sound."""
    taken = inspect.signature(kind.forward).parameters
    other = any(name in taken for name in (*SOUND, image.INPUT))
    return main_input(kind) == "input_ids" and not other and hasattr(config.get_text_config(), "vocab_size")


def _takes_images_alone(kind: Any, config: Any) -> bool:
    """Return whether a class takes images alone, one for each row, and refuses none by their form, as LightGlue does.

    It is called with shapes alone, with which a class that reads a value fails; that says nothing of images.
    """
    if main_input(kind) != image.INPUT:
        return False
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
            module = with_random_weights(kind, config)
            with forget_results(module):
                module(torch.zeros(1, image.channels_of(module), *image.configured_size(module)))
    except (TypeError, ValueError):
        return False
    except Exception:  # modules raise errors of all kinds
        return True
    return True


def _texts_alone(architecture: str, config: Any) -> str | None:
    """Return how to export a language model of texts and sound; None if it gives no logits for a text alone.

    It is called with shapes alone. A class that converts weights as it is made is made on the device of shapes.
    """
    reads, shapes = False, FakeTensorMode(allow_non_fake_inputs=True)
    with contextlib.suppress(Exception), shapes:  # modules raise errors of all kinds
        reads = reads_texts_alone(with_random_weights(_named(architecture), config))
    with contextlib.suppress(Exception), torch.device("meta"):
        module = None if reads else with_random_weights(_named(architecture), config)
        with shapes:
            reads = reads or reads_texts_alone(module)
    return f"{TEXTS_ALONE}, or save its encoder of sound alone" if reads else None


def _reads_sound_and_texts(architecture: str) -> bool:
    """Return whether a class takes the tokens of a text, and sound beside them."""
    named = _named(architecture)
    taken = () if named is None else inspect.signature(named.forward).parameters
    return "input_ids" in taken and any(name in taken for name in SOUND)


def _head(config: Any, architecture: str) -> str | None:
    """Return the task of a head by the name of its class; None for other classes."""
    listed = [task for task, names in LISTED.items() if architecture in names.values()]
    if len(listed) > 1 and not getattr(config, "causal", True):  # XLM reads both sides unless its config says otherwise
        return "fill-mask"
    for ending, task in HEADS.items():
        if architecture.endswith(ending) and (len(listed) != 1 or task in listed or task not in LISTED):
            sound = task == "text-classification" and takes_sound(_named(architecture))
            return "audio-classification" if sound else task  # Wav2Vec2ForSequenceClassification classifies sound
    # Some vision-language models, such as Gemma 3, are listed as language models too.
    return listed[0] if listed and not vision_language.is_vision_language(architecture) else None


def _named(architecture: str) -> Any:
    """Return the model class of transformers of a name; None if there is none.

    The name comes from a file, so it must not select any other object of the package transformers.
    """
    named = getattr(transformers, architecture, None)
    return named if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel) else None


def _module(
    location: str, config: Any, task: str, random_weights: bool, options: dict[str, Any]
) -> tuple[torch.nn.Module, tuple[str, ...], tuple[str, ...]]:
    """Return the module, the missing keys of the checkpoint, and its unexpected keys."""
    kind = class_of(config, task)
    if random_weights:
        with torch.random.fork_rng(devices=[]):  # the random state of the caller stays as it is
            torch.manual_seed(0)
            return with_random_weights(kind, config), (), ()
    module, info = kind.from_pretrained(location, **options, dtype=torch.float32, output_loading_info=True)
    named = _named((config.architectures or [""])[0])
    other = task == GENERATION and _generates(named, config) and type(module) is not named
    if info["missing_keys"] and other and not hasattr(config, "auto_map"):
        # The automatic class reads other names: that of Emu3 is its language model alone.
        module, info = named.from_pretrained(location, **options, dtype=torch.float32, output_loading_info=True)
    _check_loaded(module, location)
    return module, tuple(sorted(info["missing_keys"])), tuple(sorted(info["unexpected_keys"]))


def _check_loaded(module: torch.nn.Module, location: str) -> None:
    """Check that no weight is where transformers does not look for it.

    Raises:
        ModelError: the module keeps weights in plain lists or dicts, which have no values.
    """
    names = dict.fromkeys(name for name, weight in unregistered_weights(module) if weight.is_meta)
    if names:
        kept = f"which keeps weights in plain attributes ({', '.join(names)})"
        raise ModelError(f"{location} is a {type(module).__name__}, {kept}, {ADVICE}.")


def class_of(config: Any, task: str) -> Any:
    """Return the class that loads a model for a task.

    It is the automatic class of the task. If that makes no model of the class that the config names, which has a head
    for the task, it is the named class. That of a language model for images or sound generates texts.
    """
    architecture = (config.architectures or [""])[0]
    named = _named(architecture)
    if task not in AUTO:
        own = _is_bare(architecture) or several_inputs.codebooks(config) is not None
        return named if named is not None and own else transformers.AutoModel
    automatic = getattr(transformers, AUTO[task])
    own = _head(config, architecture) == task or (task == ZERO_SHOT and _has_two_towers(architecture))
    whole = task == vision_language.TASK and vision_language.is_vision_language(architecture)
    own = own or ((task == GENERATION or whole) and not made_by(automatic, config) and _generates(named, config))
    if named is None or not own or named in made_by(automatic, config) or hasattr(config, "auto_map"):
        return automatic
    return named


def _generates(named: Any, config: Any) -> bool:
    """Return whether a class continues a text, as the language model of a class for images or sound does."""
    decoder_only = not getattr(config, "is_encoder_decoder", False)
    return named is not None and issubclass(named, transformers.GenerationMixin) and decoder_only


def _is_bare(architecture: str) -> bool:
    """Return whether the output of a class of this name is hidden states."""
    return architecture.endswith(("Model", "Encoder", "Backbone", "Transformer")) and not architecture.endswith(
        ("HeadModel", "HeadsModel")
    )


def wrap(loaded: Loaded) -> Model:
    """Return the model of a loaded module, by what it takes.

    Raises:
        ModelError: the module does not give the outputs of its task.
    """
    model = _wrapped(loaded)
    if not TOKENS & set(model.inputs):
        return model
    beyond = tokens_without_embedding(loaded.module, model.tokenizer)
    return replace(model, limitations=(*model.limitations, *beyond))


def _wrapped(loaded: Loaded) -> Model:
    """Return the model by the inputs of its task, or by all its inputs if it computes features of several."""
    try:
        first = several_inputs.draws_noise(loaded.module) or several_inputs.codebooks(loaded.module.config) is not None
        found = several_inputs.wrap(loaded) if first and loaded.task in FEATURES else None
        return _of_task(loaded) if found is None else found
    except OtherInputsError:
        several = loaded.task in FEATURES or several_inputs.reads_shared_states(loaded.module)
        model = several_inputs.wrap(loaded) if several else None
        if model is None:
            raise
        return model


def _of_task(loaded: Loaded) -> Model:
    if loaded.task in encoder_decoder.TASKS:
        return pretrained_encoder_decoder.wrap(loaded)
    if loaded.task == ZERO_SHOT:
        return two_towers.wrap(loaded)
    if loaded.task == vision_language.TASK:
        return pretrained_vision_language.wrap(loaded)
    if loaded.task == GENERATION:
        return text.wrap(loaded)
    if patches.grid_argument(loaded.module) is not None:
        return patches.wrap(loaded)
    if one_grid.reads_sizes(loaded.module):
        return one_grid.wrap(loaded, "takes the sizes of its images beside the pixels")
    if (padded := padded_rows(loaded.module)) is not None:
        return patches.wrap_padded(loaded, padded)
    if takes_videos(loaded.module):
        return video.wrap(loaded)
    if takes_sound(loaded.module) or takes_series(loaded.module):
        return sound.wrap(loaded)
    model = image.wrap(loaded) if main_input(loaded.module) == image.INPUT else text.wrap(loaded)
    if loaded.task == "sentence-similarity":
        find = partial(optional_file, loaded.location, revision=loaded.options["revision"])
        return sentence_transformers.embedding(model, loaded.sentence_files, find, loaded.location)
    return model


def _left_out(names: tuple[str, ...]) -> Iterator[Limitation]:
    """Yield a limitation if the checkpoint has weights that the model does not use, such as those of another head."""
    if names:
        yield Limitation(
            "weights left out", f"{len(names)} tensors of the checkpoint, the first of which is {names[0]}"
        )
