"""Evaluation of model outputs against labels or, without labels, against the original model.

Outputs are reduced to a few numbers per sample and then discarded. These columns allow a comparison of any two models
sample by sample and a bootstrap interval for every figure.
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
from compressor.quality.disagreements import Disagreement, find_disagreements, largest_regret
from compressor.quality.intervals import Array, Columns, Figure, bootstrap, by_text

Runner = Callable[[Mapping[str, Array]], Array]

BATCH = 32
POSITIONS = 128  # tokens per chunk: with a vocabulary of 128,000 their log-probabilities take 64 MB
LARGEST_NLL = 700.0  # exp() of a larger value overflows; such a model is useless anyway


class EvaluationError(CompressorError):
    """A model returned outputs that cannot be evaluated."""


def metric_for(task: str, label_kind: str | None) -> str:
    """Return the metric of a task, given the kind of its labels (None without labels).

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


def metric_value(metric: str, columns: Columns) -> float:
    """Compute the metric from the columns of all samples."""
    return float(_metric_value(metric, columns))


def _metric_value(metric: str, columns: Columns) -> Array:
    """Compute the metric along the last axis of the columns; leading axes hold bootstrap resamples."""
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
    """Compute the Pearson correlation along the last axis; 0 where one side is constant."""
    left, right = left - left.mean(-1, keepdims=True), right - right.mean(-1, keepdims=True)
    spread = np.sqrt((left**2).sum(-1) * (right**2).sum(-1))
    correlation: Array = (left * right).sum(-1) / np.where(spread > 0, spread, 1.0)
    return correlation


def _mean(columns: Columns, key: str) -> Array:
    """Average a column over samples, weighted by the number of scored tokens where samples are texts."""
    if "tokens" not in columns:
        mean: Array = columns[key].mean(-1)
        return mean
    tokens = columns["tokens"]
    weighted: Array = (columns[key] * tokens).sum(-1) / np.maximum(tokens.sum(-1), 1.0)
    return weighted


def loss(metric: str, before: float, after: float) -> float:
    """Return the loss in percent: the drop of a score in points, or the relative increase of perplexity.

    A negative loss is an improvement.
    """
    return float(_loss(metric, np.asarray(before), np.asarray(after)))


def _loss(metric: str, before: Array, after: Array) -> Array:
    lost: Array = (after / before - 1.0) * 100.0 if metric == "perplexity" else before - after
    return lost


def figure(metric: str, columns: Columns, *, seed: int = 0) -> Figure:
    """Compute the metric with a percentile bootstrap interval over samples."""
    return bootstrap(lambda part: _metric_value(metric, part), columns, seed)


def loss_figure(metric: str, before: Columns, after: Columns, *, seed: int = 0) -> Figure:
    """Compute the loss from `before` to `after` with a paired bootstrap interval (the same samples of both models)."""
    return paired_figure(metric, (before, after), lambda *values: _loss(metric, *values), seed=seed)


def interaction_figure(metric: str, original: Columns, one: Columns, other: Columns, both: Columns) -> Figure:
    """Compute the interaction of two changes: the loss of both minus the sum of their separate losses.

    loss(original, both) - (loss(original, one) + loss(original, other)), with a paired bootstrap interval. It is 0
    where the losses add up and negative where both changes together lose less.
    """

    def excess(start: Array, first: Array, second: Array, end: Array) -> Array:
        return _loss(metric, start, end) - _loss(metric, start, first) - _loss(metric, start, second)

    return paired_figure(metric, (original, one, other, both), excess)


def paired_figure(metric: str, models: Sequence[Columns], statistic: Callable[..., Array], *, seed: int = 0) -> Figure:
    """Compute `statistic` of the metrics of several models with a paired bootstrap interval."""
    merged = {f"{index} {key}": value for index, columns in enumerate(models) for key, value in columns.items()}

    def resampled_statistic(part: Columns) -> Array:
        sides = [{key: part[f"{index} {key}"] for key in columns} for index, columns in enumerate(models)]
        return statistic(*(_metric_value(metric, side) for side in sides))

    return bootstrap(resampled_statistic, merged, seed)


# ------------------------------------------------------------------------------------------------------- running


