"""The Python snippet of a model card, which loads an exported engine and runs it.

It needs neither Compressor nor torch, timm or transformers. The exception is a checkpoint, which needs transformers, or
vLLM if it lacks single branches. A GGUF file is opened by llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.choices import CTC, ENCODER_DECODER_TASKS, TEMPLATE_GAP, VISION_LANGUAGE
from compressor.report.card import markdown, preprocessing_recipe
from compressor.report.card.config_schema import read_config
from runtimes.base.encoder_decoder import DECODER_IDS, PAST
from runtimes.base.grid_positions import AXES
from runtimes.base.vision_language import (
    FACTS,
    IMAGE_TOKEN,
    MERGE,
    PIXELS,
    PLACES,
    POSITIONS,
    QUERY_IDS,
    READS_IDS,
    SIZES,
    grid_input,
    read_facts,
)

if TYPE_CHECKING:
    from jinja2 import Environment

Json = Mapping[str, Any]

EMBEDDING = "sentence_embedding"
PER_IMAGE = "logits_per_image"
TOKENS = ("input_ids", "attention_mask", "token_type_ids")
PROMPTS = 5  # of the classes, at most
TOWERS = ("decoder", "encoder")  # whose tokens give the keys of a self-attention, and of a cross-attention
VIDEOS = 5  # axes of a batch of videos
OPTIMUM = {  # the class of Optimum for the files of an encoder-decoder
    "text2text-generation": "ORTModelForSeq2SeqLM",
    "automatic-speech-recognition": "ORTModelForSpeechSeq2Seq",
    "image-to-text": "ORTModelForVision2Seq",
}
CLIPS = 5  # axes of clips: rows, frames, channels, height and width
FLOATS = ("pixel_values", "pixel_values_videos", "input_values", "input_features", "past_values")
# The model types of vision-language models whose classes in transformers.js 4.3 take the files as they are written.
JAVASCRIPT = ("llava", "idefics3", "smolvlm", "paligemma", "qwen2_vl", "qwen2_5_vl")
ENCLOSING = ("vision_start_token_id", "vision_end_token_id")  # of an image in a text, in a config
TEMPLATES = Path(__file__).parent / "templates"
# The engine file of each target that has its own format, and the packages that open it.
ENGINES = {
    "onnxruntime_fused": "model.fused.onnx",
    "onnxruntime_mobile": "model.ort",
    "openvino": "openvino_model.xml",
    "tensorrt": "model.engine",
    "tensorrt_rtx": "model.engine",
    "torch": "model.pt2",
    "executorch": "model.pte",
    "transformers": "config.json",
    "gguf": "model.gguf",
}
PACKAGES = {
    "onnxruntime": ("onnxruntime",),
    "onnxruntime_fused": ("onnxruntime",),
    "onnxruntime_mobile": ("onnxruntime",),
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt", "cuda-bindings"),
    "tensorrt_rtx": ("tensorrt-rtx-cu12", "cuda-bindings"),
    "torch": ("torch",),
    "executorch": ("executorch",),
    "transformers": ("torch", "transformers"),
    "gguf": ("xllamacpp",),
    "vllm": ("vllm",),
}
PROGRAMS = (
    "Other programs: `llama-cli -m model.gguf` or `llama-server -m model.gguf` (llama.cpp); `ollama create NAME -f "
    "Modelfile`, where the file `Modelfile` holds the line `FROM ./model.gguf` (Ollama); `lms import model.gguf` (LM "
    "Studio)."
)
GPU_ENGINES = ("tensorrt", "tensorrt_rtx")
TITLES = {
    "onnxruntime": "ONNX Runtime",
    "onnxruntime_fused": "ONNX Runtime (fused)",
    "onnxruntime_mobile": "ONNX Runtime (.ort)",
    "openvino": "OpenVINO",
    "tensorrt": "TensorRT",
    "tensorrt_rtx": "TensorRT for RTX",
    "onnxruntime_rtx": "ONNX Runtime with TensorRT for RTX",
    "torch": "PyTorch (AOTInductor)",
    "executorch": "ExecuTorch (XNNPACK)",
    "transformers": "transformers",
    "gguf": "llama.cpp",
}


@dataclass(frozen=True)
class Loader:
    """The snippet of a model card.

    Attributes:
        text: the lines of Python.
        packages: the packages that it needs.
        runtime: the target whose runtime opens the engine; ``onnxruntime`` with model.onnx if the folder does not hold
            the target's engine (yet).
        remarks: sentences on its limits.
    """

    text: str
    packages: tuple[str, ...]
    runtime: str
    remarks: tuple[str, ...]


def make_snippet(content: Json, folder: Path, engine_folder: Path | None = None) -> Loader:
    """Return the snippet for an exported folder.

    Args:
        content: its report.json.
        folder: the folder with the model's own files.
        engine_folder: the folder with the engine, if it is not in `folder` yet.
    """
    model = content["model"]
    if model["task"] in ENCODER_DECODER_TASKS:
        return _encoder_decoder(content, folder)
    if model["task"] == VISION_LANGUAGE:
        return _vision_language(content, folder)
    cached = any(name.startswith("past_key_values.") for name in model["inputs"])
    runtime = _runtime(content, folder if engine_folder is None else engine_folder, cached)
    if runtime == "transformers":
        return _served(content, folder) if serving(content) else _checkpoint(content, folder, cached)
    if runtime == "gguf":
        text = templates().get_template("load_llama_cpp.py.j2").render(file=ENGINES["gguf"])
        return Loader(text.strip(), PACKAGES["gguf"], runtime, (PROGRAMS,))
    picture = preprocessing_recipe.picture(folder) if _takes_images(content) else None
    tokenizer = preprocessing_recipe.tokenizer(folder) if "input_ids" in model["inputs"] else None
    text = _rendered(
        "load.py.j2",
        content,
        runtime=runtime.partition("_")[0],
        library=runtime,
        file=ENGINES.get(runtime, "model.onnx"),
        portable=_portable(content),
        takes=content["engine"].get("inputs", model["inputs"]),
        gives=content["engine"].get("outputs", model["outputs"]),
        caches=_caches(content),
        convolutions=any(name.startswith("past_conv.") for name in model["inputs"]),
        picture=picture,
        tokenizer=tokenizer,
        prompt=preprocessing_recipe.prompt(folder) if EMBEDDING in model["outputs"] else "",
        cached=cached,
        inputs=model["inputs"],
        arrays=_unprepared(content, folder, picture is not None, tokenizer is not None, cached),
        prompts=_prompts(content),
        padded=model.get("text_length"),
        output=answer(model["outputs"]),
        start=preprocessing_recipe.start(folder),
        ends=preprocessing_recipe.ends(folder),
        **_rules(folder),
        positions=preprocessing_recipe.positions(folder),
        decision=decision(model),
    )
    packages = ("numpy", *PACKAGES[runtime], *(("pillow",) if picture else ()), *(("tokenizers",) if tokenizer else ()))
    prepared = picture is not None or tokenizer is not None or not _prepares(content)
    remarks = _remarks(content, runtime, cached, prepared)
    return Loader(text.strip(), packages, runtime, (*remarks, *(_other_rules(folder) if cached else ())))


def _two_towers(content: Json) -> bool:
    return PER_IMAGE in content["model"]["outputs"]


def _prompts(content: Json) -> list[str]:
    """Return the first prompts of the classes of a model of images and texts, or two texts; empty for other models."""
    if not _two_towers(content):
        return []
    found = content["data"].get("prompts")
    if found is None:
        return ["a photo of a cat", "a photo of a dog"]
    return [found["template"].replace(TEMPLATE_GAP, name) for name in found["class_names"][:PROMPTS]]


def _unprepared(
    content: Json, folder: Path, pictures: bool, texts: bool, cached: bool
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return the inputs that the snippet does not prepare, with their shapes and types."""
    if not _two_towers(content):
        return {} if pictures or texts or cached else _arrays(content, folder)
    done = (*(["pixel_values"] if pictures else []), *(TOKENS if texts else []))
    return {name: array for name, array in _arrays(content, folder).items() if name not in done}


