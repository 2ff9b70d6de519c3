"""The tables of benchmarks/smollm2.py: published plans on a trained language model, healing, precisions and engines."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tables_tokens import interval

Row = dict[str, Any]

RESULTS = Path(__file__).parent / "results" / "smollm2.json"
ORIGINAL = "original"
CLAIMED = "attention 50%"  # the plan of the published sentence
METHODS = {
    ("cosine", "drop"): "cosine (LLM-Drop)",
    ("output", "drop"): "effect on the output",
    ("angular", "replaceme"): "blocks in a row by the angle at the last token, linear map (ReplaceMe)",
    ("span", "replaceme"): "blocks in a row by the cosine of all tokens, linear map (ReplaceMe)",
}
TARGETS = {
    "onnxruntime": "ONNX Runtime",
    "onnxruntime_fused": "ONNX Runtime, fused",
    "gguf": "llama.cpp",
    "openvino": "OpenVINO",
    "torch": "torch (AOTInductor)",
}
PRECISIONS = {
    "fp32": "float",
    "int8": "int8",
    "int8-dynamic": "int8",
    "int8-weight-only": "int8 weights",
    "int4": "int4",
}
PARTS = {"first": "prompt", "token": "further token"}


def smollm2() -> str | None:
    """Return the tables, or None without results."""
    return smollm2_table(json.loads(RESULTS.read_text())) if RESULTS.exists() else None


def smollm2_table(found: Row) -> str:
    """Return the tables of those parts that were measured, and the conditions.

    Args:
        found: the results.
    """
    parts = {
        "quality": _quality,
        "searched": _searched,
        "healing": _healing,
        "factorial": _factorial,
        "generation": _generation,
        "timing": _timing,
        "products": _products,
    }
    lines = [line for part, table in parts.items() if part in found for line in ("", *table(found))]
    return "\n".join([*lines[1:], "", *_facts(found)])


def _table(*headings: str) -> Iterator[str]:
    yield f"| {' | '.join(headings)} |"
    yield f"|{'---|' * len(headings)}"


def _line(*values: str) -> str:
    return f"| {' | '.join(values)} |"


def _quality(found: Row) -> Iterator[str]:
    prompts = found["prompts"]
    equal = f"greedy texts equal for {prompts['new']} tokens"
    yield from _table("layers (branches changed)", "chosen by", "perplexity", "lost, %", "same next token, %", equal,
                      "equal tokens before another", "parameters", "cache per token")  # fmt: skip
    for row in found["quality"].values():
        yield _line(*_named(row), *_measured(row, prompts["count"]))


def _searched(found: Row) -> Iterator[str]:
    yield from _table("`--drop auto` as fast as", "changes", "predicted speed-up of both", "measured, both",
                      "lost, %", "instead of", "same next token, %", "instead of", "parameters",
                      "cache per token")  # fmt: skip
    for row in found["searched"].values():
        other, predicted, speeds = found["quality"][row["equal"]], row["predicted"], row["speedups"]
        yield _line(row["equal"], _kinds_changed(row["changes"]),
                    f"{predicted['auto']:.2f}x, {predicted[row['equal']]:.2f}x",
                    f"{_times(speeds['auto'])}, {_times(speeds[row['equal']])}", _lost(row["loss"]),
                    _lost(other["loss"]), f"{row['agreement']['value']:.1f}", f"{other['agreement']['value']:.1f}",
                    f"{row['parameters'] / 1e6:.1f} M", f"{row['cache_bytes_per_token']:,} B")  # fmt: skip


def _kinds_changed(changes: Mapping[str, str]) -> str:
    """Count the changes by action and kind of branch.

    >>> _kinds_changed({"layers.1.self_attn": "drop", "layers.2.mlp": "linear", "layers.3.mlp": "linear"})
    '1 self_attn drop, 2 mlp linear'
    """
    counts = Counter(f"{site.rpartition('.')[2]} {action}" for site, action in changes.items())
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _named(row: Row) -> tuple[str, str]:
    if not row["changes"]:
        return ORIGINAL, "–"
    return f"{row['kind']}, {row['percent']} % ({len(row['changes'])})", METHODS[row["metric"], row["action"]]


def _measured(row: Row, prompts: int) -> tuple[str, ...]:
    leading = row["leading"]
    return (
        f"{row['perplexity']['value']:.2f}",
        _lost(row["loss"]) if row["changes"] else "–",
        f"{row['agreement']['value']:.1f}",
        f"{row['equal_texts']} of {prompts}",
        f"{leading['value']:.1f} ({leading['low']:.1f}–{leading['high']:.1f})",
        f"{row['parameters'] / 1e6:.1f} M",
        f"{row['cache_bytes_per_token']:,} B",
    )


def _lost(loss: Mapping[str, float]) -> str:
    """Format a loss in percent; a large one as the factor of the perplexity.

    >>> _lost({"value": 12.0, "low": 11.0, "high": 13.0}), _lost({"value": 9900.0, "low": 8900.0, "high": 11900.0})
    ('+12.00 (+11.00 to +13.00)', '100x (90x to 120x)')
    """
    if loss["value"] < 1000:
        return interval(loss)
    value, low, high = (f"{1 + loss[key] / 100:,.0f}x" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _healing(found: Row) -> Iterator[str]:
    yield from _table("healed", "method", "seconds", "steps", "lost before, %", "lost after, %", "same next token, %",
                      "of the lost log-likelihood won back")  # fmt: skip
    for row in found["healing"].values():
        before, healed = found["quality"][row["design"]], row["healed"]
        share = f"{_won_back(before, row, found['quality'][ORIGINAL]):.0%}" if healed["kept"] else "rolled back"
        yield _line(row["design"], row["method"], f"{healed['seconds']:.0f}", str(healed["sample_steps"]),
                    _lost(before["loss"]), _lost(row["loss"]),
                    f"{before['agreement']['value']:.1f} → {row['agreement']['value']:.1f}", share)  # fmt: skip


def _won_back(before: Row, after: Row, original: Row) -> float:
    """Return the share of the increase of the negative log-likelihood a token that healing removed."""
    from math import log

    lost, left = (log(row["perplexity"]["value"] / original["perplexity"]["value"]) for row in (before, after))
    return 1.0 - left / lost


def _factorial(found: Row) -> Iterator[str]:
    rows = list(found["factorial"].values())
    yield from _table(
        "plan", "precision", "file", "perplexity", "lost, %", "same next token, %", "lost beyond the sum, %"
    )
    for row in rows:
        excess = interval(row["excess"]) if "excess" in row else "–"
        yield _line("dense" if row["plan"] == ORIGINAL else row["plan"], _precision(row["precision"]),
                    f"{row['bytes'] / 1e6:.0f} MB", f"{row['perplexity']['value']:,.2f}", _lost(row["loss"]),
                    f"{row['agreement']['value']:.1f}", excess)  # fmt: skip


def _precision(name: str) -> str:
    return PRECISIONS.get(name, name.replace("int2-ternary", "int2, ternary"))


def _generation(found: Row) -> Iterator[str]:
    yield from _table("engine, float", "plan", "greedy texts equal to torch's", "first other token",
                      "torch's logits of the two tokens there")  # fmt: skip
    for row in found["generation"].values():
        first = sorted(row["first_differences"])
        gap = f"at most {max(row['gaps']):.3f} apart; their spread is {row['spread']:.1f}" if first else "–"
        yield _line(TARGETS[row["engine"]], row["plan"],
                    f"{row['equal_texts']} of {row['prompts']}, of {row['new']} tokens",
                    ", ".join(str(place + 1) for place in first) or "–", gap)  # fmt: skip


def _timing(found: Row) -> Iterator[str]:
    timed = found["timing"]
    yield from _table("engine", "plan", "precision", "file", "prompt, tokens/s", "over dense", "further tokens/s",
                      "over dense", "over float, dense", "cache")  # fmt: skip
    for row in timed["rows"].values():
        first, token = row["first"], row["token"]
        yield _line(TARGETS[row["engine"]], row["plan"], _precision(row["precision"]), f"{row['bytes'] / 1e6:.0f} MB",
                    f"{first['tokens_per_second']:.0f}", _times(first["speedup"]["dense"]),
                    f"{token['tokens_per_second']:.1f}", _times(token["speedup"]["dense"]),
                    _times(token["speedup"]["float"]), f"{row['cache_bytes'] / 1e6:.2f} MB")  # fmt: skip
    yield ""
    for part, words in PARTS.items():
        rows = [each for each in timed["interactions"] if each["part"] == part]
        verdicts = [each["verdict"] for each in rows]
        counts = ", ".join(f"{verdicts.count(kind)} {kind}" for kind in dict.fromkeys(verdicts))
        yield f"- S_both / (S_prune x S_quant), {words}: {counts}. " + "; ".join(map(_interaction, rows)) + "."
    worst = max(timed["rows"].values(), key=lambda row: float(row["difference"]))
    yield (
        f"- A step with the cache differs from the whole text by at most {worst['difference']:.2g} of the spread of "
        f"the logits ({TARGETS[worst['engine']]}, {worst['plan']}, {_precision(worst['precision'])})."
    )
    if timed["absent"]:
        yield f"- Not timed: {', '.join(timed['absent'])}."


def _interaction(row: Row) -> str:
    engine, plan, precision = row["cell"].split(", ")
    ratio = row["ratio"]
    return f"{TARGETS[engine]}, {plan}, {precision} {ratio['ratio']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"


def _times(speedup: Mapping[str, float]) -> str:
    return f"{speedup['ratio']:.2f}x ({speedup['low']:.2f}–{speedup['high']:.2f})"


def _products(found: Row) -> Iterator[str]:
    made = found["products"]
    by_rows = made["rows"]
    yield from _table(f"weight {made['inputs']} x {made['outputs']}", "file", *(f"{rows} row{'s' * (rows != '1')}, us "
                      f"| over float | over 4 bits" for rows in by_rows))  # fmt: skip
    for name, first in next(iter(by_rows.values())).items():
        cells = (
            f"{rows[name]['milliseconds'] * 1000:.0f} | {_times(rows[name]['over_float'])} | "
            f"{_times(rows[name]['over_4_bits'])}"
            for rows in by_rows.values()
        )
        yield _line(name, f"{first['bytes'] / 1e6:.2f} MB", *cells)


def _facts(found: Row) -> Iterator[str]:
    texts, tokens, prompts = found["texts"], found["tokens"], found["prompts"]
    yield (
        f"{found['model']}: layers ranked on {texts['calibration']} paragraphs ({tokens['calibration']:,} tokens), "
        f"perplexity and next tokens on {texts['test']} others ({tokens['test']:,} tokens), greedy texts behind "
        f"{prompts['count']} prompts of {prompts['tokens']} tokens of these; {found['environment']['processor']}."
    )
    if "timing" in found:
        timed = found["timing"]
        yield ""
        yield (
            f"Timed: a prompt of {timed['context']} tokens, a further token behind it, {timed['threads']} thread"
            f"{'s' * (timed['threads'] > 1)}, {timed['rounds']} interleaved bursts."
        )
    for row in found.get("task", {}).values():
        scores = (f"{name} {each['value']:.3f} ± {each['error']:.3f}" for name, each in row["accuracy"].items())
        yield ""
        yield (
            "Accuracy by lm-eval (± standard error) at naming the continuation of a test paragraph, "
            f"{row['questions']} questions with {row['choices']} choices each ({1 / row['choices']:.2f} by chance): "
            f"{', '.join(scores)}."
        )
    if CLAIMED in found.get("quality", {}):
        yield ""
        yield _claim(found)


def _claim(found: Row) -> str:
    """Return the answer to the published sentence on half of the attention layers."""
    row, original = found["quality"][CLAIMED], found["quality"][ORIGINAL]
    removed = 1.0 - row["parameters"] / original["parameters"]
    answer = (
        '"Half of the attention layers, 40 to 50 % faster, about 3 % lost" was published for models of 7 to 70 billion '
        f"parameters. Here half of the attentions lose {_lost(row['loss'])} % of perplexity, and "
        f"{row['agreement']['value']:.0f} % of the next tokens stay the same. They hold {removed:.1%} of the "
        f"parameters, so a step that reads every weight once is at most {1 / (1 - removed):.2f}x as fast, apart from "
        "the cache."
    )
    if "timing" not in found:
        return answer
    rows = [each for each in found["timing"]["rows"].values() if each["plan"] == CLAIMED]
    speeds = (
        f"{TARGETS[each['engine']]} {_precision(each['precision'])} {_times(each['token']['speedup']['dense'])}"
        for each in rows
    )
    return f"{answer} Measured, a further token: {', '.join(speeds)}."
