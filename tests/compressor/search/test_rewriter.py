"""The rewriter: changes are applied, maps are fitted and folded, and the original is not changed."""

import pytest
import torch

from compressor.lower.fold_graph import fold_graph
from compressor.search import rewriter as rewriter_module
from compressor.search.rewriter import Rewriter
from passes.analysis.least_squares import Fit
from passes.base import PassError, apply
from passes.execute.interpreter import run
from passes.graph.sites import find_sites
from passes.plan.plan import PUBLISHED
from passes.rewrite.drop import Drop
from tests.samples import small, spread

# float32 rounding of values of about 1, as products of one row are summed in another order than those of many.
SAME = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def subject():
    _, graph, sites, split = small(spread())
    split.most = 8
    return graph, sites, split


@pytest.fixture
def rewriter(subject):
    return Rewriter(*subject)


def outputs(graph, split):
    return run(graph, {name: torch.from_numpy(value) for name, value in split.feeds.items()})[0]


def calls(graph):
    return sum(node.op == "call_function" for node in graph.nodes())


def test_changes_are_applied_in_order(rewriter):
    sites, seen = [site.name for site in rewriter.sites], []
    changes = {sites[2]: "linear", sites[0]: "drop", sites[3]: "low-rank:2"}
    whole = rewriter.apply_changes(changes, lambda done, total: seen.append((done, total)))
    assert seen == [(0, 3), (1, 3), (2, 3)]
    graph = rewriter.original
    for name, action in changes.items():
        graph = rewriter.changed(graph, name, action)
    assert torch.equal(outputs(whole, rewriter.split), outputs(graph, rewriter.split))
    assert torch.equal(outputs(rewriter.rewritten(changes), rewriter.split), outputs(graph, rewriter.split))
    other = rewriter.apply_changes(dict(reversed(changes.items())))  # the order changes the fits
    assert not torch.equal(outputs(whole, rewriter.split), outputs(other, rewriter.split))


def test_the_original_is_not_changed(rewriter):
    before, signature = outputs(rewriter.original, rewriter.split), rewriter.original.signature()
    graph = rewriter.rewritten(dict.fromkeys([site.name for site in rewriter.sites][1:3], "linear"))
    fold_graph(graph)
    assert rewriter.original.signature() == signature
    assert torch.equal(outputs(rewriter.original, rewriter.split), before)
    assert not torch.equal(outputs(graph, rewriter.split), before)


def test_changing_a_fork_does_not_change_it(rewriter):
    first = rewriter.changed(rewriter.original, rewriter.sites[0].name, "scale")
    before, signature = outputs(first, rewriter.split), first.signature()
    rewriter.changed(first, rewriter.sites[1].name, "linear")
    rewriter.changed(first, rewriter.sites[1].name, "drop")
    assert first.signature() == signature
    assert torch.equal(outputs(first, rewriter.split), before)


def test_sweeps_count_passes_over_the_samples(rewriter, subject):
    """Each fit is two passes, of the original and of the current graph; on fewer samples it counts by their share."""
    names = [site.name for site in rewriter.sites]
    rewriter.changed(rewriter.original, names[0], "drop")
    assert rewriter.sweeps == 0.0
    rewriter.changed(rewriter.original, names[0], "linear")
    assert rewriter.sweeps == 2.0
    fits = rewriter.fits(rewriter.original, names)
    assert rewriter.sweeps == 4.0  # one sweep for all sites
    rewriter.changed(rewriter.original, names[0], "linear", fits[names[0]])
    assert rewriter.sweeps == 4.0
    half = type(rewriter.split)(rewriter.split.feeds, indices=tuple(range(12)))
    rewriter.fits(rewriter.original, names, half)
    assert rewriter.sweeps == 5.0


def test_the_argument_fits_is_used(rewriter):
    name = rewriter.sites[1].name
    fits = rewriter.fits(rewriter.original, [name, rewriter.sites[2].name])[name]
    from_fits = rewriter.changed(rewriter.original, name, "low-rank:3", fits)
    fitted = rewriter.changed(rewriter.original, name, "low-rank:3")
    assert torch.equal(outputs(from_fits, rewriter.split), outputs(fitted, rewriter.split))


@pytest.mark.parametrize("action", ["tba", "replaceme", "linear", "fuse", "low-rank:2", "constant"])
def test_published_forms_are_fitted_on_all_tokens(rewriter, action, monkeypatch):
    """The other forms are fitted on the tokens that are read."""
    arguments = []

    class RecordingFit(Fit):
        def run(self, graph, data):
            arguments.append(self.all_tokens)
            return super().run(graph, data)

    monkeypatch.setattr(rewriter_module, "Fit", RecordingFit)
    rewriter.changed(rewriter.original, rewriter.sites[3].name, action)
    assert arguments == [action in PUBLISHED]


def test_dropping_a_site_twice_changes_nothing(rewriter):
    name = rewriter.sites[1].name
    once = rewriter.changed(rewriter.original, name, "drop")
    twice = rewriter.changed(once, name, "drop")
    assert twice.signature() == once.signature()
    assert torch.equal(outputs(twice, rewriter.split), outputs(once, rewriter.split))
    with pytest.raises(PassError, match="no longer in the graph"):
        rewriter.changed(once, name, "linear")