def _rendered(template: str, content: Json, **values: Any) -> str:
    """Return a template with its values and those of every engine: runtime, providers and hint of the precision."""
    settings = content["settings"]
    hint = "bf16" if settings["precision"] == "bf16" else "f32"
    shared = {"runtime": str(settings["target"]), "providers": _providers(content), "hint": hint}
    return templates().get_template(template).render(shared | values)


def _encoder_decoder(content: Json, folder: Path) -> Loader:
    """Return the snippet for the files of an encoder and its decoder: a greedy loop with all caches."""
    model, runtime = content["model"], str(content["settings"]["target"])
    timed = content["timed_inputs"]
    sources = [name for name in model["inputs"] if name != DECODER_IDS and not name.startswith(PAST)]
    arrays = {} if "input_ids" in sources else {name: (1, *timed[name][1:]) for name in sources}
    tokenizer = preprocessing_recipe.tokenizer(folder)
    text = _rendered(
        "load_encoder_decoder.py.j2",
        content,
        tokenizer=tokenizer,
        arrays=arrays,
        processor="image processor" if "pixel_values" in arrays else "feature extractor",
        prompt=(preprocessing_recipe.transcript_prompt if arrays else preprocessing_recipe.decoder_prompt)(folder),
        ends=preprocessing_recipe.ends(folder),
        **_rules(folder),
    )
    greedy = "Generation is greedy and uses the caches: the encoder runs once, and each new token is one call."
    remarks = [greedy, *_other_rules(folder)]
    if runtime == "onnxruntime":
        remarks.append(_of_optimum(content))
    packages = ("numpy", *PACKAGES[runtime], *(("tokenizers",) if tokenizer else ()))
    return Loader(text.strip(), packages, runtime, tuple(remarks))


