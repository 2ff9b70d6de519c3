"""Runs in sections: to the bit what a run at once gives, within the room there is, and nothing left behind."""

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor import models
from compressor.lower.trace import trace
from passes.analysis.redundancy import Score
from passes.base import PassError, apply
from passes.execute.interpreter import Program, run
from passes.execute.offloaded_weights import READ, in_memory
from passes.execute.sections import Room, cut, pieces, run_in_sections, section_ends, weight_bytes, working_bytes
from passes.graph.graph import Graph
from tests.decoders import LAYERS, random_tokens, saved

NAMES = ("Llama", "GPT2")  # a head of its own; one that is the embedding
ROUNDING = 1e-12  # float64 sums of the same numbers, added up batch by batch


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """A decoder whose weights are on disk, by name."""
    folder = tmp_path_factory.mktemp("decoders")

    @functools.cache
    def of(name):
        model = models.load(saved(folder / name, name), on_disk=True)
        return model, trace(model)

    return of


def batches(model, count=3):
    """Feeds of different lengths, padded in one row."""
    for number in range(count):
        ids = random_tokens(2, 5 + number, seed=number)
        mask = torch.ones_like(ids)
        mask[1, 4:] = 0
        feeds = model.preprocess.complete({"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        yield {key: torch.from_numpy(value) for key, value in feeds.items()}


def largest(program, ends):
    return max(weight_bytes(program, piece.weights) for piece in pieces(program, ends))


def total(program):
    return sum(weight_bytes(program, piece.weights) for piece in pieces(program, frozenset()))


@pytest.mark.parametrize("name", NAMES)
def test_in_sections_is_at_once_to_the_bit(name, graphs, tmp_path):
    model, graph = graphs(name)
    program, ends = Program(graph), section_ends(graph)
    expected = [run(graph, feeds) for feeds in batches(model)]
    counts = set()
    for most in (largest(program, ends), largest(program, ends) * 2, total(program) * 2):
        sections = cut(program, ends, most)
        counts.add(len(sections))
        found = list(run_in_sections(program, sections, batches(model), tmp_path))
        assert len(found) == len(expected)
        for left, right in zip(found, expected, strict=True):
            assert all(map(torch.equal, left, right))
        assert not any(tmp_path.iterdir())
    assert len(counts) == 3  # of sections: the budgets did differ
    assert min(counts) == 1


def test_only_what_is_asked_for_is_computed(graphs, tmp_path):
    model, graph = graphs("Llama")
    program = Program(graph, outputs=["logits"])
    sections = cut(program, section_ends(graph), total(program))
    found = list(run_in_sections(program, sections, batches(model), tmp_path))
    for (logits,), feeds in zip(found, batches(model), strict=True):
        assert torch.equal(logits, run(graph, feeds)[0])
    assert len(Program(graph, outputs=()).order) == 0


@given(share=st.floats(0.0, 1.0))
@settings(max_examples=20, deadline=None)
def test_sections_keep_their_budget_and_are_the_whole_program_once(share, graphs):
    _, graph = graphs("Llama")
    program, ends = Program(graph), section_ends(graph)
    least, whole = largest(program, ends), total(program)
    most = int(least + share * (whole - least))
    sections = cut(program, ends, most)
    assert [section.start for section in sections[1:]] == [section.stop for section in sections[:-1]]
    assert (sections[0].start, sections[-1].stop) == (0, len(program.order))
    assert all(weight_bytes(program, section.weights) <= most for section in sections)
    # None could be joined with the next: few sections are few readings of what waits.
    for one, other in itertools.pairwise(sections):
        assert weight_bytes(program, one.with_next(other).weights) > most
    for section in sections:
        read = {source for node in program.order[section.start : section.stop] for source in node.all_input_nodes}
        assert section.weights == {node for node in read if hasattr(program.constants.get(node), READ)}


def test_a_piece_that_is_too_large_is_named_with_its_size(graphs):
    _, graph = graphs("Llama")
    program, ends = Program(graph), section_ends(graph)
    sizes = [weight_bytes(program, piece.weights) for piece in pieces(program, ends)]
    assert len(sizes) == LAYERS + 2
    with pytest.raises(PassError, match=rf"take {sizes[0]} bytes at once, more than the {sizes[0] - 1} there are"):
        cut(program, ends, sizes[0] - 1)


def test_a_weight_is_read_once_a_section_for_all_batches(graphs, tmp_path, monkeypatch):
    """The embedding of GPT-2 is its head too: read in the first section and in the last, once where they are one."""
    model, graph = graphs("GPT2")
    program, ends = Program(graph), section_ends(graph)
    assert total(program) == sum(each.numel() * each.itemsize for each in set(model.module.parameters()))
    read = []
    place = type(getattr(next(model.module.parameters()), READ))
    monkeypatch.setattr(place, "as_stored", lambda self, _as=place.as_stored: read.append(self.name) or _as(self))
    tied = getattr(model.module.get_input_embeddings().weight, READ).name
    for most, times in ((total(program), 1), (largest(program, ends), 2)):
        read.clear()
        assert len(list(run_in_sections(program, cut(program, ends, most), batches(model), tmp_path))) == 3
        assert read.count(tied) == times
        assert len(read) == len(set(read)) + times - 1


@pytest.mark.parametrize("rows", [1, 4])
def test_working_bytes_are_those_of_the_values_that_are_there(rows, graphs):
    """Against a real run, values that share a storage counted once; nothing is read for it."""
    model, graph = graphs("Llama")
    program = Program(graph, outputs=["logits"])
    feeds = {key: value[:1].expand(rows, *value.shape[1:]) for key, value in next(batches(model)).items()}
    values = program.start(feeds) | {node: in_memory(value) for node, value in program.constants.items()}
    most = 0
    with torch.inference_mode():
        for _ in program.walk(values):
            alive = [value for node, value in values.items() if node.op != "get_attr"]
            alive = [value for value in alive if isinstance(value, torch.Tensor)]
            storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in alive}
            most = max(most, sum(storages.values()))
    found = working_bytes(program, feeds)
    assert most <= found <= most * 1.1  # an empty storage has no address of its own; expanded inputs are shared


# ------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("name", NAMES)
def test_scores_in_sections_are_those_at_once(name, graphs, tmp_path):
    model, graph = graphs(name)
    at_once = apply(Score(), graph, batches(model))
    program = Program(graph)
    room = Room(largest(program, section_ends(graph)), tmp_path)
    found = apply(Score(room), graph, batches(model))
    assert not any(tmp_path.iterdir())
    assert found.samples == at_once.samples == 6
    assert found.states == at_once.states
    assert found.sites == at_once.sites
    assert found.blocks == at_once.blocks
    assert torch.equal(found.ends, at_once.ends)
    torch.testing.assert_close(found.angular, at_once.angular, rtol=0, atol=ROUNDING)
    # Pairs are compared at the last tokens alone: 6 texts.
    assert torch.equal(found.tokens, at_once.ends)
    assert float(found.tokens[0, 0]) == 6 < float(at_once.tokens[0, 0])


def test_similarity_in_sections_is_that_of_the_last_tokens(graphs, tmp_path):
    """Against texts of a single token, whose last token is all there is."""
    model, graph = graphs("Llama")
    room = Room(total(Program(graph)), tmp_path)
    feeds = model.preprocess.complete(
        {"input_ids": random_tokens(3, 1).numpy(), "attention_mask": torch.ones(3, 1, dtype=torch.int64).numpy()}
    )
    single = [{key: torch.from_numpy(value) for key, value in feeds.items()}]
    found, at_once = (apply(Score(each), graph, single) for each in (room, None))
    torch.testing.assert_close(found.similarity, at_once.similarity, rtol=0, atol=ROUNDING)
    assert torch.equal(found.tokens, at_once.tokens)


def test_scores_of_no_data_are_refused(graphs, tmp_path):
    _, graph = graphs("Llama")
    with pytest.raises(PassError, match="no batches"):
        apply(Score(Room(10**9, tmp_path)), graph, [])


def test_what_waits_is_only_what_is_needed(graphs, tmp_path):
    """Every value that a later node reads, no weight among them, and nothing else of their storages."""
    model, graph = graphs("Llama")
    program, ends = Program(graph, outputs=["logits"]), section_ends(graph)
    sections = cut(program, ends, largest(program, ends))
    place = {node: number for number, node in enumerate(program.order)}
    seen = []

    def see(number, node, values):
        if number == 0 and (found := tmp_path / "batch1.pt").exists():
            seen.append((place[node], torch.load(found, weights_only=True), found.stat().st_size))

    assert len(list(run_in_sections(program, sections, batches(model, 2), tmp_path, see))) == 2
    for section in sections[1:]:
        waiting, size = next((values, size) for at, values, size in seen if at == section.start)
        later = {source for node in program.order[section.start :] for source in node.all_input_nodes}
        needed = {node.name for node in later if node.op != "get_attr" and place.get(node, -1) < section.start}
        assert set(waiting) == needed
        tensors = [value for value in waiting.values() if isinstance(value, torch.Tensor)]
        assert size < sum(value.nbytes for value in tensors) + 2000 * len(waiting)  # the archive's own entries


class Sliced(torch.nn.Module):
    """A narrow part of something wide is all that the second half reads."""

    def forward(self, x):
        return (x.repeat(1, 1000)[:, :4] * 2 + 1).cos()


def test_what_waits_is_not_the_whole_of_which_it_is_a_part(tmp_path):
    exported = torch.export.export(Sliced(), (torch.zeros(2, 4),), strict=False)
    graph = Graph(exported.module(check_guards=False), ("x",), ("y",), "")
    program = Program(graph)
    part = next(node.name for node in program.order if "slice" in node.name and node.meta["val"].shape == (2, 4))
    sections = tuple(pieces(program, {part}))
    assert len(sections) == 2
    sizes = []

    def see(number, node, values):
        sizes.extend(path.stat().st_size for path in tmp_path.iterdir())

    feeds = [{"x": torch.full((2, 4), float(number))} for number in range(2)]
    found = list(run_in_sections(program, sections, feeds, tmp_path, see))
    assert [torch.equal(each, Sliced()(one["x"])) for (each,), one in zip(found, feeds, strict=True)] == [True, True]
    assert 0 < max(sizes) < 4000  # bytes: the whole is 32,000
