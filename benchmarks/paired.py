"""Evaluation of variants of a model on test data, each side by side with others of equal cost."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from token_methods import AS_IS, JointRun

from compressor.data.splits import Split
from compressor.lower.traced_model import TracedModel
from compressor.measure.workload import workload_calls
from compressor.quality.evaluate import Evaluation, evaluate
from compressor.quality.intervals import bootstrap
from compressor.quality.output_divergence import OutputDivergence
from compressor.search.cost_model import CostModel, multiply_add_cost_model
from compressor.search.planner import output_divergence
from compressor.search.rewriter import Rewriter
from compressor.settings import Settings
from compressor.workspace.progress import Steps
from passes.graph.graph import Graph, Site

FITTED = 64

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Variant:
    """A rewritten graph, the names of the variants that it is compared with, and further values of its row."""

    graph: Graph
    against: Sequence[str] = ()
    told: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """A traced model, and what all variants of it share."""

    subject: TracedModel
    settings: Settings

    @cached_property
    def rewriter(self) -> Rewriter:
        """The rewriter, which fits maps on the calibration samples."""
        return Rewriter(self.subject.graph, self.subject.sites, self.subject.data.calibration)

    @cached_property
    def effects(self) -> OutputDivergence:
        """The divergence on those calibration samples on which the search measures effects."""
        samples = self.subject.data.calibration.head(self.settings.search_samples)
        return output_divergence(self.subject, samples, Steps(None))

    @cached_property
    def fitting(self) -> Split:
        """Other calibration samples, at most `FITTED`."""
        return self.subject.data.calibration.beside(self.effects.split, FITTED)

    @cached_property
    def prices(self) -> CostModel:
        """The cost model, in multiply-adds."""
        return multiply_add_cost_model(self.subject.graph, workload_calls(self.subject, self.settings))

    def saved(self, graph: Graph) -> float:
        """Return the share of the multiply-adds that a graph saves."""
        return 1.0 - self.prices.cost(graph) / self.prices.cost(self.subject.graph)

    def least(self, graphs: Mapping[Key, Graph]) -> Key:
        """Return the key of the graph of the least divergence on calibration samples, the first of equal ones."""
        _, found = self.effects.measure(self.subject.graph, graphs)
        return min(found, key=found.__getitem__)

    def judged(self, variants: Mapping[str, Variant]) -> dict[str, dict[str, Any]]:
        """Return the rows of variants: divergence and loss on test data, alone and against others."""
        joint = JointRun(self.subject, {name: variant.graph for name, variant in variants.items()})
        runners = {AS_IS: joint.runner(None)} | {name: joint.runner(name) for name in variants}
        head, metric = self.subject.head, self.subject.metric
        found = evaluate(self.subject.data.test, runners, head=head, metric=metric, reference=AS_IS)
        return {name: self._row(name, variant, found) for name, variant in variants.items()}

    def _row(self, name: str, variant: Variant, found: Evaluation) -> dict[str, Any]:
        return dict(variant.told) | {
            "saved": self.saved(variant.graph),
            "divergence": asdict(found.label_free(name)["divergence"]),
            "loss": asdict(found.loss(AS_IS, name)),
            "against": {other: difference(found, name, other) for other in variant.against},
        }


def difference(found: Evaluation, name: str, other: str) -> dict[str, dict[str, float]]:
    """Return by how much a variant diverges and loses more than another on the same samples."""
    pair = {"mine": found.columns[name]["divergence"], "base": found.columns[other]["divergence"]}
    more = bootstrap(lambda part: (part["mine"] - part["base"]).mean(-1), pair)
    return {"divergence": asdict(more), "loss": asdict(found.loss(other, name))}


def attentions_and_mlps(sites: Sequence[Site]) -> list[tuple[Site, Site]]:
    """Return the attention and the MLP of each block, in order; blocks of other branches are left out."""
    by_block: dict[str, dict[str, Site]] = {}
    for site in sites:
        by_block.setdefault(site.block, {})[site.kind] = site
    return [(kinds["attention"], kinds["mlp"]) for kinds in by_block.values() if {"attention", "mlp"} <= kinds.keys()]
