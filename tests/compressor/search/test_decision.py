"""Decisions on fresh samples: planted losses compared with an exhaustive choice, and exports of the trained sample."""

import json
import math
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import compressor
from compressor.data.splits import Shares
from compressor.lower.traced_model import load
from compressor.quality.budget import Budget, BudgetError
from compressor.quality.evaluate import Evaluation, evaluate, graph_runner
from compressor.quality.heads.single_class import SingleClass
from compressor.quality.validation_loss import Loss
from compressor.search import planner
from compressor.search.decision import ATTEMPTS, ERRORS, SHARE, Decision, sentence, share_of
from compressor.settings import Settings
from compressor.workspace.progress import Steps
from passes.execute.interpreter import Program
from runtimes.base.protocols import BuildOptions
from runtimes.base.registry import runtime
from tests.samples import DIGITS, five_blocks

QUIET = Steps(None)


@dataclass(frozen=True)
class Plans:
    """A choice along a search whose graphs are their numbers of changes, with its losses on validation samples."""

    count: int
    efficient: tuple[bool, ...]
    validated: tuple[float, ...] = ()
    samples: int = 0

    @property
    def facts(self):
        """The front; a plan that is not efficient is no faster than the one before."""
        points, predicted = [], 1.0
        for number, efficient in enumerate((True, *self.efficient)):
            predicted += 0.1 * efficient
            points.append({"number": number, "efficient": efficient, "predicted": predicted})
        return {"front": points}

    @property
    def found(self):
        return len(self.efficient)

    def at(self, count):
        return replace(self, count=count)

    def reduced(self):
        return self.count

    def validation_loss(self):
        return Loss(self.validated[self.count] * 100 if self.count and self.samples else 0.0, self.samples)


@dataclass(frozen=True)
class Fixed(Plans):
    """A choice with a front of its own."""

    front: list[dict[str, float]] = field(default_factory=list)

    @property
    def facts(self):
        return {"front": self.front}


@dataclass
class Planted:
    """Losses of samples by number of changes, [changes, samples], between 0 and 1."""

    table: np.ndarray
    averages: bool = False
    error: float = 0.0
    passes: list[int] = field(default_factory=list)
    bounded: Budget = field(default_factory=lambda: Budget(SingleClass(), "agreement"))

    @property
    def split(self):
        return range(self.table.shape[1])

    def loss(self, graph, *, limit, with_error=False):
        self.passes.append(graph)
        return Loss(float(self.table[graph].mean()) * 100, len(self.split), self.error if with_error else 0.0)

    def sample_losses(self, graph):
        self.passes.append(graph)
        return self.table[graph]


def engine(losses):
    """Return the evaluation of an engine with planted losses."""
    columns = {"result": {"regret": losses}, "original": {"agreement": np.ones(len(losses))}}
    return Evaluation("agreement", columns, head=SingleClass())


paths = st.lists(st.tuples(st.floats(0, 0.05), st.booleans()), min_size=1, max_size=9)


@given(paths, st.floats(0, 5))
def test_the_strongest_efficient_plan_within_the_limit_is_taken(path, limit):
    table = np.array([[0.0], *([loss] for loss, _ in path)]).repeat(20, axis=1)
    choice = Plans(len(path), tuple(efficient for _, efficient in path))
    found = Decision(Planted(table), limit).strongest(choice, QUIET).count
    allowed = [n for n, (loss, efficient) in enumerate(path, 1) if efficient and loss * 100 <= limit + 1e-9]
    assert found == max(allowed, default=0)


@given(paths, st.floats(0.5, 5), st.integers(0, 400), st.data())
def test_the_loss_to_expect_of_new_samples_is_within_the_limit_too(path, limit, used, data):
    """It counts the validation samples and one further sample, which is lost in full."""
    table = np.array([[0.0], *([loss] for loss, _ in path)]).repeat(300, axis=1)
    validated = tuple(data.draw(st.lists(st.floats(0, 0.05), min_size=len(table), max_size=len(table))))
    choice = Plans(len(path), tuple(efficient for _, efficient in path), validated, used)
    decision = Decision(Planted(table, averages=True), limit)
    found = decision.strongest(choice, QUIET)
    fine = [0]
    for number, (loss, efficient) in enumerate(path, 1):
        expected = 100 * np.append(np.repeat([loss, validated[number]], [300, used]), 1.0).mean()
        if efficient and max(loss * 100, expected) <= limit - 1e-6:
            fine.append(number)
        if number == found.count:
            assert max(loss * 100, expected) <= limit + 1e-6
            assert decision.trials[-1].expected == pytest.approx(expected)
    assert found.count >= max(fine)
    assert decision.holds(found, engine(table[found.count]), "original", certify=True)
    if found.count:
        assert decision.trials[-1].expected == pytest.approx(decision.trials[-2].expected)


