"""The loaded and traced model with its data, its sites and their costs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from compressor import models
from compressor.choices import TRANSFORMERS
from compressor.data import splits as data_module
from compressor.data.splits import Data, Shares
from compressor.errors import CompressorError
from compressor.lower import checkpoint
from compressor.lower.trace import trace
from compressor.models import Model
from compressor.models.base import first_line
from compressor.quality.evaluate import metric_for, tensor_batches
from compressor.settings import Settings
from compressor.workspace.progress import Steps, Tick
from passes.analysis.counted_cost import Costs
from passes.graph.graph import Graph, Site
from passes.graph.sites import find_sites

COST_SAMPLES = 8  # samples over which multiply-adds are averaged


class SubjectError(CompressorError):
    """A combination of model, data and options that does not fit together."""


@dataclasses.dataclass(frozen=True)
class ModelAndData:
    """A model and the data on which its engines are run and evaluated."""

    model: Model
    data: Data

    @property
    def metric(self) -> str:
        """Name of the quality metric."""
        return metric_for(self.model.task, self.data.label_kind)

    @property
    def no_quality_because(self) -> str | None:
        """Reason why no quality is stated: random data or random weights. None if quality is stated."""
        if self.data.random:
            return "the data is random"
        if self.model.random_weights:
            return "the weights are random"
        return None


@dataclasses.dataclass(frozen=True)
class TracedModel(ModelAndData):
    """A model and its data, with the traced graph, its sites and their costs."""

    graph: Graph
    sites: tuple[Site, ...]
    costs: Costs


def model_facts(subject: TracedModel) -> dict[str, Any]:
    """Return the model and its sites as JSON values for a report."""
    model = subject.model
    return {
        "name": model.name,
        "source": model.source,
        "task": model.task,
        "revision": model.revision,
        "hub_id": model.hub_id,
        "random_weights": model.random_weights,
        "inputs": list(model.inputs),
        "outputs": list(model.outputs),
        **_image_facts(model),
        "sites": [dataclasses.asdict(site) for site in subject.sites],
    }


def _image_facts(model: Model) -> dict[str, Any]:
    """Return the size of the images that the preprocessing gives, and whether a checkpoint has to interpolate."""
    if model.preprocess.kind != "image":
        return {}
    size = list(model.preprocess.example[model.inputs[0]].shape[2:])
    return {"image_size": size, "interpolate_pos_encoding": model.interpolates}


def load(settings: Settings, steps: Steps) -> TracedModel:
    """Load model and data, trace the model and find its sites.

    Raises:
        CompressorError: the model or the data cannot be loaded, they do not fit together, the model cannot be traced,
            or it has no sites.
    """
    with steps.step("load the model"):
        model = models.load(
            settings.model,
            task=settings.task,
            revision=settings.revision,
            random_weights=settings.random_weights,
            trust_remote_code=settings.trust_remote_code,
            example_inputs=settings.example_inputs,
            on_disk=settings.max_memory is not None,
            cache=settings.cache,
            image_size=settings.pixels,
        )
    if settings.target == TRANSFORMERS:
        checkpoint.check_model(model)
    with steps.step("load the data") as tick:
        data = load_data(settings, model, tick)
    with steps.step("trace, find the sites"):
        graph = trace(model)
        _check_trained(graph, model)
        sites = find_sites(graph)
        if not sites:
            raise SubjectError(f"{model.name} has no residual branch (y = x + f(x)), so there is nothing to drop.")
        return TracedModel(model, data, graph, sites, _costs(graph, model, data))


def _costs(graph: Graph, model: Model, data: Data) -> Costs:
    """Return the costs at the sizes of real samples, because the multiply-adds of a text depend on its length."""
    feeds = next(tensor_batches(data.calibration, COST_SAMPLES))
    try:
        return Costs(graph, feeds)
    except (IndexError, RuntimeError) as error:
        raise _refused(model, data, error) from error


def load_data(settings: Settings, model: Model, tick: Tick) -> Data:
    """Load the data with the preprocessing of the model.

    Raises:
        CompressorError: the data cannot be read, or does not fit the model.
    """
    source = settings.data
    if model.task != "text-generation" and (settings.max_length, settings.stride) != (None, None):
        raise SubjectError(
            f"--max-length and --stride cut the texts of language models; {model.name} does {model.task}."
        )
    data = data_module.load(
        str(source or models.SAMPLE / "digits.npz"),
        model.preprocess,
        task=model.task,
        seed=settings.seed,
        shares=Shares(total=settings.samples),
        revision=None,  # --revision applies to the model; that of a data set is part of its name, owner/name@revision
        progress=tick,
        max_length=settings.max_length,
        stride=settings.stride,
    )
    _check_classes(data, model)
    if model.task == "text-generation" and not data.random and data.label_kind != "tokens":
        raise SubjectError(f"{data.source} holds no texts or token ids, which a language model needs.")
    return data


def _check_classes(data: Data, model: Model) -> None:
    """Refuse a single output and labels of other classes, for which accuracy and agreement would be silently wrong."""
    classes = model.classes()
    if classes is None or data.random:
        return
    if classes == 1:
        feature = "image-feature-extraction" if model.task.startswith("image") else "feature-extraction"
        raise SubjectError(
            f"{model.name} has a single output, so it predicts no class, and regression is not supported yet; pass "
            f"--task {feature} to compare its features instead, or --data random to measure speed only."
        )
    if data.label_kind == "class":
        parts = (data.calibration, data.validation, data.test)
        largest = max(int(part.labels.max()) for part in parts if part.labels is not None)
        if largest >= classes:
            raise SubjectError(
                f"{data.source} has labels up to {largest}, but {model.name} has only {classes} classes (0 to "
                f"{classes - 1}); for an image folder the sorted subfolders must be the model's classes, in order."
            )
    folders = data.calibration.samples.class_folders
    if folders not in (None, classes):
        raise SubjectError(
            f"{data.source} has {folders} class folders, but {model.name} has {classes} classes, so the folders' "
            "numbers are not its classes; give a folder for each class, in the model's order, or one flat folder of "
            "images, on which the result is compared with the original."
        )


def _check_trained(graph: Graph, model: Model) -> None:
    """Refuse a checkpoint that lacks weights on which the outputs depend, because they would be random."""
    used = {str(node.target).removeprefix(graph.prefix) for node in graph.nodes() if node.op == "get_attr"}
    absent = [name for name in model.untrained if name in used]
    if absent:
        raise SubjectError(
            f"the checkpoint of {model.name} lacks {len(absent)} weights that {model.task} needs, the first is "
            f"{absent[0]}; choose a fine-tuned checkpoint, or another --task."
        )


@contextlib.contextmanager
def index_errors_as_data_errors(subject: ModelAndData) -> Iterator[None]:
    """Replace an IndexError of the model by an error that names the data.

    The model raises it for token ids beyond the vocabulary and for rows that are too long.

    Raises:
        SubjectError: the samples do not fit the model.
    """
    try:
        yield
    except IndexError as error:
        raise _refused(subject.model, subject.data, error) from error


def _refused(model: Model, data: Data, error: Exception) -> SubjectError:
    return SubjectError(
        f"{model.name} fails on samples of {data.source} ({first_line(error)}); check that they fit it, such as token "
        "ids below the vocabulary's size and rows no longer than its positions."
    )
