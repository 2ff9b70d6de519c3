"""A model whose forward branches on a size holds for one side only, which is refused or said."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import compressor
from compressor import models
from compressor.limitations import Limitation
from compressor.lower.size_guards import SizeError, check_sizes, size_guards
from compressor.lower.trace import TraceError, trace, trace_with_guards
from passes.execute.interpreter import run
from passes.torch_internals import holds
from tests.decoders import saved
from tests.samples import Tensors, traced

RNG = np.random.default_rng(0)


class Tokens(torch.nn.Module):
    """A residual branch on embedded tokens; a subclass branches in `changed`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.inner = torch.nn.Embedding(20, 8), torch.nn.Linear(8, 8)
        self.head = torch.nn.Linear(8, 20)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        return self.head(x + self.changed(self.inner(x)))

    def changed(self, x: torch.Tensor) -> torch.Tensor:
        return x


class LongTexts(Tokens):
    def changed(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x) if x.shape[1] > 16 else x


class OddTexts(Tokens):
    def changed(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x) if x.shape[1] % 4 else x


class Blocks(Tokens):
    """Pads to blocks of four, which the example has; takes means of them, and cuts the padding off."""

    def changed(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.shape[1]
        if tokens % 4:
            x = torch.nn.functional.pad(x, (0, 0, 0, -tokens % 4))
        blocks = x.unflatten(1, (-1, 4))
        return (blocks + blocks.mean(2, keepdim=True)).flatten(1, 2)[:, :tokens]


class LargeBatches(Tokens):
    def changed(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x) if x.shape[0] > 8 else x


class Masked(Tokens):
    def changed(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x) if (x > 0).all() else x


def loaded(module: torch.nn.Module) -> models.Model:
    example = {"input_ids": torch.ones(2, 12, dtype=torch.long)}
    return models.load(module, example_inputs=example, task="text-generation", cache=False)


def checked(module: torch.nn.Module, length: int) -> list[Limitation]:
    """Trace a module with 12 tokens, and compare its conditions with 10 samples of a length."""
    model = loaded(module)
    split = Tensors({"input_ids": RNG.integers(1, 20, (10, length))})
    data: Any = SimpleNamespace(parts=(split,), source="ids.npy")
    return list(check_sizes(trace_with_guards(model)[1], model, data))


CONDITIONS = {LongTexts: "axis 1 of input_ids <= 16", OddTexts: "(axis 1 of input_ids % 4) == 0"}


@pytest.mark.parametrize(("module", "condition"), CONDITIONS.items())
def test_data_of_one_side_is_a_limitation(module: type[Tokens], condition: str) -> None:
    (limitation,) = checked(module(), 8)
    assert str(limitation) == (
        "sizes of the inputs: forward branches on a size, so the engine computes what the model does only for "
        f"{condition}."
    )
    assert checked(Tokens(), 8) == []


@pytest.mark.parametrize(("module", "condition"), CONDITIONS.items())
def test_data_of_the_other_side_is_refused(module: type[Tokens], condition: str) -> None:
    with pytest.raises(SizeError) as refused:
        checked(module(), 18)
    assert str(refused.value) == (
        f"{module.__name__} branches on the size of its inputs, and was traced only for {condition}, but sample 0 of "
        "ids.npy has input_ids [1, 18]; compute both sides with tensor operators (torch.where) in forward, or give "
        + ("data of one side." if module is LongTexts else "rows padded to a multiple of 4.")
    )


@pytest.mark.parametrize("tokens", [16, 18])
def test_blocks_of_tokens_hold_for_every_text(tokens: int) -> None:
    """The graph is traced where forward pads, whether the example does or not, and computes multiples too."""
    example = {"input_ids": torch.ones(2, tokens, dtype=torch.long)}
    model = models.load(Blocks(), example_inputs=example, task="text-generation", cache=False)
    graph, guards = trace_with_guards(model)
    assert not guards
    for count in (1, 7, 8, 12, 33):
        ids = torch.from_numpy(RNG.integers(0, 20, (3, count)))
        torch.testing.assert_close(run(graph, {"input_ids": ids})[0], model.module(ids))


class ShortTexts(Tokens):
    def changed(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x) if x.shape[1] < 7 else x


class FewTokens(Tokens):
    """Branches where both sides compute the same."""

    def changed(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0 if x.shape[1] < 7 else x


def test_the_other_side_may_be_that_of_short_texts() -> None:
    """It was looked for among longer texts alone, so a file gave short ones the outputs of the other side."""
    with pytest.raises(SizeError, match=r"traced only for axis 1 of input_ids >= 7, but .* has input_ids \[1, 5\]"):
        checked(ShortTexts(), 5)
    (limitation,) = checked(ShortTexts(), 8)
    assert "only for axis 1 of input_ids >= 7" in str(limitation)
    assert checked(FewTokens(), 5) == []


class Pools(Tokens):
    """Adds the mean of the means of blocks of 16, of which the example fills one: a size that torch.export fixes."""

    def changed(self, x: torch.Tensor) -> torch.Tensor:
        blocks = (x.shape[1] + 15) // 16
        places = torch.arange(blocks * 16).clamp(max=x.shape[1] - 1).view(blocks, 16)
        return x + x[:, places].mean(2).mean(1, keepdim=True)


def test_one_block_of_tokens_in_the_example_holds_for_more() -> None:
    model = loaded(Pools())
    graph, guards = trace_with_guards(model)
    assert not guards
    for count in (1, 7, 16, 17, 50):
        ids = torch.from_numpy(RNG.integers(0, 20, (3, count)))
        torch.testing.assert_close(run(graph, {"input_ids": ids})[0], model.module(ids))


class Chunks(Tokens):
    """A loop over blocks of 16, of which the number is fixed by a trace."""

    def changed(self, x: torch.Tensor) -> torch.Tensor:
        padded = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[1] % 16))
        state, blocks = torch.zeros_like(x[:, :1]), []
        for number in range(padded.shape[1] // 16):
            block = padded[:, 16 * number : 16 * number + 16]
            state = state + block.mean(1, keepdim=True)
            blocks.append(block + state)
        return torch.cat(blocks, 1)[:, : x.shape[1]]


def test_data_of_another_length_is_refused_by_the_option_that_helps() -> None:
    model = loaded(Chunks())
    split = Tensors({"input_ids": RNG.integers(1, 20, (10, 18))})
    data: Any = SimpleNamespace(parts=(split,), source="ids.npy")
    with pytest.raises(SizeError, match=r"has input_ids \[1, 18\]; pass --an-option, or give data of one side"):
        list(check_sizes(trace_with_guards(model)[1], model, data, lambda _: "pass --an-option"))


def test_the_limitation_is_that_of_a_command() -> None:
    example = {"input_ids": torch.ones(2, 12, dtype=torch.long)}
    found = compressor.inspect(LongTexts(), example_inputs=example, data="random", task="text-generation", cache=False)
    assert [each for each in found.limitations if each.feature == "sizes of the inputs"]


def test_a_branch_on_the_batch_is_refused() -> None:
    model = loaded(LargeBatches())
    with pytest.raises(
        SizeError, match=r"branches on the batch size, and was traced only for axis 0 of input_ids <= 8"
    ):
        trace(model)


class NeverEmpty(Tokens):
    def changed(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.shape[0] * x.shape[1] > 1 else torch.relu(x)


def test_a_condition_that_holds_for_every_size_is_none() -> None:
    assert checked(NeverEmpty(), 8) == []


def test_a_branch_on_the_contents_of_a_mask_is_refused() -> None:
    model = loaded(Masked())
    with pytest.raises(TraceError, match="branches on tensor values"):
        trace(model)


@pytest.mark.parametrize("name", ["hf_bert", "hf_llama", "hf_clip_text"])
def test_the_number_of_positions_and_equal_sizes_are_no_conditions(name: str) -> None:
    assert trace_with_guards(traced(name)[0])[1] == ()


class Mixture(Tokens):
    """Calls a minimum of a size and a number, as a mixture of experts does."""

    def changed(self, x: torch.Tensor) -> torch.Tensor:
        return x if torch.sym_min(2048, x.shape[1]) <= x.shape[1] else torch.relu(x)


def test_conditions_that_call_functions_of_torch_are_evaluated() -> None:
    assert holds("torch.sym_min(3, L['tensors'][0].size()[1]) <= L['tensors'][0].size()[1]", [torch.zeros(1, 5)])
    assert not holds("torch.sym_min(3, L['tensors'][0].size()[1]) < 3", [torch.zeros(1, 5)])
    assert checked(Mixture(), 8) == []


def test_the_mask_is_as_long_as_the_cache_and_the_new_tokens(tmp_path: Path) -> None:
    model = models.load(saved(tmp_path, "Llama"))
    names = list(model.inputs)
    mask, ids = names.index("attention_mask"), names.index("input_ids")
    past = next(number for number, name in enumerate(names) if name.startswith("past"))
    sizes = [f"L['tensors'][{number}].size()[{axis}]" for number, axis in ((past, 2), (ids, 1), (mask, 1))]
    program: Any = SimpleNamespace(_guards_code=[f"{sizes[0]} + {sizes[1]} + ((-1)*{sizes[2]}) <= 0"])
    assert size_guards(program, model) == ()
    program = SimpleNamespace(_guards_code=[f"{sizes[0]} + {sizes[1]} + ((-1)*{sizes[2]}) < 0"])
    assert [str(each) for each in size_guards(program, model)]