def test_a_loss_that_is_no_mean_is_held_with_its_standard_error():
    """Of three plans the luckiest would be taken: the second loses little on these samples, but they tell little."""
    table = np.array([[0.0], [0.001], [0.008], [0.03]]).repeat(50, axis=1)
    decision = Decision(Planted(table, error=0.5 / ERRORS), 1.0)
    found = decision.strongest(Plans(3, (True,) * 3), QUIET)
    assert found.count == 1
    assert [trial.raised for trial in decision.trials] == pytest.approx([3.5, 1.3, 0.6])
    assert decision.needed == math.ceil(50 * (0.5 / 0.2) ** 2)  # the error has to be as small as what is left, 0.2
    assert decision.holds(found, engine(table[1]), "original", certify=True)
    said = sentence(decision.facts(found) | {"raised": 0.6})
    assert (
        "with a loss of 0.10 % (limit 1 %; 0.60 % with its standard error); the next plan would need about 313" in said
    )
    mean = Decision(Planted(table, averages=True), 1.0)
    assert mean.strongest(Plans(3, (True,) * 3, (0.0,) * 4, 300), QUIET).count == 2


@pytest.mark.parametrize(("spread", "held"), [(0.0, True), (0.02, True), (0.08, False)])
def test_the_engine_is_held_with_its_standard_error_too(spread, held):
    """A mean divergence of 0.5 hundredths of a nat over 100 samples, of which half lie above and half below it."""
    divergence = 0.005 + spread * np.tile([-1.0, 1.0], 50)
    decision = Decision(Planted(np.zeros((2, 100)), bounded=Budget(SingleClass(), "agreement", "divergence")), 1.0)
    evaluation = Evaluation(
        "agreement", {"result": {"divergence": divergence}, "original": {"agreement": np.ones(100)}}
    )
    assert decision.holds(Plans(1, (True,)).at(1), evaluation, "original", certify=False) == held
    assert decision.trials[-1].raised == pytest.approx(0.5 + ERRORS * 100 * spread / 10)


def test_the_mean_loss_of_new_samples_keeps_to_the_limit():
    """Conformal risk control, which needs no more than that the same samples are hard for every plan.

    The strongest plan whose loss on the samples is within the limit loses more than the limit on average.
    """
    rng, limit, means = np.random.default_rng(0), 2.0, np.linspace(0.0, 0.06, 13)
    lost = {True: [], False: []}
    for _ in range(400):
        table = (rng.random(60) < means[:, None]).astype(float)
        for averages, losses in lost.items():
            decision = Decision(Planted(table, averages=averages), limit)
            losses.append(means[decision.strongest(Plans(12, (True,) * 12), QUIET).count] * 100)
    assert np.mean(lost[True]) <= limit < np.mean(lost[False])


def test_an_engine_that_loses_more_than_its_graph_is_expected_to_do_so_on_validation_samples_too():
    table = np.array([[0.0], [0.002]]).repeat(300, axis=1)
    choice = Plans(1, (True,), (0.0, 0.001), 300)
    decision = Decision(Planted(table, averages=True), 1.0)
    assert decision.strongest(choice, QUIET).count == 1
    assert decision.holds(choice, engine(np.full(300, 0.007)), "original", certify=True)
    assert decision.trials[-1].expected == pytest.approx((300 * 0.7 + 300 * 0.6 + 100) / 601)
    assert f"(limit 1 %; {decision.trials[-1].expected:.2f} % expected of new samples)" in sentence(
        decision.facts(choice)
    )
    assert not decision.holds(choice, engine(np.full(300, 0.0099)), "original", certify=True)
    healed = Decision(Planted(table, averages=True), 1.0)
    assert healed.holds(choice, engine(np.full(300, 0.006)), "original", certify=True)
    assert healed.trials[-1].expected == pytest.approx((300 * 0.6 + 100) / 301)


def test_too_few_samples_for_any_change_are_said_without_judging_one():
    losses = Planted(np.zeros((3, 30)), averages=True)
    decision = Decision(losses, 1.0)
    choice = decision.strongest(Plans(2, (True, True), (0.0, 0.0, 0.0), 30), QUIET)
    assert (choice.count, losses.passes) == (0, [])
    assert decision.holds(choice, engine(np.zeros(30)), "original", certify=True)
    assert "this limit takes at least 200 samples, also for a plan without any loss" in sentence(decision.facts(choice))
    enough = Decision(Planted(np.zeros((3, 50)), averages=True), 1.0)
    assert enough.strongest(Plans(2, (True, True), (0.0, 0.0, 0.0), 49), QUIET).count == 2
    for count, kept in ((199, 0), (200, 2)):
        _, used, fresh, _ = Shares(decision=SHARE).sizes(count)
        split = Decision(Planted(np.zeros((3, fresh)), averages=True), 1.0)
        assert split.strongest(Plans(2, (True, True), (0.0, 0.0, 0.0), used), QUIET).count == kept


