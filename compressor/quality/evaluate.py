"""Quality of a model's answers: against labels where there are any, against the original model otherwise.

For every sample a few numbers are kept (never the answers themselves), so that any two models can be compared
sample by sample and every figure gets a bootstrap interval.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy import stats

from compressor.data.splits import Batch, Split
from compressor.errors import CompressorError
from compressor.models import Model
from compressor.quality.disagreements import Changed, changed_of, worst
from compressor.quality.intervals import Array, Columns, Figure, bootstrap, by_text

Runner = Callable[[Mapping[str, Array]], Array]

BATCH = 32
POSITIONS = 128  # judged at a time: with a vocabulary of 128,000 their log-probabilities are 64 MB
LARGEST_NLL = 700.0  # exp() of more overflows; a model this far off is lost anyway


class EvaluationError(CompressorError):
    """A model gave answers that cannot be judged."""


def metric_for(task: str, label_kind: str | None) -> str:
    """The metric by which a task is judged, given what labels there are.

    >>> metric_for("image-classification", "class"), metric_for("image-classification", None)
    ('accuracy', 'agreement')
    """
    if task == "text-generation":
        return "perplexity"
    if label_kind == "score" and task == "sentence-similarity":
        return "spearman"
    if task.endswith("classification"):
        return "accuracy" if label_kind == "class" else "agreement"
    return "fidelity"


def judge(metric: str, columns: Columns) -> float:
    """The metric's value from the columns of all samples."""
    return float(_judge(metric, columns))


def _judge(metric: str, columns: Columns) -> Array:
    """The metric along the last axis of the columns, so that many resamples are judged at once."""
    value: Array
    if metric == "perplexity":
        mean = columns["nll"].sum(-1) / np.maximum(columns["tokens"].sum(-1), 1.0)
        value = np.exp(np.minimum(mean, LARGEST_NLL))
    elif metric == "spearman":
        value = _correlation(stats.rankdata(columns["cosine"], axis=-1), stats.rankdata(columns["gold"], axis=-1)) * 100
    else:
        value = columns[metric].mean(-1) * 100.0
    return value


def _correlation(left: Array, right: Array) -> Array:
    """Pearson correlation along the last axis; 0 where one side is constant, as nothing is told apart there."""
    left, right = left - left.mean(-1, keepdims=True), right - right.mean(-1, keepdims=True)
    spread = np.sqrt((left**2).sum(-1) * (right**2).sum(-1))
    correlation: Array = (left * right).sum(-1) / np.where(spread > 0, spread, 1.0)
    return correlation


def _mean(columns: Columns, key: str) -> Array:
    """The mean over samples; over all scored tokens where samples are texts of several."""
    if "tokens" not in columns:
        mean: Array = columns[key].mean(-1)
        return mean
    tokens = columns["tokens"]
    weighted: Array = (columns[key] * tokens).sum(-1) / np.maximum(tokens.sum(-1), 1.0)
    return weighted


def loss(metric: str, before: float, after: float) -> float:
    """What was lost, in percent: points of a score, relative increase of perplexity. Negative means better."""
    return float(_loss(metric, np.asarray(before), np.asarray(after)))


def _loss(metric: str, before: Array, after: Array) -> Array:
    lost: Array = (after / before - 1.0) * 100.0 if metric == "perplexity" else before - after
    return lost


def figure(metric: str, columns: Columns, *, seed: int = 0) -> Figure:
    """The metric with a percentile bootstrap interval over samples."""
    return bootstrap(lambda part: _judge(metric, part), columns, seed)


def loss_figure(metric: str, before: Columns, after: Columns, *, seed: int = 0) -> Figure:
    """The loss from `before` to `after`, resampling the same samples of both (a paired bootstrap)."""
    return paired_figure(metric, (before, after), lambda *values: _loss(metric, *values), seed=seed)


