"""The size of images: that of the preprocessing, a requested one, or dynamic; and the channels of the model."""

import json

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import transformers
from PIL import Image
from timm.data import create_transform

from compressor import models
from compressor.choices import parse_image_size
from compressor.data import splits as data
from compressor.errors import SettingsError
from compressor.lower.trace import images_of, trace
from compressor.lower.write_onnx import lower
from compressor.models import ModelError
from compressor.models.image_size import unused_pixels
from compressor.settings import Settings
from tests.architectures import VIT
from tests.paths import ROOT

SMALL = {"patch_size": 16, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TOLERANCE = 1e-5  # float32 sums in another order
DEIT = ROOT.parent / "shared/data/deit_tiny_patch16_224"
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))


def saved(folder, kind, config, processor=None):
    torch.manual_seed(0)
    getattr(transformers, kind)(config).eval().save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return folder


def vit(folder, processor=None, **options):
    return saved(
        folder, "ViTForImageClassification", transformers.ViTConfig(image_size=64, **(SMALL | options)), processor
    )


def limits(model):
    return {each.feature: each.reason for each in model.limitations}


def outputs(model, size, path):
    """Return the outputs of the ONNX file for an image of a size, and the image."""
    lower(trace(model), model, path)
    feeds = {name: value.numpy() for name, value in images_of(model, size).items()}
    return onnxruntime.InferenceSession(str(path)).run(None, feeds)[0], torch.from_numpy(feeds["pixel_values"])


PROCESSORS = {
    "vit": transformers.ViTImageProcessor(size={"height": 32, "width": 48}),
    "crop": transformers.BitImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}),
    "crop of a share": transformers.ConvNextImageProcessor(size={"shortest_edge": 32}),
}


@pytest.mark.parametrize("processor", [None, transformers.BitImageProcessor(crop_size={"height": 64, "width": 64})])
def test_a_config_without_a_size_is_not_said_to_have_one(tmp_path, processor):
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    saved(tmp_path, "ResNetForImageClassification", transformers.ResNetConfig(**sizes), processor)
    stated = limits(models.load(tmp_path))
    assert "image size of the config" not in stated
    used = "224 is assumed" if processor is None else "64 x 64 is used"
    assert stated["image_size of the config"] == f"the config does not specify it, so {used}"


@pytest.mark.parametrize("image_size", [None, (48, 32), (64, 64)])
@pytest.mark.parametrize("name", PROCESSORS)
def test_pictures_have_the_size_of_the_processor_or_the_requested_one(tmp_path, name, image_size):
    vit(tmp_path, PROCESSORS[name])
    if name == "crop of a share" and image_size == (48, 32):
        image_size = (48, 48)  # this processor gives squares only
    model = models.load(tmp_path, image_size=image_size)
    own = (32, 48) if name == "vit" else (32, 32)
    size = own if image_size is None else image_size
    assert model.example["pixel_values"].shape == (2, 3, *size)
    assert model.preprocess.image(PHOTO).shape == (3, *size)
    assert ("image size of the config" in limits(model)) == (size != (64, 64))
    if image_size is None:
        wanted = transformers.AutoImageProcessor.from_pretrained(tmp_path)(PHOTO, return_tensors="np")["pixel_values"][
            0
        ]
        np.testing.assert_array_equal(model.preprocess.image(PHOTO), wanted)
        stated = limits(model)["image size of the config"]
        assert stated.startswith(f"the config has 64 x 64 pixels and the image processor gives {own[0]} x {own[1]}")
    out = tmp_path / "out"
    out.mkdir()
    model.save(out)
    again = transformers.AutoImageProcessor.from_pretrained(out)
    np.testing.assert_array_equal(again(PHOTO, return_tensors="np")["pixel_values"][0], model.preprocess.image(PHOTO))


FOLLOWING = {
    "detr": transformers.DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}),
    "mask2former": transformers.Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}),
    "dpt": transformers.DPTImageProcessor(
        size={"height": 64, "width": 64}, keep_aspect_ratio=True, ensure_multiple_of=16
    ),
}


