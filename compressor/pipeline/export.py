"""The export: from settings to an engine, a report and a model card."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.choices import AUTO, GGUF, NO_STAGES, TRANSFORMERS
from compressor.deferred import package
from compressor.deferred.ahead import build_ahead
from compressor.deferred.parser import parsed_by
from compressor.executor.on_ray import executor_for
from compressor.heal.heal import Healed, heal
from compressor.limitations import Limitation
from compressor.lower.checkpoint import rounded
from compressor.lower.cut.merge_decoder import merge
from compressor.lower.nemotron_nas.engine_rules import serving
from compressor.lower.traced_model import (
    SubjectError,
    TracedModel,
    check_original,
    index_errors_as_data_errors,
    load,
    model_facts,
    without_image_tokens,
)
from compressor.measure.engine_builder import EngineBuilder
from compressor.measure.engine_quality import evaluate_engines, quality_on_test
from compressor.measure.graph_evaluator import GraphEvaluator, graph_evaluator
from compressor.measure.precision_converter import PrecisionConverter
from compressor.measure.variant import Variant, build_variants, convert_variants, engines_of, lower_variant
from compressor.measure.workload import Call, generation_lengths
from compressor.models.base import disable_use_cache
from compressor.models.text import genai_config
from compressor.pipeline import export_offloaded, factorial_cells, image_token_stages
from compressor.pipeline.last_tokens import of_last_tokens
from compressor.pipeline.unused_options import refuse_unused
from compressor.quality.evaluate import Evaluation, EvaluationError
from compressor.quality.validation_loss import ROUNDING, ValidationLoss
from compressor.quantize.precision import Converted, Trial
from compressor.quantize.qdq_rewrite import NothingToQuantizeError
from compressor.report import engine_layers, exact_rewrites
from compressor.report.card import model_card
from compressor.report.collect_limitations import limitations_of, of_timings
from compressor.report.pages.export_page import PAGE, html
from compressor.report.pages.sample_previews import previews
from compressor.report.precision_notes import precision_notes
from compressor.report.recipe_notes import recipe_notes
from compressor.report.report import REPORT, Quality, Report, Size, latency_to_dict, shares_of_time
from compressor.search import depth_order, without_merges
from compressor.search.decision import Decision, share_of
from compressor.search.decision import sentence as decision_sentence
from compressor.search.image_token_choice import ImageTokenChoice, choose_image_tokens
from compressor.search.planner import Choice, choose_plan, merge_schedule
from compressor.search.site_evidence import of_zeros, tokens_left
from compressor.search.stored_prices import check_prices, price_notes
from compressor.settings import Settings
from compressor.target.availability import check_target
from compressor.target.gpus import Gpus, gpus_ahead, measured_by_stand_in
from compressor.target.side_by_side import TOGETHER
from compressor.workspace.environment import environment
from compressor.workspace.journal import resumed
from compressor.workspace.json_files import utf8
from compressor.workspace.output_folder import (
    check_no_input,
    check_outside_data,
    engine_bytes,
    output_folder,
    scratch_folder,
)
from compressor.workspace.plan_file import of_earlier_rule, of_replay
from compressor.workspace.progress import Steps
from passes.analysis.counted_cost import Costs
from passes.execute.mapped_weights import map_weights, weight_bytes
from passes.graph.cache_state import bytes_per_source_token, bytes_per_token
from passes.graph.edit import with_weights
from passes.graph.graph import Graph
from passes.image_tokens.image_tokens import stage_of_state
from runtimes.base.freed_memory import return_freed_memory
from runtimes.base.timing import Latency

if TYPE_CHECKING:
    from rich.console import Console


@dataclasses.dataclass(frozen=True)
class _Shipped:
    """The engines of an export, and how they came about.

    Attributes:
        rewritten: the plan and its graphs.
        variants: all variants, built.
        settings: the settings, with the precision that ``auto`` chose.
        trials: the precisions that ``auto`` tried.
        conversions: how each variant was converted, by its name; empty for fp32.
        factorial: whether the variants include the cells of a factorial.
        files: files that were written into the output folder.
    """

    rewritten: _Rewritten
    variants: list[Variant]
    settings: Settings
    trials: tuple[Trial, ...]
    conversions: dict[str, Converted]
    factorial: bool
    files: frozenset[Path]

    @property
    def reference(self) -> str:
        """The float model before any change."""
        return "original" if any(variant.name == "original" for variant in self.variants) else "baseline"

    def remove(self) -> None:
        """Remove the files from the output folder."""
        for path in self.files:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@dataclasses.dataclass(frozen=True)
class _Rewritten:
    """The plan and the graphs that result from it.

    Attributes:
        choice: the plan, with the facts about its choice.
        graph: the rewritten graph with its tokens merged, after healing.
        folded: `graph` folded, ready to be lowered.
        healed: the report of healing; None without healing.
    """

    choice: Choice
    graph: Graph
    folded: Graph
    healed: Healed | None

    @property
    def unmerged(self) -> Graph:
        """The rewritten graph before tokens are merged, with the weights after healing."""
        return with_weights(self.choice.graph, self.graph)


def export(settings: Settings, *, console: Console | None = None, command: str = "compressor.export(...)") -> Report:
    """Compress a model: trace, score, choose, rewrite, lower, build, measure; write the output folder.

    Args:
        settings: the options of the export.
        console: console that shows progress; None shows nothing.
        command: the command line, for the report.

    Raises:
        CompressorError, PassError, RuntimesError: the message says what was found and what to do. The output folder is
            not written then.
    """
    refuse_unused(settings)
    check_prices(settings)
    gpus = gpus_ahead(settings)
    if gpus is not None:
        settings = measured_by_stand_in(settings)
    target, options = check_target(settings)
    steps, output = Steps(console), Path(settings.output)
    check_outside_data(output, settings.data)
    check_no_input(output, settings.model, settings.data)
    if settings.max_memory is not None:
        export_offloaded.check_target(settings)
    with (
        output_folder(output, force=settings.force, say=steps.say) as folder,
        scratch_folder(output) as scratch,
        executor_for(settings.workers, settings.ray, steps.show, steps.warn) as executor,
    ):
        if settings.max_memory is not None:
            report, subject = export_offloaded.compressed(settings, folder, steps, command, executor)
        else:
            subject = load(settings, steps, decision=share_of(settings), executor=executor)
            merge_schedule(settings.tokens, subject.sites)  # refused before anything is measured
            subject = check_original(subject, steps)
            images = choose_image_tokens(subject, settings, steps)
            if images is not None:
                settings = dataclasses.replace(settings, image_tokens=images.stages)
                if images.stages == NO_STAGES:  # the inputs of stages go too
                    del subject
                    subject = load(settings, steps, decision=share_of(settings), executor=executor)
                    subject = check_original(subject, steps)
            subject.model.save(folder)
            evaluator = graph_evaluator(subject, target, options, settings, scratch)
            report = _compressed(subject, settings, evaluator, folder, steps, command, gpus, images)
        _write(report, folder, subject)
        model_card.write(folder)
    return report


def _compressed(
    subject: TracedModel,
    settings: Settings,
    evaluator: GraphEvaluator,
    folder: Path,
    steps: Steps,
    command: str,
    gpus: Gpus | None,
    images: ImageTokenChoice | None,
) -> Report:
    """Choose, rewrite, lower, build and measure; write the result into the folder and return the report."""
    builder, timer = evaluator.builder, evaluator.timer
    shipped, decided = _decided(subject, settings, evaluator, folder, steps, images)
    rewritten, variants, settings = shipped.rewritten, shipped.variants, shipped.settings
    plan, factorial, conversions = rewritten.choice.plan, shipped.factorial, shipped.conversions
    (folder / "plan.json").write_text(plan.to_json())
    if subject.model.task == "text-generation" and not rewritten.folded.state:
        disable_use_cache(folder)

    engines = engines_of(variants)
    _make_room((subject.graph, rewritten.choice.graph, rewritten.graph, rewritten.folded), subject, builder.scratch)
    quality = quality_on_test(builder, engines, shipped.reference, steps)
    parts = timer.latencies(builder, engines, steps)
    latency = timer.totals(parts)
    reported = [each for each in variants if each.reported]
    engine = _engine(rewritten, reported, evaluator, folder, settings, steps, gpus)
    device, file = builder.options.device, engines["result"].name
    without_genai = genai_config.write(folder, file, settings.target, device, subject.model, rewritten.folded)
    names = [each.name for each in reported]
    report = Report(
        command=command,
        settings=settings.to_dict(),
        model=model_facts(subject),
        data=subject.data.describe(),
        plan=plan,
        sizes=_sizes({name: engines[name] for name in names}, subject, rewritten.folded, settings.target),
        quality=None if quality is None else Quality.of(quality, names),
        no_quality_because=subject.no_quality_because,
        latency={name: latency[name] for name in names},
        timed_inputs={name: list(shape) for name, shape in next(iter(timer.calls.values())).shapes.items()},
        generation=_generation(parts, timer.calls, settings, subject),
        parity={each.name: each.parity.difference for each in reported if each.name != "original"},
        precision={name: facts.to_dict() for name, facts in conversions.items()},
        trials=tuple(map(dataclasses.asdict, shipped.trials)),
        search=rewritten.choice.facts | decided,
        healed=None if rewritten.healed is None else dataclasses.asdict(rewritten.healed),
        steps=tuple(steps.done),
        passes=tuple(rewritten.folded.history),
        environment=environment(),
        engine=engine,
        factorial=factorial_cells.measured(latency, quality, variants, settings, folder) if factorial else None,
        evidence=_evidence(rewritten, subject),
        image_tokens=image_token_stages.facts(
            settings.image_stages,
            _generation(parts, timer.calls, settings, subject),
            rewritten.folded,
            subject.graph,
            () if images is None else images.tried,
        ),
        exact={"multiply_adds": Costs(builder.fold(subject.graph), subject.costs.example).total.multiply_adds},
        limitations=(
            *limitations_of(
                subject, settings.precision, conversions, shipped.trials, engine, [each.parity for each in reported]
            ),
            *_lost(rewritten, subject),
            *of_earlier_rule(settings.drop),
            *of_replay(settings.drop, subject.model.name),
            *(of_last_tokens(subject) if settings.metric == "angular" else ()),
            *of_zeros(rewritten.choice.evidence.get("zeros", {})),
            *without_genai,
            *of_timings(timer.unsteady),
            *(() if images is None else images.limitations(settings)),
        ),
    )
    notes = _notes(report, settings, subject, rewritten)
    return dataclasses.replace(report, notes=notes if images is None else (*notes, images.sentence()))


def _make_room(graphs: Sequence[Graph], subject: TracedModel, scratch: Path) -> None:
    """Take the weights of a large model out of memory before its engines are measured, which hold their own.

    They stay where they are if the disk has no room for them, if files in use cannot be removed (Windows), or if the
    module is the user's, who may keep it.
    """
    modules = (subject.model.module, *(graph.module for graph in graphs))
    if weight_bytes(modules) > TOGETHER and os.name == "posix" and subject.model.source != "module":
        with contextlib.suppress(OSError):
            map_weights(modules, scratch)
        gc.collect()  # the translated graphs, whose tensors are on the memory of the weights, refer to each other
        return_freed_memory()


def _decided(
    subject: TracedModel,
    settings: Settings,
    evaluator: GraphEvaluator,
    folder: Path,
    steps: Steps,
    images: ImageTokenChoice | None,
) -> tuple[_Shipped, dict[str, Any]]:
    """Choose a plan and build its engines; with a budget, take fewer changes until the engine is within it.

    So does a plan that leaves no layer for the precision asked for. Stages of image tokens that were chosen take
    their part of it, and keep the plan that they were judged with.

    Returns:
        The engines, and the facts about the decision.
    """
    certify = settings.precision != "fp32" or settings.heal != "none"
    with steps.step("lower the original, check against torch"):  # before the search, which may take long
        baseline = lower_variant("baseline", subject.graph, subject.graph, evaluator.builder)
        if settings.defer_build:
            parsed_by(settings.target, {"original": baseline.float_file})
    spent = _loss_of_precision(baseline, settings.precision, evaluator.converter, steps)  # it may be refused
    with index_errors_as_data_errors(subject):
        given = None if images is None else images.plan
        choice = given or choose_plan(subject, settings, evaluator, steps)
        decision = None if choice.search is None else Decision.of(subject, settings, steps)
    if decision is not None:
        decision.spent = spent + (0.0 if images is None else images.spent)
        if settings.confidence is not None and certify:
            choice = choice.within(max(settings.loss_limit - decision.spent, 0.0))
        elif settings.heal == "none":
            choice = without_merges.strongest(choice, decision, steps)
    healing = settings.heal_budget
    while True:
        start = time.perf_counter()
        retried = decision is not None and milder_exists(choice)
        rewritten = _adapted(choice, subject, settings, evaluator, healing / 2 if retried else healing, steps)
        healing = max(healing - (time.perf_counter() - start), 0.0)
        try:
            shipped = _built(baseline, rewritten, settings, evaluator, folder, steps)
        except NothingToQuantizeError as error:
            count, changes = rewritten.choice.count, len(rewritten.choice.plan.changes)
            if decision is None and changes:
                raise SubjectError(
                    f"a plan of {changes} changes leaves no layer for {settings.precision}, though the original has "
                    f"some ({error.found}); give a smaller --drop, or another precision."
                ) from error
            if decision is None or not count:  # without a change, nothing milder is left
                raise
            steps.warn(f"a plan of {count} changes leaves no layer for {settings.precision}, so fewer are made")
            choice = decision.fewer(rewritten.choice, steps)
            continue
        if decision is None:
            return shipped, {}
        evaluation = _on_fresh_samples(shipped, evaluator.builder, subject, steps)
        if decision.holds(rewritten.choice, evaluation, shipped.reference, certify=certify):
            return shipped, {"decision": decision.facts(rewritten.choice)}
        shipped.remove()
        choice = decision.milder(rewritten.choice, steps)


def _adapted(
    choice: Choice, subject: TracedModel, settings: Settings, evaluator: GraphEvaluator, seconds: float, steps: Steps
) -> _Rewritten:
    """Fit the maps of a choice again, heal its graph for at most `seconds`, and fold it.

    With a confidence, the graph stays the one that was certified.
    """
    with index_errors_as_data_errors(subject):
        choice = choice if settings.confidence is not None else depth_order.refitted(choice, steps)
        choice, graph, healed = _healed(choice, subject, settings, seconds, steps)
        graph = without_image_tokens(graph, subject.model, settings)
    return _Rewritten(choice, graph, evaluator.builder.fold(graph), healed)


def _loss_of_precision(baseline: Variant, precision: str, converter: PrecisionConverter, steps: Steps) -> float:
    """Return the loss of the unchanged model in a precision in percent; 0 for a precision that is chosen later."""
    if precision in ("fp32", AUTO):
        return 0.0
    with steps.step(f"{precision} of the baseline") as tick:
        _, facts = converter.convert(baseline.float_file, precision, tick)
    return max(facts.loss or 0.0, 0.0)


def _on_fresh_samples(
    shipped: _Shipped, builder: EngineBuilder, subject: TracedModel, steps: Steps
) -> Evaluation | None:
    """Evaluate the result beside the float original on the decision split; return None for NaN or infinity."""
    engines = engines_of(shipped.variants)
    chosen = {name: engines[name] for name in (shipped.reference, "result")}
    assert subject.data.decision is not None
    with steps.step("decide on the engine") as tick:
        try:
            return evaluate_engines(builder, chosen, subject.data.decision, shipped.reference, tick)
        except EvaluationError:
            return None


def _built(
    baseline: Variant,
    rewritten: _Rewritten,
    settings: Settings,
    evaluator: GraphEvaluator,
    folder: Path,
    steps: Steps,
) -> _Shipped:
    """Lower the result beside the baseline, convert both to the precision, and build all engines."""
    builder, converter, found = evaluator.builder, evaluator.converter, set(folder.iterdir())
    variants = [baseline, _lowered(baseline, rewritten, builder, steps)]
    factorial = settings.factorial and variants[0].float_file != variants[1].float_file
    if factorial:
        variants += factorial_cells.unmerged(rewritten.choice, rewritten.unmerged, builder)
    settings, trials = _with_precision(settings, variants[1], converter, steps)
    variants = convert_variants(variants, settings.precision, converter, steps)
    conversions = {each.name: each.conversion for each in variants if each.conversion is not None}
    if factorial:
        variants = factorial_cells.with_cells(variants, settings.precision)
    variants = build_variants(variants, builder, folder, steps)
    if settings.merge_decoder:
        with steps.step("merge the files of the decoder"):
            merge(folder)
    files = frozenset(set(folder.iterdir()) - found)
    return _Shipped(rewritten, variants, settings, trials, conversions, factorial, files)


def _lowered(baseline: Variant, rewritten: _Rewritten, builder: EngineBuilder, steps: Steps) -> Variant:
    """Lower the result and compare it with torch.

    It shares the file of the baseline if no change, folding or removal of nodes made it different.
    """
    if not rewritten.choice.plan.changes and rewritten.folded.signature() == baseline.graph.signature():
        return dataclasses.replace(baseline, name="result")
    with steps.step("lower the result, check against torch"):
        file = f"result{rewritten.choice.count or ''}"  # a file of its own for each plan that is tried
        return lower_variant("result", rewritten.graph, rewritten.folded, builder, file=file)


def _with_precision(
    settings: Settings, result: Variant, converter: PrecisionConverter, steps: Steps
) -> tuple[Settings, tuple[Trial, ...]]:
    """Return the settings with the precision that ``auto`` chooses, and the precisions tried."""
    if settings.precision != AUTO:
        return settings, ()
    chosen, trials = converter.choose(result.float_file, steps)
    return dataclasses.replace(settings, precision=chosen), trials


def _engine(
    rewritten: _Rewritten,
    variants: Sequence[Variant],
    evaluator: GraphEvaluator,
    folder: Path,
    settings: Settings,
    steps: Steps,
    gpus: Gpus | None,
) -> dict[str, Any]:
    """Return the ``engine`` part of the report; with ``--defer-build``, write the files for the device.

    Engines for other GPUs are built here and deferred too: the device builds its own and completes the report.
    """
    builder = evaluator.builder
    if settings.defer_build:
        deferred = package.write(folder, variants, builder, evaluator.timer.inputs, settings, steps)
        return (
            deferred
            if gpus is None
            else deferred | {"ahead_of_time": build_ahead(folder, gpus, builder.options, steps)}
        )
    shipped = engines_of(variants)["result"]
    folded, target = rewritten.folded, builder.target
    built = {"state": "built", "target": target.name, "file": shipped.name}
    ends = {"inputs": list(folded.inputs), "outputs": list(folded.outputs)}
    layers = {"layers": engine_layers.layers_of(target, shipped, builder.options)}
    return built | ends | layers | (serving(folder) if settings.target == TRANSFORMERS else {})


def _write(report: Report, folder: Path, subject: TracedModel) -> None:
    """Write report.json, and report.html with previews of the samples whose prediction changed."""
    content = utf8(report.to_dict())
    indices = [] if report.quality is None else [each.place for each in report.quality.changed]
    (folder / REPORT).write_text(report.to_json())
    page = html(content, previews(subject.data.test, indices))
    (folder / PAGE).write_text(page, encoding="utf-8", errors="backslashreplace")


def _lost(rewritten: _Rewritten, subject: TracedModel) -> Iterator[Limitation]:
    """Yield the limitations of the plan: tokens that cannot be merged, and a KV cache that it removes."""
    search = rewritten.choice.search
    if search is not None and math.isfinite(search.limit) and search.validation.bounded.expects_loss:
        yield Limitation(
            "calibrated probabilities",
            "the loss of accuracy to expect takes the original's probabilities as they are, without a fitted "
            "temperature; an original that is too confident overstates it, one that is too modest understates it",
        )
    if stage_of_state(rewritten.folded) and subject.no_quality_because is None:
        yield Limitation(
            "image tokens",
            "quality is that of whole texts, so the token that ranks image tokens is the last of the answer, not of "
            "the question as in generation",
        )
    merging = None if search is None else search.why_no_merging()
    if merging is not None:
        yield Limitation("token merging", f"not possible after any attention ({merging.rstrip('.')})")
    if subject.model.state and not rewritten.folded.state:
        yield Limitation(
            "KV cache",
            "the result has none, because the plan removes every attention; pass use_cache=False to Optimum's classes",
        )


def _evidence(rewritten: _Rewritten, subject: TracedModel) -> dict[str, Any]:
    """Return the measurements that the choice is based on; for a plan that merges, also the tokens at each site."""
    choice = rewritten.choice
    if not choice.plan.merges:
        return choice.evidence
    return choice.evidence | {"tokens": tokens_left(rewritten.graph, subject.sites, subject.data.test)}


def _generation(
    parts: Mapping[str, Mapping[str, Latency]], calls: Mapping[str, Call], settings: Settings, subject: TracedModel
) -> dict[str, Any] | None:
    """Return the timed generation and the latency of its calls by variant; None for models without a KV cache."""
    generate = generation_lengths(settings, subject.model)
    if generate is None:
        return None
    latencies = {name: {call: latency_to_dict(each) for call, each in timed.items()} for name, timed in parts.items()}
    return {**dataclasses.asdict(generate), "behind": generate.behind, "calls": latencies}


def _healed(
    choice: Choice, subject: TracedModel, settings: Settings, seconds: float, steps: Steps
) -> tuple[Choice, Graph, Healed | None]:
    """Heal the graph of a choice if ``--heal`` is set; return the choice, the graph as it ships and the report.

    A search that healing follows may exceed the limit on the loss. If healing does not recover the excess, the last
    changes of the search are undone until the loss is within the limit, and that graph is healed. Half of the time is
    left for it, if there is such a plan.
    """
    if settings.heal == "none" or not choice.plan.changes:
        return choice, choice.reduced(), None
    milder = None if choice.search is None else choice.within(settings.loss_limit)
    retried = milder is not None and milder.count < choice.count and bool(milder.plan.changes)
    start = time.perf_counter()
    graph, healed = _heal(choice, subject, settings, seconds / 2 if retried else seconds, steps)
    if milder is not None and healed.after["loss"] > settings.loss_limit + ROUNDING:
        choice = milder
        if not choice.plan.changes:
            return choice, choice.reduced(), None
        graph, healed = _heal(choice, subject, settings, max(seconds - (time.perf_counter() - start), 0.0), steps)
    return choice, graph, healed


def milder_exists(choice: Choice) -> bool:
    """Return whether a plan with fewer changes of the search would still change something."""
    return choice.search is not None and choice.count > 0 and bool(choice.at(max(choice.count - 1, 0)).plan.changes)


def _heal(
    choice: Choice, subject: TracedModel, settings: Settings, budget: float, steps: Steps
) -> tuple[Graph, Healed]:
    with steps.step(f"heal ({settings.heal})") as tick:
        validation = None if choice.search is None else choice.search.validation
        if validation is None:
            validation = ValidationLoss(
                subject.graph,
                subject.model,
                subject.data.validation,
                subject.metric,
                settings.budget,
                subject.executor,
            )
        return heal(
            settings.heal,
            choice.reduced(),
            subject.graph,
            subject.model,
            subject.data.calibration,
            validation,
            changed=[site for site in subject.sites if site.name in choice.plan.changes],
            budget=budget,
            seed=settings.seed,
            progress=tick,
            unmerged=choice.graph if choice.plan.merges else None,
            **({"stored": partial(rounded, model=subject.model)} if settings.target == TRANSFORMERS else {}),
        )


def _sizes(engines: Mapping[str, Path], subject: TracedModel, final: Graph, target: str) -> dict[str, Size]:
    """Return the size of each variant; llama.cpp keeps its cache as F16, and other engines as the graph's float32."""
    result = (final, Costs(final, subject.costs.example))

    def of(path: Path, graph: Graph, costs: Costs) -> Size:
        cache = bytes_per_token(graph) // 2 if target == GGUF else bytes_per_token(graph)
        return Size(costs.total.parameters, costs.total.multiply_adds, engine_bytes(path), cache)

    return {
        name: of(path, *(result if name == "result" else (subject.graph, subject.costs)))
        for name, path in engines.items()
    }


