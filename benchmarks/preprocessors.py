"""Default preprocessors of transformers for the small models of benchmarks/coverage.py, and files for them to read."""

from __future__ import annotations

import contextlib
import inspect
import wave
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from compressor.models.config_shapes import CLIPS, SOUND, main_input
from compressor.models.several_inputs import codebooks, draws_noise
from compressor.models.video.inputs import takes_videos

Kind = Literal["image", "video", "sound", "text"]

SAMPLES = 12  # files or lines, of which the last part is compared
SIDE = 160  # pixels of images for a config that states none, with at least five stages that halve them
DEFAULT_SIDE = 224  # of an export whose config states none
STEP = 32  # pixels: what such sides are a multiple of
CALL = (96, 72)  # pixels, height and width of the smallest image; others are larger and of other shapes
SECONDS = (1.0, 0.6, 1.4)
WORDS = (3, 30)  # of the shortest and the longest text
CHANNELS = ("num_mel_bins", "input_feat_per_channel", "num_mel_channels")  # of a spectrogram, in a config
# Roles of special tokens, by the fields of a config that state their ids.
ROLES = ("pad", "unk", "cls", "sep", "mask", "bos", "eos")
SINGLE, PAIR = "[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]"


AUTO = {"image": "AutoImageProcessor", "sound": "AutoFeatureExtractor", "text": "AutoTokenizer"}


