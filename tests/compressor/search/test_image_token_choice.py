"""`--image-tokens auto`: its losses, the schedule that is taken, the export with it, and what is refused."""

import math
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
import transformers

import compressor
from compressor.errors import CompressorError
from compressor.internals.transformers import quiet
from compressor.lower.traced_model import load, without_image_tokens
from compressor.quality.validation_loss import ValidationLoss
from compressor.search import image_token_choice
from compressor.search.decision import share_of
from compressor.search.image_token_choice import PART, SHARES, choose_image_tokens
from compressor.search.planner import apply_fixed_plan, make_rewriter
from compressor.settings import Settings
from compressor.workspace.progress import Steps
from passes.base import PassError
from tests.encoder_decoders import sentences
from tests.image_tokens import Pyramid
from tests.vision_language_models import IMAGE, TOKEN, picture, saved, write_captions

QUIET, COUNT = Steps(None), 16
EXPORTED = {"drop": "none", "rounds": 1, "generate": "12:4"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The folder of a small LLaVA of two blocks, whose only stage is before the second, and images with texts."""
    folder = tmp_path_factory.mktemp("choice")
    images, texts = [picture(number) for number in range(COUNT)], [f"{IMAGE} {text}" for text in sentences(COUNT)]
    return saved("llava", folder), write_captions(folder / "captions", images, texts)


@pytest.fixture(scope="module")
def settings(files):
    model, data = files
    return Settings(model=model, data=data, drop="none", image_tokens="auto", max_loss=1000.0)


@pytest.fixture(scope="module")
def subject(settings):
    return load(settings, QUIET, decision=share_of(settings))


@pytest.fixture(scope="module")
def losses(settings, subject):
    """The losses of each schedule alone, judged without a limit that would end a pass early."""
    with pytest.MonkeyPatch.context() as patch:
        found = {}
        for share in SHARES:
            patch.setattr(image_token_choice, "SHARES", (share,))
            found[share] = choose_image_tokens(subject, replace(settings, max_loss=1e9), QUIET).tried[0]
    return found


def perplexity(module, split, stages):
    """Return the perplexity of the tokens behind the image, by PyramidDrop as a loop over the layers."""
    surprises = []
    for batch in split.batches(1):
        ids, pixels = (torch.from_numpy(batch.feeds[name]) for name in ("input_ids", "pixel_values"))
        image = (ids == TOKEN).long()
        features = module.get_image_features(pixels, return_dict=True).pooler_output
        embeds = module.get_input_embeddings()(ids).masked_scatter(image[..., None].bool(), torch.cat(list(features)))
        loop = Pyramid(module, stages)
        logits = loop(embeds, image, torch.ones_like(ids))[0].log_softmax(-1)
        remaining = loop.cached[-1][0]
        for place in range(int(image.sum()) - 1, ids.shape[1] - 1):
            before = int((remaining <= place).sum()) - 1  # the last token that remains up to this one
            surprises.append(-logits[before, ids[0, place + 1]].item())
    return math.exp(np.mean(surprises))


def test_losses_are_those_of_a_loop_over_the_layers(files, subject, losses):
    with quiet():
        module = transformers.AutoModelForImageTextToText.from_pretrained(files[0]).eval()
    for share in (0.5, 0.8):  # two and three of the four tokens of an image
        with torch.no_grad():
            before = perplexity(module, subject.data.validation, ())
            after = perplexity(module, subject.data.validation, ((1, share),))
        assert losses[share].validation == pytest.approx((after / before - 1) * 100, abs=1e-2)


def test_the_strongest_schedule_within_the_limit_on_both_splits_is_taken(settings, subject, losses):
    values = sorted({loss for each in losses.values() for loss in (each.validation, each.fresh) if loss >= 0.0})
    limits = [0.0, *(value + 1e-6 for value in values[::2])]
    taken = set()
    for limit in limits:
        held = (each.stages for each in losses.values() if max(each.validation, each.fresh) <= limit)
        expected = next(held, "none")
        found = choose_image_tokens(subject, replace(settings, max_loss=limit), QUIET)
        assert found.stages == expected
        assert found.spent <= limit
        taken.add(expected)
    assert len(taken) > 2


def test_a_plan_without_a_search_counts(settings, subject, losses):
    """The losses are those of the graph with both, against the original."""
    dropping = replace(settings, drop="model.vision_tower.encoder.layers.0.mlp", max_loss=1e9)
    found = choose_image_tokens(subject, dropping, QUIET)
    graph = apply_fixed_plan(subject, dropping, QUIET).reduced()
    both = without_image_tokens(graph, subject.model, replace(settings, image_tokens=found.stages))
    model = replace(subject.model, outputs=both.outputs)
    validation = ValidationLoss(subject.graph, model, subject.data.validation, subject.metric)
    assert found.tried[0].validation == pytest.approx(validation.loss(both).percent)
    assert found.tried[0].validation != pytest.approx(losses[SHARES[0]].validation, rel=1e-3)
    assert "(loss with the changes of the plan " in found.sentence()
    (said,) = found.limitations(replace(dropping, precision="int8"))
    assert "what int8 loses is not part of --max-loss" in said.reason
    assert found.plan is not None
    assert not tuple(found.limitations(dropping))


@pytest.mark.parametrize("stages", ["auto", "50%@1"])
def test_attentions_around_the_stages_stay(settings, subject, stages):
    """Of two blocks both, so that only branches of the vision tower and the MLPs are left for a plan."""
    given = replace(settings, image_tokens=stages, drop="50%", metric="reverse")
    graph = apply_fixed_plan(subject, given, QUIET).reduced()
    assert without_image_tokens(graph, subject.model, replace(given, image_tokens="50%@1")).outputs
    whole = apply_fixed_plan(subject, replace(given, image_tokens="none"), QUIET).reduced()
    with pytest.raises(PassError, match="no attention with a KV cache"):
        without_image_tokens(whole, subject.model, replace(given, image_tokens="50%@1"))
    kept = make_rewriter(subject, replace(given, drop="auto")).fixed
    assert [site.kind for site in subject.sites if site.name in kept] == ["attention", "attention"]
    assert not make_rewriter(subject, replace(given, drop="auto", image_tokens="none")).fixed


def test_agreement_bounds_the_loss(settings, subject):
    found = choose_image_tokens(subject, replace(settings, budget="agreement", max_loss=100.0), QUIET)
    assert found.stages == f"{100 * SHARES[0]:g}%@1"
    assert 0.0 < found.tried[0].validation <= 100.0


def test_a_search_has_half_of_the_limit_left(settings, subject):
    found = choose_image_tokens(subject, replace(settings, drop="auto"), QUIET)
    assert found.limit == PART * settings.max_loss
    assert found.spent == found.tried[-1].fresh > 0.0


def files_of(folder):
    """Return what the ONNX files of a folder compute: operators and weights, without the names of their sizes."""
    graphs = {path.name: onnx.load(path).graph for path in folder.glob("*.onnx")}
    return {
        name: (
            [(node.op_type, list(node.output)) for node in graph.node],
            {weight.name: onnx.numpy_helper.to_array(weight).tobytes() for weight in graph.initializer},
        )
        for name, graph in graphs.items()
    }


def test_an_export_is_that_of_the_chosen_stages(files, tmp_path):
    model, data = map(str, files)
    report = compressor.export(
        model, data=data, image_tokens="auto", max_loss=1000.0, output=str(tmp_path / "auto"), **EXPORTED
    ).to_dict()
    chosen = report["settings"]["image_tokens"]
    assert chosen == f"{100 * SHARES[0]:g}%@1"
    assert [each["stages"] for each in report["image_tokens"]["tried"]] == [chosen]
    assert any(note.startswith(f"Image tokens: {chosen} was chosen among 8 schedules") for note in report["notes"])
    compressor.export(model, data=data, image_tokens=chosen, output=str(tmp_path / "given"), **EXPORTED)
    assert files_of(tmp_path / "auto") == files_of(tmp_path / "given")


def test_an_export_without_a_schedule_within_the_limit_keeps_all(files, tmp_path):
    model, data = map(str, files)
    report = compressor.export(
        model, data=data, image_tokens="auto", max_loss=0.0, output=str(tmp_path / "auto"), **EXPORTED
    ).to_dict()
    assert report["settings"]["image_tokens"] == "none"
    assert report.get("image_tokens") is None
    (said,) = (note for note in report["notes"] if note.startswith("Image tokens: all are kept"))
    assert "because each of 8 schedules loses more than the limit of 0 %: 20%@1 at least " in said
    assert said.count("%@1 at least ") == len(SHARES)
    plain = compressor.export(model, data=data, output=str(tmp_path / "none"), **EXPORTED).to_dict()
    assert report["limitations"] == plain["limitations"]
    assert any(each["feature"] == "quality of the original" for each in plain["limitations"])
    assert files_of(tmp_path / "auto") == files_of(tmp_path / "none")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "random", "samples": 8}, "chooses by the loss, but no quality can be measured: the data is random"),
        ({"samples": 3}, "too few for both; give at least 4 samples, or give the stages"),
        ({"drop": "auto", "speedup": 1.1}, "without a limit of the loss, which --speedup and --latency lift"),
        ({"image_tokens": "random:auto"}, "expected the share of image tokens that is kept"),
        ({"image_tokens": "none", "max_loss": 3.0}, "which only a search uses, with --drop none"),
    ],
    ids=["random data", "few samples", "no limit", "method", "unused limit"],
)
def test_what_cannot_be_chosen_is_refused(files, tmp_path, options, message):
    model, data = map(str, files)
    given = EXPORTED | {"data": data, "image_tokens": "auto", "output": str(tmp_path / "out")} | options
    with pytest.raises(CompressorError, match=message):
        compressor.export(model, **given)
    assert not (tmp_path / "out").exists()


def test_a_model_without_images_and_texts_is_refused(tmp_path):
    with pytest.raises(CompressorError, match=r"--image-tokens auto drops image tokens .* does image-classification"):
        compressor.export(image_tokens="auto", output=str(tmp_path / "out"))
