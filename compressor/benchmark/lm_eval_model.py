"""Adapter of an engine to the language model interface of EleutherAI's lm-evaluation-harness (package lm-eval).

Tokenization, truncation of prompts and rolling windows follow the harness's class for transformers (``--model hf``), so
that equal weights get equal results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import Collator, handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from compressor.data.sliding_windows import tokens_at_once
from compressor.errors import CompressorError
from compressor.measure.workload import empty_cache
from compressor.models import Model
from compressor.models.text.kv_cache import positions
from compressor.models.text.probe import logits_per_token
from runtimes.base.protocols import Engine, Feeds

ROWS = 32  # in a batch; fewer for long texts, see compressor.data.sliding_windows
NEW_TOKENS = 256  # limit of generated tokens for tasks without one, the default of the harness
GREEDY = {"do_sample": (None, False), "temperature": (None, 0.0), "num_beams": (None, 1)}

Ids = npt.NDArray[np.int64]
Request = tuple[tuple[str, str] | None, list[int], list[int]]


class HarnessError(CompressorError):
    """A task needs sampling, beam search or more tokens than an engine supports here."""


class EngineLM(TemplateLM):  # type: ignore[misc]
    """A language model of the harness that computes likelihoods and greedy generation with an engine.

    Args:
        engine: an opened engine of a causal language model.
        model: the model around the engine, with its tokenizer.
        length: maximum number of tokens of one call, prompt and answer together.
        progress: progress callback, called with the number of finished requests and of all requests.
    """

    def __init__(
        self, engine: Engine, model: Model, length: int, progress: Callable[[int, int], None] | None = None
    ) -> None:
        super().__init__()
        self.engine, self.model, self.tokenizer, self.max_length = engine, model, model.tokenizer, length
        self._progress, self._most_tokens = progress, tokens_at_once(logits_per_token(model))
        self._cache_names = {after: before for after, before in model.state.items() if before in engine.inputs}

    # ----------------------------------------------------------------------------------------------------- texts

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: the BOS token, or the end-of-text token if there is none."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        """The name under which the harness caches requests."""
        return self.model.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Tokenize a text; add special tokens unless the text already begins with the prefix token."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return ids

    # ------------------------------------------------------------------------------------------------ likelihoods

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts, from windows whose scored tokens are disjoint."""
        windows: list[Request] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, rolling):
                windows.append((None, context, continuation))
                owners.append(owner)
        values = [value for value, _ in self._loglikelihood_tokens(windows)]
        totals: list[float] = np.bincount(owners, values, len(requests)).tolist()
        return totals

    def _loglikelihood_tokens(self, requests: list[Request], **_: object) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether greedy generation yields it.

        Requests that differ in their last token only, such as choices of one letter, share one call.
        """
        order = Collator(
            requests,
            sort_fn=lambda request: (-len(request[1]) - len(request[2]), tuple(request[1] + request[2])),
            group_by="contexts",
            group_fn=lambda request: request[1] + request[2][:-1],
        )
        scores: list[tuple[float, bool]] = []
        for chunk in order.get_batched(n=ROWS):
            for part in self._batches(chunk):
                inputs = [(context + new)[-(self.max_length + 1) :][:-1] for _, context, new in part]
                for (text, context, new), ids, row in zip(part, inputs, self._logits(inputs), strict=True):
                    log_probs = torch.from_numpy(row[len(ids) - len(new) : len(ids)]).float().log_softmax(-1)
                    shared = order.get_cache(req_str=text, cxt_toks=context, cont_toks=new, logits=log_probs[None])
                    scores += [_score(values[0], tokens) for _, tokens, values in shared]
            self._report(len(scores), len(requests))
        in_order: list[tuple[float, bool]] = order.get_original(scores)
        return in_order

    def _batches(self, chunk: Sequence[Request]) -> Iterator[Sequence[Request]]:
        """Split requests, sorted by length with the longest first, into batches of bounded tokens (or one request)."""
        start = 0
        while start < len(chunk):
            _, context, new = chunk[start]
            rows = max(1, self._most_tokens // min(self.max_length, len(context) + len(new)))
            yield chunk[start : start + rows]
            start += rows

    def _logits(self, inputs: Sequence[Sequence[int]]) -> npt.NDArray[np.float32]:
        """Return the logits of texts, those of their tokens first: [rows, longest or the one length, vocabulary].

        Texts are padded on the right, but for a model that needs its padding on the left.
        """
        width, left = self.model.preprocess.padded or max(map(len, inputs)), self.model.preprocess.left_padding
        ids = np.full((len(inputs), width), self.eot_token_id if left is None else left, dtype=np.int64)
        mask = np.zeros_like(ids)
        starts = [0 if left is None else width - len(tokens) for tokens in inputs]
        for row, (tokens, start) in enumerate(zip(inputs, starts, strict=True)):
            ids[row, start : start + len(tokens)], mask[row, start : start + len(tokens)] = tokens, 1
        logits: npt.NDArray[np.float32] = self._run(ids, mask, self._empty_cache(len(ids)))[self.model.answer]
        if left is None:
            return logits
        return np.stack([np.roll(row, -start, 0) for row, start in zip(logits, starts, strict=True)])

    # ------------------------------------------------------------------------------------------------- generation

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate greedily with the KV cache until one of the task's stop sequences."""
        if self.model.preprocess.padded is not None:
            raise HarnessError(
                f"the task generates texts, and {self.model.name} was exported with --sequence-length "
                f"{self.model.preprocess.padded}, for texts of one length; leave it out of --tasks."
            )
        order = Collator(
            [request.args for request in requests],
            sort_fn=lambda args: (-len(self.tok_encode(args[0])), args[0]),
            group_by="gen_kwargs",
            group_fn=lambda args: args[1],
        )
        texts: list[str] = []
        for chunk in order.get_batched(n=ROWS):
            limit, stops = self._limits(chunk[0][1])
            prompts = [self.tok_encode(text)[-(self.max_length - limit) :] for text, _ in chunk]
            for tokens in self._generate(prompts, limit, stops):
                text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                texts.append(postprocess_generated_text(generation=text, stop=stops, think_end_token=None))
            self._report(len(texts), len(requests))
        in_order: list[str] = order.get_original(texts)
        return in_order

    def _limits(self, generation_kwargs: Mapping[str, Any]) -> tuple[int, list[str]]:
        """Return the maximum number of new tokens and the stop sequences of a task.

        Raises:
            HarnessError: the task needs sampling or beam search, or leaves no tokens for the prompt.
        """
        kwargs = normalize_gen_kwargs(dict(generation_kwargs), NEW_TOKENS)
        for name, values in GREEDY.items():
            if kwargs.get(name) not in values:
                raise HarnessError(
                    f"the task needs {name} {kwargs[name]}, but engines generate greedily; leave it out of --tasks."
                )
        limit = int(kwargs["max_gen_toks"])
        if not 0 < limit < self.max_length:
            raise HarnessError(
                f"the task needs {limit} new tokens, but {self.model.name} accepts {self.max_length} tokens with the "
                "prompt; leave it out of --tasks."
            )
        end = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        return limit, handle_stop_sequences(kwargs["until"], eos=end)

    def _generate(self, prompts: Sequence[Sequence[int]], limit: int, stops: Sequence[str]) -> list[list[int]]:
        """Return up to `limit` new tokens of each prompt, until an end-of-text token or a stop sequence."""
        width = max(map(len, prompts))
        ids = np.full((len(prompts), width), self.eot_token_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, tokens in enumerate(prompts):  # pad on the left, so that all rows end at the same position
            ids[row, width - len(tokens) :], mask[row, width - len(tokens) :] = tokens, 1
        new: list[list[int]] = [[] for _ in prompts]
        active = set(range(len(prompts)))
        step, cache, end_tokens = ids, self._empty_cache(len(ids)), self._end_tokens()
        for _ in range(limit):
            outputs = self._run(step, mask, cache)
            chosen = outputs[self.model.answer][:, -1].argmax(-1).astype(np.int64)[:, None]
            for row in sorted(active):
                token = int(chosen[row, 0])
                if token not in end_tokens:
                    new[row].append(token)
                if token in end_tokens or self._has_stop(new[row], stops):
                    active.remove(row)
            if not active:
                break
            cache = {before: outputs[after] for after, before in self._cache_names.items()}
            ids = np.concatenate([ids, chosen], 1)
            mask = np.concatenate([mask, np.ones_like(chosen)], 1)
            step = chosen if cache else ids  # without a KV cache, run the whole text again
        return new

    def _end_tokens(self) -> set[int]:
        eos = getattr(getattr(self.model.module, "generation_config", None), "eos_token_id", None)
        return {self.eot_token_id, *(eos if isinstance(eos, list) else [] if eos is None else [eos])}

    def _has_stop(self, tokens: Sequence[int], stops: Sequence[str]) -> bool:
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return any(stop and stop in text for stop in stops)

    # ----------------------------------------------------------------------------------------------------- engine

    def _empty_cache(self, rows: int) -> Feeds:
        return dict(empty_cache(self.engine, self.model, rows))

    def _run(self, ids: Ids, mask: Ids, cache: Feeds) -> Mapping[str, npt.NDArray[Any]]:
        """Run the engine; `mask` covers all tokens so far, `ids` only those that are not in the cache."""
        feeds: dict[str, npt.NDArray[np.generic]] = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": positions(mask, ids.shape[1]),
        }
        feeds["token_type_ids"] = np.zeros_like(ids)
        return self.engine.run({name: feeds[name] for name in feeds if name in self.engine.inputs} | dict(cache))

    def _report(self, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(done, total)


def _score(log_probs: torch.Tensor, tokens: Sequence[int]) -> tuple[float, bool]:
    """Return the log-likelihood of tokens, and whether each is the most likely one.

    The last rows of `log_probs` [at least len(tokens), vocabulary] are those of the tokens.
    """
    own = log_probs[-len(tokens) :]
    chosen = torch.tensor(tokens)
    return float(own.gather(-1, chosen[:, None]).sum()), bool((own.argmax(-1) == chosen).all())
