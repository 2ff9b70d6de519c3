"""The model card: README.md of an exported folder, generated from report.json and the folder's files.

The header follows the Hugging Face Hub (https://huggingface.co/docs/hub/model-cards) and is written by its client. The
module does not need torch; it imports jinja2 and huggingface_hub when it generates a card.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from compressor.choices import CTC, ENCODER_DECODER_TASKS, HUB_READING, ZERO_SHOT
from compressor.limitations import Limitation
from compressor.options import fields_of
from compressor.quality.metrics import EXPECTED_LOSS, LABEL_FREE, METRICS
from compressor.report import exact_rewrites
from compressor.report.card import preprocessing_recipe
from compressor.report.card.loader_snippet import TITLES, make_snippet, serving, templates
from compressor.report.card.markdown import code, prose
from compressor.report.collect_limitations import is_unused
from compressor.report.engine_text import describe_measurements
from compressor.report.report import REPORT, against, describe_calls
from compressor.settings import Settings
from compressor.workspace.folder_errors import name_of
from compressor.workspace.json_files import OBJECT, read_json

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

Json = Mapping[str, Any]

NAME = "README.md"
CACHES = ("past_key_values.", "past_conv.", "present.", "present_conv.")
USES = {
    "image-classification": "classifies images",
    "image-feature-extraction": "extracts features from images",
    "text-classification": "classifies texts",
    "feature-extraction": "extracts features from its inputs",
    "sentence-similarity": "embeds sentences for comparison",
    "text-generation": "generates text",
    "text2text-generation": "generates a text from a text",
    "automatic-speech-recognition": "transcribes speech",
    "token-classification": "classifies the tokens of texts",
    "question-answering": "finds the answer to a question in a text",
    "fill-mask": "fills in masked words",
    "image-segmentation": "classifies the pixels of images",
    "depth-estimation": "estimates the depth of images",
    "audio-classification": "classifies sound",
    "audio-frame-classification": "classifies the frames of sound",
    CTC: "transcribes speech",
    "video-classification": "classifies videos",
    ZERO_SHOT: "compares images with texts, such as the names of classes",
    "image-text-to-text": "generates text from an image and a text",
    "image-to-text": "writes the text of images",
    "object-detection": "finds objects in images",
    "audio-xvector": "embeds sound for comparison, such as voices",
}
ANEW = (
    "`compressor build` writes the device's figures to `report.json`, and also to this page if jinja2 and "
    "huggingface_hub are installed."
)
MEANINGS = {
    "fp16": "The engine computes in fp16, and normalisation and softmax in fp32.",
    "bf16": "The engine computes in bfloat16.",
    "fp8": "Weights and the activations they multiply are fp8 (E4M3), with activation scales from calibration data.",
    "int8": "Weights and the activations they multiply are int8, with activation ranges from calibration data.",
    "int8-dynamic": "Weights and the activations they multiply are int8, with activation ranges computed at run time.",
    "int8-weight-only": "Weights are int8, with a scale per block; so are the activations they multiply, at run time.",
    "int4": "Weights are int4, with a scale per block; the activations they multiply are rounded to int8 at run time.",
    "int2": "Weights are int2 (-2, -1, 0 or 1 times the scale of a block of 32), and need ONNX Runtime 1.27 or newer.",
}
STORED = {
    "fp16": "Matrices are stored as F16.",
    "int8": "Matrices are stored as Q8_0 (8 bits, with a scale for each 32 values).",
    "int4": "Matrices are stored as Q4_0 (4 bits, with a scale for each 32 values) or, where far closer, as Q4_1 (with "
    "an offset too), embedding and head as Q8_0.",
}
CLASSES = 10  # classes that the card names
INT4_IN_FP16 = "Weights are int4, with a scale per block; products compute in fp16, normalisation and softmax in fp32."
ONLY_STORED = "Weights are stored in {}, but no layer of the engine computes in it."
INT8 = (
    "int8 is faster on hardware with 8-bit dot products (AVX-512 VNNI, AMX, Arm's dot product, tensor cores). On other "
    "hardware it can be slower than float, so measure it there."
)


def write(folder: Path) -> None:
    """Write the card of a folder that holds all other files, including report.json."""
    content = read_json(folder / REPORT, OBJECT, remedy="export the model again")
    (folder / NAME).write_text(card(content, folder), encoding="utf-8")


def card(content: Json, folder: Path, *, engine_folder: Path | None = None) -> str:
    """Return the text of the card; it is deterministic.

    Args:
        content: report.json.
        folder: the folder with model.onnx, the engine, the config and the preprocessing files.
        engine_folder: the folder with the engine, if it is not in `folder` yet.
    """
    model, changes = content["model"], content["plan"]["changes"]
    return (
        templates()
        .get_template("card.md.j2")
        .render(
            header=_header(content, folder).to_yaml().strip(),
            title=f"{prose(model['name'])}, {'compressed' if changes else 'exported'}",
            about=_about(content),
            figures="\n".join(_rows(content)),
            conditions=list(_conditions(content)),
            changed=_changed(content),
            limits=list(_limits(content)),
            loader=make_snippet(content, folder, engine_folder),
            command=content["command"],
            actions={
                code(name, in_table=True): "removed" if action == "drop" else code(action, in_table=True)
                for name, action in changes.items()
            },
            shell=content["command"].startswith("compressor "),
            settings=_chosen(content["settings"]),
            in_memory=_in_memory(content),
        )
    )


def _chosen(settings: Json) -> dict[str, Any]:
    """Return the settings that differ from the defaults, and those that name the model, the data and the output."""
    defaults = {name: field.default for name, field in fields_of(Settings).items()}
    named = ("model", "data", "output")
    changed = [name for name in defaults if name in named or settings.get(name, defaults[name]) != defaults[name]]
    return {name: settings[name] for name in changed if settings.get(name) is not None}


def _in_memory(content: Json) -> bool:
    """Return whether the model was a module in memory, which a name cannot bring back."""
    return content["model"]["source"] == "module" and ":" not in str(content["settings"].get("model"))


def _header(content: Json, folder: Path) -> ModelCardData:
    from huggingface_hub import ModelCardData

    model, settings, results = content["model"], content["settings"], _results(content)
    base_model = None if model["random_weights"] else model.get("hub_id")
    quantized = {"base_model_relation": "quantized"} if base_model and settings["precision"] != "fp32" else {}
    tags = [
        _library(content),
        *(() if serving(content) else (settings["target"],)),
        "compressor",
        *([settings["precision"]] if settings["precision"] != "fp32" else []),
    ]
    return ModelCardData(
        base_model=base_model,
        datasets=[dataset] if (dataset := _dataset(content)) is not None else None,
        eval_results=results,
        library_name=_library(content),
        license=None if model["random_weights"] else preprocessing_recipe.licence(folder),
        metrics=[result.metric_type for result in results or ()] or None,
        model_name=f"{model['name'].rpartition('/')[2]}-compressed" if results else None,
        pipeline_tag=ENCODER_DECODER_TASKS[1] if model["task"] == CTC else model["task"],
        tags=list(dict.fromkeys([*tags, *(["pruned"] if content["plan"]["changes"] else [])])),
        ignore_metadata_errors=False,
        **quantized,
    )


def _results(content: Json) -> list[EvalResult] | None:
    """Return the quality of the result for the hub's model-index; None if no quality is stated."""
    from huggingface_hub import EvalResult

    quality = content["quality"]
    if quality is None:
        return None
    figure, dataset = quality["figures"]["result"], _dataset(content)
    return [
        EvalResult(
            task_type=content["model"]["task"],
            dataset_type=dataset or "custom",
            dataset_name=_data(content),
            dataset_split="held-out part",
            metric_type=METRICS[quality["metric"]].hub,
            metric_value=round(figure["value"], 4),
            metric_name=f"{METRICS[quality['metric']].label} (95 % interval {_span(figure)}, n = {figure['n']})",
        )
    ]