@pytest.mark.parametrize("image_size", [None, (96, 32)])
@pytest.mark.parametrize("name", FOLLOWING)
def test_all_images_get_one_size_where_the_processor_keeps_their_proportions(tmp_path, name, image_size):
    """As detectors do; the exported folder has a processor of that size."""
    vit(tmp_path / "m", FOLLOWING[name])
    model = models.load(tmp_path / "m", image_size=image_size)
    size = (64, 64) if image_size is None else image_size
    for shape in ((40, 50), (50, 40), (200, 60)):
        assert model.preprocess.image(Image.new("RGB", shape)).shape == (3, *size)
    assert "to which all images are resized" in limits(model)["proportions of the images"]
    (tmp_path / "out").mkdir()
    model.save(tmp_path / "out")
    again = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    np.testing.assert_array_equal(again(PHOTO, return_tensors="np")["pixel_values"][0], model.preprocess.image(PHOTO))


def test_a_processor_without_a_size_leaves_the_export_that_of_the_config(tmp_path):
    """GLPN's rounds each side down to a multiple of 32, so the size of no image is that of the model."""
    vit(tmp_path, transformers.GLPNImageProcessor())
    model = models.load(tmp_path)
    assert model.example["pixel_values"].shape == (2, 3, 64, 64)
    assert "cannot be set to 64 x 64 pixels" in limits(model)["proportions of the images"]
    assert models.load(tmp_path, image_size=(96, 64)).example["pixel_values"].shape == (2, 3, 96, 64)
    for number, side in enumerate((70, 64, 90)):
        Image.new("RGB", (side, 66)).save(tmp_path / f"{number}.png")
    assert data.load(str(tmp_path), model.preprocess, task=model.task).test.ids
    Image.new("RGB", (120, 66)).save(tmp_path / "3.png")
    with pytest.raises(data.DataError, match="or resize the images where it keeps their sizes"):
        data.load(str(tmp_path), model.preprocess, task=model.task)


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_position_embeddings_are_interpolated_as_transformers_does(tmp_path, kind):
    """DINOv2 interpolates by itself, ViT if it is told to."""
    if kind == "vit":
        vit(tmp_path / "m", PROCESSORS["crop"])
    else:
        config = transformers.Dinov2Config(image_size=64, **SMALL)
        saved(tmp_path / "m", "Dinov2ForImageClassification", config, PROCESSORS["crop"])
    model = models.load(tmp_path / "m")
    assert model.interpolates == (kind == "vit")
    found, image = outputs(model, (32, 32), tmp_path / "m.onnx")
    option = {"interpolate_pos_encoding": True} if kind == "vit" else {}
    original = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "m").eval()
    with torch.no_grad():
        wanted = original(image, **option).logits
    np.testing.assert_allclose(found, wanted.numpy(), atol=TOLERANCE)
    with pytest.raises(ModelError, match=r"cannot take images of 8 x 8 pixels \(.+\); give another --image-size"):
        models.load(tmp_path / "m", image_size=(8, 8))


