"""Tests of the lm-eval tasks: engines get the results of the harness's own class for transformers."""

import dataclasses
import functools
import io
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from compressor import models
from compressor.benchmark import lm_eval_tasks
from compressor.benchmark.lm_eval_tasks import Result, TaskOptions, TaskResults, check_model, evaluate_tasks, results
from compressor.cli.main import main
from compressor.errors import CompressorError, SettingsError
from compressor.lower.trace import trace
from compressor.lower.write_onnx import lower
from compressor.target.torch_eager import Module
from compressor.workspace.progress import Steps
from runtimes.base.protocols import BuildOptions
from runtimes.base.registry import runtime
from tests.samples import worded

EQUAL = 1e-4  # relative, for float32 logits of rows with other padding; measured 1e-6
ROUNDS = ["--rounds", "1", "--threads", "1", "--context", "8", "-q"]

SAID = {
    "results": {
        "arc": {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.1, "name": "arc"},
        "wiki": {"alias": "wiki", "ppl,none": 7.0, "ppl_stderr,none": "N/A"},
    },
    "higher_is_better": {"arc": {"acc": True}, "wiki": {"ppl": False}},
    "versions": {"arc": 1.0},
    "n-shot": {"arc": 5, "wiki": 0},
    "n-samples": {"arc": {"original": 90, "effective": 40}},
}


# -------------------------------------------------------------------------------------------- without the harness


def test_results_hold_errors_shots_and_versions():
    arc, wiki = results("dense", SAID)
    assert arc == Result("dense", "arc", "acc", "none", 0.5, 0.1, 5, 40, "1.0", True)
    assert wiki == Result("dense", "wiki", "ppl", "none", 7.0, None, 0, None, None, False)
    assert (arc.title, wiki.title) == ("arc, 5-shot, acc ↑", "wiki, 0-shot, ppl ↓")


def test_differences_are_from_the_reference_on_the_same_metric():
    worse = {**SAID, "results": {"arc": {"acc,none": 0.25}, "new": {"f1,strict": 1.0}}}
    harness = TaskResults(
        TaskOptions(("arc",), limit=40), "9.9", "dense", (*results("dense", SAID), *results("less", worse))
    )
    content = json.loads(json.dumps(harness.to_dict(), allow_nan=False))
    assert content["lm_eval"] == "9.9"
    assert content["limit"] == 40
    assert [row["difference"] for row in content["results"]] == [0.0, 0.0, -0.25, None]
    assert harness.table().row_count == 3 + 4
    assert "first 40 questions" in harness.summary()


def test_names_of_engines_and_tasks_are_no_markup():
    result = Result("[dense] [/]", "[red]arc[/red]", "acc", "none", 0.5, None, None, None, None, None)
    harness = TaskResults(TaskOptions(("arc",)), "9.9", "[dense] [/]", (result,))
    stream = io.StringIO()
    Console(file=stream, width=150).print(harness.table())
    assert stream.getvalue().count("[dense] [/]") == 2  # in the title and in the row
    assert "[red]arc[/red], acc" in stream.getvalue()


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (TaskOptions((), shots=2), "--num-fewshot needs --tasks"),
        (TaskOptions((), include_path="x"), "--include-path needs --tasks"),
        (TaskOptions(("a", " ")), "an empty name"),
        (TaskOptions(("a",), limit=1.5), "--limit is 1.5"),
        (TaskOptions(("a",), limit=0), "--limit is 0"),
        (TaskOptions(("a",)), "pip install"),
    ],
)
def test_invalid_options_are_refused(asked, words, monkeypatch):
    monkeypatch.setattr(lm_eval_tasks, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=words):
        asked.check()


def test_model_without_tokenizer_or_weights_is_refused(tmp_path):
    model = models.load(str(worded(tmp_path, vocabulary=20)))
    for change, words in (
        ({"task": "feature-extraction"}, "needs a language model"),
        ({"tokenizer": None}, "tokenizer"),
        ({"random_weights": True}, "random"),
    ):
        with pytest.raises(SettingsError, match=words):
            check_model(dataclasses.replace(model, **change), TaskOptions(("a",)))
    check_model(dataclasses.replace(model, tokenizer=None), TaskOptions(()))  # without tasks, no check
    assert evaluate_tasks({}, model, TaskOptions(()), against="", length=None, steps=Steps()) is None