def test_an_engine_that_fails_is_not_put_down_to_few_samples():
    decision = Decision(Planted(np.zeros((3, 50)), averages=True), 1.0)
    failed = Plans(2, (True, True), (0.0, 0.0, 0.0), 50)
    assert not decision.holds(failed, None, "original", certify=True)
    unchanged = decision.milder(failed, QUIET)
    assert decision.holds(unchanged, engine(np.zeros(50)), "original", certify=True)
    assert "at least" not in sentence(decision.facts(unchanged))


@pytest.mark.parametrize(("confidence", "judged"), [(None, [4, 3, 2]), (0.9, [4])])
def test_a_plan_is_judged_although_a_stronger_one_lost_no_more_on_validation_samples(confidence, judged):
    """Its validation loss is noise; but a test that the first failure ends leaves it out."""
    front = [
        {"number": number, "efficient": number in (0, 4), "predicted": predicted}
        for number, predicted in enumerate((1.0, 1.1, 1.2, 1.3, 1.4))
    ]
    losses = Planted(np.array([[0.0], [0.0], [0.0], [0.02], [0.02]]).repeat(400, axis=1))
    choice = Fixed(4, (True,) * 4, front=front)
    assert Decision(losses, 1.0, confidence).strongest(choice, QUIET).count == (0 if confidence else 2)
    assert losses.passes == judged


def test_no_more_plans_are_judged_than_needed():
    losses = Planted(np.array([[0.0], [0.001], [0.002], [0.03], [0.04]]).repeat(20, axis=1))
    assert Decision(losses, 1.0).strongest(Plans(4, (True, True, True, True)), QUIET).count == 2
    assert losses.passes == [4, 3, 2]


def test_with_a_confidence_few_searches_exceed_the_limit():
    """Fixed-sequence testing: at 90 %, at most a tenth of the chosen plans may lose more than the limit."""
    rng, limit, exceeded, changed = np.random.default_rng(0), 0.02, 0, 0
    means = np.array([0.0, 0.002, 0.005, 0.009, 0.014, 0.019, 0.0205, 0.022, 0.03])
    for _ in range(200):
        common = rng.random(400)  # the same samples are hard for every plan
        table = np.stack([np.where(common < 2 * mean, 0.5, 0.0) for mean in means])
        decision = Decision(Planted(table), limit * 100, 0.9)
        chosen = decision.strongest(Plans(8, (True,) * 8), QUIET).count
        exceeded, changed = exceeded + (means[chosen] > limit), changed + (chosen > 0)
        if chosen < 8:
            assert decision.trials[-1].bound > limit * 100
    assert exceeded <= 20 + 3 * np.sqrt(20)
    assert changed > 150  # it does not keep the limit by doing nothing


def test_an_engine_above_the_limit_gets_fewer_changes_by_its_own_excess():
    table = np.array([[0.0], [0.002], [0.004], [0.006], [0.009]]).repeat(50, axis=1)
    decision = Decision(Planted(table), 1.0)
    choice = decision.strongest(Plans(4, (True,) * 4), QUIET)
    assert choice.count == 4
    assert not decision.holds(choice, engine(np.full(50, 0.014)), "original", certify=True)
    milder = decision.milder(choice, QUIET)  # 0.5 % go to the precision
    assert milder.count == 2
    assert decision.holds(milder, engine(np.full(50, 0.009)), "original", certify=True)
    facts = decision.facts(milder)
    assert (facts["changes"], facts["found"]) == (2, 4)
    assert facts["loss"] == pytest.approx(0.9)
    assert "2 of the 4 changes of the search stay, with a loss of 0.90 %" in sentence(facts)


def test_engines_without_finite_outputs_and_too_many_attempts_end_without_changes():
    decision = Decision(Planted(np.zeros((9, 50))), 1.0)
    choice = Plans(8, (True,) * 8)
    assert not decision.holds(choice, None, "original", certify=True)
    assert decision.milder(choice, QUIET).count == 0
    decision = Decision(Planted((np.arange(11) / 1000).repeat(50).reshape(11, 50)), 1.0)
    choice = decision.strongest(Plans(10, (True,) * 10), QUIET)
    for count in (10, 9, 8, 7)[:ATTEMPTS]:
        assert choice.count == count
        assert not decision.holds(choice, engine(np.full(50, 0.0101)), "original", certify=True)
        choice = decision.milder(choice, QUIET)
    assert choice.count == 0
    assert decision.holds(choice, engine(np.full(50, 0.011)), "original", certify=True)
    assert "loses 1.10 % without any change, more" in sentence(decision.facts(choice))
    merged = sentence(decision.facts(choice), "4")
    assert "without any change but --tokens 4, more" in merged
    dropped = sentence(decision.facts(choice), image_tokens="50%@8")
    assert "without any change but --image-tokens 50%@8, more than the limit of 1 %; keep more image tokens." in dropped
    assert merged.endswith("; merge fewer tokens, or give --tokens auto.")


