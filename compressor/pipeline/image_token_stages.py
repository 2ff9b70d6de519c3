"""The stages at which image tokens are dropped from a prompt, and the size of the cache behind it, for the report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from passes.graph.graph import value_of
from passes.image_tokens.image_tokens import stage_of_state

if TYPE_CHECKING:
    from compressor.choices import ImageTokens
    from compressor.search.image_token_choice import TriedSchedule
    from passes.graph.graph import Graph


def facts(
    stages: ImageTokens | None,
    generation: Mapping[str, Any] | None,
    graph: Graph,
    baseline: Graph,
    tried: Sequence[TriedSchedule] = (),
) -> dict[str, Any] | None:
    """Return the stages of an export with the image tokens that remain in the prompt that is timed; None without any.

    Args:
        stages: the value of ``--image-tokens``.
        generation: the lengths that are timed, with the number of image tokens.
        graph: the result.
        baseline: the original.
        tried: the schedules that ``--image-tokens auto`` judged.
    """
    if stages is None or generation is None:
        return None
    images, prompt = int(generation["images"]), int(generation["prompt"])
    remaining = {depth: math.floor(images * share + 1e-9) for depth, share in stages.stages}
    return {
        "method": stages.method,
        "tokens": images,
        "stages": [{"block": depth, "share": share, "tokens": remaining[depth]} for depth, share in stages.stages],
        "cache": {
            "prompt": prompt,
            "baseline": _bytes(baseline, prompt, images, {}),
            "result": _bytes(graph, prompt, images, remaining),
        },
        **({"tried": [each.to_dict() for each in tried]} if tried else {}),
    }


def _bytes(graph: Graph, prompt: int, images: int, remaining: Mapping[int, int]) -> int:
    """Return the bytes of the state of one row behind a prompt."""
    stages, named = stage_of_state(graph), dict(zip(graph.inputs, graph.placeholders(), strict=True))
    total = 0
    for past in graph.state.values():
        value, depth = value_of(named[past]), stages.get(past)
        tokens = prompt if depth is None else prompt - images + remaining[depth]
        sizes = [size for size in value.shape[1:] if isinstance(size, int)]
        grows = len(sizes) < len(value.shape) - 1
        total += value.itemsize * math.prod(sizes) * (tokens if grows else 1)
    return total


def sentences(found: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield what the stages leave of the image tokens and of the cache.

    >>> stages = [{"block": 8, "share": 0.5, "tokens": 288}]
    >>> cache = {"prompt": 640, "baseline": 2_000_000, "result": 1_500_000}
    >>> (sentence,) = sentences({"method": "attention", "tokens": 576, "stages": stages, "cache": cache})
    >>> sentence[:60]
    'Image tokens kept by attention: 576 up to block 8, then 288.'
    """
    if found is None:
        return
    kept = [f"{found['tokens']} up to block {found['stages'][0]['block']}"]
    for each, after in zip(found["stages"], [*found["stages"][1:], None], strict=True):
        kept.append(f"then {each['tokens']}" + ("" if after is None else f" up to block {after['block']}"))
    cache = found["cache"]
    yield (
        f"Image tokens kept by {found['method']}: {', '.join(kept)}. The cache behind the prompt of {cache['prompt']} "
        f"tokens takes {cache['result'] / 1e6:.2f} MB (baseline {cache['baseline'] / 1e6:.2f})."
    )
