"""Encoder-decoders: how they are called, their sites and caches, the inputs of their decoder, and what is refused."""

import csv
import functools

import numpy as np
import pytest
import torch
import transformers

from compressor import export, inspect, models
from compressor.data import splits
from compressor.errors import CompressorError, SettingsError
from compressor.internals.transformers import quiet
from compressor.lower.trace import trace
from compressor.models import ModelError
from compressor.models.encoder_decoder.caches import detect_caches
from compressor.models.text.kv_cache import NoCacheError
from compressor.quality.evaluate import evaluate, graph_runner
from compressor.quality.heads.registry import head_for
from passes.analysis.redundancy import Score, output_mask
from passes.base import apply
from passes.execute.interpreter import run
from passes.graph.cache_state import bytes_per_token
from passes.graph.sites import find_sites
from passes.plan.selection import choose, parse
from passes.rewrite.drop import Drop
from tests.encoder_decoders import BINS, DROPPED, build, generated, saved, sentences, source

TASK = "text2text-generation"
CLOSE = 1e-5  # relative; sums in another order


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("encoder_decoders")


@functools.cache
def loaded(kind, folder):
    return models.load(str(saved(kind, folder)))


@functools.cache
def traced(kind, folder):
    return trace(loaded(kind, folder))


def test_sites_of_both_towers_are_told_apart(shared):
    sites = find_sites(traced("bart", shared))
    layer = ["attention", "mlp"] * 2 + ["attention", "cross_attention", "mlp"] * 2
    assert [site.kind for site in sites] == layer
    assert [site.name for site in sites if site.kind == "cross_attention"] == [
        f"model.decoder.layers.{number}.encoder_attn" for number in range(2)
    ]
    assert len({site.block for site in sites}) == 4
    plan = choose(parse("cross_attention:1"), sites, "reverse", model="bart")
    assert list(plan.changes) == ["model.decoder.layers.1.encoder_attn"]
    own = [site.name for site in sites if site.kind == "attention"]
    assert list(choose(parse("attention:4"), sites, "reverse", model="bart").changes) == own[::-1]


def test_a_dropped_attention_takes_its_cache_with_it(shared):
    graph = traced("bart", shared).fork()
    before = bytes_per_token(graph)
    apply(Drop(DROPPED["bart"]), graph)
    # The remaining self-attention of layer 1 and cross-attention of layer 0 are both called layer 0.
    assert [name for name in graph.inputs if name.startswith("past")] == [
        "past_key_values.0.decoder.key", "past_key_values.0.decoder.value",
    ]  # fmt: skip
    assert list(graph.outputs[2:]) == [f"present.0.{part}.{name}" for part in ("decoder", "encoder") for name in KV]
    assert bytes_per_token(graph) == before // 2


KV = ("key", "value")


def test_the_mask_of_the_source_is_not_that_of_the_target(shared):
    """With as many tokens in the target as in the source, padding of the source must not hide tokens of the target."""
    model, graph = loaded("bart", shared), traced("bart", shared)
    feeds = model.example | {"decoder_input_ids": model.example["input_ids"]}
    rows, tokens = feeds["attention_mask"].shape
    scores = apply(Score(), graph, [feeds])
    counted = {site.name: scores.sites[site.name].tokens for site in find_sites(graph)}
    expected = {True: int(feeds["attention_mask"].sum()), False: rows * tokens}
    assert counted == {name: expected[".encoder." in name] for name in counted}
    assert output_mask(feeds) is None
    assert output_mask({"attention_mask": feeds["attention_mask"]}) is feeds["attention_mask"]


@pytest.mark.slow
@pytest.mark.parametrize("heal", ["closed-form", "distill"])
def test_effects_on_the_output_and_healing(heal, shared, tmp_path):
    (tmp_path / "sources.txt").write_text("\n".join(sentences(16)))
    report = export(
        str(saved("bart", shared)), data=str(tmp_path / "sources.txt"), drop="cross_attention:1", metric="output",
        heal=heal, heal_budget=2.0, output=str(tmp_path / "out"), rounds=1,
    ).to_dict()  # fmt: skip
    assert report["healed"]["method"] == heal
    assert report["healed"]["after"]["divergence"] <= report["healed"]["before"]["divergence"]


