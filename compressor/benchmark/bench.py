"""`bench`: measure exported folders, ONNX files and torch models side by side, in one interleaved run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor import models
from compressor.benchmark.baseline_standing import check_baseline
from compressor.benchmark.bench_settings import BenchSettings
from compressor.benchmark.contenders import EAGER, BenchError, Contender, EngineEntry, ExportFolder, parse_contenders
from compressor.benchmark.decode_results import GenerationResults
from compressor.benchmark.decode_timing import contexts, measure
from compressor.benchmark.equal_inputs import SAMPLES, check_equal_inputs, other_models
from compressor.benchmark.lm_eval_tasks import check_model, evaluate_tasks
from compressor.benchmark.results import Comparison
from compressor.benchmark.runner import BenchRunner
from compressor.choices import GGUF, HUB_READING, NO_STAGES, parse_image_size, parse_image_tokens
from compressor.data.readers.dataset.hub import looks_like
from compressor.data.splits import Data
from compressor.errors import SettingsError
from compressor.executor.base import Executor
from compressor.executor.on_ray import executor_for
from compressor.lower.probabilities import with_logits
from compressor.lower.traced_model import ModelAndData, evaluated_on, index_errors_as_data_errors, load_data
from compressor.measure.workload import timing_feeds
from compressor.models import Model
from compressor.models.base import NoImageSizeError
from compressor.models.vision_language.image_token_stages import with_indices, with_state
from compressor.models.weights.stored_dtypes import describe_dtypes
from compressor.report.collect_limitations import of_subject
from compressor.settings import Settings
from compressor.target.half_arithmetic import FP16, half_types
from compressor.workspace.environment import environment
from compressor.workspace.output_folder import (
    check_file,
    check_no_input,
    check_outside,
    check_outside_data,
    check_writable,
    scratch_folder,
    write_file,
)
from compressor.workspace.output_lock import output_lock
from compressor.workspace.progress import Steps, Tick

if TYPE_CHECKING:
    from rich.console import Console


def bench(
    settings: BenchSettings, *, console: Console | None = None, command: str = "compressor.bench(...)"
) -> Comparison:
    """Measure every engine and write the JSON file.

    Args:
        settings: the engines and the options.
        console: console for progress; None shows no progress.
        command: the command line to record in the file.

    Raises:
        CompressorError, RuntimesError: an input is invalid or an engine fails; the message is one sentence.
    """
    output = Path(settings.output)
    if output.is_dir():
        raise SettingsError(f"--output {output} is a folder; expected a file such as bench.json.")
    check_file(output)
    check_writable(output.parent)
    check_outside(output.parent)
    check_outside_data(output, settings.data)
    check_no_input(output, *settings.what, settings.model, settings.data)
    steps = Steps(console)
    if settings.data == "random" or settings.random_weights:
        _refuse_workers(settings, "the data is random" if settings.data == "random" else "the weights are random")
    with (
        output_lock(output, steps.say),
        scratch_folder(output) as scratch,
        executor_for(settings.workers, settings.ray, steps.show, steps.warn) as executor,
    ):
        comparison = _compared(settings, scratch, steps, command, executor)
        write_file(output, comparison.to_json().encode())
    return comparison


def _compared(settings: BenchSettings, scratch: Path, steps: Steps, command: str, executor: Executor) -> Comparison:
    """Measure every engine; `scratch` gets the engines that are built, and `executor` runs them over the test data."""
    contenders = parse_contenders([str(each) for each in settings.what])
    folders = {each.name: each.folder for each in contenders if each.folder is not None}
    runner = _set_up(settings, contenders, folders, steps)
    if runner.loaded.no_quality_because is not None:
        _refuse_workers(settings, runner.loaded.no_quality_because)
    engines = runner.built(scratch, steps)
    parity = runner.parity(engines)
    evaluation = runner.quality(engines, steps, executor)
    originals = [f"{each.name} ({EAGER})" for each in contenders if each.is_model and each.folder is None]
    source = runner.loaded.data.source
    doubts = () if evaluation is None else tuple(check_baseline(evaluation, runner.reference, originals, source))
    harness = evaluate_tasks(
        runner.quiet_openers(engines),
        runner.loaded.model,
        settings.asked,
        against=runner.reference,
        length=runner.settings.max_length,
        steps=steps,
    )
    measurements = runner.measurements(engines, settings.rounds, steps)
    generation = measure(runner, engines, settings.rounds, scratch, steps)
    return Comparison(
        command=command,
        settings=settings.to_dict(),
        against=runner.against,
        model=runner.loaded.model.name,
        data=runner.loaded.data.describe(),
        entries=runner.entries,
        evaluation=evaluation,
        reference=runner.reference,
        no_quality_because=runner.loaded.no_quality_because,
        measurements=measurements,
        generated=GenerationResults(runner.loaded.model.name, runner.entries, runner.against, generation),
        parity=parity,
        harness=harness,
        environment=environment(),
        notes=(
            *doubts,
            *executor.said,
            *map(str, of_subject(runner.loaded)),
            *_leakage_warnings(runner, folders),
            *_hidden_overflow(runner),
            *_last_logits(runner),
            *_weight_types(runner.entries),
            *_one_call(runner),
            *_of_modules(folders),
        ),
    )


def _refuse_workers(settings: BenchSettings, reason: str) -> None:
    """Raise if workers are given, though no quality is measured."""
    for name in ("workers", "ray"):
        if (value := getattr(settings, name)) is not None:
            raise SettingsError(
                f"found --{name} {value}, whose processes measure quality, but {reason}, so none is measured; leave "
                f"--{name} out."
            )


def _hidden_overflow(runner: BenchRunner) -> Iterator[str]:
    """Yield a sentence for each fp16 file that ONNX Runtime runs on the CPU, where it computes in float32."""
    for entry in runner.entries:
        on_cpu = runner.options(runner.conditions[0], entry).device == "cpu"
        if (
            on_cpu
            and entry.target.startswith("onnxruntime")
            and entry.file is not None
            and FP16 in half_types(entry.file)
        ):
            yield (
                f"{entry.name}: ONNX Runtime computes fp16 in float32 on the CPU, so these figures hide overflow and "
                "are not those of a device with fp16 arithmetic."
            )


def _of_modules(folders: Mapping[str, ExportFolder]) -> Iterator[str]:
    """Yield what is not compared between folders of modules of one's own, which say nothing of their preprocessing."""
    names = [name for name, folder in folders.items() if folder.needs_module]
    if len(names) > 1:
        yield (
            f"{', '.join(names)} are of modules of your own: their inputs have the same names and shapes, but it is "
            "not known whether they were made for the same values, such as one normalization."
        )


