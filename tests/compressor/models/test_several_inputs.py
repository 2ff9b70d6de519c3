"""A model of features that needs several inputs is exported with all of them, and its file agrees with its class."""

import numpy as np
import onnxruntime
import pytest
import torch
import transformers

from compressor import models
from compressor.data.splits import load as load_data
from compressor.lower.trace import trace
from compressor.lower.write_onnx import lower
from compressor.models import ModelError
from tests.text_models import SIZES, save_model

CLOSE = 1e-5  # float32 sums in another order
LENGTH = 11
PARTS = SIZES | {"image_size": 32, "patch_size": 16}
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
KINDS = ("sliding_attention", "full_attention")
CASES = {
    "boxes beside words": ("BrosModel", "BrosConfig", SIZES | {"hidden_size": 64}),
    "regions beside words": (
        "LxmertModel",
        "LxmertConfig",
        SIZES | {"l_layers": 1, "x_layers": 1, "r_layers": 1, "visual_feat_dim": 12},
    ),
    "an image and a text": (
        "FlavaModel",
        "FlavaConfig",
        {"text_config": PARTS, "image_config": PARTS, "multimodal_config": SMALL, "hidden_size": 32},
    ),
    "states and actions": (
        "DecisionTransformerModel",
        "DecisionTransformerConfig",
        {"hidden_size": 16, "n_layer": 1, "n_head": 2, "state_dim": 5, "act_dim": 3, "max_ep_len": 40, "vocab_size": 8}
        | {"bos_token_id": 1, "eos_token_id": 2},
    ),
    "an image and the noise that hides patches": (
        "ViTMAEModel",
        "ViTMAEConfig",
        SMALL | {"image_size": 32, "patch_size": 8, "mask_ratio": 0.5},
    ),
    "a series with lags, and what comes behind it": (
        "TimeSeriesTransformerModel",
        "TimeSeriesTransformerConfig",
        {"prediction_length": 4, "context_length": 6, "lags_sequence": [1, 2, 5], "num_time_features": 2, "d_model": 16}
        | {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16},
    ),
    "a series and its frequency": (
        "TimesFmModel",
        "TimesFmConfig",
        SMALL | {"head_dim": 8, "context_length": 64, "patch_length": 32, "num_key_value_heads": 2},
    ),
}


def loaded(case, folder):
    name, config, fields = CASES[case]
    return models.load(save_model(folder, name, config, **fields))


def longer(model):
    """Return three rows of another length of the inputs of a model."""
    rng = np.random.default_rng(3)
    feeds = {}
    for name in model.inputs:
        value, axes = model.example[name], model.dynamic_axes[name]
        shape = [3, *(LENGTH if axis in axes else size for axis, size in enumerate(value.shape) if axis)]
        whole = not value.is_floating_point()
        feeds[name] = rng.integers(0, 2, shape) if whole else rng.standard_normal(shape).astype(np.float32)
        if name.endswith("mask"):
            feeds[name][:] = 1
            feeds[name][1, -2:] = 0
    return feeds


@pytest.mark.parametrize("case", CASES)
def test_the_file_takes_all_inputs_and_agrees_with_the_class(case, tmp_path):
    model = loaded(case, tmp_path)
    assert len(set(model.inputs) - {"attention_mask", "token_type_ids"}) > 1
    path = lower(trace(model), model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(path))
    assert {each.name for each in session.get_inputs()} == set(model.inputs)
    feeds = longer(model)
    with torch.inference_mode():
        expected = model.module(**{name: torch.from_numpy(value) for name, value in feeds.items()})
    for name, found in zip(model.outputs, session.run(list(model.outputs), feeds), strict=True):
        assert np.abs(found - expected[name].numpy()).max() <= CLOSE * np.abs(expected[name].numpy()).max()


def test_data_are_arrays_by_the_names_of_the_inputs(tmp_path):
    model = loaded("boxes beside words", tmp_path)
    rows = {name: np.repeat(value.numpy(), 20, 0) for name, value in model.example.items()}
    np.savez(tmp_path / "rows.npz", **rows)
    data = load_data(str(tmp_path / "rows.npz"), model.preprocess, task=model.task)
    (batch, *_) = data.calibration.batches(4)
    assert set(batch.feeds) == set(model.inputs)