def _vision_language(content: Json, folder: Path) -> Loader:
    """Return the snippet for the files of a vision-language model: a greedy loop for one image and a text."""
    runtime, timed = str(content["settings"]["target"]), content["timed_inputs"]
    clips = QUERY_IDS in timed and len(timed[PIXELS]) == CLIPS
    processor = preprocessing_recipe.processes_images_and_texts(folder) and not clips
    facts, config = read_facts(folder / FACTS), read_config(folder, "config.json")
    enclosing = [config[name] for name in ENCLOSING if name in config]
    arrays = {name: [1, *shape[1:]] for name, shape in timed.items() if name.startswith("pixel_")}
    if MERGE in facts:  # the file takes the patches of all images behind each other
        arrays[PIXELS] = arrays[PIXELS][1:]
    indices = any(name.endswith(".tokens") for name in content["engine"]["inputs"])  # those of --image-tokens
    text = _rendered(
        "load_vision_language.py.j2",
        content,
        processor=processor,
        image_token=facts[IMAGE_TOKEN],
        image_tokens=content["generation"]["images"],
        arrays=arrays,
        enclosing=enclosing if len(enclosing) == len(ENCLOSING) else [],
        merge=facts.get(MERGE),
        axes=timed.get(POSITIONS, ())[2:] == [AXES],
        patches=arrays[PIXELS][0 if MERGE in facts else 1],
        grid_input=grid_input(config.get("model_type", "")),
        indices=indices,
        reads_ids=READS_IDS in facts,
        sizes=SIZES in timed,
        instructed=QUERY_IDS in timed,
        columns=_columns(timed, content["generation"]["images"]),
        queries="num_query_tokens" in config,
        ends=preprocessing_recipe.ends(folder),
        **_rules(folder),
    )
    remarks = [
        "Generation is greedy and uses the cache: the vision encoder runs once, and each new token is one call of the "
        "embeddings and of the decoder.",
        *_other_rules(folder),
    ]
    if indices:
        remarks.append(
            "The decoder drops image tokens from its prompt. It reads `input_ids` to know them, and each cache of "
            "fewer tokens comes with the indices of its tokens, which go from output to input as the cache does; "
            "loops of other libraries do not pass them on."
        )
    elif READS_IDS in facts:
        remarks.append(
            "The decoder reads `input_ids` too: they tell which tokens are of an image and attend to later ones of it. "
            "transformers.js does not pass them on."
        )
    elif layout := [name for name in (SIZES, PLACES) if name in timed]:
        remarks.append(f"transformers.js has no class that passes `{layout[0]}` to the vision encoder.")
    elif runtime == "onnxruntime" and config.get("model_type") in JAVASCRIPT:
        remarks.append("transformers.js expects these files in a folder `onnx/` beside `config.json`.")
    elif runtime == "onnxruntime":
        remarks.append(f"transformers.js 4.3 has no class for `{config.get('model_type', 'this model')}`.")
    packages = ("numpy", *PACKAGES[runtime], *(("pillow", "transformers") if processor else ()))
    return Loader(text.strip(), packages, runtime, tuple(remarks))


def _rules(folder: Path) -> dict[str, list[int]]:
    """Return the tokens that the loop may not choose: at every place, and at the first one besides."""
    refused, first = preprocessing_recipe.ruled_out(folder)
    return {"refused": refused, "refused_first": first}


def _other_rules(folder: Path) -> Iterator[str]:
    """Yield a sentence on what generation_config.json asks for beyond a greedy loop."""
    names = ", ".join(map(markdown.code, preprocessing_recipe.other_rules(folder)))
    if names:
        also = f"`generate` of transformers also follows {names} of `generation_config.json`"
        yield f"{also}, so it can answer otherwise."


