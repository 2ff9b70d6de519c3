"""Tests of runs in sections: outputs equal those of one run bit for bit, within the budget, without files left over."""

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
from passes.execute.sections import (
    SectionBudget,
    partition,
    peak_activation_bytes,
    run_in_sections,
    section_ends,
    smallest_sections,
    weight_bytes,
)
from passes.graph.graph import Graph
from tests.decoders import LAYERS, random_tokens, saved

NAMES = ("Llama", "GPT2")  # output head untied and tied to the embedding
ROUNDING = 1e-12  # float64 sums, added up batch by batch


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """Return a function from a name to a decoder with offloaded weights and its graph."""
    folder = tmp_path_factory.mktemp("decoders")

    @functools.cache
    def load(name):
        model = models.load(saved(folder / name, name), on_disk=True)
        return model, trace(model)

    return load


def batches(model, count=3):
    """Yield batches of different lengths with padding in the second row."""
    for number in range(count):
        ids = random_tokens(2, 5 + number, seed=number)
        mask = torch.ones_like(ids)
        mask[1, 4:] = 0
        feeds = model.preprocess.complete({"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        yield {key: torch.from_numpy(value) for key, value in feeds.items()}


def largest(program, ends):
    return max(weight_bytes(program, piece.weights) for piece in smallest_sections(program, ends))


def total(program):
    return sum(weight_bytes(program, piece.weights) for piece in smallest_sections(program, frozenset()))


@pytest.mark.parametrize("name", NAMES)
def test_a_run_in_sections_equals_one_run_bit_for_bit(name, graphs, tmp_path):
    model, graph = graphs(name)
    program, ends = Program(graph), section_ends(graph)
    expected = [run(graph, feeds) for feeds in batches(model)]
    counts = set()
    for most in (largest(program, ends), largest(program, ends) * 2, total(program) * 2):
        sections = partition(program, ends, most)
        counts.add(len(sections))
        outputs = list(run_in_sections(program, sections, batches(model), tmp_path))
        assert len(outputs) == len(expected)
        for left, right in zip(outputs, expected, strict=True):
            assert all(map(torch.equal, left, right))
        assert not any(tmp_path.iterdir())
    assert len(counts) == 3  # each budget gives another number of sections
    assert min(counts) == 1


def test_only_the_requested_outputs_are_computed(graphs, tmp_path):
    model, graph = graphs("Llama")
    program = Program(graph, outputs=["logits"])
    sections = partition(program, section_ends(graph), total(program))
    outputs = list(run_in_sections(program, sections, batches(model), tmp_path))
    for (logits,), feeds in zip(outputs, batches(model), strict=True):
        assert torch.equal(logits, run(graph, feeds)[0])
    assert len(Program(graph, outputs=()).order) == 0


@given(share=st.floats(0.0, 1.0))
@settings(max_examples=20, deadline=None)
def test_sections_keep_their_budget_and_cover_the_program_once(share, graphs):
    _, graph = graphs("Llama")
    program, ends = Program(graph), section_ends(graph)
    least, whole = largest(program, ends), total(program)
    most = int(least + share * (whole - least))
    sections = partition(program, ends, most)
    assert [section.start for section in sections[1:]] == [section.stop for section in sections[:-1]]
    assert (sections[0].start, sections[-1].stop) == (0, len(program.order))
    assert all(weight_bytes(program, section.weights) <= most for section in sections)
    # No section could be joined with the next: few sections mean few reads of intermediate values.
    for one, other in itertools.pairwise(sections):
        assert weight_bytes(program, one.with_next(other).weights) > most
    for section in sections:
        read = {source for node in program.order[section.start : section.stop] for source in node.all_input_nodes}
        assert section.weights == {node for node in read if hasattr(program.constants.get(node), READ)}


def test_an_error_names_the_size_of_a_section_above_the_budget(graphs):
    _, graph = graphs("Llama")
    program, ends = Program(graph), section_ends(graph)
    sizes = [weight_bytes(program, piece.weights) for piece in smallest_sections(program, ends)]
    assert len(sizes) == LAYERS + 2
    with pytest.raises(PassError, match=rf"take {sizes[0]} bytes; expected at most {sizes[0] - 1}"):
        partition(program, ends, sizes[0] - 1)


def test_a_section_reads_a_weight_once_for_all_batches(graphs, tmp_path, monkeypatch):
    """The embedding of GPT-2 is its head too: two sections read it twice, a single section once."""
    model, graph = graphs("GPT2")
    program, ends = Program(graph), section_ends(graph)
    assert total(program) == sum(weight.numel() * weight.itemsize for weight in set(model.module.parameters()))
    read = []
    reader = type(getattr(next(model.module.parameters()), READ))
    monkeypatch.setattr(reader, "as_stored", lambda self, _as=reader.as_stored: read.append(self.name) or _as(self))
    tied = getattr(model.module.get_input_embeddings().weight, READ).name
    for most, times in ((total(program), 1), (largest(program, ends), 2)):
        read.clear()
        assert len(list(run_in_sections(program, partition(program, ends, most), batches(model), tmp_path))) == 3
        assert read.count(tied) == times
        assert len(read) == len(set(read)) + times - 1


@pytest.mark.parametrize("rows", [1, 4])
def test_working_bytes_match_the_peak_of_a_run(rows, graphs):
    """The peak is measured in a real run, in which values that share a storage count once."""
    model, graph = graphs("Llama")
    program = Program(graph, outputs=["logits"])
    feeds = {key: value[:1].expand(rows, *value.shape[1:]) for key, value in next(batches(model)).items()}
    values = program.start(feeds) | {node: in_memory(value) for node, value in program.constants.items()}
    most = 0
    with torch.inference_mode():
        for _ in program.walk(values):
            live = [value for node, value in values.items() if node.op != "get_attr"]
            live = [value for value in live if isinstance(value, torch.Tensor)]
            storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in live}
            most = max(most, sum(storages.values()))
    predicted = peak_activation_bytes(program, feeds)
    assert most <= predicted <= most * 1.1  # empty storages share the address 0, and expanded inputs a storage


# ------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("name", NAMES)
def test_scores_in_sections_equal_those_of_one_run(name, graphs, tmp_path):
    model, graph = graphs(name)
    at_once = apply(Score(), graph, batches(model))
    program = Program(graph)
    room = SectionBudget(largest(program, section_ends(graph)), tmp_path)
    scores = apply(Score(room), graph, batches(model))
    assert not any(tmp_path.iterdir())
    assert scores.samples == at_once.samples == 6
    assert scores.states == at_once.states
    assert scores.sites == at_once.sites
    assert scores.blocks == at_once.blocks
    assert torch.equal(scores.ends, at_once.ends)
    torch.testing.assert_close(scores.angular, at_once.angular, rtol=0, atol=ROUNDING)
    # In sections, pairs of states are compared at the last token of each of the 6 texts only.
    assert torch.equal(scores.tokens, at_once.ends)
    assert float(scores.tokens[0, 0]) == 6 < float(at_once.tokens[0, 0])


def test_similarity_in_sections_uses_the_last_tokens(graphs, tmp_path):
    """With texts of a single token, the similarity at the last token equals that at all tokens."""
    model, graph = graphs("Llama")
    room = SectionBudget(total(Program(graph)), tmp_path)
    feeds = model.preprocess.complete(
        {"input_ids": random_tokens(3, 1).numpy(), "attention_mask": torch.ones(3, 1, dtype=torch.int64).numpy()}
    )
    single = [{key: torch.from_numpy(value) for key, value in feeds.items()}]
    in_sections, at_once = (apply(Score(option), graph, single) for option in (room, None))
    torch.testing.assert_close(in_sections.similarity, at_once.similarity, rtol=0, atol=ROUNDING)
    assert torch.equal(in_sections.tokens, at_once.tokens)


def test_scores_without_data_are_an_error(graphs, tmp_path):
    _, graph = graphs("Llama")
    with pytest.raises(PassError, match="no batches"):
        apply(Score(SectionBudget(10**9, tmp_path)), graph, [])


def test_only_live_values_are_stored_between_sections(graphs, tmp_path):
    """The file of a batch holds every value that a later node reads, no weights and no unused part of a storage."""
    model, graph = graphs("Llama")
    program, ends = Program(graph, outputs=["logits"]), section_ends(graph)
    sections = partition(program, ends, largest(program, ends))
    position = {node: number for number, node in enumerate(program.order)}
    seen = []

    def see(number, node, values):
        if number == 0 and (file := tmp_path / "batch1.pt").exists():
            seen.append((position[node], torch.load(file, weights_only=True), file.stat().st_size))

    assert len(list(run_in_sections(program, sections, batches(model, 2), tmp_path, see))) == 2
    for section in sections[1:]:
        stored, size = next((values, size) for start, values, size in seen if start == section.start)
        later = {source for node in program.order[section.start :] for source in node.all_input_nodes}
        needed = {node.name for node in later if node.op != "get_attr" and position.get(node, -1) < section.start}
        assert set(stored) == needed
        tensors = [value for value in stored.values() if isinstance(value, torch.Tensor)]
        assert size < sum(value.nbytes for value in tensors) + 2000 * len(stored)  # overhead of the archive


class Sliced(torch.nn.Module):
    """Model whose second half reads a narrow slice of a wide tensor."""

    def forward(self, x):
        return (x.repeat(1, 1000)[:, :4] * 2 + 1).cos()


def test_a_stored_view_does_not_take_its_whole_storage(tmp_path):
    exported = torch.export.export(Sliced(), (torch.zeros(2, 4),), strict=False)
    graph = Graph(exported.module(check_guards=False), ("x",), ("y",), "")
    program = Program(graph)
    part = next(node.name for node in program.order if "slice" in node.name and node.meta["val"].shape == (2, 4))
    sections = tuple(smallest_sections(program, {part}))
    assert len(sections) == 2
    sizes = []

    def see(number, node, values):
        sizes.extend(path.stat().st_size for path in tmp_path.iterdir())

    feeds = [{"x": torch.full((2, 4), float(number))} for number in range(2)]
    outputs = list(run_in_sections(program, sections, feeds, tmp_path, see))
    assert all(torch.equal(output, Sliced()(batch["x"])) for (output,), batch in zip(outputs, feeds, strict=True))
    assert 0 < max(sizes) < 4000  # bytes; the wide tensor takes 32,000