def excess_figure(metric: str, original: Columns, one: Columns, other: Columns, both: Columns) -> Figure:
    """What two changes lose together beyond the sum of what each loses alone, by a paired bootstrap.

    loss(original, both) - (loss(original, one) + loss(original, other)): 0 where losses add up, negative where the two
    lose less together.
    """

    def excess(start: Array, first: Array, second: Array, end: Array) -> Array:
        return _loss(metric, start, end) - _loss(metric, start, first) - _loss(metric, start, second)

    return paired_figure(metric, (original, one, other, both), excess)


def paired_figure(metric: str, models: Sequence[Columns], statistic: Callable[..., Array], *, seed: int = 0) -> Figure:
    """`statistic` of the metric's values of several models, resampling the same samples of all of them."""
    merged = {f"{place} {key}": value for place, columns in enumerate(models) for key, value in columns.items()}

    def of(part: Columns) -> Array:
        sides = [{key: part[f"{place} {key}"] for key in columns} for place, columns in enumerate(models)]
        return statistic(*(_judge(metric, side) for side in sides))

    return bootstrap(of, merged, seed)


# ------------------------------------------------------------------------------------------------------- running


@dataclass(frozen=True)
class Evaluation:
    """Columns of per-sample numbers for each model that was run, and the metric they are judged by.

    `changed` names, for classifiers, the samples that each model answers differently: those of the largest regret.
    """

    metric: str
    columns: Mapping[str, Columns]
    changed: Mapping[str, Sequence[Changed]] = field(default_factory=dict)

    def value(self, name: str) -> float:
        """The metric's value for one model."""
        return judge(self.metric, self.columns[name])

    def figure(self, name: str) -> Figure:
        """The metric of one model, with its interval."""
        return figure(self.metric, self.columns[name])

    def label_free(self, name: str) -> dict[str, Figure]:
        """Agreement with the reference in % and divergence from it, as far as the answers allow."""
        columns = self.columns[name]
        scales = {"agreement": 100.0, "divergence": 1.0}
        return {
            key: bootstrap(lambda part, key=key, scale=scale: _mean(part, key) * scale, columns, 0)  # type: ignore[misc]
            for key, scale in scales.items()
            if key in columns
        }

    def loss_value(self, before: str, after: str) -> float:
        """What `after` lost against `before`, in percent, without an interval."""
        return loss(self.metric, self.value(before), self.value(after))

    def expected_loss(self, reference: str, after: str) -> float:
        """What `after` is to lose against the reference on further samples, in percent.

        A few hundred labels tell a loss of accuracy to a point or so, as one changed answer is luck or bad luck; the
        regret (`_regret`) tells it far more closely. For other metrics it is the loss that was measured.
        """
        if "regret" in self.columns[after]:
            return float(self.columns[after]["regret"].mean()) * 100.0
        return self.loss_value(reference, after)

    def loss(self, before: str, after: str) -> Figure:
        """What `after` lost against `before`, with its interval."""
        return loss_figure(self.metric, self.columns[before], self.columns[after])

    def excess(self, original: str, one: str, other: str, both: str) -> Figure:
        """What two changes lose together beyond the sum of what each loses alone, with its interval."""
        return excess_figure(self.metric, *(self.columns[name] for name in (original, one, other, both)))


