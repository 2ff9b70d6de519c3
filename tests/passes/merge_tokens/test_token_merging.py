"""Token reduction: no change for zero tokens, exact for equal tokens, and the formulas of the paper otherwise."""

import copy
import functools

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from compressor import models
from compressor.data import splits
from compressor.lower.trace import trace
from compressor.lower.write_onnx import lower
from compressor.quality.torch_reference import reference_of, with_rounding
from passes.base import PassError, apply
from passes.execute.interpreter import run
from passes.graph.graph import value_of
from passes.graph.sites import find_sites
from passes.merge_tokens.stages import DROPPING
from passes.merge_tokens.token_merging import ReduceTokens
from tests import samples
from tests.paths import SHARED_DATA

aten = torch.ops.aten
WIDTH, HEADS = 16, 2
SHARED = SHARED_DATA
DEIT, IMAGES = SHARED / "deit_tiny_patch16_224", SHARED / "imagenet_sample"


class Block(nn.Module):
    """A pre-norm block; `explicit` computes the attention by products and a softmax, `scale` scales the trunk."""

    def __init__(self, *, explicit, scale=None):
        super().__init__()
        self.explicit, self.scale = explicit, scale
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def heads(self, x):
        parts = self.qkv(self.norm1(x)).reshape(x.shape[0], x.shape[1], 3, HEADS, WIDTH // HEADS)
        return parts.permute(2, 0, 3, 1, 4).unbind(0)

    def attention(self, x, sizes=None):
        q, k, v = self.heads(x)
        bias = 0 if sizes is None else sizes.log()[:, None, None, :]
        if self.explicit or sizes is not None:
            mixed = (q @ k.transpose(-2, -1) * (WIDTH // HEADS) ** -0.5 + bias).softmax(-1) @ v
        else:
            mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(x.shape))

    def mlp(self, x):
        return self.down(nn.functional.gelu(self.up(self.norm2(x))))

    def forward(self, x):
        x = (x if self.scale is None else x * self.scale) + self.attention(x)
        return x + self.mlp(x)


class Trunk(nn.Module):
    """A class token and blocks; returns the class token, all tokens (`dense`) or the mean of the others (`pool`)."""

    def __init__(self, depth=3, *, explicit=False, dense=False, pool=False, scale=None):
        super().__init__()
        self.dense, self.pool = dense, pool
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.blocks = nn.ModuleList([Block(explicit=explicit, scale=scale) for _ in range(depth)])
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x):
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if self.pool:
            return x[:, 1:].mean(1)
        return x if self.dense else x[:, 0]


def traced(module, tokens):
    return trace(models.load(module.eval(), example_inputs=torch.randn(2, tokens, WIDTH)))


@functools.cache
def plain():
    return traced(Trunk(), 13)


def reduced(graph, *schedule, **options):
    edited = graph.fork()
    apply(ReduceTokens(tuple(schedule), **options), edited)
    return edited


def outputs(graph, x):
    return run(graph, {graph.inputs[0]: x})


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# --------------------------------------------------------------------------------------------- reference and options


def by_cosine(keys, states, received, sizes, token, other):
    """Rank of a link in Bolya et al., section 3."""
    return torch.cosine_similarity(keys[token], keys[other], dim=0).item()


def by_size(keys, states, received, sizes, token, other):
    """Rank of a link in Lee and Choi, arXiv 2505.15160."""
    n, m = sizes[token].item(), sizes[other].item()
    return n * m / (n + m) * (by_cosine(keys, states, received, sizes, token, other) - 1)


def by_attention(keys, states, received, sizes, token, other):
    """Rank of a link by the attention that its first token receives, and the difference of the states."""
    return received[token].item() * (torch.cosine_similarity(states[token], states[other], dim=0).item() - 1)


LINKS = {"tome": by_cosine, "atm": by_size, "merge": by_attention}


@torch.no_grad()
def reference_merge(x, keys, received, sizes, amount, rank_of):
    """Merge as in Bolya et al., section 3, token by token, in the order first token, A by rank, B."""
    free = list(range(1, len(x)))
    a, b = free[::2], free[1::2]
    links = []
    for token in a:
        ranks = [rank_of(keys, x, received, sizes, token, other) for other in b]
        links.append((max(ranks), token, b[int(np.argmax(ranks))]))
    links = sorted(links, key=lambda link: -link[0])
    groups = {token: [token] for token in (0, *(token for _, token, _ in links[amount:]), *b)}
    for _, token, other in links[:amount]:
        groups[other].append(token)
    groups = list(groups.values())
    values = [sum(x[m] * sizes[m] for m in group) / sum(sizes[m] for m in group) for group in groups]
    return torch.stack(values), torch.stack([sum(sizes[m] for m in group) for group in groups])


@torch.no_grad()
def reference_run(trunk, x, amounts, rank_of):
    """Return the class token of one sample, with one number of merged tokens per block."""
    x = torch.cat([trunk.cls[0], x])
    sizes = torch.ones(len(x))
    for block, amount in zip(trunk.blocks, amounts, strict=True):
        y = x[None] + block.attention(x[None], sizes[None])
        q, k, _ = block.heads(x[None])
        weights = (q[0] @ k[0].transpose(-2, -1) * (WIDTH // HEADS) ** -0.5 + sizes.log()).softmax(-1)
        x, sizes = reference_merge(y[0], k[0].mean(0), weights.mean(0)[0], sizes, amount, rank_of)
        x = x + block.mlp(x[None])[0]
    return trunk.norm(x)[0]


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("method", LINKS)
def test_merging_follows_the_reference(method, explicit):
    trunk = Trunk(explicit=explicit).eval()
    original = traced(trunk, 13)
    graph = reduced(original, ("blocks.0", 4), ("blocks.1", 3), ("blocks.2", 2), method=method)
    x = torch.randn(3, 13, WIDTH)
    expected = torch.stack([reference_run(trunk, sample, (4, 3, 2), LINKS[method]) for sample in x])
    torch.testing.assert_close(outputs(graph, x)[0], expected, rtol=1e-4, atol=1e-5)  # float32 sums in another order
    assert (outputs(original, x)[0] - expected).abs().max() > 1e-3  # merging changes the output
    for other in LINKS.keys() - {method}:  # which merges other tokens
        different = torch.stack([reference_run(trunk, sample, (4, 3, 2), LINKS[other]) for sample in x])
        assert (different - expected).abs().max() > 1e-3


def test_zero_tokens_do_not_change_the_graph():
    graph = plain()
    before = graph.signature()
    result = ReduceTokens((("blocks.0", 0), ("blocks.1", 0.0))).run(graph)
    assert (result.changed, graph.signature()) == ((), before)


@pytest.mark.parametrize("options", [{}, {"dense": True}, {"pool": True}, {"explicit": True}, {"scale": 0.7}])
def test_merging_equal_tokens_is_exact(options):
    """Adjacent tokens are copies, so sets A and B are equal, and a token of size 2 weighs as much as two tokens."""
    graph = traced(Trunk(depth=2, **options), 16)
    edited = reduced(graph, ("blocks.0", 5))
    x = torch.randn(3, 8, WIDTH).repeat_interleave(2, dim=1)
    merged, expected = outputs(edited, x)[0], outputs(graph, x)[0]
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5)
    assert any(
        str(value_of(node).shape[1]) == "12" for node in edited.nodes() if node.target == aten.layer_norm.default
    )


@pytest.mark.parametrize("method", ["merge", "attention", "norm"])
def test_batch_equals_single_samples(method):
    edited = reduced(plain(), ("blocks.0", 4), ("blocks.1", 0.25), method=method)
    for batch in (1, 3):
        x = torch.randn(batch, 13, WIDTH)
        alone = torch.cat([outputs(edited, sample[None])[0] for sample in x])
        torch.testing.assert_close(outputs(edited, x)[0], alone, rtol=1e-4, atol=1e-5)  # products of other batch sizes


def by_lowest_attention(method, y, received, amount):
    """Return the tokens after the first block: class token, and the others by attention, highest first."""
    order = [1 + token for token in received.argsort(descending=True).tolist()]
    kept, removed = order[: len(order) - amount], order[len(order) - amount :]
    if method == "evit":
        kept, removed = kept[:-1], [kept[-1], *removed]
        weights = received[[token - 1 for token in removed]]
        fused = (y[removed] * weights[:, None]).sum(0) / weights.sum()
        return torch.cat([y[[0, *kept]], fused[None]]), [1.0] * (1 + len(kept)) + [float(len(removed))]
    groups = {token: [token] for token in (0, *kept)}
    for token in removed if method == "unary" else ():
        similar = [torch.cosine_similarity(y[token], y[other], dim=0).item() for other in kept]
        groups[kept[int(np.argmax(similar))]].append(token)
    return torch.stack([y[group].mean(0) for group in groups.values()]), [
        float(len(group)) for group in groups.values()
    ]


@pytest.mark.parametrize("method", ["attention", "unary", "evit"])
def test_methods_that_remove_the_least_attended_tokens(method):
    trunk = Trunk(depth=2).eval()
    x = torch.randn(2, 11, WIDTH)
    actual = outputs(reduced(traced(trunk, 11), ("blocks.0", 5), method=method), x)[0]
    expected = []
    with torch.no_grad():
        first, second = trunk.blocks
        for sample in x:
            start = torch.cat([trunk.cls[0], sample])[None]
            q, k, _ = first.heads(start)
            received = (q[:, :, :1] @ k.transpose(-2, -1) * (WIDTH // HEADS) ** -0.5).softmax(-1).mean(1)[0, 0, 1:]
            y, sizes = by_lowest_attention(method, (start + first.attention(start))[0], received, 5)
            y = y[None] + first.mlp(y[None])
            y = y + second.attention(y, torch.tensor([sizes]))
            expected.append(trunk.norm(y + second.mlp(y))[0, 0])
    torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-4, atol=1e-5)  # float32 in another order


def test_protected_tokens_are_never_merged():
    """All tokens are equal, so any pair could merge; protected tokens must still have rows of their own."""
    graph = traced(Trunk(depth=2), 12)
    edited = reduced(graph, ("blocks.0", 3), protected=5)
    products = [node.all_input_nodes[0] for node in edited.nodes() if node.target == aten.matmul.default]
    (mean,) = [node for node in products if value_of(node).shape[1:] == (10, 13)]
    edited.outputs = (*edited.outputs, "mean")
    output = edited.nodes()[-1]
    output.args = ((*output.args[0], mean),)
    matrix = outputs(edited, torch.ones(2, 12, WIDTH))[1]
    assert torch.equal(matrix[:, :5, :5], torch.eye(5).expand(2, 5, 5))
    assert not matrix[:, :5, 5:].any()
    assert not matrix[:, 5:, :5].any()
    assert matrix.shape == (2, 10, 13)
    torch.testing.assert_close(matrix.sum(-1), torch.ones(2, 10))


@pytest.mark.parametrize("protected", [12, 13])
def test_a_trunk_of_protected_tokens_is_refused(protected):
    """Such as that of query tokens, which are parameters: one token or none is left."""
    graph = traced(Trunk(depth=2), 12)
    with pytest.raises(PassError, match=f"has 13 tokens, of which {protected} are protected"):
        reduced(graph, ("blocks.0", 0.25), protected=protected)


def test_class_and_register_tokens_are_detected():
    for name, count in (("vit", 1), ("deit_distilled", 2), ("vit_registers", 5), ("hf_dinov2_registers", 5)):
        _, graph, sites = samples.traced(name)
        (first, *_) = [site for site in sites if site.kind == "attention"]
        step = ReduceTokens(((first.name, 1),))
        assert step.protects(graph) == count, name


def test_unmerge_option_sets_the_output_length():
    graph = traced(Trunk(depth=1, dense=True), 13)
    x = torch.randn(2, 13, WIDTH)
    assert outputs(reduced(graph, ("blocks.0", 4)), x)[0].shape == (2, 14, WIDTH)
    assert outputs(reduced(graph, ("blocks.0", 4), unmerge=False), x)[0].shape == (2, 10, WIDTH)
    assert outputs(reduced(graph, ("blocks.0", 4), method="norm", unmerge=False), x)[0].shape == (2, 10, WIDTH)


# ------------------------------------------------------------------------------------------------------ architectures

AMOUNTS = {
    "vit": 1,
    "deit3": 1,
    "vit_registers": 1,
    "beit": 1,
    "eva02": 1,
    "cait": 1,
    "hf_vit": 1,
    "hf_clip_vision": 1,
    "hf_siglip_vision": 1,
    "hf_whisper_encoder": 3,
    "hf_bert": 0.3,
}


@pytest.mark.parametrize("name", AMOUNTS)
def test_supported_architectures(name):
    model, graph, sites = samples.traced(name)
    first = next(site for site in sites if site.kind == "attention")
    edited = reduced(graph, (first.name, AMOUNTS[name]))
    assert [site.name for site in find_sites(edited)] == [site.name for site in sites]
    for batch in (1, 3):
        feeds = {key: torch.cat([value, value])[:batch] for key, value in model.example.items()}
        before, after = run(graph, feeds), run(edited, feeds)
        assert [value.shape for value in after] == [value.shape for value in before]
        assert all(torch.isfinite(value).all() for value in after)
        assert any(not torch.equal(left, right) for left, right in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("name", "amount", "reason"),
    [
        ("swin", 1, r"trunk of shape \[any, 16, 16, 8\].*grid"),
        ("hf_swinv2", 1, "merges or splits the token axis"),
        ("hf_clip_text", 0.3, "masks different tokens for different queries"),
        ("hf_bert", 1, "dynamic length"),
        ("hf_gpt2", 0.3, "merges or splits the batch axis"),
    ],
)
def test_unsupported_architectures_raise_with_the_reason(name, amount, reason):
    _, graph, _ = samples.traced(name)
    before = graph.signature()
    first = next(site for site in find_sites(graph) if site.kind == "attention")
    with pytest.raises(PassError, match=reason):
        ReduceTokens(((first.name, amount),)).run(graph)
    assert graph.signature() == before


def test_invalid_options_raise():
    graph = plain()
    with pytest.raises(PassError, match=r"blocks\.9.*the graph has blocks\.0"):
        ReduceTokens((("blocks.9", 1),)).run(graph)
    with pytest.raises(PassError, match="share below"):
        ReduceTokens((("blocks.0", 0.5),))
    with pytest.raises(PassError, match="merge, tome, atm, unary, evit, attention or norm"):
        ReduceTokens((), method="random")  # type: ignore[arg-type]
    with pytest.raises(PassError, match="reads the first 1 tokens by position"):
        ReduceTokens((("blocks.0", 1),), protected=0).run(graph)
    with pytest.raises(PassError, match="dropped tokens have no value"):
        ReduceTokens((("blocks.0", 1),), method="norm").run(traced(Trunk(depth=1, dense=True), 13))


def test_outputs_do_not_depend_on_padding():
    """The outputs of a text do not depend on the token ids in its padding."""
    _, graph, _ = samples.traced("hf_bert")
    edited = reduced(graph, ("encoder.layer.0", 0.3), ("encoder.layer.1", 0.2))
    ids = torch.randint(3, 50, (2, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[:, 8:] = 0
    other = torch.where(mask.bool(), ids, (ids + 7) % 47 + 3)
    kinds = torch.zeros_like(ids)
    results = [
        run(edited, {"input_ids": text, "attention_mask": mask, "token_type_ids": kinds}) for text in (ids, other)
    ]
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-5)  # float32 sums over other columns
    torch.testing.assert_close(results[0][0][:, :8], results[1][0][:, :8], rtol=1e-4, atol=1e-5)


def texts_of(graph, ids, lengths):
    """Return the feeds of a graph; padding is token 1, by which RoBERTa counts its positions."""
    mask = (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()
    values = {"input_ids": torch.where(mask.bool(), ids, 1), "attention_mask": mask}
    return {name: values.get(name, torch.zeros_like(ids)) for name in graph.inputs}


@pytest.mark.parametrize(
    ("architecture", "method"),
    [*(("hf_bert", method) for method in LINKS), ("hf_roberta", "merge"), ("hf_distilbert", "merge")],
)
@pytest.mark.parametrize("amounts", [(0.3, 0.2), (0.37, 0.499)])
def test_a_row_with_padding_merges_as_without(architecture, method, amounts):
    """The output of a text does not depend on the longest text of its batch, with one or with two reductions."""
    _, graph, sites = samples.traced(architecture)
    attentions = [site.name for site in sites if site.kind == "attention"]
    edited = reduced(graph, *zip(attentions, amounts, strict=True), method=method)
    for lengths in ([13, 12, 9, 2], [12, 11, 7, 3], [5, 4, 3, 2], [2, 2, 2, 2]):
        ids = torch.randint(3, 50, (4, max(lengths)))
        together = run(edited, texts_of(graph, ids, lengths))
        for row, length in enumerate(lengths):
            alone = run(edited, texts_of(graph, ids[row : row + 1, :length], [length]))
            torch.testing.assert_close(together[0][row, :length], alone[0][0], rtol=1e-4, atol=1e-5)
            for batched, single in zip(together[1:], alone[1:], strict=True):  # a value for each text
                torch.testing.assert_close(batched[row], single[0], rtol=1e-4, atol=1e-5)
        whole = run(graph, texts_of(graph, ids, lengths))
        if max(lengths) > 5:  # so that the comparison is not one of texts without merged tokens
            assert (whole[0] - together[0])[0].abs().max() > 1e-3


@pytest.mark.parametrize("padded", [True, False])
def test_rounding_alone_makes_no_tie(padded):
    """Rounding errors of random operands change no rank, and padding tokens, which are alike, have a fixed order."""
    if padded:
        _, graph, _ = samples.traced("hf_bert")
        feeds = texts_of(graph, torch.randint(3, 50, (6, 13)), [13, 11, 9, 6, 4, 2])
    else:
        graph = plain()
        feeds = {graph.inputs[0]: torch.randn(6, 13, WIDTH)}
    edited = reduced(graph, *((site.name, 0.3) for site in find_sites(graph) if site.kind == "attention"))
    reference = with_rounding(reference_of(edited, feeds), edited, [feeds])
    assert not reference.notes


class Masked(nn.Module):
    """Blocks over tokens of which the last are padding; no token is read by position."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(explicit=False) for _ in range(2)])

    def forward(self, x, real):
        for block in self.blocks:
            q, k, v = block.heads(x)
            mask = real[:, None, None, :]
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = x + block.proj(mixed.transpose(1, 2).reshape(x.shape))
            x = x + block.mlp(x)
        return x


def test_attention_of_padding_does_not_count():
    """Without a class token the attention of all tokens decides what merges; the queries of padding must not."""
    real = torch.tensor([[True] * 8 + [False] * 4])
    example = (torch.randn(1, 12, WIDTH), real)
    graph = trace(models.load(Masked().eval(), example_inputs=example))
    edited = reduced(graph, ("blocks.0", 4))
    left, right = graph.inputs
    for seed in range(8):
        x = torch.randn(1, 12, WIDTH, generator=torch.Generator().manual_seed(seed))
        other = torch.where(real[..., None], x, torch.randn(1, 12, WIDTH))
        first, second = (run(edited, {left: tokens, right: real})[0][:, :8] for tokens in (x, other))
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)  # float32 sums over other columns


def test_symbolic_lengths_do_not_nest():
    """Each length has its own symbol, because nested expressions made every further reduction several times slower."""
    _, graph, _ = samples.traced("hf_bert")
    edited = reduced(graph, ("encoder.layer.0", 0.3), ("encoder.layer.1", 0.2))
    values = {node.name: value_of(node) for node in edited.nodes()}
    lengths = {str(values[site.trunk].shape[1]) for site in find_sites(edited)}
    assert len(lengths) == 3  # before, between and after the reductions
    assert all(length.isidentifier() for length in lengths)


# --------------------------------------------------------------------------------------------------------------- ONNX


def onnx_outputs(graph, model, path, feeds):
    session = onnxruntime.InferenceSession(str(lower(graph, model, path)), providers=["CPUExecutionProvider"])
    return session.run(None, {name: value.numpy() for name, value in feeds.items()})


@pytest.mark.parametrize(("name", "amount"), [("vit_registers", 1), ("hf_bert", 0.3)])
def test_onnx_file_computes_the_same_outputs(tmp_path, name, amount):
    model, graph, sites = samples.traced(name)
    first = next(site for site in sites if site.kind == "attention")
    edited = reduced(graph, (first.name, amount))
    feeds = {key: torch.cat([value, value])[:3] for key, value in model.example.items()}
    for mine, theirs in zip(run(edited, feeds), onnx_outputs(edited, model, tmp_path / "m.onnx", feeds), strict=True):
        np.testing.assert_allclose(theirs, mine.numpy(), rtol=1e-4, atol=1e-5)  # float32 in another order


@pytest.mark.slow  # small models are written as ONNX above
@pytest.mark.skipif(not DEIT.is_dir(), reason="the trained DeiT-Tiny in ../shared/data is missing")
def test_onnx_file_equals_torch_on_real_images(tmp_path):
    model = models.load(str(DEIT))
    images = splits.load(str(IMAGES), model.preprocess, task=model.task, shares=splits.Shares(total=24))
    edited = reduced(trace(model), ("blocks.3", 64), ("blocks.7", 40))
    batch = next(iter(images.validation.batches(4)))
    feeds = {name: torch.as_tensor(batch.feeds[name]) for name in edited.inputs}
    (mine,), (theirs,) = run(edited, feeds), onnx_outputs(edited, model, tmp_path / "m.onnx", feeds)
    # Two engines may break a tie of two links differently. These images have none, so only rounding remains.
    np.testing.assert_allclose(theirs, mine.numpy(), rtol=1e-3, atol=1e-3 * float(mine.abs().max()))


class Encoder(nn.Module):
    """An encoder of torch, which takes tokens first by default, with a class token in front."""

    def __init__(self, batch_first):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=batch_first)
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(3))
        self.token, self.head, self.first = nn.Parameter(torch.randn(1, 1, 16)), nn.Linear(16, 3), batch_first

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        x = x if self.first else x.transpose(0, 1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x[:, 0] if self.first else x[0]), x if self.first else x.transpose(0, 1)


@pytest.mark.parametrize("method", ["merge", "tome", "atm", "evit", "attention", "norm"])
def test_tokens_first_are_merged_as_samples_first(method):
    """The order of the axes of the trunk is the only difference, so all outputs are equal."""
    x = torch.randn(4, 10, 16, generator=torch.Generator().manual_seed(1))
    outputs = []
    for batch_first in (True, False):
        graph = trace(models.load(Encoder(batch_first).eval(), example_inputs=x[:2]))
        sites = [site.name for site in find_sites(graph) if site.kind == "attention"]
        unmerge = False if method in DROPPING else None
        apply(ReduceTokens(((sites[0], 3), (sites[1], 0.25)), method=method, unmerge=unmerge), graph)
        outputs.append(run(graph, {graph.inputs[0]: x}))
        graph.check()
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    whole = Encoder(True).eval()(x)[0]
    assert not torch.allclose(outputs[0][0], whole, rtol=1e-3)
