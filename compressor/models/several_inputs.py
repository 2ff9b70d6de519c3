"""Models of transformers that compute features of several inputs: boxes beside words, an image and a text, two sounds.

Their shapes come from the names of the inputs and the numbers in the config. The set with most inputs with which a call
succeeds is taken. The data are arrays by the names of the inputs.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeGuard

import torch

from compressor.limitations import Limitation
from compressor.models.base import Model, ModelError, as_numpy
from compressor.models.config_shapes import (
    CLIPS,
    FRAMES,
    SAMPLES,
    SOUND,
    WIDTHS,
    numbers,
    sample_shapes,
    shape_of_timm,
)
from compressor.models.preprocess import Preprocess
from compressor.models.pretrained.image import channels_of, configured_size
from compressor.models.pretrained.loaded import Loaded
from compressor.models.pretrained.processors import feature_extractor, image_processor, save, tokenizer_of
from compressor.models.pretrained.signature import HIDDEN
from compressor.models.text.probe import without_cache
from passes.graph.cached_functions import forget_results
from passes.torch_internals import DataDependentOutputException, FakeTensorMode

TOKENS = 16  # of the example; a multiple of the blocks of most models
SHORTER = 12
ANY = 0  # stands for the number of tokens in a shape
CODED = -1  # stands for the number of frames of codes
FEWER = 5  # frames of codes than tokens in the example
SEQUENCE, CODES_AXIS = "sequence", "code_sequence"
IMAGES = ("pixel_values", "prompt_pixel_values", "prompt_masks", "pixel_values_videos")
# What forward takes in place of another input, or makes itself.
OTHERS = (
    "inputs_embeds",
    "image_embeds",
    "text_embeds",
    "vision_embeds",
    "encoder_hidden_states",
    "decoder_input_ids",
    "decoder_inputs_embeds",
)
NOISE = "noise"  # what a model draws at random if it is not given
COUNTS = (1, 2)  # images of a row: of a model of texts with images, and of one that compares a pair
FRAMES_OF_NOISE = "noise_sequence"  # for each frame of a spectrogram, as a vocoder makes a waveform of it
# Inputs with a row of numbers for each token or region, by the names of their widths in configs.
ROWS = {
    "visual_feats": ("visual_feat_dim",),
    "visual_pos": ("visual_pos_dim",),
    "states": ("state_dim",),
    "actions": ("act_dim",),
}
STATES = ("encoder_hidden_size", "hidden_size", "d_model")
TEXT = ("input_ids", "attention_mask", "token_type_ids")
LATENTS = ("latent_dim", "hidden_size")  # widths of what the decoder of a codec reads
# Inputs of models of time series, with the kind of their values.
SERIES: Mapping[str, Literal["values", "zeros", "mask"]] = {
    "past_values": "values",
    "past_time_features": "values",
    "past_observed_mask": "mask",
    "future_values": "values",
    "future_time_features": "values",
    "past_values_padding": "zeros",
}
CODE_IDS, IN_ROWS = "decoder_input_ids", "num_codebooks"
EMBEDDED = "inputs_embeds"
SHARED = "shared_kv_states"  # keys and values of another model by the kinds of its layers, as an assistant reads them
PAIRED = ("key", "value")
BLOCK = "noise_embeds"  # tokens that a model of drafts fills in at once
CODES = "hidden_states"
HOPS = ("encoder_hop_length", "hop_length")  # samples of a waveform for each code of a codec
SINGLE = ("rewards", "returns_to_go")  # a number for each token
PLACEHOLDERS = 4  # of an image, in a model that takes any number of them
# Inputs with one row of numbers, or a number, for each row, by the names of their widths in configs.
ROW = {"state": ("max_state_dim",)}
TRIALS = 32  # calls until a model is given up

Call = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Form:
    """The form of an input that is tried.

    Attributes:
        shape: sizes behind the axis of rows; `ANY` stands for the number of tokens.
        kind: what its values are: token ids below `limit`, places 0, 1, 2, ..., ones, zeros, or normal numbers.
        limit: number of token ids.
        lead: token id of the first `PLACEHOLDERS` tokens, which stand for an image; None without any.
    """

    shape: tuple[int, ...]
    kind: Literal["ids", "places", "mask", "zeros", "values"]
    limit: int = 0
    lead: int | None = None

    def values(self, rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
        """Return seeded values, [rows, *shape]; the mask of the second row ends early, so that it is not constant."""
        free = {ANY: tokens, CODED: tokens - FEWER}
        size = (rows, *(free.get(each, each) for each in self.shape))
        seeded = torch.Generator().manual_seed(seed)
        if self.kind == "ids":
            ids = torch.randint(0, self.limit, size, generator=seeded)
            if self.lead is not None:
                ids[ids == self.lead] = (self.lead + 1) % self.limit
                ids[:, :PLACEHOLDERS] = self.lead
            return ids
        if self.kind == "places":
            return torch.arange(tokens).expand(size).clone()
        if self.kind == "values":
            return torch.randn(size, generator=seeded)
        filled = torch.full(size, int(self.kind == "mask"))
        if self.kind == "mask" and self.shape == (ANY,):
            filled[1:, tokens * 3 // 4 :] = 0
        return filled

    @property
    def axes(self) -> dict[int, str]:
        """The dynamic axes of the input."""
        names = {ANY: SEQUENCE, CODED: CODES_AXIS}
        return {0: "batch"} | {axis: names[size] for axis, size in enumerate(self.shape, 1) if size in names}


def wrap(loaded: Loaded, *, only: str | None = None) -> Model | None:
    """Return the model with all inputs that it computes features of; None if no set of inputs is found.

    An encoder-decoder without a head is none of these: its decoder computes on tokens that come with a task.

    Args:
        loaded: the model.
        only: name of the only output that is wanted; None for all.

    Raises:
        ModelError: a size of images is asked for.
    """
    module = loaded.module
    found = None if _decodes_tokens(module) else _found(module, only)
    if found is None:
        _check_rows(module, loaded.location)
        return None
    forms, outputs, paired = found
    names = tuple(forms)
    if loaded.image_size is not None:
        raise ModelError(
            f"--image-size is for models of images alone; {loaded.location} takes {', '.join(names)}, with images of "
            "the size in its config: leave --image-size out."
        )
    tokens = TOKENS if loaded.sequence_length is None else loaded.sequence_length
    any_length = any(ANY in form.shape for form in forms.values())
    _check_length(module, forms, loaded, any_length=any_length)
    varies = any_length and loaded.sequence_length is None and _runs(module, forms, 2, SHORTER) is not None
    example = {name: form.values(2, tokens) for name, form in forms.items()}
    axes = {name: form.axes if varies else {0: "batch"} for name, form in forms.items()}
    return Model(
        **loaded.fields | {"task": "feature-extraction"},
        call=partial(_outputs, inputs=names, outputs=outputs, paired=paired),
        inputs=names,
        outputs=outputs,
        answer=outputs[0],
        example=example,
        dynamic_axes=axes,
        preprocess=Preprocess(
            names,
            "tensor",
            as_numpy(example),
            varying={name: tuple(axis for axis in each if axis) for name, each in axes.items()},
            padded=loaded.sequence_length,
            image_token=next((form.lead for form in forms.values() if form.lead is not None), None),
        ),
        save=partial(_save, module, _preprocessors(loaded, names)),
        limitations=(
            *_limitations(module, names, outputs),
            *_of_several(module, example, outputs),
            *_of_pairs(paired),
            *_of_codes(module),
            *_of_clips(forms),
            *_of_images(forms),
            *_of_one_length(tokens, asked=loaded.sequence_length is not None, fixed=any_length and not varies),
        ),
    )


def _check_rows(module: Any, location: str) -> None:
    """Check that a module fails not only because it gets several rows, as TVP computes with one video alone.

    Raises:
        ModelError: it computes features of one row, and fails on two.
    """
    trials = () if _decodes_tokens(module) else itertools.islice(_all_trials(module), TRIALS)
    if any(_runs(module, forms, 1, TOKENS) and _runs(module, forms, 2, TOKENS) is None for forms in trials):
        raise ModelError(
            f"{location} is a {type(module).__name__}, which computes features of one row of its inputs at a time and "
            "fails on two, and a file takes any number of rows; pass it as a module of your own, "
            "package.module:factory, whose forward takes several."
        )


def _check_length(module: Any, forms: Mapping[str, Form], loaded: Loaded, *, any_length: bool) -> None:
    """Check that a module takes rows of the number of tokens that is asked for.

    Raises:
        ModelError: its inputs have no number of tokens, or it fails on rows of this one.
    """
    length = loaded.sequence_length
    if length is not None and not (any_length and _runs(module, forms, 2, length) is not None):
        reason = f"fails on rows of {length} tokens; give another number" if any_length else "takes inputs of one size"
        raise ModelError(f"--sequence-length {length}, but {loaded.location} {reason}, or leave --sequence-length out.")


def _of_several(module: Any, example: Call, outputs: Sequence[str]) -> Iterator[Limitation]:
    """Yield the outputs that have several tensors under one name, of which the first is taken."""
    with torch.inference_mode():
        returned = _called(module, example)
    for name in outputs:
        if isinstance(returned[name], list | tuple):
            reason = f"the model returns {len(returned[name])} tensors, of which the first is one"
            yield Limitation(f"output {name}", reason)


def _of_pairs(paired: Sequence[str]) -> Iterator[Limitation]:
    """Yield the outputs of which the file has the value of each row with itself."""
    for name in paired:
        reason = "the model compares each row with every other, and the file has the value of each row with itself"
        yield Limitation(f"output {name}", reason)


def _of_codes(module: Any) -> Iterator[Limitation]:
    """Yield the form of the codes of a model that writes several for each frame of sound, and that it has no cache."""
    books = codebooks(module.config)
    if books is not None:
        form = f"[rows, {books}, frames], and the logits [rows, {books}, frames, vocabulary]"
        yield Limitation("codes of sound", f"{CODE_IDS} are {form}")
        yield Limitation("KV cache", "the file has none, so every new frame recomputes the earlier ones")


def _of_clips(forms: Mapping[str, Form]) -> Iterator[Limitation]:
    """Yield the size of spectrograms and waveforms, which is fixed."""
    for name, form in forms.items():
        if ANY not in form.shape and (name in SOUND or SAMPLES in form.shape):
            size = " x ".join(map(str, form.shape))
            yield Limitation("length of the clips", f"the export takes only {name} of {size} values")


def _of_images(forms: Mapping[str, Form]) -> Iterator[Limitation]:
    """Yield the number of images of a row of a model that takes several, if one is taken."""
    if any(name in IMAGES and len(form.shape) > len("CHW") and form.shape[0] == 1 for name, form in forms.items()):
        yield Limitation("images", "the export takes one image for each row")


def _of_one_length(tokens: int, *, asked: bool, fixed: bool) -> Iterator[Limitation]:
    """Yield the limitation of a model that is exported for rows of one number of tokens."""
    if asked:
        yield Limitation("length", f"the export takes only rows of {tokens} tokens; give arrays of as many")
    elif fixed:
        yield Limitation("length", f"the model takes rows of {TOKENS} tokens alone, as its call with {SHORTER} fails")


def _decodes_tokens(module: Any) -> bool:
    """Return whether a module is an encoder-decoder of tokens; detectors such as Grounding DINO decode queries.

    The prediction network of a transducer (Parakeet) does not attend to the sound, and takes no mask.
    """
    taken = inspect.signature(module.forward).parameters
    decodes = CODE_IDS in taken and "decoder_attention_mask" in taken and codebooks(module.config) is None
    return decodes and getattr(module.config, "is_encoder_decoder", False)


def codebooks(config: Any) -> int | None:
    """Return the number of codes that the decoder of a model writes for each frame of sound; None for other models."""
    decoder = _code_decoder(config)
    counts = (getattr(decoder, name, None) for name in (IN_ROWS, "num_channels"))
    return next((count for count in counts if isinstance(count, int) and count > 1), None)


def _code_decoder(config: Any) -> Any:
    """Return the config of the decoder of an encoder-decoder of parts; None for other models."""
    parts = (getattr(config, name, None) for name in ("decoder", "decoder_config"))
    joined = getattr(config, "is_encoder_decoder", False)
    return next((part for part in parts if part is not None), None) if joined else None


def _preprocessors(loaded: Loaded, names: Sequence[str]) -> tuple[Any, ...]:
    """Return the tokenizer of a checkpoint and what prepares its other inputs; None for those that it lacks."""
    kinds = ((IMAGES, image_processor), (SOUND, feature_extractor))  # both are in the file preprocessor_config.json
    read = [read for inputs, read in kinds if not set(inputs).isdisjoint(names)]
    return tuple(each(loaded.location, loaded.options) for each in (tokenizer_of, *read))


def _save(module: Any, preprocessors: Sequence[Any], folder: Any) -> None:
    for each in preprocessors:
        save(module, each, {}, folder)


def _limitations(module: Any, names: Sequence[str], outputs: Sequence[str]) -> Iterator[Limitation]:
    """Yield what was assumed of the inputs and outputs."""
    yield Limitation("preprocessing", f"the data must be arrays by the names of the inputs: {', '.join(names)}")
    yield Limitation("features", f"the outputs are the tensors that the model returns: {', '.join(outputs)}")
    left_out = [name for name in _known(module) if name not in names]
    if left_out:
        yield Limitation(f"input {', '.join(left_out)}", "the model also takes it, but the export does not")


def _known(module: Any) -> dict[str, tuple[Form, ...]]:
    """Return the inputs of a module whose forms are known, with the forms of each, in their order."""
    taken = inspect.signature(module.forward).parameters
    found = {name: tuple(_forms(module, name)) for name in taken if not name.startswith("output_")}
    return {name: forms for name, forms in found.items() if forms} | _of_shared_states(module)


def reads_shared_states(module: Any) -> bool:
    """Return whether a module attends to the keys and values of another model, whose tokens it continues."""
    return SHARED in inspect.signature(module.forward).parameters


def _of_shared_states(module: Any) -> dict[str, tuple[Form, ...]]:
    """Return the keys and the values that a module reads of another model, [heads, tokens, width] each, for each kind.

    Their names are joined by dots, see `nested`.
    """
    if not reads_shared_states(module):
        return {}
    config = module.config.get_text_config()
    attentions = {part.layer_type: part for part in module.modules() if hasattr(part, "num_key_value_groups")}
    sizes = {
        kind: (config.num_attention_heads // part.num_key_value_groups, ANY, part.head_dim)
        for kind, part in attentions.items()
    }
    return {f"{SHARED}.{kind}.{part}": (Form(size, "values"),) for kind, size in sizes.items() for part in PAIRED}


def nested(feeds: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return the arguments of a module: inputs whose names have dots become pairs of keys and values by their kinds.

    >>> nested({"a": 1, "states.full.key": 2, "states.full.value": 3})
    {'a': 1, 'states': {'full': (2, 3)}}
    """
    found: dict[str, Any] = {name: value for name, value in feeds.items() if "." not in name}
    for name in (name for name in feeds if name.endswith(f".{PAIRED[0]}")):
        argument, kind, _ = name.split(".")
        found.setdefault(argument, {})[kind] = tuple(feeds[f"{argument}.{kind}.{part}"] for part in PAIRED)
    return found