def _columns(timed: Mapping[str, Sequence[int]], image_tokens: int) -> int:
    """Return the columns of an image of as many patches as the timed one, a line of image tokens; 0 without places."""
    if PLACES not in timed:
        return 0
    patches = timed[PIXELS][1]
    return patches // math.isqrt(patches // image_tokens)


def _of_optimum(content: Json) -> str:
    """Return whether Optimum opens the files: it expects both caches in every layer that has any."""
    outputs = content["engine"]["outputs"]
    kinds = [[name for name in outputs if name.startswith("present.") and f".{part}." in name] for part in TOWERS]
    name = OPTIMUM[content["model"]["task"]]
    if len({len(kind) for kind in kinds}) == 1:
        return f"`optimum.onnxruntime.{name}` opens this folder too."
    return (
        f"`optimum.onnxruntime.{name}` does not open this folder: it expects as many caches of self-attentions as of "
        f"cross-attentions, and the plan left {len(kinds[0]) // 2} and {len(kinds[1]) // 2}."
    )


def _checkpoint(content: Json, folder: Path, cached: bool) -> Loader:
    """Return the snippet for a checkpoint, with the preprocessing of transformers if the folder holds it."""
    (architecture,) = read_config(folder, "config.json")["architectures"]
    inputs, outputs = content["model"]["inputs"], content["model"]["outputs"]
    colour = preprocessing_recipe.channels(folder) == 3
    picture = colour and _takes_images(content) and (folder / "preprocessor_config.json").is_file()
    tokenizer = "input_ids" in inputs and (folder / "tokenizer_config.json").is_file()
    if EMBEDDING in outputs and tokenizer:
        text = templates().get_template("load_sentence_transformers.py.j2").render()
        return Loader(text.strip(), ("sentence-transformers",), "transformers", ())
    recipe = preprocessing_recipe.tokenizer(folder)
    own = (*(("AutoImageProcessor",) if picture else ()), *(("AutoTokenizer",) if tokenizer else ()))
    text = (
        templates()
        .get_template("load_transformers.py.j2")
        .render(
            architecture=architecture,
            classes=sorted((architecture, *own)),
            picture=picture,
            tokenizer=tokenizer,
            longest=None if recipe is None else recipe.longest,
            cached=cached,
            start=preprocessing_recipe.start(folder),
            arrays={} if picture or tokenizer or cached else _arrays(content, folder),
            interpolates=content["model"].get("interpolate_pos_encoding", False),
            output="logits" if "logits" in outputs else outputs[0],
            decision=decision(content["model"]),
        )
    )
    packages = (*PACKAGES["transformers"], *(("pillow",) if picture else ()))
    return Loader(text.strip(), packages, "transformers", ())


def serving(content: Json) -> Json:
    """Return the form of a checkpoint without single branches and the verdict of each engine; empty for others."""
    found: Json = content["engine"].get("serving", {})
    return found


def _served(content: Json, folder: Path) -> Loader:
    """Return the snippet for a checkpoint without single branches: vLLM, with a class for its config."""
    found, tokenizer = serving(content), (folder / "tokenizer_config.json").is_file()
    text = (
        templates()
        .get_template("load_vllm.py.j2")
        .render(form=found["form"], tokenizer=tokenizer, start=preprocessing_recipe.start(folder))
    )
    remarks = [
        f"transformers and vLLM have no class for the config of {found['form']}, and this folder holds no code, so "
        "this code registers one. It was not run with vLLM.",
        'Without vLLM, `compressor bench .` and `compressor.models.load(".")` open the folder in torch.',
    ]
    if found["engines"].get("llama.cpp", "") is None:
        remarks.append("For llama.cpp, run its `convert_hf_to_gguf.py` on the folder.")
    return Loader(text.strip(), PACKAGES["vllm"], "vllm", tuple(remarks))


def decision(model: Json) -> str:
    """Return the Python that turns the evaluated output into what the model decides; its shape for other outputs."""
    if model.get("problem_type") == "multi_label_classification":
        return " > 0.5" if model.get("probabilities") else " > 0"  # the labels that apply
    if model.get("problem_type") == "regression":
        return ""
    if model["task"] == "image-segmentation":
        return ".argmax(1)"
    by_token = model["task"] in ("question-answering", "fill-mask", "text-generation", CTC)
    return ".argmax(-1)" if by_token or model["task"].endswith("classification") else ".shape"


