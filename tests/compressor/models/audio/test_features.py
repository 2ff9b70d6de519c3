"""Feature extractors are found out by calling them."""

import numpy as np
import pytest
import transformers

from compressor.models.audio.features import USUAL, find_features, noise

RATE = 16_000


@pytest.mark.parametrize("masked", [True, False])
def test_waveforms_follow_the_clips_and_are_those_of_the_extractor(masked):
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=masked)
    found = find_features(extractor, "input_values")
    assert found.inputs == ("input_values", "attention_mask")[: 1 + masked]
    assert set(found.axes) == set(found.inputs)
    assert (found.rate, found.seconds) == (RATE, USUAL)
    clips = [noise(RATE, 0.3), noise(RATE, 0.2)]
    expected = extractor(clips, sampling_rate=RATE, return_tensors="np", padding=True)
    for name, value in found(clips).items():
        np.testing.assert_array_equal(value, expected[name])


def test_extractors_of_tensors_alone_are_read():
    """OmniASR's refuses return_tensors="np"."""

    class Tensors(transformers.Wav2Vec2FeatureExtractor):
        def __call__(self, clips, return_tensors=None, **options):
            if return_tensors != "pt":
                raise ValueError("Tensors only supports `return_tensors='pt'`.")
            return super().__call__(clips, return_tensors=return_tensors, **options)

    clips = [noise(RATE, 0.3), noise(RATE, 0.2)]
    for extractor in (Tensors(), transformers.OmniASRFeatureExtractor()):
        found = find_features(extractor, "input_values")
        assert found.inputs[0] == "input_values"
        expected = extractor(clips, sampling_rate=RATE, return_tensors="pt", padding=True)
        np.testing.assert_array_equal(found(clips)["input_values"], expected["input_values"].numpy())


def test_clips_of_any_length_are_cut():
    found = find_features(transformers.Wav2Vec2FeatureExtractor(), "input_values")
    assert found([noise(RATE, USUAL + 1.0)])["input_values"].shape == (1, round(USUAL * RATE))


def test_spectrograms_of_one_length_state_after_how_many_seconds_they_end():
    found = find_features(transformers.ASTFeatureExtractor(max_length=128, num_mel_bins=16), "input_values")
    assert not found.axes
    # 128 windows of 400 samples, 160 apart
    assert found.seconds == pytest.approx((127 * 160 + 400) / RATE, abs=0.02)
    assert found([noise(RATE, 0.5), noise(RATE, 3.0)])["input_values"].shape == (2, 128, 16)


def test_an_extractor_of_something_else_is_none():
    assert find_features(transformers.Wav2Vec2FeatureExtractor(), "input_features") is None
    assert find_features(transformers.ViTImageProcessor(), "input_values") is None