@dataclass(frozen=True)
class Preprocessor:
    """What prepares real inputs: the kind of them, and the objects of transformers by what they read."""

    kind: Kind
    parts: Mapping[str, Any]
    side: int | None = None  # of the images, for a processor that keeps their size

    def saved(self, folder: Path) -> Preprocessor:
        """Write the files of all parts into the folder of a checkpoint; return what transformers reads there."""
        import transformers

        for part in self.parts.values():
            part.save_pretrained(folder)
        own = {role: getattr(transformers, AUTO[role]).from_pretrained(folder) for role in self.parts}
        if self.kind == "video":
            with contextlib.suppress(
                ValueError, ImportError, OSError
            ):  # some classes of videos have one of images alone
                own["image"] = transformers.AutoVideoProcessor.from_pretrained(folder)
        return Preprocessor(self.kind, own, self.side)

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the classes; that of the model for a tokenizer, whose class is the same for all."""
        return tuple("WordLevel" if role == "text" else type(each).__name__ for role, each in self.parts.items())


def preprocessor_of(module: Any) -> Preprocessor | None:
    """Return the default preprocessor of a model of transformers that suits its reduced config.

    Models of several kinds of inputs have none here: a processor that joins them needs the tokens of a tokenizer of
    their own, and none gives the noise that a model computes with, or codes of sound.
    """
    if draws_noise(module) or codebooks(module.config) is not None:
        return None
    taken = set(inspect.signature(module.forward).parameters)
    main, config = main_input(module), module.config
    speaks = {"input_ids"} <= taken
    encoder = getattr(config, "encoder", config)
    side = None
    if main.startswith("pixel_values") and not speaks:
        processor = _image_processor(encoder if hasattr(encoder, "model_type") else config, config)
        parts = {} if processor is None else {"image": processor}
        kind: Kind = "video" if takes_videos(module) else "image"
        if processor is not None and kind == "image":
            side = _side_kept(processor, config)
            if not _suits(processor, module, side):
                return None
    elif main in SOUND and not speaks:
        extractor = _feature_extractor(encoder if hasattr(encoder, "model_type") else config)
        gives = extractor is not None and main in extractor.model_input_names
        parts, kind = {"sound": extractor} if gives else {}, "sound"
    elif main == "input_ids" and not taken & {"pixel_values", *SOUND}:
        if not _reads_texts(module):
            return None
        parts, kind = {}, "text"
    else:
        return None
    writes = kind == "text" or "decoder_input_ids" in taken
    tokenizer = small_tokenizer(config.get_text_config(decoder=kind != "text")) if writes else None
    if kind != "text" and not parts:
        return None
    if tokenizer is not None:
        parts["text"] = tokenizer
    return Preprocessor(kind, parts, side) if parts else None


def _reads_texts(module: Any) -> bool:
    """Return whether texts alone are inputs of a model, as an encoder-decoder has them; those of BROS have boxes."""
    import torch

    if getattr(module.config, "is_encoder_decoder", False):
        return True
    try:
        with torch.inference_mode():
            module(input_ids=torch.full((1, 16), 5))
    except Exception:  # models raise errors of all kinds
        return False
    return True


def _side_kept(processor: Any, config: Any) -> int | None:
    """Return the side of the images that a processor is to be given because it resizes none to a given shape."""
    try:
        fixed = type(processor)(size={"height": 64, "width": 64}, keep_aspect_ratio=False)
        if _called(fixed, 48, 96)["pixel_values"].shape[2:] == (64, 64):
            return None
    except Exception:  # processors raise errors of all kinds
        pass
    shapes = {_called(processor, *sides)["pixel_values"].shape for sides in ((48, 96), (96, 48), (96, 96))}
    return None if len(shapes) == 1 else side_of(config) or DEFAULT_SIDE


def _suits(processor: Any, module: Any, side: int | None) -> bool:
    """Return whether a reduced model takes what its processor makes of an image; some have too few pixels left."""
    import torch

    targets = {"decoder_input_ids": torch.ones(1, 2, dtype=torch.int64)}
    targets = targets if "decoder_input_ids" in inspect.signature(module.forward).parameters else {}
    pixels = torch.as_tensor(_called(processor, *[side or SIDE] * 2)["pixel_values"])
    for options in ({}, {"interpolate_pos_encoding": True}):
        try:
            with torch.inference_mode():
                module(pixel_values=pixels, **targets, **options)
        except Exception:  # models raise errors of all kinds
            continue
        return True
    return False


def _image_processor(config: Any, whole: Any) -> Any:
    """Return an image processor whose size is that of the config.

    Return None if the class has none by default, or one whose images come with other inputs.
    """
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

    found = next((_listed(IMAGE_PROCESSOR_MAPPING, each) for each in (config, whole)), None)
    kinds = found.values() if isinstance(found, dict) else found if isinstance(found, tuple) else (found,)
    kind = next((each for each in kinds if each is not None), None)
    if kind is None or "pretrained_cfg" in inspect.signature(kind.__init__).parameters:  # timm's needs its file
        return None
    default = kind().to_dict()
    sides = {name: _fitted(default[name], side_of(config)) for name in ("size", "crop_size") if default.get(name)}
    processor = kind(**sides)
    return processor if set(_called(processor)) <= {"pixel_values", "pixel_mask"} else None


def _called(processor: Any, height: int = 64, width: int = 64) -> Mapping[str, Any]:
    """Return what an image processor makes of an image; those of varying sizes come with grids and masks of patches."""
    from PIL import Image

    found: Mapping[str, Any] = processor(images=Image.new("RGB", (width, height)), return_tensors="np")
    return found


def _listed(mapping: Any, config: Any) -> Any:
    try:
        return mapping[type(config)]
    except KeyError:
        return None


def side_of(config: Any) -> int | None:
    """Return the side of the images that a config states; None if it states none."""
    parts = (config, *(getattr(config, name, None) for name in ("vision_config", "backbone_config")))
    sizes = (getattr(each, "image_size", None) for each in parts if each is not None)
    size = next((each for each in sizes if each is not None), None)
    return max(size) if isinstance(size, list | tuple) else size


def _fitted(size: int | Mapping[str, int | None], side: int | None) -> dict[str, int | None]:
    """Return the size of a processor with its least side replaced, and others by as much.

    >>> _fitted({"height": 384, "width": 384}, 32)
    {'height': 32, 'width': 32}
    >>> _fitted({"shortest_edge": 800, "longest_edge": 1333}, None)
    {'shortest_edge': 160, 'longest_edge': 256}
    """
    sides = {"shortest_edge": size} if isinstance(size, int) else dict(size)
    given = [value for value in sides.values() if value]
    if not given:
        return sides
    scale = min(1.0, SIDE / min(given)) if side is None else side / min(given)
    step = STEP if side is None and scale < 1 else 1
    return {
        name: value if value is None else step * max(1, round(value * scale / step)) for name, value in sides.items()
    }


def _feature_extractor(config: Any) -> Any:
    """Return a feature extractor with as many channels as the config states; None if the class has none."""
    from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING

    kind = _listed(FEATURE_EXTRACTOR_MAPPING, config)
    if kind is None:
        return None
    parts = (config, getattr(config, "audio_config", None))
    stated = (getattr(part, name, None) for part in parts for name in CHANNELS)
    channels = next((value for value in stated if isinstance(value, int)), None)
    taken = inspect.signature(kind.__init__).parameters
    names = [name for name in ("num_mel_bins", "feature_size") if name in taken]
    fields = {names[0]: channels} if names and channels is not None else {}
    if (
        "num_mel_bins" in fields
        and "feature_size" in taken
        and taken["feature_size"].default == taken["num_mel_bins"].default
    ):
        fields["feature_size"] = channels
    return kind(**fields)


def small_tokenizer(config: Any) -> Any:
    """Return a tokenizer of words for a small vocabulary, whose special tokens have the ids that the config states.

    Others have ids that nothing states; equal ids are one token. Return None without a vocabulary.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    size = getattr(config, "vocab_size", None)
    if not isinstance(size, int):
        return None
    ids = _special_ids(config, size)
    names = {number: f"[{role.upper()}]" for role, number in reversed(ids.items())}
    words = {names.get(number, f"w{number}"): number for number in range(size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=names[ids["unk"]]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    first, last = names[ids["cls"]], names[ids["sep"]]
    template = {"[CLS]": first, "[SEP]": last}
    single, pair = (" ".join(template.get(part, part) for part in text.split()) for text in (SINGLE, PAIR))
    special = list({first: ids["cls"], last: ids["sep"]}.items())
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)
    tokens = {f"{role}_token": names[number] for role, number in ids.items()}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)