@dataclass(frozen=True)
class Evaluation:
    """Per-sample columns of each evaluated model and the metric to compute from them.

    For classifiers, `changed` maps each model to its disagreements with the reference, those of the largest regret.
    """

    metric: str
    columns: Mapping[str, Columns]
    changed: Mapping[str, Sequence[Disagreement]] = field(default_factory=dict)

    def value(self, name: str) -> float:
        """Return the metric of one model."""
        return metric_value(self.metric, self.columns[name])

    def figure(self, name: str) -> Figure:
        """Return the metric of one model with its interval."""
        return figure(self.metric, self.columns[name])

    def label_free(self, name: str) -> dict[str, Figure]:
        """Return the agreement with the reference in % and the divergence from it, where these columns exist."""
        columns = self.columns[name]
        scales = {"agreement": 100.0, "divergence": 1.0}
        return {
            key: bootstrap(lambda part, key=key, scale=scale: _mean(part, key) * scale, columns, 0)  # type: ignore[misc]
            for key, scale in scales.items()
            if key in columns
        }

    def loss_value(self, before: str, after: str) -> float:
        """Return the loss of `after` against `before` in percent, without an interval."""
        return loss(self.metric, self.value(before), self.value(after))

    def expected_loss(self, reference: str, after: str) -> float:
        """Return the loss of `after` against the reference to expect on new samples, in percent.

        For classifiers it is the mean regret (see `_regret`): a few hundred labels measure a loss of accuracy only to
        about one point, and the regret has a far smaller variance. For other metrics it is the measured loss.
        """
        if "regret" in self.columns[after]:
            return float(self.columns[after]["regret"].mean()) * 100.0
        return self.loss_value(reference, after)

    def loss(self, before: str, after: str) -> Figure:
        """Return the loss of `after` against `before` with its interval."""
        return loss_figure(self.metric, self.columns[before], self.columns[after])

    def excess(self, original: str, one: str, other: str, both: str) -> Figure:
        """Return the interaction of two changes with its interval (see `interaction_figure`)."""
        return interaction_figure(self.metric, *(self.columns[name] for name in (original, one, other, both)))


