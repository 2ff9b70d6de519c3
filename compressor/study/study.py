"""The study of `compressor inspect --study`: redundancy of a model by depth, position and kind of token."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.executor.base import Batches
from compressor.study.dataset_agreement import CosineSums, DatasetAgreement, between, random_tokens, short
from compressor.study.ranking_stability import Stability, stability
from passes.analysis.token_axis import data_dependent_nodes, leading_constants
from passes.analysis.token_statistics import Changes, Kinds, Statistics
from passes.analysis.token_statistics import MeasureTokenStatistics as Measure
from passes.base import apply

if TYPE_CHECKING:
    import torch

    from compressor.data.splits import Data
    from compressor.lower.traced_model import TracedModel
    from compressor.models import Model
    from compressor.workspace.progress import Steps, Tick
    from passes.graph.graph import Graph, Site

# Sun et al. 2024, section 2: a massive activation is above 100 and above 1,000 times the median.
MASSIVE, TIMES = 100.0, 1000.0


@dataclass(frozen=True)
class Study:
    """The statistics of a model's sites, and the stability of their ranking by cosine over samples and data sets."""

    model: str
    task: str
    data: dict[str, Any]
    samples: int
    sites: tuple[Site, ...]
    found: Statistics
    stability: Stability | None
    agreements: tuple[DatasetAgreement, ...] = ()
    against: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the study as plain JSON values, with None for NaN."""
        return {
            "model": self.model,
            "data": self.data,
            "samples": self.samples,
            "kinds": list(self.found.kinds),
            "sites": self.site_rows(),
            "blocks": self.block_rows(),
            "states": self.state_rows(),
            "stability": None if self.stability is None else asdict(self.stability),
            "agreements": [asdict(pair) | {"alike": pair.alike} for pair in self.agreements],
        }

    def summary(self) -> tuple[str, ...]:
        """Return the findings as plain sentences with numbers."""
        from compressor.study.findings import sentences

        return tuple(sentences(self))

    def to_json(self) -> str:
        """Return the study as indented JSON."""
        return json.dumps({"summary": self.summary(), **self.to_dict()}, indent=2, allow_nan=False) + "\n"

    def site_rows(self) -> list[dict[str, Any]]:
        """Return one plain dict per site, in order."""
        ranks = [None] * len(self.sites) if self.stability is None else list(self.stability.ranks)
        return [
            {"name": site.name, "kind": site.kind, "block": site.block}
            | change_means(self.found.sites[site.name], self.found.kinds)
            | {"rank": None if rank is None else dict(zip(("value", "low", "high"), rank, strict=True))}
            for site, rank in zip(self.sites, ranks, strict=True)
        ]

    def block_rows(self) -> list[dict[str, Any]]:
        """Return one plain dict per block whose input and output have the same shape."""
        return [
            {"name": name, **change_means(changes, self.found.kinds)} for name, changes in self.found.blocks.items()
        ]

    def state_rows(self) -> list[dict[str, Any]]:
        """Return one plain dict per trunk state, named by the site it enters; the last one is ``output``."""
        entered: dict[str, str] = {}
        for site in self.sites:
            entered.setdefault(site.trunk, site.name)
        return [
            {"name": entered.get(node, "output")}
            | _state(states.kinds.numpy(), states.samples.numpy(), self.found.kinds)
            for node, states in self.found.states.items()
        ]


def study(subject: TracedModel, steps: Steps, *, seed: int = 0, against: Sequence[Data] = ()) -> Study:
    """Measure the statistics of a model's sites on its calibration data, and compare rankings of samples and data sets.

    Args:
        subject: the model with its data, graph and sites.
        steps: progress of the steps.
        seed: seed of the draws of samples.
        against: other data sets. All pairs of rankings, those with the subject's data included, are compared. Each data
            set takes one pass through the model.
    """
    own = subject.data
    with steps.step("study the sites") as tick:
        statistics = _statistics(subject, own, seed, tick)
    sums = _sums(own.source, statistics, subject.sites)
    with steps.step("compare rankings of samples") as tick:
        stable = stability(sums.tokens, sums.sums, seed=seed, progress=tick)
    sets = [sums]
    for data in against:
        with steps.step(f"rank by {short(data.source)}") as tick:
            sets.append(_sums(data.source, _statistics(subject, data, seed, tick), subject.sites))
    kinds = [site.kind for site in subject.sites]
    pairs = (between(*pair, kinds, seed=seed) for pair in itertools.combinations(sets, 2))
    agreements = tuple(pair for pair in pairs if pair is not None)
    model, count = subject.model, len(own.calibration)
    described, others = own.describe(), tuple(data.source for data in against)
    return Study(model.name, model.task, described, count, subject.sites, statistics, stable, agreements, others)


def _statistics(subject: TracedModel, data: Data, seed: int, tick: Tick) -> Statistics:
    """Run the model over the calibration data, on workers if it has any."""
    from compressor.search.planner import with_progress

    batches = Batches(subject.executor, lambda: with_progress(_batches(subject, data, seed), _rows(data), tick))
    return apply(_measure(subject, data), subject.graph, batches)


def _measure(subject: TracedModel, data: Data) -> Measure:
    kinds = kinds_of(subject.model, subject.graph, subject.sites)
    return Measure(kinds, data.calibration.samples.rows_per_sample)


def _rows(data: Data) -> int:
    return len(data.calibration) * data.calibration.samples.rows_per_sample


def _batches(subject: TracedModel, data: Data, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Return the calibration batches; random tokens have the lengths of the subject's texts, to be comparable."""
    from compressor.quality.evaluate import tensor_batches

    if data.random and "input_ids" in subject.model.inputs and not subject.data.random:
        return random_tokens(subject.model, subject.data.calibration, seed)
    return tensor_batches(data.calibration)


