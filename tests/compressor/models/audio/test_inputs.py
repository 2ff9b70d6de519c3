"""Models of sound are loaded with the inputs that they take, and exported as they compute."""

import numpy as np
import onnxruntime
import pytest
import torch
import transformers

from compressor import models
from compressor.data.splits import DataError, load
from compressor.lower.trace import trace
from compressor.lower.write_onnx import lower
from compressor.models import ModelError
from tests.sound_models import RATE, spectrogram_transformer, tone, tones, wav2vec2
from tests.text_models import save_model

CLOSE = 1e-4  # float32 kernels of torch and ONNX Runtime


def feeds_of(folder, seconds):
    """Return what transformers itself prepares for tones of some lengths."""
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    clips = [tone(each, 400.0, seed).astype(np.float32) for seed, each in enumerate(seconds)]
    return dict(extractor(clips, sampling_rate=RATE, return_tensors="np", padding=True))


@pytest.mark.parametrize(
    ("head", "masked"),
    [
        ("Wav2Vec2ForCTC", True),
        ("Wav2Vec2ForSequenceClassification", False),
        pytest.param("Wav2Vec2ForSequenceClassification", True, marks=pytest.mark.slow),
        pytest.param("Wav2Vec2ForAudioFrameClassification", True, marks=pytest.mark.slow),
        pytest.param("Wav2Vec2Model", True, marks=pytest.mark.slow),
        pytest.param("HubertForCTC", True, marks=pytest.mark.slow),
        pytest.param("WavLMForCTC", False, marks=pytest.mark.slow),
    ],
)
def test_a_file_takes_clips_of_any_length_and_number(tmp_path, head, masked):
    module = wav2vec2(tmp_path, head, masked=masked)
    model = models.load(tmp_path)
    path = lower(trace(model), model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for seconds in ((0.7, 0.7, 0.7), (1.3, 0.4), (0.3,)):  # without padding, with it, and a single clip
        feeds = {
            name: value.astype(np.int64 if "mask" in name else np.float32)
            for name, value in feeds_of(tmp_path, seconds).items()
        }
        with torch.inference_mode():
            expected = module(**{name: torch.from_numpy(value) for name, value in feeds.items()})[0].numpy()
        (found,) = session.run(None, feeds)
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, atol=CLOSE * np.abs(expected).max())


def test_tasks_follow_the_class_and_its_main_input(tmp_path):
    wav2vec2(tmp_path / "classes", "Wav2Vec2ForSequenceClassification")
    wav2vec2(tmp_path / "frames", "Wav2Vec2ForAudioFrameClassification")
    wav2vec2(tmp_path / "bare", "Wav2Vec2Model")
    spectrogram_transformer(tmp_path / "ast")
    tasks = {folder.name: models.load(folder).task for folder in tmp_path.iterdir()}
    assert tasks == {
        "classes": "audio-classification",
        "frames": "audio-frame-classification",
        "bare": "feature-extraction",
        "ast": "audio-classification",
    }


def test_a_mask_is_taken_where_the_extractor_returns_one(tmp_path):
    wav2vec2(tmp_path / "masked")
    wav2vec2(tmp_path / "zeros", masked=False)
    masked, zeros = (models.load(tmp_path / name) for name in ("masked", "zeros"))
    assert masked.inputs == ("input_values", "attention_mask")
    assert zeros.inputs == ("input_values",)
    assert "padding of the clips" in [limitation.feature for limitation in zeros.limitations]
    assert masked.dynamic_axes["attention_mask"] == {0: "batch", 1: "sequence"}


def test_frames_are_counted_as_the_convolutions_make_them(tmp_path):
    module = wav2vec2(tmp_path)
    samples = [1600, 7777, 16_000]
    with torch.inference_mode():
        frames = [module(torch.zeros(1, count)).logits.shape[1] for count in samples]
    assert models.load(tmp_path).preprocess.frames(samples).tolist() == frames


