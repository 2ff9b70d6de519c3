"""The findings of a study as plain sentences with numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from compressor.study.dataset_agreement import short

if TYPE_CHECKING:
    from compressor.study.study import Study

Row = Mapping[str, Any]

ROLES = ("attention", "mlp")
NEVER = "no activation is massive (above 100 and above 1,000 times the median)"


def sentences(study: Study) -> Iterator[str]:
    """Yield five to eight sentences, from depth to data sets; findings without data for this model are left out."""
    sites, blocks, states = study.site_rows(), study.block_rows(), study.state_rows()
    scored = [row for row in sites if row["cosine"] is not None]
    yield from _depth(scored, [row for row in blocks if row["cosine"] is not None])
    yield from _roles(scored)
    yield from _kinds(scored, study.found.kinds)
    yield from _positions(scored)
    yield from _norms(scored, states)
    yield from _massive(states)
    yield from _stability(study)
    yield from _agreements(study)


def cosine(value: float) -> str:
    """Format a cosine with three digits, or as a difference from 1 if it would round to 1.

    >>> cosine(0.9183), cosine(0.99996)
    ('0.918', '1 - 4.0e-05')
    """
    return f"{value:.3f}" if 1.0 - value >= 5e-4 or value >= 1.0 else f"1 - {1.0 - value:.1e}"


def _depth(sites: Sequence[Row], blocks: Sequence[Row]) -> Iterator[str]:
    if not sites:
        return
    most, *_, least = sorted(sites, key=lambda row: row["cosine"]) if len(sites) > 1 else [sites[0]] * 2
    yield (
        f"The branch that changes the residual stream least is {least['name']} (cosine of its input and output "
        f"{cosine(least['cosine'])}); the branch that changes it most is {most['name']} ({cosine(most['cosine'])})."
    )
    if len(blocks) >= 3:
        third = max(1, len(blocks) // 3)
        parts = blocks[:third], blocks[third:-third], blocks[-third:]
        early, middle, late = (cosine(sum(row["cosine"] for row in part) / max(len(part), 1)) for part in parts)
        yield (
            f"Over depth, the mean cosine of a block's input and output is {early} in the first third, {middle} in the "
            f"middle third and {late} in the last third."
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
        f"Attention changes the residual stream less than the MLP in {less} of {len(pairs)} blocks (mean cosine "
        f"{cosine(means[0])} against {cosine(means[1])})."
    )


def mean_by_kind(rows: Sequence[Row], kinds: Sequence[str], name: str) -> dict[str, float]:
    """Return the mean of a statistic for each kind of token, over all sites with such tokens.

    Args:
        rows: the rows of the sites.
        kinds: the kinds of tokens.
        name: the statistic: ``cosine``, ``update`` or ``norm``.
    """
    by_kind = {kind: [row["kinds"][kind][name] for row in rows if kind in row["kinds"]] for kind in kinds}
    return {
        kind: sum(numbers) / len(numbers)
        for kind, values in by_kind.items()
        if (numbers := [value for value in values if value is not None])
    }


def _kinds(sites: Sequence[Row], kinds: Sequence[str]) -> Iterator[str]:
    means = mean_by_kind(sites, kinds, "cosine")
    if len(means) > 1:
        ordered = sorted(means.items(), key=lambda pair: pair[1])
        listed = ", ".join(f"{kind} {cosine(value)}" for kind, value in ordered)
        yield f"Mean cosine over sites by kind of token, from most to least changed: {listed}."


def mean_by_position(sites: Sequence[Row], name: str = "cosine") -> list[tuple[int, float]]:
    """Return pairs of position and mean over sites, for positions with tokens.

    The sites with the most positions are averaged; others, with fewer tokens, are left out.
    """
    longest = max((len(row["positions"]["tokens"]) for row in sites), default=0)
    same = [row["positions"][name] for row in sites if len(row["positions"]["tokens"]) == longest]
    means = []
    for position, values in enumerate(zip(*same, strict=True)):
        numbers = [value for value in values if value is not None]
        if numbers:
            means.append((position, sum(numbers) / len(numbers)))
    return means


def _positions(sites: Sequence[Row]) -> Iterator[str]:
    means = mean_by_position(sites)
    if len(means) < 3:
        return
    low, high = min(means, key=lambda pair: pair[1]), max(means, key=lambda pair: pair[1])
    others = sorted(value for _, value in means[1:])
    yield (
        f"Over {len(means)} positions, the mean cosine ranges from {cosine(low[1])} (position {low[0]}) to "
        f"{cosine(high[1])} (position {high[0]}). It is {cosine(means[0][1])} at position 0; the median of the other "
        f"positions is {cosine(others[len(others) // 2])}."
    )


def _norms(sites: Sequence[Row], states: Sequence[Row]) -> Iterator[str]:
    trunk = [row["norm"] for row in states if row["norm"]]
    if len(trunk) < 2 or not sites:
        return
    third = max(1, len(sites) // 3)
    early, late = (sum(row["update"] for row in part) / len(part) for part in (sites[:third], sites[-third:]))
    yield (
        f"The norm of the residual stream goes from {trunk[0]:.3g} to {trunk[-1]:.3g} ({trunk[-1] / trunk[0]:.2f}x, "
        f"maximum {max(trunk):.3g}). The mean relative update of a branch is {early:.2f} in the first third of the "
        f"depth and {late:.2f} in the last third."
    )


def _massive(states: Sequence[Row]) -> Iterator[str]:
    if not states:
        return
    most = max(states, key=lambda row: row["ratio_most"])
    state = "in the last state" if most["name"] == "output" else f"before {most['name']}"
    text = f"The largest activation is {most['ratio_most']:.0f} times the median of its sample, {state}"
    details = f", in channel {most['channel']} for {most['channel_share']:.0%} of the samples"
    details += f", at a token of kind {most['kind']}"
    share = max(row["massive"] for row in states)
    yield f"{text}{details}; {NEVER if share == 0 else f'massive activations occur in {share:.0%} of the samples'}."


def _stability(study: Study) -> Iterator[str]:
    stability = study.stability
    if stability is None and study.samples >= 4 and len(study.sites) >= 3:
        yield "The stability of the ranking was not computed: the scores of all sites are equal, so they rank none."
        return
    if stability is None:
        yield (
            f"The stability of the ranking was not computed: {study.samples} samples and {len(study.sites)} sites are "
            "too few."
        )
        return
    half, small = stability.halves, stability.sizes[0]
    yield (
        f"The rankings by two random halves of the {study.samples} samples have a Spearman correlation of "
        f"{half.spearman:.3f} (5 to 95 %: {half.low:.3f} to {half.high:.3f}; Kendall {half.kendall:.3f}); those by "
        f"{small.samples} samples and by all have {small.spearman:.3f} ({small.low:.3f} to {small.high:.3f}). The "
        f"{stability.top} most redundant sites are the same set in {stability.kept:.0%} of bootstrap draws."
    )


def _agreements(study: Study) -> Iterator[str]:
    """Yield a sentence for each other data set compared with the study's own; the JSON and the page list all pairs."""
    if study.against and not study.agreements:
        yield (
            f"The rankings by {', '.join(map(short, study.against))} were not compared: {len(study.sites)} sites are "
            "too few."
        )
    for pair in (pair for pair in study.agreements if pair.first == study.data["source"]):
        verdict = "no less than" if pair.alike else "less than"
        kinds = ", ".join(f"{kind} alone {value:.3f}" for kind, value in pair.kinds.items() if len(pair.kinds) > 1)
        shared = ", ".join(f"{same} of {count}" for count, same in pair.shared.items())
        yield (
            f"Rankings by {short(pair.first)} ({pair.samples[0]} samples) and {short(pair.second)} ({pair.samples[1]} "
            f"samples) have a Spearman correlation of {pair.spearman:.3f} (5 to 95 %: {pair.low:.3f} to "
            f"{pair.high:.3f}; Kendall {pair.kendall:.3f}{f'; {kinds}' if kinds else ''}). They agree {verdict} random "
            f"mixtures of the two data sets do (mean {pair.mixed:.3f}, 95 % above {pair.floor:.3f}). Of the most "
            f"redundant sites, {shared} are the same."
        )