def _dataset(content: Json) -> str | None:
    """Return the id of a data set from the hub; None for other data."""
    data = content["data"]
    return data["source"].split("@")[0].split(":")[0] if data["reading"].startswith(HUB_READING) else None


def _data(content: Json) -> str:
    """Return the name of the data without its folders, which would publish paths of the author's machine."""
    source: str = content["data"]["source"]
    return _dataset(content) or ("random numbers" if content["data"]["random"] else name_of(source))


def _about(content: Json) -> str:
    model, settings = content["model"], content["settings"]
    origin, use = prose(model["name"]), USES.get(model["task"], f"performs {prose(model['task'])}")
    if model.get("hub_id"):
        origin = f"[{origin}](https://huggingface.co/{quote(model['hub_id'])})"
    weights = " Its weights are random." if model["random_weights"] else ""
    return (
        f"This folder holds {origin} as {_form(content)} for {_reader(content)} in {settings['precision']}. The model "
        f"{use}. Inputs: {_listed(model['inputs'])}. Outputs: {_listed(model['outputs'])}.{_classes(model)}{weights}"
    )


def _classes(model: Json) -> str:
    """Return a sentence with the names of the first classes and their numbers; empty for a model without names."""
    names = model.get("id2label") or {}
    if not names:
        return ""
    first = ", ".join(f"{code(name)} ({prose(number)})" for number, name in list(names.items())[:CLASSES])
    more = f" and {len(names) - CLASSES:,} more, see `id2label` in `report.json`" if len(names) > CLASSES else ""
    return f" Classes: {first}{more}."


