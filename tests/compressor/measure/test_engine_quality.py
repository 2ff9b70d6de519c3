"""Evaluation of engines in this process and on workers of a simulated cluster, whose machines do not have the files."""

import dataclasses
import itertools
import math
import os
import shutil
import signal
import sys
from importlib import util
from types import SimpleNamespace

import numpy as np
import pytest

from compressor.executor.base import ExecutorError, InProcess, UnsharableError
from compressor.executor.on_ray import OnRay, executor_for
from compressor.lower.traced_model import ModelAndData
from compressor.measure.engine_builder import EngineBuilder
from compressor.measure.engine_quality import evaluate_engines, evaluate_openers
from compressor.measure.latency import EngineTimer
from compressor.measure.memory_budget import GIB
from compressor.measure.precision_converter import PrecisionConverter
from compressor.measure.workload import RUN, Call
from compressor.pipeline import export_offloaded
from compressor.quality.evaluate import BATCH
from compressor.settings import Settings
from compressor.target import side_by_side
from compressor.target.opener import Opener
from compressor.target.torch_eager import Module
from compressor.workspace.output_folder import engine_files
from compressor.workspace.progress import Steps
from runtimes.base.protocols import BuildOptions
from runtimes.base.registry import runtime
from tests.decoders import sampled_tokens, saved
from tests.samples import digits

pytest.importorskip("onnxruntime")
needs_ray = pytest.mark.skipif(util.find_spec("ray") is None, reason="Ray is not installed")
LIMIT = 6 * GIB  # of memory, never reached
STORE = {"object_store_memory": 200_000_000}


@pytest.fixture(scope="module")
def on_cluster():
    """Start a cluster of this machine, without cores, and another one with two."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False, "memory": LIMIT}
    nodes = Cluster(initialize_head=True, head_node_args=head | STORE)
    try:
        nodes.add_node(num_cpus=2, memory=2 * LIMIT, **STORE)
        with executor_for(None, nodes.address) as executor:
            assert executor.workers == 2
            yield executor
    finally:
        nodes.shutdown()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Return a builder, and the float and the int8 file of the embedded model, with external data beside the former."""
    model, data, graph, _ = digits()
    options = BuildOptions(batches=(1, 1, BATCH))
    builder = EngineBuilder(ModelAndData(model, data), runtime("onnxruntime"), options, tmp_path_factory.mktemp("e"))
    file = builder.lower(builder.fold(graph), "float")
    return builder, file


def converted(builder, file, executor, folder):
    """Convert a file to int8 and return layers to float, as no loss is small enough; return its path and the facts."""
    feeds = {name: value[:1].numpy() for name, value in builder.subject.model.example.items()}
    builder = dataclasses.replace(builder, executor=executor)
    timer = EngineTimer({RUN: Call.alone(feeds)}, 1)
    copy = folder / file.name
    copy.write_bytes(file.read_bytes())
    source, facts = PrecisionConverter(builder, timer, "mse", -1.0).convert(copy, "int8", lambda *_, **__: None)
    return source.path, facts


def same(one, other):
    """Return whether two evaluations are equal to the bit."""
    assert one.columns.keys() == other.columns.keys()
    for name, columns in one.columns.items():
        assert columns.keys() == other.columns[name].keys()
        assert all(np.array_equal(columns[key], other.columns[name][key]) for key in columns)
    facts = [(each.metric, each.changed, each.outputs, each.variation.rows) for each in (one, other)]
    return facts[0] == facts[1] and one.variation.classes == other.variation.classes


def process(_):
    return os.getpid()


@needs_ray
def test_precision_trials_and_quality_are_the_same_to_the_bit_on_a_cluster(on_cluster, built, tmp_path):
    """One worker is killed in the middle of the trials; the machine of the workers does not have the files."""
    builder, file = built
    victim, shards = next(on_cluster.run(process, [(0,)])), itertools.count(1)

    def kill_one(_):
        if next(shards) == 3:
            os.kill(victim, signal.SIGKILL)

    on_cluster.show, results = kill_one, {}
    for name, executor in (("here", InProcess()), ("cluster", on_cluster)):
        (tmp_path / name).mkdir()
        path, facts = converted(builder, file, executor, tmp_path / name)
        there = dataclasses.replace(builder, executor=executor)
        split, engines = builder.subject.data.test, {"float": file, "int8": path}
        results[name] = path, facts, evaluate_engines(there, engines, split, "float", lambda *_, **__: None)
        assert not executor.said
    (path, facts, evaluation), (other, found, evaluated) = results.values()
    assert len(facts.quantized.attempts) > 1
    assert facts == found
    assert path.read_bytes() == other.read_bytes()
    assert same(evaluation, evaluated)
    assert next(shards) > 3


@needs_ray
def test_workers_that_nothing_ran_on_are_said(on_cluster):
    said = []
    with executor_for(1, None, warn=said.append):
        pass
    assert said == ["nothing ran on the workers, as this command had nothing to run over the data; leave them out."]


