"""Folders of images with texts: what a model reads of them, what it is evaluated on, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest

from compressor import models
from compressor.data import splits
from compressor.errors import DataError
from compressor.models.vision_language.parts import TASK
from tests.vision_language_models import IMAGE, TOKEN, picture, processor, saved


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision_language")
    return {kind: models.load(str(saved(kind, folder))) for kind in ("llava", "idefics3", "paligemma")}


TEXTS = [f"{IMAGE} the dog runs", "a cat", f"the man {IMAGE} sees a tree", "the old house", "a river", "the red hill"]


def folder_of(path, texts=TEXTS):
    path.mkdir(exist_ok=True)
    for number in range(len(texts)):
        picture(number).save(path / f"{number}.png")
    records = [{"file_name": f"{number}.png", "text": text} for number, text in enumerate(texts)]
    lines = [json.dumps(record) for record in records]
    (path / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return str(path)


def load(path, model):
    return splits.load(path, model.preprocess, task=TASK)


def test_inputs_are_those_of_the_processor_padded_on_the_right(loaded, tmp_path):
    model = loaded["llava"]
    data = load(folder_of(tmp_path / "d"), model)
    assert data.reading == "images with texts 'text' of metadata.jsonl"
    assert data.label_kind == "tokens"
    for part in data.parts:
        (batch,) = part.batches(8)
        for row, index in enumerate(part.indices):
            text = TEXTS[index] if IMAGE in TEXTS[index] else f"{IMAGE}{TEXTS[index]}"
            expected = processor("llava")(images=picture(index), text=text, return_tensors="np")
            count = expected["input_ids"].shape[1]
            assert batch.feeds["input_ids"][row, :count].tolist() == expected["input_ids"][0].tolist()
            assert batch.feeds["attention_mask"][row].sum() == count
            assert np.array_equal(batch.feeds["pixel_values"][row], expected["pixel_values"][0])


def test_labels_are_the_tokens_behind_the_image(loaded, tmp_path):
    model = loaded["llava"]
    data = load(folder_of(tmp_path / "d"), model)
    for part in data.parts:
        (batch,) = part.batches(8)
        for ids, labels, scored, mask in zip(
            batch.feeds["input_ids"], batch.labels, batch.scored, batch.feeds["attention_mask"], strict=True
        ):
            last = np.flatnonzero(ids == TOKEN)[-1]
            assert scored.tolist() == [last <= place < mask.sum() - 1 for place in range(len(ids))]
            assert labels[scored].tolist() == ids[last + 1 : mask.sum()].tolist()


def test_where_images_stand_is_said(loaded, tmp_path):
    data = load(folder_of(tmp_path / "d"), loaded["llava"])
    found = [str(each) for each in data.limitations if each.feature == "place of the images"]
    assert found == ["place of the images: 4 of 6 texts hold no <image>, so the image stands before them."]


def test_a_prompt_that_is_read_in_both_directions_has_no_targets(loaded, tmp_path):
    data = load(folder_of(tmp_path / "d"), loaded["paligemma"])
    (batch,) = data.test.batches(8)
    assert (data.label_kind, batch.labels) == (None, None)
    assert batch.scored.any()
    assert [each for each in data.limitations if each.feature == "targets of the data"]


def test_tiles_are_padded_with_empty_ones(loaded, tmp_path):
    path = folder_of(tmp_path / "d")
    picture(0).resize((8, 8)).save(tmp_path / "d" / "1.png")  # one tile and the whole
    picture(0).resize((32, 8)).save(tmp_path / "d" / "2.png")
    data = load(path, loaded["idefics3"])
    counts = set()
    for part in data.parts:
        for batch in part.batches(2):
            pixels, mask = batch.feeds["pixel_values"], batch.feeds["pixel_attention_mask"]
            tiles = (batch.feeds["input_ids"] == TOKEN).sum(1)
            assert mask.dtype == bool
            for row, count in enumerate(tiles):
                assert mask[row, :count].any((1, 2)).all()
                assert not mask[row, count:].any()
                assert not pixels[row, count:].any()
            counts |= set(tiles.tolist())
    assert len(counts) > 1


def test_a_folder_without_texts_is_refused(loaded, tmp_path):
    picture(0).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"no metadata\.jsonl and no metadata\.csv; expected a meta"):
        load(str(tmp_path), loaded["llava"])


def test_unusable_samples_are_skipped_with_a_reason(loaded, tmp_path):
    texts = [*TEXTS, f"a dog {IMAGE}", "the " * 80, "a man"]
    path = folder_of(tmp_path / "d", texts)
    (tmp_path / "d" / "8.png").write_text("no image")
    data = load(path, loaded["llava"])
    reasons = {each.id: each.reason for each in data.skipped}
    assert set(reasons) == {"7.png", "8.png"}  # the end token stands behind the image of 6.png
    assert reasons["7.png"] == "the image and its text have 85 tokens, more than the 64 of the model"
    assert reasons["8.png"] == "not an image that can be identified"


def test_images_of_another_size_than_the_model_takes_are_refused(loaded, tmp_path):
    model = loaded["llava"]
    own = processor("llava")
    own.image_processor.crop_size = {"height": 12, "width": 12}

    def prepare(image, text):
        found = own(images=[image], text=[f"{IMAGE}{text}" if IMAGE not in text else text], return_tensors="np")
        return {name: np.asarray(found[name][0]) for name in model.preprocess.inputs}

    wrong = replace(model.preprocess, image_text=prepare)
    with pytest.raises(
        DataError, match=r"makes images \[3, 12, 12\], but the model takes \[3, 8, 8\]; check its prepro"
    ):
        splits.load(folder_of(tmp_path / "d"), wrong, task=TASK)


def test_another_number_of_image_tokens_is_refused(loaded, tmp_path):
    wrong = replace(loaded["llava"].preprocess, image_tokens=lambda row: 5)
    with pytest.raises(
        DataError, match=r"makes 4 image tokens of .*, but the model has 5 features for it; check the pa"
    ):
        splits.load(folder_of(tmp_path / "d"), wrong, task=TASK)


def test_without_a_processor_images_are_refused(loaded, tmp_path):
    bare = replace(loaded["llava"].preprocess, image_text=None)
    with pytest.raises(DataError, match=r"holds images and texts, but the model has no processor; add its processor_c"):
        splits.load(folder_of(tmp_path / "d"), bare, task=TASK)


def test_random_data_has_the_placeholders_of_the_example(loaded):
    for model in loaded.values():
        data = splits.load("random", model.preprocess, task=TASK)
        ids = next(data.test.batches(4)).feeds["input_ids"]
        expected = (model.example["input_ids"] == TOKEN).numpy()
        assert all((row == TOKEN).tolist() in expected.tolist() for row in ids)
        assert len({tuple(row) for row in ids.tolist()}) == 4
