"""The model card: README.md of an exported folder, made of report.json and of what lies in the folder.

The header is the hub's (https://huggingface.co/docs/hub/model-cards), written by its own client. Nothing here needs
torch; jinja2 and huggingface_hub are imported when a card is made.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.limitations import Limitation
from compressor.quality.intervals import METRICS
from compressor.report.card import preprocessing_recipe
from compressor.report.card.loader_snippet import TITLES, loader, templates
from compressor.report.engine_text import told
from compressor.report.report import LABELS, what_is_timed

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

Json = Mapping[str, Any]

NAME = "README.md"
# As the hub names them, where it has a metric of that kind.
HUB_METRICS = {
    "accuracy": "accuracy",
    "agreement": "agreement",
    "perplexity": "perplexity",
    "spearman": "spearmanr",
    "fidelity": "cosine_similarity",
}
USES = {
    "image-classification": "classifies images",
    "image-feature-extraction": "turns images into features",
    "text-classification": "classifies texts",
    "feature-extraction": "turns its inputs into features",
    "sentence-similarity": "embeds sentences, to compare them",
    "text-generation": "continues texts",
}
ANEW = (
    "Once the engine is built, `report.json` holds the device's figures; this page is written anew with them where "
    "jinja2 and huggingface_hub are installed."
)
MEANINGS = {
    "fp16": "It computes in 16-bit floats (fp16), norms and softmax in 32.",
    "bf16": "It computes in 16-bit floats (bfloat16).",
    "int8": "Weights and what they multiply are int8, with ranges fixed on calibration data.",
    "int8-dynamic": "Weights and what they multiply are int8, with ranges found at run time.",
    "int4": "Weights have 4 bits, in blocks with a scale each; what they multiply is rounded to int8 at run time.",
}
INT8 = (
    "int8 saves time where the processor multiplies 8-bit numbers in one instruction (AVX-512 VNNI, AMX, Arm's dot "
    "product, tensor cores); elsewhere it can be slower than float, so measure it there."
)


def write(folder: Path) -> None:
    """Write the card of a folder that holds everything else, report.json included."""
    content = json.loads((folder / "report.json").read_bytes())
    (folder / NAME).write_text(card(content, folder), encoding="utf-8")


def card(content: Json, folder: Path) -> str:
    """The card's text, the same for the same report and folder.

    Args:
        content: report.json.
        folder: where model.onnx, the engine, config and preprocessing lie.
    """
    made, model, changes = loader(content, folder), content["model"], content["plan"]["changes"]
    return (
        templates()
        .get_template("card.md.j2")
        .render(
            header=_header(content, folder).to_yaml().strip(),
            title=f"{model['name']}, {'compressed' if changes else 'exported'}",
            about=_about(content),
            figures="\n".join(_rows(content)),
            conditions=list(_conditions(content)),
            changed=_changed(content),
            limits=list(_limits(content)),
            loader=made,
            command=content["command"],
            actions={name: "nothing" if each == "drop" else f"`{each}`" for name, each in changes.items()},
            shell=content["command"].startswith("compressor "),
            settings={name: value for name, value in content["settings"].items() if value not in (None, False)},
        )
    )


def _header(content: Json, folder: Path) -> ModelCardData:
    from huggingface_hub import ModelCardData

    model, settings, results = content["model"], content["settings"], _results(content)
    known = None if model["random_weights"] else model.get("hub_id")
    quantized = {"base_model_relation": "quantized"} if known and settings["precision"] != "fp32" else {}
    tags = [
        _library(content),
        settings["target"],
        "compressor",
        *([settings["precision"]] if settings["precision"] != "fp32" else []),
    ]
    return ModelCardData(
        base_model=known,
        datasets=[dataset] if (dataset := _dataset(content)) is not None else None,
        eval_results=results,
        library_name=_library(content),
        license=None if model["random_weights"] else preprocessing_recipe.licence(folder),
        metrics=[result.metric_type for result in results or ()] or None,
        model_name=f"{model['name'].rpartition('/')[2]}-compressed" if results else None,
        pipeline_tag=model["task"],
        tags=list(dict.fromkeys([*tags, *(["pruned"] if content["plan"]["changes"] else [])])),
        ignore_metadata_errors=False,
        **quantized,
    )


def _results(content: Json) -> list[EvalResult] | None:
    """The result's quality as the hub's model-index wants it; None where no quality is stated."""
    from huggingface_hub import EvalResult

    quality = content["quality"]
    if quality is None:
        return None
    figure, dataset = quality["figures"]["result"], _dataset(content)
    name = _data(content)
    return [
        EvalResult(
            task_type=content["model"]["task"],
            dataset_type=dataset or "custom",
            dataset_name=name,
            dataset_split="held-out part",
            metric_type=HUB_METRICS[quality["metric"]],
            metric_value=round(figure["value"], 4),
            metric_name=f"{LABELS[quality['metric']][0]} (95 % interval {_span(figure)}, n = {figure['n']})",
        )
    ]


def _dataset(content: Json) -> str | None:
    """The data set's id, where it comes from the hub."""
    data = content["data"]
    return data["source"].split("@")[0].split(":")[0] if data["reading"].startswith("hub dataset") else None