def test_certificates_are_stated_with_what_more_would_take():
    decision = Decision(Planted(np.zeros((3, 400))), 1.0, 0.9)
    choice = decision.strongest(Plans(2, (True, True)), QUIET)
    assert decision.holds(choice, engine(np.zeros(400)), "original", certify=False)
    assert "certified at 90 % to be at most 0.59 %" in sentence(decision.facts(choice))
    decision = Decision(Planted(np.zeros((3, 100))), 1.0, 0.9)
    choice = decision.strongest(Plans(2, (True, True)), QUIET)
    assert choice.count == 0
    assert decision.holds(choice, engine(np.zeros(100)), "original", certify=False)
    assert "nothing can be certified at 90 %" in sentence(decision.facts(choice))
    assert "the next plan would need about" in sentence(decision.facts(choice))


def test_only_a_search_with_a_limit_takes_samples_for_the_decision():
    assert share_of(Settings()) == SHARE
    assert share_of(Settings(speedup=1.5)) == 0.0
    assert share_of(Settings(speedup=1.5, max_loss=3.0)) == SHARE
    assert share_of(Settings(drop="none")) == 0.0


FEW = {"actions": "drop", "tokens": "none", "cost": "macs", "rounds": 1, "samples": 320}


@pytest.mark.parametrize(
    ("options", "words"),
    [({"budget": "divergence"}, "which divergence is not"), ({"budget": "agreement"}, None)],
)
def test_a_loss_without_a_bound_is_refused_before_the_search(tmp_path, monkeypatch, options, words):
    class SearchBegan(Exception):
        pass

    def begin(*_):
        raise SearchBegan

    monkeypatch.setattr(planner, "run_search", begin)
    options = options | {"confidence": 90.0, "data": DIGITS, "output": tmp_path / "out"}
    with pytest.raises(SearchBegan if words is None else BudgetError, match=words):
        compressor.export(five_blocks(tmp_path / "model", kept=(0, 9)), **FEW | options)


def test_a_confidence_needs_samples(tmp_path):
    rows = np.random.default_rng(0).standard_normal((3, 1, 8, 8)).astype(np.float32)
    np.save(tmp_path / "three.npy", rows)
    with pytest.raises(BudgetError, match="at least 4 samples"):
        compressor.export(
            five_blocks(tmp_path / "model", kept=(0, 9)),
            data=tmp_path / "three.npy",
            confidence=90.0,
            output=tmp_path / "out",
            **FEW | {"samples": None},
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options", [{"int8": "static"}, pytest.param({"confidence": 80.0, "max_loss": 6.0}, marks=pytest.mark.slow)]
)
def test_the_engine_that_ships_is_within_the_limit_on_the_decision_split(tmp_path, options):
    out, options = (
        tmp_path / "out",
        options | {"model": five_blocks(tmp_path / "model", kept=(0, 4, 9)), "data": DIGITS},
    )
    report = compressor.export(output=out, **FEW, **options)
    content = json.loads((out / "report.json").read_text())
    decision, limit = content["search"]["decision"], options.get("max_loss", 1.0)
    assert decision["changes"] == content["search"]["chosen"] == len(content["plan"]["changes"])
    assert decision["loss"] <= limit or decision["changes"] == 0
    assert sentence(decision) in report.notes
    assert content["data"]["sizes"] == {"calibration": 80, "validation": 80, "decision": 80, "test": 80}

    subject = load(Settings(**FEW, **options), QUIET, decision=SHARE)
    fresh = subject.data.decision
    assert not set(fresh.ids) & {*subject.data.calibration.ids, *subject.data.validation.ids, *subject.data.test.ids}
    assert list(subject.data.test.ids) == content["data"]["test_ids"]
    with runtime("onnxruntime").load(out / "model.onnx", BuildOptions()) as opened:
        runners = {
            "original": graph_runner(subject.model, Program(subject.graph).run),
            "result": lambda feeds: subject.model.evaluated(opened.run(feeds)),
        }
        with torch.inference_mode():
            shown = evaluate(fresh, runners, head=subject.head, metric=subject.metric, reference="original")
    loss = Budget(subject.head, subject.metric).loss(shown.columns["original"], shown.columns["result"])
    assert loss == pytest.approx(decision["loss"], abs=0.02)
