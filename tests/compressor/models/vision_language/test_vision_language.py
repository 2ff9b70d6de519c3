"""Vision-language models: their one graph, its sites and cache, and what is refused."""

import functools

import pytest
import torch
import transformers

from compressor import inspect, models
from compressor.choices import VISION_LANGUAGE
from compressor.errors import SettingsError
from compressor.internals.transformers import quiet
from compressor.lower.trace import trace
from compressor.models import ModelError
from compressor.models.vision_language.call import embedded, merge
from compressor.models.vision_language.image_features import image_features
from compressor.models.vision_language.parts import parts_of
from passes.base import apply
from passes.execute.interpreter import run
from passes.graph.cache_state import bytes_per_token
from passes.graph.sites import find_sites
from passes.rewrite.drop import Drop
from tests import varying_images
from tests.vision_language_models import DROPPED, KINDS, TILED, TOKEN, build, build_from, config, saved

CLOSE = 1e-5  # relative; sums in another order
OTHERS = tuple(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[2:])


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("vision_language")


@functools.cache
def loaded(kind, folder):
    return models.load(str(saved(kind, folder)))


@functools.cache
def traced(kind, folder):
    return trace(loaded(kind, folder))


@pytest.mark.parametrize("kind", KINDS)
def test_the_task_and_the_inputs(kind, shared):
    model = loaded(kind, shared)
    images = model.inputs[: model.inputs.index("input_ids")]
    assert model.task == VISION_LANGUAGE
    others = ("pixel_attention_mask",) if kind in TILED else ()
    others += ("qformer_input_ids", "qformer_attention_mask") if kind == "instructblip" else ()
    assert images == ("pixel_values", *others)
    assert model.preprocess.image_token == TOKEN
    assert model.preprocess.bidirectional == (kind == "paligemma")


def test_sites_of_both_parts_have_names_that_tell_them_apart(shared):
    sites = find_sites(traced("llava", shared))
    parts = [site.name.split(".")[1] for site in sites]
    assert parts == ["vision_tower"] * 4 + ["language_model"] * 4  # the last layer of the tower is not read
    assert [site.kind for site in sites] == ["attention", "mlp"] * 4
    assert sites[4].trunk == traced("llava", shared).module.graph.output_node().args[0][-1].name


@pytest.mark.parametrize("kind", ["llava", "idefics3", *OTHERS])
def test_the_graph_computes_what_the_module_does_at_another_length_and_batch(kind, shared):
    model, graph = loaded(kind, shared), traced(kind, shared)
    longer = {}
    for name, array in model.preprocess.example.items():
        value = torch.from_numpy(array)
        more = value[:1] if value.ndim > 2 else torch.cat([value[:1], value[:1, -3:]], 1)
        longer[name] = torch.cat([more] * 3)
    module, types = build(kind), {}
    if kind in ("paligemma", "gemma3"):
        types = {"token_type_ids": (longer["input_ids"] == TOKEN).long() * (kind == "gemma3")}
    feeds = model.preprocess.complete({name: value.numpy() for name, value in longer.items()})
    with torch.inference_mode():
        expected = module(**longer, **types).logits
    found = run(graph, {name: torch.from_numpy(feeds[name]) for name in graph.inputs})[0]
    assert (found - expected).abs().max() <= CLOSE * expected.abs().max()


def test_a_dropped_attention_of_the_language_model_takes_its_cache_with_it(shared):
    graph = traced("llava", shared).fork()
    before = bytes_per_token(graph)
    apply(Drop(DROPPED["llava"]), graph)
    assert [name for name in graph.inputs if name.startswith("past")] == [
        "past_key_values.0.key", "past_key_values.0.value",
    ]  # fmt: skip
    assert bytes_per_token(graph) == before // 2


def test_without_any_attention_of_the_language_model_there_is_no_cache(shared):
    """The vision tower reads the number of rows, which is that of the cache too, from another input."""
    model, graph = loaded("llava", shared), traced("llava", shared).fork()
    apply(Drop(tuple(f"model.language_model.layers.{number}.self_attn" for number in range(2))), graph)
    assert not [name for name in graph.inputs if name.startswith("past")]
    outputs = run(graph, {name: value[:1] for name, value in model.example.items() if name in graph.inputs})
    assert outputs[0].shape[:2] == (1, model.example["input_ids"].shape[1])