def test_timm_resamples_position_embeddings_of_another_size(tmp_path):
    torch.manual_seed(0)
    options = VIT | {"num_classes": 5, "depth": 1}
    original = timm.create_model("vit_tiny_patch16_224", **options)
    torch.save(original.state_dict(), tmp_path / "pytorch_model.bin")
    config = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 5}
    content = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": config, "model_args": options}
    (tmp_path / "config.json").write_text(json.dumps(content))
    model = models.load(tmp_path, image_size=(48, 64))
    original.set_input_size((48, 64))
    images = model.example["pixel_values"]
    with torch.no_grad():
        torch.testing.assert_close(model.call(model.module, images)[0], original.eval()(images))
    transform = create_transform(input_size=(3, 48, 64), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic")
    np.testing.assert_array_equal(model.preprocess.image(PHOTO), transform(PHOTO).numpy())
    assert "is 48 x 64, which is used" in limits(model)["image size of the config"]
    out = tmp_path / "out"
    out.mkdir()
    model.save(out)
    again = models.load(out, random_weights=True)
    assert again.preprocess.example["pixel_values"].shape == (2, 3, 48, 64)


def test_height_and_width_are_dynamic(tmp_path):
    vit(tmp_path / "m", PROCESSORS["crop"])
    model = models.load(tmp_path / "m", image_size="dynamic")
    assert model.preprocess.example["pixel_values"].shape == (2, 3, 32, 32)
    assert model.dynamic_axes == {"pixel_values": {0: "batch", 2: "height", 3: "width"}}
    lower(trace(model), model, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    original = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "m").eval()
    for size in ((32, 32), (64, 64), (80, 48)):  # that of the processor, that of the config, and another
        image = images_of(model, size)["pixel_values"]
        with torch.no_grad():
            wanted = original(image, interpolate_pos_encoding=True).logits
        found = session.run(None, {"pixel_values": image.numpy()})[0]
        np.testing.assert_allclose(found, wanted.numpy(), atol=TOLERANCE)
    assert limits(model)["image size"].startswith("height and width are dynamic; checked at 32 x 32, ")


def test_a_model_of_one_size_is_not_dynamic():
    with pytest.raises(
        ModelError, match=r"does not take images of other sizes than 224 x 224 \(.+\); give --image-size"
    ):
        models.load("mixer_s16_224", random_weights=True, image_size="dynamic")


@pytest.mark.parametrize("channels", [1, 4, 12])
@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_models_of_other_channels(tmp_path, library, channels):
    mean = [0.1 * number for number in range(1, channels + 1)]
    if library == "timm":
        config = {"input_size": [channels, 32, 32], "mean": mean, "std": [0.5] * channels, "interpolation": "bilinear"}
        content = {
            "architecture": "vit_tiny_patch16_224",
            "pretrained_cfg": config | {"crop_pct": 1.0},
            "model_args": VIT | {"in_chans": channels},
        }
        (tmp_path / "config.json").write_text(json.dumps(content))
    else:
        processor = transformers.ViTImageProcessor(
            size={"height": 32, "width": 32}, image_mean=mean, image_std=[0.5] * channels
        )
        vit(tmp_path, processor, num_channels=channels)
    model = models.load(tmp_path, random_weights=True)
    bands = np.random.default_rng(0).random((channels, 32, 32), dtype=np.float32)  # the size of the model: no resizing
    wanted = (bands - np.array(mean, np.float32)[:, None, None]) / 0.5
    np.testing.assert_allclose(model.preprocess.image(bands), wanted, atol=1e-5)  # the processor scales by 1 / 255
    if channels == 1:
        found = model.preprocess.image(Image.new("L", (50, 40), 51))
        np.testing.assert_allclose(found[:, 16, 16], (0.2 - np.array(mean)) / 0.5, atol=1e-5)


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_mean_and_deviation_fit_the_channels_or_are_refused(tmp_path, library):
    def load(mean):
        if library == "timm":
            config = {"input_size": [1, 32, 32], "mean": mean, "std": [0.5] * 3}
            options = VIT | {"in_chans": 1}
            content = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": config, "model_args": options}
            (tmp_path / "config.json").write_text(json.dumps(content))
        else:
            processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=mean)
            vit(tmp_path, processor, num_channels=1)
        return models.load(tmp_path, random_weights=True)

    equal = load([0.5, 0.5, 0.5])
    assert equal.preprocess.image(PHOTO.convert("L")).shape == (1, 32, 32)
    assert "used for all 1 channels" in limits(equal)["normalization of the images"]
    refused = load([0.4, 0.5, 0.6])
    assert refused.preprocess.image is None
    assert "has 3 values of mean or standard deviation and the model takes 1 channels" in refused.preprocess.no_image


def test_sizes_are_parsed_and_refused_in_one_sentence():
    assert parse_image_size(" 96x160 ") == (96, 160)
    assert Settings(image_size=64).pixels == (64, 64)
    for wrong in ("0", "12x", "big", "-3", "1.5"):
        with pytest.raises(SettingsError, match="expected pixels such as 224, HEIGHTxWIDTH"):
            Settings(image_size=wrong)
    with pytest.raises(SettingsError, match="dynamic with --target executorch"):
        Settings(image_size="dynamic", target="executorch")
    with pytest.raises(ModelError, match="--image-size is for image models of timm and transformers"):
        models.load(torch.nn.Linear(4, 4), example_inputs=torch.zeros(2, 4), image_size=(8, 8))


