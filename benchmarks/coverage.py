"""Export every architecture of transformers with a small random model, and hold each file to transformers itself.

    python benchmarks/coverage.py [--only NAME ...] [--seconds 150]

Each configuration class is reduced to a few narrow layers by the names of its fields, and saved as a checkpoint with
random weights, with the default preprocessor of its class where it has one, and a small tokenizer for texts. It is
then loaded, traced and written as `compressor export FOLDER --data FILES` does, with images, clips or texts of several
lengths, and the first output of the ONNX file is compared with that of the transformers class on the same files.
Without a preprocessor it is exported as with `--data random`, and run at another batch size and another length than
those of the trace, with and without padding. The outcomes are:

- passes: the file agrees with transformers; with an option, if the refusal without it names the option;
- refused: the command ended with a sentence, which is recorded;
- fault: a traceback, a wrong output, or an input of the class that the file lacks without a limitation that says so;
- not built: the class cannot be made from the reduced configuration, which says nothing about Compressor.

Results are in benchmarks/results/coverage.json; `python benchmarks/tables.py` writes the table.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from preprocessors import Preprocessor, preprocessor_of, write_inputs
from real_inputs import pairs_of
from small_configs import small_fields

Judge = Callable[[str, Path], dict[str, Any]]

RESULTS = Path(__file__).parent / "results" / "coverage.json"
HEADS = (
    "MASKED_LM",
    "CAUSAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "IMAGE_CLASSIFICATION",
    "IMAGE_TEXT_TO_TEXT",
    "SEQUENCE_CLASSIFICATION",
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "AUDIO_CLASSIFICATION",
    "CTC",
    "OBJECT_DETECTION",
    "DEPTH_ESTIMATION",
    "SEMANTIC_SEGMENTATION",
    "",
    "TEXT_TO_WAVEFORM",  # Musicgen; without a head, only its decoder
)
# Classes whose small random convolutions give all candidates one score, depths and sound of 1e-8, or no features.
TIED = ("dfine", "deim", "ppdoclayout", "promptdepth", "align", "edgetam", "vibevoiceacoustic")
GENERATION = "text-generation"  # of texts alone, by the class itself
LAYOUTS = ("image_grid_thw", "image_sizes", "image_position_ids")  # inputs of images that vary in size
ARRAYS = "pass a .npz with them"  # of the refusal of files for a model whose inputs must be arrays
ATTENTION = "attn_implementation"  # field of config.json
EAGER = f'write "{ATTENTION}": "eager" into its config.json'  # advice of a refusal
PAST = ("past_key_values.", "past_conv.")  # inputs that transformers makes itself
LARGEST = 64_000_000  # parameters; a larger one was not reduced
TARGETS = 7  # tokens of a target
CLOSE = 1e-3  # of the largest output
ROWS, LENGTH = 3, 11
VANISHING = 0.1  # largest scale of RT-DETR's normalisations: all its features are 1e-9, and all scores are equal
LETTERS = 128  # of CANINE, which reads characters and states no vocabulary
SAMPLES, FRAMES = 6_000, 48  # of sound: a waveform and a spectrogram
OF_SOUND = {"input_values": SAMPLES, "input_features": FRAMES, "noise_sequence": FRAMES}
# Of a model that is exported for one length; another one than that of the example of Compressor.
ONE_LENGTH = {"tokens": 24, "samples": 9_600, "frames": 48}


@dataclass(frozen=True)
class Real:
    """A preprocessor, and the files that it prepares: what `--data` takes."""

    preprocessor: Preprocessor
    data: Path


def class_of(config: Any) -> Any:
    """Return the class that users load a configuration with: that of its first head in `HEADS`.

    A class of a part, such as the language model of Llama 4 alone, is left out: it is listed for the whole
    configuration too, but cannot be built from it. So is the decoder of an encoder-decoder alone, such as Marian's.

    Raises:
        ValueError: no automatic class of transformers opens it.
    """
    from transformers.models.auto import modeling_auto

    parts = (getattr(config, "sub_configs", None) or {}).values()
    joined = getattr(config, "is_encoder_decoder", False)
    for head in HEADS:
        if joined and head == "CAUSAL_LM":
            continue
        mapping = getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING" if head else "MODEL_MAPPING")
        found = mapping.get(type(config), ())
        for each in found if isinstance(found, tuple | list) else (found,):
            if each.config_class not in parts:
                return each
    raise ValueError("part of another model: no automatic class opens it")


def small_model(model_type: str) -> Any:
    """Return a small model of an architecture with random weights."""
    import torch
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class: Any = CONFIG_MAPPING[model_type]
    config = config_class(**small_fields(config_class))
    _complete(config)
    with torch.device("meta"):
        parameters = sum(each.numel() for each in class_of(config)(config).parameters())
    if parameters > LARGEST:
        raise ValueError(f"not reduced: {parameters:,} parameters")
    torch.manual_seed(0)
    module = class_of(config)(config).eval()
    _distinguish(module)
    return module


def _distinguish(module: Any) -> None:
    """Replace the weights of a random model that make the candidates of a top-k equal, which then have no order."""
    import torch

    for name, weight in module.named_parameters():
        if weight.ndim > 1 and not weight.any():  # AFMoE's router
            torch.nn.init.normal_(weight, std=0.02)
        if name.endswith("quantizer.project_in.weight"):  # of states of 0.003, which are all rounded to one code
            torch.nn.init.normal_(weight, std=100.0)
    for name, codes in module.named_buffers():
        if name.endswith("codebook.embed") and not codes.any():  # codecs take them from their training
            torch.nn.init.normal_(codes)
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d) and part.weight.abs().max() < VANISHING:
            torch.nn.init.ones_(part.weight)
        kinds = (torch.nn.Conv2d, torch.nn.Conv1d, torch.nn.ConvTranspose1d)
        if isinstance(part, kinds) and type(module).__name__.lower().startswith(TIED):
            torch.nn.init.kaiming_normal_(part.weight)  # its small ones leave features of 1e-12, and equal scores


def _complete(config: Any) -> None:
    """State what checkpoints state: tokens of a decoder, the padding of ESM, and a language."""
    if getattr(config, "is_encoder_decoder", False):
        for name, token in (("decoder_start_token_id", 2), ("pad_token_id", 1), ("eos_token_id", 2)):
            if getattr(config, name, None) is None:
                setattr(config, name, token)
    if getattr(config, "token_dropout", None) is not None and config.pad_token_id is None:  # ESM
        config.pad_token_id, config.mask_token_id = 1, 3
    if getattr(config, "default_language", "") is None:
        config.default_language = config.languages[0]


def judged(model_type: str, folder: Path) -> dict[str, Any]:
    """Return the outcome of one architecture."""
    try:
        module = small_model(model_type)
        module.save_pretrained(folder / "model")
    except Exception as error:  # any error of transformers: the reduced configuration is none that it can take
        return {"outcome": "not built", "detail": _sentence(error)}
    kind = {"class": type(module).__name__, "parameters": sum(each.numel() for each in module.parameters())}
    preprocessor = _suitable(module)
    if preprocessor is not None:
        preprocessor = preprocessor.saved(folder / "model")
    real = None if preprocessor is None else Real(preprocessor, write_inputs(preprocessor, module.config, folder))
    found = other = kind | _exported(module, folder, {}, real)
    options, changes = list[str](), dict[str, Any]()
    while (way := _way_round(other)) is not None and way[0] not in options:
        options.append(way[0])
        changes |= way[1]
        if (attention := changes.pop(ATTENTION, None)) is not None:
            module = _with_attention(module, folder, attention)
        headless = changes.get("task", GENERATION) != GENERATION
        other = _exported(_headless(folder) if headless else module, folder, changes, real)
        if other["outcome"] in ("passes", "fault"):  # what a refusal advises must not end in a fault either
            return {**kind, **other, "option": " ".join(options)}
    return found


def _exported(module: Any, folder: Path, changes: dict[str, Any], real: Real | None) -> dict[str, Any]:
    """Return the outcome of a checkpoint on files, or on arrays if its refusal of files asks for them.

    ViTMAE takes noise beside images, and a transducer (Parakeet) a token beside sound.
    """
    if real is not None:
        found = _exported_on(module, folder, changes, real)
        if ARRAYS not in found.get("detail", ""):
            return {"preprocessor": ", ".join(real.preprocessor.names)} | found
    return _exported_on(module, folder, changes, None)


def _suitable(module: Any) -> Preprocessor | None:
    """Return the default preprocessor of a model; None without one, or if it cannot be made by default."""
    try:
        return preprocessor_of(module)
    except Exception:  # any error of transformers, such as a field without a default, or a package that is missing
        return None


def _way_round(found: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Return the option that a refusal names, and the settings that it stands for; None without one."""
    if found["outcome"] != "refused":
        return None
    one = re.search(r"pass (--no-cache )?--sequence-length N to export it for N (\w+) alone", found["detail"])
    if one is not None:
        changes = {"cache": False} if one[1] else {}
        return f"{one[1] or ''}--sequence-length N", changes | {"sequence_length": ONE_LENGTH[one[2]]}
    if "pass --no-cache" in found["detail"]:
        return "--no-cache", {"cache": False}
    if EAGER in found["detail"]:
        return "attn_implementation in config.json", {ATTENTION: "eager"}
    task = re.search(r"pass --task (\S+) to export", found["detail"])
    return None if task is None else (f"--task {task[1]}", {"task": task[1]})