def _notes(report: Report, settings: Settings, subject: TracedModel, rewritten: _Rewritten) -> tuple[str, ...]:
    notes, healed = [*resumed(report.search), *price_notes(report.search)], rewritten.healed
    notes += [*without_merges.sentences(report.search), *depth_order.sentences(report.search)]
    if "decision" in report.search:
        notes.append(decision_sentence(report.search["decision"], settings.tokens, settings.image_tokens))
    if settings.drop == "auto" and not report.plan.changes and not rewritten.choice.found:
        notes.append(_unchanged(report, settings))
    if report.quality is not None and settings.drop == "auto":
        lost = report.quality.bounded_loss(settings.budget)
        if lost > settings.loss_limit:
            advice = "; use more samples for a more reliable choice" if rewritten.choice.count else ""
            notes.append(
                f"The loss on test data is {lost:.2f} %, above the limit of {settings.loss_limit:g} %{advice}."
            )
    if healed is not None:
        notes.append(f"Healing ({healed.method}): {healed.note}.")
    elif settings.heal != "none":
        notes.append(f"Healing ({settings.heal}): skipped, because the plan changes nothing.")
    if settings.factorial and report.factorial is None:
        notes.append("Factorial: skipped, because the plan changes nothing.")
    notes += [*precision_notes(report), *recipe_notes(report), *_cross_caches(subject, rewritten)]
    notes += [] if subject.data.prompts is None else [subject.data.prompts.sentence()]
    notes += image_token_stages.sentences(report.image_tokens)
    notes += [] if report.generation is None else shares_of_time(report.generation)
    notes += subject.executor.said
    exact = exact_rewrites.sentence(report.to_dict())
    notes += [] if exact is None else [exact]
    return (*notes, *report.slower(), *report.missed(), *report.exceeded())


def _cross_caches(subject: TracedModel, rewritten: _Rewritten) -> Iterator[str]:
    """Yield the size of the caches of cross-attentions before and after."""
    before, after = (bytes_per_source_token(graph) for graph in (subject.graph, rewritten.folded))
    if before:
        yield f"The caches of cross-attentions take {after} bytes for each token of a source (baseline {before})."


def _unchanged(report: Report, settings: Settings) -> str:
    """Return the sentence of a search that changed nothing, with what it tried."""
    limit = f" within {settings.loss_limit:g} % loss on validation data" if math.isfinite(settings.loss_limit) else ""
    tried, sites, total = report.search["validated"], report.search["validated_sites"], len(report.plan.decisions)
    if not tried:
        return f"The search changed nothing{limit}: {report.search['ended']}."
    return (
        f"The search changed nothing{limit}: it tried {tried} changes at {sites} of {total} sites, and each lost more; "
        f"{report.search['ended']}."
    )
