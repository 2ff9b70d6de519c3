"""Heads of transformers: which class is loaded for a checkpoint, its outputs and what is said about them."""

import numpy as np
import onnxruntime
import pytest
import torch
import transformers

from compressor import models
from compressor.internals.transformers import quiet
from compressor.lower.fold_graph import fold_graph
from compressor.lower.trace import trace
from compressor.lower.write_onnx import lower
from compressor.models import ModelError, several_inputs
from passes.execute.interpreter import run

CLOSE = 1e-5
TEXTS = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
IMAGES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
XLM = {"vocab_size": 40, "emb_dim": 16, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 32}
WAVES = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "conv_dim": (8, 8),
    "conv_kernel": (80, 3), "conv_stride": (40, 2), "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
    "tdnn_dim": (8, 8), "tdnn_kernel": (3, 1), "tdnn_dilation": (1, 1), "xvector_output_dim": 12,
}  # fmt: skip


def saved(module, folder):
    torch.manual_seed(0)
    for parameter in module.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    with quiet():
        module.eval().save_pretrained(folder)
    return str(folder)


def detector():
    config = transformers.YolosConfig(image_size=[32, 32], patch_size=8, num_detection_tokens=5, num_labels=3, **IMAGES)
    return transformers.YolosForObjectDetection(config)


def two_towers():
    texts = {"vocab_size": 40, "max_position_embeddings": 16, "hidden_size": 16, "num_hidden_layers": 1}
    shared = {"num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.OwlViTConfig(
        text_config=texts | shared, vision_config=IMAGES | {"image_size": 16, "patch_size": 8}, projection_dim=8
    )
    return transformers.OwlViTModel(config)


