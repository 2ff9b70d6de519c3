"""The search for drops: against the rewritten graph, a search without laziness, and planted redundancy."""

import dataclasses
import functools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import compressor.search
from compressor import models
from compressor.data import Shares, load
from compressor.evaluate import EvaluationError, evaluate, graph_runner, metric_for, tensor_batches
from compressor.search import PATIENCE, Effects, Loss, Validation, search
from compressor.trace import trace
from passes.base import apply
from passes.cost import Costs
from passes.drop import Drop
from passes.plan import Plan
from passes.run import Program, run
from passes.sites import find_sites
from tests.architectures import TIMM, TRANSFORMERS

BY_NAME = {architecture.name: architecture for architecture in TIMM + TRANSFORMERS}


@functools.cache
def digits():
    """The embedded model, trained, with 160 of its samples: 40 to calibrate, 40 to validate."""
    model = models.load(None)
    data = load(str(models.SAMPLE / "digits.npz"), model.preprocess, task=model.task, shares=Shares(total=160))
    graph = trace(model)
    return model, data, graph, find_sites(graph)


def auto(max_loss, samples=16, **changes):
    model, data, graph, sites = digits()
    effects = Effects(graph, model, data.calibration.head(samples))
    metric = changes.get("metric", metric_for(model.task, data.label_kind))
    validation = Validation(graph, model, data.validation, metric)
    lines = []
    plan = search(
        graph, model, sites, Costs(graph, model.example), effects, validation, max_loss=max_loss, progress=lines.append
    )
    return plan, validation.sweeps, validation, lines


@functools.cache
def searched(max_loss):
    return auto(max_loss)


@dataclasses.dataclass
class Tensors:
    """A split of ready tensors, in batches of the size asked for."""

    rows: np.ndarray
    labels: np.ndarray | None = None
    indices: tuple[int, ...] = ()

    def __post_init__(self):
        self.indices = tuple(range(len(self.rows))) if not self.indices else self.indices

    def __len__(self):
        return len(self.indices)

    def batches(self, size):
        for start in range(0, len(self), size):
            part = list(self.indices[start : start + size])
            labels = None if self.labels is None else self.labels[part]
            yield SimpleNamespace(
                feeds={"x": self.rows[part]}, labels=labels, rows_per_sample=1, ids=tuple(map(str, part))
            )


def small(change=lambda module: None):
    """A two-block ViT with random weights (four sites), changed, and 24 random images."""
    model = BY_NAME["vit"].load()
    with torch.no_grad():
        change(model.module)
    graph = trace(model)
    images = np.random.default_rng(0).random((24, 3, 32, 32), dtype=np.float32)
    return dataclasses.replace(model, task="image-classification"), graph, find_sites(graph), Tensors(images)


# ----------------------------------------------------------------------------------------------- the whole, on digits


@pytest.mark.parametrize("max_loss", [0.0, 2.6, 30.0])
def test_the_rewritten_graph_keeps_the_budget(max_loss):
    """Evaluated anew with the drops carried out: 40 samples, so that one wrong answer is 2.5 points."""
    plan, _, validation, _ = searched(max_loss)
    model, data, graph, _ = digits()
    rewritten = graph.fork()
    apply(Drop(plan.dropped), rewritten)
    runners = {
        "before": graph_runner(model, functools.partial(run, graph)),
        "after": graph_runner(model, functools.partial(run, rewritten)),
    }
    found = evaluate(data.validation, runners, metric="accuracy", reference="before")
    expected = float(found.columns["after"]["regret"].mean()) * 100
    assert found.loss_value("before", "after") <= max_loss
    assert expected <= max_loss
    by_name = {site.name: site for site in digits()[3]}
    again = validation.loss([by_name[name] for name in plan.order])
    assert again.percent == pytest.approx(max(found.loss_value("before", "after"), expected), abs=1e-6)  # other batches
    if plan.dropped:
        assert f"{again.percent:.2f} % with {len(plan.order)} dropped" in reason(plan, plan.order[-1])


def reason(plan, name):
    return next(decision.reason for decision in plan.decisions if decision.site == name)


def test_larger_budgets_drop_more_and_start_the_same():
    plans = [searched(max_loss)[0] for max_loss in (0.0, 2.6, 30.0)]
    assert len(plans[0].order) <= len(plans[1].order) <= len(plans[2].order)
    assert 0 < len(plans[2].order) < 24
    refused = [next((d.site for d in plan.decisions if "would exceed" in d.reason), None) for plan in plans]
    assert refused[0] is not None  # no loss at all cannot be kept by dropping everything
    small_plan, large_plan = plans[1], plans[2]
    common = 0
    while common < len(small_plan.order) and small_plan.order[common] == large_plan.order[common]:
        common += 1
    # Up to its first refusal the smaller budget walks the same way.
    first = next(i for i, line in enumerate(searched(2.6)[3]) if not line.startswith(f"{i + 1} dropped"))
    assert common >= first