def test_drops_are_those_of_the_pass(rewriter):
    names = tuple(site.name for site in rewriter.sites[1:3])
    expected = rewriter.original.fork()
    apply(Drop(names), expected)
    graph = rewriter.apply_changes(dict.fromkeys(names, "drop"))
    assert torch.equal(outputs(graph, rewriter.split), outputs(expected, rewriter.split))
    assert len(find_sites(graph)) == len(rewriter.sites) - 2


def test_tokens_are_merged_last(rewriter):
    """Maps are fitted to states with all tokens, at any position of the merge in the plan."""
    sites = [site.name for site in rewriter.sites]
    changes = {sites[0]: "merge:1", sites[3]: "linear", sites[1]: "drop"}
    kept = rewriter.apply_changes(changes)
    plain = rewriter.apply_changes({name: action for name, action in changes.items() if name != sites[0]})
    assert torch.equal(outputs(kept, rewriter.split), outputs(plain, rewriter.split))
    assert rewriter.reduced(kept, {sites[3]: "linear"}) is kept
    merged = rewriter.rewritten(changes)
    assert not torch.equal(outputs(merged, rewriter.split), outputs(plain, rewriter.split))
    again = rewriter.rewritten({name: changes[name] for name in (sites[3], sites[0], sites[1])})
    assert torch.equal(outputs(merged, rewriter.split), outputs(again, rewriter.split))


@pytest.mark.parametrize("action", ["drop", "scale", "linear", "fuse"])
def test_finished_computes_the_same_with_no_more_nodes_than_a_drop(rewriter, action):
    name = rewriter.sites[2].name
    graph = rewriter.changed(rewriter.original, name, action)
    before = outputs(graph, rewriter.split)
    done = fold_graph(graph)
    torch.testing.assert_close(outputs(done, rewriter.split), before, **SAME)
    torch.testing.assert_close(outputs(graph, rewriter.split), before, rtol=0, atol=0)  # a fork was edited
    if action == "fuse":
        assert calls(done) <= calls(fold_graph(rewriter.changed(rewriter.original, name, "drop")))
    assert calls(fold_graph(done)) == calls(done)


def test_a_fit_without_a_source_is_refused(rewriter):
    with pytest.raises(PassError, match=rewriter.sites[0].name.replace(".", r"\.")):
        rewriter.changed(rewriter.original, rewriter.sites[0].name, "fuse")


def test_a_branch_followed_by_a_map_can_neither_be_fitted_nor_dropped(rewriter):
    """A site folded into the previous branch makes that branch part of the map, so further fits exclude it."""
    sites = [site.name for site in rewriter.sites]
    folded = rewriter.changed(rewriter.original, sites[2], "fuse")
    fits = rewriter.fits(folded, sites)
    assert sites[1] not in fits
    assert sites[2] not in fits
    assert {sites[0], sites[3]} == set(fits)
    assert rewriter.fits(folded, [sites[1]]) == {}
    with pytest.raises(PassError, match="blocks"):
        rewriter.changed(folded, sites[1], "linear")
    dropped = rewriter.changed(folded, sites[1], "drop")
    assert torch.equal(outputs(dropped, rewriter.split), outputs(folded, rewriter.split))


class TestNested:
    """Units of a target that drops whole blocks, or the attention of a block alone."""

    @pytest.fixture
    def nested(self, subject):
        return Rewriter(*subject, nested=True)

    def test_units_are_blocks_and_the_later_attentions(self, nested):
        blocks = dict.fromkeys(site.block for site in nested.sites)
        attentions = [site.name for site in nested.sites if site.kind == "attention"][1:]
        assert list(nested.units) == [*blocks, *attentions]
        assert {len(nested.units[name]) for name in attentions} == {1}

    def test_a_block_whose_attention_is_gone_loses_the_rest(self, nested):
        block = nested.sites[-1].block
        (attention,) = (site.name for site in nested.sites if (site.block, site.kind) == (block, "attention"))
        graph = nested.changed(nested.changed(nested.original, attention, "drop"), block, "drop")
        names = dict.fromkeys((site.name for site in nested.units[block]), "drop")
        expected = nested.apply_changes(names)
        assert torch.equal(outputs(graph, nested.split), outputs(expected, nested.split))
        assert calls(graph) == calls(expected) < calls(nested.original)
        assert calls(nested.changed(graph, attention, "drop")) == calls(graph)  # nothing is left to drop

    def test_what_the_target_cannot_express_is_refused(self, nested):
        first, second = list(dict.fromkeys(site.block for site in nested.sites))[:2]
        attention = next(site.name for site in nested.sites if (site.block, site.kind) == (second, "attention"))
        with pytest.raises(PassError, match="the first block that is left would have no attention"):
            nested.changed(nested.changed(nested.original, attention, "drop"), first, "drop")
        with pytest.raises(PassError, match="can only be dropped; found linear"):
            nested.changed(nested.original, second, "linear")
        with pytest.raises(PassError, match="no block would be left"):
            nested.apply_changes({site.name: "drop" for site in nested.sites})
        mlp = next(site.name for site in nested.sites if (site.block, site.kind) == (second, "mlp"))
        with pytest.raises(PassError, match="only whole units can be changed"):
            nested.apply_changes({mlp: "drop"})