def _special_ids(config: Any, size: int) -> dict[str, int]:
    """Return the ids of the special tokens: those of the config, and free ones for others."""
    stated = {role: getattr(config, f"{role}_token_id", None) for role in ROLES}
    ids = {role: each[0] if isinstance(each, list) else each for role, each in stated.items()}
    ids = {role: each for role, each in ids.items() if isinstance(each, int) and 0 <= each < size}
    free = (number for number in range(size) if number not in ids.values())
    for role, like in (("pad", None), ("unk", None), ("cls", "bos"), ("sep", "eos"), ("mask", None)):
        if role not in ids:
            ids[role] = ids[like] if like in ids else next(free)
    ids.setdefault("bos", ids["cls"])
    ids.setdefault("eos", ids["sep"])
    return ids


def write_inputs(preprocessor: Preprocessor, config: Any, folder: Path) -> Path:
    """Write images of several shapes, sound or texts of several lengths, or frames; return what --data takes."""
    rng = np.random.default_rng(7)
    if preprocessor.kind == "text":
        return _write_texts(preprocessor.parts["text"], folder / "texts.txt", rng)
    data = folder / "data"
    data.mkdir()
    for number in range(SAMPLES):
        if preprocessor.kind == "image":
            height, width = CALL[number % 2] + 24 * number, CALL[1 - number % 2] + 40
            height, width = (height, width) if preprocessor.side is None else (preprocessor.side,) * 2
            _write_image(data / f"{number:02}.png", height, width, rng)
        elif preprocessor.kind == "video":
            (data / f"{number:02}").mkdir()
            for frame in range(next(count for name in CLIPS if isinstance(count := getattr(config, name, None), int))):
                _write_image(data / f"{number:02}" / f"{frame:03}.png", *CALL, rng)
        else:
            _write_clip(data / f"{number:02}.wav", SECONDS[number % 3], preprocessor.parts["sound"].sampling_rate, rng)
    return data


def _write_texts(tokenizer: Any, path: Path, rng: np.random.Generator) -> Path:
    words = [word for word in tokenizer.get_vocab() if word not in tokenizer.all_special_tokens]
    counts = np.linspace(*WORDS, SAMPLES, dtype=int)
    path.write_text("".join(" ".join(rng.choice(sorted(words), count)) + "\n" for count in counts))
    return path


def _write_image(path: Path, height: int, width: int, rng: np.random.Generator) -> None:
    """Write an image of smooth colours with noise, [height, width, 3]."""
    from PIL import Image

    coarse = Image.fromarray(rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)).resize((width, height))
    noise = rng.integers(-20, 21, (height, width, 3))
    Image.fromarray((np.asarray(coarse).astype(int) + noise).clip(0, 255).astype(np.uint8)).save(path)


def _write_clip(path: Path, seconds: float, rate: int, rng: np.random.Generator) -> None:
    """Write a clip of a tone with noise, mono, 16 bits."""
    samples = round(seconds * rate)
    tone = np.sin(np.arange(samples) * rng.uniform(0.05, 0.3)) * 0.3 + rng.standard_normal(samples) * 0.05
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((tone.clip(-1, 1) * 32767).astype("<i2").tobytes())