def test_every_site_has_a_measured_reason():
    plan, _, _, lines = searched(2.6)
    for decision in plan.decisions:
        if decision.action == "drop":
            assert "validation loss" in decision.reason
            assert "dropped" in decision.reason
        else:
            assert "would exceed 2.6 %" in decision.reason or decision.reason.startswith("not tried: added ")
        assert "nan" not in decision.reason
    assert len(lines) == sum("validation loss" in decision.reason for decision in plan.decisions)
    assert Plan.from_json(plan.to_json()) == plan
    plan.check(digits()[3])


def test_search_is_deterministic():
    assert auto(2.6)[0] == searched(2.6)[0]


def test_search_stops_after_so_many_refusals_in_a_row():
    lines = searched(0.0)[3]
    counts = [int(line.split()[0]) for line in lines]
    refusals = [later == earlier for earlier, later in zip([0, *counts], counts, strict=False)]
    assert refusals[-PATIENCE:] == [True] * PATIENCE
    row = 0
    for refused in refusals[:-1]:
        row = row + 1 if refused else 0
        assert row < PATIENCE


def test_stopping_early_changes_no_decision(monkeypatch):
    """A candidate that is certain to break the budget need not be run to the end; with the end the plan is the same."""
    plan, sweeps, _, _ = searched(2.6)
    bounded = Validation.loss

    def unbounded(validation, skip, *, limit):
        assert limit == 2.6
        return bounded(validation, skip)

    monkeypatch.setattr(Validation, "loss", unbounded)
    patient, full, _, lines = auto(2.6)
    assert (patient.order, patient.dropped) == (plan.order, plan.dropped)
    assert full == pytest.approx(1 + len(lines))
    assert sweeps < full


# ------------------------------------------------------------------------------------------------------------ effects


def test_effects_are_measured_under_the_current_drops():
    """Against a rewritten graph per candidate, divergence written out; torch.equal graphs, so float64 sums only."""
    model, graph, sites, split = small()
    effects = Effects(graph, model, split)

    def naive(skip):
        rewritten = graph.fork()
        apply(Drop(tuple(site.name for site in skip)), rewritten)
        total = 0.0
        for feeds in tensor_batches(split):
            with torch.inference_mode():
                p, q = (run(each, feeds)[0].double().softmax(-1) for each in (graph, rewritten))
            total += float((p * (p.log() - q.log())).sum())
        return total / len(split)

    for skip in ([], [sites[0]], [sites[1], sites[2]]):
        rest = [site for site in sites if site not in skip]
        base, found = effects.measure(skip, rest)
        assert base == pytest.approx(naive(skip), abs=1e-7)  # the search sums float32 terms
        for site in rest:
            assert found[site] == pytest.approx(naive([*skip, site]), abs=1e-7)
    assert effects.measure([], [])[0] == 0.0


def test_effects_of_blocks_are_those_of_all_their_sites():
    model, graph, sites, split = small()
    effects = Effects(graph, model, split)
    blocks = [sites[:2], sites[2:]]
    assert effects.of_units(blocks) == [effects.measure(list(block), [])[0] for block in blocks]
    assert effects.of_units([[site] for site in sites]) == list(effects.measure([], sites)[1].values())


def test_sweeps_count_the_nodes_that_were_run(monkeypatch):
    model, graph, sites, split = small()
    effects = Effects(graph, model, split)
    assert effects.sweeps == 1.0
    executed = []
    step = Program.step
    monkeypatch.setattr(Program, "step", lambda self, node, values: executed.append(node) or step(self, node, values))
    computed = lambda nodes: sum(node.op == "call_function" for node in nodes)  # noqa: E731
    run(graph, next(tensor_batches(split)))
    one = computed(executed)
    executed.clear()
    effects.measure([sites[1]], [sites[0], *sites[2:]])
    assert effects.sweeps - 1 == pytest.approx(computed(executed) / one, abs=1e-12)
    assert effects.sweeps - 1 < 4  # forks share what comes before them
    before = effects.sweeps
    executed.clear()
    effects.of_units([sites[:2], sites[2:]])
    assert effects.sweeps - before == pytest.approx(computed(executed) / one, abs=1e-12)


