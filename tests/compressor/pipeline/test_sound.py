"""Sound from files to a report: labels that the model itself predicts give a perfect score."""

import json

import torch

import compressor
from tests.sound_models import RATE, spectrogram_transformer, tone, tones, wav2vec2, write


def test_ast_classifies_clips_as_transformers_does(tmp_path):
    module, extractor = spectrogram_transformer(tmp_path / "m")
    for number in range(12):
        clip = tone(0.4 + 0.1 * number, 200.0 * (1 + number), number)
        values = extractor(clip, sampling_rate=RATE, return_tensors="pt")
        with torch.inference_mode():
            label = module.config.id2label[int(module(**values).logits.argmax())]
        write(tmp_path / "data" / label / f"{number}.wav", clip)
    done = compressor.export(tmp_path / "m", data=tmp_path / "data", drop="mlp:1", rounds=1, output=tmp_path / "out")
    assert done.quality.metric == "accuracy"
    assert done.quality.figures["baseline"].value == 100.0
    assert done.quality.figures["result"].value < 100.0
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()


def test_ctc_agrees_frame_by_frame(tmp_path):
    wav2vec2(tmp_path / "m")
    tones(tmp_path / "data", 4)
    done = compressor.export(
        tmp_path / "m", data=tmp_path / "data", drop="attention:1", rounds=1, output=tmp_path / "out"
    )
    assert done.quality.metric == "frame_agreement"
    assert 0 < done.quality.figures["result"].value < 100.0
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    assert content["model"]["inputs"] == ["input_values", "attention_mask"]
    assert content["model"]["task"] == "ctc"