@pytest.mark.slow
@pytest.mark.skipif(not DEIT.is_dir(), reason="the real DeiT-Tiny is not here")
def test_the_real_deit_at_another_size(tmp_path):
    model = models.load(DEIT, image_size=(160, 128))
    found, image = outputs(model, (160, 128), tmp_path / "m.onnx")
    wanted = timm.create_model(f"local-dir:{DEIT}", pretrained=True, dynamic_img_size=True).eval()
    with torch.no_grad():
        expected = wanted(image).numpy()
    # timm interpolates in `forward` as it does while it loads the weights
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


class Patches(torch.nn.Module):
    """A convolution into patches of 16 pixels, with or without padding of the last patch, or without a gradient."""

    def __init__(self, kind="floored"):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.patches = kind, torch.nn.Conv2d(3, 4, 16, 16)

    def forward(self, x):
        if self.kind == "dead for this image":
            edge = torch.relu(x[:, :, 64:] - 1.0).mean((1, 2, 3), keepdim=True)
            return self.patches(x).mean((2, 3)) + edge.flatten(1)
        if self.kind == "padded":
            x = torch.nn.functional.pad(x, (0, -x.shape[3] % 16, 0, -x.shape[2] % 16))
        with torch.set_grad_enabled(self.kind != "without gradient"):
            return self.patches(x).mean((2, 3)) * (0.0 if self.kind == "zero" else 1.0)


@pytest.mark.parametrize("size", [(64, 64), (70, 64), (64, 79), (95, 65)])
def test_pixels_that_patches_leave_out_are_said(size):
    """The oracle: other values in these rows and columns leave the output as it is, and one more row changes it."""
    module, pixels = Patches(), torch.rand(1, 3, *size)
    height, width = (side // 16 * 16 for side in size)
    changed = pixels.clone()
    changed[:, :, height:], changed[:, :, :, width:] = 9.0, 9.0
    assert torch.equal(module(pixels), module(changed))
    changed[:, :, height - 1 :] = 9.0
    assert not torch.equal(module(pixels), module(changed))
    reasons = [each.reason for each in unused_pixels(lambda module, x: (module(x),), module, 3, size)]
    first = f"of {size[0]} x {size[1]} pixels, only the first {height} x {width} change the output"
    assert [reason.partition(";")[0] for reason in reasons] == [first] * (size != (height, width))


@pytest.mark.parametrize("kind", ["padded", "zero", "without gradient", "dead for this image"])
def test_nothing_is_said_of_pixels_that_are_used_or_unknown(kind):
    assert list(unused_pixels(lambda module, x: (module(x),), Patches(kind), 3, (70, 70))) == []


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_an_image_size_that_is_no_multiple_of_the_patch_is_a_limitation(tmp_path, library):
    if library == "timm":
        torch.manual_seed(0)
        module = timm.create_model("vit_tiny_patch16_224", **VIT | {"img_size": 32, "num_classes": 3})
        with torch.no_grad():
            module.head.weight.add_(1.0)  # timm starts it near zero
        timm.models.save_for_hf(module, tmp_path, model_args=VIT | {"img_size": 32, "num_classes": 3})
    else:
        vit(tmp_path)
    patch = VIT["patch_size"] if library == "timm" else 16
    side = 2 * patch + 3
    found = limits(models.load(tmp_path, image_size=(side, 3 * patch)))
    assert found["pixels at the edge"].startswith(
        f"of {side} x {3 * patch} pixels, only the first {2 * patch} x {3 * patch} change the output; "
    )
    assert "pixels at the edge" not in limits(models.load(tmp_path, image_size=(2 * patch, 3 * patch)))


@pytest.mark.parametrize("library", ["timm", "timm, another network", "transformers"])
def test_a_model_whose_own_size_is_no_multiple_of_its_patch_is_a_limitation(tmp_path, library):
    """The preprocessing and the config agree on such a size, and no option asks for it."""
    if library == "transformers":
        saved(tmp_path, "ViTForImageClassification", transformers.ViTConfig(image_size=39, **SMALL))
        used = "39 x 39 pixels, only the first 32 x 32"
    else:
        name, sizes = ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [4, 4, 4, 4]})
        if library == "timm":
            name, sizes = "vit_tiny_patch16_224", VIT | {"img_size": 2 * VIT["patch_size"] + 3}
        side, patch = (50, 4) if name == "convnext_atto" else (sizes["img_size"], VIT["patch_size"])
        torch.manual_seed(0)
        module = timm.create_model(name, num_classes=3, **sizes)
        module.pretrained_cfg = {"input_size": (3, side, side), "architecture": name}
        with torch.no_grad():
            module.get_classifier().weight.add_(1.0)  # timm starts it near zero
        timm.models.save_for_hf(module, tmp_path, model_args=sizes)
        used = f"{side} x {side} pixels, only the first {side // patch * patch} x {side // patch * patch}"
    assert limits(models.load(tmp_path))["pixels at the edge"].startswith(f"of {used} change the output; ")