def test_texts_are_compared_where_there_is_no_padding():
    model = BY_NAME["hf_bert"].load()
    with torch.no_grad():
        for parameter in model.module.encoder.parameters():
            parameter.mul_(8.0 if parameter.ndim > 1 else 1.0)  # random weights start so small that nothing matters
    graph = trace(model)
    sites = find_sites(graph)
    feeds = {name: value.numpy() for name, value in model.example.items()}
    short = {name: value[1:, :5] for name, value in feeds.items()}  # the second row, whose last two tokens are padding
    padded = {name: value[1:] for name, value in feeds.items()}
    measured = []
    for rows in (short, padded):
        split = SimpleNamespace(batches=lambda _, rows=rows: iter([SimpleNamespace(feeds=rows)]))
        measured.append(Effects(graph, model, split).of_units([[site] for site in sites]))
    assert measured[0] == pytest.approx(measured[1], abs=1e-6)  # 1 - cosine in float32
    assert min(measured[0]) > 1e-4


# ------------------------------------------------------------------------------------------------- choices, on purpose


def greedy(effects, sites, saved, count):
    """Measures everything again at each step."""
    skip, rest = [], list(sites)
    while len(skip) < count:
        base, found = effects.measure(skip, rest)
        best = min(rest, key=lambda site: (found[site] - base) / saved[site])
        skip.append(best)
        rest.remove(best)
    return [site.name for site in skip]


@pytest.mark.parametrize("seed", range(4))
def test_choices_equal_those_of_a_search_that_measures_everything_again(seed):
    def scaled(module):
        torch.manual_seed(seed)
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)

    model, graph, sites, split = small(scaled)
    costs = Costs(graph, model.example)
    effects = Effects(graph, model, split)
    validation = Validation(graph, model, split, "agreement")
    plan = search(graph, model, sites, costs, effects, validation, max_loss=100.0)
    saved = {site: costs.saved(site).multiply_adds for site in sites}
    assert list(plan.order) == greedy(effects, sites, saved, len(sites))


class Planted:
    """Effects that only ever grow with what else is gone: the case for which lazy greedy is exact (Minoux 1978)."""

    def __init__(self, sites, seed):
        rng = np.random.default_rng(seed)
        self.own = dict(zip(sites, rng.random(len(sites)), strict=True))
        self.pairs = rng.random((len(sites), len(sites)))
        self.measured = 0

    def measure(self, skip, candidates):
        self.measured += len(candidates)
        return self._of(skip), {site: self._of([*skip, site]) for site in candidates}

    def _of(self, gone):
        together = sum(self.pairs[a.order, b.order] for a in gone for b in gone if a.order < b.order)
        return sum(self.own[site] for site in gone) + 0.2 * float(together)


@pytest.mark.parametrize("front", [1, 2, 6])
@pytest.mark.parametrize("seed", range(3))
def test_laziness_is_exact_where_effects_only_grow(front, seed, monkeypatch):
    monkeypatch.setattr(compressor.search, "FRONT", front)
    model, _, graph, sites = digits()
    costs = Costs(graph, model.example)
    lazy, eager = Planted(sites, seed), Planted(sites, seed)
    unlimited = SimpleNamespace(split=[], loss=lambda skip, *, limit: Loss(0.0, 0))
    plan = search(graph, model, sites, costs, lazy, unlimited, max_loss=1.0)
    saved = {site: costs.saved(site).multiply_adds for site in sites}
    assert list(plan.order) == greedy(eager, sites, saved, len(sites))
    assert lazy.measured < eager.measured


@pytest.mark.parametrize(
    "empty", [("blocks.0.mlp",), ("blocks.1.attn", "blocks.0.mlp"), ("blocks.0.attn", "blocks.1.mlp")]
)
def test_branches_that_do_nothing_go_first(empty):
    def plant(module):
        for name in empty:
            branch = module.get_submodule(name)
            last = branch.proj if name.endswith("attn") else branch.fc2
            last.weight.zero_()
            last.bias.zero_()

    model, graph, sites, split = small(plant)
    effects = Effects(graph, model, split)
    validation = Validation(graph, model, split, "agreement")
    plan = search(graph, model, sites, Costs(graph, model.example), effects, validation, max_loss=0.0)
    assert set(plan.order[: len(empty)]) == set(empty)
    for name in empty:
        assert reason(plan, name).startswith("adds 0.0000 divergence; validation loss 0.00 %")
    assert effects.measure([site for site in sites if site.name in empty], [])[0] == 0.0  # x + 0 is x