def _data(content: Json) -> str:
    """The data's name, without the folders of whoever made the card."""
    source: str = content["data"]["source"]
    return _dataset(content) or ("random numbers" if content["data"]["random"] else Path(source).name)


def _about(content: Json) -> str:
    model, settings = content["model"], content["settings"]
    origin = f"[{model['name']}](https://huggingface.co/{model['hub_id']})" if model.get("hub_id") else model["name"]
    weights = " Its weights are random." if model["random_weights"] else ""
    return (
        f"{origin}, a model that {USES.get(model['task'], model['task'])}, as {_form(content)} for "
        f"{TITLES.get(settings['target'], settings['target'])} in {settings['precision']}: inputs "
        f"{_listed(model['inputs'])}, outputs {_listed(model['outputs'])}.{weights}"
    )


def _library(content: Json) -> str:
    """The library that opens what is exported, by the hub's name."""
    return "transformers" if content["settings"]["target"] == "transformers" else "onnx"


def _form(content: Json) -> str:
    return "a checkpoint" if _library(content) == "transformers" else "an engine"


def _listed(names: list[str]) -> str:
    """A few names; the caches of a language model as one."""
    plain = [f"`{name}`" for name in names if not name.startswith(("past_key_values.", "present."))]
    caches = [name for name in names if name.startswith(("past_key_values.", "present."))]
    return ", ".join([*plain, *([f"`{caches[0].split('.')[0]}.*`"] if caches else [])])


def _rows(content: Json) -> Iterator[str]:
    """The table of figures in Markdown; in brackets 95 % intervals."""
    variants, quality = list(content["sizes"]), content["quality"]
    yield f"| | {' | '.join(variants)} |"
    yield f"|---|{'---:|' * len(variants)}"
    if quality is not None:
        label, unit = LABELS[quality["metric"]]
        yield _row(f"{label}{f', {unit}' if unit else ''}", [_figure(quality["figures"][name]) for name in variants])
        lost = [_figure(quality["loss"][name], "+") if name in quality["loss"] else "" for name in variants]
        yield _row("lost by the result" + (", %" if quality["metric"] == "perplexity" else ""), lost)
        for name, figure in quality["label_free"].items():
            if name != quality["metric"]:
                title = "same answers, %" if name == "agreement" else "divergence"
                yield _row(title, [_figure(figure) if each == "result" else "" for each in variants])
    speedups = content["speedup"]
    if content["latency"]:
        yield _row("latency, ms (median)", [f"{content['latency'][name]['median']:.3g}" for name in variants])
        faster = [
            f"{each['ratio']:.2f}x ({each['low']:.2f}–{each['high']:.2f})" if (each := speedups.get(name)) else ""
            for name in variants
        ]
        yield _row("speed-up of the result", faster)
    sizes = [content["sizes"][name] for name in variants]
    yield _row("parameters, M", [f"{size['parameters'] / 1e6:.2f}" for size in sizes])
    yield _row("multiply-adds of a sample, G", [f"{size['multiply_adds'] / 1e9:.3f}" for size in sizes])
    file = "checkpoint" if _library(content) == "transformers" else "ONNX file"
    yield _row(f"{file}, MB", [f"{size['bytes'] / 1e6:.2f}" for size in sizes])
    if any(size["cache"] for size in sizes):
        yield _row("cache of a token, bytes", [f"{size['cache']}" for size in sizes])


