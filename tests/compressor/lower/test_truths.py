"""Models that branch on a value of truth that no mask of padding changes, and slide windows over padded tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compressor import models
from compressor.lower.size_guards import check_sizes
from compressor.lower.symbolic.truths import FixedTruth, constant_truths, truths_of
from compressor.lower.trace import TraceError, trace_with_guards
from compressor.models import Model
from passes.execute.interpreter import run
from tests.text_models import save_model

SIZES = {"vocab_size": 40, "attention_window": 8, "pad_token_id": 1}
ENCODER = SIZES | {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 80,
}  # fmt: skip
BOTH = SIZES | {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_encoder_position_embeddings": 80,
    "max_decoder_position_embeddings": 40,
}  # fmt: skip
LENGTHS = (7, 16, 21, 40)  # of which two are multiples of the window


def tokens(length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(2, 40, (3, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}


@pytest.fixture(scope="module")
def longformer(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("longformer")
    return models.load(save_model(folder, "LongformerForMaskedLM", "LongformerConfig", **ENCODER))


@pytest.mark.slow
def test_longformer_takes_texts_of_any_length(longformer: Model) -> None:
    graph, conditions = trace_with_guards(longformer)
    (truth,) = conditions
    assert isinstance(truth, FixedTruth)
    assert (Path(truth.file).name, truth.value) == ("modeling_longformer.py", False)
    for length in LENGTHS:
        feeds = tokens(length)
        with torch.inference_mode():
            expected = longformer.module(**feeds).logits
        kept = feeds["attention_mask"] == 1
        torch.testing.assert_close(run(graph, feeds)[0][kept], expected[kept], rtol=0, atol=1e-5)


def test_a_fixed_value_is_a_limitation(longformer: Model) -> None:
    (limitation,) = check_sizes((FixedTruth("/lib/modeling.py", 12, value=False),), longformer, None)  # type: ignore[arg-type]
    assert str(limitation) == (
        "values of the inputs: forward branches on a value that is False (modeling.py:12) in all trial calls, and the "
        "engine computes what the model does only then."
    )


@pytest.mark.slow
def test_led_takes_sources_of_any_length(tmp_path: Path) -> None:
    """Its encoder cuts the padding off by a negative place, which is 0 where there is none."""
    model = models.load(save_model(tmp_path, "LEDForConditionalGeneration", "LEDConfig", **BOTH))
    graph, conditions = trace_with_guards(model)
    assert [type(each) for each in conditions] == [FixedTruth]
    for length in LENGTHS:
        feeds = model.example | tokens(length) | {"decoder_input_ids": torch.full((3, 5), 4)}
        feeds |= {name: feeds[name].repeat(2, 1, 1, 1)[:3] for name in model.state.values() if name in feeds}
        with torch.inference_mode():
            expected = model.call(model.module, *(feeds[name] for name in model.inputs))
        for name, value, wanted in zip(graph.outputs, run(graph, feeds), expected, strict=True):
            torch.testing.assert_close(value, wanted, rtol=0, atol=1e-5, msg=name)


class Asking(torch.nn.Module):
    """Asks whether a mask has padding, which changes, and whether it has a third value, which never does."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        values = input_ids + 1.0
        if (attention_mask == 0).any():
            values = values * attention_mask
        return values if (attention_mask > 1).any().item() else values + 1


def test_only_values_that_never_change_are_constants() -> None:
    example = {"input_ids": torch.arange(8).reshape(2, 4), "attention_mask": torch.ones(2, 4, dtype=torch.long)}
    truths = truths_of(models.load(Asking(), example_inputs=example))
    assert sorted(map(sorted, truths.found.values())) == [[False], [False, True]]
    other = torch.full((2, 4), 2)
    with constant_truths(truths):
        found = Asking()(example["input_ids"], other)
    assert torch.equal(found, example["input_ids"] + 2.0)
    assert [each.value for each in truths.fixed] == [False]
    assert torch.equal(Asking()(example["input_ids"], other), example["input_ids"] + 1.0)


def test_only_models_whose_code_is_not_the_users_are_traced_so() -> None:
    example = {"input_ids": torch.arange(8).reshape(2, 4), "attention_mask": torch.ones(2, 4, dtype=torch.long)}
    own = models.load(Masked(), example_inputs=example)
    with pytest.raises(TraceError, match="branches on tensor values"):
        trace_with_guards(own)
    graph, (truth,) = trace_with_guards(replace(own, source="transformers"))
    assert str(truth).startswith("a value that is False (test_truths.py:")
    mask = torch.tensor([[1, 1, 1, 0]] * 3)
    ids = torch.arange(12).reshape(3, 4)
    assert torch.equal(run(graph, {"input_ids": ids, "attention_mask": mask})[0], Masked()(ids, mask))


class Masked(torch.nn.Module):
    """Asks whether a mask has a third value."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        values = (input_ids + 1.0) * attention_mask
        return values if (attention_mask > 1).any().item() else values + 1


class Silent(torch.nn.Module):
    """Asks for no value."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return input_ids + 1.0


def test_a_model_without_such_values_is_not_traced_again() -> None:
    truths = truths_of(models.load(Silent(), example_inputs={"input_ids": torch.arange(8).reshape(2, 4)}))
    with pytest.raises(ValueError, match="no value of truth"), constant_truths(truths):
        pass
