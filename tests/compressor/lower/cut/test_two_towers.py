"""The files of the towers compute what transformers' own classes of one tower compute."""

import functools

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers

from compressor import models
from compressor.internals.transformers import quiet
from compressor.lower.cut.two_towers import TEXT, VISION, TowerError, cut_towers
from compressor.lower.fold_graph import fold_graph
from compressor.lower.trace import trace
from compressor.lower.write_onnx import lower
from compressor.quantize.half_precision import to_fp16
from passes.base import apply
from passes.graph.sites import find_sites
from passes.rewrite.drop import Drop
from tests.two_towers import END, KINDS, NAMES, SIZE, saved

TOLERANCE = 2e-5  # of the largest value: float32 in ONNX Runtime and torch


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("two_towers")


def feeds(inputs, images, texts, tokens=7):
    """Images and texts, whose last text is padded."""
    generator = np.random.default_rng(images + texts)
    ids = generator.integers(1, END, (texts, tokens))
    mask = np.ones_like(ids)
    ids[:, -1] = END
    ids[-1, 4], ids[-1, 5:], mask[-1, 5:] = END, 0, 0
    pixels = generator.standard_normal((images, 3, SIZE, SIZE)).astype(np.float32)
    return {name: {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask}[name] for name in inputs}


def without(module, sites):
    """The module with branches that are zero: the oracle of a dropped branch."""
    for site in sites:
        branch = module.get_submodule(site)
        last = branch.out_proj if hasattr(branch, "out_proj") else branch.fc2
        for parameter in last.parameters():
            torch.nn.init.zeros_(parameter)
    return module


def run(path, values):
    session = onnxruntime.InferenceSession(str(path))
    names = [value.name for value in session.get_outputs()]
    given = {value.name: values[value.name] for value in session.get_inputs()}
    return dict(zip(names, session.run(None, given), strict=True))


def close(found, expected):
    expected = expected.detach().numpy()
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


@functools.cache
def whole_file(kind, folder):
    """A model, CLIP and SigLIP without a branch of each tower: the module with zeros there, and its ONNX file."""
    model = models.load(str(saved(kind, folder)))
    graph = trace(model)
    sites = [site.name for site in find_sites(graph)]
    towers = [name.split(".")[0] for name in sites]
    assert towers == sorted(towers, reverse=True)  # those of vision_model, then those of text_model
    assert len(set(towers)) == 2
    dropped = (sites[0], sites[-1]) if kind in ("clip", "siglip") else ()
    apply(Drop(dropped), graph)
    path = lower(fold_graph(graph), model, folder / f"{kind}.onnx")
    return model, without(model.module, dropped), path


@pytest.mark.parametrize(
    "kind", ["clip", "siglip", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[2:])]
)
def test_batches_of_images_and_texts_are_independent(kind, shared):
    model, module, path = whole_file(kind, shared)
    for images, texts in ((1, 5), (4, 1), (3, 3)):
        values = feeds(model.inputs, images, texts)
        with torch.no_grad():
            expected = module(**{name: torch.from_numpy(value) for name, value in values.items()})
        found = run(path, values)
        assert found["logits_per_image"].shape == (images, texts)
        for name in model.outputs:
            close(found[name], expected[name])


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_towers_are_those_of_transformers(kind, shared, tmp_path):
    model, module, path = whole_file(kind, shared)
    projected = hasattr(module, "text_projection")
    files = cut_towers(path, tmp_path, projected=projected)
    assert [file.name for file in files] == [VISION, TEXT] == ["vision_model.onnx", "text_model.onnx"]
    with quiet():
        module.save_pretrained(tmp_path / "zeroed")
    values = feeds(model.inputs, 2, 3)
    ending = "ModelWithProjection" if projected else "Model"
    for file, tower, embeds in zip(files, ("Vision", "Text"), ("image_embeds", "text_embeds"), strict=True):
        with quiet():
            own = getattr(transformers, f"{NAMES[kind]}{tower}{ending}").from_pretrained(tmp_path / "zeroed").eval()
        output = embeds if projected else "pooler_output"
        names = ("pixel_values",) if tower == "Vision" else model.inputs[1:]
        with torch.no_grad():
            expected = own(**{name: torch.from_numpy(values[name]) for name in names})[output]
        onnx.checker.check_model(str(file), full_check=True)
        assert [value.name for value in onnx.load(file).graph.input] == list(names)
        found = run(file, values)
        assert list(found) == [output]
        close(found[output], expected)
    sizes = [file.stat().st_size for file in (*files, path)]
    assert sizes[0] + sizes[1] < 1.1 * sizes[2]  # no tower holds the weights of the other


def test_a_file_in_half_precision_gives_float_features(shared, tmp_path):
    model, _, path = whole_file("clip", shared)
    graph = onnx.load(path).graph
    names = [*(name for node in graph.node for name in node.output), *(value.name for value in graph.input)]
    to_fp16(path, tmp_path / "half.onnx", dict.fromkeys(names, 1.0))
    _, text = cut_towers(tmp_path / "half.onnx", tmp_path, projected=True)
    values = feeds(model.inputs, 2, 3)
    features = run(text, values)["text_embeds"]
    assert features.dtype == np.float32
    expected = run(tmp_path / "half.onnx", values)["text_embeds"]
    unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
    assert np.abs(unit - expected).max() < 2e-3  # half precision
    assert np.abs(features - unit).max() > 0.1


def test_embeddings_that_are_no_quotient_are_refused(shared, tmp_path):
    model = onnx.load(whole_file("clip", shared)[2])
    (node,) = [node for node in model.graph.node if "image_embeds" in node.output]
    node.op_type = "Mul"
    path = tmp_path / "other.onnx"
    onnx.save(model, path)
    with pytest.raises(TowerError, match=r"vision_model\.onnx cannot be cut: image_embeds is computed by Mul"):
        cut_towers(path, tmp_path, projected=True)