def evaluate(
    split: Split,
    runners: Mapping[str, Runner],
    *,
    metric: str,
    reference: str,
    batch_size: int = BATCH,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Evaluate all models on a split, every model on one batch before the next batch.

    Args:
        split: samples.
        runners: model name to a function from feeds to the model's output (first axis: rows).
        metric: see `metric_for`.
        reference: name of the runner that the others are compared with.
        batch_size: samples per batch.
        progress: called with the number of samples done and the total.

    Raises:
        EvaluationError: an output contains NaN or infinity.
    """
    parts: dict[str, list[Columns]] = {name: [] for name in runners}
    changed: dict[str, list[Disagreement]] = {name: [] for name in runners}
    owners: list[str] = []
    done = 0
    for batch in split.whole(batch_size) if metric == "perplexity" else split.batches(batch_size):
        original = runners[reference](batch.feeds)
        for name, runner in runners.items():
            answer = original if name == reference else runner(batch.feeds)
            columns = sample_columns(metric, batch, answer, original, name)
            parts[name].append(columns)
            if metric in ("accuracy", "agreement"):
                changed[name] = largest_regret(
                    [*changed[name], *find_disagreements(batch, answer, original, columns["regret"], done)]
                )
        owners += batch.ids
        done = len(set(owners)) if metric == "perplexity" else done + len(batch.ids)
        if progress is not None:
            progress(done, len(split))
    joined = {name: join(columns) for name, columns in parts.items()}
    if metric == "perplexity":
        joined = {name: by_text(columns, owners) for name, columns in joined.items()}
    return Evaluation(metric, joined, changed)


def join(parts: list[Columns]) -> Columns:
    """Concatenate the columns of consecutive batches."""
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def sample_columns(
    metric: str,
    batch: Batch,
    answer: Array,
    original: Array | None,
    name: str = "model",
    *,
    diverging: bool = True,
) -> Columns:
    """Compute the per-sample columns of one batch.

    Args:
        metric: the metric that the columns are for.
        batch: feeds and labels.
        answer: output of the model, first axis: rows.
        original: output of the reference model; None where the metric does not need it.
        name: name of the model in the error message.
        diverging: also compute the divergence from `original`, which a search does not need.

    Raises:
        EvaluationError: `answer` contains NaN or infinity.
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
        columns["divergence"] = _divergence_column(metric, batch, answer, original)
    if metric == "perplexity":
        return _token_columns(batch, answer, original) | columns
    if metric == "spearman":
        return _pair_columns(batch, answer) | columns
    if metric == "accuracy":
        assert batch.labels is not None
        columns["accuracy"] = (answer.argmax(-1) == batch.labels).astype(np.float64)
    if original is not None:
        columns["agreement"] = (answer.argmax(-1) == original.argmax(-1)).astype(np.float64)
        columns["regret"] = _regret(answer, original)
    return columns


def _divergence_column(metric: str, batch: Batch, answer: Array, original: Array) -> Array:
    """Compute the divergence from the original's output per sample, row by row to limit the memory in use."""
    task = "feature-extraction" if metric == "spearman" else "text-generation"
    mask = _scored_mask(batch) if metric == "perplexity" else batch.feeds.get("attention_mask")
    rows = []
    for row in range(len(answer)):
        after, before = (torch.from_numpy(side[row : row + 1]) for side in (answer, original))
        row_mask = torch.from_numpy(mask[row : row + 1]) if mask is not None and answer.ndim > 2 else None
        rows.append(float(divergence(task, after, before, row_mask)))
    means: Array = np.array(rows).reshape(-1, batch.rows_per_sample).mean(1)
    return means


def _regret(answer: Array, original: Array) -> Array:
    """Compute the regret per row: p(original's class) - p(new class), with the original's probabilities p.

    Its mean is the expected loss of accuracy if the original is calibrated. It needs no labels and varies far less
    from sample to sample than the 0/1 correctness does.
    """
    exponents = np.exp(original.astype(np.float64) - original.max(-1, keepdims=True))
    probabilities = exponents / exponents.sum(-1, keepdims=True)
    rows = np.arange(len(original))
    regret: Array = probabilities.max(-1) - probabilities[rows, answer.argmax(-1)]
    return regret


def _scored_mask(batch: Batch) -> Array:
    """Return the mask of positions that predict a scored token, [rows, tokens]; the last of a text never does."""
    mask = batch.feeds.get("attention_mask", np.ones_like(batch.feeds["input_ids"])).astype(bool)
    counted = np.zeros_like(mask)
    counted[:, :-1] = mask[:, 1:] & mask[:, :-1]  # with left padding, the first token of a text is not at position 0
    if batch.scored is not None:
        counted[:, :-1] &= batch.scored[:, 1:]
    return counted


def _token_columns(batch: Batch, answer: Array, original: Array | None) -> Columns:
    """Sum the negative log-likelihoods of next tokens, without padding, context and the first token of a text."""
    ids = torch.from_numpy(batch.feeds["input_ids"])
    scored_mask = torch.from_numpy(_scored_mask(batch))[:, :-1]
    rows = []
    for row, logits in enumerate(torch.from_numpy(answer)):
        scored = scored_mask[row]
        chunks = (
            (part[mask].float(), targets[mask]) for part, targets, mask in _chunks(logits[:-1], ids[row, 1:], scored)
        )
        nll = sum(float(torch.nn.functional.cross_entropy(*chunk, reduction="sum")) for chunk in chunks)
        agreeing = 0.0
        if original is not None:
            agreeing = float((logits.argmax(-1).numpy() == original[row].argmax(-1))[:-1][scored.numpy()].sum())
        rows.append((nll, float(scored.sum()), agreeing))
    nlls, tokens, agreements = np.array(rows, dtype=np.float64).T
    columns = {"nll": nlls, "tokens": tokens}
    return columns if original is None else columns | {"agreement": agreements / np.maximum(tokens, 1.0)}


def _pair_columns(batch: Batch, answer: Array) -> Columns:
    first, second = answer[0::2].astype(np.float64), answer[1::2].astype(np.float64)
    assert batch.labels is not None
    return {"cosine": _cosine(first, second), "gold": np.asarray(batch.labels, dtype=np.float64)}


def _cosine(left: Array, right: Array) -> Array:
    norms = np.linalg.norm(left, axis=-1) * np.linalg.norm(right, axis=-1)
    cosine: Array = (left * right).sum(-1) / np.maximum(norms, 1e-12)
    return cosine


def _similarity(answer: Array, original: Array, batch: Batch) -> Array:
    """Average the cosine similarity over the tokens of a sample, without padding; one vector per row has one cosine."""
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
    """Compute the output divergence per row: KL(original || answer) in nats for logits, 1 - cosine for features.

    Args:
        task: determines whether the outputs are logits or features.
        answer: output of the changed model, [rows, ..., classes or width].
        original: output of the original model, of the same shape.
        mask: [rows, tokens], 0 at padding. Padding is left out where there is an output for each token.
    """
    if task.endswith("classification") or task == "text-generation":
        chunks = _chunks(answer.reshape(-1, answer.shape[-1]), original.reshape(-1, answer.shape[-1]))
        values = torch.cat([_relative_entropy(*chunk) for chunk in chunks]).reshape(answer.shape[:-1])
    else:
        values = 1.0 - torch.nn.functional.cosine_similarity(answer.float(), original.float(), dim=-1)
    if mask is not None and values.shape == mask.shape:
        return (values * mask).sum(1) / mask.sum(1).clamp(min=1)
    return values.reshape(len(values), -1).mean(1)


def _chunks(*sides: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    return zip(*(torch.split(side, POSITIONS) for side in sides), strict=True)


def _relative_entropy(answer: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    reference = original.float().log_softmax(-1)
    return (reference.exp() * (reference - answer.float().log_softmax(-1))).sum(-1)


def graph_runner(model: Model, run: Callable[[Mapping[str, torch.Tensor]], tuple[torch.Tensor, ...]]) -> Runner:
    """Wrap a function from tensors to the outputs of `model` as a runner on numpy arrays."""
    position = model.outputs.index(model.answer)

    def answer(feeds: Mapping[str, Array]) -> Array:
        tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}
        values: Array = run(tensors)[position].numpy()
        return values

    return answer


def tensor_batches(split: Split, batch_size: int = BATCH) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the feeds of each batch of a split as tensors."""
    for batch in split.batches(batch_size):
        yield {name: torch.from_numpy(value) for name, value in batch.feeds.items()}