def _library(content: Json) -> str:
    """Return the hub's name of the library that opens the exported model."""
    if content["settings"]["target"] == "gguf":
        return "gguf"
    if not _is_checkpoint(content):
        return "onnx"
    return "vllm" if serving(content) else "transformers"


def _is_checkpoint(content: Json) -> bool:
    return bool(content["settings"]["target"] == "transformers")


def _form(content: Json) -> str:
    if _library(content) == "gguf":
        return "a GGUF file"
    return "a checkpoint" if _is_checkpoint(content) else "an engine"


def _reader(content: Json) -> str:
    target = content["settings"]["target"]
    return "serving engines such as vLLM" if serving(content) else TITLES.get(target, target)


def _listed(names: list[str]) -> str:
    """List names in Markdown; the caches of a language model as one entry."""
    plain = [code(name) for name in names if not name.startswith(CACHES)]
    caches = dict.fromkeys(f"{name.split('.')[0]}.*" for name in names if name.startswith(CACHES))
    return ", ".join([*plain, *map(code, caches)])


def _rows(content: Json) -> Iterator[str]:
    """Yield the lines of the table of figures in Markdown, with 95 % intervals in brackets.

    Losses and speed-ups stand in the column of the result, one row for each variant it is compared with.
    """
    variants, quality = list(content["sizes"]), content["quality"]
    yield f"| | {' | '.join(variants)} |"
    yield f"|---|{'---:|' * len(variants)}"
    if quality is not None:
        metric = METRICS[quality["metric"]]
        label, unit, percent = metric.label, metric.unit, metric.loss_unit
        yield _row(f"{label}{f', {unit}' if unit else ''}", [_figure(quality["figures"][name]) for name in variants])
        for name in (name for name in variants if name in quality["loss"]):
            title = f"loss vs {name}{f', {percent}' if percent else ''}"
            yield _row(title, against(variants, name, _figure(quality["loss"][name], "+")))
        if "result" in quality.get("expected", {}):
            expected = _figure(quality["expected"]["result"], "+")
            yield _row(EXPECTED_LOSS, [expected if variant == "result" else "" for variant in variants])
        for other, by_variant in quality.get("further", {}).items():
            yield _row(METRICS[other].label, [_figure(by_variant[name]) for name in variants])
        for name, figure in quality["label_free"].items():
            if not (name == "agreement" and metric.compares):
                yield _row(
                    LABEL_FREE[name][0], [_figure(figure) if variant == "result" else "" for variant in variants]
                )
    if content["latency"]:
        yield _row("latency, ms (median)", [f"{content['latency'][name]['median']:.3g}" for name in variants])
        for name in (name for name in variants if name in content["speedup"]):
            speedup = content["speedup"][name]
            text = f"{speedup['ratio']:.2f}x ({speedup['low']:.2f}–{speedup['high']:.2f})"
            yield _row(f"speed-up vs {name}", against(variants, name, text))
    sizes = [content["sizes"][name] for name in variants]
    yield _row("parameters, M", [f"{size['parameters'] / 1e6:.2f}" for size in sizes])
    yield _row("multiply-adds per sample, G", [f"{size['multiply_adds'] / 1e9:.3f}" for size in sizes])
    alone = exact_rewrites.cells(content, variants)
    if alone is not None:
        yield _row(exact_rewrites.LABEL.strip(), alone)
    file = "checkpoint" if _is_checkpoint(content) else "GGUF file" if _library(content) == "gguf" else "ONNX file"
    yield _row(f"{file}, MB", [f"{size['bytes'] / 1e6:.2f}" for size in sizes])
    if any(size["cache"] for size in sizes):
        yield _row("KV cache per token, bytes", [f"{size['cache']}" for size in sizes])


def _row(title: str, cells: list[str]) -> str:
    return f"| {title} | {' | '.join(cells)} |"


def _figure(figure: Json, sign: str = "") -> str:
    return f"{figure['value']:{sign}.4g} ({_span(figure)})"


