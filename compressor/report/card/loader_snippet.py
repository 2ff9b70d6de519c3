"""A few lines of Python that load an exported engine and run it without Compressor, torch, timm or transformers.

A checkpoint is the exception: it is run by transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.report.card import preprocessing_recipe

if TYPE_CHECKING:
    from jinja2 import Environment

Json = Mapping[str, Any]

TEMPLATES = Path(__file__).parent / "templates"
# What lies in the folder where a target has an engine of its own, and the packages that open it.
ENGINES = {
    "onnxruntime_fused": "model.fused.onnx",
    "onnxruntime_mobile": "model.ort",
    "openvino": "openvino_model.xml",
    "tensorrt": "model.engine",
    "torch": "model.pt2",
    "executorch": "model.pte",
    "transformers": "config.json",
}
PACKAGES = {
    "onnxruntime": ("onnxruntime",),
    "onnxruntime_fused": ("onnxruntime",),
    "onnxruntime_mobile": ("onnxruntime",),
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt", "cuda-bindings"),
    "torch": ("torch",),
    "executorch": ("executorch",),
    "transformers": ("torch", "transformers"),
}
TITLES = {
    "onnxruntime": "ONNX Runtime",
    "onnxruntime_fused": "ONNX Runtime (fused)",
    "onnxruntime_mobile": "ONNX Runtime (.ort)",
    "openvino": "OpenVINO",
    "tensorrt": "TensorRT",
    "torch": "PyTorch (AOTInductor)",
    "executorch": "ExecuTorch (XNNPACK)",
    "transformers": "transformers",
}


@dataclass(frozen=True)
class Loader:
    """The lines, what they need installed, and what has to be said about them.

    `runtime` opens the engine; that is ONNX Runtime with model.onnx where the target's engine is not there (yet).
    """

    text: str
    packages: tuple[str, ...]
    runtime: str
    remarks: tuple[str, ...]


def loader(content: Json, folder: Path) -> Loader:
    """The lines for an exported folder.

    Args:
        content: its report.json.
        folder: where the engine and the model's own files lie.
    """
    model = content["model"]
    cached = any(name.startswith("past_key_values.") for name in model["inputs"])
    runtime = _runtime(content, folder, cached)
    if runtime == "transformers":
        return _checkpoint(content, folder, cached)
    picture = preprocessing_recipe.picture(folder) if model["inputs"][:1] == ["pixel_values"] else None
    tokenizer = preprocessing_recipe.tokenizer(folder) if "input_ids" in model["inputs"] else None
    text = (
        templates()
        .get_template("load.py.j2")
        .render(
            runtime=runtime.partition("_")[0],
            file=ENGINES.get(runtime, "model.onnx"),
            providers=_providers(content),
            portable=_portable(content),
            hint="bf16" if content["settings"]["precision"] == "bf16" else "f32",
            takes=content["engine"].get("inputs", model["inputs"]),
            gives=content["engine"].get("outputs", model["outputs"]),
            caches=_caches(content),
            picture=picture,
            tokenizer=tokenizer,
            cached=cached,
            inputs=model["inputs"],
            arrays={} if picture or tokenizer or cached else _arrays(content, folder),
            output=answer(model["outputs"]),
            start=preprocessing_recipe.start(folder),
            ends=preprocessing_recipe.ends(folder),
            classifies=answer(model["outputs"]) == "logits" and not cached,
        )
    )
    needed = ("numpy", *PACKAGES[runtime], *(("pillow",) if picture else ()), *(("tokenizers",) if tokenizer else ()))
    prepared = picture is not None or tokenizer is not None or not _prepares(content)
    return Loader(text.strip(), needed, runtime, _remarks(content, runtime, cached, prepared))


def _checkpoint(content: Json, folder: Path, cached: bool) -> Loader:
    """The lines that open a checkpoint: those of transformers, with its own preprocessing where the folder has it."""
    (architecture,) = json.loads((folder / "config.json").read_text())["architectures"]
    inputs, outputs = content["model"]["inputs"], content["model"]["outputs"]
    picture = "pixel_values" in inputs and (folder / "preprocessor_config.json").is_file()
    tokenizer = "input_ids" in inputs and (folder / "tokenizer_config.json").is_file()
    own = (*(("AutoImageProcessor",) if picture else ()), *(("AutoTokenizer",) if tokenizer else ()))
    text = (
        templates()
        .get_template("load_transformers.py.j2")
        .render(
            architecture=architecture,
            classes=sorted((architecture, *own)),
            picture=picture,
            tokenizer=tokenizer,
            cached=cached,
            start=preprocessing_recipe.start(folder),
            arrays={} if picture or tokenizer or cached else _arrays(content, folder),
            output="logits" if "logits" in outputs else outputs[0],
        )
    )
    needed = (*PACKAGES["transformers"], *(("pillow",) if picture else ()))
    return Loader(text.strip(), needed, "transformers", ())


def answer(outputs: list[str]) -> str:
    """The output that quality is judged by, as `compressor.models` names it."""
    wanted = ("logits", "sentence_embedding", "pooler_output")
    return next((name for name in wanted if name in outputs), outputs[0])


def templates() -> Environment:
    """The templates of this package; a value that a template names and nobody gives is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=False,  # Markdown and Python
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _runtime(content: Json, folder: Path, cached: bool) -> str:
    """The target where its engine lies in the folder; a cache that begins empty is not tried with TensorRT."""
    target: str = content["settings"]["target"]
    there = target in ENGINES and (folder / ENGINES[target]).is_file()
    return target if there and not (cached and target == "tensorrt") else "onnxruntime"


