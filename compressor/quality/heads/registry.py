"""The head of each task."""

from __future__ import annotations

from compressor.choices import CTC, VISION_LANGUAGE, ZERO_SHOT
from compressor.quality.heads.base import Head
from compressor.quality.heads.depth import Depth
from compressor.quality.heads.features import Features, SentenceEmbedding
from compressor.quality.heads.label_sets import LabelSets
from compressor.quality.heads.pixels import PixelClasses
from compressor.quality.heads.regression import Regression
from compressor.quality.heads.single_class import SingleClass
from compressor.quality.heads.spans import Spans
from compressor.quality.heads.tokens import (
    Frames,
    MaskedTokens,
    NextTokens,
    Queries,
    TargetTokens,
    TextsBehindImages,
    TokenClasses,
)

HEADS: dict[str, Head] = {
    "text-generation": NextTokens(),
    "text2text-generation": TargetTokens(),
    "automatic-speech-recognition": TargetTokens(),
    "image-to-text": TargetTokens(),
    VISION_LANGUAGE: TextsBehindImages(),
    "fill-mask": MaskedTokens(),
    "token-classification": TokenClasses(),
    "question-answering": Spans(),
    "image-segmentation": PixelClasses(),
    "depth-estimation": Depth(),
    "sentence-similarity": SentenceEmbedding(),
    "audio-frame-classification": Frames(),
    CTC: Frames(),
    "object-detection": Queries(),
    "audio-xvector": Features(),
    "feature-extraction": Features(),
    "image-feature-extraction": Features(),
    ZERO_SHOT: SingleClass(),  # the classes are texts
}
# The heads of the classification of images, texts and sound, by the problem type of the config.
CLASSIFIERS: dict[str, Head] = {
    "single_label_classification": SingleClass(),
    "multi_label_classification": LabelSets(),
    "regression": Regression(),
}


def head_for(task: str, problem_type: str | None = None) -> Head:
    """Return the head of a task.

    Args:
        task: one of `compressor.choices.TASKS`.
        problem_type: one of `compressor.choices.PROBLEM_TYPES`, for classifiers; None means a single class.

    >>> head_for("image-classification").metric("class"), head_for("text-classification", "regression").metric(None)
    ('accuracy', 'r_squared')
    """
    if task in HEADS:
        return HEADS[task]
    return CLASSIFIERS[problem_type or "single_label_classification"]
