"""One decision per token: the next token, a masked token, or the class of a token or of a frame of sound."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from compressor.quality.heads.base import SCALES, Head, Metrics, chunks, regret, relative_entropy, row_means, token_mask
from compressor.quality.intervals import Array, Columns
from compressor.quality.metrics import METRICS

if TYPE_CHECKING:
    import torch

    from compressor.data.splits import Batch

IGNORED = -100  # label of tokens that are not scored, as in torch and transformers


class Tokens(Head):
    """Logits [rows, tokens, classes]."""

    class_axis = -1

    def divergence(
        self, answer: torch.Tensor, original: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute KL(original || answer) in nats, averaged over the tokens of a row without padding, [rows]."""
        return row_means(relative_entropy(answer, original), mask)

    def scored(self, batch: Batch) -> Array:
        """Return the mask of scored positions, bool [rows, tokens]; all but padding if the data does not say."""
        if batch.scored is not None:
            return batch.scored
        return token_mask(batch)

    def divergence_mask(self, batch: Batch) -> Array | None:
        """Return the mask of scored positions."""
        return self.scored(batch)

    def decisions(self, output: Array) -> Array:
        """Return the class of each token, [rows, tokens]."""
        classes: Array = output.argmax(-1)
        return classes


class NextTokens(Tokens):
    """Logits of the next token, of a causal language model."""

    metrics: ClassVar[Metrics] = {None: "perplexity"}
    by_token = True
    by_window = True

    def scored(self, batch: Batch) -> Array:
        """Return the mask of positions that predict a scored token; the last of a text never does."""
        mask = batch.feeds.get("attention_mask", np.ones_like(batch.feeds["input_ids"])).astype(bool)
        counted = np.zeros_like(mask)
        counted[:, :-1] = mask[:, 1:] & mask[:, :-1]  # with left padding, a text does not begin at position 0
        if batch.scored is not None:
            counted[:, :-1] &= batch.scored[:, 1:]
        return counted

    def columns(self, metric: str, batch: Batch, answer: Array, original: Array | None) -> Columns:
        """Sum the negative log-likelihoods of next tokens, without padding, context and the first token of a text."""
        targets, ahead = batch.feeds["input_ids"][:, 1:], answer[:, :-1]
        before = ahead if original is answer else None if original is None else original[:, :-1]
        return likelihood_columns(ahead, targets, self.scored(batch)[:, :-1], before)

    def lower_bound(self, metric: str, columns: Columns, reference: Columns, before: float) -> float:
        """Return the loss if the remaining tokens have a negative log-likelihood of 0."""
        return bound_of_likelihood(metric, columns, reference, before)


class MaskedTokens(Tokens):
    """Logits of masked tokens, of a masked language model; the labels are the tokens behind the masks."""

    metrics: ClassVar[Metrics] = {"tokens": "masked_perplexity", None: "token_agreement"}
    by_token = True

    def columns(self, metric: str, batch: Batch, answer: Array, original: Array | None) -> Columns:
        """Sum the negative log-likelihoods of the masked tokens, or compare the tokens chosen without labels."""
        if metric == "token_agreement":
            return agreement_columns(self.scored(batch), answer, original)
        assert batch.labels is not None
        return likelihood_columns(answer, batch.labels, batch.labels != IGNORED, original)

    def divergence_mask(self, batch: Batch) -> Array:
        """Return the mask of masked tokens where the data has masks."""
        return self.scored(batch) if batch.labels is None else batch.labels != IGNORED

    def lower_bound(self, metric: str, columns: Columns, reference: Columns, before: float) -> float:
        """Return the loss if the remaining tokens have a negative log-likelihood of 0, or the disagreement so far."""
        if metric == "token_agreement":
            return bound_of_agreement(columns, reference)
        return bound_of_likelihood(metric, columns, reference, before)


class TargetTokens(MaskedTokens):
    """Logits of the tokens of a target, of an encoder-decoder; the labels are these tokens.

    Without targets, the decoder reads what the original generated, and results are compared with the original.
    """

    metrics: ClassVar[Metrics] = {"tokens": "perplexity", None: "token_agreement"}

    def scored(self, batch: Batch) -> Array:
        """Return the mask of the tokens of the targets; all tokens of random data."""
        return np.ones(batch.feeds["decoder_input_ids"].shape, dtype=bool) if batch.scored is None else batch.scored


class TextsBehindImages(MaskedTokens):
    """Logits of the next token, of a vision-language model; the labels are the tokens of the text behind the image."""

    metrics: ClassVar[Metrics] = {"tokens": "perplexity", None: "token_agreement"}