def answer(outputs: list[str]) -> str:
    """Return the output that the metric evaluates, as `compressor.models` names it."""
    preferred = ("logits", EMBEDDING, "pooler_output")
    return next((name for name in preferred if name in outputs), outputs[0])


def templates() -> Environment:
    """Return the environment of this package's templates; an undefined variable in a template raises."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=False,  # Markdown and Python
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["block"] = markdown.block
    return environment


def _runtime(content: Json, folder: Path, cached: bool) -> str:
    """Return the target if the folder holds its engine, else ``onnxruntime``.

    TensorRT's engine is not used for a model with a KV cache: the snippet starts with an empty cache.
    """
    target: str = content["settings"]["target"]
    built = target in ENGINES and (folder / ENGINES[target]).is_file()
    return target if built and not (cached and target in GPU_ENGINES) else "onnxruntime"


def _caches(content: Json) -> dict[str, tuple[int, ...]]:
    """Return the shape of each cache input of the engine before the first token."""
    shapes = content["timed_inputs"]
    names = [name for name in content["engine"].get("inputs", ()) if name.startswith("past_")]
    keys = [name for name in names if name.startswith("past_key_values.")]
    return {name: (1, shapes[name][1], *((0, shapes[name][3]) if name in keys else shapes[name][2:])) for name in names}


def _portable(content: Json) -> bool:
    """Return whether the engine was built for other GPUs and versions too, at the export or later on the device."""
    exported = content["settings"].get("portable_engine", False)
    return bool(content["engine"].get("options", {}).get("portable", exported))


def _providers(content: Json) -> str:
    cuda = content["settings"]["target"] == "onnxruntime" and content["settings"]["device"] == "cuda"
    return '["CUDAExecutionProvider", "CPUExecutionProvider"]' if cuda else '["CPUExecutionProvider"]'


def _prepares(content: Json) -> bool:
    """Return whether the inputs are preprocessed images or tokenized texts."""
    return _takes_images(content) or "input_ids" in content["model"]["inputs"]


def _takes_images(content: Json) -> bool:
    """Return whether the first input is a batch of images, not of videos."""
    shape = content["timed_inputs"].get("pixel_values", ())
    return content["model"]["inputs"][:1] == ["pixel_values"] and len(shape) != VIDEOS


def _arrays(content: Json, folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return the shape, with a batch of one, and the NumPy type of each input without a preprocessing recipe."""
    configured = preprocessing_recipe.shapes(folder)
    timed = content["timed_inputs"]
    arrays: dict[str, tuple[tuple[int, ...], str]] = {}
    for name in content["model"]["inputs"]:
        default = tuple(timed.get(name, (1,))[1:]), "float32" if name in FLOATS else "int64"
        shape, dtype = configured.get(name, default)
        arrays[name] = (1, *shape), "bool_" if dtype == "bool" else dtype
    return arrays


def _remarks(content: Json, runtime: str, cached: bool, prepared: bool) -> tuple[str, ...]:
    target, remarks = content["settings"]["target"], []
    if runtime != target and content["engine"].get("state") == "deferred":
        remarks.append(
            f"The engine of {TITLES.get(target, target)} is not built yet. Until `compressor build` has run, this code "
            "opens `model.onnx` with ONNX Runtime."
        )
    elif runtime != target:
        remarks.append(f"This code opens `model.onnx` with ONNX Runtime, not the engine of {target}.")
    if runtime == "onnxruntime" and target in GPU_ENGINES and content["settings"]["precision"] == "bf16":
        remarks.append("ONNX Runtime has no bf16 kernels for the CPU, so this code needs a device that has them.")
    if runtime in GPU_ENGINES:
        remarks.append(
            f"The engine runs only on the GPU model and the {TITLES[runtime]} version that it was built with."
        )
    if cached:
        remarks.append("Generation is greedy and uses the KV cache: each new token is one decode step.")
    if content["model"]["task"] == "question-answering":
        remarks.append(
            "The code prints the first token of each answer; `end_logits` give the last. Encode a question with its "
            "context as a pair."
        )
    if _two_towers(content):
        remarks.append(
            "`vision_model.onnx` and `text_model.onnx` hold the towers alone, under the names of transformers.js; "
            "their features are not divided by their norm."
        )
    if not prepared and cached:
        remarks.append("The folder holds no tokenizer that this code can read, so it takes token ids.")
    elif not prepared:
        remarks.append("This code does not include the model's preprocessing. Pass preprocessed inputs.")
    return tuple(remarks)
