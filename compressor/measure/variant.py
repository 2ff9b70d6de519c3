"""Variants of one export: the original and the compressed model, each with its files and its engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from compressor.measure.engine_builder import EngineBuilder
from compressor.measure.engine_parity import engine_parity
from compressor.measure.precision_converter import PrecisionConverter
from compressor.quality.parity import Parity
from compressor.quantize.precision import Converted, Source
from compressor.workspace.progress import Steps
from passes.graph.graph import Graph


@dataclasses.dataclass(frozen=True)
class Variant:
    """One form of the model in one precision.

    Attributes:
        name: ``original`` (the float baseline beside a lower precision), ``baseline``, ``result``, or a cell of the
            factorial.
        graph: the graph as torch runs it, before folding.
        float_file: the file that the graph was lowered to.
        parity: difference of the float engine from torch.
        source: the file and precision that its engine is built from.
        conversion: facts of the conversion to its precision; None for fp32.
        reported: False for a variant that only the factorial needs.
        engine: the built engine; None before it is built.
    """

    name: str
    graph: Graph
    float_file: Path
    parity: Parity
    source: Source
    conversion: Converted | None = None
    reported: bool = True
    engine: Path | None = None

    def renamed(self, name: str) -> Variant:
        """Return the variant under another name, as a cell of the factorial that the report does not list."""
        return dataclasses.replace(self, name=name, reported=False)

    def as_float(self) -> Variant:
        """Return the variant in fp32."""
        return dataclasses.replace(self, source=Source(self.float_file), conversion=None)


def lower_variant(name: str, graph: Graph, folded: Graph, builder: EngineBuilder, *, file: str = "") -> Variant:
    """Lower a graph and compare its float engine with torch.

    Args:
        name: name of the variant.
        graph: the graph before folding, so that an error of the folding shows.
        folded: the graph that is lowered.
        builder: lowers it and builds the engine.
        file: name of its file without the suffix; by default that of the variant.

    Returns:
        The variant in fp32.

    Raises:
        ParityError: the outputs differ by more than the tolerance.
    """
    path = builder.lower(folded, file or name)
    return Variant(name, graph, path, engine_parity(builder, path, graph), Source(path))


def convert_variants(
    variants: Sequence[Variant], precision: str, converter: PrecisionConverter, steps: Steps
) -> list[Variant]:
    """Convert every variant to a precision, and keep the float baseline as ``original``.

    Variants with the same float file share one conversion.

    Args:
        variants: in fp32, the baseline first.
        precision: ``fp32`` leaves them as they are.
        converter: converts the files.
        steps: shows progress.
    """
    if precision == "fp32":
        return list(variants)
    converted = [dataclasses.replace(variants[0], name="original")]
    done: dict[Path, tuple[Source, Converted]] = {}
    for variant in variants:
        if variant.float_file not in done:
            with steps.step(f"{precision} of the {variant.name}") as tick:
                done[variant.float_file] = converter.convert(variant.float_file, precision, tick)
        source, facts = done[variant.float_file]
        converted.append(dataclasses.replace(variant, source=source, conversion=facts))
    return converted


def build_variants(variants: Sequence[Variant], builder: EngineBuilder, folder: Path, steps: Steps) -> list[Variant]:
    """Build the engine of every variant; write that of the result and its source into the output folder."""
    built = []
    with steps.step(f"build for {builder.target.name}"):
        for variant in variants:
            if variant.name == "result":
                source, engine = builder.ship(variant.source, folder)
                built.append(dataclasses.replace(variant, source=source, engine=engine))
            else:
                built.append(dataclasses.replace(variant, engine=builder.build(variant.source)))
    return built


def engines_of(variants: Sequence[Variant]) -> dict[str, Path]:
    """Return the paths of the engines by the names of the variants, all of which must be built."""
    engines = {variant.name: variant.engine for variant in variants}
    assert None not in engines.values()
    return {name: engine for name, engine in engines.items() if engine is not None}