def test_texts_are_padded_on_the_side_that_a_model_needs():
    lm_eval_model = pytest.importorskip("compressor.benchmark.lm_eval_model", reason="the extra lm-eval is missing")
    seen = []

    def run(ids, mask, _):
        seen.append((ids.tolist(), mask.tolist()))
        return {"logits": ids[..., None].astype(np.float32)}

    for left, rows in ((None, [[5, 6, 7], [8, 2, 2]]), (9, [[5, 6, 7], [9, 9, 8]])):
        model = SimpleNamespace(preprocess=SimpleNamespace(padded=None, left_padding=left), answer="logits")
        engine = SimpleNamespace(model=model, eot_token_id=2, _run=run, _empty_cache=lambda rows: {})
        logits = lm_eval_model.EngineLM._logits(engine, [[5, 6, 7], [8]])
        assert seen.pop()[0] == rows
        assert [row[:size, 0].tolist() for row, size in zip(logits, (3, 1), strict=True)] == [[5, 6, 7], [8]]


# ----------------------------------------------------------------------------------------------- with the harness

TASKS = {
    "mine_choice": "output_type: multiple_choice\ndoc_to_text: '{{context}}'\ndoc_to_target: gold\n"
    "doc_to_choice: choices\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n",
    "mine_word": "output_type: multiple_choice\ndoc_to_text: '{{context}}'\ndoc_to_target: gold\n"
    "doc_to_choice: words\nmetric_list:\n  - metric: acc\n",  # of one token each, so that they share a call
    "mine_rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: page\n"
    "metric_list:\n  - metric: word_perplexity\n",
    "mine_answer": "output_type: generate_until\ndoc_to_text: '{{context}}'\ndoc_to_target: answer\n"
    "generation_kwargs:\n  until: ['w7']\n  max_gen_toks: 12\nmetric_list:\n  - metric: exact_match\n",
}


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Write a folder with a small Llama, tasks on a local file, and token ids."""
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    pytest.importorskip("accelerate", reason="lm-eval's own class for transformers needs accelerate")
    folder = tmp_path_factory.mktemp("harness")
    worded(folder / "llama", vocabulary=50)
    numbers = np.random.default_rng(0)

    def text(count):
        return " ".join(f"w{token}" for token in numbers.integers(3, 50, count))

    rows = [
        {"context": text(2 + 3 * row), "choices": [text(4), text(2), text(3)], "words": [text(1), text(1)],
         "gold": row % 2, "page": text(10 + 12 * row), "answer": text(2)}
        for row in range(14)
    ]  # fmt: skip
    (folder / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    (folder / "tasks").mkdir()
    for name, body in TASKS.items():
        (folder / "tasks" / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / 'rows.json'}\n"
            f"test_split: test\n{body}metadata:\n  version: 1.0\n"
        )
    np.save(folder / "ids.npy", numbers.integers(3, 50, (24, 20)))
    return folder


needs_harness = [
    pytest.mark.filterwarnings("ignore"),  # of the harness and the data library
    pytest.mark.usefixtures("own"),
]


def engine(model):
    return Module(model).open(BuildOptions(device="cpu"))


class TestWithTheHarness:
    """Tests that skip if lm-eval is not installed."""

    pytestmark = needs_harness

    @pytest.fixture(autouse=True)
    def own_tasks_only(self, monkeypatch):
        """Skip the harness's own tasks (thousands of files) and its description of the machine (seconds)."""
        from lm_eval import evaluator, tasks

        monkeypatch.setattr(tasks, "TaskManager", functools.partial(tasks.TaskManager, include_defaults=False))
        monkeypatch.setattr(evaluator, "add_env_info", lambda storage: None)

    def asked(self, own, **options):
        return TaskOptions(tuple(TASKS), include_path=str(own / "tasks"), **options)

    def test_results_equal_those_of_the_class_for_transformers(self, own):
        """Choices, choices of one token, texts longer than the model's limit, and generated answers."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        model = models.load(str(own / "llama"))
        file = lower(trace(model), model, own / "dense.onnx")
        openers = {
            "ours": lambda: runtime("onnxruntime").load(file, BuildOptions(threads=1)),
            "eager": lambda: engine(model),
        }
        harness = evaluate_tasks(openers, model, self.asked(own), against="ours", length=None, steps=Steps())
        manager = TaskManager(include_path=str(own / "tasks"))
        theirs = HFLM(pretrained=str(own / "llama"), dtype="float32", device="cpu", batch_size=4)
        output = simple_evaluate(model=theirs, tasks=list(TASKS), task_manager=manager, log_samples=False)
        expected = list(results("ours", output))
        assert {each.task for each in expected} == set(TASKS)
        for name in openers:
            mine = [each for each in harness.results if each.engine == name]
            for each, same in zip(mine, expected, strict=True):
                assert each == dataclasses.replace(same, engine=name, value=each.value)
                assert each.value == pytest.approx(same.value, rel=EQUAL)

    def test_responses_equal_those_of_the_class_for_transformers(self, own):
        """Compare request by request: likelihoods, greedy flags, rolling likelihoods, generated texts."""
        from lm_eval.models.huggingface import HFLM

        from compressor.benchmark.lm_eval_model import EngineLM

        model = models.load(str(own / "llama"))
        rows = [json.loads(line) for line in (own / "rows.json").read_text().split("\n")]
        theirs = HFLM(pretrained=str(own / "llama"), dtype="float32", device="cpu", batch_size=3)
        ours = EngineLM(engine(model), model, 64)
        pairs = [(row["context"], f" {choice}") for row in rows for choice in (*row["choices"], *row["words"])]
        pairs += [("", rows[0]["page"])]
        every = {
            "loglikelihood": pairs,
            "loglikelihood_rolling": [(row["page"],) for row in rows],
            "generate_until": [
                (row["context"], {"until": [ending], "max_gen_toks": most})
                for row in rows
                for ending, most in (("w7", 20), ("nothing", 5))
            ],
        }
        for kind, arguments in every.items():
            requests = [SimpleNamespace(args=args, task_name="mine") for args in arguments]
            one, other = (getattr(lm, kind)(requests, disable_tqdm=True) for lm in (ours, theirs))
            if kind == "generate_until":
                assert one == other
                assert len({len(text.split()) for text in one}) > 3  # some end early
            elif kind == "loglikelihood":
                np.testing.assert_allclose(
                    *(np.array([value for value, _ in side]) for side in (one, other)), rtol=EQUAL
                )
                assert [greedy for _, greedy in one] == [greedy for _, greedy in other]
            else:
                np.testing.assert_allclose(one, other, rtol=EQUAL)

    def test_model_without_cache_generates_the_same_text(self, own):
        from compressor.benchmark.lm_eval_model import EngineLM

        model = models.load(str(own / "llama"))
        opened = engine(model)

        class WithoutCache:
            """The same engine without cache inputs and outputs."""

            inputs, outputs = ("input_ids", "attention_mask", "position_ids"), ("logits",)

            def run(self, feeds):
                return {"logits": opened.run(model.preprocess.complete(dict(feeds)))["logits"]}

        requests = [
            SimpleNamespace(args=(f"w{n} w9 w{n + 1}", {"until": ["w7"], "max_gen_toks": 9})) for n in range(3, 9)
        ]
        with_cache = EngineLM(opened, model, 64).generate_until(requests)
        assert EngineLM(WithoutCache(), model, 64).generate_until(requests) == with_cache
        assert any(with_cache)

    def test_unsupported_generation_is_refused(self, own):
        from compressor.benchmark.lm_eval_model import EngineLM, HarnessError

        model = models.load(str(own / "llama"))
        lm = EngineLM(engine(model), model, 64)
        for options, words in (
            ({"do_sample": True, "temperature": 0.7}, "do_sample"),
            ({"max_gen_toks": 64}, "64 new"),
        ):
            with pytest.raises(HarnessError, match=words):
                lm.generate_until([SimpleNamespace(args=("w3", {"until": [], **options}))])
        with pytest.raises(CompressorError, match="no_such_task"):
            check_model(model, TaskOptions(("no_such_task",)))

    @pytest.mark.slow  # half a minute for an export and a bench
    def test_command_evaluates_an_exported_folder_and_the_model(self, own, monkeypatch):
        monkeypatch.chdir(own)
        run = CliRunner()
        common = ["--data", "random", "--samples", "24"]  # the weights are random, and predict no text
        made = run.invoke(
            main, ["export", "llama", *common, "--drop", "none", "--rounds", "1", "--output", "dense", "-q"]
        )
        assert made.exit_code == 0, made.output
        tasks = ["--tasks", ",".join(TASKS), "--include-path", "tasks", "--limit", "6", "--num-fewshot", "0"]
        done = run.invoke(main, ["bench", "dense", "llama", *common, *ROUNDS, *tasks])
        assert done.exit_code == 0, done.output
        assert "mine_rolling, 0-shot, word_perplexity ↓" in done.output
        content = json.loads((own / "bench.json").read_text())["tasks"]
        assert content["limit"] == 6
        by_engine = {
            name: [r for r in content["results"] if r["engine"] == name] for name in ("dense", "llama (eager)")
        }
        assert len(by_engine["dense"]) == 5
        for one, other in zip(*by_engine.values(), strict=True):
            assert one["value"] == pytest.approx(other["value"], rel=EQUAL)
            assert one["samples"] == 6
            assert one["version"] == "1.0"
        assert math.isfinite(sum(row["value"] for row in content["results"]))