def _sums(name: str, statistics: Statistics, sites: Sequence[Site]) -> CosineSums:
    samples = [statistics.sites[site.name].samples.numpy() for site in sites]
    return CosineSums(name, np.stack([tokens for tokens, _ in samples]), np.stack([sums for _, sums in samples]))


def kinds_of(model: Model, graph: Graph, sites: Sequence[Site]) -> Kinds:
    """Name the kinds of a model's tokens, from the attributes of timm and transformers or else from its graph."""
    if "input_ids" in model.inputs:
        return Kinds(first="class" if model.preprocess.class_first else "first", last="last", rest="other")
    (trunk,) = [node for node in graph.nodes() if node.name == sites[0].trunk]
    tokens = len(trunk.meta["val"].shape) == 3 and sites[0].channel_dim % 3 == 2
    leading = leading_constants(trunk, 1, data_dependent_nodes(graph.nodes())) if tokens else 0
    registers = min(_registers(model.module), leading)
    classes = ("class", "distillation")[: leading - registers] if leading - registers <= 2 else ()
    others = leading - registers - len(classes)
    names = (*classes, *["register"] * registers, *["leading"] * others)
    image = model.preprocess.kind == "image" or len(next(iter(model.example.values())).shape) == 4
    return Kinds(names, rest="patch" if image else "token")


def _registers(module: Any) -> int:
    """Return the number of register tokens that a timm module or a transformers config states; 0 without one."""
    count = getattr(module, "num_reg_tokens", None)
    count = getattr(getattr(module, "config", None), "num_register_tokens", 0) if count is None else count
    return count if isinstance(count, int) else 0


def change_means(changes: Changes, kinds: Sequence[str]) -> dict[str, Any]:
    """Return the mean cosine, update and norm of a site or block: over all tokens, by kind and by position."""
    by_kind, by_position = changes.kinds.numpy(), changes.positions.numpy()
    tokens = by_kind[0].sum()
    means = {name: _mean(by_kind[row].sum(), tokens) for row, name in ((1, "cosine"), (2, "update"), (3, "norm"))}
    kind_means = {
        kind: {"tokens": int(by_kind[0, index])}
        | {
            name: _mean(by_kind[row, index], by_kind[0, index])
            for row, name in ((1, "cosine"), (2, "update"), (3, "norm"))
        }
        for index, kind in enumerate(kinds)
        if by_kind[0, index]
    }
    position_means = {
        name: [_short(_mean(value, count)) for value, count in zip(by_position[row], by_position[0], strict=True)]
        for row, name in ((1, "cosine"), (2, "update"))
    }
    counts = [int(count) for count in by_position[0]]
    return {**means, "kinds": kind_means, "positions": {"tokens": counts, **position_means}}


def _state(by_kind: Any, samples: Any, kinds: Sequence[str]) -> dict[str, Any]:
    """Return the norms of a trunk state by kind of token, and its largest activations."""
    largest, median, channel, kind = samples
    ratio = largest / np.maximum(median, 1e-12)
    top = int(np.argmax(ratio))
    channels, counts = np.unique(channel[channel >= 0], return_counts=True)
    return {
        "norm": _mean(by_kind[1].sum(), by_kind[0].sum()),
        "kinds": {name: _mean(*by_kind[::-1, index]) for index, name in enumerate(kinds) if by_kind[0, index]},
        "largest": float(largest.max()),
        "median": float(np.median(median)),
        "ratio": float(np.median(ratio)),
        "ratio_most": float(ratio[top]),
        "channel": int(channels[counts.argmax()]) if len(channels) else None,
        "channel_share": float(counts.max() / len(channel)) if len(channels) else None,
        "kind": kinds[int(kind[top])] if kind[top] >= 0 else None,
        "massive": float(np.mean((largest > MASSIVE) & (ratio > TIMES))),
    }


def _short(value: float | None) -> float | None:
    """Round to six digits: the JSON of a long text has a number for each position and branch."""
    return None if value is None else round(value, 6)


def _mean(total: float, count: float) -> float | None:
    value = float(total) / float(count) if count else math.nan
    return value if math.isfinite(value) else None
