"""Class names as texts: where they come from, how labels find them, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from compressor import models
from compressor.choices import ZERO_SHOT
from compressor.data import splits
from compressor.data.class_prompts import _words_of_synsets, read_class_names
from compressor.data.readers.image_text.captions import read_captions
from compressor.data.rows import take_rows
from compressor.errors import DataError
from tests.two_towers import COLOURS, END, picture, saved, tokenizer, write_captions, write_pictures

NAMES = sorted(COLOURS)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    write_pictures(folder / "pictures", 2)
    write_captions(folder / "captions", 2)
    (folder / "flat").mkdir()
    for number, colour in enumerate(COLOURS):
        picture(colour, number).save(folder / "flat" / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def preprocess(shared):
    return {kind: models.load(str(saved(kind, shared))).preprocess for kind in ("clip", "siglip")}


def load(shared, name, preprocess, **options):
    return splits.load(str(shared / name), preprocess, task=ZERO_SHOT, **options)


def test_every_batch_has_the_prompts_of_all_classes(shared, preprocess):
    data = load(shared, "pictures", preprocess["clip"])
    assert data.prompts.describe() == {
        "template": "a photo of a {}.", "class_names": NAMES, "class_names_from": "the class names of the data",
    }  # fmt: skip
    prompts = [f"a photo of a {name}." for name in NAMES]
    expected = tokenizer()(prompts, padding=True, return_tensors="np")
    for batch in data.test.batches(3):
        assert len(batch.feeds["pixel_values"]) == len(batch.ids)
        np.testing.assert_array_equal(batch.feeds["input_ids"], expected["input_ids"])
        np.testing.assert_array_equal(batch.feeds["attention_mask"], expected["attention_mask"])
        assert [NAMES[label] for label in batch.labels] == [id.split("/")[0] for id in batch.ids]
    (said,) = [each for each in data.limitations if each.feature == "prompt template"]
    assert str(said).startswith("prompt template: 'a photo of a {}.' is assumed for 4 classes")


def test_a_model_that_reads_the_last_token_gets_texts_of_one_length(shared, preprocess):
    data = load(shared, "pictures", preprocess["siglip"])
    assert data.prompts.template == "This is a photo of {}."
    (batch,) = data.validation.batches(9)
    prompts = [f"This is a photo of {name}." for name in NAMES]
    expected = tokenizer()(prompts, padding="max_length", return_tensors="np")["input_ids"]
    np.testing.assert_array_equal(batch.feeds["input_ids"], expected)
    assert (expected[:, -1] == 0).all()
    assert (expected == END).any(1).all()


def test_names_in_a_file_come_in_its_order_and_may_be_more(shared, preprocess):
    (shared / "names.txt").write_text("cat\nred\trose red\n\ngreen\nblue\ngrey\tdog\n")
    names = read_class_names(shared / "names.txt")
    assert names.names == (("cat",), ("rose red", "red"), ("green",), ("blue",), ("dog", "grey"))
    options = {"names_file": shared / "names.txt", "template": "the {}"}
    (shared / "names.txt").write_text("cat\nred\tcat red\n\ngreen\nblue\ngrey\tdog\n")
    data = load(shared, "pictures", preprocess["clip"], **options)
    assert data.prompts.prompts == ("the cat", "the cat red", "the green", "the blue", "the dog")
    numbers = {"red": 1, "green": 2, "blue": 3, "grey": 4}
    for batch in data.test.batches(3):
        assert batch.labels.tolist() == [numbers[id.split("/")[0]] for id in batch.ids]
    assert not [each for each in data.limitations if each.feature == "prompt template"]


def test_images_without_classes_need_names_and_stay_without_labels(shared, preprocess):
    with pytest.raises(DataError, match=r"flat has no class names, which the model reads as texts; give --class-names"):
        load(shared, "flat", preprocess["clip"])
    (shared / "two.txt").write_text("cat\ndog\n")
    data = load(shared, "flat", preprocess["clip"], names_file=shared / "two.txt")
    assert (data.label_kind, len(data.prompts.names)) == (None, 2)


def test_pairs_have_a_text_for_each_image(shared, preprocess):
    data = load(shared, "captions", preprocess["clip"])
    assert (data.prompts, data.label_kind) == (None, None)
    assert data.reading == "images with texts 'text' of metadata.jsonl"
    content = data.test.samples.content
    assert content is not None, "images are compared, and the texts with them"
    assert len({content(index) for index in range(len(data.test.samples.ids))}) == len(data.test.samples.ids)
    for batch in data.test.batches(3):
        texts = [f"the photo of a {id.split('/')[0]} cat" for id in batch.ids]
        expected = tokenizer()(texts, padding=True, return_tensors="np")["input_ids"]
        np.testing.assert_array_equal(batch.feeds["input_ids"], expected)
        assert len(batch.feeds["pixel_values"]) == len(expected)


def test_an_image_with_two_texts_is_two_samples_and_its_copy_with_one_of_them_is_none(preprocess, tmp_path):
    for name in ("a", "b", "c"):
        Image.new("RGB", (8, 8), (200, 0, 0)).save(tmp_path / f"{name}.png")
    rows = [("a", "red"), ("b", "red"), ("c", "blue")]
    lines = (json.dumps({"file_name": f"{name}.png", "text": text}) for name, text in rows)
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    samples = read_captions(tmp_path / "metadata.jsonl", "captions", preprocess["clip"])
    contents = [samples.content(index) for index in range(3)]
    assert contents[0] == contents[1] != contents[2]


@pytest.mark.parametrize(
    ("name", "lines", "options", "reason"),
    [
        (
            "pictures",
            "cat\ndog",
            {},
            r"class names blue, green, grey, red, none of which is in names\.txt \(cat, dog\)",
        ),
        ("pictures", "cat\nred", {}, r"has 3 class names that the model does not have \(blue, green, grey\)"),
        ("pictures", "red", {}, r"names\.txt has 1 class names; expected at least 2"),
        ("pictures", "red\nblue\nred", {}, r"names\.txt has the class name 'red' twice"),
        ("pictures", "red\t\tblue", {}, r"has the line 'red\\t\\tblue'; expected NAME, or FOLDER, a tab and NAME"),
        (
            "flat",
            "xylophone\nzeppelin",
            {"template": "{}"},
            r"100% of the tokens of the class names are unknown to the",
        ),
        ("captions", "red\nblue", {}, r"captions has a text for each image, so --class-names would have no effect"),
        ("captions", None, {"template": "the {}"}, r"so --prompt-template would have no effect"),
        ("pictures", "gone", {"names_file": "gone.txt"}, r"gone\.txt cannot be read \(No such file or directory\)"),
    ],
)
def test_names_that_do_not_fit_are_refused(name, lines, options, reason, shared, preprocess, tmp_path):
    if lines is not None:
        (tmp_path / "names.txt").write_text(lines)
        options = {"names_file": tmp_path / "names.txt"} | options
    with pytest.raises(DataError, match=reason):
        load(shared, name, preprocess["clip"], **options)


def test_an_input_with_fewer_rows_begins_again():
    feeds = {"pixel_values": np.arange(4), "input_ids": np.arange(3)}
    taken = take_rows(feeds, range(2, 7))
    assert {name: value.tolist() for name, value in taken.items()} == {
        "pixel_values": [2, 3, 0, 1, 2], "input_ids": [2, 0, 1, 2, 0],
    }  # fmt: skip


def test_many_classes_have_large_batches_of_images(shared, preprocess, tmp_path):
    """Each batch computes all prompts, so there are as many images as classes in it."""
    (tmp_path / "names.txt").write_text("\n".join(f"cat {'the ' * count}dog" for count in range(40)))
    data = load(shared, "flat", preprocess["clip"], names_file=tmp_path / "names.txt")
    assert data.test.samples.at_once == 40
    split = load(shared, "pictures", preprocess["clip"]).test
    assert [len(batch.ids) for batch in split.bounded_batches(3)] == [4]  # of four classes


def of_folders(shared, preprocess, names):
    folder = shared / "-".join(names)
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for seed in range(2):
            picture(tuple(COLOURS)[number], seed).save(folder / name / f"{seed}.png")
    # The tokenizer of the tests knows few words.
    return load(shared, folder.name, replace(preprocess["clip"], unknown=None))


def test_synsets_are_read_as_their_words_which_is_said(shared, preprocess):
    """n02012849 and n03126707 are both cranes first of all."""
    data = of_folders(shared, preprocess, ["n01440764", "n02012849", "n03126707"])
    named = {names[-1]: names[0] for names in data.prompts.names.names}
    assert named["n01440764"] == "tench"
    assert named["n02012849"] != named["n03126707"]
    assert named["n02012849"].startswith("crane: large long-necked wading bird")
    (said,) = [str(each) for each in data.limitations if each.feature == "class names"]
    assert "n01440764 is read as 'tench'" in said


def test_numbers_as_class_names_are_said(shared, preprocess):
    data = of_folders(shared, preprocess, ["0", "1"])
    (said,) = [str(each) for each in data.limitations if each.feature == "class names"]
    assert "a prompt is 'a photo of a 0.'" in said


def test_a_synset_that_is_none_is_refused(shared, preprocess):
    with pytest.raises(DataError, match=r"the folder n99999999, which is no synset of ImageNet; give names by"):
        of_folders(shared, preprocess, ["n01440764", "n99999999"])


def test_all_classes_of_imagenet_have_a_name_of_their_own():
    from timm.data import ImageNetInfo

    names = _words_of_synsets(ImageNetInfo("imagenet-1k").label_names(), "pictures")
    assert len({first for first, _ in names}) == 1000
