"""The sections of an export's page, each from the content of report.json; None if its data was not measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, groupby
from typing import Any

import numpy as np

from compressor.quality.metrics import METRICS
from compressor.report.pages.formatting import INTERVALS, action_done, cell, speedup_cell
from compressor.report.pages.html_page import Chart, Example, Gallery, Part, Points, Prose, Section, Table
from compressor.report.report import describe_calls

Json = dict[str, Any]

SLOWEST = 99.5  # percentile of the latencies of a variant at which the axis of the chart ends


def factorial(content: Json) -> Section | None:
    """Return the section on the factorial experiment: conclusion, charts and table."""
    measured = content["factorial"]
    if measured is None:
        return None
    from compressor.report.pages.charts import bars

    cells = measured["cells"]
    judged = content["quality"] is not None
    rows = [
        [
            name,
            (f"{facts['latency']['median']:.2f}", f"p90 {facts['latency']['p90']:.2f}"),
            speedup_cell(facts["speedup"]),
        ]
        + ([cell(facts["figure"]), cell(facts["loss"], signed=True) if facts["loss"] else ""] if judged else [])
        for name, facts in cells.items()
    ]
    headings = ["", "latency, ms", "speed-up", *(("quality", "loss, %") if judged else ())]
    products = {one["cells"][3]: one for one in measured["interactions"] if one["cells"][0] == next(iter(cells))}
    speeds = [
        _bar(name, facts["speedup"], "ratio", "×")
        | ({"expected": _product(products[name])} if name in products else {})
        for name, facts in cells.items()
        if facts["speedup"]
    ]
    parts: list[Part] = [
        Points(measured["conclusion"]),
        Chart(
            bars(speeds, title="speed-up over dense float", form=".2~f", expected="product of the separate speed-ups"),
            f"Speed-up of each cell of the factorial {measured['where']}; the table below lists the figures.",
            f"Speed-ups {measured['where']}. Diamonds: product of the separate speed-ups.",
        ),
    ]
    if judged:
        losses = [_bar(name, facts["loss"], "value", " %") for name, facts in cells.items() if facts["loss"]]
        chart = bars(losses, title="loss against dense float, %", form="+.2~f")
        parts.append(Chart(chart, "Loss of quality of each cell; the table below lists the figures.", INTERVALS))
    parts.append(Table(headings, rows, caption=f"Speed-ups and losses are against dense float. {INTERVALS}"))
    changes = " changes: the compressed model without token merging." if "changes float" in cells else ""
    parts.append(Prose(f"dense: the unchanged model. compressed: the model with the plan of the result.{changes}"))
    reduced = measured["interactions"][0]["precision"]
    return Section(f"Compression and {reduced}, separately and combined", parts)


def _bar(name: str, figure: Json, key: str, unit: str) -> Json:
    text = f"{figure[key]:.2f}{unit}" if key == "ratio" else f"{figure[key]:+.2f}{unit}"
    group = name.rpartition(" ")[2]
    return {
        "name": name,
        "value": figure[key],
        "low": figure["low"],
        "high": figure["high"],
        "group": group,
        "text": text,
    }


def _product(interaction: Json) -> float:
    speed = interaction["speedup"]
    return float(speed["change"]["ratio"] * speed[interaction["precision"]]["ratio"])


def sites(content: Json) -> Section | None:
    """Return the section with the map of branches over depth, and the numbers of tokens if some are merged."""
    all_sites = content["model"]["sites"]
    if not all_sites:
        return None
    from compressor.report.pages.charts import site_map

    labels = _labels([site["block"] for site in all_sites])
    changes, reasons = content["plan"]["changes"], content["plan"]["reasons"]
    rows = []
    for block, members in groupby(all_sites, key=lambda site: site["block"]):
        kinds: list[str] = []
        for site in members:
            action = changes.get(site["name"], "keep")
            form, earlier = action_done(action), kinds.count(site["kind"])
            kinds.append(site["kind"])
            rows.append(
                {
                    "block": labels[block],
                    "place": site["kind"] + (f" {earlier + 1}" if earlier else ""),
                    "site": site["name"],
                    "done": form,
                    "action": action,
                    "label": "" if form == "kept" else action.replace("merge:", "−").replace("low-rank:", "rank "),
                    "reason": reasons.get(site["name"], ""),
                }
            )
    counts = content["evidence"].get("tokens", {})
    first = {labels[site["block"]]: counts[site["name"]] for site in reversed(all_sites) if site["name"] in counts}
    tokens = {block: first[block] for block in dict.fromkeys(labels.values()) if block in first}
    alt = f"{len(changes)} of {len(all_sites)} branches of the model were changed: " + (
        ", ".join(f"{name} ({action})" for name, action in changes.items()) or "none"
    )
    caption = "The branches of each block, from the input (left) to the output (right)." + (
        f" Below: number of tokens at the input of each block, at most {max(tokens.values())}." if tokens else ""
    )
    chart = site_map(rows, list(dict.fromkeys(labels.values())), tokens)
    return Section("Changes by block", [Chart(chart, alt, caption)])


def _labels(blocks: Sequence[str]) -> dict[str, str]:
    """Return short labels of blocks: the numbers in their names, or the names if the numbers are not unique.

    >>> _labels(["blocks.0", "blocks.1"]), _labels(["layers.0.blocks.0", "layers.1.blocks.0"])
    ({'blocks.0': '0', 'blocks.1': '1'}, {'layers.0.blocks.0': '0.0', 'layers.1.blocks.0': '1.0'})
    """
    names = list(dict.fromkeys(blocks))
    numbers = {name: ".".join(part for part in name.split(".") if part.isdigit()) for name in names}
    unique = len(set(numbers.values())) == len(names) and all(numbers.values())
    return numbers if unique else {name: name or "–" for name in names}


def search(content: Json) -> Section | None:
    """Return the section on the plans of a search: loss against speed-up."""
    points = content["search"].get("front", [])
    if len(points) < 2:
        return None
    from compressor.report.pages.charts import front

    chosen, quality = content["search"]["chosen"], content["quality"]
    rows = [
        point
        | {
            "change": "unchanged" if point["change"] is None else " ".join(point["change"]),
            "kind": "chosen plan" if point["number"] == chosen else "plan of the search",
        }
        for point in points
    ]
    measured = None
    if quality is not None:
        speed, loss = content["speedup"]["baseline"], quality["loss"]["baseline"]
        measured = {"predicted": speed["ratio"], "low": speed["low"], "high": speed["high"]}
        measured |= {"loss": loss["value"], "loss_low": loss["low"], "loss_high": loss["high"]}
    metric = "quality" if quality is None else METRICS[quality["metric"]].label
    unit = content["search"]["prices"]["unit"]
    best = sum(point["efficient"] for point in points)
    end = "" if measured is None else " The result is shown with its measured speed-up and its loss on test data."
    facts = (
        f"The search made {len(points) - 1} changes one after the other; the chosen plan has the first {chosen}. Plans "
        f"are shown with their predicted speed-up (cost in {unit}) and their loss on validation data.{end} {best} of "
        f"{len(points)} plans are Pareto-efficient."
    )
    caption = "" if measured is None else INTERVALS
    chart = Chart(front(rows, measured, metric=metric), f"Loss against speed-up of {len(points)} plans.", caption)
    return Section("Loss against speed-up", [Prose(facts), chart])


def scores(content: Json) -> Section | None:
    """Return the section on scores and measured effects; None if fewer than three branches have both."""
    kinds = {site["name"]: site["kind"] for site in content["model"]["sites"]}
    evidence = content["evidence"].get("sites", {})
    rows = [
        {"site": name, "kind": kinds[name], "cosine": row["cosine"], "effect": row["effect"]}
        for name, row in evidence.items()
        if row.get("cosine") is not None and row["effect"] is not None
    ]
    if len(rows) < 3:
        return None
    from compressor.report.pages.charts import scatter

    rank = _rank_correlation([row["cosine"] for row in rows], [row["effect"] for row in rows])
    text = (
        "The score is the cosine similarity of a branch's input and output. The effect is the divergence of the "
        f"model's output when only that branch is dropped. {_prediction(rank)}"
    )
    chart = Chart(scatter(rows), f"Measured effect against score of {len(rows)} branches.", "One mark per branch.")
    return Section("Score and measured effect", [Prose(text), chart])


def _prediction(rank: float | None) -> str:
    if rank is None:
        return "All scores or all effects are equal, so they have no rank correlation."
    return (
        f"Their rank correlation is {rank:+.2f}; a value of −1 means that the scores predict the order of the effects "
        "exactly."
    )


def _rank_correlation(left: Sequence[float], right: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation; ties have their mean rank. None if all values of a side are equal."""
    if min(np.ptp(left), np.ptp(right)) == 0.0:
        return None
    return float(np.corrcoef(_ranks(left), _ranks(right))[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    _, place, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    mean_ranks = np.cumsum(counts) - (counts - 1) / 2
    return np.asarray(mean_ranks[place], dtype=np.float64)


def states(content: Json) -> Section | None:
    """Return the section on the similarity of the trunk states over depth."""
    evidence = content["evidence"]
    if len(evidence.get("states", [])) < 3:
        return None
    from compressor.report.pages.charts import heat_map

    names = evidence["states"]
    text = (
        f"Cosine similarity of the trunk states before each branch, and of the last state, over {evidence['samples']} "
        "calibration samples. A bright square on the diagonal is a span of branches that changes the states little."
    )
    chart = Chart(heat_map(names, evidence["similarity"]), f"Similarity of {len(names)} states with each other.")
    return Section("Similarity along the depth", [Prose(text), chart])


def latencies(content: Json) -> Section | None:
    """Return the section on the latency distributions of the factorial's cells, or else of the variants."""
    if not content["latency"]:
        return None
    from compressor.report.pages.charts import distributions

    cells = content["factorial"]
    source = content["latency"] if cells is None else {k: facts["latency"] for k, facts in cells["cells"].items()}
    samples = {name: list(chain.from_iterable(latency["samples_ms"])) for name, latency in source.items()}
    # Outliers would compress the axis.
    end = max(float(np.percentile(values, SLOWEST)) for values in samples.values())
    beyond = sum(value > end for values in samples.values() for value in values)
    total = sum(map(len, samples.values()))
    inputs = ", ".join(f"{name} {shape}" for name, shape in content["timed_inputs"].items())
    if content.get("generation"):
        inputs = describe_calls(content["generation"])
    caption = f"{total} interleaved runs on {inputs}. Lines: medians. Slower than {end:.3g} ms and not drawn: {beyond}."
    chart = Chart(distributions(samples, end), f"Distribution of the latency of {', '.join(samples)}.", caption)
    return Section("Latency", [chart])


def examples(content: Json, shown: Mapping[str, str]) -> Section | None:
    """Return the section on samples whose predicted class changed, with previews of the samples."""
    quality = content["quality"]
    if quality is None or not quality["changed"]:
        return None
    start = "original" if "original" in quality["figures"] else "baseline"
    names = content["model"].get("id2label") or {}
    gallery = Gallery([_example(changed, start, shown.get(changed["id"]), names) for changed in quality["changed"]])
    agreement = quality["label_free"].get("agreement")
    share = "" if agreement is None else f" These are {100.0 - agreement['value']:.2f} % of the test samples."
    text = (
        f"Test samples for which the {start} and the result predict different classes.{share} Shown are those with the "
        f"largest regret: the {start}'s probability of its own class minus that of the result's class."
    )
    return Section("Changed predictions", [Prose(text), gallery])


def _example(changed: Json, start: str, preview: str | None, names: Mapping[str, str]) -> Example:
    """Return a sample with its label and both predictions, by the names of the classes where the model has them."""
    label, picture = changed["label"], preview is not None and preview.startswith("data:image/")
    facts = [] if label is None else [("label", names.get(str(label), str(label)))]
    for name, (answer, probability) in ((start, changed["before"]), ("result", changed["after"])):
        right = " ✓" if answer == label else ""
        facts.append((name, f"{names.get(str(answer), answer)} ({probability:.0%}){right}"))
    return Example(changed["id"], facts, picture=preview if picture else None, text=None if picture else preview)
