"""The values that options accept. The module imports only the standard library, so that `--help` stays fast."""

from __future__ import annotations

import re
from typing import Final, Literal, NamedTuple, get_args

TASKS = (
    "image-classification",
    "image-feature-extraction",
    "text-classification",
    "feature-extraction",
    "sentence-similarity",
    "text-generation",
    "text2text-generation",
    "automatic-speech-recognition",
    "token-classification",
    "question-answering",
    "fill-mask",
    "image-segmentation",
    "depth-estimation",
    "audio-classification",
    "audio-frame-classification",
    "ctc",
    "video-classification",
    "zero-shot-image-classification",
    "image-text-to-text",
    "image-to-text",
    "object-detection",
    "audio-xvector",
)
VISION_LANGUAGE: Final = "image-text-to-text"
CTC: Final = "ctc"  # speech recognition by a class for each frame; the hub calls it as that by encoder-decoders
# The task of models with a tower of images and a tower of texts, whose classes are texts, such as CLIP.
ZERO_SHOT: Final = "zero-shot-image-classification"
TEMPLATE_GAP = "{}"  # what a class name replaces in a prompt template
# The tasks of encoder-decoders, and the targets for models of several files: those, and vision-language models.
ENCODER_DECODER_TASKS = ("text2text-generation", "automatic-speech-recognition", "image-to-text")
PARTS_TARGETS = ("onnxruntime", "openvino")
# What a classifier predicts, in the words of transformers' configs.
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")
# The target that writes a checkpoint. Named here because the settings must not import the code that writes it.
TRANSFORMERS = "transformers"
# The target that writes a file for llama.cpp: a language model without some blocks, or attentions of blocks.
GGUF = "gguf"

# Copied from runtimes.base.protocols and passes.plan.selection, which import NumPy and torch; a test compares them.
DEVICES = ("cpu", "cuda")
PRECISIONS = ("fp32", "fp16", "bf16", "fp8", "int8", "int8-dynamic", "int8-weight-only", "int4", "int2")
METRICS = ("cosine", "influence", "angular", "span", "random", "reverse", "output")

COSTS = ("latency", "macs")
# What `--max-loss` bounds, see compressor.quality.budget.
ACCURACY, AGREEMENT, DIVERGENCE = BUDGETS = ("accuracy", "agreement", "divergence")
# The actions that `--drop auto` chooses among by default.
AUTO_ACTIONS = ("drop", "constant", "scale", "low-rank", "linear", "fuse", "merge")
HEAL_METHODS = ("none", "closed-form", "distill")

AUTO = "auto"
# Begins the description of how data of the hub were read, by which reports tell them from files.
HUB_READING = "hub dataset"
# The values of --int8, which is short for --precision.
SHORT_FORMS = {"static": "int8", "dynamic": "int8-dynamic", "weight-only": "int8-weight-only"}

Calibration = Literal["typical", "minmax", "percentile", "entropy", "mse"]
CALIBRATIONS: tuple[Calibration, ...] = get_args(Calibration)

# Largest plausible values. They bound time and memory, and are far above what a device can use.
MOST_ROWS = 65_536  # of a batch
MOST_TOKENS = 2**24
MOST_THREADS = 4_096
MOST_ROUNDS = 10_000
MOST_WORKERS = 65_536
MOST_PIXELS = 16_384  # of a side of an image

DYNAMIC: Final = "dynamic"
# Height and width in pixels, `DYNAMIC`, or None for the size that the model's preprocessing gives.
ImageSize = tuple[int, int] | Literal["dynamic"] | None


RANKINGS = ("attention", "norm", "random")  # methods of --image-tokens
NO_STAGES = "none"


class ImageTokens(NamedTuple):
    """The value of --image-tokens: the method, and pairs of a depth and the share of image tokens kept behind it."""

    method: str
    stages: tuple[tuple[int, float], ...]


def parse_image_tokens(value: str) -> ImageTokens | None:
    """Return the stages of the value of --image-tokens; None for none, and for auto, which chooses them.

    Raises:
        ValueError: the value has another form, or depths that do not rise or shares that do not fall.

    >>> parse_image_tokens("50%@8,25%@16")
    ImageTokens(method='attention', stages=((8, 0.5), (16, 0.25)))
    >>> parse_image_tokens("random:12.5%@4").stages
    ((4, 0.125),)
    """
    if value in (NO_STAGES, AUTO):
        return None
    method, _, rest = value.rpartition(":")
    parts = [re.fullmatch(r"(\d+(?:\.\d+)?)%@(\d+)", part.strip()) for part in rest.split(",")]
    found = [(int(part[2]), float(part[1]) / 100) for part in parts if part is not None]
    if len(found) < len(parts) or (method or RANKINGS[0]) not in RANKINGS:
        raise ValueError(
            f"--image-tokens {value}: expected the share of image tokens that is kept and the block before which the "
            f"others go, such as 50%@8,25%@16, and in front of it another method ({' or '.join(RANKINGS[1:])}), such "
            "as random:50%@8, or auto"
        )
    depths, shares = [depth for depth, _ in found], [share for _, share in found]
    if depths != sorted(set(depths)) or depths[0] < 1:
        raise ValueError(f"--image-tokens {value}: expected blocks that rise, from 1 on")
    if shares != sorted(set(shares), reverse=True) or shares[0] >= 1:
        raise ValueError(f"--image-tokens {value}: expected shares that fall, from below 100% on")
    return ImageTokens(method or RANKINGS[0], tuple(found))


def parse_image_size(value: str | int | None) -> ImageSize:
    """Return height and width of the value of --image-size.

    Raises:
        ValueError: the value has another form, or is too large.

    >>> parse_image_size("224"), parse_image_size("256x192"), parse_image_size("dynamic")
    ((224, 224), (256, 192), 'dynamic')
    """
    if value is None:
        return None
    if value == DYNAMIC:
        return DYNAMIC
    sides = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", str(value).strip())
    if sides is None:
        raise ValueError(f"--image-size {value}: expected pixels such as 224, HEIGHTxWIDTH such as 256x192, or dynamic")
    height, width = int(sides[1]), int(sides[2] or sides[1])
    if max(height, width) > MOST_PIXELS:
        raise ValueError(f"--image-size {value}: expected at most {MOST_PIXELS:,} pixels a side")
    return height, width
