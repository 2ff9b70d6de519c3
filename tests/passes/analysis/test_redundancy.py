"""Scores against the formulas on eager modules with hooks, and against double loops in float64."""

import dataclasses
import functools
import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compressor import models
from compressor.lower.trace import trace
from passes.analysis.redundancy import Score
from passes.base import PassError, apply
from tests import samples
from tests.architectures import TIMM, TRANSFORMERS
from tests.samples import traced

BY_NAME = {architecture.name: architecture for architecture in TIMM + TRANSFORMERS}
# The oracle adds the same float32 states up in float64; the pass normalises in float32, whose epsilon is 1.2e-7.
FLOAT32 = 1e-6
# arccos turns a rounding error of 1e-7 near 1 into sqrt(2e-7) = 4e-4 rad, 1.4e-4 after the division by pi.
ANGLE = 2e-4


def scored(graph, *batches):
    return apply(Score(), graph, batches)


def cosines(x, y):
    x, y = x.double(), y.double()
    return (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))


def angles(x, y):
    return torch.arccos(cosines(x, y).clamp(-1, 1)) / math.pi


def inputs_and_outputs(module, feeds, parts):
    """Return input and output of each named submodule during one eager run."""
    captured = {}

    def hook(name):
        return lambda _, inputs, output: captured.update({name: (inputs[0] if inputs else None, output)})

    handles = [module.get_submodule(name).register_forward_hook(hook(name)) for name in parts]
    with torch.no_grad():
        module(**feeds)
    for handle in handles:
        handle.remove()
    return captured


# ------------------------------------------------------------------------------------------------- eager timm models


@pytest.mark.parametrize("name", ["vit", "deit3", "vit_registers", "beit"])
def test_scores_equal_eager_models_with_hooks(name):
    """LLM-Drop compares the norm input with itself plus the branch and LayerScale; blocks compare input and output."""
    model, graph, sites = traced(name)
    scores = scored(graph, model.example)
    blocks = [f"blocks.{position}" for position in range(2)]
    captured = inputs_and_outputs(
        model.module, model.example, [*blocks, *[f"{b}.norm1" for b in blocks], *[f"{b}.norm2" for b in blocks]]
    )
    for block in blocks:
        enters, leaves = captured[block]
        middle = captured[f"{block}.norm2"][0]
        assert torch.equal(captured[f"{block}.norm1"][0], enters)
        for site, x, y in [(f"{block}.attn", enters, middle), (f"{block}.mlp", middle, leaves)]:
            assert scores.cosine(site) == pytest.approx(float(cosines(x, y).mean()), abs=FLOAT32)
            update = float(((y - x).double().norm(dim=-1) / x.double().norm(dim=-1)).mean())
            assert scores.update(site) == pytest.approx(update, rel=1e-5)  # y - x cancels a digit or two
            assert scores.sites[site].mean("angular") == pytest.approx(float(angles(x, y).mean()), abs=ANGLE)
        assert scores.influence(block) == pytest.approx(1 - float(cosines(enters, leaves).mean()), abs=FLOAT32)
    assert set(scores.sites) == {site.name for site in sites}
    assert set(scores.blocks) == set(blocks)


def test_post_norm_site_ends_before_the_norm():
    """BERT: x + f(x) is the input of the LayerNorm of a sublayer, x the output of the previous one."""
    model, graph, sites = traced("hf_bert")
    scores = scored(graph, model.example)
    names = [f"encoder.layer.{i}.{part}.LayerNorm" for i in range(2) for part in ("attention.output", "output")]
    captured = inputs_and_outputs(model.module, model.example, ["embeddings", *names])
    before = [captured["embeddings"][1], *[captured[name][1] for name in names[:-1]]]
    keep = model.example["attention_mask"].bool()
    for site, x, name in zip(sites, before, names, strict=True):
        y = captured[name][0]
        assert scores.cosine(site.name) == pytest.approx(float(cosines(x[keep], y[keep]).mean()), abs=FLOAT32)


