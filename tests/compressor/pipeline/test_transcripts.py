"""Whisper on clips with transcripts, held to the loss and the generation of transformers."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

import compressor
from compressor import models
from compressor.data.splits import load as load_data
from compressor.models.base import ModelError
from compressor.report.card.loader_snippet import make_snippet
from tests.encoder_decoders import generated, listener, sentences
from tests.sound_models import RATE, tone, write

IGNORED = -100


def speech(folder, count=16):
    """Write clips and their transcripts as the package datasets reads them; return both."""
    texts = [sentences(1, number)[0] for number in range(count)]
    tones = [tone(0.4 + 0.05 * number, 200.0 * (1 + number), number) for number in range(count)]
    rows = []
    for number, (text, samples) in enumerate(zip(texts, tones, strict=True)):
        write(folder / f"{number}.wav", samples)
        rows.append({"file_name": f"{number}.wav", "transcription": text})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return texts


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speech")
    parts = listener(folder / "whisper")
    texts = speech(folder / "data")
    done = compressor.export(
        folder / "whisper", data=folder / "data", drop="cross_attention:1", rounds=1, output=folder / "out"
    )
    return folder, parts, texts, done


def test_perplexity_is_that_of_transformers(exported):
    """Whisper's own loss for the transcript behind the prompt, which itself is given and not asked for."""
    from scipy.io import wavfile

    folder, (module, extractor, words), texts, done = exported
    content = json.loads((folder / "out" / "report.json").read_text())
    tested = [int(name) for name in content["data"]["test_ids"]]
    losses, counts = [], []
    for number in tested:
        rate, samples = wavfile.read(folder / "data" / f"{number}.wav")
        features = extractor(samples / 32768.0, sampling_rate=rate, return_tensors="pt")["input_features"]
        labels = torch.tensor([words(texts[number])["input_ids"][1:]])
        labels[:, :3] = IGNORED
        ids = torch.tensor([words(texts[number])["input_ids"][:-1]])
        with torch.inference_mode():
            losses.append(float(module(input_features=features, decoder_input_ids=ids, labels=labels).loss))
        counts.append(int((labels != IGNORED).sum()))
    expected = math.exp(np.average(losses, weights=counts))
    assert done.quality.metric == "perplexity"
    assert done.quality.figures["baseline"].value == pytest.approx(expected, rel=1e-3)  # float32 features


def test_the_card_starts_with_the_prompt(exported):
    folder, (_, _, words), _, _ = exported
    content = json.loads((folder / "out" / "report.json").read_text())
    text = make_snippet(content, folder / "out").text
    assert f"answer = {words('')['input_ids'][:-1]}" in text
    done = subprocess.run(
        [sys.executable, "-c", text.replace("tokenizer.decode(answer)", "answer")], cwd=folder / "out",
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout)[:4] == words("")["input_ids"][:-1]


def test_clips_without_transcripts_are_compared_with_what_the_original_writes(tmp_path):
    module, extractor, words = listener(tmp_path / "whisper")
    samples = tone(0.5, 300.0, 0)
    path = write(tmp_path / "data" / "a.wav", samples)
    for number in range(7):
        write(path.with_name(f"{number}.wav"), samples)
    model = models.load(tmp_path / "whisper")
    data = load_data(str(tmp_path / "data"), model.preprocess, task=model.task)
    batch = next(iter(data.test.batches(1)))
    prompt = words("")["input_ids"][:-1]
    features = extractor((samples * 32767).astype(np.int16) / 32768.0, sampling_rate=RATE, return_tensors="np")
    found = generated(
        module, {"input_features": features["input_features"], "decoder_input_ids": np.array([prompt])}, 5
    )
    assert batch.feeds["decoder_input_ids"][0, :9].tolist() == found[0].tolist()
    assert batch.scored[0, :4].tolist() == [False, False, False, True]


@pytest.mark.parametrize(
    ("stated", "reason"),
    [(None, "neither the tokenizer nor generation_config.json states one"), ("<|en|>", None)],
)
def test_the_language_of_the_prompt(stated, reason, tmp_path):
    module, _, words = listener(tmp_path / "whisper", language=None)
    config = {"decoder_start_token_id": module.config.decoder_start_token_id, "lang_to_id": {"<|en|>": 258}}
    (tmp_path / "whisper" / "generation_config.json").write_text(json.dumps(config | {"language": stated}))
    model = models.load(tmp_path / "whisper")
    named = {str(limit.feature): limit.reason for limit in model.limitations}.get("language of the transcripts")
    tokens = [words.convert_tokens_to_ids(f"<|{name}|>") for name in ("en", "transcribe", "notimestamps")]
    if reason is None:
        assert named is None
        assert model.preprocess.decoder.prompt == tuple(tokens)
    else:
        assert reason in named
        assert model.preprocess.decoder.prompt == tuple(tokens[-1:])


def test_features_of_another_length_are_refused(tmp_path):
    import transformers

    listener(tmp_path / "whisper")
    transformers.WhisperFeatureExtractor(feature_size=12, chunk_length=2).save_pretrained(tmp_path / "whisper")
    with pytest.raises(ModelError, match=r"makes spectrograms \[12, 200\] of a second .* takes \[12, 100\]"):
        models.load(tmp_path / "whisper")