def _span(figure: Json) -> str:
    return f"{figure['low']:.4g} to {figure['high']:.4g}"


def _conditions(content: Json) -> Iterator[str]:
    """Yield the conditions of the measurements: variants, data, target and machine."""
    settings, quality, engine = content["settings"], content["quality"], content["engine"]
    yield (
        "`baseline` is the unchanged model on the same target in the same precision"
        + ("; `original` is the unchanged model in fp32." if "original" in content["sizes"] else ".")
    )
    if quality is not None:
        count = quality["figures"]["result"]["n"]
        title = METRICS[quality["metric"]].title
        yield f"Quality: {title}, on {count} test samples; brackets are 95 % bootstrap intervals."
    target = TITLES.get(settings["target"], settings["target"])
    late = engine.get("state") == "deferred"
    shapes = ", ".join(
        f"{code(name)} {shape}" for name, shape in content["timed_inputs"].items() if not name.startswith(CACHES)
    )
    inputs = describe_calls(content["generation"]) if content.get("generation") else f"inputs {shapes}"
    threads = f", {settings['threads']} threads" if settings["threads"] else ""
    if content["latency"]:
        yield (
            f"Latency: {'ONNX Runtime instead of ' if late else ''}{target}, batch {settings['batch']}{threads}, "
            f"{inputs}. The engines were timed in alternating bursts, without copies to a GPU."
        )
    if settings["device"] is not None:
        yield f"Device: {prose(settings['device'])}."
    yield prose(_machine(engine.get("environment", content["environment"])))
    yield from map(prose, describe_measurements(engine))
    if late:
        yield ANEW


def _machine(environment: Json) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    gpus = f", {', '.join(map(str, environment['gpus']))}" if environment["gpus"] else ""
    processor, cores = environment["processor"], environment["cores"]
    return f"Measured on {processor} ({cores} cores{gpus}), {environment['platform']}; {packages}."


def _changed(content: Json) -> str:
    plan, sites = content["plan"], len(content["model"].get("sites", ()))
    healed, settings = content["healed"], content["settings"]
    total = f" of {sites}" if sites else ""
    lines = [f"{len(plan['changes'])}{total} residual branches were changed (rule {code(plan['rule'])})."]
    if settings["precision"] != "fp32":
        unused = is_unused(settings["precision"], content["engine"])
        lines.append(ONLY_STORED.format(settings["precision"]) if unused else _meaning(content))
    if healed is not None:
        how = prose(f"{healed['method']}: {healed['note']}")
        lines.append(f"The remaining weights were adapted without labels ({how}).")
    return " ".join(lines)


def _meaning(content: Json) -> str:
    precision = content["settings"]["precision"]
    if content["settings"]["target"] == "gguf":
        return STORED[precision]
    halved = precision == "int4" and content["precision"]["result"].get("rest") == "fp16"
    return INT4_IN_FP16 if halved else MEANINGS[precision]


def _limits(content: Json) -> Iterator[str]:
    """Yield the intended use, the data of the evaluation, the limitations and the notes."""
    data, quality, settings = content["data"], content["quality"], content["settings"]
    yield "The model has the same intended and excluded uses as the original model."
    if quality is None:
        reason = prose(content["no_quality_because"])
        yield f"No quality is stated, because {reason}. Evaluate the model before you use it."
    else:
        decision = data["sizes"].get("decision")
        fresh = "" if decision is None else f" and the decision how much of it stays ({decision} samples)"
        yield (
            f"Quality was measured on {quality['figures']['result']['n']} test samples of "
            f"{prose(_data(content))} ({prose(data['reading'])}). "
            f"Calibration ({data['sizes']['calibration']} samples) and the choice of the plan "
            f"({data['sizes']['validation']} samples){fresh} used other samples. The loss on other data can be larger, "
            "so measure it on yours."
        )
        if METRICS[quality["metric"]].compares:
            yield "No labels were used: the figure is the closeness to the original model, not the accuracy."
    if settings["precision"] in ("int8", "int8-dynamic"):
        yield INT8
    if settings["target"] == "onnxruntime" or content["engine"].get("state") == "deferred":
        yield "The ONNX file contains no preprocessing: preprocess its inputs as for the original model."
    generation = content.get("generation")
    if content["latency"] and generation and not generation["new"]:
        yield "Latency is that of prefill with an empty KV cache; decode was not timed."
    for limitation in content.get("limitations", ()):
        yield prose(str(Limitation(**limitation)))
    yield from map(prose, content["notes"])