def _one_call(runner: BenchRunner) -> Iterator[str]:
    """Yield what is timed of a model of several parts."""
    if runner.loaded.model.is_vision_language:
        yield (
            "The time is that of one call of all parts on an image and its text; `compressor export` times the image, "
            "the prompt and each new token."
        )
    if runner.loaded.model.is_encoder_decoder:
        yield (
            "The time is that of one call of the encoder and of the decoder on all tokens of a target; `compressor "
            "export` times the generation token by token."
        )


def _last_logits(runner: BenchRunner) -> Iterator[str]:
    """Yield a sentence for each engine that computes fewer logits than others when it is timed."""
    for entry in runner.entries:
        if entry.target == GGUF:
            yield (
                f"{entry.name}: llama.cpp computes the logits of the last token of a timed call alone, where other "
                "engines compute those of all tokens; its cache holds F16."
            )


def _set_up(
    settings: BenchSettings, contenders: Sequence[Contender], folders: Mapping[str, ExportFolder], steps: Steps
) -> BenchRunner:
    """Load the models and the data, and return the test bench."""
    _check_tasks(folders)
    with steps.step("load the models"):
        settings = dataclasses.replace(settings, sequence_length=_sequence_length(settings, folders))
        image_size = _image_size(settings, folders)
        loaded = {each.name: _load_contender(each, settings, folders) for each in contenders if each.is_model}
        model = _model(settings, folders, loaded)
    check_model(model, settings.asked)
    entries = tuple(
        entry
        for each in contenders
        for entry in each.entries(
            loaded.get(each.name), settings.target, compiled=settings.compile, trusted=settings.trust_remote_code
        )
    )
    _check_unused(settings, entries)
    against = _against(settings.against, entries)
    context_lengths = contexts(settings.context, model)
    export_settings = _export_settings(dataclasses.replace(settings, image_size=image_size), folders)
    with steps.step("load the data") as tick:
        data_and_model = _with_targets(
            settings, loaded, model, load_data(export_settings, model, tick, decision=_decision_share(folders))
        )
        _check_equal_inputs(settings, export_settings, folders, loaded, data_and_model, tick)
    feeds = {batch: timing_feeds(data_and_model.data.test, batch) for batch in settings.batch}
    return BenchRunner(data_and_model, export_settings, entries, against, settings.conditions, feeds, context_lengths)