def _with_attention(module: Any, folder: Path, attention: str) -> Any:
    """Write a kind of attention into the config of a checkpoint; return the model as transformers loads it then."""
    file = folder / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {ATTENTION: attention}))
    return type(module).from_pretrained(folder / "model").eval()


def _headless(folder: Path) -> Any:
    """Return the model of a checkpoint without its head, as transformers loads it."""
    import transformers

    return transformers.AutoModel.from_pretrained(folder / "model").eval()


def _exported_on(module: Any, folder: Path, changes: dict[str, Any], real: Real | None) -> dict[str, Any]:
    """Load, trace and write a checkpoint as an export with some other settings does, and compare the file."""
    from compressor.lower.fold_graph import fold_graph
    from compressor.lower.traced_model import load
    from compressor.lower.write_onnx import lower
    from compressor.settings import Settings
    from compressor.workspace.progress import Steps

    data = "random" if real is None else str(real.data)
    settings = Settings(model=str(folder / "model"), data=data, samples=12, drop="none", tokens="none", **changes)
    try:
        subject = load(settings, Steps(None))
        path = lower(fold_graph(subject.graph), subject.model, folder / "model.onnx")
    except Exception as error:
        return refusal(error)
    found = {"task": subject.model.task, "sites": len(subject.sites)}
    said = [str(each) for each in (*subject.model.limitations, *subject.data.limitations)]
    if real is not None:
        return found | {"limitations": said} | compared_with_files(module, path, subject, real)
    several = any("arrays by the names of the inputs" in each for each in said)
    names = subject.model.inputs
    if hasattr(subject.model.call, "arguments"):  # a vision encoder for images of one size
        return found | {"limitations": said} | compared_of_one_size(module, path, subject.model)
    reads_tokens = any(name.endswith("input_ids") for name in names)  # also those of a decoder
    if names[0] == "pixel_values" and len(names) > 1 and not reads_tokens and not several:
        return found | {"limitations": said} | compared_alone(module, path, subject.model)
    if any(name in names for name in LAYOUTS):
        return found | {"limitations": said} | compared_with_varying_images(module, path, subject.model)
    placeholders = placeholders_of(subject.model)
    return found | {"limitations": said} | compared(module, path, placeholders)


