"""Small models of transformers that take sound, with random weights, and folders of tones."""

from pathlib import Path

import numpy as np
import torch
import transformers
from scipy.io import wavfile

RATE = 16_000
TONES = {"low": 200.0, "mid": 800.0, "high": 3000.0}
NAMES = {"id2label": dict(enumerate(TONES)), "label2id": {name: number for number, name in enumerate(TONES)}}


def wav2vec2(folder: Path, head: str = "Wav2Vec2ForCTC", *, masked: bool = True, **options):
    """Save a Wav2Vec2 with two convolutions; with `masked`, its extractor returns an attention mask."""
    torch.manual_seed(0)
    kind = getattr(transformers, head)
    config = kind.config_class(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, conv_dim=(8, 8),
        conv_kernel=(80, 3), conv_stride=(40, 2), num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
        vocab_size=20, classifier_proj_size=8, initializer_range=0.4, feat_extract_norm="layer" if masked else "group",
        do_stable_layer_norm=masked, **options,
    )  # fmt: skip
    module = kind(config).eval()
    module.save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(return_attention_mask=masked).save_pretrained(folder)
    return module


def spectrogram_transformer(folder: Path):
    """Save a small AST, whose spectrograms have 128 frames, and return it with its feature extractor."""
    torch.manual_seed(0)
    config = transformers.ASTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_length=128,
        num_mel_bins=16, initializer_range=0.4, **NAMES,
    )  # fmt: skip
    module = transformers.ASTForAudioClassification(config).eval()
    module.save_pretrained(folder)
    extractor = transformers.ASTFeatureExtractor(max_length=128, num_mel_bins=16)
    extractor.save_pretrained(folder)
    return module, extractor


def tone(seconds: float, frequency: float, seed: int, rate: int = RATE):
    """Return a tone with some noise, float64 [samples]."""
    time = np.arange(round(rate * seconds)) / rate
    return 0.3 * np.sin(2 * np.pi * frequency * time) + 0.05 * np.random.default_rng(seed).standard_normal(len(time))


def write(path: Path, samples, rate: int = RATE):
    """Write samples in -1 to 1 as a file of 16 bits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    wavfile.write(path, rate, (samples * 32767).astype(np.int16))
    return path


def tones(folder: Path, count: int = 6):
    """Write `count` clips of 0.5 to 1 s for each tone, in a folder of that name."""
    for name, frequency in TONES.items():
        for number in range(count):
            write(folder / name / f"{number}.wav", tone(0.5 + 0.5 * number / count, frequency, number))
    return folder
