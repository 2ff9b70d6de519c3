"""A module that returns probabilities is measured like one that returns their logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import compressor
from compressor import models
from compressor.data.splits import Data
from compressor.lower import traced_model
from compressor.lower.probabilities import with_logits
from compressor.models import Model
from compressor.quality.heads.registry import head_for
from compressor.report.card.loader_snippet import decision
from compressor.settings import Settings

ENDS = {
    "logits": lambda logits: logits,
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "mean": lambda logits: (logits.softmax(-1) + logits.softmax(-1)) / 2,
    "log": lambda logits: logits.log_softmax(-1),
    "relu": torch.relu,
}
LABELS = "multi_label_classification"


class Classifier(torch.nn.Module):
    """Two residual branches and a sure head; `end` is what it makes of its logits."""

    def __init__(self, end: str, classes: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.end = end
        self.first, self.second, self.head = (torch.nn.Linear(8, size) for size in (8, 8, classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + torch.tanh(self.first(x))
        logits = 8 * self.head(x + torch.tanh(self.second(x)))
        values: torch.Tensor = ENDS[self.end](logits)
        return values


def loaded(module: torch.nn.Module, folder: Path, *shape: int, **options: Any) -> tuple[Model, Data]:
    values = np.random.default_rng(0).standard_normal((80, *shape, 8)).astype(np.float32)
    np.savez(folder / "x.npz", x=values)
    model = models.load(module, example_inputs=torch.zeros(2, *shape, 8), **options)
    settings = Settings(model="any", data=str(folder / "x.npz"))
    return model, traced_model.load_data(settings, model, lambda done, total: None)


def evaluated(model: Model, data: Data) -> torch.Tensor:
    feeds = next(iter(data.calibration.batches(20))).feeds
    with torch.inference_mode():
        return model.evaluated_in(model.call(model.module, torch.from_numpy(feeds["x"])))


@pytest.mark.parametrize(
    ("end", "shape", "options"),
    [
        ("softmax", (), {}),
        ("mean", (), {}),
        ("softmax", (5,), {"task": "token-classification"}),
        ("sigmoid", (), {"problem_type": LABELS}),
    ],
)
def test_probabilities_are_read_as_their_logits(
    end: str, shape: tuple[int, ...], options: dict[str, str], tmp_path: Path
) -> None:
    """Their softmax hides every loss, and as logits of labels they are all positive."""
    plain, data = loaded(Classifier("logits"), tmp_path, *shape, **options)
    wanted = evaluated(plain, data)
    model, data = loaded(Classifier(end), tmp_path, *shape, **options)
    found = with_logits(model, data)
    assert [each.feature for each in found.limitations if each not in model.limitations] == ["probabilities"]
    head = head_for(model.task, model.problem_type)
    assert float(head.divergence(evaluated(found, data), wanted).abs().max()) < 1e-4
    assert float(head.divergence(evaluated(model, data), wanted).abs().max()) > 0.5


@pytest.mark.parametrize("end", ["logits", "log", "relu"])
def test_other_outputs_stay_as_they_are(end: str, tmp_path: Path) -> None:
    model, data = loaded(Classifier(end), tmp_path)
    assert with_logits(model, data) is model


def test_features_between_0_and_1_are_no_probabilities(tmp_path: Path) -> None:
    model, data = loaded(Classifier("sigmoid"), tmp_path, task="feature-extraction")
    assert with_logits(model, data) is model


def test_one_probability_is_a_yes_above_one_half(tmp_path: Path) -> None:
    model, data = loaded(Classifier("sigmoid", classes=1), tmp_path, problem_type=LABELS)
    found = with_logits(model, data)
    head = head_for(found.task, found.problem_type)
    assert len(np.unique(head.decisions(evaluated(found, data).numpy()))) == 2
    assert decision({"task": model.task, "problem_type": LABELS, "probabilities": True}) == " > 0.5"
    assert decision({"task": model.task, "problem_type": LABELS}) == " > 0"


@pytest.mark.parametrize(("end", "problem_type"), [("softmax", None), ("sigmoid", LABELS)])
def test_an_export_reports_the_same_figures(end: str, problem_type: str | None, tmp_path: Path) -> None:
    figures = {}
    for each in ("logits", end):
        np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).standard_normal((80, 8)).astype(np.float32))
        compressor.export(
            Classifier(each),
            example_inputs=torch.zeros(2, 8),
            data=str(tmp_path / "x.npz"),
            problem_type=problem_type,
            drop="1",
            tokens="none",
            rounds=1,
            output=str(tmp_path / each),
        )
        report = json.loads((tmp_path / each / "report.json").read_text())
        figures[each] = report["quality"]["figures"]["result"]["value"], report["quality"]["label_free"]["divergence"]
        assert report["model"]["probabilities"] == (each == end)
    assert figures[end][0] == figures["logits"][0] < 100
    assert figures[end][1]["value"] == pytest.approx(figures["logits"][1]["value"], rel=1e-3)
