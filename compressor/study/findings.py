"""A study in plain sentences: what a reader wants to know first, each with its numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from compressor.study.dataset_agreement import short

if TYPE_CHECKING:
    from compressor.study.study import Study

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
    yield from _agreements(study)


def cosine(value: float) -> str:
    """A cosine in three digits, or its distance from 1 where these would hide it.

    >>> cosine(0.9183), cosine(0.99996)
    ('0.918', '1 - 4.0e-05')
    """
    return f"{value:.3f}" if 1.0 - value >= 5e-4 or value >= 1.0 else f"1 - {1.0 - value:.1e}"


def _depth(sites: Sequence[Row], blocks: Sequence[Row]) -> Iterator[str]:
    if not sites:
        return
    most, *_, least = sorted(sites, key=lambda row: row["cosine"]) if len(sites) > 1 else [sites[0]] * 2
    yield (
        f"The branch that changes the stream least is {least['name']} (cosine of before and after "
        f"{cosine(least['cosine'])}), the one that changes it most {most['name']} ({cosine(most['cosine'])})."
    )
    if len(blocks) >= 3:
        third = max(1, len(blocks) // 3)
        parts = blocks[:third], blocks[third:-third], blocks[-third:]
        early, middle, late = (cosine(sum(row["cosine"] for row in part) / max(len(part), 1)) for part in parts)
        yield (
            f"Over depth, a block's input and output are similar by {early} in the first third, {middle} in "
            f"the middle and {late} in the last third."
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
        f"Attention changes the stream less than the MLP in {less} of {len(pairs)} blocks (mean cosine "
        f"{cosine(means[0])} against {cosine(means[1])})."
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
        listed = ", ".join(f"{kind} {cosine(value)}" for kind, value in ordered)
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
        f"Along the {len(means)} positions the mean cosine runs from {cosine(low[1])} (position {low[0]}) to "
        f"{cosine(high[1])} (position {high[0]}); position 0 has {cosine(means[0][1])}, the median of the others is "
        f"{cosine(others[len(others) // 2])}."
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
    place = "in the last state" if most["name"] == "output" else f"before {most['name']}"
    text = f"The largest activation is {most['ratio_most']:.0f} times the median of its sample, {place}"
    where = f", in channel {most['channel']} for {most['channel_share']:.0%} of the samples"
    where += f", at a token of kind {most['kind']}"
    share = max(row["massive"] for row in states)
    yield f"{text}{where}; {NEVER if share == 0 else f'massive activations occur in {share:.0%} of the samples'}."


def _stability(study: Study) -> Iterator[str]:
    found = study.stability
    if found is None:
        yield f"How stable the ranking is cannot be told from {study.samples} samples and {len(study.sites)} sites."
        return
    half, small = found.halves, found.sizes[0]
    yield (
        f"Rankings by two random halves of the {study.samples} samples agree by Spearman {half.spearman:.3f} (5 to 95 "
        f"%: {half.low:.3f} to {half.high:.3f}; Kendall {half.kendall:.3f}), of {small.samples} samples and all by "
        f"{small.spearman:.3f} ({small.low:.3f} to {small.high:.3f}); the {found.top} most redundant are the same set "
        f"in {found.kept:.0%} of bootstrap draws."
    )


def _agreements(study: Study) -> Iterator[str]:
    """Of the study's own data with each other set; the other pairs are in the JSON and on the page."""
    for each in (pair for pair in study.agreements if pair.first == study.data["source"]):
        verdict = "no less than" if each.alike else "less than"
        kinds = ", ".join(f"{kind} alone {value:.3f}" for kind, value in each.kinds.items() if len(each.kinds) > 1)
        shared = ", ".join(f"{same} of {count}" for count, same in each.shared.items())
        yield (
            f"Rankings by {short(each.first)} ({each.samples[0]} samples) and {short(each.second)} ({each.samples[1]}) "
            f"agree by Spearman {each.spearman:.3f} (5 to 95 %: {each.low:.3f} to {each.high:.3f}; Kendall "
            f"{each.kendall:.3f}){f', {kinds}' if kinds else ''}, {verdict} random mixtures of the two do "
            f"({each.mixed:.3f}, 95 % above {each.floor:.3f}); of the most redundant, {shared} are the same."
        )