@pytest.mark.parametrize("name", ["convit_tiny", "efficientvit_m0"])
def test_a_module_that_keeps_tensors_of_a_call_computes_as_before(name):
    """Both keep relative positions, in a buffer and in a dict; a call with shapes alone must not replace them."""
    model = models.load(name, random_weights=True)
    images = torch.rand(1, *model.example[model.inputs[0]].shape[1:], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        (found,) = model.call(model.module, images)
    expected = timm.create_model(name).eval()
    expected.load_state_dict(model.module.state_dict())
    assert type(found) is torch.Tensor
    torch.testing.assert_close(found, expected(images))


def sam2():
    backbone = {
        "hidden_size": 8, "embed_dim_per_stage": [8, 16, 32, 64], "num_attention_heads_per_stage": [1, 1, 2, 2],
        "blocks_per_stage": [1, 1, 1, 1], "image_size": [128, 128], "global_attention_blocks": [],
        "model_type": "sam2_hiera_det_model",
    }  # fmt: skip
    sizes = [[32, 32], [16, 16], [8, 8]]
    return transformers.Sam2VisionConfig(
        backbone_config=backbone, backbone_channel_list=[64, 32, 16, 8], backbone_feature_sizes=sizes, fpn_hidden_size=8
    )


def test_without_processor_the_size_is_that_of_the_backbone(tmp_path):
    """The feature sizes of SAM 2 fit that size alone."""
    whole = {
        "vision_config": sam2().to_dict(),
        "prompt_encoder_config": {"hidden_size": 8, "image_size": 128, "patch_size": 16},
        "mask_decoder_config": {"hidden_size": 8, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 8},
    }
    for folder, kind, config in (
        ("vision", "Sam2VisionModel", sam2()),
        ("whole", "Sam2Model", transformers.Sam2Config(**whole)),
    ):
        model = models.load(saved(tmp_path / folder, kind, config))
        assert model.example["pixel_values"].shape == (2, 3, 128, 128)
        assert "image_size of the config" not in limits(model)


def test_positions_that_a_model_caches_keep_their_values(tmp_path):
    """RT-DETR keeps its positions under lru_cache; the check of a size with shapes alone left some without elements."""
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.RTDetrConfig(
        backbone_config=backbone, d_model=16, encoder_hidden_dim=16, encoder_in_channels=[8, 16, 16],
        encoder_ffn_dim=16, encoder_attention_heads=2, decoder_in_channels=[16] * 3, decoder_ffn_dim=16,
        decoder_layers=1, decoder_attention_heads=2, num_queries=8, num_denoising=0, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.RTDetrForObjectDetection(config).save_pretrained(tmp_path)
    transformers.RTDetrImageProcessor(size={"height": 96, "width": 96}).save_pretrained(tmp_path)
    model = models.load(tmp_path)
    images = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = model.call(model.module, images), model.module(images)
    torch.testing.assert_close(found[0], expected.logits)
    assert type(found[0]) is torch.Tensor