def _check_equal_inputs(
    settings: BenchSettings,
    export_settings: Settings,
    folders: Mapping[str, ExportFolder],
    loaded: Mapping[str, Model],
    chosen: ModelAndData,
    tick: Tick,
) -> None:
    """Check that the inputs of the chosen model suit the others, where anything is judged by its answers."""
    judged = chosen.no_quality_because is None
    if judged or settings.tasks:
        few = partial(load_data, dataclasses.replace(export_settings, samples=SAMPLES), tick=tick)
        first = settings.model or next(iter([*folders, *loaded]))
        others = other_models(None if settings.model is not None else first, folders, loaded)
        check_equal_inputs(first, chosen.model, others, few if judged else None)


def _with_targets(settings: BenchSettings, loaded: Mapping[str, Model], model: Model, data: Data) -> ModelAndData:
    """Return the model with its data; refuse sources without targets if no original is there to generate them."""
    generated = model.is_encoder_decoder and data.label_kind is None and not data.random
    if generated and settings.model is None and not loaded:
        raise BenchError(
            f"{data.source} has no targets, which the original would generate, but a folder does not hold it; name the "
            "original with --model, or give data with a column of targets."
        )
    model = evaluated_on(model, data)
    with index_errors_as_data_errors(ModelAndData(model, data)):
        return ModelAndData(with_logits(model, data), data)


def _check_unused(settings: BenchSettings, entries: Sequence[EngineEntry]) -> None:
    """Raise if an option has no effect on the kinds of engines that are measured."""
    torch_models = [entry for entry in entries if entry.module is not None]
    if settings.compile and not torch_models:
        raise SettingsError("found --compile, but no torch model is measured; give a model, or leave --compile out.")
    if settings.target is not None and len(torch_models) == len(entries):
        raise SettingsError(
            f"found --target {settings.target}, but only torch models are measured; give a folder or an .onnx file, or "
            "leave --target out."
        )


def _image_size(settings: BenchSettings, folders: Mapping[str, ExportFolder]) -> str | int | None:
    """Return the size of the first folder's images, or that of the settings without a folder.

    Raises:
        BenchError: the folders have different sizes, or another size than the one that is given.
    """
    sizes = {name: folder.image_size for name, folder in folders.items()}
    listing = ", ".join(f"{name} ({size})" for name, size in sizes.items())
    _check_same(sizes, f"the folders take images of different sizes: {listing}; measure folders of one size at a time.")
    if not folders:
        return settings.image_size
    first, size = next(iter(sizes.items()))
    if settings.image_size is not None and parse_image_size(settings.image_size) != parse_image_size(size):
        raise BenchError(
            f"--image-size is {settings.image_size} and {first} takes images of size {size}; leave --image-size out."
        )
    return size


def _sequence_length(settings: BenchSettings, folders: Mapping[str, ExportFolder]) -> int | None:
    """Return the number of tokens, samples or frames that the folders take alone, or that of the settings.

    Raises:
        BenchError: the folders have different numbers, or another one than the one that is given.
    """
    lengths = {name: folder.sequence_length for name, folder in folders.items()}
    listing = ", ".join(f"{name} ({'any' if length is None else length})" for name, length in lengths.items())
    _check_same(
        lengths,
        f"the folders were exported with different values of --sequence-length: {listing}; measure folders of one "
        "length at a time.",
    )
    if not folders:
        return settings.sequence_length
    first, length = next(iter(lengths.items()))
    if settings.sequence_length not in (None, length):
        raise BenchError(
            f"--sequence-length is {settings.sequence_length} and {first} takes "
            f"{'any length' if length is None else length}; leave --sequence-length out."
        )
    return length


