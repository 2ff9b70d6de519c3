"""An opened engine as a language model of EleutherAI's lm-evaluation-harness; needs the package lm-eval.

Texts become tokens, prompts are cut and windows roll as its class for transformers (``--model hf``) does it, so that
the same weights get the same figures.
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

from compressor.data.sliding_windows import TOKENS
from compressor.errors import CompressorError
from compressor.measure.workload import empty
from compressor.models import Model
from compressor.models.kv_cache import positions
from runtimes.base.protocols import Engine, Feeds

ROWS = 32  # at a time, fewer where texts are long: see compressor.windows.TOKENS
NEW_TOKENS = 256  # generated at most where a task does not say, as the harness has it
GREEDY = {"do_sample": (None, False), "temperature": (None, 0.0), "num_beams": (None, 1)}

Ids = npt.NDArray[np.int64]
Request = tuple[tuple[str, str] | None, list[int], list[int]]


class HarnessError(CompressorError):
    """The harness asks for something that an engine is not used for here."""


class EngineLM(TemplateLM):  # type: ignore[misc]
    """Likelihoods and greedy generation by an engine.

    Args:
        engine: opened, of a causal language model.
        model: the model around it, with its tokenizer.
        length: most tokens of one call, prompt and answer together.
        told: called with the requests that are done, and with all of those under way.
    """

    def __init__(
        self, engine: Engine, model: Model, length: int, told: Callable[[int, int], None] | None = None
    ) -> None:
        super().__init__()
        self.engine, self.model, self.tokenizer, self.max_length = engine, model, model.tokenizer, length
        self._told = told
        self._carried = {after: before for after, before in model.state.items() if before in engine.inputs}

    # ----------------------------------------------------------------------------------------------------- texts

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token in front of a text without context."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        """What the harness keeps requests under."""
        return self.model.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Token ids, with the tokenizer's own special tokens unless the text already begins with the first of them."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        found: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return found

    # ------------------------------------------------------------------------------------------------ likelihoods

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows that share no scored token."""
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
        """Log-likelihood of each continuation, and whether it is what greedy generation gives.

        Requests that differ in their last token only, as choices of one letter do, share one call.
        """
        order = Collator(
            requests,
            sort_fn=lambda request: (-len(request[1]) - len(request[2]), tuple(request[1] + request[2])),
            group_by="contexts",
            group_fn=lambda request: request[1] + request[2][:-1],
        )
        found: list[tuple[float, bool]] = []
        for chunk in order.get_batched(n=ROWS):
            for part in self._parts(chunk):
                inputs = [(context + new)[-(self.max_length + 1) :][:-1] for _, context, new in part]
                for (text, context, new), ids, row in zip(part, inputs, self._logits(inputs), strict=True):
                    scores = torch.from_numpy(row[len(ids) - len(new) : len(ids)]).float().log_softmax(-1)
                    shared = order.get_cache(req_str=text, cxt_toks=context, cont_toks=new, logits=scores[None])
                    found += [_scored(values[0], tokens) for _, tokens, values in shared]
            self._tell(len(found), len(requests))
        answers: list[tuple[float, bool]] = order.get_original(found)
        return answers

    def _parts(self, chunk: Sequence[Request]) -> Iterator[Sequence[Request]]:
        """As many requests at a time as have few tokens together; they come in order of length, longest first."""
        start = 0
        while start < len(chunk):
            _, context, new = chunk[start]
            rows = max(1, TOKENS // min(self.max_length, len(context) + len(new)))
            yield chunk[start : start + rows]
            start += rows

    def _logits(self, inputs: Sequence[Sequence[int]]) -> npt.NDArray[np.float32]:
        """Logits of some texts, padded on the right."""
        ids = np.full((len(inputs), max(map(len, inputs))), self.eot_token_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, tokens in enumerate(inputs):
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        logits: npt.NDArray[np.float32] = self._run(ids, mask, self._no_cache(len(ids)))[self.model.answer]
        return logits

    # ------------------------------------------------------------------------------------------------- generation

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the engine goes on with, token by token behind its cache, until one of the texts that end it."""
        order = Collator(
            [request.args for request in requests],
            sort_fn=lambda asked: (-len(self.tok_encode(asked[0])), asked[0]),
            group_by="gen_kwargs",
            group_fn=lambda asked: asked[1],
        )
        found: list[str] = []
        for chunk in order.get_batched(n=ROWS):
            most, until = self._ends(chunk[0][1])
            prompts = [self.tok_encode(text)[-(self.max_length - most) :] for text, _ in chunk]
            for tokens in self._generated(prompts, most, until):
                text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                found.append(postprocess_generated_text(generation=text, stop=until, think_end_token=None))
            self._tell(len(found), len(requests))
        texts: list[str] = order.get_original(found)
        return texts

    def _ends(self, asked: Mapping[str, Any]) -> tuple[int, list[str]]:
        """Most new tokens, and the texts that end an answer.

        Raises:
            HarnessError: the task samples or searches, or leaves no room for a prompt.
        """
        kwargs = normalize_gen_kwargs(dict(asked), NEW_TOKENS)
        for name, values in GREEDY.items():
            if kwargs.get(name) not in values:
                raise HarnessError(f"the task asks for {name} {kwargs[name]}; engines generate greedily here.")
        most = int(kwargs["max_gen_toks"])
        if not 0 < most < self.max_length:
            raise HarnessError(
                f"the task asks for {most} new tokens, and {self.model.name} takes {self.max_length} with the prompt."
            )
        end = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        return most, handle_stop_sequences(kwargs["until"], eos=end)

    def _generated(self, prompts: Sequence[Sequence[int]], most: int, until: Sequence[str]) -> list[list[int]]:
        """New tokens of each prompt, up to the one that ends its text or completes an ending."""
        width = max(map(len, prompts))
        ids = np.full((len(prompts), width), self.eot_token_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, tokens in enumerate(prompts):  # on the left, so that all go on at the same place
            ids[row, width - len(tokens) :], mask[row, width - len(tokens) :] = tokens, 1
        new: list[list[int]] = [[] for _ in prompts]
        open_rows = set(range(len(prompts)))
        step, cache, ends = ids, self._no_cache(len(ids)), self._ending_tokens()
        for _ in range(most):
            answers = self._run(step, mask, cache)
            chosen = answers[self.model.answer][:, -1].argmax(-1).astype(np.int64)[:, None]
            for row in sorted(open_rows):
                token = int(chosen[row, 0])
                if token not in ends:
                    new[row].append(token)
                if token in ends or self._ended(new[row], until):
                    open_rows.remove(row)
            if not open_rows:
                break
            cache = {before: answers[after] for after, before in self._carried.items()}
            ids = np.concatenate([ids, chosen], 1)
            mask = np.concatenate([mask, np.ones_like(chosen)], 1)
            step = chosen if cache else ids  # a model without a cache reads everything again
        return new

    def _ending_tokens(self) -> set[int]:
        said = getattr(getattr(self.model.module, "generation_config", None), "eos_token_id", None)
        return {self.eot_token_id, *(said if isinstance(said, list) else [] if said is None else [said])}

    def _ended(self, tokens: Sequence[int], until: Sequence[str]) -> bool:
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return any(end and end in text for end in until)

    # ----------------------------------------------------------------------------------------------------- engine

    def _no_cache(self, rows: int) -> Feeds:
        return dict(empty(self.engine, self.model, rows))

    def _run(self, ids: Ids, mask: Ids, cache: Feeds) -> Mapping[str, npt.NDArray[Any]]:
        """One call; `mask` is of all tokens so far, `ids` of those that the cache does not hold."""
        told: dict[str, npt.NDArray[np.generic]] = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": positions(mask, ids.shape[1]),
        }
        told["token_type_ids"] = np.zeros_like(ids)
        return self.engine.run({name: told[name] for name in told if name in self.engine.inputs} | dict(cache))

    def _tell(self, done: int, total: int) -> None:
        if self._told is not None:
            self._told(done, total)


def _scored(scores: torch.Tensor, tokens: Sequence[int]) -> tuple[float, bool]:
    """Log-likelihood of tokens, of which `scores` [at least as many, vocabulary] ends with theirs."""
    own = scores[-len(tokens) :]
    chosen = torch.tensor(tokens)
    return float(own.gather(-1, chosen[:, None]).sum()), bool((own.argmax(-1) == chosen).all())
