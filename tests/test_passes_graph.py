"""Residual sites of many architectures, against a count from the module tree and a committed listing.

To write the listings anew: ``COMPRESSOR_UPDATE_GOLDEN=1 pytest tests/test_passes_graph.py`` rewrites those that differ
and fails for each, so that no listing changes unseen; look at the diff, then run again without the variable.
"""

import json
import os
import random
from pathlib import Path

import pytest
import torch

from compressor import models
from compressor.trace import trace
from passes.base import apply
from passes.drop import Drop
from passes.graph import GraphError, drop_branches, find_sites, output_values, remove_dead, resolution, site_named
from passes.run import run
from tests.architectures import TIMM, TRANSFORMERS, promised

GOLDEN = Path(__file__).parent / "golden"
ALL = TIMM + TRANSFORMERS


@pytest.fixture(scope="module", params=ALL, ids=[architecture.name for architecture in ALL])
def case(request):
    model = request.param.load()
    graph = trace(model)
    return request.param, model, graph, find_sites(graph)


def unnumbered(sites):
    """Names without the number of shared weights, which counts those that are left."""
    return [site.name.split("#")[0] for site in sites]


def feeds(model, size, seed=0):
    """`size` rows drawn from the model's example, so that masks and ids stay valid."""
    rows = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(seed))
    return {name: value[rows] for name, value in model.example.items()}


# ------------------------------------------------------------------------------------------------- every architecture


def test_as_many_sites_as_the_module_tree_promises(case):
    architecture, model, _, sites = case
    assert len(sites) == promised(model.module, architecture.branches) * architecture.repeats - architecture.fewer
    attention = sum(site.kind == "attention" for site in sites)
    expected = promised(model.module, architecture.attention) * architecture.repeats - architecture.fewer_attention
    assert attention == expected
    assert architecture.why or not (architecture.fewer or architecture.fewer_attention)


def test_listing(case):
    architecture, _, _, sites = case
    path = GOLDEN / f"{architecture.name}.json"
    lines = [json.dumps([site.name, site.kind, site.block, site.width]) for site in sites]
    found = "[\n  " + ",\n  ".join(lines) + "\n]\n"
    known = path.read_text() if path.is_file() else None
    if os.environ.get("COMPRESSOR_UPDATE_GOLDEN") == "1" and found != known:
        path.write_text(found)
        pytest.fail(f"{path.name} was rewritten; look at the diff and run again without COMPRESSOR_UPDATE_GOLDEN.")
    assert json.loads(found) == json.loads(known)


def test_sites_are_described_by_nodes_of_the_graph(case):
    _, _, graph, sites = case
    by_name = {node.name: node for node in graph.nodes()}
    assert len({site.name for site in sites}) == len(sites)
    assert [site.order for site in sites] == list(range(len(sites)))
    for site in sites:
        assert by_name[site.branch] in by_name[site.add].all_input_nodes
        assert len(by_name[site.branch].users) == 1
        assert int(by_name[site.trunk].meta["val"].shape[site.channel_dim]) == site.width


@torch.inference_mode()
def test_skipping_equals_rewriting_at_other_batch_sizes_and_names_stay(case):
    architecture, model, graph, sites = case
    chosen = random.Random(architecture.name).sample(sites, (len(sites) + 1) // 2)
    rewritten = graph.fork()
    apply(Drop(tuple(site.name for site in chosen)), rewritten)
    for size in (1, 3):
        batch = feeds(model, size)
        expected = run(graph, batch, skip=chosen)
        for got in (run(rewritten, batch), rewritten.module(*batch.values())):
            assert all(torch.equal(left, right) for left, right in zip(got, expected, strict=True))
    # A site also goes when only dropped branches used it: GCViT's query generator feeds one attention alone.
    live = {node.name for node in rewritten.nodes()}
    left = [site for site in sites if site not in chosen and site.branch in live]
    assert unnumbered(find_sites(rewritten)) == unnumbered(left)
    assert len(left) == len(sites) - len(chosen) or architecture.name == "gcvit"
