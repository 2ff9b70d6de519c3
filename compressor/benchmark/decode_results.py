"""Results of the generation timing of `bench`: speed-ups, factorials of prefill and decode, tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from compressor.benchmark.contenders import EngineEntry, cells_by_folder
from compressor.benchmark.decode_timing import Generation
from compressor.benchmark.runner import Condition
from compressor.report.factorial import Factorial, compute_factorial, conditions
from compressor.report.report import dim, latency_to_dict
from runtimes.base.timing import Latency, Speedup, speedups_over

if TYPE_CHECKING:
    from rich.table import Table

Part = Literal["first", "token"]
PARTS: dict[Part, str] = {"first": "for the first token of {} tokens", "token": "for each token after {} tokens"}


@dataclass(frozen=True)
class GenerationResults:
    """All measurements of generation; speed-ups are over `against` under the same condition and context length."""

    model: str
    entries: tuple[EngineEntry, ...]
    against: str
    runs: tuple[Generation, ...]

    @cached_property
    def places(self) -> tuple[tuple[Condition, int], ...]:
        """All pairs of condition and context length."""
        return tuple(dict.fromkeys((each.condition, each.context) for each in self.runs))

    def latencies(self, part: Part, condition: Condition, context: int) -> dict[str, Latency]:
        """Return the latencies of prefill or decode under one condition and context length, by engine."""
        return {
            each.name: each.first if part == "first" else each.token
            for each in self.runs
            if (each.condition, each.context) == (condition, context)
        }

    @cached_property
    def speedups(self) -> dict[tuple[Part, Condition, int], dict[str, Speedup]]:
        """Speed-ups of each engine, by call, condition and context length."""
        return {
            (part, *where): speedups_over(self.against, self.latencies(part, *where))
            for part in PARTS
            for where in self.places
        }

    @cached_property
    def factorials(self) -> tuple[tuple[str, Part, int, Factorial], ...]:
        """Factorials of every folder with cells, for both calls, every context length and every condition."""
        return tuple(
            (folder, part, context, self._factorial(own, part, condition, context))
            for folder, own in cells_by_folder(self.entries).items()
            for condition, context in self.places
            for part in PARTS
        )

    def _factorial(self, own: Mapping[str, EngineEntry], part: Part, condition: Condition, context: int) -> Factorial:
        latency = self.latencies(part, condition, context)
        target = next(iter(own.values())).target
        where = f"{PARTS[part].format(context)}, {conditions(target, condition.batch, condition.threads)}"
        files = {cell: str(entry.file) for cell, entry in own.items()}
        return compute_factorial({cell: latency[entry.name] for cell, entry in own.items()}, None, files, where)

    def to_dict(self) -> dict[str, Any]:
        """Return measurements and factorials as plain JSON values; latencies hold every sample, in milliseconds."""
        return {
            "measurements": [self._measured(each) for each in self.runs],
            "factorials": [
                {"folder": folder, "part": part, "context": context, **each.to_dict()}
                for folder, part, context, each in self.factorials
            ],
        }

    def _measured(self, each: Generation) -> dict[str, Any]:
        speed = {part: self.speedups[part, each.condition, each.context][each.name] for part in PARTS}
        return {
            "engine": each.name,
            **each.condition._asdict(),
            "context": each.context,
            "first": {"latency": latency_to_dict(each.first), "speedup": speed["first"]._asdict()},
            "token": {"latency": latency_to_dict(each.token), "speedup": speed["token"]._asdict()},
            "tokens_per_second": each.tokens_per_second,
            "cache_bytes": each.cache,
            "difference_from_whole_text": each.difference,
        }

    def tables(self) -> Iterator[Table]:
        """Yield a table for each condition and context length, 80 columns wide if names are short."""
        return (self._table(*where) for where in self.places)

    def _table(self, condition: Condition, context: int) -> Table:
        from rich.box import SIMPLE_HEAD
        from rich.markup import escape
        from rich.table import Table

        title = f"{self.model}, ms for a token after {context} tokens, {condition}; speed-up over {self.against}"
        table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("", overflow="fold")
        for heading in ("first", "speed-up", "next", "speed-up", "tokens/s", "cache MB"):
            table.add_column(heading, justify="right", no_wrap=True)
        for each in self.runs:
            if (each.condition, each.context) == (condition, context):
                first, token = (self.speedups[part, condition, context][each.name] for part in PARTS)
                table.add_row(
                    escape(each.name),
                    f"{each.first.median:.2f}",
                    f"{first.ratio:.2f}x",
                    f"{each.token.median:.2f}",
                    f"{token.ratio:.2f}x",
                    f"{each.tokens_per_second:.1f}",
                    f"{each.cache / 1e6:.2f}",
                )
                table.add_row("", "", _range(first), "", _range(token))
        return table

    def summary(self) -> Iterator[str]:
        """Yield the conclusions of the factorials, and the largest difference of a decode step from the whole text."""
        for folder, _, _, each in self.factorials:
            for sentence in each.conclusion:
                yield f"{folder}: {sentence}"
        if self.runs:
            worst = max(self.runs, key=lambda each: each.difference)
            yield (
                "With a KV cache, the logits of each engine differ from its logits of the whole text by at most "
                f"{worst.difference:.1e} of their spread ({worst.name})."
            )


def _range(speed: Speedup) -> str:
    return dim(f"{speed.low:.2f}–{speed.high:.2f}")
