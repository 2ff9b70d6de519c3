"""The sections of an export's page: each from report.json's content, None where what it shows was not measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, groupby
from typing import Any

import numpy as np

from compressor.report.pages.formatting import INTERVALS, cell, done, times
from compressor.report.pages.html_page import Chart, Example, Gallery, Part, Points, Prose, Section, Table
from compressor.report.report import LABELS, what_is_timed

Json = dict[str, Any]

SLOWEST = 99.5  # percentile of all runs at which the axis of latencies ends


def factorial(content: Json) -> Section | None:
    """What compression and the precision gain and lose alone and together, as bars and table."""
    found = content["factorial"]
    if found is None:
        return None
    from compressor.report.pages.charts import bars

    cells = found["cells"]
    judged = content["quality"] is not None
    rows = [
        [name, (f"{each['latency']['median']:.2f}", f"p90 {each['latency']['p90']:.2f}"), times(each["speedup"])]
        + ([cell(each["figure"]), cell(each["loss"], signed=True) if each["loss"] else ""] if judged else [])
        for name, each in cells.items()
    ]
    headings = ["", "latency, ms", "speed-up", *(("quality", "loss, %") if judged else ())]
    products = {one["cells"][3]: one for one in found["interactions"] if one["cells"][0] == next(iter(cells))}
    speeds = [
        _bar(name, each["speedup"], "ratio", "×") | ({"expected": _product(products[name])} if name in products else {})
        for name, each in cells.items()
        if each["speedup"]
    ]
    parts: list[Part] = [
        Points(found["conclusion"]),
        Chart(
            bars(speeds, title="times faster than dense float", form=".2~f", expected="product of each alone"),
            f"Speed-up of each cell of the factorial {found['where']}; the table below holds the figures.",
            f"Speed-ups {found['where']}. Diamonds: the product of each alone, where speed-ups would multiply.",
        ),
    ]
    if judged:
        lost = [_bar(name, each["loss"], "value", " %") for name, each in cells.items() if each["loss"]]
        chart = bars(lost, title="loss against dense float, %", form="+.2~f")
        parts.append(Chart(chart, "Loss of quality of each cell; the table below holds the figures.", INTERVALS))
    parts.append(Table(headings, rows, caption=INTERVALS))
    changes = " changes: the compressed model before its tokens are merged." if "changes float" in cells else ""
    parts.append(Prose(f"dense: the model as it is. compressed: the result's plan.{changes}"))
    reduced = found["interactions"][0]["precision"]
    return Section(f"Compression and {reduced}, alone and together", parts)


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
    """The map of branches along the depth, with the tokens left where some are merged."""
    every = content["model"]["sites"]
    if not every:
        return None
    from compressor.report.pages.charts import site_map

    labels = _labels([site["block"] for site in every])
    changes, reasons = content["plan"]["changes"], content["plan"]["reasons"]
    rows = []
    for block, members in groupby(every, key=lambda site: site["block"]):
        seen: list[str] = []
        for site in members:
            action = changes.get(site["name"], "keep")
            form, again = done(action), seen.count(site["kind"])
            seen.append(site["kind"])
            rows.append(
                {
                    "block": labels[block],
                    "place": site["kind"] + (f" {again + 1}" if again else ""),
                    "site": site["name"],
                    "done": form,
                    "action": action,
                    "label": "" if form == "kept" else action.replace("merge:", "−").replace("low-rank:", "rank "),
                    "reason": reasons.get(site["name"], ""),
                }
            )
    counts = content["evidence"].get("tokens", {})
    first = {labels[site["block"]]: counts[site["name"]] for site in reversed(every) if site["name"] in counts}
    tokens = {block: first[block] for block in dict.fromkeys(labels.values()) if block in first}
    alt = f"{len(changes)} of {len(every)} branches along the depth of the model were changed: " + (
        ", ".join(f"{name} ({action})" for name, action in changes.items()) or "none"
    )
    caption = "Each block's branches from the input (left) to the output." + (
        f" Below: tokens that enter the block, of {max(tokens.values())}." if tokens else ""
    )
    chart = site_map(rows, list(dict.fromkeys(labels.values())), tokens)
    return Section("What was done where", [Chart(chart, alt, caption)])


def _labels(blocks: Sequence[str]) -> dict[str, str]:
    """Names of blocks without the part that all of them share.

    >>> _labels(["blocks.0", "blocks.1"]), _labels(["layers.0.blocks.0", "layers.1.blocks.0"])
    ({'blocks.0': '0', 'blocks.1': '1'}, {'layers.0.blocks.0': '0.0', 'layers.1.blocks.0': '1.0'})
    """
    names = list(dict.fromkeys(blocks))
    numbers = {name: ".".join(part for part in name.split(".") if part.isdigit()) for name in names}
    told_apart = len(set(numbers.values())) == len(names) and all(numbers.values())
    return numbers if told_apart else {name: name or "–" for name in names}


def search(content: Json) -> Section | None:
    """Loss against speed-up of the plans on the way of a search."""
    points = content["search"].get("front", [])
    if len(points) < 2:
        return None
    from compressor.report.pages.charts import front

    chosen, quality = content["search"]["chosen"], content["quality"]
    rows = [
        point
        | {
            "change": "as it is" if point["change"] is None else " ".join(point["change"]),
            "kind": "the chosen plan" if point["number"] == chosen else "a plan on the way",
        }
        for point in points
    ]
    measured = None
    if quality is not None:
        speed, lost = content["speedup"]["baseline"], quality["loss"]["baseline"]
        measured = {"predicted": speed["ratio"], "low": speed["low"], "high": speed["high"]}
        measured |= {"loss": lost["value"], "loss_low": lost["low"], "loss_high": lost["high"]}
    metric = "quality" if quality is None else LABELS[quality["metric"]][0]
    unit = content["search"]["prices"]["unit"]
    best = sum(point["efficient"] for point in points)
    end = "" if measured is None else ", the result by what was measured on test data, against the baseline"
    facts = (
        f"The search made {len(points) - 1} changes one after the other and {chosen} of them were taken. Plans on the "
        f"way are placed by the predicted speed-up (in {unit}) and the loss on validation data{end}. "
        f"{best} of {len(points)} are not beaten by another in both."
    )
    caption = "" if measured is None else INTERVALS
    chart = Chart(front(rows, measured, metric=metric), f"Loss against speed-up of {len(points)} plans.", caption)
    return Section("What speed costs", [Prose(facts), chart])


def scores(content: Json) -> Section | None:
    """Each branch's score against its measured effect, where both are known of three and more."""
    kinds = {site["name"]: site["kind"] for site in content["model"]["sites"]}
    known = content["evidence"].get("sites", {})
    rows = [
        {"site": name, "kind": kinds[name], "cosine": row["cosine"], "effect": row["effect"]}
        for name, row in known.items()
        if row.get("cosine") is not None and row["effect"] is not None
    ]
    if len(rows) < 3:
        return None
    from compressor.report.pages.charts import scatter

    rank = _rank_correlation([row["cosine"] for row in rows], [row["effect"] for row in rows])
    text = (
        "A score says how little a branch changes the states that pass it, the effect how far the model's output moves "
        f"when the branch alone is dropped. Their rank correlation here is {rank:+.2f}; where scores foretold effects "
        "it would be −1."
    )
    chart = Chart(scatter(rows), f"Measured effect against score of {len(rows)} branches.", "One mark for each branch.")
    return Section("Score and measured effect", [Prose(text), chart])


