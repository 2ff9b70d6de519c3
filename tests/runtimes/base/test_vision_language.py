"""The parts of a vision-language model as one engine: which of them run, and how features are placed."""

import numpy as np
import pytest

from runtimes.base.protocols import RuntimesError
from runtimes.base.vision_language import FACTS, STEMS, VisionLanguageEngine, merge, opened, parts_of, past_of

PLACEHOLDER, WIDTH = 9, 2


class Part:
    """An engine that records what it is fed."""

    def __init__(self, inputs, outputs, answer):
        self.inputs, self.outputs, self.answer = inputs, outputs, answer
        self.input_dtypes = dict.fromkeys(inputs, np.dtype(np.float32))
        self.input_shapes = dict.fromkeys(inputs, (None, 2, None, 4))
        self.fed, self.closed = [], False

    def run(self, feeds):
        assert set(feeds) == set(self.inputs)
        self.fed.append(feeds)
        return dict(zip(self.outputs, self.answer(feeds), strict=True))

    def bind(self, feeds):
        return lambda: self.run(feeds)

    def close(self):
        self.closed = True


@pytest.fixture
def parts():
    vision = Part(("pixel_values",), ("image_features",), lambda feeds: [np.full((1, 3, WIDTH), 7.0)])
    embed = Part(("input_ids",), ("inputs_embeds",), lambda feeds: [np.repeat(feeds["input_ids"][..., None], WIDTH, 2)])
    names = ("attention_mask", "inputs_embeds", "past_key_values.0.key")
    decoder = Part(names, ("logits", "present.0.key"), lambda feeds: [feeds["inputs_embeds"], feeds[names[2]]])
    return vision, embed, decoder


IDS = np.array([[1, PLACEHOLDER, PLACEHOLDER, PLACEHOLDER, 5]])
TOKENS = {"input_ids": IDS, "attention_mask": np.ones_like(IDS), "past_key_values.0.key": np.zeros((1, 2, 0, 4))}
PIXELS = {"pixel_values": np.zeros((1, 3, 4, 4))}


def test_features_stand_in_the_places_of_placeholders(parts):
    engine = VisionLanguageEngine(*parts, PLACEHOLDER)
    assert engine.inputs == ("pixel_values", "input_ids", "attention_mask", "past_key_values.0.key")
    outputs = engine.run({**PIXELS, **TOKENS})
    assert outputs["logits"][0, :, 0].tolist() == [1, 7, 7, 7, 5]
    assert outputs["text_embeds"][0, :, 0].tolist() == [1, 9, 9, 9, 5]
    assert tuple(outputs) == engine.outputs


def test_only_the_parts_that_the_feeds_need_run(parts):
    vision, embed, decoder = parts
    engine = VisionLanguageEngine(*parts, PLACEHOLDER)
    assert list(engine.run(PIXELS)) == ["image_features"]
    assert (len(vision.fed), len(embed.fed), len(decoder.fed)) == (1, 0, 0)
    given = engine.run({"image_features": np.full((1, 3, WIDTH), 4.0), **TOKENS})
    assert given["logits"][0, :, 0].tolist() == [1, 4, 4, 4, 5]
    assert (len(vision.fed), len(embed.fed), len(decoder.fed)) == (1, 1, 1)
    assert engine.run(TOKENS)["logits"][0, :, 0].tolist() == [1, 9, 9, 9, 5]  # text, as any further token is
    assert len(vision.fed) == 1


@pytest.mark.parametrize(
    ("feeds", "runs"),
    [(PIXELS, (1, 0, 0)), ({"image_features": np.zeros((1, 3, WIDTH)), **TOKENS}, (0, 1, 1)), (TOKENS, (0, 1, 1))],
)
def test_a_bound_call_runs_the_same_parts(feeds, runs, parts):
    call = VisionLanguageEngine(*parts, PLACEHOLDER).bind(feeds)
    before = [len(part.fed) for part in parts]
    call()
    assert tuple(len(part.fed) - count for part, count in zip(parts, before, strict=True)) == runs


def test_a_bound_call_with_an_image_reads_its_features(parts):
    VisionLanguageEngine(*parts, PLACEHOLDER).bind({**PIXELS, **TOKENS})()
    assert parts[2].fed[-1]["inputs_embeds"][0, :, 0].tolist() == [1, 7, 7, 7, 5]


def test_all_engines_are_closed(parts):
    with VisionLanguageEngine(*parts, PLACEHOLDER):
        pass
    assert all(part.closed for part in parts)


def test_features_of_several_images_of_a_row_follow_each_other():
    features = np.arange(8.0).reshape(4, 1, 2)
    is_image = np.array([[True, False, True], [False, True, True]])
    assert merge(features, np.full((2, 3, 2), -1.0), is_image)[..., 0].tolist() == [[0, -1, 2], [-1, 4, 6]]


def test_more_placeholders_than_features_are_refused():
    with pytest.raises(
        RuntimesError, match="row 0 of input_ids has 2 placeholders of image tokens, but its images have 1"
    ):
        merge(np.ones((1, 1, 2)), np.ones((1, 2, 2)), np.array([[True, True]]))


def test_other_files_have_no_parts(tmp_path):
    assert parts_of(tmp_path / "model.onnx") is None
    assert parts_of(tmp_path / "vision_encoder.onnx") is None
    assert past_of("present.3.value") == "past_key_values.3.value"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", r"vision_language\.json cannot be read \("),
        ('{"image_token_id": "9"}', "cannot be read .*should be a valid integer"),
        ("{}", "holds nothing; expected image_token_id, a token id"),
        (None, r"There is no vision_language\.json beside"),
    ],
)
def test_a_folder_without_the_image_token_is_refused(text, reason, tmp_path):
    if text is not None:
        (tmp_path / FACTS).write_text(text)
    with pytest.raises(RuntimesError, match=reason):
        opened(tuple(tmp_path / f"{stem}.onnx" for stem in STEMS), lambda path: pytest.fail(f"{path} was opened"))