def _row(title: str, cells: list[str]) -> str:
    return f"| {title} | {' | '.join(cells)} |"


def _figure(figure: Json, sign: str = "") -> str:
    return f"{figure['value']:{sign}.4g} ({_span(figure)})"


def _span(figure: Json) -> str:
    return f"{figure['low']:.4g} to {figure['high']:.4g}"


def _conditions(content: Json) -> Iterator[str]:
    """What the figures hold for: data, target, machine."""
    settings, quality, engine = content["settings"], content["quality"], content["engine"]
    yield (
        "`baseline` is the model with nothing changed, on the same target at the same precision"
        + ("; `original` is that in float." if "original" in content["sizes"] else ".")
    )
    if quality is not None:
        count = quality["figures"]["result"]["n"]
        yield f"Quality: {METRICS[quality['metric']]}, on {count} test samples; brackets are 95 % bootstrap intervals."
    target = TITLES.get(settings["target"], settings["target"])
    late = engine.get("state") == "deferred"
    shapes = ", ".join(f"`{name}` {shape}" for name, shape in content["timed_inputs"].items() if "past_" not in name)
    inputs = what_is_timed(content["generation"]) if content.get("generation") else f"inputs {shapes}"
    threads = f", {settings['threads']} threads" if settings["threads"] else ""
    if content["latency"]:
        yield (
            f"Latency: {'ONNX Runtime in the place of ' if late else ''}{target}, batch {settings['batch']}{threads}, "
            f"{inputs}; engines timed in alternating bursts, copies to a GPU not included."
        )
    if settings["device"] is not None:
        yield f"Device: {settings['device']}."
    yield _machine(engine.get("environment", content["environment"]))
    yield from told(engine)
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
    lines = [f"{len(plan['changes'])}{total} residual branches were changed (rule `{plan['rule']}`)."]
    if settings["precision"] != "fp32":
        lines.append(MEANINGS[settings["precision"]])
    if healed is not None:
        lines.append(f"What is left was adapted without labels ({healed['method']}: {healed['note']}).")
    return " ".join(lines)


def _limits(content: Json) -> Iterator[str]:
    """What the model is for, what it was judged on, and what nobody has tried."""
    model, data, quality, settings = content["model"], content["data"], content["quality"], content["settings"]
    yield (
        f"It {USES.get(model['task'], model['task'])}, as the original does: what that is meant for, and what it must "
        "not be used for, holds here too."
    )
    if quality is None:
        yield f"No quality is stated, because {content['no_quality_because']}: judge it before you use it."
    else:
        yield (
            f"Judged on {quality['figures']['result']['n']} samples of {_data(content)} ({data['reading']}), which "
            f"neither calibration ({data['sizes']['calibration']} samples) nor the choice "
            f"({data['sizes']['validation']}) had seen. On other data it may lose more: measure it on yours."
        )
        if quality["metric"] in ("agreement", "fidelity"):
            yield "No labels were used: the figure says how close it is to the original, not how often it is right."
    if settings["precision"].startswith("int8"):
        yield INT8
    if settings["target"] == "onnxruntime" or content["engine"].get("state") == "deferred":
        yield "An ONNX file carries no preprocessing: feed it what the original's preprocessing gives."
    generation = content.get("generation")
    if content["latency"] and generation and not generation["new"]:
        yield "Latency is that of a prompt with an empty cache; no step of generation was timed."
    for limitation in content.get("limitations", ()):
        yield str(Limitation(**limitation))
    yield from content["notes"]