def test_an_input_that_changes_no_output_is_left_out(tmp_path):
    """The rewards are an argument of the decision transformer, which it does not read."""
    model = loaded("states and actions", tmp_path)
    assert "rewards" not in model.inputs
    assert any("rewards" in each.feature for each in model.limitations)


def test_a_model_that_one_input_is_enough_for_takes_that_input(tmp_path):
    assert "inputs_embeds" not in models.load(save_model(tmp_path, "BertModel", "BertConfig", **SIZES)).inputs


def test_a_model_whose_other_inputs_are_unknown_is_refused_by_what_it_lacks(tmp_path):
    tower = {"model_type": "vit"} | SMALL | {"image_size": 32, "patch_size": 16}
    sam = {"prompt_encoder_config": {"hidden_size": 16}, "mask_decoder_config": {"hidden_size": 16}}
    fields = sam | {"vision_config": {"fpn_hidden_size": 16, "backbone_config": tower}}
    session = r"inference_session of the class Sam2VideoInferenceSession, and a file takes tensors alone; pass the part"
    with pytest.raises(ModelError, match=f"is a Sam2VideoModel, whose forward takes {session} that you need"):
        models.load(save_model(tmp_path, "Sam2VideoModel", "Sam2VideoConfig", **fields))


def test_where_rows_are_compared_with_each_other_the_file_has_each_row_with_itself(tmp_path):
    """X-CLIP makes features of texts for each video; without them, its texts would change no output."""
    vision = PARTS | {"mit_hidden_size": 16, "mit_num_hidden_layers": 1, "mit_num_attention_heads": 2, "num_frames": 3}
    fields = {"text_config": PARTS, "vision_config": vision | {"mit_intermediate_size": 16}, "projection_dim": 16}
    model = models.load(save_model(tmp_path, "XCLIPModel", "XCLIPConfig", **fields, prompt_num_attention_heads=2))
    assert model.inputs == ("input_ids", "pixel_values", "attention_mask")
    assert model.outputs == ("logits_per_text", "text_embeds", "logits_per_video", "video_embeds")
    assert sum("each row with itself" in each.reason for each in model.limitations) == 3
    session = onnxruntime.InferenceSession(str(lower(trace(model), model, tmp_path / "model.onnx")))
    feeds = longer(model)
    with torch.inference_mode():
        whole = model.module(**{name: torch.from_numpy(value) for name, value in feeds.items()})
    found = dict(zip(model.outputs, session.run(list(model.outputs), feeds), strict=True))
    own = {name: np.stack([whole[name][row, row].numpy() for row in range(3)]) for name in model.outputs[:3]}
    for name, expected in (own | {"video_embeds": whole.video_embeds.numpy()}).items():
        np.testing.assert_allclose(found[name].squeeze(), expected.squeeze(), rtol=0, atol=1e-4)