CASES = {
    "detector": (detector, "object-detection", ("logits", "pred_boxes")),
    "x-vectors": (
        lambda: transformers.Wav2Vec2ForXVector(transformers.Wav2Vec2Config(**WAVES)),
        "audio-xvector",
        ("embeddings", "logits"),
    ),
    "two towers that no mapping lists": (
        two_towers,
        "zero-shot-image-classification",
        ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds"),
    ),
    "pairs of sentences": (
        lambda: transformers.BertForNextSentencePrediction(transformers.BertConfig(**TEXTS)),
        "text-classification",
        ("logits",),
    ),
    "a masked language model of another name": (
        lambda: transformers.FlaubertWithLMHeadModel(transformers.FlaubertConfig(**XLM)),
        "fill-mask",
        ("logits",),
    ),
    "a decoder of another name": (
        lambda: transformers.BertGenerationDecoder(transformers.BertGenerationConfig(is_decoder=True, **TEXTS)),
        "text-generation",
        None,
    ),
    "a pooled output": (
        lambda: transformers.DPRQuestionEncoder(transformers.DPRConfig(projection_dim=0, **TEXTS)),
        "feature-extraction",
        ("pooler_output",),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_file_computes_what_the_named_class_does(name, tmp_path):
    build, task, outputs = CASES[name]
    module = build()
    model = models.load(saved(module, tmp_path / "m"))
    assert (model.task, type(model.module)) == (task, type(module))
    assert outputs is None or model.outputs == outputs
    said = [each.reason for each in model.limitations if each.feature == "features"]
    assert said == (["the model returns no last_hidden_state, so its features are the output pooler_output"]
                    if outputs == ("pooler_output",) else [])  # fmt: skip
    lower(fold_graph(trace(model)), model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    feeds = {each: value.numpy() for each, value in model.example.items()}
    with torch.inference_mode():
        expected = module(**{each: value for each, value in model.example.items() if "past" not in each})
    if model.state:  # with a cache of its own
        return
    for output, found in zip(model.outputs, session.run(list(model.outputs), feeds), strict=True):
        wanted = expected[output].numpy()
        assert np.abs(found - wanted).max() <= CLOSE * np.abs(wanted).max()


def test_the_boxes_of_a_detector_have_no_quality(tmp_path):
    model = models.load(saved(detector(), tmp_path / "m"))
    assert any(each.feature == "quality of the boxes" and "not stated" in each.reason for each in model.limitations)


def test_a_class_without_a_cache_is_no_error(tmp_path):
    config = transformers.OpenAIGPTConfig(vocab_size=40, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    model = models.load(saved(transformers.OpenAIGPTLMHeadModel(config), tmp_path / "m"))
    assert (model.task, model.outputs, model.state) == ("text-generation", ("logits",), {})
    assert any(each.feature == "KV cache" and "has none" in each.reason for each in model.limitations)


def test_xlm_generates_only_if_its_config_is_causal(tmp_path):
    for causal, task in ((False, "fill-mask"), (True, "text-generation")):
        module = transformers.XLMWithLMHeadModel(transformers.XLMConfig(causal=causal, **XLM))
        folder = saved(module, tmp_path / task)
        if not causal:
            assert models.load(folder).task == task
        else:  # it keeps the cache of earlier releases
            with pytest.raises(ModelError, match="--no-cache"):
                models.load(folder)
            assert models.load(folder, cache=False).task == task


def test_another_head_is_loaded_by_its_task(tmp_path):
    """A named class does not stand for a task that is not its own."""
    module = transformers.BertForNextSentencePrediction(transformers.BertConfig(**TEXTS))
    model = models.load(saved(module, tmp_path / "m"), task="fill-mask")
    assert type(model.module) is transformers.BertForMaskedLM


def test_an_encoder_that_needs_a_mask_of_its_frames_gets_one(tmp_path):
    config = transformers.AudioFlamingo3EncoderConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, num_mel_bins=12,
        max_source_positions=32,
    )  # fmt: skip
    module = transformers.AudioFlamingo3Encoder(config)
    model = models.load(saved(module, tmp_path / "m"))
    assert model.inputs == ("input_features", "input_features_mask")
    assert model.example["input_features_mask"].shape == (2, model.example["input_features"].shape[2])
    assert model.example["input_features_mask"].all()


def test_an_encoder_may_need_a_mask_of_truth_values(tmp_path):
    config = transformers.Gemma3nAudioConfig(
        hidden_size=16, conf_num_hidden_layers=1, conf_num_attention_heads=2, conf_attention_context_left=4,
        conf_attention_chunk_size=4, sscp_conv_channel_size=(4, 4),
    )  # fmt: skip
    model = models.load(saved(transformers.Gemma3nAudioEncoder(config), tmp_path / "m"))
    assert model.inputs == ("audio_mel", "audio_mel_mask")
    assert model.example["audio_mel_mask"].dtype == torch.bool


def test_a_language_model_that_reads_sound_is_refused_by_name(tmp_path):
    config = transformers.Qwen2AudioConfig(architectures=["Qwen2AudioForConditionalGeneration"])
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="a language model that reads sound beside its text, which is not supported"):
        models.load(tmp_path, random_weights=True)


def test_a_language_model_that_reads_sound_is_exported_for_texts_alone(tmp_path):
    """The refusal names the option, and the file gives the logits of the whole class for a text."""
    texts = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2} | {
        "num_key_value_heads": 2, "intermediate_size": 24, "model_type": "qwen2"
    }  # fmt: skip
    sound = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 24}
    config = transformers.Qwen2AudioConfig(audio_config=sound, text_config=texts, audio_token_index=3)
    module = transformers.Qwen2AudioForConditionalGeneration(config)
    folder = saved(module, tmp_path / "m")
    with pytest.raises(ModelError, match="pass --task text-generation to export it for texts alone"):
        models.load(folder)
    model = models.load(folder, task="text-generation")
    assert type(model.module) is type(module)
    assert any("takes sound, but the export does not" in each.reason for each in model.limitations)
    lower(fold_graph(trace(model)), model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    for rows, tokens in ((1, 5), (3, 9)):
        ids = torch.randint(5, 40, (rows, tokens), generator=torch.Generator().manual_seed(tokens))
        feeds = model.preprocess.complete({"input_ids": ids.numpy(), "attention_mask": np.ones_like(ids.numpy())})
        (found,) = session.run(["logits"], feeds)
        with torch.inference_mode():
            expected = module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.numpy()
        assert np.abs(found - expected).max() <= CLOSE * np.abs(expected).max()


def test_a_class_that_its_automatic_class_lists_and_does_not_make_is_loaded_by_name(tmp_path):
    """AutoModelForImageTextToText lists Evolla, which reads proteins, and says that it does not know its config."""
    texts = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    texts |= {"num_key_value_heads": 2, "intermediate_size": 24}
    config = transformers.EvollaConfig(**texts, protein_encoder_config=texts, resampler_depth=1, resampler_heads=2)
    folder = saved(transformers.EvollaForProteinText2Text(config), tmp_path / "m")
    with pytest.raises(ModelError, match="pass --task text-generation to export it for texts alone"):
        models.load(folder)
    model = models.load(folder, task="text-generation")
    assert type(model.module) is transformers.EvollaForProteinText2Text
    assert any("takes proteins, but the export does not" in each.reason for each in model.limitations)


def test_a_model_of_timm_in_a_wrapper_is_one_of_transformers(tmp_path):
    """Its config names the architecture of timm too."""
    config = transformers.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224", num_labels=3, model_args={"depth": 1, "img_size": 32, "embed_dim": 24}
    )
    model = models.load(saved(transformers.TimmWrapperForImageClassification(config), tmp_path / "m"))
    assert (model.source, model.task) == ("transformers", "image-classification")