def test_without_a_feature_extractor_the_shape_comes_from_the_config(tmp_path):
    spectrogram_transformer(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    model = models.load(tmp_path)
    assert list(model.example["input_values"].shape) == [2, 128, 16]
    assert model.preprocess.audio is None
    assert "preprocessing" in [limitation.feature for limitation in model.limitations]


def test_a_damaged_feature_extractor_is_refused(tmp_path):
    wav2vec2(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"the feature extractor of .* cannot be read"):
        models.load(tmp_path)


def test_clips_are_refused_for_an_extractor_of_another_input_by_its_name(tmp_path):
    spectrogram_transformer(tmp_path / "model")
    transformers.SeamlessM4TFeatureExtractor().save_pretrained(tmp_path / "model")  # input_features
    model = models.load(tmp_path / "model")
    assert not any("no feature extractor" in str(each) for each in model.limitations)
    reason = "its SeamlessM4TFeatureExtractor does not give input_values, which it takes"
    assert any(reason in str(each) for each in model.limitations)
    with pytest.raises(DataError, match=f"{reason}; add its own preprocessor_config.json"):
        load(str(tones(tmp_path / "tones", 1)), model.preprocess, task=model.task)


def test_an_extractor_that_does_not_fit_is_refused(tmp_path):
    spectrogram_transformer(tmp_path)
    transformers.ASTFeatureExtractor(max_length=64, num_mel_bins=16).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="fails on what its feature extractor returns"):
        models.load(tmp_path)


def test_a_codec_that_returns_codes_alone_is_refused_by_its_outputs(tmp_path):
    """It was said to fail on every shape, and to lack a preprocessor."""
    sizes = {"num_filters": 4, "hidden_size": 16, "codebook_dim": 16, "codebook_size": 32, "num_lstm_layers": 1}
    folder = save_model(tmp_path, "WavTokenizerEncoderModel", "WavTokenizerEncoderConfig", **sizes)
    with pytest.raises(ModelError, match=r"outputs are no features, as it returns no .* only audio_codes") as refused:
        models.load(folder)
    assert "preprocessor_config" not in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "bins", "stacked"), [("GraniteSpeech5Encoder", 8, 4), ("GraniteSpeech5Encoder", 12, 4)]
)
def test_stacked_frames_have_the_width_that_a_layer_reads(kind, bins, stacked, tmp_path):
    """Granite Speech reads four frames as one; a number of them that its blocks divide would be fixed in the trace."""
    config = transformers.GraniteSpeech5EncoderConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, intermediate_size=32,
        head_dim=8, num_mel_bins=bins, vocab_size=24, context_size=32,
    )  # fmt: skip
    torch.manual_seed(0)
    getattr(transformers, kind)(config).save_pretrained(tmp_path)
    model = models.load(tmp_path)
    assert model.example["input_features"].shape[2] == stacked * bins
    path = lower(trace(model), model, tmp_path / "model.onnx")
    frames = torch.randn(3, 43, stacked * bins)
    with torch.inference_mode():
        expected = model.module(frames).last_hidden_state.numpy()
    (found,) = onnxruntime.InferenceSession(str(path)).run(None, {"input_features": frames.numpy()})
    assert np.abs(found - expected).max() <= CLOSE * np.abs(expected).max()


def test_channels_that_no_config_states_are_the_usual_ones(tmp_path):
    """The encoder of Gemma 4 reads 128 mel channels, which only its feature extractor states."""
    config = transformers.Gemma4AudioConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, output_proj_dims=16,
        subsampling_conv_channels=[128, 4], attention_chunk_size=4, attention_context_left=5,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Gemma4AudioModel(config).save_pretrained(tmp_path)
    model = models.load(tmp_path)
    assert model.example["input_features"].shape == (2, 128, 128)
    path = lower(trace(model), model, tmp_path / "model.onnx")
    frames = torch.randn(3, 71, 128)
    with torch.inference_mode():
        expected = model.module(frames).last_hidden_state.numpy()
    (found,) = onnxruntime.InferenceSession(str(path)).run(None, {"input_features": frames.numpy()})
    assert np.abs(found - expected).max() <= CLOSE * np.abs(expected).max()


def test_a_codec_that_adds_noise_unless_it_is_told_is_told_and_says_so(tmp_path):
    """Its class draws noise for the latents by default, and was refused as one that draws random numbers."""
    fields = {"num_filters": 4, "depths": [1, 1], "downsampling_ratios": [4], "hidden_size": 8}
    torch.manual_seed(0)
    config = transformers.VibeVoiceAcousticTokenizerConfig(**fields, initializer_range=0.2)
    transformers.VibeVoiceAcousticTokenizerModel(config).save_pretrained(tmp_path)
    model = models.load(tmp_path)
    assert any(each.feature == "noise" and "adds none" in each.reason for each in model.limitations)
    path = lower(trace(model), model, tmp_path / "model.onnx")
    clips = torch.randn(3, 1, 9_600)
    with torch.inference_mode():
        expected = model.module(clips, sample=False).audio.numpy()
    (found,) = onnxruntime.InferenceSession(str(path)).run(["audio"], {"input_values": clips.numpy()})
    assert np.abs(found - expected).max() <= CLOSE * np.abs(expected).max()
