"""The page of an export: report.html from what report.json holds, without torch and without running anything.

Sections whose figures a report lacks are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html.parser import HTMLParser
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np

from compressor.deferred import told
from compressor.figures import METRICS
from compressor.page import Cell, Chart, Example, Gallery, Page, Part, Points, Prose, Section, Table, Tile
from compressor.report import LABELS

Json = dict[str, Any]

PAGE = "report.html"
INTERVALS = "Ranges are 95 % intervals."
# What the variants are, where a table lists them.
VARIANTS = {
    "original": "the model as it is, in float",
    "baseline": "the model as it is, built like the result",
    "result": "what this export made",
}
DONE = {"keep": "kept", "drop": "dropped", "merge": "tokens merged", "fuse": "fused"}
OF_A_REPORT = ("original", "baseline", "result")
SLOWEST = 99.5  # percentile of all runs at which the axis of latencies ends


def html(content: Json, shown: Mapping[str, str] | None = None) -> str:
    """The page as one HTML document.

    Args:
        content: what report.json holds.
        shown: pictures (as data: addresses) and texts of the samples that are answered differently, by their id.
    """
    return page(content, shown or {}).to_html()


def page(content: Json, shown: Mapping[str, str]) -> Page:
    """Everything on the page, as data."""
    found = (
        _notes(content),
        _variants(content),
        _factorial(content),
        _sites(content),
        _search(content),
        _scores(content),
        _states(content),
        _latencies(content),
        _examples(content, shown),
    )
    return Page(
        title=f"{content['model']['name']}, compressed",
        lead=list(_lead(content)),
        tiles=list(_tiles(content)),
        sections=[section for section in found if section is not None],
        environment=list(_environment(content)),
        command=content["command"],
    )


def shown_in(document: str) -> dict[str, str]:
    """The pictures and texts that an earlier page of the same export shows, by the samples' id."""
    reader = _Shown()
    reader.feed(document)
    return reader.found