class Parallel(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.m, self.last = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        x = self.stem(x)
        x = x + self.a(x) + torch.relu(self.m(x))
        return x + self.last(x)


def test_each_parallel_branch_is_compared_with_the_trunk():
    torch.manual_seed(0)
    model = models.load(Parallel(), example_inputs=torch.rand(5, 8))
    rows = torch.rand(5, 8)
    scores = scored(trace(model), {"x": rows})
    module = model.module
    with torch.no_grad():
        x = module.stem(rows)
        branches = {"a": module.a(x), "m": torch.relu(module.m(x))}
        y = x + branches["a"] + branches["m"]
    for name, branch in branches.items():
        assert scores.cosine(name) == pytest.approx(float(cosines(x, x + branch).mean()), abs=FLOAT32)
    assert scores.cosine("last") == pytest.approx(float(cosines(y, y + module.last(y).detach()).mean()), abs=FLOAT32)
    assert len(scores.states) == 3


# ----------------------------------------------------------------------------------------------------- state matrices


def naive_matrices(graph, sites, feeds, ends):
    """Loop over pairs of states in float64; `ends` is the index of the last token of each row, None for all tokens."""
    names = list(dict.fromkeys([*(site.trunk for site in sites), sites[-1].root]))
    dims = {site.trunk: site.channel_dim for site in sites} | {sites[-1].root: sites[-1].channel_dim}
    values = samples.states(graph, feeds, *names)
    states = [value.movedim(dims[name], -1).double() for name, value in zip(names, values, strict=True)]
    count = len(states)
    similarity, angular = torch.full((2, count, count), math.nan, dtype=torch.float64)
    for i, left in enumerate(states):
        for j, right in enumerate(states):
            if values[i].shape != values[j].shape:
                continue
            x, y = left.flatten(1, -2), right.flatten(1, -2)
            kept = feeds["attention_mask"].bool() if ends is not None else torch.ones(x.shape[:2], dtype=torch.bool)
            similarity[i, j] = cosines(x[kept], y[kept]).mean()
            rows = torch.arange(len(x))
            angular[i, j] = angles(x[rows, ends], y[rows, ends]).mean() if ends is not None else angles(x, y).mean()
    return similarity, angular.fill_diagonal_(0)


@pytest.mark.parametrize("name", ["vit", "hf_dinov2", "convnext"])
def test_matrices_equal_a_double_loop(name):
    """Entries are NaN exactly where the shapes of two stages differ."""
    model, graph, sites = traced(name)
    scores = scored(graph, model.example)
    similarity, angular = naive_matrices(graph, sites, model.example, None)
    torch.testing.assert_close(scores.similarity_matrix(), similarity, rtol=0, atol=FLOAT32, equal_nan=True)
    torch.testing.assert_close(scores.angular_matrix(), angular, rtol=0, atol=ANGLE, equal_nan=True)
    if name == "convnext":
        assert torch.isnan(similarity).any()
        assert not torch.isnan(similarity).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_angular_distance_uses_the_last_unpadded_token(side):
    model, graph, sites = traced("hf_bert")
    feeds = dict(model.example)
    mask = torch.ones_like(feeds["attention_mask"])
    if side == "left":
        mask[0, :3] = 0
    else:
        mask[0, 4:] = 0
    feeds["attention_mask"] = mask
    ends = torch.tensor([3 if side == "right" else 6, 6])
    similarity, angular = naive_matrices(graph, sites, feeds, ends)
    scores = scored(graph, feeds)
    torch.testing.assert_close(scores.similarity_matrix(), similarity, rtol=0, atol=FLOAT32)
    torch.testing.assert_close(scores.angular_matrix(), angular, rtol=0, atol=ANGLE)
    assert (scores.sites[sites[0].name].tokens, scores.sites[sites[0].name].ends) == (int(mask.sum()), 2)
    # The angular distance of the last site equals the matrix entry; its output is taken before the norm.
    last = sites[-1]
    corner = float(scores.angular_matrix()[-2, -1])
    assert scores.sites[last.name].mean("angular") == pytest.approx(corner, abs=ANGLE)


@pytest.mark.parametrize("name", ["hf_bert", "hf_llama"])
def test_scores_do_not_depend_on_padding(name):
    """Masked positions add exact zeros in another order, so scores differ by float32 rounding."""
    model, graph, _ = traced(name)
    short = {key: value[:, :5] for key, value in model.example.items()}
    short["attention_mask"] = torch.ones_like(short["attention_mask"])
    padded = {key: torch.nn.functional.pad(value, (0, 6), value=3) for key, value in short.items()}
    padded["attention_mask"] = torch.nn.functional.pad(short["attention_mask"], (0, 6))
    if "token_type_ids" in padded:
        padded["token_type_ids"] = torch.nn.functional.pad(short["token_type_ids"], (0, 6))
    unpadded_scores, padded_scores = scored(graph, short), scored(graph, padded)
    for site in unpadded_scores.sites:
        assert unpadded_scores.sites[site].tokens == padded_scores.sites[site].tokens == 10
        assert unpadded_scores.cosine(site) == pytest.approx(padded_scores.cosine(site), abs=FLOAT32)
        assert unpadded_scores.update(site) == pytest.approx(padded_scores.update(site), rel=1e-5)
    torch.testing.assert_close(
        unpadded_scores.similarity_matrix(), padded_scores.similarity_matrix(), rtol=0, atol=FLOAT32
    )
    torch.testing.assert_close(unpadded_scores.angular_matrix(), padded_scores.angular_matrix(), rtol=0, atol=ANGLE)


# ------------------------------------------------------------------------------------------------------------- merging


def test_sums_are_float64():
    model, graph, _ = traced("vit")
    scores = scored(graph, model.example)
    for tensor in (scores.similarity, scores.tokens, scores.angular, scores.ends):
        assert tensor.dtype == torch.float64
    many = functools.reduce(lambda total, _: total + scores, range(999), scores)
    # A float32 sum of 10,000 terms near 1 is exact to seven digits only, a float64 sum to fifteen.
    assert many.cosine("blocks.0.attn") == pytest.approx(scores.cosine("blocks.0.attn"), rel=1e-13)


POOL = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 11))
def test_scores_of_two_halves_add_up(cut):
    """Counts are equal. Sums agree to 1e-6, because kernels round a row differently in batches of different size."""
    _, graph, _ = traced("vit")
    whole, first, second = (
        scored(graph, {"x": POOL}),
        scored(graph, {"x": POOL[:cut]}),
        scored(graph, {"x": POOL[cut:]}),
    )
    merged = first + second
    assert merged.samples == whole.samples == 12
    for name, moments in whole.sites.items():
        assert (merged.sites[name].tokens, merged.sites[name].ends) == (moments.tokens, moments.ends)
        assert merged.sites[name].cosine == pytest.approx(moments.cosine, rel=FLOAT32)
    for name, moments in whole.blocks.items():
        assert merged.blocks[name].update == pytest.approx(moments.update, rel=1e-5)
    assert torch.equal(merged.tokens, whole.tokens)
    torch.testing.assert_close(merged.similarity, whole.similarity, rtol=FLOAT32, atol=0)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 5))
