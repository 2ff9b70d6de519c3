"""The command sweep: the Pareto front of speed and quality along one search, with some plans built and measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from compressor.choices import AUTO
from compressor.commands import SweepSettings
from compressor.errors import SettingsError
from compressor.executor.on_ray import executor_for
from compressor.lower.traced_model import check_original, index_errors_as_data_errors, load
from compressor.measure.graph_evaluator import graph_evaluator
from compressor.pipeline.unused_options import refuse_unused
from compressor.report.collect_limitations import of_sweep, of_timings
from compressor.report.pareto_report import ParetoFront, plan_name, points_to_build, with_measurements
from compressor.report.precision_notes import expected_excess
from compressor.search.planner import facts_of, make_rewriter, points_of, prepare_search, run_search
from compressor.search.stored_prices import check_prices, price_notes
from compressor.target.availability import check_target
from compressor.workspace.environment import environment
from compressor.workspace.output_folder import check_no_input, check_outside_data, output_folder, scratch_folder
from compressor.workspace.progress import Steps

if TYPE_CHECKING:
    from rich.console import Console


def sweep(
    settings: SweepSettings, *, console: Console | None = None, command: str = "compressor.sweep(...)"
) -> ParetoFront:
    """Search the plans for all budgets at once, build and measure some of them, and write the folder.

    Args:
        settings: as for `export`; the search ends at `max_loss`, and `points` plans are built, timed side by side and
            evaluated on test data.
        console: console that shows progress; None shows nothing.
        command: the command line, for the report.

    Raises:
        CompressorError, PassError, RuntimesError: the message says what was found and what to do.
    """
    if settings.tokens not in ("auto", "none"):
        raise SettingsError(
            f"a sweep starts from the original model; found --tokens {settings.tokens}, leave out --tokens."
        )
    if settings.precision == AUTO:
        raise SettingsError("a sweep compares plans in one precision; found --precision auto, give one such as int8.")
    refuse_unused(settings)
    check_prices(settings)
    target, options = check_target(settings)
    steps = Steps(console)
    output = Path(settings.output)
    check_outside_data(output, settings.data)
    check_no_input(output, settings.model, settings.data)
    with (
        output_folder(output, force=settings.force, say=steps.say) as folder,
        scratch_folder(output) as scratch,
        executor_for(settings.workers, settings.ray, steps.show, steps.warn) as executor,
    ):
        subject = check_original(load(settings, steps, executor=executor), steps)
        evaluator = graph_evaluator(subject, target, options, settings, scratch)
        with index_errors_as_data_errors(subject):
            rewriter = make_rewriter(subject, settings)
            search = prepare_search(subject, settings, rewriter, evaluator, steps)
            run_search(search, steps)
            plans = points_of(search, subject.model.name)
            chosen = points_to_build(len(plans), settings.points, [point.efficient for point in plans])
            graphs = {str(number): rewriter.rewritten(plans[number].plan.changes) for number in chosen}
        quality, latency, conversions, left_out = evaluator.measure(graphs, steps)
        excesses = (
            expected_excess(f"point {number}", facts.to_dict(), settings.max_precision_loss)
            for number, facts in conversions.items()
        )
        front = ParetoFront(
            command=command,
            settings=settings.to_dict(),
            model=subject.model.name,
            metric=None if quality is None else quality.metric,
            data=subject.data.describe(),
            points=tuple(with_measurements(point, latency.get(str(point.number)), quality) for point in plans),
            search=facts_of(search),
            environment=environment(),
            seconds=sum(step.seconds for step in steps.done),
            limitations=(
                *of_sweep(subject, settings.precision, target.name, conversions, left_out),
                *of_timings(evaluator.timer.unsteady),
            ),
            notes=(
                *price_notes(facts_of(search)),
                *subject.executor.said,
                *(sentence for sentence in excesses if sentence is not None),
            ),
        )
        (folder / "plans").mkdir()
        for point in front.points:
            (folder / plan_name(point)).write_text(point.plan.to_json())
        (folder / "sweep.json").write_text(front.to_json())
        (folder / "sweep.png").write_bytes(front.picture())
    return front