@needs_ray
def test_a_torch_model_is_evaluated_on_workers_and_one_that_cannot_be_sent_here(on_cluster, built, monkeypatch):
    builder, file = built
    subject, options = builder.subject, BuildOptions(threads=1)
    module = Module(subject.model)
    sent = {"onnx": Opener(builder.target.load, options, file), "torch": Opener(module.open, options)}

    def unsendable(options):
        return module.open(options)

    def only_here(options):
        return module.open(options)

    only_here.__module__, only_here.__qualname__ = "of_this_process", "only_here"
    monkeypatch.setitem(sys.modules, "of_this_process", SimpleNamespace(only_here=only_here))
    split, executor = subject.data.validation, on_cluster
    expected = evaluate_openers(sent, subject, split, "torch", lambda *_: None)
    assert same(expected, evaluate_openers(sent, subject, split, "torch", lambda *_: None, executor))
    assert not executor.said
    for load in (unsendable, only_here):
        kept = sent | {"torch": Opener(load, options)}
        assert same(expected, evaluate_openers(kept, subject, split, "torch", lambda *_: None, executor))
    sentence = "quality is measured in this process, because the model cannot be sent to workers"
    assert executor.said == [
        f"{sentence} (Can't pickle local object '{unsendable.__qualname__}').",
        f"{sentence} (No module named 'of_this_process').",
    ]


@pytest.mark.parametrize("kept", [0, 2**30])
def test_large_engines_are_open_one_at_a_time_with_the_same_figures(built, tmp_path, monkeypatch, kept):
    builder, file = built
    path, _ = converted(builder, file, InProcess(), tmp_path)
    count, most = 0, []

    def load(path, options):
        nonlocal count
        engine, count = builder.target.load(path, options), count + 1
        most.append(count)
        close = engine.close

        def closed():
            nonlocal count
            count -= 1
            close()

        engine.close = closed
        return engine

    openers = {
        name: Opener(load, builder.options, each) for name, each in {"int8": path, "float": file, "again": path}.items()
    }
    split = builder.subject.data.test
    expected = evaluate_openers(openers, builder.subject, split, "float", lambda *_: None)
    assert most == [1, 2, 3]
    most.clear()
    monkeypatch.setattr(side_by_side, "TOGETHER", 0)
    monkeypatch.setattr(side_by_side, "KEPT", kept)
    found = evaluate_openers(openers, builder.subject, split, "float", lambda *_: None)
    assert same(expected, found)
    assert expected.value("int8") == found.value("again")
    assert set(most) == {1}
    assert len(most) == 3 * (1 if kept else math.ceil(len(split) / BATCH))


@needs_ray
def test_a_model_on_disk_is_scored_and_evaluated_on_workers_within_their_memory(on_cluster, tmp_path):
    """Its weights are read by the workers, section by section; scores and quality are those of this process."""
    saved(tmp_path / "llama", "Llama", num_hidden_layers=2)
    np.save(tmp_path / "tokens.npy", sampled_tokens(tmp_path / "llama", 24, 17))
    settings = Settings(
        tmp_path / "llama",
        tmp_path / "tokens.npy",
        drop="block:1",
        target="transformers",
        max_memory=LIMIT,
        max_length=8,
        output=tmp_path / "out",
    )
    reports = []
    for executor in (InProcess(), on_cluster):
        (tmp_path / "out").mkdir()
        reports.append(export_offloaded.compressed(settings, tmp_path / "out", Steps(), "", executor)[0])
        shutil.rmtree(tmp_path / "out")
    one, other = reports
    assert on_cluster.memory == LIMIT
    assert (one.plan, one.evidence, one.quality, one.parity) == (
        other.plan,
        other.evidence,
        other.quality,
        other.parity,
    )
    assert [note for note in other.notes if note.startswith("Peak memory of a worker was ") and " under the" in note]
    assert not [note for note in one.notes if "worker" in note]


@needs_ray
def test_more_memory_than_machines_have_is_refused_and_for_some_workers_it_is_said(on_cluster):
    executor = OnRay(8)
    executor.ask(LIMIT)
    assert executor.said == [
        f"8 workers need 8 times {LIMIT / GIB:g} GiB, but the cluster has {2 * LIMIT / GIB:g} GiB for workers, so at "
        "most 2 compute at the same time."
    ]
    with pytest.raises(ExecutorError, match=r"a worker takes 1e\+03 GiB, but no machine .* a smaller --max-memory"):
        executor.ask(1000 * GIB)


def test_engines_on_a_gpu_are_evaluated_in_this_process_which_is_said(built):
    builder, file = built

    class Asked(InProcess):
        def __init__(self):
            self.said = []
            self.say = self.said.append

        def share(self, value):
            raise UnsharableError("never asked for")

    def load(path, options):
        return builder.target.load(path, dataclasses.replace(options, device="cpu"))

    executor, opener = Asked(), Opener(load, BuildOptions(device="cuda"), file)
    found = evaluate_openers(
        {"gpu": opener}, builder.subject, builder.subject.data.validation, "gpu", lambda *_: None, executor
    )
    assert found.value("gpu") > 90
    assert executor.said == ["quality is measured in this process, because workers use no GPUs."]


def test_an_engine_comes_with_all_files_that_it_is_opened_from(tmp_path):
    for name in ("a.onnx", "a.onnx.data", "b.xml", "b.bin", "other.bin"):
        (tmp_path / name).write_bytes(b"1")
    assert [path.name for path in engine_files(tmp_path / "a.onnx")] == ["a.onnx", "a.onnx.data"]
    assert [path.name for path in engine_files(tmp_path / "b.xml")] == ["b.xml", "b.bin"]
    (tmp_path / "config.json").write_bytes(b"{}")
    assert len(engine_files(tmp_path / "config.json")) == 6
