"""Search again without merged tokens, where samples that the search never saw refuse most of a plan that merges.

Merged tokens move the output little for what they save, so a search takes them early. On sentence embeddings they cost
several times as much of the rank correlation as other changes of that divergence, and a plan keeps its first changes to
the end: with one lucky merge in front, no plan of MiniLM held on fresh samples (benchmarks/README.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from compressor.search.decision import Decision
from compressor.search.greedy import Search, merges
from compressor.search.planner import Choice, choice_of, run_search
from compressor.workspace.progress import Steps

FACTS = "without_merges"
KEPT = 0.5  # share of what a search saves that the decision keeps at least, or else there is a second search


def strongest(choice: Choice, decision: Decision, steps: Steps) -> Choice:
    """Return the strongest plan that holds on the decision split, of one search or of two.

    The second one begins before the first merge. It is run where the first search merged tokens and less than `KEPT` of
    what it saves holds, and its plan is taken if that is predicted to be faster. `Choice.facts` then has
    ``without_merges`` with the number of changes ``found`` and ``chosen`` of the second search, whether it is ``kept``,
    and the ``trials`` of the other search. A search for a given speed-up is not run again, nor one with a confidence,
    whose tests are planned for one path.

    Args:
        choice: all changes of the search.
        decision: judges plans on the decision split.
        steps: shows progress.
    """
    first = decision.strongest(choice, steps)
    search = choice.search
    assert search is not None
    if decision.confidence is not None or "goal" in choice.facts or not _refused(first, search):
        return first
    earlier = list(decision.trials)
    again = search.without_merges()
    run_search(again, steps)
    found = choice_of(again, choice.plan.model, choice.plan.rule, choice.evidence)
    second = decision.strongest(found, steps)
    later = decision.trials[len(earlier) :]
    kept = second.facts["predicted_speedup"] > first.facts["predicted_speedup"]
    decision.trials[:] = later if kept else earlier
    others = [trial.to_dict() for trial in (earlier if kept else later)]
    facts = {"found": found.count, "chosen": second.count, "kept": kept, "trials": others}
    chosen = second if kept else first
    return replace(chosen, facts=chosen.facts | {FACTS: facts})


def _refused(chosen: Choice, search: Search) -> bool:
    """Return whether a search merged tokens, and the decision refused most of what it saves."""
    if not any(merges(step.action) for step in search.steps):
        return False
    saved, held = (1.0 - 1.0 / speedup for speedup in (search.speedup, chosen.facts["predicted_speedup"]))
    return held < KEPT * saved


def sentences(facts: Mapping[str, Any]) -> list[str]:
    """Return what came of a second search, as a sentence; none if there was none."""
    if FACTS not in facts:
        return []
    again = facts[FACTS]
    start = (
        "Samples that the search did not see refused most of its plan with merged tokens, so it was run again without"
    )
    if again["kept"]:
        return [f"{start} them, and this plan ships, which is predicted to be faster."]
    return [f"{start} them; {again['chosen']} of its {again['found']} changes hold, which is no faster."]
