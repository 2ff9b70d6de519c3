"""Vision encoders that read the sizes of images in Python: the file computes what their class does for one size."""

import pickle

import numpy as np
import onnxruntime
import pytest
import torch
import transformers

from compressor import models
from compressor.lower.fold_graph import fold_graph
from compressor.lower.traced_model import load
from compressor.lower.write_onnx import lower
from compressor.models import ModelError
from compressor.settings import Settings
from compressor.workspace.progress import Steps
from tests.compressor.models.pretrained.test_heads import saved
from tests.varying_images import PATCH

CLOSE = 1e-5  # relative; sums in another order
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "patch_size": PATCH}
HEADS = {"num_attention_heads": 4}
WIDE, HIGH = (8, 12), (6, 4)  # in patches: that of the example, and one that is asked for
# Config, the arguments that hold the size of an image of some patches, and the pixels of one.
ENCODERS = {
    "a convolution that merges patches": (
        {"model_type": "hunyuan_vl_vision", **SMALL, **HEADS, "max_image_size": 32, "text_hidden_size": 16},
        lambda high, wide: {"grid_thw": [1, high, wide]},
        lambda patches: (patches, 3 * PATCH**2),
    ),
    "convolutions between attentions": (
        {
            "model_type": "lfm3_vl_vision", **SMALL, **HEADS, "num_key_value_heads": 2,
            "layer_types": ["conv", "full_attention"],
        },
        lambda high, wide: {"grid_thw": [1, high, wide]},
        lambda patches: (patches, 2 * 3 * PATCH**2),
    ),
    "positions that are resized": (
        {"model_type": "cosmos3_edge_vision", **SMALL, **HEADS, "num_patches": 16},
        lambda high, wide: {"grid_thw": [1, high, wide]},
        lambda patches: (patches, 3 * PATCH**2),
    ),
    "features that are resized": (
        {"model_type": "video_llama_3_vision", **SMALL, **HEADS},
        lambda high, wide: {"grid_thw": [1, high, wide], "merge_sizes": 1},
        lambda patches: (patches, 3 * PATCH**2),
    ),
    "a class token of each image": (
        {"model_type": "inkling2_vision", **SMALL, **HEADS, "posemb_grid_size": 4, "text_hidden_size": 16},
        lambda high, wide: {"image_grid_thw": [1, high // 2, wide // 2]},
        lambda patches: (patches // 4, 2 * PATCH, 2 * PATCH, 3),
    ),
    "patches in one row of pixels": (
        {
            "model_type": "minicpm_ocr_vision", **SMALL, **HEADS, "image_size": 32, "insert_layer_id": 0,
        },
        lambda high, wide: {"target_sizes": [high, wide]},
        lambda patches: (1, 3, PATCH, PATCH * patches),
    ),
}  # fmt: skip


def encoder(name):
    kind, *others = ENCODERS[name]
    torch.manual_seed(0)
    fields = dict(kind)
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    return transformers.AutoModel.from_config(config).eval(), *others


def own_features(module, answer, rows, sizes):
    """What the class computes for images that it reads together, [images, features, width]."""
    joined = torch.cat(list(rows), -1 if rows.shape[1] == 1 else 0)
    given = {name: torch.tensor([size] * len(rows)) for name, size in sizes.items()}
    with torch.inference_mode():
        found = module(joined, **given)[answer]
    return found.reshape(len(rows), -1, found.shape[-1]).numpy()


@pytest.mark.parametrize("size", [WIDE, HIGH], ids=["size of the example", "size that is asked for"])
@pytest.mark.parametrize("name", [*ENCODERS])
def test_the_file_computes_what_the_class_does(name, size, tmp_path):
    module, sizes, shape = encoder(name)
    asked = None if size == WIDE else "x".join(str(PATCH * each) for each in size)
    folder = saved(module, tmp_path / "m")
    subject = load(
        Settings(model=str(folder), data="random", drop="none", tokens="none", image_size=asked), Steps(None)
    )
    model, patches = subject.model, size[0] * size[1]
    lower(fold_graph(subject.graph), model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    rows = torch.randn(3, *shape(patches), generator=torch.Generator().manual_seed(1))
    (found,) = session.run([model.answer], {"pixel_values": rows.numpy()})
    expected = own_features(module, model.answer, rows, sizes(*size))
    assert np.abs(found - expected).max() <= CLOSE * np.abs(expected).max()
    (said,) = (each.reason for each in model.limitations if each.feature == "image size")
    assert f"only images of {size[0] * PATCH} x {size[1] * PATCH} pixels" in said
    assert len(subject.sites) == 4
    assert all("layers." in site.name for site in subject.sites)


def test_a_model_of_one_size_can_be_sent_to_another_process(tmp_path):
    module, *_ = encoder("convolutions between attentions")
    model = models.load(saved(module, tmp_path / "m"))
    (pixels,) = model.example.values()
    with torch.inference_mode():
        found = pickle.loads(pickle.dumps(model.call))(module, pixels)[0]
        assert torch.equal(found, model.call(module, pixels)[0])


REFUSED = {
    "no multiple of a patch": ((30, 32), r"--image-size \(30, 32\), but .* multiples of a patch of 4 pixels"),
    "any size": ("dynamic", r"--image-size dynamic, but .* takes images of one size"),
    "no multiple of what is merged": ((12, 12), r"is a Lfm3VlVisionModel, which .*invalid for input of size"),
}


@pytest.mark.parametrize("name", [*REFUSED])
def test_sizes_that_the_encoder_does_not_take_are_refused(name, tmp_path):
    size, said = REFUSED[name]
    folder = saved(encoder("convolutions between attentions")[0], tmp_path / "m")
    with pytest.raises(ModelError, match=said):
        models.load(folder, image_size=size)


def test_images_that_influence_each_other_are_refused(tmp_path, monkeypatch):
    """What several images compute must be what each does alone."""
    from compressor.models.one_size import one_grid

    folder = saved(encoder("convolutions between attentions")[0], tmp_path / "m")
    own = one_grid.run_rows
    monkeypatch.setattr(one_grid, "run_rows", lambda one, module, rows: own(one, module, rows) + rows.mean())
    with pytest.raises(ModelError, match=r"several images of \[96, 96\] have other features than each alone"):
        models.load(folder)
