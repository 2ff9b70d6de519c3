"""The calls of the generation of a vision-language model: the image, the prompt, and a further token."""

import pytest

from compressor import models
from compressor.data import splits
from compressor.lower.trace import trace
from compressor.lower.traced_model import ModelAndData
from compressor.measure.workload import IMAGE, PROMPT, TOKEN, generation_lengths, workload_calls
from compressor.settings import Settings
from passes.analysis.symbolic_cost import Counter
from tests.vision_language_models import TOKEN as PLACEHOLDER
from tests.vision_language_models import saved


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    model = models.load(str(saved("llava", tmp_path_factory.mktemp("vision_language"))))
    return ModelAndData(model, splits.load("random", model.preprocess, task=model.task))


def settings(**options):
    return Settings(model="m", data="random", drop="none", **options)


def test_each_part_is_a_call_and_its_work_is_counted_once(subject):
    calls = workload_calls(subject, settings(generate="20:6", batch=2))
    assert {name: call.times for name, call in calls.items()} == {IMAGE: 1, PROMPT: 1, TOKEN: 6}
    assert set(calls[IMAGE].inputs) == {"pixel_values"}
    ids = calls[PROMPT].inputs["input_ids"]
    assert ids.shape == (2, 20)
    assert ((ids == PLACEHOLDER).sum(1) == 4).all()
    assert calls[TOKEN].inputs["input_ids"].shape == (2, 1)
    assert calls[TOKEN].inputs["attention_mask"].shape == (2, 24)
    graph = trace(subject.model)
    work = {
        name: Counter(graph, call.shapes, call.given, call.left_out).count(graph).products
        for name, call in calls.items()
    }
    whole = Counter(graph, calls[PROMPT].shapes).count(graph).products
    assert work[IMAGE] + work[PROMPT] == whole
    per_token = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48) + 32 * 48  # two layers, and the head
    assert work[TOKEN] == 2 * per_token
    assert work[PROMPT] == 20 * work[TOKEN]


def test_the_prompt_holds_the_image(subject):
    assert generation_lengths(settings(), subject.model).images == 4
    lengths = generation_lengths(settings(), subject.model)
    assert (lengths.prompt, lengths.new) == (4 + 46, 46)  # half of the 96 positions that the image leaves