class TokenClasses(Tokens):
    """Logits of the classes of tokens, such as named entities."""

    metrics: ClassVar[Metrics] = {"token classes": "token_accuracy", None: "token_agreement"}
    scales = SCALES
    expects = frozenset({"token_accuracy"})

    def columns(self, metric: str, batch: Batch, answer: Array, original: Array | None) -> Columns:
        """Return ``accuracy``, ``agreement`` and ``regret``, each the mean over the scored ``tokens`` of a sample."""
        if metric == "token_agreement":
            return agreement_columns(self.scored(batch), answer, original)
        assert batch.labels is not None
        scored = batch.labels != IGNORED
        columns = {"accuracy": _mean_where(scored, answer.argmax(-1) == batch.labels)}
        return agreement_columns(scored, answer, original) | columns

    def divergence_mask(self, batch: Batch) -> Array:
        """Return the mask of scored tokens."""
        return self.scored(batch) if batch.labels is None else batch.labels != IGNORED

    def expected_loss(self, metric: str, columns: Columns) -> float | None:
        """Return the mean regret of the scored tokens in points."""
        return bound_of_regret(columns, columns) if "regret" in columns else None

    def lower_bound(self, metric: str, columns: Columns, reference: Columns, before: float) -> float:
        """Return the regret (for accuracy) or disagreement so far, over all scored tokens."""
        bound = bound_of_regret if metric == "token_accuracy" else bound_of_agreement
        return bound(columns, reference)


class Frames(Tokens):
    """Logits of the classes of frames of sound, such as the characters of a CTC model [rows, frames, classes].

    A frame is about 20 ms. Frames of padding are left out where the data tells them apart.
    """

    metrics: ClassVar[Metrics] = {None: "frame_agreement"}
    scales = SCALES

    def columns(self, metric: str, batch: Batch, answer: Array, original: Array | None) -> Columns:
        """Return ``agreement`` and ``regret``, each the mean over the scored ``tokens``, here frames, of a clip."""
        scored = np.ones(answer.shape[:2], dtype=bool) if batch.scored is None else batch.scored
        return agreement_columns(scored, answer, original)

    def divergence_mask(self, batch: Batch) -> Array | None:
        """Return the mask of frames that are not padding; None if the data does not tell."""
        return batch.scored

    def lower_bound(self, metric: str, columns: Columns, reference: Columns, before: float) -> float:
        """Return the disagreement so far, over all scored frames."""
        return bound_of_agreement(columns, reference)


class Queries(Frames):
    """Logits of the classes of object queries, [rows, queries, classes], of a detector; boxes are not compared."""

    metrics: ClassVar[Metrics] = {None: "query_agreement"}


def likelihood_columns(answer: Array, targets: Array, scored: Array, original: Array | None) -> Columns:
    """Return ``nll`` and ``tokens`` per row, and ``agreement`` with the original's most probable tokens.

    Args:
        answer: logits, [rows, tokens, vocabulary].
        targets: token ids, [rows, tokens].
        scored: mask of the positions that count, [rows, tokens].
        original: logits of the original; None to leave the agreement out.
    """
    import torch

    rows = []
    for row, logits in enumerate(torch.from_numpy(answer)):
        mask = torch.from_numpy(np.ascontiguousarray(scored[row]))
        wanted = torch.from_numpy(np.ascontiguousarray(targets[row], dtype=np.int64))
        parts = ((part[kept].float(), target[kept]) for part, target, kept in chunks(logits, wanted, mask))
        nll = sum(float(torch.nn.functional.cross_entropy(*part, reduction="sum")) for part in parts)
        count = agreeing = float(scored[row].sum())
        if original is not None and original is not answer:
            agreeing = float((answer[row].argmax(-1) == original[row].argmax(-1))[scored[row]].sum())
        rows.append((nll, count, agreeing))
    nlls, tokens, agreements = np.array(rows, dtype=np.float64).T
    columns = {"nll": nlls, "tokens": tokens}
    return columns if original is None else columns | {"agreement": agreements / np.maximum(tokens, 1.0)}


def agreement_columns(scored: Array, answer: Array, original: Array | None) -> Columns:
    """Return ``tokens``, and ``agreement`` and ``regret`` as means over the scored tokens of a row."""
    columns = {"tokens": scored.sum(-1).astype(np.float64)}
    if original is not None:
        columns["agreement"] = _mean_where(scored, answer.argmax(-1) == original.argmax(-1))
        regrets = (regret(after, before) for after, before in zip(answer, original, strict=True))  # limits the memory
        columns["regret"] = _mean_where(scored, np.stack(list(regrets)))
    return columns


def _mean_where(scored: Array, values: Array) -> Array:
    means: Array = (values * scored).sum(-1) / np.maximum(scored.sum(-1), 1)
    return means


def bound_of_likelihood(metric: str, columns: Columns, reference: Columns, before: float) -> float:
    """Return the loss of a perplexity if the remaining tokens have a negative log-likelihood of 0."""
    best = {"nll": columns["nll"].sum(keepdims=True), "tokens": reference["tokens"].sum(keepdims=True)}
    after = METRICS[metric].compute(best)
    return float(METRICS[metric].loss(np.asarray(before), after))


def bound_of_regret(columns: Columns, reference: Columns) -> float:
    """Return the regret of the tokens so far as a share of all tokens, in points."""
    return float((columns["regret"] * columns["tokens"]).sum() / max(reference["tokens"].sum(), 1.0)) * 100.0


def bound_of_agreement(columns: Columns, reference: Columns) -> float:
    """Return the tokens so far that differ from the original's as a share of all tokens, in points."""
    differing = ((1.0 - columns["agreement"]) * columns["tokens"]).sum()
    return float(differing / max(reference["tokens"].sum(), 1.0)) * 100.0
