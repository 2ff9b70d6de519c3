"""Tests of the executors: the results of a search do not depend on where it runs, nor on workers that die."""

import dataclasses
import functools
import itertools
import os
import signal
import socket
from importlib import util

import numpy as np
import pytest
import torch

from compressor.errors import SettingsError
from compressor.executor.base import Batches, ExecutorError, InProcess
from compressor.executor.on_ray import AHEAD, BYTES, OnRay, Taken, _value, executor_for
from compressor.executor.packed import SharedTensors, packed
from compressor.executor.shared_files import bytes_of
from compressor.measure.workload import Call
from compressor.quality.evaluate import BATCH, EvaluationError, tensor_batches
from compressor.quality.output_divergence import OutputDivergence
from compressor.quality.validation_loss import ValidationLoss
from compressor.search.cost_model import multiply_add_cost_model
from compressor.search.greedy import Search
from compressor.search.rewriter import Rewriter
from compressor.settings import Settings
from compressor.workspace.environment import own_memory
from passes.analysis.redundancy import Score
from passes.analysis.token_statistics import MeasureTokenStatistics
from passes.base import apply
from passes.execute.interpreter import run
from tests.samples import digits

needs_ray = pytest.mark.skipif(util.find_spec("ray") is None, reason="Ray is not installed")


@pytest.fixture(scope="module")
def on_ray():
    """Start Ray once, with two workers: it takes seconds."""
    with executor_for(2, None) as executor:
        yield executor


def product(matrix, rows):
    return matrix @ rows


def threads_and_process():
    return torch.get_num_threads(), os.getpid()


def fail(kind, text):
    raise kind(text)


def die_once(path):
    """Kill the process of the first call, and return a number in the second."""
    if not path.exists():
        path.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return 7


def test_packed_tensors_keep_strides_and_share_memory():
    base = torch.arange(12, dtype=torch.bfloat16).reshape(3, 4)
    value = {"turned": base.T, "part": base[1:], "empty": torch.empty(0, 3), "number": 5}
    restored = packed(value).value(lambda arrays: arrays)
    assert restored["number"] == 5
    for name in ("turned", "part", "empty"):
        assert torch.equal(restored[name], value[name])
        assert restored[name].stride() == value[name].stride()
    assert restored["turned"].untyped_storage().data_ptr() == base.untyped_storage().data_ptr()


def test_read_only_memory_gives_tensors_without_a_warning_and_without_a_copy():
    value = packed(torch.arange(4.0))
    for array in value.handles[0]:
        array.flags.writeable = False
    restored = value.value(lambda arrays: arrays)
    assert torch.equal(restored, torch.arange(4.0))
    assert restored.data_ptr() == value.handles[0][0].ctypes.data


def test_a_tensor_is_put_once_for_as_long_as_it_exists():
    stored = []

    def put(arrays):
        stored.append(arrays)
        return len(stored) - 1

    shared, first, second = SharedTensors(put), torch.randn(3, 3), torch.randn(2)
    assert torch.equal(shared.packed([first]).value(stored.__getitem__)[0], first)
    both = shared.packed([second, first, first.T])
    assert [len(arrays) for arrays in stored] == [1, 1]
    restored = both.value(stored.__getitem__)
    assert all(torch.equal(*pair) for pair in zip(restored, [second, first, first.T], strict=True))
    del first, restored, both
    shared.packed(torch.randn(3, 3))
    assert len(stored) == 3


@needs_ray
def test_results_come_in_order_and_are_those_of_this_process(on_ray):
    torch.manual_seed(0)
    matrix, rows = torch.randn(64, 64), [torch.randn(64, 3) for _ in range(9)]
    results = {}
    for executor in (InProcess(), on_ray):
        shared, each = executor.share(matrix), executor.share_each(lambda: iter(rows))
        kept = executor.keep(product, ((shared, part) for part in each))
        results[executor] = [*executor.run(product, ((shared, part) for part in kept))]
    for left, right in zip(*results.values(), strict=True):
        assert torch.equal(left, right)