def _forms(module: Any, name: str) -> Iterator[Form]:
    """Yield the forms in which an input of a name is tried."""
    config = module.config
    if name == CODE_IDS and (books := codebooks(config)) is not None:
        yield Form((books, CODED), "ids", _code_decoder(config).vocab_size)
    elif name == CODE_IDS:  # a transducer reads one token, and encoder-decoders are exported as such
        yield from (Form((1,), "ids", size) for size in numbers(config, ("vocab_size",))[:1])
    elif name == "task_inputs" and hasattr(config, "task_seq_len"):  # OneFormer's, of one length
        sizes = numbers(config, ("text_encoder_vocab_size",))
        yield from (Form((config.task_seq_len,), "ids", size) for size in sizes[:1])
    elif name.endswith(("input_ids", "task_inputs")):
        lead = _image_token_of_part(config) if name == "input_ids" else None
        if lead is not None:  # the config of the part may state another number than the table has
            yield Form((ANY,), "ids", module.get_input_embeddings().weight.shape[0], lead)
            return
        yield from (Form((ANY,), "ids", size) for size in numbers(config, ("vocab_size",))[:1])
    elif name in IMAGES:
        channels, *size = shape_of_timm(module) or (channels_of(module), *configured_size(module))
        yield from (Form((count, channels, *size), "values") for count in numbers(config, CLIPS))
        images = not name.endswith("videos")
        if images:
            yield Form((channels, *size), "values")
            yield Form((channels, size[0] // 2, size[1]), "values")  # SegGPT joins an image and a prompt
        yield from (Form((count, channels, *size), "values") for count in COUNTS[not images :])
    elif name == FRAMES_OF_NOISE:
        yield from (Form((ANY, width), "values") for width in numbers(config, ("model_in_channels",)))
    elif name in SOUND:
        yield from (Form((ANY, width), "values") for width in _beside_noise(module))
        yield from (Form(shape, "values") for shape in _beside_waveforms(module, name))
        yield from (Form(shape, "values") for shape, _ in sample_shapes(config, name))
        yield from (Form((1, *shape), "values") for shape, _ in sample_shapes(config, name) if len(shape) > 1)
    elif name == "bbox":
        yield from (Form((ANY, 4), kind) for kind in ("values", "zeros"))
    elif name in ROWS:
        yield from (Form((ANY, width), "values") for width in numbers(config, ROWS[name])[:1])
    elif name in SINGLE:
        yield Form((ANY, 1), "values")
    elif name in ROW:
        yield from (Form((width,), "values") for width in numbers(config, ROW[name]))
    elif name == "timestep":
        yield Form((), "values")
    elif name == NOISE and hasattr(config, "max_action_dim"):  # of the actions of a robot
        yield Form((config.chunk_size, config.max_action_dim), "values")
    elif name == "pixel_attention_mask":  # which images of a row there are
        yield from (Form((count,), "mask") for count in COUNTS)
    elif name == "timesteps":
        yield Form((ANY,), "places")
    elif name == NOISE and hasattr(config, "patch_size"):  # a number for each patch of an image
        high, wide = configured_size(module)
        yield Form(((high // config.patch_size) * (wide // config.patch_size),), "values")
    elif name == BLOCK:
        sizes, widths = numbers(config, ("block_size",)), numbers(config, STATES)
        yield from (Form(shape, "values") for shape in itertools.product(sizes[:1], widths))
    elif name == CODES:  # what a part of a codec reads: latents, or a waveform
        yield from (Form((width, ANY), "values") for width in numbers(config, LATENTS))
        yield from (Form((channels, SAMPLES), "values") for channels in numbers(config, ("channels",)))
    elif reads_shared_states(module) and name in (EMBEDDED, "position_ids"):  # of the token that comes last
        widths = _joined(module, numbers(config, ("backbone_hidden_size", *STATES)))
        yield from [Form((1,), "zeros")] if name != EMBEDDED else (Form((1, width), "values") for width in widths)
    elif name.endswith(("_embeds", "hidden_states")):
        widths = numbers(config, STATES)
        yield from (Form((ANY, width), "values") for width in (*widths, *_joined(module, widths)))
    elif name == "latents":
        yield from (Form((width, ANY), "values") for width in numbers(config, LATENTS))
        yield from (Form((ANY, width), "values") for width in numbers(config, LATENTS))
    elif name in SERIES:
        yield from _of_series(config, name)
    elif name == "freq":
        yield Form((1,), "zeros")
    elif name == "image_attention_mask":  # which images a token attends to
        yield from (Form((ANY, count), "mask") for count in COUNTS)
    elif name == "attention_mask":
        yield Form((FRAMES,) if _reads_sound(module) else (ANY,), "mask")
    elif name == "token_type_ids":
        yield Form((ANY,), "zeros")


def _image_token_of_part(config: Any) -> int | None:
    """Return the token that stands for an image in a vision-language model that is a part of another one, as in PI0."""
    parts = (part for part in vars(config).values() if getattr(part, "vision_config", None) is not None)
    return next((token for part in parts if isinstance(token := getattr(part, "image_token_id", None), int)), None)


def _reads_sound(module: Any) -> bool:
    """Return whether a module takes sound and no text, so that a mask is one of frames."""
    taken = inspect.signature(module.forward).parameters
    return "input_ids" not in taken and any(name in taken for name in SOUND)


def draws_noise(module: Any) -> bool:
    """Return whether a module computes with noise that it draws unless it is an input."""
    return not {NOISE, FRAMES_OF_NOISE}.isdisjoint(inspect.signature(module.forward).parameters)


def _beside_noise(module: Any) -> list[int]:
    """Return the widths of spectrograms of any number of frames, which have as many as the noise beside them."""
    taken = inspect.signature(module.forward).parameters
    return numbers(module.config, WIDTHS) if FRAMES_OF_NOISE in taken else []


def _beside_waveforms(module: Any, name: str) -> Iterator[tuple[int, ...]]:
    """Yield shapes of spectrograms with a frame for each code of a waveform, as X-Codec 2 reads both."""
    if name == "input_values" or "input_values" not in inspect.signature(module.forward).parameters:
        return
    for hop in numbers(module.config, HOPS):
        yield from ((SAMPLES // hop, width) for width in numbers(module.config, WIDTHS))


def _joined(module: Any, widths: Sequence[int]) -> list[int]:
    """Return the widths of states that stand beside each other, as layers of the module read them."""
    read = dict.fromkeys(part.in_features for part in module.modules() if isinstance(part, torch.nn.Linear))
    return [size for size in read if any(size > width and size % width == 0 for width in widths)]


def _of_series(config: Any, name: str) -> Iterator[Form]:
    """Yield the forms of an input of a model of time series; earlier values are read again at some lags."""
    kind = SERIES[name]
    before = name.startswith("past_")
    lag = max(getattr(config, "lags_sequence", None) or [0]) if before else 0
    for length in numbers(config, ("context_length",) if before else ("prediction_length",)):
        if name.endswith("time_features"):
            yield from (Form((length + lag, count), kind) for count in numbers(config, ("num_time_features",)))
            continue
        yield Form((length + lag,), kind)
        yield from (Form((length + lag, size), kind) for size in numbers(config, ("input_size",)) if size > 1)


def _found(module: Any, only: str | None) -> tuple[dict[str, Form], tuple[str, ...], tuple[str, ...]] | None:
    """Return the forms of the largest set of inputs with which a module gives features, and the names of these.

    Where an input changes only values of pairs of rows, as the texts of X-CLIP do, those of a row with itself are
    features too, and the first of them.
    """
    first = None
    for forms in itertools.islice(_all_trials(module), TRIALS):
        shapes = _runs(module, forms, 2, TOKENS)
        rows, paired = (
            tuple(name for name in _of_rows(module, forms, shapes, paired=paired) if only in (None, name))
            for paired in (False, True)
        )
        outputs = next((each for each in ((rows, ()), (paired + rows, paired)) if _uses(module, forms, each[0])), None)
        if outputs is None:
            continue
        if not _branches(module, forms):
            return forms, *outputs
        first = (forms, *outputs) if first is None else first
    return first


def _all_trials(module: Any) -> Iterator[dict[str, Form]]:
    """Yield the sets of inputs with their forms, those first with which most modules compute."""
    known = _known(module)
    taken = inspect.signature(module.forward).parameters.values()
    required = [each.name for each in taken if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD]
    if reads_shared_states(module):
        required += [name for name in known if name == EMBEDDED or "." in name]
    if codebooks(module.config) is not None:
        required.append(CODE_IDS)
    if any(name not in known for name in required):
        return
    optional = [name for name in known if name not in required]
    usual = [name for name in optional if name not in OTHERS]
    yield from _trials(known, required, usual)
    yield from _trials(known, required, optional)


def _branches(module: Any, forms: Mapping[str, Form]) -> bool:
    """Return whether a module asks for a value that it computes of its inputs, as a loop over lengths of clips does.

    A set of inputs with which it does not is better, as no graph holds such a branch.
    """
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode(), forget_results(module):
            _tensors(module, {name: form.values(2, TOKENS) for name, form in forms.items()})
    except DataDependentOutputException:
        return True
    except Exception:  # modules raise errors of all kinds; with shapes alone, some fail that can be traced
        return False
    return False


def _uses(module: Any, forms: Mapping[str, Form], outputs: Sequence[str]) -> bool:
    """Return whether there are outputs, and each input changes one of them; no texts change the videos of X-CLIP."""
    if not outputs:
        return False
    feeds = {name: form.values(2, TOKENS) for name, form in forms.items()}
    changed = {name: form.values(2, TOKENS, seed=1) for name, form in forms.items() if form.kind in ("ids", "values")}
    with torch.inference_mode():
        usual = _tensors(module, feeds)
        others = [_tensors(module, feeds | {name: value}) for name, value in changed.items()]
    return not any(all(torch.equal(usual[name], other[name]) for name in outputs) for other in others)


def _trials(
    known: Mapping[str, tuple[Form, ...]], required: Sequence[str], optional: Sequence[str]
) -> Iterator[dict[str, Form]]:
    """Yield sets of two inputs or more with their forms, the sets with most inputs first."""
    for count in range(len(optional), -1, -1):
        for others in itertools.combinations(optional, count):
            names = [name for name in known if name in required or name in others]
            if not set(names) - set(TEXT):
                continue
            for forms in itertools.product(*(known[name] for name in names)):
                yield dict(zip(names, forms, strict=True))


def _runs(module: Any, forms: Mapping[str, Form], rows: int, tokens: int) -> dict[str, torch.Size] | None:
    """Return the shapes of the features that a module returns for some rows; None if it fails or returns none."""
    feeds = {name: form.values(rows, tokens) for name, form in forms.items()}
    try:
        with torch.inference_mode():
            returned = _tensors(module, feeds)
    except Exception:  # modules raise errors of all kinds
        return None
    return {name: value.shape for name, value in returned.items()}


def _called(module: Any, feeds: Mapping[str, torch.Tensor]) -> Any:
    """Return what a module returns; the logits of the codes of a frame, which are in its rows, become an axis."""
    books = codebooks(module.config)
    if books is None or CODE_IDS not in feeds:
        return module(**nested(feeds), **without_cache(module))
    returned = module(**with_codes(module.config, feeds), **without_cache(module))
    return {"logits": returned["logits"].unflatten(0, (-1, books))}


def with_codes(config: Any, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return inputs with codes, [rows, codes of a frame, frames], as a class takes them.

    MusicGen takes them in its rows, [rows x codes of a frame, frames], and Dia the codes of a frame last.
    """
    if CODE_IDS not in feeds:
        return dict(feeds)
    codes = feeds[CODE_IDS]
    in_rows = hasattr(_code_decoder(config), IN_ROWS)
    return {**feeds, CODE_IDS: codes.flatten(0, 1) if in_rows else codes.mT.contiguous()}


def _tensors(module: Any, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of floats among the outputs of a module, the hidden states first."""
    returned = _called(module, feeds)
    if not isinstance(returned, Mapping):
        raise TypeError(f"it returns {type(returned).__name__}, not outputs by name")
    names = (HIDDEN, *(name for name in returned if name != HIDDEN))
    values = {name: returned.get(name) for name in names}
    found = {name: value for name, value in values.items() if _is_feature(value)}
    return found or {name: value[0] for name, value in values.items() if _is_first_feature(value)}


def _is_first_feature(value: Any) -> TypeGuard[Sequence[torch.Tensor]]:
    """Return whether the first of several values is a tensor of features, as the maps of a backbone are."""
    return isinstance(value, list | tuple) and bool(value) and _is_feature(value[0])


def _is_feature(value: Any) -> TypeGuard[torch.Tensor]:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 1


def _of_rows(
    module: Any, forms: Mapping[str, Form], shapes: Mapping[str, torch.Size] | None, *, paired: bool = False
) -> tuple[str, ...]:
    """Return the outputs with one row for each row of the inputs, or with one value for each pair of rows."""
    other = None if shapes is None else _runs(module, forms, 3, TOKENS)
    if shapes is None or other is None:
        return ()
    axes = 1 + paired
    return tuple(
        name
        for name, shape in shapes.items()
        if name in other and (shape[:axes], other[name]) == ((2,) * axes, ((3,) * axes + shape[axes:]))
    )


def _outputs(
    module: Any, *tensors: torch.Tensor, inputs: tuple[str, ...], outputs: tuple[str, ...], paired: tuple[str, ...]
) -> tuple[torch.Tensor, ...]:
    returned = _tensors(module, dict(zip(inputs, tensors, strict=True)))
    return tuple(with_itself(returned[name]) if name in paired else returned[name] for name in outputs)


def with_itself(pairs: torch.Tensor) -> torch.Tensor:
    """Return the values of each row with itself, [rows, ...], of values of pairs of rows, [rows, rows, ...]."""
    own = pairs.diagonal().movedim(-1, 0)
    return own if own.ndim > 1 else own[:, None]
