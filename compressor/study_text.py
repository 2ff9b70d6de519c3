"""A study in plain sentences: what a reader wants to know first, each with its numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compressor.study import Study

Row = Mapping[str, Any]

ROLES = ("attention", "mlp")
NEVER = "no activation is massive (above 100 and a thousand times the median)"


def sentences(study: Study) -> Iterator[str]:
    """Five to eight sentences, in the order of the questions; those that the model cannot answer are left out."""
    sites, blocks, states = study.site_rows(), study.block_rows(), study.state_rows()
    known = [row for row in sites if row["cosine"] is not None]
    yield from _depth(known, [row for row in blocks if row["cosine"] is not None])
    yield from _roles(known)
    yield from _kinds(known, study.found.kinds)
    yield from _positions(known)
    yield from _norms(known, states)
    yield from _massive(states)
    yield from _stability(study)


def _depth(sites: Sequence[Row], blocks: Sequence[Row]) -> Iterator[str]:
    if not sites:
        return
    ranked = sorted(sites, key=lambda row: row["cosine"])
    yield (
        f"The branch that changes the stream least is {ranked[-1]['name']} (cosine of before and after "
        f"{ranked[-1]['cosine']:.3f}), the one that changes it most {ranked[0]['name']} ({ranked[0]['cosine']:.3f})."
    )
    if len(blocks) >= 3:
        third = max(1, len(blocks) // 3)
        parts = blocks[:third], blocks[third:-third], blocks[-third:]
        early, middle, late = (sum(row["cosine"] for row in part) / max(len(part), 1) for part in parts)
        yield (
            f"Over depth, a block's input and output are similar by {early:.3f} in the first third, {middle:.3f} in "
            f"the middle and {late:.3f} in the last third."
        )


def _roles(sites: Sequence[Row]) -> Iterator[str]:
    by_block = [
        {row["kind"]: row["cosine"] for row in members} for _, members in groupby(sites, key=lambda row: row["block"])
    ]
    pairs = [(block["attention"], block["mlp"]) for block in by_block if set(ROLES) <= set(block)]
    if not pairs:
        return
    less = sum(attention > mlp for attention, mlp in pairs)
    means = [sum(values) / len(pairs) for values in zip(*pairs, strict=True)]
    yield (
        f"Attention changes the stream less than the MLP in {less} of {len(pairs)} blocks (mean cosine {means[0]:.3f} "
        f"against {means[1]:.3f})."
    )


def mean_by_kind(rows: Sequence[Row], kinds: Sequence[str], name: str) -> dict[str, float]:
    """Each kind's mean over all sites that have it."""
    found = {kind: [row["kinds"][kind][name] for row in rows if kind in row["kinds"]] for kind in kinds}
    return {
        kind: sum(numbers) / len(numbers)
        for kind, values in found.items()
        if (numbers := [value for value in values if value is not None])
    }


def _kinds(sites: Sequence[Row], kinds: Sequence[str]) -> Iterator[str]:
    means = mean_by_kind(sites, kinds, "cosine")
    if len(means) > 1:
        ordered = sorted(means.items(), key=lambda pair: pair[1])
        listed = ", ".join(f"{kind} {value:.3f}" for kind, value in ordered)
        yield f"By kind of token, from most to least changed by a branch (mean cosine over sites): {listed}."


def mean_by_position(sites: Sequence[Row], name: str = "cosine") -> list[tuple[int, float]]:
    """For each position of the longest states, the mean over the sites that have it, where tokens were seen."""
    longest = max((len(row["positions"]["tokens"]) for row in sites), default=0)
    same = [row["positions"][name] for row in sites if len(row["positions"]["tokens"]) == longest]
    means = []
    for place, values in enumerate(zip(*same, strict=True)):
        numbers = [value for value in values if value is not None]
        if numbers:
            means.append((place, sum(numbers) / len(numbers)))
    return means


def _positions(sites: Sequence[Row]) -> Iterator[str]:
    means = mean_by_position(sites)
    if len(means) < 3:
        return
    low, high = min(means, key=lambda pair: pair[1]), max(means, key=lambda pair: pair[1])
    others = sorted(value for _, value in means[1:])
    yield (
        f"Along the {len(means)} positions the mean cosine runs from {low[1]:.3f} (position {low[0]}) to {high[1]:.3f} "
        f"(position {high[0]}); position 0 has {means[0][1]:.3f}, the median of the others is "
        f"{others[len(others) // 2]:.3f}."
    )


def _norms(sites: Sequence[Row], states: Sequence[Row]) -> Iterator[str]:
    trunk = [row["norm"] for row in states if row["norm"]]
    if len(trunk) < 2 or not sites:
        return
    third = max(1, len(sites) // 3)
    early, late = (sum(row["update"] for row in part) / len(part) for part in (sites[:third], sites[-third:]))
    yield (
        f"The stream's norm goes from {trunk[0]:.3g} to {trunk[-1]:.3g} ({trunk[-1] / trunk[0]:.2f}x, largest "
        f"{max(trunk):.3g}); a branch adds {early:.2f} of it in the first third of the depth, {late:.2f} in the last."
    )


def _massive(states: Sequence[Row]) -> Iterator[str]:
    if not states:
        return
    most = max(states, key=lambda row: row["ratio_most"])
    text = (
        f"The largest activation is {most['ratio_most']:.0f} times the median of its sample, before {most['name']}"
        if most["name"] != "output"
        else f"The largest activation is {most['ratio_most']:.0f} times the median of its sample, in the last state"
    )
    where = f", in channel {most['channel']} for {most['channel_share']:.0%} of the samples, at a {most['kind']} token"
    share = max(row["massive"] for row in states)
    yield f"{text}{where}; {NEVER if share == 0 else f'massive activations occur in {share:.0%} of the samples'}."


def _stability(study: Study) -> Iterator[str]:
    found = study.stability
    if found is None:
        yield f"How stable the ranking is cannot be told from {study.samples} samples and {len(study.sites)} sites."
        return
    half = found.halves
    yield (
        f"Rankings by two random halves of the {study.samples} samples agree by Spearman {half.spearman:.3f} (5 to 95 "
        f"%: {half.low:.3f} to {half.high:.3f}; Kendall {half.kendall:.3f})."
    )
    small = found.sizes[0]
    yield (
        f"{small.samples} samples rank the sites as all do by {small.spearman:.3f} ({small.low:.3f} to "
        f"{small.high:.3f}); the {found.top} most redundant are the same set in {found.kept:.0%} of bootstrap draws."
    )