def total(numbers):
    return sum(numbers)


@needs_ray
def test_values_that_arrive_one_by_one_are_divided_as_workers_ask_for_them(on_ray):
    """Of a stream of batches, only those of the calls on the way are in memory."""
    made = []

    def stream():
        for number in range(60):
            made.append(number)
            yield number

    results = on_ray.run(total, ((part,) for part in on_ray.divide(stream(), 60)))
    assert next(results) == 0 + 1 + 2 + 3
    assert len(made) <= 4 * (AHEAD * on_ray.workers + 1)
    assert sum(results) == sum(range(4, 60))
    assert [len(list(part)) for part in InProcess().divide(stream(), 60)] == [60]
    sizes = [len(_value(part)) for part in on_ray.divide(range(3), 3)]
    assert sizes == [2, 1]  # each worker has something to do
    large = [np.zeros(BYTES // 3, np.uint8)] * 4
    assert [len(_value(part)) for part in on_ray.divide(large, 40)] == [2, 2]
    assert [len(_value(part)) for part in on_ray.divide(large)] == [2, 2]


def contents(places):
    return {path: (place, place.read_text()) for path, place in places.items()}


@needs_ray
def test_files_are_read_in_place_or_from_copies(on_ray, tmp_path):
    paths = [tmp_path / name / "weights" for name in ("one", "other")] + [tmp_path / "one" / "empty"]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_text("" if path.name == "empty" else path.parent.name)
    shared = on_ray.share_files(paths)
    here = contents(InProcess().share_files(paths))
    assert list(on_ray.run(contents, [(shared,)])) == [here]
    elsewhere = dataclasses.replace(shared, machine="another", contents=[bytes_of(path) for path in paths])
    with elsewhere.on("this one", lambda arrays: arrays) as places:
        found = contents(places)
        assert {path: text for path, (_, text) in found.items()} == {path: path.read_text() for path in paths}
        assert len({place.parent for place in places.values()}) == 2
        assert not {*places.values()} & {*paths}
    assert not any(place.exists() for place in places.values())
    executor = OnRay(2, alone=True)
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**30 + 1)
    executor.share_files([tmp_path / "large"])
    assert executor.memory > 2 * 2**30  # an engine takes as much as its file


@needs_ray
def test_calls_run_in_other_processes_with_one_thread(on_ray):
    found = set(on_ray.run(threads_and_process, ((),) * 8))
    assert {threads for threads, _ in found} == {1}
    assert os.getpid() not in {process for _, process in found}


def memory_with(tensor):
    """Return the process, and its own memory while it reads a tensor."""
    assert float(tensor.sum()) == len(tensor)
    return os.getpid(), own_memory()


@needs_ray
@pytest.mark.skipif(own_memory() is None, reason="this system does not report the memory of a process alone")
def test_workers_read_the_weights_of_their_machine_in_place(on_ray):
    mebibyte = 2**20
    small, large = (on_ray.share(torch.ones(size)) for size in (8, 32 * mebibyte))
    without, having = (dict(on_ray.run(memory_with, [(each,)] * 8)) for each in (small, large))
    both = without.keys() & having.keys()
    assert both
    assert all(having[process] - without[process] < 32 * mebibyte for process in both)  # the tensor takes 128 MiB


@needs_ray
def test_a_call_whose_worker_dies_runs_again(on_ray, tmp_path):
    assert list(on_ray.run(die_once, [(tmp_path / "tried",)])) == [7]


@needs_ray
def test_calls_ask_for_the_memory_that_their_workers_took(on_ray):
    executor = OnRay(2)
    before = executor.memory
    with pytest.raises(ExecutorError, match=r"a worker takes 7\.5e\+03 GiB, but no machine of the cluster has more"):
        executor._note(Taken(6000 * 2**30, None))
    assert executor.memory > before


@needs_ray
@pytest.mark.parametrize("kind", [EvaluationError, KeyError])
def test_errors_of_a_call_are_those_of_this_process(on_ray, kind):
    for executor in (InProcess(), on_ray):
        with pytest.raises(kind, match="found 1"):
            list(executor.run(fail, [(kind, "found 1")]))
        with pytest.raises(kind, match="found 1"):
            executor.keep(fail, [(kind, "found 1")])


def search_on_digits(executor, split):
    """Search with drops and fitted maps on a quarter of the sites of the sample; the split has two batches."""
    model, data, graph, every = digits()
    sites = every[::4]
    call = Call.alone({name: value[:1].numpy() for name, value in model.example.items()})
    search = Search(
        Rewriter(graph, sites, split, executor=executor),
        OutputDivergence(graph, model, split, executor),
        ValidationLoss(graph, model, data.validation, "accuracy", executor=executor),
        multiply_add_cost_model(graph, {"run": call}),
        ("drop", "linear"),
        5.0,
        split,
        preview=OutputDivergence(graph, model, split.head(8), executor),
    )
    search.run()
    return search


@functools.cache
def search_here():
    return search_on_digits(InProcess(), digits()[1].calibration)


@needs_ray
@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_search_is_the_same_to_the_bit_for_any_number_of_workers(on_ray, workers):
    """With two workers, one of them is killed in the middle."""
    split, shards = digits()[1].calibration, itertools.count(1)
    assert len(list(split.bounded_groups(BATCH))) > 1
    _, victim = next(on_ray.run(threads_and_process, [()]))

    def kill_one(text):
        if next(shards) == 9 and workers == 2:
            os.kill(victim, signal.SIGKILL)

    search, expected = search_on_digits(OnRay(workers, kill_one), split), search_here()
    assert next(shards) > 20
    assert search.steps == expected.steps
    assert search.front.added == expected.front.added
    assert (search.refused, search.sweeps) == (expected.refused, expected.sweeps)
    assert len(search.steps) > 1
    for feeds in tensor_batches(split):
        for left, right in zip(run(search.reduced, feeds), run(expected.reduced, feeds), strict=True):
            assert torch.equal(left, right)


@needs_ray
def test_scores_are_the_same_to_the_bit(on_ray):
    _, data, graph, _ = digits()
    first, second = (
        apply(Score(), graph, Batches(executor, functools.partial(tensor_batches, data.calibration, 8)))
        for executor in (InProcess(), on_ray)
    )
    assert (first.samples, first.sites, first.blocks) == (second.samples, second.sites, second.blocks)
    for name in ("similarity", "tokens", "angular", "ends"):
        assert torch.equal(getattr(first, name), getattr(second, name))


@needs_ray
def test_statistics_of_a_study_are_the_same_to_the_bit(on_ray):
    _, data, graph, _ = digits()
    first, second = (
        apply(
            MeasureTokenStatistics(), graph, Batches(executor, functools.partial(tensor_batches, data.calibration, 8))
        )
        for executor in (InProcess(), on_ray)
    )
    for one, other in zip(
        [*first.sites.values(), *first.blocks.values(), *first.states.values()],
        [*second.sites.values(), *second.blocks.values(), *second.states.values()],
        strict=True,
    ):
        assert all(torch.equal(value, getattr(other, name)) for name, value in vars(one).items())


def test_without_ray_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    with (
        pytest.raises(ExecutorError, match=r"not installed: pip install 'compressor-ai\[ray\]'"),
        executor_for(2, None),
    ):
        pass
    with executor_for(None, None) as executor:
        assert executor.workers == 1


@needs_ray
def test_an_address_that_nobody_listens_on_is_refused_at_once():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (
        pytest.raises(ExecutorError, match=rf"--ray 127\.0\.0\.1:{port} cannot be reached"),
        executor_for(None, f"127.0.0.1:{port}"),
    ):
        pass
    with pytest.raises(SettingsError, match="expected HOST:PORT"), executor_for(None, "nonsense"):
        pass


@pytest.mark.parametrize("workers", [0, -1])
def test_numbers_of_workers_below_one_are_refused(workers):
    with pytest.raises(SettingsError, match=r"workers is .*; expected at least 1"):
        Settings(workers=workers)