def _rank_correlation(left: Sequence[float], right: Sequence[float]) -> float:
    """Spearman's correlation; equal values are ranked in their order."""
    first, second = (np.argsort(np.argsort(np.asarray(side))).astype(np.float64) for side in (left, right))
    return float(np.corrcoef(first, second)[0, 1])


def states(content: Json) -> Section | None:
    """How similar the states along the depth are."""
    evidence = content["evidence"]
    if len(evidence.get("states", [])) < 3:
        return None
    from compressor.report.pages.charts import heat_map

    names = evidence["states"]
    text = (
        f"Cosine similarity of the trunk's states before each branch, and of the last, over {evidence['samples']} "
        "calibration samples. A bright square on the diagonal is a stretch of the model that changes little."
    )
    chart = Chart(heat_map(names, evidence["similarity"]), f"Similarity of {len(names)} states with each other.")
    return Section("Similarity along the depth", [Prose(text), chart])


def latencies(content: Json) -> Section | None:
    """The distributions of all latencies: of the factorial's cells, or else of the report's variants."""
    if not content["latency"]:
        return None
    from compressor.report.pages.charts import distributions

    cells = content["factorial"]
    source = content["latency"] if cells is None else {k: each["latency"] for k, each in cells["cells"].items()}
    samples = {name: list(chain.from_iterable(each["samples_ms"])) for name, each in source.items()}
    # A few stragglers would squeeze all others into a corner.
    end = max(float(np.percentile(values, SLOWEST)) for values in samples.values())
    beyond = sum(value > end for values in samples.values() for value in values)
    total = sum(map(len, samples.values()))
    inputs = ", ".join(f"{name} {shape}" for name, shape in content["timed_inputs"].items())
    if content.get("generation"):
        inputs = what_is_timed(content["generation"])
    caption = (
        f"{total} runs on {inputs}, interleaved. Lines: medians. Slower than {end:.3g} ms and not drawn: {beyond}."
    )
    chart = Chart(distributions(samples, end), f"Distribution of the latency of {', '.join(samples)}.", caption)
    return Section("Latency", [chart])


def examples(content: Json, shown: Mapping[str, str]) -> Section | None:
    """Samples that are answered differently, with what people see of them."""
    quality = content["quality"]
    if quality is None or not quality["changed"]:
        return None
    start = "original" if "original" in quality["figures"] else "baseline"
    found = [_example(each, start, shown.get(each["id"])) for each in quality["changed"]]
    agreement = quality["label_free"].get("agreement")
    often = "" if agreement is None else f" That happens in {100.0 - agreement['value']:.2f} % of the test samples."
    text = (
        f"Inputs that the {start} and the result put into different classes, those first of which it was surest.{often}"
    )
    return Section("Where answers differ", [Prose(text), Gallery(found)])


def _example(changed: Json, start: str, seen: str | None) -> Example:
    label, picture = changed["label"], seen is not None and seen.startswith("data:image/")
    facts = [] if label is None else [("label", str(label))]
    for name, (answer, probability) in ((start, changed["before"]), ("result", changed["after"])):
        right = " ✓" if answer == label else ""
        facts.append((name, f"{answer} ({probability:.0%}){right}"))
    return Example(changed["id"], facts, picture=seen if picture else None, text=None if picture else seen)