def _check_same(values: Mapping[str, object], refusal: str) -> None:
    """Raise the refusal if the folders differ in a value."""
    if len(set(values.values())) > 1:
        raise BenchError(refusal)


def _load_contender(contender: Contender, settings: BenchSettings, folders: Mapping[str, ExportFolder]) -> Model:
    """Load a model to measure; an exported checkpoint is loaded for the task of its export."""
    return _load(contender.spec, settings, folders) if contender.folder is None else contender.folder.checkpoint()


def _load(spec: str, settings: BenchSettings, folders: Mapping[str, ExportFolder]) -> Model:
    """Load a model of the command line for images of the size of the folders, or of --image-size.

    A module of one's own and a model of something else take no size; only one that the user gave is refused for them.
    """
    load = partial(
        models.load,
        spec,
        task=settings.task,
        problem_type=settings.problem_type,
        revision=settings.revision,
        random_weights=settings.random_weights,
        trust_remote_code=settings.trust_remote_code,
        cache=settings.cache,
        sequence_length=settings.sequence_length,
    )
    try:
        return load(image_size=parse_image_size(_image_size(settings, folders)))
    except NoImageSizeError:
        if settings.image_size is not None:
            raise
        return load()


def _model(settings: BenchSettings, folders: Mapping[str, ExportFolder], loaded: Mapping[str, Model]) -> Model:
    """Return the model whose preprocessing, task and input names are used; it counts as random if any weights are."""
    if settings.model is not None:
        model = _load(settings.model, settings, folders)
    elif folders or loaded:
        first = _first_model(next(iter(folders.values()), None), loaded)
        if first.is_encoder_decoder and loaded:  # the model around a folder's engine has no weights to generate with
            first = next(iter(loaded.values()))
        # A compressed checkpoint has fewer cache inputs: take the model with the most.
        model = max((first, *loaded.values()), key=lambda each: len(each.state))
    else:
        raise SettingsError("only ONNX files were given; name the model whose preprocessing they use with --model.")
    depths = _depths_of_stages(folders)
    model = with_state(with_indices(model, depths), depths) if depths else model
    random = [folder.report["model"]["random_weights"] for folder in folders.values()]
    random += [each.random_weights for each in loaded.values()]
    return dataclasses.replace(model, random_weights=any(random) or (model.random_weights and not random))


def _depths_of_stages(folders: Mapping[str, ExportFolder]) -> list[int]:
    """Return the depths at which engines of folders drop image tokens, which need inputs beside those of the model.

    Raises:
        BenchError: a report has stages of another form.
    """
    depths: set[int] = set()
    for name, folder in folders.items():
        try:
            stages = parse_image_tokens(folder.report["settings"].get("image_tokens", NO_STAGES))
        except ValueError as error:
            raise BenchError(f"{name}: {error}.") from error
        depths |= set() if stages is None else {depth for depth, _ in stages.stages}
    return sorted(depths)


def _first_model(folder: ExportFolder | None, loaded: Mapping[str, Model]) -> Model:
    """Return the model of the first folder, or the first loaded model.

    A folder cannot name code to run. If it was exported from a user's module, a module of the command line stands for
    it; the inputs and outputs of the engines are compared with it later.
    """
    if folder is None:
        return next(iter(loaded.values()))
    modules = (model for model in loaded.values() if model.source == "module")
    given = next(modules, None) if folder.needs_module else None
    return folder.model() if given is None else given


def _check_tasks(folders: Mapping[str, ExportFolder]) -> None:
    """Raise if the folders have different tasks: no data fits both."""
    tasks = {name: folder.report["model"]["task"] for name, folder in folders.items()}
    if len(set(tasks.values())) > 1:
        listing = ", ".join(f"{name} ({task})" for name, task in tasks.items())
        raise BenchError(f"the folders have different tasks: {listing}; measure folders of one task at a time.")