@pytest.mark.parametrize("kind", ["bart", "fsmt"])  # FSMT masks later tokens only without a cache
def test_several_target_tokens_are_predicted_as_transformers_predicts_them_without_a_cache(kind, shared):
    model = loaded(kind, shared)
    feeds = dict(model.example)
    past = torch.randint(3, 48, (2, 5), generator=torch.Generator().manual_seed(2))
    values = {name: feeds[name] for name in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        expected = build(kind)(
            **values, decoder_input_ids=torch.cat([past, feeds["decoder_input_ids"]], 1), use_cache=False
        ).logits
        empty = {name: value[:, :, :0] for name, value in feeds.items() if name.startswith("past")}
        first = run(traced(kind, shared), feeds | {"decoder_input_ids": past} | empty)
        presents = dict(zip(model.outputs, first, strict=True))
        caches = {given: presents[name] for name, given in model.state.items() if given in feeds}
        found = run(traced(kind, shared), feeds | caches)[0]
    torch.testing.assert_close(first[0], expected[:, :5], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found, expected[:, 5:], atol=1e-4, rtol=1e-4)


def test_a_decoder_that_reads_later_tokens_is_refused(tmp_path):
    """A mask of later tokens that a decoder ignores with a cache cannot be given to it."""
    module = build("bart")
    decoder = module.get_decoder()
    forward = decoder.forward

    def ahead(**kwargs):
        output = forward(**kwargs)
        output.last_hidden_state = output.last_hidden_state + output.last_hidden_state.mean(1, keepdim=True)
        return output

    decoder.forward = ahead
    with pytest.raises(NoCacheError, match="its decoder reads the tokens behind the one that it predicts"):
        detect_caches(module, {name: torch.from_numpy(value) for name, value in source("bart", 4).items()}, {})


def test_a_study_is_refused(shared):
    with pytest.raises(SettingsError, match="found --study, which compares the tokens of one sequence, but bart is an"):
        inspect(str(saved("bart", shared)), data="random", study=True)


def test_positions_keep_one_cache_if_every_self_attention_is_dropped(shared):
    """The learned positions of BART's decoder begin at the length of the cache."""
    graph = traced("bart", shared).fork()
    names = tuple(f"model.decoder.layers.{number}.self_attn" for number in range(2))
    apply(Drop(names), graph)
    assert [name for name in graph.inputs if name.startswith("past")] == ["past_key_values.0.decoder.key"]
    example = dict(loaded("bart", shared).example)
    longer = example | {name: value[:, :, :3] for name, value in example.items() if name.startswith("past")}
    first, second = (run(graph, {name: feeds[name] for name in graph.inputs})[0] for feeds in (example, longer))
    assert not torch.allclose(first, second)  # the same tokens, at other positions


def test_without_targets_the_decoder_reads_what_the_original_generates(shared, tmp_path):
    model = loaded("bart", shared)
    (tmp_path / "sources.txt").write_text("\n".join(sentences(8)))
    data = splits.load(str(tmp_path / "sources.txt"), model.preprocess, task=TASK)
    (batch,) = data.test.batches(8)
    assert data.label_kind is None
    assert batch.labels is None
    (limitation,) = [each for each in data.limitations if each.feature == "targets of the data"]
    assert "it has none, so the decoder reads up to 32 tokens that the original generates greedily" in str(limitation)
    for row, tokens in enumerate(batch.feeds["decoder_input_ids"]):
        length = int(batch.feeds["attention_mask"][row].sum())
        feeds = {name: batch.feeds[name][row : row + 1, :length] for name in ("input_ids", "attention_mask")}
        expected = generated(model.module, feeds, 32)[0]
        scored = int(batch.scored[row].sum())
        assert scored > 0
        assert tokens[:scored].tolist() == expected[:scored].tolist()
        ended = np.flatnonzero(expected[1:] == 2)
        assert scored == (ended[0] + 1 if len(ended) else 32)


def test_perplexity_of_targets_is_that_of_transformers(shared, tmp_path):
    model, graph, tokenizer = loaded("bart", shared), traced("bart", shared), loaded("bart", shared).tokenizer
    pairs = list(zip(sentences(12), sentences(12, seed=1), strict=True))
    with (tmp_path / "pairs.csv").open("w") as file:
        csv.writer(file).writerows([("source", "target"), *pairs])
    data = splits.load(str(tmp_path / "pairs.csv"), model.preprocess, task=TASK)
    assert data.label_kind == "tokens"
    runner = graph_runner(model, lambda feeds: run(graph, {name: feeds[name] for name in graph.inputs}))
    found = evaluate(data.test, {"m": runner}, head=head_for(TASK), metric="perplexity", reference="m").value("m")
    total = count = 0.0
    for index in map(int, data.test.ids):
        inputs = tokenizer(pairs[index][0], return_tensors="pt", return_token_type_ids=False)
        labels = tokenizer(text_target=pairs[index][1], return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            total += float(model.module(**inputs, labels=labels).loss) * labels.shape[1]
        count += labels.shape[1]
    assert found == pytest.approx(np.exp(total / count), rel=CLOSE)


@pytest.mark.parametrize(
    ("header", "columns", "reading"),
    [
        (("article", "summary"), "st", "source 'article', target 'summary'"),
        (("target", "source"), "ts", "source 'source', target 'target'"),
        (("text",), "s", "source 'text'"),
        (None, "st", "source 0, target 1"),
    ],
)
def test_columns_of_sources_and_targets(header, columns, reading, shared, tmp_path):
    texts = {"s": sentences(6), "t": sentences(6, seed=1)}
    rows = list(zip(*(texts[each] for each in columns), strict=True))
    with (tmp_path / "table.csv").open("w") as file:
        csv.writer(file).writerows([*([header] if header else []), *rows])
    data = splits.load(str(tmp_path / "table.csv"), loaded("bart", shared).preprocess, task=TASK)
    assert data.reading.endswith(f"header: {reading}")
    assert data.label_kind == ("tokens" if "t" in columns else None)


def test_ambiguous_columns_are_refused(shared, tmp_path):
    with (tmp_path / "table.csv").open("w") as file:
        csv.writer(file).writerows(zip(sentences(6), sentences(6, seed=1), sentences(6, seed=2), strict=True))
    with pytest.raises(CompressorError, match="3 columns that look like texts; expected one, or two, a source and its"):
        splits.load(str(tmp_path / "table.csv"), loaded("bart", shared).preprocess, task=TASK)


def test_random_spectrograms(shared):
    model = loaded("whisper", shared)
    assert model.task == "automatic-speech-recognition"
    data = splits.load("random", model.preprocess, task=model.task)
    batch = next(data.test.batches(2))
    assert batch.feeds["input_features"].shape == (2, *source("whisper", 0)["input_features"].shape[1:])
    assert head_for(model.task).scored(batch).shape == batch.feeds["decoder_input_ids"].shape


def test_features_without_targets(shared, tmp_path):
    model = loaded("whisper", shared)
    features = np.random.default_rng(0).standard_normal((6, *model.example["input_features"].shape[1:]))
    np.save(tmp_path / "features.npy", features.astype(np.float32))
    data = splits.load(str(tmp_path / "features.npy"), model.preprocess, task=model.task)
    batch = next(data.test.batches(1))
    expected = generated(model.module, {"input_features": batch.feeds["input_features"]}, 32)
    tokens = int(batch.scored.sum())
    assert batch.feeds["decoder_input_ids"].tolist() == expected[:, :tokens].tolist()


def test_no_cache_is_refused(shared):
    with pytest.raises(ModelError, match=r"--no-cache is for causal language models; .*bart is an encoder-decoder"):
        models.load(str(saved("bart", shared)), cache=False)


def test_images_of_any_size_are_refused(shared):
    with pytest.raises(ModelError, match=r"--image-size dynamic is for models of images alone; .*pictures also writes"):
        models.load(str(saved("pictures", shared)), image_size="dynamic")


def test_an_encoder_decoder_without_a_cache_is_refused(tmp_path):
    with quiet():
        config = transformers.ProphetNetConfig(
            vocab_size=30, hidden_size=16, encoder_ffn_dim=16, decoder_ffn_dim=16, num_encoder_layers=1,
            num_decoder_layers=1, num_encoder_attention_heads=2, num_decoder_attention_heads=2,
            max_position_embeddings=32,
        )  # fmt: skip
        config.decoder_start_token_id = 0
        transformers.ProphetNetForConditionalGeneration(config).save_pretrained(tmp_path / "m")
    with pytest.raises(ModelError, match="told apart by their caches: it returns a cache but does not accept one"):
        models.load(str(tmp_path / "m"))


def test_no_start_token_is_refused(tmp_path):
    module = build("t5")
    module.config.decoder_start_token_id = None
    with quiet():
        module.save_pretrained(tmp_path / "m")
    with pytest.raises(
        ModelError, match=r"does not say with which token its decoder starts .*set decoder_start_token_id"
    ):
        models.load(str(tmp_path / "m"))


MIXTURE = {
    "vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2,
    "num_experts": 2, "decoder_start_token_id": 0,
}  # fmt: skip
T5 = {name: value for name, value in MIXTURE.items() if name != "num_experts"}


@pytest.mark.parametrize(
    ("kind", "fields", "told"), [("SwitchTransformers", MIXTURE, False), ("T5", T5, True), ("MT5", T5, True)]
)
def test_a_module_whose_encoder_refuses_the_argument_is_not_told_to_return_a_cache(kind, fields, told, tmp_path):
    """Switch Transformers hands all arguments on to its encoder, which refuses to make a cache."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**fields)
    getattr(transformers, f"{kind}ForConditionalGeneration")(config).save_pretrained(tmp_path)
    model = models.load(tmp_path)
    assert model.call.__self__.told == told
    feeds = {
        name: torch.from_numpy(value) for name, value in model.preprocess.complete(model.preprocess.example).items()
    }
    found = dict(zip(model.outputs, run(trace(model), feeds), strict=True))["logits"]
    own = {name: feeds[name] for name in ("input_ids", "attention_mask", "decoder_input_ids")}
    with torch.inference_mode():
        expected = model.module(**own).logits
    assert (found - expected).abs().max() <= CLOSE * expected.abs().max()


def test_the_mask_of_an_encoder_of_sound_is_its_own(tmp_path):
    """A condition on sizes was evaluated with a mask as long as the cache, which failed without token ids."""
    folder = saved("speech", tmp_path)
    extractor = transformers.Speech2TextFeatureExtractor(feature_size=BINS, num_mel_bins=BINS)
    extractor.save_pretrained(folder)
    model = models.load(str(folder))
    assert model.inputs[:2] == ("input_features", "attention_mask")
    trace(model)


def test_features_that_an_encoder_takes_as_its_states_have_their_width(tmp_path):
    """The main input of Pop2Piano is tokens by its class, which then has none for its encoder of features of sound."""
    fields = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    fields |= {"num_decoder_layers": 1, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(0)
    transformers.Pop2PianoForConditionalGeneration(transformers.Pop2PianoConfig(**fields)).save_pretrained(tmp_path)
    model = models.load(tmp_path)
    assert model.inputs[:2] == ("input_features", "decoder_input_ids")
    assert model.example["input_features"].shape == (2, 128, 16)
    frames, ids = torch.randn(3, 21, 16), torch.randint(0, 40, (3, 5))
    feeds = model.preprocess.complete({"input_features": frames.numpy(), "decoder_input_ids": ids.numpy()})
    with torch.inference_mode():
        expected = model.module(input_features=frames, decoder_input_ids=ids).logits
        found, *_ = run(trace(model), {name: torch.from_numpy(value) for name, value in feeds.items()})
    torch.testing.assert_close(found, expected, rtol=0, atol=CLOSE * expected.abs().max().item())