def test_scores_of_batches_add_up_for_any_split(cut):
    """Both use the same batches, so only the order of float64 additions differs: 1e-12. Counts are equal."""
    _, graph, _ = traced("vit")
    batches = [{"x": POOL[start : start + 2]} for start in range(0, 12, 2)]
    whole, merged = scored(graph, *batches), scored(graph, *batches[:cut]) + scored(graph, *batches[cut:])
    assert (merged.samples, merged.states) == (whole.samples, whole.states)
    for name, moments in whole.sites.items():
        assert dataclasses.astuple(merged.sites[name]) == pytest.approx(dataclasses.astuple(moments), rel=1e-12)
    for field in ("similarity", "tokens", "angular", "ends"):
        torch.testing.assert_close(getattr(merged, field), getattr(whole, field), rtol=1e-12, atol=1e-12)


def test_scores_of_different_graphs_cannot_be_added():
    with pytest.raises(PassError, match="two different graphs"):
        scored(traced("vit")[1], {"x": POOL}) + scored(traced("hf_vit")[1], traced("hf_vit")[0].example)


def test_data_is_read_lazily_and_freed():
    """At most one batch is alive when the next one is created."""
    _, graph, _ = traced("vit")
    handed, alive = [], []

    def batches():
        for _ in range(8):
            alive.append(sum(reference() is not None for reference in handed))
            images = torch.rand(2, 3, 32, 32)
            handed.append(weakref.ref(images))
            feeds = {"x": images}
            del images
            yield feeds
            del feeds

    scores = apply(Score(), graph, batches())
    assert scores.samples == 16
    assert max(alive) <= 1


# --------------------------------------------------------------------------------------------------------- zero states


@functools.cache
def residual():
    """Return a traced model of two branches on vectors, whose trunk is zero where its input is."""
    return trace(models.load(samples.Residual(2), example_inputs=torch.rand(2, 32)))


def test_tokens_without_a_direction_are_left_out():
    """Their cosine was 0, and their relative update 1e12, which decided on the means of all tokens."""
    rows = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    padded = torch.zeros(9, 32)
    padded[[0, 2, 3, 5, 6, 8]] = rows
    expected, found = (scored(residual(), {"x": each}) for each in (rows, padded))
    first, second = found.sites
    assert found.sites[first] == dataclasses.replace(expected.sites[first], zeros=3)
    # A later state is the bias where the input is zero, so it has a direction; pairs with the first state have none.
    assert (found.sites[second].zeros, found.sites[second].tokens) == (0, 9)
    assert found.tokens.tolist() == [[6.0, 6.0, 6.0], [6.0, 9.0, 9.0], [6.0, 9.0, 9.0]]
    torch.testing.assert_close(found.similarity_matrix()[0], expected.similarity_matrix()[0])
    torch.testing.assert_close(found.angular_matrix()[0], expected.angular_matrix()[0])


def test_a_trunk_that_is_zero_everywhere_has_no_score():
    with pytest.raises(PassError, match=r"the trunk before or after inner\.0\.other is zero at every token"):
        scored(residual(), {"x": torch.zeros(4, 32)})


# ------------------------------------------------------------------------------------------------------------ refusals


def test_error_names_the_site_with_non_finite_values():
    model = BY_NAME["vit"].load()
    with torch.no_grad():
        model.module.blocks[1].mlp.fc2.weight.fill_(math.nan)
    with pytest.raises(PassError, match=r"site blocks\.1\.mlp computes values that are NaN or infinite"):
        scored(trace(model), model.example)


def test_no_data_no_batches_or_no_sites_raises():
    _, graph, _ = traced("vit")
    with pytest.raises(PassError, match="needs calibration data"):
        apply(Score(), graph)
    with pytest.raises(PassError, match="no batches"):
        scored(graph)
    plain = models.load(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), example_inputs=torch.rand(2, 4))
    with pytest.raises(PassError, match="no residual site"):
        scored(trace(plain), plain.example)