def test_tiles_of_padding_change_nothing(shared):
    module = build("idefics3")
    pixels, mask = torch.randn(1, 2, 3, 8, 8), torch.ones(1, 2, 8, 8, dtype=torch.bool)
    padded = torch.cat([pixels, torch.zeros(1, 1, 3, 8, 8)], 1), torch.cat([mask, torch.zeros(1, 1, 8, 8) > 0], 1)
    with torch.inference_mode():
        short, long = image_features(module, pixels, mask), image_features(module, *padded)
        own = torch.stack(module.get_image_features(*padded).pooler_output)
    assert torch.allclose(long[:, : short.shape[1]], short, rtol=CLOSE, atol=CLOSE)
    assert torch.allclose(own, short, rtol=CLOSE, atol=CLOSE)
    assert torch.isfinite(long).all()


def test_features_are_placed_as_transformers_does():
    ids = torch.tensor([[0, TOKEN, 0, TOKEN], [TOKEN, TOKEN, 0, 0]])
    features, text = torch.randn(2, 2, 5), torch.randn(2, 4, 5)
    is_image = ids == TOKEN
    assert torch.equal(merge(features, text, is_image), text.masked_scatter(is_image[..., None], features))


@pytest.mark.parametrize(("kind", "own"), [("gemma4_vision", True), ("qwen2_vl", False)])
def test_classes_that_look_placeholders_up_as_padding_embed_a_text_themselves(kind, own):
    """A generated text may hold the placeholder of a video, which Gemma 4 looks up as padding."""
    module = varying_images.build(kind)
    assert parts_of(module, "m").call.embeds_itself == own
    found, *_ = embedded(module, torch.tensor([[5, varying_images.TOKEN]]))
    padding = module.config.get_text_config().pad_token_id
    wanted = torch.tensor([[5, padding if own else varying_images.TOKEN]])
    assert torch.equal(found, module.get_input_embeddings()(wanted))


def clips(**fields):
    """InstructBLIP for videos, whose queries read each of four frames."""
    queries = config("instructblip")
    own = {"vision_config": queries.vision_config.to_dict(), "qformer_config": queries.qformer_config.to_dict()}
    own |= {"text_config": queries.text_config.to_dict(), "num_query_tokens": 4, "video_token_index": TOKEN}
    return build_from(transformers.InstructBlipVideoConfig(**own | fields))


def test_a_model_that_sees_clips_computes_what_its_class_does(tmp_path):
    module = clips()
    with quiet():
        module.save_pretrained(tmp_path / "m")
    model = models.load(str(tmp_path / "m"))
    assert model.inputs[:3] == ("pixel_values", "qformer_input_ids", "qformer_attention_mask")
    assert model.example["pixel_values"].shape[:2] == (2, 4)
    assert [str(each) for each in model.limitations if each.feature == "data"] == [
        "data: the model sees images in clips of 4 frames, of which no data are read but random ones."
    ]
    given = {name: torch.from_numpy(value)[[1, 0, 1]] for name, value in model.preprocess.example.items()}
    feeds = model.preprocess.complete({name: value.numpy() for name, value in given.items()})
    with torch.inference_mode():
        expected = module(**given).logits
    found = run(trace(model), {name: torch.from_numpy(feeds[name]) for name in model.inputs})[0]
    kept = given["attention_mask"].bool()
    assert (given["input_ids"] == TOKEN).sum(1).tolist() == [16] * 3
    assert (found - expected)[kept].abs().max() <= CLOSE * expected[kept].abs().max()


def test_the_refusal_names_a_language_model_that_can_be_loaded_alone(monkeypatch, tmp_path):
    module = build("blip_2")
    monkeypatch.setattr(type(module), "get_image_features", lambda self, pixel_values, **kwargs: {})
    with pytest.raises(ModelError, match=r"returns no pooler_output\); .*, or save its language_model alone"):
        parts_of(module, "m")
    with quiet():
        module.language_model.save_pretrained(tmp_path / "texts")
    assert models.load(str(tmp_path / "texts")).task == "text-generation"