def evaluate(
    split: Split,
    runners: Mapping[str, Runner],
    *,
    metric: str,
    reference: str,
    batch_size: int = BATCH,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Run all models over a split, batch by batch, side by side.

    Args:
        split: samples.
        runners: model name to a function from feeds to its answer (first axis rows).
        metric: see `metric_for`.
        reference: the runner that the others are compared with.
        batch_size: samples a batch.
        progress: called with samples done and in total.

    Raises:
        EvaluationError: an answer holds NaN or infinity.
    """
    parts: dict[str, list[Columns]] = {name: [] for name in runners}
    changed: dict[str, list[Changed]] = {name: [] for name in runners}
    owners: list[str] = []
    done = 0
    for batch in split.whole(batch_size) if metric == "perplexity" else split.batches(batch_size):
        original = runners[reference](batch.feeds)
        for name, runner in runners.items():
            answer = original if name == reference else runner(batch.feeds)
            columns = compare(metric, batch, answer, original, name)
            parts[name].append(columns)
            if metric in ("accuracy", "agreement"):
                changed[name] = worst([*changed[name], *changed_of(batch, answer, original, columns["regret"], done)])
        owners += batch.ids
        done = len(set(owners)) if metric == "perplexity" else done + len(batch.ids)
        if progress is not None:
            progress(done, len(split))
    joined = {name: join(columns) for name, columns in parts.items()}
    if metric == "perplexity":
        joined = {name: by_text(columns, owners) for name, columns in joined.items()}
    return Evaluation(metric, joined, changed)


def join(parts: list[Columns]) -> Columns:
    """Columns of consecutive batches as one."""
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def compare(
    metric: str,
    batch: Batch,
    answer: Array,
    original: Array | None,
    name: str = "model",
    *,
    diverging: bool = True,
) -> Columns:
    """Per-sample numbers of one batch.

    Args:
        metric: which numbers are needed.
        batch: feeds and labels.
        answer: the model's answer, first axis rows.
        original: the reference model's answer, None where the metric does without.
        name: for the error message.
        diverging: also tell the divergence from the original, which a search does without.

    Raises:
        EvaluationError: the answer is not finite.
    """
    finite = np.isfinite(answer).reshape(len(answer), -1).all(1)
    if not finite.all():
        first = batch.ids[int(finite.argmin()) // batch.rows_per_sample]
        raise EvaluationError(f"{name} gave NaN or infinity for sample {first}; check its weights.")
    if metric == "fidelity":
        assert original is not None
        return {"fidelity": _similarity(answer, original, batch)}
    columns: Columns = {}
    if original is not None and diverging:
        columns["divergence"] = _moved(metric, batch, answer, original)
    if metric == "perplexity":
        return _tokens(batch, answer, original) | columns
    if metric == "spearman":
        return _pairs(batch, answer) | columns
    if metric == "accuracy":
        assert batch.labels is not None
        columns["accuracy"] = (answer.argmax(-1) == batch.labels).astype(np.float64)
    if original is not None:
        columns["agreement"] = (answer.argmax(-1) == original.argmax(-1)).astype(np.float64)
        columns["regret"] = _regret(answer, original)
    return columns


def _moved(metric: str, batch: Batch, answer: Array, original: Array) -> Array:
    """Divergence from the original's answers, per sample; row by row, so that one row of probabilities exists."""
    task = "feature-extraction" if metric == "spearman" else "text-generation"
    mask = _foretelling(batch) if metric == "perplexity" else batch.feeds.get("attention_mask")
    rows = []
    for row in range(len(answer)):
        moved, before = (torch.from_numpy(side[row : row + 1]) for side in (answer, original))
        there = torch.from_numpy(mask[row : row + 1]) if mask is not None and answer.ndim > 2 else None
        rows.append(float(divergence(task, moved, before, there)))
    means: Array = np.array(rows).reshape(-1, batch.rows_per_sample).mean(1)
    return means


def _regret(answer: Array, original: Array) -> Array:
    """How much less probable the original holds the new class than its own, per row.

    Its mean is the loss of accuracy to expect if the original's probabilities are right. It needs no labels and
    varies far less from sample to sample than right or wrong does.
    """
    exponents = np.exp(original.astype(np.float64) - original.max(-1, keepdims=True))
    probabilities = exponents / exponents.sum(-1, keepdims=True)
    rows = np.arange(len(original))
    regret: Array = probabilities.max(-1) - probabilities[rows, answer.argmax(-1)]
    return regret


def _foretelling(batch: Batch) -> Array:
    """Which positions foretell a token that is scored, [rows, tokens]: the last one of a text never does."""
    mask = batch.feeds.get("attention_mask", np.ones_like(batch.feeds["input_ids"])).astype(bool)
    counted = np.zeros_like(mask)
    counted[:, :-1] = mask[:, 1:] & mask[:, :-1]  # with padding on the left, the first token is not at 0
    if batch.scored is not None:
        counted[:, :-1] &= batch.scored[:, 1:]
    return counted


def _tokens(batch: Batch, answer: Array, original: Array | None) -> Columns:
    """Negative log-likelihood of each next token; padding, context and the first token of a text do not count."""
    ids = torch.from_numpy(batch.feeds["input_ids"])
    foretelling = torch.from_numpy(_foretelling(batch))[:, :-1]
    rows = []
    for row, logits in enumerate(torch.from_numpy(answer)):
        counted = foretelling[row]
        some = ((part[there].float(), told[there]) for part, told, there in _few(logits[:-1], ids[row, 1:], counted))
        nll = sum(float(torch.nn.functional.cross_entropy(*each, reduction="sum")) for each in some)
        same = 0.0
        if original is not None:
            same = float((logits.argmax(-1).numpy() == original[row].argmax(-1))[:-1][counted.numpy()].sum())
        rows.append((nll, float(counted.sum()), same))
    nlls, tokens, agreeing = np.array(rows, dtype=np.float64).T
    columns = {"nll": nlls, "tokens": tokens}
    return columns if original is None else columns | {"agreement": agreeing / np.maximum(tokens, 1.0)}


def _pairs(batch: Batch, answer: Array) -> Columns:
    first, second = answer[0::2].astype(np.float64), answer[1::2].astype(np.float64)
    assert batch.labels is not None
    return {"cosine": _cosine(first, second), "gold": np.asarray(batch.labels, dtype=np.float64)}


def _cosine(left: Array, right: Array) -> Array:
    norms = np.linalg.norm(left, axis=-1) * np.linalg.norm(right, axis=-1)
    cosine: Array = (left * right).sum(-1) / np.maximum(norms, 1e-12)
    return cosine


def _similarity(answer: Array, original: Array, batch: Batch) -> Array:
    """Mean cosine over a sample's tokens, padding left out; over its vector where there is one per row."""
    cosine = _cosine(answer.astype(np.float64), original.astype(np.float64))
    mask = batch.feeds.get("attention_mask")
    if mask is not None and cosine.shape == mask.shape:
        cosine = (cosine * mask).sum(1) / np.maximum(mask.sum(1), 1)
    per_row = cosine.reshape(len(cosine), -1).mean(1)
    means: Array = per_row.reshape(-1, batch.rows_per_sample).mean(1)
    return means


def divergence(
    task: str, answer: torch.Tensor, original: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """How far answers moved, per row: KL(original || answer) in nats for logits, 1 - cosine for features.

    Args:
        task: logits or features.
        answer: [rows, ..., classes or width].
        original: the same shape.
        mask: [rows, tokens], 0 at padding, which does not count where there is an answer for each token.
    """
    if task.endswith("classification") or task == "text-generation":
        rows = _few(answer.reshape(-1, answer.shape[-1]), original.reshape(-1, answer.shape[-1]))
        each = torch.cat([_relative_entropy(*some) for some in rows]).reshape(answer.shape[:-1])
    else:
        each = 1.0 - torch.nn.functional.cosine_similarity(answer.float(), original.float(), dim=-1)
    if mask is not None and each.shape == mask.shape:
        return (each * mask).sum(1) / mask.sum(1).clamp(min=1)
    return each.reshape(len(each), -1).mean(1)


def _few(*sides: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    return zip(*(torch.split(side, POSITIONS) for side in sides), strict=True)


def _relative_entropy(answer: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    reference = original.float().log_softmax(-1)
    return (reference.exp() * (reference - answer.float().log_softmax(-1))).sum(-1)


def graph_runner(model: Model, run: Callable[[Mapping[str, torch.Tensor]], tuple[torch.Tensor, ...]]) -> Runner:
    """A runner over a function from tensors to the outputs of `model`."""
    position = model.outputs.index(model.answer)

    def answer(feeds: Mapping[str, Array]) -> Array:
        tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}
        values: Array = run(tensors)[position].numpy()
        return values

    return answer


def tensor_batches(split: Split, batch_size: int = BATCH) -> Iterator[dict[str, torch.Tensor]]:
    """The feeds of a split as tensors."""
    for batch in split.batches(batch_size):
        yield {name: torch.from_numpy(value) for name, value in batch.feeds.items()}
