"""ONNX files of the small architectures as an export writes them: folded, in each precision, with merged tokens."""

from collections.abc import Iterator
from pathlib import Path

import torch

from compressor import models
from compressor.errors import CompressorError
from compressor.lower.fold_graph import fold_graph
from compressor.lower.trace import trace
from compressor.lower.write_onnx import lower
from compressor.quantize.convert import convert
from passes.analysis.least_squares import Fit
from passes.base import PassError, apply
from passes.graph.sites import find_sites
from passes.merge_tokens.token_merging import ReduceTokens
from passes.rewrite.replace import Replace
from runtimes.base.protocols import Int8Style
from tests.architectures import TIMM, TRANSFORMERS
from tests.decoders import DECODERS, saved

CACHED = "decoder "  # decoders with a KV cache, beside those of TRANSFORMERS without one
LOADERS = {each.name: each.load for each in (*TIMM, *TRANSFORMERS)}
UNPARSED = {"volo": "Col2Im"}  # the operator that TensorRT's parser lacks
UNBUILT = (("hf_albert", "int4"),)  # the builder of TensorRT for RTX 1.7 fails with an internal error
NAMES = (*LOADERS, *(f"{CACHED}{name}" for name in DECODERS))
PRECISIONS = ("fp32", "fp16", "bf16", "fp8", "int8", "int4")
FORMS = (*PRECISIONS, "fp16, tokens merged", "int8, map fused")


def load(name: str, folder: Path) -> models.Model:
    """Load an architecture by its name; a decoder with a cache is saved to a folder first."""
    if name.startswith(CACHED):
        return models.load(saved(folder / "checkpoint", name.removeprefix(CACHED)))
    return LOADERS[name]()


def write_forms(name: str, folder: Path, style: Int8Style, forms=FORMS) -> Iterator[tuple[str, Path | str]]:
    """Yield each form of an architecture with its file, or with the reason why it has none."""
    model = load(name, folder)
    graph = trace(model)
    feeds = {key: value.numpy() for key, value in model.example.items()}
    fp32 = lower(fold_graph(graph), model, folder / "model.onnx")
    changes = {"tokens merged": merged, "map fused": lambda graph: fused(graph, model)}
    for form in forms:
        if form == "fp32":
            yield form, fp32
            continue
        path, source = folder / f"{form}.onnx", fp32
        precision, _, change = form.partition(", ")
        try:
            if change:
                source = lower(fold_graph(changes[change](graph)), model, folder / f"{change}.onnx")
            convert(source, path, precision, style, lambda: iter([feeds]), calibration="minmax")
        except (CompressorError, PassError) as error:
            yield form, str(error)
        else:
            yield form, path


def fused(graph, model):
    """Return a fork whose last attention, or last branch, is a fitted linear map, to be folded into its neighbours.

    Raises:
        PassError: no map can be fitted there.
    """
    sites = find_sites(graph)
    site = [*sites, *(site for site in sites if site.kind == "attention")][-1]
    fork = graph.fork()
    with torch.no_grad():
        fits = apply(Fit(graph, (site,)), graph.fork(), [model.example])
        apply(Replace(site, fits[site.name].stand_in("linear")), fork)
    return fork


def merged(graph):
    """Return a fork with one token merged behind the first attention, or a quarter where their number is dynamic.

    Raises:
        PassError: no token can be merged there, or there is no attention.
    """
    first = next((site for site in find_sites(graph) if site.kind == "attention"), None)
    if first is None:
        raise PassError("the model has no attention")
    try:
        return _reduced(graph, first.name, 1)
    except PassError as error:
        if "dynamic length" not in str(error):
            raise
        return _reduced(graph, first.name, 0.25)


def _reduced(graph, site: str, amount: float):
    fork = graph.fork()
    with torch.no_grad():
        apply(ReduceTokens(((site, amount),)), fork)
    return fork