def test_clips_without_a_placeholder_are_refused():
    with pytest.raises(ModelError, match=r"is a InstructBlipVideo\w*, which has no video_token_id in its config"):
        parts_of(clips(video_token_index=None), "m")


def thinker():
    """The thinker of Qwen2.5-Omni, which counts images by the tokens that start them, and takes sound besides."""
    text = {
        "vocab_size": 48, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "num_heads": 4, "patch_size": 4,
        "window_size": 16, "fullatt_block_indexes": [1],
    }  # fmt: skip
    audio = {
        "encoder_layers": 1, "d_model": 32, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "output_dim": 32,
    }  # fmt: skip
    names = ("audio", "image", "video")
    tokens = {f"{name}_token_index": 40 + number for number, name in enumerate(names)}
    tokens |= {"audio_start_token_id": 43, "audio_end_token_id": 44, "vision_start_token_id": 45, "user_token_id": 3}
    return transformers.Qwen2_5OmniThinkerConfig(
        text_config=text, vision_config=vision, audio_config=audio, vision_end_token_id=46, **tokens
    )


def test_the_thinker_of_qwen2_5_omni_has_a_cache_and_positions_on_three_axes():
    call = parts_of(build_from(thinker()), "m").call
    assert call.merge == 2
    assert call.causal.derived_inputs == ("position_ids",)
    assert len(call.causal.sizes) == 2


def test_a_class_that_joins_models_is_refused_by_the_name_of_one(tmp_path):
    name = "Qwen2_5OmniForConditionalGeneration"
    transformers.Qwen2_5OmniConfig(architectures=[name]).save_pretrained(tmp_path)
    with pytest.raises(
        ModelError, match=f"is a {name}, which joins models and has no forward of its own; save one"
    ) as found:
        models.load(str(tmp_path))
    assert "such as Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(" in str(found.value)
    (tmp_path / "bark").mkdir()
    transformers.BarkConfig(architectures=["BarkModel"]).save_pretrained(tmp_path / "bark")
    with pytest.raises(ModelError, match="has no forward of its own; pass a part of it as a module of your own"):
        models.load(str(tmp_path / "bark"))
    (tmp_path / "codes").mkdir()  # which joins none
    transformers.GlmImageVQVAEConfig(architectures=["GlmImageVQVAE"]).save_pretrained(tmp_path / "codes")
    with pytest.raises(ModelError, match="has methods such as encode and no forward; pass a part of it as a"):
        models.load(str(tmp_path / "codes"))


def test_a_tower_of_timm_tells_the_size_of_its_images():
    vision = {
        "model_type": "timm_wrapper", "architecture": "fastvit_mci0", "do_pooling": True, "global_pool": "avg",
        "hidden_size": 1024,
        "model_args": {"inference_mode": True, "pretrained_cfg_overlay": {"input_size": [3, 64, 64]}},
    }  # fmt: skip
    text = config("llava").text_config.to_dict() | {"model_type": "qwen2"}
    found = transformers.FastVlmConfig(text_config=text, vision_config=vision, image_token_index=TOKEN)
    images = parts_of(build_from(found), "m").call.images
    assert (images.shape, images.each) == ((3, 64, 64), 4)


@pytest.mark.parametrize("window", [8, 64])
def test_patches_without_a_vision_tower_are_image_tokens(window):
    text = varying_images.config("gemma4_vision").text_config.to_dict()
    text |= {"model_type": "gemma4_unified_text", "sliding_window": window}
    vision = {
        "patch_size": 2,
        "pooling_kernel_size": 2,
        "mm_embed_dim": 32,
        "mm_posemb_size": 64,
        "output_proj_dims": 32,
    }
    found = transformers.Gemma4UnifiedConfig(
        text_config=text, vision_config=vision, audio_config=None, image_token_id=TOKEN, video_token_id=TOKEN + 1,
        audio_token_id=TOKEN + 2, tie_word_embeddings=False,
    )  # fmt: skip
    call = parts_of(build_from(found), "m").call
    assert (call.images.values, call.images.merge) == (48, 1)
    assert call.beyond_window


@pytest.mark.parametrize("window", [8, 64])
def test_a_window_keeps_tokens_of_gemma3_from_others_of_their_image(window):
    """It is told apart from Gemma 4 Unified whether the image of the example is larger than the window or not."""
    found = config("gemma3")
    found.vision_config.image_size, found.mm_tokens_per_image, found.text_config.sliding_window = 16, 16, window
    call = parts_of(build_from(found), "m").call
    assert (call.within_images, call.beyond_window) == (("full_attention", "sliding_attention"), False)


