"""Models of videos and of time series are loaded with inputs of the shape that they take."""

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from PIL import Image

from compressor import models
from compressor.data import splits
from compressor.lower.trace import trace
from compressor.lower.write_onnx import lower
from passes.graph.sites import find_sites

FRAMES, SIDE = 4, 16
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
PIXELS = {"image_size": SIDE, "patch_size": 8, "num_frames": FRAMES, "initializer_range": 0.4}
MODELS = {
    "VideoMAEForVideoClassification": ("VideoMAEConfig", SMALL | PIXELS | {"tubelet_size": 2}),
    "VivitForVideoClassification": ("VivitConfig", SMALL | PIXELS | {"patch_size": None, "tubelet_size": [2, 8, 8]}),
    "TimesformerForVideoClassification": ("TimesformerConfig", SMALL | PIXELS),
    "PatchTSTModel": (
        "PatchTSTConfig",
        {"context_length": 24, "num_input_channels": 3, "patch_length": 4, "patch_stride": 4, "d_model": 16}
        | {"num_attention_heads": 2, "ffn_dim": 24, "num_hidden_layers": 2},
    ),
}


def saved(folder, head, processor=True):
    name, options = MODELS[head]
    torch.manual_seed(0)
    names = {} if name == "PatchTSTConfig" else {"id2label": {0: "up", 1: "down"}, "label2id": {"up": 0, "down": 1}}
    options = {key: value for key, value in options.items() if value is not None}
    module = getattr(transformers, head)(getattr(transformers, name)(**options, **names)).eval()
    module.save_pretrained(folder)
    if processor:
        size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
        transformers.VideoMAEImageProcessor(**size).save_pretrained(folder)
    return module


@pytest.mark.parametrize(
    "head", [pytest.param(head, marks=pytest.mark.slow if "MAE" not in head else ()) for head in MODELS]
)
def test_a_file_agrees_with_transformers(tmp_path, head):
    module = saved(tmp_path, head, processor=False)
    model = models.load(tmp_path)
    graph = trace(model)
    assert find_sites(graph)
    session = onnxruntime.InferenceSession(
        str(lower(graph, model, tmp_path / "model.onnx")), providers=["CPUExecutionProvider"]
    )
    (name,) = model.inputs
    values = torch.randn(3, *model.example[name].shape[1:], generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        answer = module(**{name: values})
    expected = answer["logits" if "logits" in answer else "last_hidden_state"].numpy()
    found = session.run(None, {name: values.numpy()})[0]
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def clips(folder, count=5, frames=6):
    """Write clips that get brighter or darker, in a folder for each of the two."""
    for label, sign in (("up", 1), ("down", -1)):
        for clip in range(count):
            for frame in range(frames):
                path = folder / label / f"{clip}" / f"{frame:02d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (24, 20), (128 + sign * 15 * frame, 10 * clip, 99)).save(path)
    return folder


def test_folders_of_frames_are_prepared_by_the_processor(tmp_path):
    saved(tmp_path / "m", "VideoMAEForVideoClassification")
    model = models.load(tmp_path / "m")
    assert model.task == "video-classification"
    assert model.preprocess.video is not None
    data = splits.load(str(clips(tmp_path / "data")), model.preprocess, task=model.task, class_names=model.class_names)
    assert data.reading == "folders of frames, 2 class folders, classes by name"
    batch = next(data.test.batches(1))
    label, number = batch.ids[0].split("/")
    files = sorted((tmp_path / "data" / label / number).iterdir())
    chosen = [Image.open(files[place]) for place in (0, 2, 3, 5)]  # four of six, evenly spaced
    processor = transformers.VideoMAEImageProcessor.from_pretrained(tmp_path / "m")
    expected = processor(images=[chosen], return_tensors="pt")["pixel_values"].numpy()
    np.testing.assert_allclose(batch.feeds["pixel_values"], expected, atol=1e-6)
    assert batch.labels.tolist() == [{"up": 0, "down": 1}[label]]


def test_short_broken_and_missing_clips(tmp_path):
    saved(tmp_path / "m", "VideoMAEForVideoClassification")
    preprocess = models.load(tmp_path / "m").preprocess
    folder = clips(tmp_path / "data", 3, frames=2)
    (folder / "up" / "0" / "00.png").write_bytes(b"no image")
    data = splits.load(str(folder), preprocess, task="video-classification")
    assert [sample.id for sample in data.skipped] == ["up/0"]
    assert data.skipped[0].reason.startswith("00.png: ")
    assert "6 clips have fewer than 4" in str(data.limitations)
    (tmp_path / "empty").mkdir()
    with pytest.raises(splits.DataError, match=r"holds no videos; expected a folder of frames for each clip"):
        splits.load(str(tmp_path / "empty"), preprocess, task="video-classification")


def test_a_time_series_takes_arrays(tmp_path):
    saved(tmp_path / "m", "PatchTSTModel", processor=False)
    model = models.load(tmp_path / "m")
    assert (model.inputs, model.preprocess.kind) == (("past_values",), "tensor")
    np.save(tmp_path / "x.npy", np.zeros((4, 24, 3), np.float32))
    data = splits.load(str(tmp_path / "x.npy"), model.preprocess, task=model.task)
    assert next(data.test.batches(2)).feeds["past_values"].shape[1:] == (24, 3)