def _against(baseline: str | None, entries: Sequence[EngineEntry]) -> str:
    """Return the name of the baseline engine; the name of a folder selects its first engine."""
    names = [entry.name for entry in entries]
    if baseline is None:
        return names[0]
    matches = [name for name in names if name in (baseline, f"{baseline} (eager)") or name.startswith(f"{baseline}/")]
    if not matches:
        raise SettingsError(f"--against {baseline} is not a measured engine; expected one of: {', '.join(names)}.")
    return matches[0]


def _export_settings(settings: BenchSettings, folders: Mapping[str, ExportFolder]) -> Settings:
    """Return the settings of an export that reads the same data and sizes engines alike."""
    first = next(iter(folders.values()), None)
    exported = {} if first is None else first.report["settings"]
    return Settings(
        model=exported.get("model") if first is not None else settings.model or settings.what[0],
        data=_local_data(first) if settings.data is None and first is not None else settings.data,
        drop="none",
        target=settings.target or exported.get("target", "onnxruntime"),
        device=settings.device,
        batch=settings.batch[0],
        samples=settings.samples,
        max_length=exported.get("max_length") if settings.max_length is None else settings.max_length,
        image_size=settings.image_size,
        sequence_length=settings.sequence_length,
        class_names=exported.get("class_names"),
        prompt_template=exported.get("prompt_template"),
        stride=exported.get("stride") if (settings.max_length, settings.stride) == (None, None) else settings.stride,
        rounds=settings.rounds,
        seed=settings.seed,
    )


def _decision_share(folders: Mapping[str, ExportFolder]) -> float:
    """Return the largest share of samples that decided between plans of a folder, which `bench` leaves out."""
    shares = (folder.report["data"].get("fractions", {}).get("decision", 0.0) for folder in folders.values())
    return max(shares, default=0.0)


def _local_data(folder: ExportFolder) -> str | None:
    """Return the data of an export: a path, ``random``, or None for the data of the sample.

    Raises:
        BenchError: the data is on the hub, as a folder cannot ask for a download, or is not here.
    """
    spec: str | None = folder.report["settings"].get("data")
    if spec is None or spec == "random" or Path(spec).expanduser().exists():
        return spec
    if not folder.report["data"]["reading"].startswith(HUB_READING):
        raise BenchError(
            f"the data of {folder.path}, {spec!r}, is not here (a relative path starts where the export ran); give it "
            "with --data."
        )
    if looks_like(spec):
        raise BenchError(
            f"{folder.path} was exported with data from the hub, which is not downloaded on the word of a folder; give "
            f"--data {spec} to download it."
        )
    return spec


def _leakage_warnings(runner: BenchRunner, folders: Mapping[str, ExportFolder]) -> Iterator[str]:
    """Yield a warning for each folder that may have been calibrated or selected on samples of this test split."""
    data = runner.loaded.data
    for name, folder in folders.items():
        exported = folder.report["data"]
        same = not data.random and _is_same_source(exported["source"], data.source)
        overlap = set(data.test.ids) - set(exported["test_ids"])
        # An export with fewer samples used fewer than half of these, in the same order, and never saw the others.
        if same and exported["seed"] != data.seed:
            yield f"{name} was exported with another --seed and may have been calibrated on these test samples."
        elif same and overlap and _fewer(data.describe(), exported):
            yield (
                f"{name} was exported with more samples and may have been calibrated on {len(overlap)} of the "
                f"{len(data.test)} test samples; give the --samples of the export."
            )


def _weight_types(entries: Sequence[EngineEntry]) -> Iterator[str]:
    """Yield a note for each torch model whose checkpoint stores weights in another type than float32."""
    for entry in entries:
        dtypes = {} if entry.module is None else entry.module.model.dtypes
        if {str(dtype) for dtype in dtypes.values()} - {"torch.float32"}:
            yield f"{entry.name} computes in float32; its checkpoint stores {describe_dtypes(dtypes.values())}."


def _is_same_source(exported: str, source: str) -> bool:
    """Return whether two values of --data can name the same samples: one path has many spellings.

    A relative path belongs to the folder in which the export ran, which is not known, so the names decide.
    """
    return exported == source or Path(exported).name == Path(source).name


def _fewer(data: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return bool(sum(data["sizes"].values()) < sum(other["sizes"].values()))