def without_newline():
    module = varying_images.build("llava_next")
    module.model.image_newline = None
    return module


def without_merger():
    module = varying_images.build("qwen2_vl")
    del module.model.visual.merger
    return module


def without_size_of_a_patch():
    module = varying_images.build("qwen2_vl")
    module.config.vision_config.patch_size = 0
    return module


def with_loops():
    module = varying_images.build("qwen2_vl")
    own = module.get_image_features

    def by_image(pixel_values, image_grid_thw, **kwargs):
        assert all(high and wide for _, high, wide in image_grid_thw.tolist())
        return own(pixel_values, image_grid_thw, **kwargs)

    module.get_image_features = by_image
    return module


def with_encoder():
    module = build("blip_2")
    module.config.use_decoder_only_language_model = False
    return module


def with_two_sizes():
    module = build("llava")
    own = module.get_image_features
    module.get_image_features = lambda pixel_values, image_sizes=None, spatial_shapes=None: own(pixel_values)
    return module


REFUSED = {
    "no newline": (without_newline, "takes image_sizes beside the pixels, but has no image_newline, as LLaVA-NeXT has"),
    "no merger": (without_merger, r"takes image_grid_thw beside the pixels, but its vision encoder cannot read images"),
    "no size": (without_size_of_a_patch, r"takes .* as rows \(its config tells no size of a patch\); expected"),
    "loops": (with_loops, r"takes .* as rows \(patches of \[96\]: it reads the sizes of images in Python; patches of"),
    "an encoder": (with_encoder, "has a language model with an encoder, whose caches these files do not hold"),
    "other sizes": (with_two_sizes, "takes image_sizes and spatial_shapes beside the pixels; expected"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_models_whose_images_have_another_form_are_refused_by_what_they_take(kind):
    make, reason = REFUSED[kind]
    module = make().eval()
    with pytest.raises(ModelError, match=f"m is a {type(module).__name__}, which {reason}"):
        parts_of(module, "m")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda module: setattr(module.config.vision_config, "image_size", 16), "does not take images .* alone"),
        (lambda module: setattr(module.config.vision_config, "image_size", None), "has no image_size in the vision_co"),
    ],
)
def test_configs_that_do_not_fit_are_refused(change, reason):
    module = build("llava")
    change(module)
    with pytest.raises(ModelError, match=reason):
        parts_of(module, "m")


def test_a_module_that_computes_something_else_is_refused():
    module = build("llava")
    module.lm_head.register_forward_hook(lambda layer, args, output: output + args[0].mean((0, 1)).sum())
    counted = iter(range(100))
    module.lm_head.register_forward_hook(lambda layer, args, output: output * (1 + next(counted)))
    with pytest.raises(ModelError, match="computes other logits than its vision tower, projector and lan"):
        parts_of(module, "m")


def test_a_class_without_a_table_of_tokens_is_refused(monkeypatch):
    module = build("llava")

    def absent():
        raise NotImplementedError("please override in the subclass")

    monkeypatch.setattr(module, "get_input_embeddings", absent)
    with pytest.raises(ModelError, match=r"names no table of its token embeddings \(get_input_embeddings\)"):
        parts_of(module, "m")


def test_without_a_cache_a_model_whose_placeholders_are_in_the_text_is_refused(shared):
    with pytest.raises(ModelError, match=r"is a Llava\w*, which gives no logits of arrays .*: leave --no-cache out"):
        models.load(str(saved("llava", shared)), cache=False)


def test_a_study_is_refused(shared):
    with pytest.raises(SettingsError, match=r"found --study, .* but llava is a vision-language model with two; leave"):
        inspect(str(saved("llava", shared)), data="random", study=True)


def test_the_language_model_alone_goes_as_before(tmp_path):
    """A class that ends in ForCausalLM and also takes images keeps its task."""
    with quiet():
        transformers.LlamaForCausalLM(config("llava").text_config).save_pretrained(tmp_path / "m")
    assert models.load(str(tmp_path / "m")).task == "text-generation"