def _caches(content: Json) -> dict[str, tuple[int, int]]:
    """Heads and width of each cache that the engine takes."""
    taken = content["engine"].get("inputs", ())
    shapes = content["timed_inputs"]
    return {name: (shapes[name][1], shapes[name][3]) for name in taken if name.startswith("past_key_values.")}


def _portable(content: Json) -> bool:
    """Whether the engine was built for other GPUs and versions too, when it was exported or later on the device."""
    asked = content["settings"].get("portable_engine", False)
    return bool(content["engine"].get("options", {}).get("portable", asked))


def _providers(content: Json) -> str:
    cuda = content["settings"]["target"] == "onnxruntime" and content["settings"]["device"] == "cuda"
    return '["CUDAExecutionProvider", "CPUExecutionProvider"]' if cuda else '["CPUExecutionProvider"]'


def _prepares(content: Json) -> bool:
    """Whether the inputs are made of something else: pictures or texts."""
    return content["model"]["inputs"][:1] == ["pixel_values"] or "input_ids" in content["model"]["inputs"]


def _arrays(content: Json, folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape, with a batch of one, and type of inputs that are given as they are."""
    known = preprocessing_recipe.shapes(folder)
    timed = content["timed_inputs"]
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for name in content["model"]["inputs"]:
        guessed = tuple(timed.get(name, (1,))[1:]), "float32" if name == "pixel_values" else "int64"
        shape, kind = known.get(name, guessed)
        found[name] = (1, *shape), "bool_" if kind == "bool" else kind
    return found


def _remarks(content: Json, runtime: str, cached: bool, prepared: bool) -> tuple[str, ...]:
    target, found = content["settings"]["target"], []
    if runtime != target and content["engine"].get("state") == "deferred":
        found.append(
            f"{TITLES.get(target, target)}'s engine is not built yet: until `compressor build` has run, these lines "
            "open `model.onnx` with ONNX Runtime."
        )
    elif runtime != target:
        found.append(f"These lines open `model.onnx` with ONNX Runtime, not the engine of {target}.")
    if runtime == "tensorrt":
        found.append("The engine runs only on the kind of GPU and the TensorRT version that it was built with.")
    if cached:
        found.append("The prompt's keys and values are kept, so that each further token is computed alone (greedy).")
    if not prepared and cached:
        found.append("The folder holds no tokenizer that these lines could read, so they take token ids.")
    elif not prepared:
        found.append("The model's own preprocessing is not repeated here: give inputs that are prepared as it asks.")
    return tuple(found)
