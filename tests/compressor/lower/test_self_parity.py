"""A random model, and a graph that computes something else than its module, are refused before anything is measured."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

from compressor import models
from compressor.internals.transformers import quiet
from compressor.lower.self_parity import BatchError, RandomModelError, TracedGraphError, check_self_parity
from compressor.lower.trace import trace
from compressor.models import Model

ROWS = {"x": torch.randn(3, 8, generator=torch.Generator().manual_seed(1))}


class Branch(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + self.changed(self.inner(x)))

    def changed(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Dropout(Branch):
    def changed(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, 0.1)


class SwitchedOff(Branch):
    def changed(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(F.dropout(x, 0.1, self.training), 0.0, training=True)


class Noise(Branch):
    def changed(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1e-6 * torch.randn_like(x)


class StaysOn(torch.nn.Dropout):
    def train(self, mode: bool = True) -> StaysOn:
        self.training = True
        return self


class MonteCarlo(Branch):
    def __init__(self) -> None:
        super().__init__()
        self.drop = StaysOn(0.2)

    def changed(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(x)


class PythonNoise(Branch):
    def changed(self, x: torch.Tensor) -> torch.Tensor:
        return x * random.random()


class Counting(Branch):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def changed(self, x: torch.Tensor) -> torch.Tensor:
        self.count.add_(1)
        return x * self.count


class Fixed(Branch):
    """Reads a size of the example through NumPy, so that the graph holds it as a constant."""

    def changed(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_exporting():
            self.rows = float(len(x))
        return super().forward(x)


def loaded(module: torch.nn.Module) -> Model:
    return models.load(module, example_inputs={"x": torch.rand(2, 8)})


@pytest.mark.parametrize("module", [Branch, SwitchedOff])
def test_a_deterministic_model_passes(module: type[Branch]) -> None:
    model = loaded(module())
    check_self_parity(model, trace(model), ROWS)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Dropout, r"it draws random numbers \(aten.dropout\): .*training=self.training"),
        (Noise, r"it draws random numbers \(aten.randn_like\)"),
        (MonteCarlo, r"it draws random numbers \(aten.dropout in drop\), as drop stays in training mode"),
        (
            PythonNoise,
            r"\(output output, row \d, channel \d: found .*, expected .*\); its graph has no random operator",
        ),
        (Counting, r"it changes its own state"),
    ],
)
def test_a_random_model_is_refused_with_the_operator(module: type[Branch], reason: str) -> None:
    model = loaded(module())
    with pytest.raises(RandomModelError, match=rf"^{module.__name__} returns other outputs .*{reason}") as refusal:
        check_self_parity(model, trace(model), ROWS)
    assert "report it" not in str(refusal.value)


class Flat(Branch):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).flatten()[:, None]


def test_outputs_without_an_axis_of_rows_are_refused_by_their_shapes() -> None:
    """They ended in a traceback."""
    model = replace(loaded(Branch()), module=Flat().eval())  # a module of one's own is refused before
    with pytest.raises(BatchError, match=r"returns output \[\d+, 1\] for \d rows; expected one entry for each row"):
        check_self_parity(model, trace(model), ROWS)


def test_a_class_of_a_library_that_draws_is_to_be_changed_in_a_module_of_ones_own() -> None:
    model = replace(loaded(Noise()), source="transformers")
    with pytest.raises(RandomModelError, match="its class draws them in evaluation too, so pass it as a"):
        check_self_parity(model, trace(model), ROWS)


class Seeded(Branch):
    def changed(self, x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return x + 0.1 * torch.randn_like(x)


class OwnGenerator(Branch):
    def changed(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.randn(1, 8, generator=torch.Generator().manual_seed(0))


class SeededShuffle(Branch):
    def changed(self, x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return x[:, torch.randperm(8)]


@pytest.mark.parametrize("module", [Seeded, OwnGenerator, SeededShuffle])
def test_random_numbers_that_forward_seeds_are_refused(module: type[Branch]) -> None:
    """The module repeats itself, but no engine draws its numbers: its output was off by a tenth without a word."""
    model = loaded(module())
    with pytest.raises(RandomModelError, match=r"only because forward seeds the generator, .*keep them as a buffer"):
        check_self_parity(model, trace(model), ROWS)


class RunningSum(Branch):
    def changed(self, x: torch.Tensor) -> torch.Tensor:
        return x.cumsum(0)


class RowBefore(Branch):
    def changed(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.1 * F.pad(x, (0, 0, 1, -1))


class Capacity(Branch):
    """The first two rows that choose an expert get it."""

    def changed(self, x: torch.Tensor) -> torch.Tensor:
        chosen = F.one_hot((x[:, 0] < 9).long(), 2)
        place = (chosen.cumsum(0) * chosen).sum(1, keepdim=True)
        return x * (place <= 2)


@pytest.mark.parametrize("module", [RunningSum, RowBefore, Capacity])
def test_rows_that_depend_on_those_before_them_are_refused(module: type[Branch]) -> None:
    """The first row has none before it, so it is the same alone."""
    model = loaded(module())
    with pytest.raises(BatchError, match=r"returns other outputs for a row alone than for the same row among 3 \("):
        check_self_parity(model, trace(model), ROWS)


def test_a_size_that_tracing_fixed_is_refused() -> None:
    model = loaded(Fixed())
    with pytest.raises(TracedGraphError, match=r"other outputs than the module \(output output, row \d, channel \d"):
        check_self_parity(model, trace(model), ROWS)


def test_a_branch_on_a_batch_of_one_is_refused() -> None:
    """torch.export assumes that a dynamic batch is not 1, and records no condition for it."""

    class OneRow(Branch):
        def changed(self, x: torch.Tensor) -> torch.Tensor:
            return 2.0 * x if x.shape[0] == 1 else x

    model = loaded(OneRow())
    with pytest.raises(TracedGraphError, match=r"other outputs than the module \(output output, row 0, channel \d"):
        check_self_parity(model, trace(model), ROWS)


def test_a_class_that_leaves_its_mask_out_is_refused_with_what_keeps_it(tmp_path: Path) -> None:
    """The texts of AIMv2 are not causal without padding, unless it computes attention itself."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.Aimv2TextConfig(vocab_size=40, eos_token_id=2, initializer_range=0.3, **sizes)
    with quiet():
        torch.manual_seed(0)
        transformers.Aimv2TextModel(config).save_pretrained(tmp_path / "m")

    def check() -> None:
        model = models.load(str(tmp_path / "m"))
        ids = torch.arange(5, 29).reshape(3, 8)
        check_self_parity(model, trace(model), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    advice = 'write "attn_implementation": "eager" into its config.json'
    with pytest.raises(TracedGraphError, match=advice):
        check()
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attn_implementation": "eager"}))
    check()


class Centred(Branch):
    def changed(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0)


class Sorted(Branch):
    def changed(self, x: torch.Tensor) -> torch.Tensor:
        return x.sort(0).values


@pytest.mark.parametrize("kind", [Centred, Sorted])
def test_outputs_that_depend_on_the_other_rows_are_refused(kind: type[Branch]) -> None:
    model = models.load(kind(), example_inputs=ROWS["x"][:2])
    with pytest.raises(BatchError, match=r"returns other outputs for a row alone than for the same row among 3 \("):
        check_self_parity(model, trace(model), ROWS)


@pytest.mark.parametrize("outputs", [("output",), ("logits", "pooled")])
def test_a_batch_axis_that_is_lost_at_one_row_is_named(outputs: tuple[str, ...]) -> None:
    """Of several outputs, the others would agree."""

    class Squeezing(Branch):
        def forward(self, x: torch.Tensor) -> Any:
            y = super().forward(x)
            return y.squeeze(0) if len(outputs) == 1 else dict(zip(outputs, (y, y.squeeze(0) + 1), strict=True))

    model = models.load(Squeezing(), example_inputs=ROWS["x"][:2])
    found = rf"returns {outputs[-1]} with shape \[\d+\] for a row alone, and with shape \[3, \d+\] for 3 rows; expected"
    with pytest.raises(BatchError, match=found):
        check_self_parity(model, trace(model), ROWS)


def test_a_module_that_fails_on_one_row_is_refused() -> None:
    class Normed(Branch):
        def changed(self, x: torch.Tensor) -> torch.Tensor:
            return F.batch_norm(x, None, None, training=True)

    model = models.load(Normed(), example_inputs=ROWS["x"][:2])
    with pytest.raises(BatchError, match=r"several rows, but fails on a row alone \(ValueError: Expected more than 1"):
        check_self_parity(model, trace(model), ROWS)