class _Shown(HTMLParser):
    """Reads examples back: the data set is not at hand where an engine is built."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self.name: str | None = None
        self.quoting = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "article":
            self.name = given.get("data-name")
        elif tag == "img" and self.name is not None:
            self.found[self.name] = given.get("src") or ""
        self.quoting = tag == "blockquote"

    def handle_data(self, data: str) -> None:
        if self.quoting and self.name is not None:
            self.found[self.name] = self.found.get(self.name, "") + data

    def handle_endtag(self, tag: str) -> None:
        self.quoting = False
        self.name = None if tag == "article" else self.name


# ----------------------------------------------------------------------------------------------------- headline


def _lead(content: Json) -> Iterator[str]:
    settings, plan = content["settings"], content["plan"]
    forms = [_done(action) for action in plan["changes"].values()]
    kinds = ", ".join(f"{forms.count(form)} {form}" for form in dict.fromkeys(forms))
    count = len(content["model"]["sites"])
    precision = "float" if settings["int8"] is None else f"int8 ({settings['int8']})"
    yield f"{len(forms)} of {count} branches changed{': ' if kinds else ''}{kinds}."
    yield f"{_target(content)}, batch {settings['batch']}, {precision}. Plan: {plan['rule']}."
    quality = content["quality"]
    if quality is not None:
        judged = quality["figures"]["result"]["n"]
        metric, source = _capital(METRICS[quality["metric"]]), Path(content["data"]["source"]).name
        yield f"{metric}, on {judged} test samples of {source}."


def _target(content: Json) -> str:
    target = content["settings"]["target"]
    return f"onnxruntime, for {target}" if content["engine"].get("state") == "deferred" else str(target)


def _tiles(content: Json) -> Iterator[Tile]:
    latency, sizes, quality = content["latency"], content["sizes"], content["quality"]
    for name, over in content["speedup"].items():
        label = "Speed-up at int8" if name == "baseline" and len(content["speedup"]) > 1 else "Speed-up"
        yield Tile(label, f"{over['ratio']:.2f}×", f"{over['low']:.2f}–{over['high']:.2f}, over the {name}")
    start = next(name for name in OF_A_REPORT if name in latency)
    yield Tile(
        "Latency", f"{latency['result']['median']:.3g} ms", f"{latency[start]['median']:.3g} ms {start}, medians"
    )
    if quality is not None:
        label, unit = LABELS[quality["metric"]]
        figure, lost = quality["figures"]["result"], quality["loss"][start]
        yield Tile(
            _capital(label),
            _value(figure, unit),
            f"{_range(figure)}; {start} {_value(quality['figures'][start], unit)}",
        )
        yield Tile(
            "Loss",
            f"{lost['value']:+.2f} {_lost(content)}".rstrip(),
            f"{_range(lost, signed=True)}, against the {start}",
        )
    for label, key, unit in (
        ("ONNX file", "bytes", "B"),
        ("Parameters", "parameters", ""),
        ("Multiply-adds", "multiply_adds", ""),
    ):
        after, before = sizes["result"][key], sizes[start][key]
        share = f"{after / before:.0%} of {_scaled(before)}{unit}" if before else ""
        yield Tile(label, f"{_scaled(after)}{unit}", share)


def _notes(content: Json) -> Section | None:
    because = content["no_quality_because"]
    lines = [] if because is None else [f"No quality stated: {because}."]
    lines += [*content["notes"], *told(content["engine"])]
    return Section("To know first", [Points(lines)]) if lines else None


def _variants(content: Json) -> Section:
    names = [name for name in OF_A_REPORT if name in content["latency"]]
    prose = " ".join(f"{_capital(name)}: {VARIANTS[name]}." for name in names)
    table = Table(["", *names], list(_rows(content, names)), caption=INTERVALS)
    return Section("Gained and lost", [table, Prose(prose)])


def _rows(content: Json, names: Sequence[str]) -> Iterator[list[Cell]]:
    latency, sizes, quality = content["latency"], content["sizes"], content["quality"]
    if quality is not None:
        label, unit = LABELS[quality["metric"]]
        yield [_unit(label, unit), *(_cell(quality["figures"][name]) for name in names)]
        lost = [quality["loss"].get(name) for name in names]
        yield [
            _unit("loss of the result", _lost(content)),
            *(_cell(each, signed=True) if each else "" for each in lost),
        ]
        for key, label in (("agreement", "same answers, %"), ("divergence", "divergence")):
            if key in quality["label_free"] and key != quality["metric"]:
                found = quality["label_free"][key]
                places = 2 if key == "agreement" else 4
                yield [label, *([""] * (len(names) - 1)), _cell(found, places=places)]
    tails = [
        (f"{each['median']:.2f}", f"p90 {each['p90']:.2f}, p99 {each['p99']:.2f}") for each in map(latency.get, names)
    ]
    yield ["latency, ms", *tails]
    yield ["speed-up of the result", *(_times(content["speedup"].get(name)) for name in names)]
    yield ["parameters, M", *(f"{sizes[name]['parameters'] / 1e6:.2f}" for name in names)]
    yield ["multiply-adds, G", *(f"{sizes[name]['multiply_adds'] / 1e9:.3f}" for name in names)]
    yield ["ONNX file, MB", *(f"{sizes[name]['bytes'] / 1e6:.2f}" for name in names)]
    if any(sizes[name]["cache"] for name in names):
        yield ["cache, bytes a token", *(f"{sizes[name]['cache']}" for name in names)]


# ------------------------------------------------------------------------------------------------------ sections


def _factorial(content: Json) -> Section | None:
    factorial = content["factorial"]
    if factorial is None:
        return None
    from compressor.report_charts import bars

    cells = factorial["cells"]
    judged = content["quality"] is not None
    rows = [
        [name, (f"{cell['latency']['median']:.2f}", f"p90 {cell['latency']['p90']:.2f}"), _times(cell["speedup"])]
        + ([_cell(cell["figure"]), _cell(cell["loss"], signed=True) if cell["loss"] else ""] if judged else [])
        for name, cell in cells.items()
    ]
    headings = ["", "latency, ms", "speed-up", *(("quality", "loss, %") if judged else ())]
    products = {each["cells"][3]: each for each in factorial["interactions"] if each["cells"][0] == next(iter(cells))}
    speeds = [
        _bar(name, cell["speedup"], "ratio", "×") | ({"expected": _product(products[name])} if name in products else {})
        for name, cell in cells.items()
        if cell["speedup"]
    ]
    parts: list[Part] = [
        Points(factorial["conclusion"]),
        Chart(
            bars(speeds, title="times faster than dense float", form=".2~f", expected="product of each alone"),
            f"Speed-up of each cell of the factorial {factorial['where']}; the table below holds the figures.",
            f"Speed-ups {factorial['where']}. Diamonds: the product of each alone, where speed-ups would multiply.",
        ),
    ]
    if judged:
        lost = [_bar(name, cell["loss"], "value", " %") for name, cell in cells.items() if cell["loss"]]
        chart = bars(lost, title="loss against dense float, %", form="+.2~f")
        parts.append(Chart(chart, "Loss of quality of each cell; the table below holds the figures.", INTERVALS))
    parts.append(Table(headings, rows, caption=INTERVALS))
    changes = " changes: the compressed model before its tokens are merged." if "changes float" in cells else ""
    parts.append(Prose(f"dense: the model as it is. compressed: the result's plan.{changes}"))
    return Section("Compression and int8, alone and together", parts)


def _bar(name: str, figure: Json, key: str, unit: str) -> Json:
    text = f"{figure[key]:.2f}{unit}" if key == "ratio" else f"{figure[key]:+.2f}{unit}"
    group = "int8" if name.endswith("int8") else "float"
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
    return float(speed["change"]["ratio"] * speed["int8"]["ratio"])


def _sites(content: Json) -> Section | None:
    sites = content["model"]["sites"]
    if not sites:
        return None
    from compressor.report_charts import site_map

    labels = _labels([site["block"] for site in sites])
    changes, reasons = content["plan"]["changes"], content["plan"]["reasons"]
    rows = []
    for block, members in groupby(sites, key=lambda site: site["block"]):
        seen: list[str] = []
        for site in members:
            action = changes.get(site["name"], "keep")
            done, again = _done(action), seen.count(site["kind"])
            seen.append(site["kind"])
            rows.append(
                {
                    "block": labels[block],
                    "place": site["kind"] + (f" {again + 1}" if again else ""),
                    "site": site["name"],
                    "done": done,
                    "action": action,
                    "label": "" if done == "kept" else action.replace("merge:", "−").replace("low-rank:", "rank "),
                    "reason": reasons.get(site["name"], ""),
                }
            )
    counts = content["evidence"].get("tokens", {})
    first = {labels[site["block"]]: counts[site["name"]] for site in reversed(sites) if site["name"] in counts}
    tokens = {block: first[block] for block in dict.fromkeys(labels.values()) if block in first}
    alt = f"{len(changes)} of {len(sites)} branches along the depth of the model were changed: " + (
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


def _search(content: Json) -> Section | None:
    points = content["search"].get("front", [])
    if len(points) < 2:
        return None
    from compressor.report_charts import front

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


def _scores(content: Json) -> Section | None:
    kinds = {site["name"]: site["kind"] for site in content["model"]["sites"]}
    known = content["evidence"].get("sites", {})
    rows = [
        {"site": name, "kind": kinds[name], "cosine": row["cosine"], "effect": row["effect"]}
        for name, row in known.items()
        if row.get("cosine") is not None and row["effect"] is not None
    ]
    if len(rows) < 3:
        return None
    from compressor.report_charts import scatter

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


def _states(content: Json) -> Section | None:
    evidence = content["evidence"]
    if len(evidence.get("states", [])) < 3:
        return None
    from compressor.report_charts import heat_map

    names = evidence["states"]
    text = (
        f"Cosine similarity of the trunk's states before each branch, and of the last, over {evidence['samples']} "
        "calibration samples. A bright square on the diagonal is a stretch of the model that changes little."
    )
    chart = Chart(heat_map(names, evidence["similarity"]), f"Similarity of {len(names)} states with each other.")
    return Section("Similarity along the depth", [Prose(text), chart])


def _latencies(content: Json) -> Section:
    from compressor.report_charts import latencies

    factorial = content["factorial"]
    source = content["latency"] if factorial is None else {k: cell["latency"] for k, cell in factorial["cells"].items()}
    samples = {name: list(chain.from_iterable(each["samples_ms"])) for name, each in source.items()}
    # Each variant's own end, so that the slowest of a quick one do not hide behind the usual of a slow one.
    end = max(float(np.percentile(values, SLOWEST)) for values in samples.values())
    beyond = sum(value > end for values in samples.values() for value in values)
    total = sum(map(len, samples.values()))
    inputs = ", ".join(f"{name} {shape}" for name, shape in content["timed_inputs"].items())
    caption = (
        f"{total} runs on {inputs}, interleaved. Lines: medians. Slower than {end:.3g} ms and not drawn: {beyond}."
    )
    chart = Chart(latencies(samples, end), f"Distribution of the latency of {', '.join(samples)}.", caption)
    return Section("Latency", [chart])


def _examples(content: Json, shown: Mapping[str, str]) -> Section | None:
    quality = content["quality"]
    if quality is None or not quality["changed"]:
        return None
    start = "original" if "original" in quality["figures"] else "baseline"
    examples = [_example(each, start, shown.get(each["id"])) for each in quality["changed"]]
    agreement = quality["label_free"].get("agreement")
    often = "" if agreement is None else f" That happens in {100.0 - agreement['value']:.2f} % of the test samples."
    text = (
        f"Inputs that the {start} and the result put into different classes, those first of which it was surest.{often}"
    )
    return Section("Where answers differ", [Prose(text), Gallery(examples)])


def _example(changed: Json, start: str, seen: str | None) -> Example:
    label, picture = changed["label"], seen is not None and seen.startswith("data:image/")
    facts = [] if label is None else [("label", str(label))]
    for name, (answer, probability) in ((start, changed["before"]), ("result", changed["after"])):
        right = " ✓" if answer == label else ""
        facts.append((name, f"{answer} ({probability:.0%}){right}"))
    return Example(changed["id"], facts, picture=seen if picture else None, text=None if picture else seen)


def _environment(content: Json) -> Iterator[tuple[str, str]]:
    device = content["engine"].get("environment")
    places = [("", content["environment"])] if device is None else [("device: ", device), ("", content["environment"])]
    for prefix, found in places:
        for name, value in found.items():
            if isinstance(value, Mapping):
                yield from ((f"{prefix}{key}", str(inner)) for key, inner in value.items())
            elif value:
                yield f"{prefix}{name}", ", ".join(value) if isinstance(value, list) else str(value)
    yield "seconds taken", f"{content['seconds']:.0f}"


# ------------------------------------------------------------------------------------------------------- writing


def _done(action: str) -> str:
    """What happened to a branch, without the amount.

    >>> _done("drop"), _done("low-rank:8"), _done("merge:25%")
    ('dropped', 'low-rank', 'tokens merged')
    """
    form = action.partition(":")[0]
    return DONE.get(form, form)


def _scaled(count: int) -> str:
    """A count in three digits or so.

    >>> _scaled(950), _scaled(49_792), _scaled(5_717_416), _scaled(1_258_000_000)
    ('950 ', '49.8 k', '5.72 M', '1.26 G')
    """
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} "


def _lost(content: Json) -> str:
    """The unit of a loss."""
    metric = content["quality"]["metric"]
    return "%" if metric == "perplexity" else LABELS[metric][1]


def _value(figure: Json, unit: str) -> str:
    return f"{figure['value']:.2f}{' ' if unit else ''}{unit}"


def _range(figure: Json, *, signed: bool = False, places: int = 2) -> str:
    low, high = figure["low"], figure["high"]
    return f"{low:+.{places}f} to {high:+.{places}f}" if signed else f"{low:.{places}f}–{high:.{places}f}"


def _cell(figure: Json, *, signed: bool = False, places: int = 2) -> Cell:
    sign = "+" if signed else ""
    return f"{figure['value']:{sign}.{places}f}", _range(figure, signed=signed, places=places)


def _times(speedup: Json | None) -> Cell:
    return "" if speedup is None else (f"{speedup['ratio']:.2f}×", f"{speedup['low']:.2f}–{speedup['high']:.2f}")


def _unit(label: str, unit: str) -> str:
    return f"{label}, {unit}" if unit else label


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