def test_images_have_the_size_that_the_encoder_of_prompts_states(tmp_path):
    """EdgeTAM reads images by a tower of timm, whose config states no size; 224 pixels were taken, which it refuses."""
    tower = {"model_type": "timm_wrapper", "architecture": "repvit_m1", "num_classes": 2}
    tower["model_args"] = {"in_chans": 3, "features_only": True, "out_indices": [0, 1, 2, 3]}
    vision = {"backbone_config": tower, "fpn_hidden_size": 16, "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]]}
    decoder = {"hidden_size": 16, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
    prompts = {"hidden_size": 16, "image_size": 128, "patch_size": 16}
    fields = {"vision_config": vision, "mask_decoder_config": decoder, "prompt_encoder_config": prompts}
    model = models.load(save_model(tmp_path, "EdgeTamModel", "EdgeTamConfig", **fields))
    assert model.example["pixel_values"].shape == (2, 3, 128, 128)
    assert not any(each.feature == "image_size of the config" for each in model.limitations)


def test_frames_of_a_tower_of_timm_have_the_size_that_it_was_made_for(tmp_path):
    """The weights of its architecture were trained on images of 336 pixels, which this tower does not take."""
    tower = {"model_type": "timm_wrapper", "architecture": "vit_pe_core_large_patch14_336", "global_pool": "map"}
    tower["model_args"] = {"embed_dim": 32, "img_size": [28, 28], "depth": 1, "num_heads": 2, "ref_feat_shape": [2, 2]}
    fields = SMALL | {"vision_config": tower | {"num_classes": 16}, "num_key_value_heads": 2, "head_dim": 8}
    model = models.load(save_model(tmp_path, "PeVideoEncoder", "PeVideoEncoderConfig", **fields))
    assert model.example["pixel_values_videos"].shape == (2, 2, 3, 28, 28)


@pytest.mark.parametrize(
    ("part", "output", "size"), [("Encoder", "latents", [1, 16_000]), ("Decoder", "audio", [8, 16])]
)
def test_parts_of_a_codec_take_a_waveform_or_latents_by_the_name_of_states(part, output, size, tmp_path):
    fields = {"num_filters": 4, "depths": [1, 1], "downsampling_ratios": [4], "hidden_size": 8}
    name = f"VibeVoiceAcousticTokenizer{part}"
    model = models.load(save_model(tmp_path, f"{name}Model", f"{name}Config", **fields))
    assert (model.inputs, model.outputs) == (("hidden_states",), (output,))
    assert list(model.example["hidden_states"].shape[1:]) == size
    assert any(each.feature == "length of the clips" for each in model.limitations) == (part == "Encoder")
    session = onnxruntime.InferenceSession(str(lower(trace(model), model, tmp_path / "model.onnx")))
    feeds = longer(model)
    with torch.inference_mode():
        expected = model.module(torch.from_numpy(feeds["hidden_states"]))[output].numpy()
    np.testing.assert_allclose(session.run([output], feeds)[0], expected, rtol=0, atol=CLOSE)


def test_a_set_of_inputs_whose_values_decide_what_is_computed_comes_last(tmp_path):
    """With sound and a video, the class loops over the lengths of its rows, which no graph holds."""
    tower = {"model_type": "timm_wrapper", "architecture": "vit_pe_core_large_patch14_336", "global_pool": "map"}
    tower["model_args"] = {"embed_dim": 32, "img_size": [28, 28], "depth": 1, "num_heads": 2, "ref_feat_shape": [2, 2]}
    heads = {"num_key_value_heads": 2, "head_dim": 8}
    codec = {"encoder_hidden_size": 4, "downsampling_ratios": [4, 8], "hidden_size": 16, "codebook_dim": 2}
    sound = SMALL | heads | {"dac_config": codec, "model_type": "pe_audio_encoder"}
    video = SMALL | heads | {"vision_config": tower | {"num_classes": 16}, "model_type": "pe_video_encoder"}
    both = SMALL | heads | {"audio_config": sound, "video_config": video}
    text = SMALL | {"vocab_size": 40, "model_type": "modernbert", "pad_token_id": 0, "global_attn_every_n_layers": 1}
    fields = {"text_config": text, "audio_video_config": both}
    model = models.load(save_model(tmp_path, "PeAudioVideoModel", "PeAudioVideoConfig", **fields))
    assert model.inputs == ("input_ids", "input_values", "attention_mask")
    trace(model)


def test_an_image_processor_does_not_hide_that_other_inputs_are_needed(tmp_path):
    """Its size is not that of the config, so the size was checked with the pixels alone, and refused."""
    fields = {"image_size": [64, 32], "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    fields |= {"mlp_dim": 32, "intermediate_hidden_state_indices": [0, 1], "merge_index": 0}
    save_model(tmp_path, "SegGptModel", "SegGptConfig", **fields)
    transformers.SegGptImageProcessor(size={"height": 96, "width": 96}).save_pretrained(tmp_path)
    assert set(models.load(tmp_path).inputs) >= {"pixel_values", "prompt_pixel_values", "prompt_masks"}


def test_a_feature_extractor_is_not_read_as_an_image_processor(tmp_path):
    """Both have the file preprocessor_config.json; a folder with that of CLAP was refused."""
    text = SIZES | {"projection_dim": 16, "max_position_embeddings": 64}
    audio = {"depths": [1, 1], "num_attention_heads": [1, 2], "patch_embeds_hidden_size": 8, "hidden_size": 16}
    audio |= {"spec_size": 64, "num_mel_bins": 16, "projection_dim": 16, "patch_size": 4, "patch_stride": [4, 4]}
    fields = {"text_config": text, "audio_config": audio, "projection_dim": 16, "hidden_size": 16}
    save_model(tmp_path / "model", "ClapModel", "ClapConfig", **fields)
    transformers.ClapFeatureExtractor(feature_size=16).save_pretrained(tmp_path / "model")
    model = models.load(tmp_path / "model")
    assert {"input_ids", "input_features"} <= set(model.inputs)
    model.save(tmp_path)
    assert (tmp_path / "preprocessor_config.json").is_file()


def test_a_decoder_of_queries_is_no_encoder_decoder_of_texts(tmp_path):
    """The configs of DETR and Grounding DINO say is_encoder_decoder, but their decoders take no tokens."""
    name, config, fields = CASES["boxes beside words"]
    model = models.load(save_model(tmp_path, name, config, **fields, is_encoder_decoder=True))
    assert {"input_ids", "bbox"} <= set(model.inputs)


def test_noise_that_a_class_draws_is_an_input(tmp_path):
    """The class hides other patches with every call, and was refused as one that draws random numbers."""
    model = loaded("an image and the noise that hides patches", tmp_path)
    assert model.inputs == ("pixel_values", "noise")
    assert model.example["noise"].shape == (2, 16)


def test_a_vocoder_takes_spectrograms_of_any_length_and_the_noise_of_each_frame(tmp_path):
    fields = {"model_hidden_channels": 4, "num_mel_bins": 5, "kernel_predictor_num_blocks": 1}
    fields |= {"resblock_kernel_sizes": [3], "resblock_stride_sizes": [4], "resblock_dilation_sizes": [[1, 3]]}
    model = models.load(save_model(tmp_path / "m", "UnivNetModel", "UnivNetConfig", **fields))
    assert model.inputs == ("input_features", "noise_sequence")
    session = onnxruntime.InferenceSession(str(lower(trace(model), model, tmp_path / "model.onnx")))
    feeds = longer(model)
    with torch.inference_mode():
        expected = model.module(**{name: torch.from_numpy(value) for name, value in feeds.items()}).waveforms.numpy()
    np.testing.assert_allclose(session.run(["waveforms"], feeds)[0], expected, rtol=0, atol=CLOSE)


def test_attentions_that_read_states_beside_others_need_no_mask_without_padding(tmp_path):
    """transformers makes masks without padding only where a class is exported, and of too few states here."""
    fields = SMALL | {"num_key_value_heads": 1, "head_dim": 8, "block_size": 4, "target_layer_ids": [0, 1]}
    folder = save_model(tmp_path / "m", "MuseGlimmerAssistantModel", "MuseGlimmerAssistantConfig", **fields)
    model = models.load(folder)
    assert {name: list(axes) for name, axes in model.dynamic_axes.items()} == {
        "noise_embeds": [0],  # as many as a block has
        "context_hidden_states": [0, 1],
    }
    session = onnxruntime.InferenceSession(str(lower(trace(model), model, tmp_path / "model.onnx")))
    noise, context = torch.randn(3, 4, 16), torch.randn(3, 9, 32)
    with torch.inference_mode():
        expected = model.module(noise_embeds=noise, context_hidden_states=context).last_hidden_state.numpy()
    feeds = {"noise_embeds": noise.numpy(), "context_hidden_states": context.numpy()}
    np.testing.assert_allclose(session.run(["last_hidden_state"], feeds)[0], expected, rtol=0, atol=CLOSE)


def test_an_assistant_reads_keys_and_values_of_another_model_by_their_kinds(tmp_path):
    """Gemma 4's assistants draft the next token from the states of the model, for which no text is enough."""
    text = SMALL | {"model_type": "gemma4_text", "num_hidden_layers": 2, "head_dim": 8, "global_head_dim": 16}
    text |= {"vocab_size": 40, "num_key_value_heads": 1, "layer_types": ["sliding_attention", "full_attention"]}
    text |= {"vocab_size_per_layer_input": 0, "hidden_size_per_layer_input": 0, "sliding_window": 64}
    fields = {"text_config": text, "backbone_hidden_size": 12}
    model = models.load(save_model(tmp_path / "m", "Gemma4AssistantForCausalLM", "Gemma4AssistantConfig", **fields))
    states = [f"shared_kv_states.{kind}.{part}" for kind in text["layer_types"] for part in ("key", "value")]
    assert model.inputs == ("inputs_embeds", "position_ids", "attention_mask", *states)
    session = onnxruntime.InferenceSession(str(lower(trace(model), model, tmp_path / "model.onnx")))
    feeds = longer(model) | {"position_ids": np.array([[10], [8], [10]])}
    tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}
    shared = {
        kind: tuple(tensors.pop(f"shared_kv_states.{kind}.{part}") for part in ("key", "value")) for kind in KINDS
    }
    with torch.inference_mode():
        expected = model.module(**tensors, shared_kv_states=shared)
    assert model.outputs == ("last_hidden_state", "logits")
    for name, found in zip(model.outputs, session.run(list(model.outputs), feeds), strict=True):
        np.testing.assert_allclose(found, expected[name].numpy(), rtol=0, atol=CLOSE, err_msg=name)


T5 = {"model_type": "t5", "vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
ENCODEC = {"model_type": "encodec", "num_filters": 4, "upsampling_ratios": [2, 2], "hidden_size": 8, "codebook_size": 8}
WRITER = SMALL | {"vocab_size": 24, "ffn_dim": 16, "max_position_embeddings": 300, "num_codebooks": 4}
HEADED = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 24}
CROSS = {f"cross_{name}": HEADED[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim")}


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("Musicgen", {"text_encoder": T5, "audio_encoder": ENCODEC, "decoder": WRITER}),
        ("MusicgenMelody", {"text_encoder": T5, "audio_encoder": ENCODEC, "decoder": WRITER, "chroma_length": 9}),
        (
            "Dia",
            {
                "delay_pattern": [0, 1, 2, 3],
                "encoder_config": SMALL | HEADED,
                "decoder_config": SMALL | HEADED | CROSS | {"cross_hidden_size": 16, "num_channels": 4},
            },
        ),
    ],
)
def test_codes_of_sound_are_an_axis_of_the_inputs_and_of_the_logits(kind, fields, tmp_path):
    """Their classes take and return the codes of a frame in rows of their own, or last; they were refused."""
    folder = save_model(tmp_path / "m", f"{kind}ForConditionalGeneration", f"{kind}Config", **fields)
    model = models.load(folder)
    assert {"input_ids", "attention_mask", "decoder_input_ids"} <= set(model.inputs)
    assert model.example["decoder_input_ids"].shape[:2] == (2, 4)
    assert any(each.feature == "KV cache" for each in model.limitations)
    session = onnxruntime.InferenceSession(str(lower(trace(model), model, tmp_path / "model.onnx")))
    rng = np.random.default_rng(0)
    feeds = {name: rng.integers(3, 20, (3, 9)) for name in ("input_ids", "attention_mask")}
    feeds["attention_mask"] = np.where(np.arange(9) < [[9], [7], [9]], 1, 0)
    feeds["decoder_input_ids"] = rng.integers(3, 20, (3, 4, 6))
    if "input_features" in model.inputs:
        shape = model.example["input_features"].shape[1:]
        feeds["input_features"] = rng.standard_normal((3, *shape)).astype(np.float32)
    own = {name: torch.from_numpy(value) for name, value in feeds.items()}
    own["decoder_input_ids"] = (
        own["decoder_input_ids"].mT.contiguous() if kind == "Dia" else own["decoder_input_ids"].flatten(0, 1)
    )
    with torch.inference_mode():
        expected = model.module(**own, use_cache=False).logits.numpy()
    (found,) = session.run(["logits"], feeds)
    np.testing.assert_allclose(found.reshape(expected.shape), expected, rtol=0, atol=CLOSE)


def test_a_transducer_takes_one_token_beside_the_sound(tmp_path):
    encoder = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    encoder |= {"num_mel_bins": 16, "subsampling_conv_channels": 8, "conv_kernel_size": 3}
    fields = {"encoder_config": encoder, "vocab_size": 20, "decoder_hidden_size": 16, "blank_token_id": 19}
    folder = save_model(tmp_path / "m", "ParakeetForRNNT", "ParakeetRNNTConfig", **fields)
    with pytest.raises(ModelError, match="pass --task feature-extraction to export the first output of the model as"):
        models.load(folder)
    model = models.load(folder, task="feature-extraction")
    assert model.inputs == ("input_features", "attention_mask", "decoder_input_ids")
    assert {name: value.shape[1] for name, value in model.example.items()} == {
        "input_features": 128, "attention_mask": 128, "decoder_input_ids": 1
    }  # fmt: skip
    assert any("only input_features of 128 x 16 values" in each.reason for each in model.limitations)
    session = onnxruntime.InferenceSession(str(lower(trace(model), model, tmp_path / "model.onnx")))
    feeds = longer(model)
    with torch.inference_mode():
        expected = model.module(**{name: torch.from_numpy(value) for name, value in feeds.items()}).logits.numpy()
    (found,) = session.run(["logits"], feeds)
    assert np.abs(found - expected).max() <= CLOSE * np.abs(expected).max()
    # Its feature extractor, which gives no tokens, does not hide that one is needed.
    transformers.ParakeetFeatureExtractor(feature_size=16).save_pretrained(folder)
    assert models.load(folder, task="feature-extraction").inputs == model.inputs


def test_a_matcher_takes_pairs_of_images_and_gives_the_first_of_its_maps(tmp_path):
    fields = {"stage_num_blocks": [1, 1, 1, 1], "num_attention_layers": 1}
    model = models.load(save_model(tmp_path, "EfficientLoFTRModel", "EfficientLoFTRConfig", **fields))
    assert model.example["pixel_values"].shape[:3] == (2, 2, 3)
    with torch.inference_mode():
        (found,) = model.call(model.module, model.example["pixel_values"])
        expected = model.module(model.example["pixel_values"]).feature_maps[0]
    assert model.outputs == ("feature_maps",)
    torch.testing.assert_close(found, expected)


def test_a_codec_takes_a_waveform_and_a_frame_of_a_spectrogram_for_each_code(tmp_path):
    semantic = SMALL | {"feature_projection_input_dim": 20, "model_type": "wav2vec2-bert"}
    fields = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.Xcodec2Config(
        **fields, num_key_value_heads=2, head_dim=16, encoder_hidden_size=8, downsampling_ratios=[4, 160],
        semantic_model_config=semantic, quantization_dim=48, quantization_levels=[4, 4],
    )  # fmt: skip
    torch.manual_seed(0)
    module = transformers.Xcodec2Model(config).eval()
    torch.nn.init.normal_(module.quantizer.project_in.weight, std=100.0)  # or all small states are rounded to one code
    module.save_pretrained(tmp_path)
    model = models.load(tmp_path)
    assert {name: list(value.shape[1:]) for name, value in model.example.items()} == {
        "input_values": [1, 16_000],
        "input_features": [25, 20],
    }
    feeds = {name: torch.randn(3, *value.shape[1:]) for name, value in model.example.items()}
    session = onnxruntime.InferenceSession(str(lower(trace(model), model, tmp_path / "model.onnx")))
    (found,) = session.run(["audio_values"], {name: value.numpy() for name, value in feeds.items()})
    with torch.inference_mode():
        expected = module(**feeds).audio_values.numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3 * np.abs(expected).max())  # an inverse transform


def test_rows_of_one_length(tmp_path):
    name, config, fields = CASES["boxes beside words"]
    folder = save_model(tmp_path, name, config, **fields)
    model = models.load(folder, sequence_length=7)
    assert {axis for axes in model.dynamic_axes.values() for axis in axes.values()} == {"batch"}
    assert model.example["bbox"].shape == (2, 7, 4)
    assert model.preprocess.padded == 7
    assert any("only rows of 7 tokens" in each.reason for each in model.limitations)
    with pytest.raises(ModelError, match="fails on rows of 99 tokens; give another number"):
        models.load(folder, sequence_length=99)
    other = save_model(tmp_path / "noise", *CASES["an image and the noise that hides patches"][:2])
    with pytest.raises(ModelError, match="takes inputs of one size, or leave --sequence-length out"):
        models.load(other, sequence_length=7)