def compared_with_files(module: Any, path: Path, subject: Any, real: Real) -> dict[str, Any]:
    """Compare the file with the class of transformers on the files that were the data."""
    found: dict[str, Any] = {"inputs": [name for name in subject.model.inputs if not name.startswith(PAST)]}
    pairs = pairs_of(module, path, subject, real.preprocessor, real.data)
    return found | _outcome(_relative(module, value, expected) for value, expected in pairs)


def _outcome(differences: Iterable[float]) -> dict[str, Any]:
    """Return the outcome of comparing a file with transformers, and the largest of the differences."""
    try:
        worst = max(differences)
    except Exception as error:
        return {"outcome": "fault", "detail": f"the file cannot be compared: {_sentence(error)}"}
    if not worst <= CLOSE:
        return {"difference": worst, "outcome": "fault", "detail": f"differs from transformers by {worst:.1e}"}
    return {"difference": worst, "outcome": "passes", "detail": ""}


def _relative(module: Any, value: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference of two outputs, relative to the largest value; candidates have no order."""
    if value.shape != expected.shape:
        raise ValueError(f"the output has shape {value.shape}, expected {expected.shape}")
    if type(module).__name__.endswith("ForObjectDetection"):  # a top-k has no order of equal candidates
        value, expected = np.sort(value, 1), np.sort(expected, 1)
    return float(np.abs(value - expected).max() / np.abs(expected).max().clip(1e-6))


def refusal(error: Exception) -> dict[str, Any]:
    """Return the outcome of an export that stopped: a sentence, or what a user would see as a traceback."""
    from compressor.errors import CompressorError
    from passes.base import PassError

    if isinstance(error, CompressorError | PassError):
        return {"outcome": "refused", "detail": _sentence(error)}
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{'/'.join(Path(last.filename).parts[-3:])}:{last.lineno}"
    return {"outcome": "fault", "detail": f"traceback: {_sentence(error)} ({place})"}


def placeholders_of(model: Any) -> list[int]:
    """Return the placeholders of the image of the example, tokens that stand for it; none for other models."""
    token = model.preprocess.image_token
    return [] if token is None else [each for each in model.example["input_ids"][0].tolist() if each == token]


def compared(module: Any, path: Path, placeholders: Sequence[int] = ()) -> dict[str, Any]:
    """Compare the file with the class of transformers at another batch size and length, with and without padding."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    inputs = {each.name: each for each in session.get_inputs()}
    found: dict[str, Any] = {"inputs": [name for name in inputs if not name.startswith(PAST)]}
    paddings = (False, True) if "attention_mask" in inputs else (False,)
    return found | _outcome(_difference(module, session, inputs, padded, placeholders) for padded in paddings)


def compared_with_varying_images(module: Any, path: Path, model: Any) -> dict[str, Any]:
    """Compare the file of a model whose images vary in size with its class, on three images of the example's two sizes.

    Their texts are longer than those of the example, with padding.
    """
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    found: dict[str, Any] = {"inputs": [name for name in names if not name.startswith(PAST)]}
    example, rng = model.preprocess.example, np.random.default_rng(5)
    rows = {name: example[name][[1, 0, 1]] for name in model.preprocess.inputs}
    token, mask = model.preprocess.image_token, rows["attention_mask"]
    vocabulary = module.config.get_text_config().vocab_size
    texts = rng.integers(10, vocabulary, (len(mask), LENGTH))  # those below are of images and of sound
    rows["input_ids"] = np.concatenate([texts * (texts != token), rows["input_ids"]], 1)
    rows["attention_mask"] = np.concatenate([np.ones_like(texts), mask], 1)
    feeds = model.preprocess.complete(rows)
    (value,) = session.run(["logits"], {name: feeds[name] for name in names})
    tensors = {name: torch.from_numpy(each) for name, each in rows.items()}
    is_image = tensors["input_ids"] == token
    arguments = model.call.__self__.images.arguments(tensors, is_image)
    if "mm_token_type_ids" in _parameters(module):  # as processors return for a prompt
        arguments["mm_token_type_ids"] = is_image.long()
    with torch.inference_mode():
        expected = module(**arguments).logits.float().numpy()
    kept = rows["attention_mask"].astype(bool)
    return found | _outcome([float(np.abs(value - expected)[kept].max() / np.abs(expected[kept]).max().clip(1e-6))])


def compared_alone(module: Any, path: Path, model: Any) -> dict[str, Any]:
    """Compare the file of a vision model whose images vary in size with its class, on three images of two sizes."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    rows = {name: each[[1, 0, 1]] for name, each in model.preprocess.example.items()}
    (value,) = session.run([model.answer], rows)
    expected, counts = _of_images(module, rows, model.answer, value.shape[1])
    kept = value if counts is None else np.concatenate([row[:size] for row, size in zip(value, counts, strict=True)])
    difference = float(np.abs(kept - expected).max() / np.abs(expected).max().clip(1e-6))
    return {"inputs": list(rows)} | _outcome([difference])


def compared_of_one_size(module: Any, path: Path, model: Any) -> dict[str, Any]:
    """Compare the file of a vision encoder for images of one size with its class, on three images that it packs."""
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    images, (shape,) = model.call, [each.shape for each in session.get_inputs()]
    pixels = np.random.default_rng(5).standard_normal([ROWS, *shape[1:]]).astype(np.float32)
    (value,) = session.run([model.answer], {"pixel_values": pixels})
    joined = np.concatenate(pixels, -1 if shape[1] == 1 else 0)  # MiniCPM-V has its patches in a row
    sizes = {name: torch.tensor(each * ROWS) for name, each in images.arguments.items()}
    with torch.inference_mode():
        expected = module(torch.from_numpy(joined), **sizes)[model.answer].numpy().reshape(value.shape)
    difference = float(np.abs(value - expected).max() / np.abs(expected).max().clip(1e-6))
    return {"inputs": ["pixel_values"]} | _outcome([difference])


def _of_images(
    module: Any, rows: dict[str, np.ndarray], answer: str, longest: int
) -> tuple[np.ndarray, list[int] | None]:
    """Return the output of a vision model for images in rows, and how many features of each row count; None for all.

    The features of all images stand behind each other where the model has no axis of rows.
    """
    import torch

    from compressor.models.pretrained.patches import features_of, grid_argument
    from compressor.models.vision_language.padded_rows import own_states
    from compressor.models.vision_language.patch_grids import without_padding

    tensors = {name: torch.from_numpy(each) for name, each in rows.items()}
    with torch.inference_mode():
        if "image_sizes" in rows:
            counts = (rows["image_sizes"] // module.config.patch_size).prod(1).tolist()
            return own_states(module, tensors).numpy(), counts
        if "pixel_position_ids" in rows:  # one feature for each square of patches
            patches = (rows["pixel_position_ids"] != -1).all(-1).sum(1)
            return own_states(module, tensors).numpy(), (patches // module.config.pooling_kernel_size**2).tolist()
        if "image_grid_thw" not in rows:
            return module(**tensors)[answer].numpy(), None
        pixels, grids = tensors.values()
        own = module(without_padding(pixels, grids), **{str(grid_argument(module)): grids})
    merged = pixels.shape[1] // longest
    return features_of(own)[1].numpy(), (grids.prod(1) // merged).tolist()


def _difference(module: Any, session: Any, inputs: dict[str, Any], padded: bool, placeholders: Sequence[int]) -> float:
    """Return the largest difference of the first output, relative to its largest value, at tokens that count."""
    import torch

    from compressor.models.several_inputs import nested, with_codes, with_itself
    from compressor.models.text.probe import call_without_cache

    feeds = _feeds(module, inputs, padded, placeholders)
    own = {name: torch.from_numpy(feeds[name]) for name in feeds if not name.startswith(PAST)}
    accepted = set(_parameters(module))
    if placeholders and "token_type_ids" in accepted:  # as processors return for a prompt
        is_image = (own["input_ids"] == placeholders[0]).long()
        own["token_type_ids"] = is_image * (module.config.model_type == "gemma3")
    given = {name: value for name, value in nested(own).items() if name in accepted}
    codes = given.get("decoder_input_ids")
    given = with_codes(module.config, given) if codes is not None and codes.ndim > 2 else given
    with torch.inference_mode():  # with a cache, FSMT does not mask later tokens, and Bamba without attention fails
        answer, _ = call_without_cache(module, **given)
    name = session.get_outputs()[0].name
    expected = answer[name] if name in answer else next(iter(answer.values()))
    (value,) = session.run([name], feeds)
    expected = expected[0] if isinstance(expected, list | tuple) else expected
    if expected.shape[:2] == (ROWS, ROWS) != value.shape[:2]:  # all pairs of rows, of which the file has its own
        expected = with_itself(expected)
    if codes is not None and codes.ndim > 2:
        expected = expected.unflatten(0, codes.shape[:2])
    expected = expected.float().numpy()
    if value.shape != expected.shape:
        raise ValueError(f"output {name} has shape {value.shape}, expected {expected.shape}")
    mask = feeds.get("attention_mask")
    if mask is not None and value.shape[:2] == mask.shape:
        value, expected = value[mask.astype(bool)], expected[mask.astype(bool)]
    return _relative(module, value, expected)


def _feeds(module: Any, inputs: dict[str, Any], padded: bool, placeholders: Sequence[int]) -> dict[str, np.ndarray]:
    """Return random inputs of `ROWS` rows and, of texts, `LENGTH` tokens, two of one row being padding if `padded`.

    The placeholders of an image stand before the tokens of its text.
    """
    rng = np.random.default_rng(5)
    length = len(placeholders) + LENGTH
    if "input_ids" in inputs and isinstance(inputs["input_ids"].shape[1], int):
        length = inputs["input_ids"].shape[1]
    mask = np.ones((ROWS, length), np.int64)
    if padded:
        mask[1, -2:] = 0
    vocabulary = _vocabulary(module) if "input_ids" in inputs else 0
    sound = any(name.startswith(("input_values", "input_features")) for name in inputs)
    feeds: dict[str, np.ndarray] = {}
    for name, each in inputs.items():
        sizes = [size if isinstance(size, int) else None for size in each.shape]
        if name == "input_ids":
            ids = rng.integers(5, vocabulary, (ROWS, length))
            ids[np.isin(ids, placeholders)] = 4
            ids[:, : len(placeholders)] = placeholders
            feeds[name] = np.where(mask == 1, ids, getattr(_texts_of(module.config), "pad_token_id", None) or 0)
        elif name == "attention_mask":
            frames = sizes[1] or length  # of sound, a fixed number
            feeds[name] = np.pad(mask[:, -min(length, frames) :], ((0, 0), (max(0, frames - length), 0)), mode="edge")
        elif name == "position_ids":
            feeds[name] = np.maximum(mask.cumsum(1) - 1, 0)[:, -(sizes[1] or length) :]  # of the last token alone
        elif name == "flattened_patches":  # with row and column before the values, in rows of four
            count = np.arange(length)
            places = np.stack([count // 4 + 1, count % 4 + 1], -1)
            values = rng.standard_normal([ROWS, length, sizes[2] - 2])
            patches = np.concatenate([np.broadcast_to(places, (ROWS, length, 2)), values], -1)
            feeds[name] = (patches * mask[..., None]).astype(np.float32)
        elif name == "token_type_ids":
            feeds[name] = np.zeros((ROWS, length), np.int64)
        elif name == "decoder_input_ids":
            targets = [ROWS, *(size or TARGETS for size in sizes[1:])]
            feeds[name] = rng.integers(5, _texts_of(module.config, decoder=True).vocab_size, targets)
        elif name.startswith(PAST):
            feeds[name] = np.zeros([ROWS, *(0 if size is None else size for size in sizes[1:])], np.float32)
        elif each.type in ("tensor(bool)", "tensor(int64)"):  # masks of images and of sound
            kind = bool if each.type == "tensor(bool)" else np.int64
            long = 2 if "pixel" in name else FRAMES if sound else length
            filled = np.zeros if name.endswith("_padding") else np.ones  # 1 where a time series is padded
            feeds[name] = filled([ROWS, *(long if size is None else size for size in sizes[1:])], kind)
        else:
            long = OF_SOUND.get(name, 2 if placeholders else LENGTH)
            feeds[name] = rng.standard_normal([ROWS, *(size or long for size in sizes[1:])]).astype(np.float32)
    return feeds


def _vocabulary(module: Any) -> int:
    """Return the number of tokens that a model knows; of one with a language model as a part (PI0), that of it."""
    own = getattr(_texts_of(module.config), "vocab_size", None)
    if own is None and hasattr(module.config, "vlm_config"):
        return int(module.get_input_embeddings().weight.shape[0])
    return int(own or LETTERS)


def _texts_of(config: Any, *, decoder: bool | None = None) -> Any:
    """Return the config of the texts of a model; one that joins an encoder of texts and a decoder of sound has two."""
    if hasattr(config, "text_encoder") and hasattr(config, "decoder"):
        return config.decoder if decoder else config.text_encoder
    found = config.get_text_config(decoder=decoder)
    return found if hasattr(found, "vocab_size") else getattr(found, "text_config", found)  # CLAP's has only parts


def _parameters(module: Any) -> list[str]:
    import inspect

    return list(inspect.signature(module.forward).parameters)


def _sentence(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].replace(tempfile.gettempdir(), "TMP")[:2000]


def _run(judge: Judge, name: str, sent: Any) -> None:
    """Judge an architecture in a process of its own, which may crash or hang."""
    warnings.simplefilter("ignore")
    os.environ["TRANSFORMERS_VERBOSITY"] = "critical"
    with tempfile.TemporaryDirectory() as folder, Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        sent.send(judge(name, Path(folder)))


def in_process(judge: Judge, name: str, seconds: float) -> dict[str, Any]:
    """Judge an architecture within a time limit."""
    context = multiprocessing.get_context("fork")
    received, sent = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(judge, name, sent))
    start = time.perf_counter()
    process.start()
    sent.close()
    found: dict[str, Any] = {"outcome": "fault", "detail": f"not finished after {seconds:g} s"}
    if received.poll(seconds):
        try:
            found = received.recv()
        except EOFError:
            found = {"outcome": "fault", "detail": "the process ended without a word"}
    process.kill()
    process.join()
    return found | {"seconds": round(time.perf_counter() - start, 1)}


def judge_all(
    names: Iterable[str], judge: Judge, rows: dict[str, Any], seconds: float, *, again: bool
) -> Iterator[str]:
    """Judge each name, enter it in `rows` and yield it; names that `rows` has are skipped unless `again`."""
    for name in names:
        if name in rows and not again:
            continue
        outcome = rows[name] = in_process(judge, name, seconds)
        click.echo(f"{name}: {outcome['outcome']} {outcome['detail'][:200]} ({outcome['seconds']} s)", err=True)
        yield name
    click.echo(Counter(each["outcome"] for each in rows.values()))


@click.command()
@click.option("--only", multiple=True, help="Name of an architecture, repeatable.  [default: all]")
@click.option("--again", is_flag=True, help="Also judge architectures that are in the results already.")
@click.option("--seconds", default=150.0, show_default=True, help="Time limit of one architecture.")
def main(only: tuple[str, ...], again: bool, seconds: float) -> None:
    """Judge the architectures and write the results."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    import compressor.api  # imported before the processes start, so that each does not import it again  # noqa: F401
    from compressor.data.splits import shuffled
    from compressor.models import transformers as loader  # noqa: F401

    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"architectures": {}}
    found["transformers"] = transformers.__version__
    names = list(CONFIG_MAPPING)
    drawn = only or [names[place] for place in shuffled(names, 0)]  # a run that ends early is a random draw
    rows = found["architectures"]
    for _ in judge_all(drawn, judged, rows, seconds, again=again or bool(only)):
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