def test_what_a_module_needs_besides_is_taken_or_named(tmp_path, monkeypatch):
    """SegGPT needs a prompt of an image and a mask, whose forms are tried."""
    sizes = {"image_size": [32, 16], "patch_size": 8, "pretrain_image_size": 16, "decoder_hidden_size": 8}
    config = transformers.SegGptConfig(**sizes, intermediate_hidden_state_indices=[0], merge_index=0, **IMAGES)
    folder = saved(transformers.SegGptModel(config), tmp_path / "m")
    assert models.load(folder).inputs == ("pixel_values", "prompt_pixel_values", "prompt_masks")
    monkeypatch.setattr(several_inputs, "TRIALS", 0)
    with pytest.raises(ModelError, match=r"SegGptModel takes prompt_pixel_values and prompt_masks beside .*own"):
        models.load(folder)


def assert_traced_as_hidden_states(model, module, height, width):
    """The graph returns what the module calls hidden states, for one image and for several."""
    graph = trace(model)
    for rows in (1, 3):
        pixels = torch.rand(rows, 3, height, width, generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            expected = module(pixels).last_hidden_state
        torch.testing.assert_close(run(graph, {"pixel_values": pixels})[0], expected, rtol=1e-4, atol=1e-5)


def test_a_classifier_whose_logits_have_another_name(tmp_path):
    """PP-LCNet returns its logits as hidden states."""
    blocks = [[[3, 16, 16, 2, stage == 4]] for stage in range(5)]
    config = transformers.PPLCNetConfig(block_configs=blocks, class_expand=32, num_labels=3)
    module = transformers.PPLCNetForImageClassification(config).eval()
    model = models.load(saved(module, tmp_path / "m"))
    assert (model.task, model.outputs, model.classes()) == ("image-classification", ("logits",), 3)
    assert_traced_as_hidden_states(model, module, 224, 224)


def test_a_detector_without_boxes_gives_its_map_as_features(tmp_path):
    """The text detectors of PaddleOCR return a map of probabilities as hidden states."""
    config = transformers.PPOCRV5MobileDetConfig(neck_out_channels=64)
    module = transformers.PPOCRV5MobileDetForObjectDetection(config).eval()
    model = models.load(saved(module, tmp_path / "m"), image_size=(64, 96))
    assert (model.task, model.outputs) == ("image-feature-extraction", ("last_hidden_state",))
    assert "task: the head for object-detection returns last_hidden_state alone" in "\n".join(
        map(str, model.limitations)
    )
    assert_traced_as_hidden_states(model, module, 64, 96)


def test_a_head_with_several_outputs_gives_the_first(tmp_path):
    """The logits of MGP-STR are three, of characters and of two kinds of tokens."""
    fields = {"image_size": [32, 64], "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 1, "max_token_length": 5}
    fields |= {"num_character_labels": 7, "num_bpe_labels": 9, "num_wordpiece_labels": 11, "num_attention_heads": 2}
    module = transformers.MgpstrForSceneTextRecognition(transformers.MgpstrConfig(**fields)).eval()
    folder = saved(module, tmp_path / "m")
    with pytest.raises(ModelError, match="pass --task image-feature-extraction to export the first output of the mod"):
        models.load(folder)
    model = models.load(folder, task="image-feature-extraction")
    assert model.outputs == ("logits",)
    with torch.inference_mode():
        (found,) = model.call(model.module, model.example["pixel_values"])
        expected = module(model.example["pixel_values"]).logits[0]
    torch.testing.assert_close(found, expected)


def test_the_named_class_generates_if_the_automatic_one_reads_other_weights(tmp_path):
    """That of Emu3 is its language model alone, whose weights have other names in the whole checkpoint."""
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    text |= {"intermediate_size": 32, "vocab_size": 120, "pad_token_id": 0, "max_position_embeddings": 64}
    pictures = {"codebook_size": 8, "base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1}
    tokens = {"<|extra_200|>": 5, "<image>": 3} | {f"<|visual token {each:06d}|>": 10 + each for each in range(8)}
    config = transformers.Emu3Config(vq_config=pictures, text_config=text, vocabulary_map=tokens)
    module = transformers.Emu3ForConditionalGeneration(config).eval()
    model = models.load(saved(module, tmp_path / "m"), task="text-generation")
    assert type(model.module).__name__ == "Emu3ForConditionalGeneration"
    assert not model.untrained


def test_waveforms_of_whole_frames_are_found(tmp_path):
    config = transformers.AutoConfig.for_model(
        "muse_spark_audio", hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=32, head_dim=8,
    )  # fmt: skip
    model = models.load(saved(transformers.AutoModel.from_config(config), tmp_path / "m"))
    assert model.example["input_values"].shape[-1] % 1_920 == 0
