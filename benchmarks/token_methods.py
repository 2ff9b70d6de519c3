"""Part `methods` of benchmarks/tokens.py: the methods of token reduction at equal schedules, by quality alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from compressor.data.splits import Split
from compressor.lower.traced_model import TracedModel, load
from compressor.quality.evaluate import Evaluation, evaluate
from compressor.quality.intervals import bootstrap
from compressor.settings import Settings
from compressor.workspace.environment import environment
from compressor.workspace.progress import Steps
from passes.analysis.symbolic_cost import Counter
from passes.base import apply
from passes.execute.shared_prefix import SharedPrefixRun
from passes.graph.graph import Graph
from passes.merge_tokens.token_merging import ReduceTokens
from runtimes.base.protocols import Feeds

AS_IS = "as it is"
BASE = "tome"  # the method that the others are compared with
IN_PAIRS = ("tome", "atm", "merge")
METHODS = ("tome", "atm", "unary", "evit", "attention", "norm", "merge")


@dataclass(frozen=True)
class Case:
    """A model, the methods, and schedules: shares of the tokens that go after the attention of a block, by block.

    `model` and `data` are names of `main_job.sources`, or None for the sample. The test split is used, or with `used`
    all samples but as many, on which the rule of `merge` was chosen.
    """

    model: str | None
    data: str | None
    methods: Sequence[str]
    schedules: Mapping[str, Mapping[int, float]]
    used: int | None = None
    samples: int | None = None


CASES = {
    "DeiT-Tiny": Case(
        "deit",
        "images",
        METHODS,
        {
            "25% at block 5, 37% at 8": {5: 0.25, 8: 0.37},
            "25% at 7, 45% at 9": {7: 0.25, 9: 0.45},
            "25% at 3, 37% at 5, 7 and 8": {3: 0.25, 5: 0.37, 7: 0.37, 8: 0.37},
        },
        used=400,
    ),
    "MiniLM": Case(
        "minilm", "stsb", IN_PAIRS, {"25% at block 2": {2: 0.25}, "25% at 1 and 3": {1: 0.25, 3: 0.25}}, samples=600
    ),
    "digits": Case(
        None,
        None,
        IN_PAIRS,
        {"25% at 2 and 6": {2: 0.25, 6: 0.25}, "30% at 2, 4 and 6": dict.fromkeys((2, 4, 6), 0.3)},
    ),
}


class JointRun:
    """Runners of the original model and its variants, which share what comes before the first difference.

    The runner of the original computes all of them; the others return what it computed for the same samples.
    """

    def __init__(self, subject: TracedModel, graphs: Mapping[str, Graph]) -> None:
        self.subject, self.shared = subject, SharedPrefixRun(subject.graph, graphs)
        self.latest: dict[str | None, Any] = {}

    def runner(self, name: str | None) -> Any:
        """Return the runner of a variant; None is the original."""

        def answer(feeds: Feeds) -> Any:
            if name is None:
                self.shared.run({key: torch.from_numpy(value) for key, value in feeds.items()}, self._receive)
            return self.latest[name]

        return answer

    def _receive(self, name: str | None, outputs: tuple[torch.Tensor, ...]) -> None:
        self.latest[name] = self.subject.model.evaluated_in(outputs).numpy()


def methods(case: Case, where: Mapping[str, str], steps: Steps) -> dict[str, Any]:
    """Measure every method with every schedule of one case."""
    spec, data = (None if name is None else where[name] for name in (case.model, case.data))
    subject = load(Settings(model=spec, data=data, samples=case.samples), steps)
    attentions = [site.name for site in subject.sites if site.kind == "attention"]
    graphs = {}
    for schedule, shares in case.schedules.items():
        amounts = {attentions[block]: share for block, share in shares.items()}
        graphs |= {f"{schedule}, {method}": reduced(subject.graph, amounts, method) for method in case.methods}
    test, joint = unseen(subject, case.used), JointRun(subject, graphs)
    with steps.step("run all methods"):
        runners = {AS_IS: joint.runner(None)} | {name: joint.runner(name) for name in graphs}
        found = evaluate(test, runners, head=subject.head, metric=subject.metric, reference=AS_IS)
    rows = [
        {"schedule": schedule, "method": method} | _row(f"{schedule}, {method}", f"{schedule}, {BASE}", found)
        for schedule in case.schedules
        for method in case.methods
    ]
    feeds = next(iter(subject.data.test.batches(1))).feeds
    counter = Counter(subject.graph, {name: tuple(value.shape) for name, value in feeds.items()})
    whole = counter.count(subject.graph).multiply_adds
    for row, graph in zip(rows, graphs.values(), strict=True):
        row["saved"] = 1.0 - counter.count(graph).multiply_adds / whole
    return {"metric": subject.metric, "samples": len(test), "rows": rows, "environment": environment()}


def unseen(subject: TracedModel, used: int | None) -> Split:
    """Return the test split, or all samples but those on which the rule was chosen."""
    test = subject.data.test
    if used is None:
        return test
    order = np.random.default_rng(0).permutation(len(test.samples.ids))
    return replace(test, indices=tuple(sorted(order[used:].tolist())))


def reduced(graph: Graph, shares: Mapping[str, float], method: Any) -> Graph:
    """Return a fork with the tokens reduced after some attentions."""
    fork = graph.fork()
    apply(ReduceTokens(tuple(shares.items()), method=method), fork)
    return fork


def _row(name: str, base: str, found: Evaluation) -> dict[str, Any]:
    pair = {"mine": found.columns[name]["divergence"], "base": found.columns[base]["divergence"]}
    against = bootstrap(lambda part: (part["mine"] - part["base"]).mean(-1), pair)
    return {
        "divergence": asdict(found.label_free(name)["divergence"]),
        "divergence_against_base": asdict(against),
        "loss": asdict(found.loss(AS_IS, name)),
        "loss_against_base": asdict(found.loss(base, name)),
    }