class Fragile(torch.nn.Module):
    """Without its first branch it takes the root of a negative number."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = (torch.nn.Linear(4, 4) for _ in range(3))
        with torch.no_grad():
            for layer in (self.a, self.b):
                layer.weight.zero_()
            self.a.bias.fill_(9.0)
            self.b.bias.fill_(0.0)

    def forward(self, x):
        x = x - 2.0
        x = x + self.a(x)
        x = x + self.b(x)
        return self.head(torch.sqrt(x))


def test_a_drop_that_gives_nan_is_refused_and_the_search_goes_on():
    torch.manual_seed(0)
    rows = torch.rand(6, 4)
    model = models.load(Fragile(), example_inputs=rows, task="text-classification")
    graph = trace(model)
    sites = find_sites(graph)
    split = Tensors(rows.numpy())
    effects, validation = Effects(graph, model, split), Validation(graph, model, split, "agreement")
    plan = search(graph, model, sites, Costs(graph, model.example), effects, validation, max_loss=99.0)
    assert plan.dropped == ("b",)
    assert effects.of_units([[site] for site in sites]) == [math.inf, 0.0]
    assert "validation loss inf % would exceed 99 %" in reason(plan, "a")


def test_an_original_that_gives_nan_is_an_error():
    model, graph, _, split = small(lambda module: module.head.weight.fill_(math.nan))
    with pytest.raises(EvaluationError, match="gave NaN or infinity on calibration data"):
        Effects(graph, model, split)
    with pytest.raises(EvaluationError, match="gave NaN or infinity for sample 0"):
        Validation(graph, model, split, "agreement")


# --------------------------------------------------------------------------------------------------------- validation


@pytest.mark.parametrize("metric", ["accuracy", "agreement", "fidelity"])
def test_what_is_certain_never_exceeds_the_loss(metric, monkeypatch):
    monkeypatch.setattr(compressor.search, "BATCH", 5)
    model, graph, sites, split = small()
    split.labels = np.arange(24) % 5
    validation = Validation(graph, model, split, metric)
    for skip in ([sites[0]], sites[:2], sites):
        whole = validation.loss(skip)
        assert whole.samples == 24
        for limit in (0.0, whole.percent / 2, whole.percent, 1e9):
            early = validation.loss(skip, limit=limit)
            assert early.percent <= whole.percent + 1e-9
            assert (early.percent > limit) == (whole.percent > limit)
            assert early == whole or early.percent > limit
    assert validation.loss([]).percent == pytest.approx(0.0, abs=1e-6)  # float32 cosines


def test_samples_on_which_the_original_wavers_come_first():
    model, data, graph, _ = digits()
    validation = Validation(graph, model, data.validation, "accuracy")
    assert sorted(validation.split.indices) == sorted(data.validation.indices)
    with torch.inference_mode():
        answers = torch.cat([run(graph, feeds)[0] for feeds in tensor_batches(validation.split)])
    best = answers.topk(2).values
    assert ((best[:, 0] - best[:, 1]).diff() >= -1e-5).all()  # answers in other batches round differently
    assert validation.loss([]).percent == 0.0


def test_perplexity_is_given_up_early_only_when_it_is_lost(monkeypatch):
    monkeypatch.setattr(compressor.search, "BATCH", 1)
    model = dataclasses.replace(BY_NAME["hf_bert"].load(), task="text-generation")
    graph = trace(model)
    feeds = {name: value.numpy() for name, value in model.example.items()}
    feeds["input_ids"] = feeds["input_ids"] % 8  # so that the hidden state can pass for logits
    split = TextSplit({name: np.concatenate([value] * 3) for name, value in feeds.items()})
    validation = Validation(graph, model, split, "perplexity")
    sites = find_sites(graph)
    whole = validation.loss(sites)
    early = validation.loss(sites, limit=-99.0)
    assert early.samples < whole.samples == 6
    assert -99.0 < early.percent <= whole.percent
    assert validation.loss([]).percent == pytest.approx(0.0, abs=1e-9)
    assert validation.evaluations == pytest.approx(3 + early.samples / 6, abs=0.005)


class TextSplit:
    def __init__(self, feeds):
        self.feeds = feeds

    def __len__(self):
        return len(self.feeds["input_ids"])

    def batches(self, size):
        for start in range(0, len(self), size):
            feeds = {name: value[start : start + size] for name, value in self.feeds.items()}
            ids = tuple(map(str, range(start, start + len(feeds["input_ids"]))))
            yield SimpleNamespace(feeds=feeds, labels=None, rows_per_sample=1, ids=ids)
