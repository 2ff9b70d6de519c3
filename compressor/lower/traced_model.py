"""The loaded and traced model with its data, its sites and their costs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from compressor import models
from compressor.choices import AUTO, GGUF, PARTS_TARGETS, TRANSFORMERS, ZERO_SHOT, ImageTokens
from compressor.data import splits as data_module
from compressor.data.class_labels import listed
from compressor.data.readers.base import CLASS_ORDER, EMPTY_CLASSES, ONE_CLASS, Samples
from compressor.data.readers.masks import NO_CLASS
from compressor.data.rows import Values, bounded_texts, take_rows
from compressor.data.splits import Data, Shares, Split
from compressor.errors import CompressorError
from compressor.executor.base import Executor, InProcess
from compressor.limitations import Limitation
from compressor.lower import checkpoint
from compressor.lower.gguf import rules, vocabulary
from compressor.lower.probabilities import with_logits
from compressor.lower.self_parity import TracedGraphError, check_self_parity
from compressor.lower.size_guards import check_sizes
from compressor.lower.trace import OneLengthError, one_length_option, trace_with_guards
from compressor.models import Model
from compressor.models.base import RECOMPUTES, UndetectedCacheError, first_line
from compressor.models.text.probe import logits_per_token
from compressor.models.vision_language.image_token_stages import with_indices, with_state
from compressor.quality import chance
from compressor.quality.evaluate import tensor_batches
from compressor.quality.heads.base import Head
from compressor.quality.heads.entities import Entities, tags_of
from compressor.quality.heads.label_sets import LabelSets
from compressor.quality.heads.registry import head_for
from compressor.quality.heads.regression import Regression
from compressor.quality.heads.single_class import SingleClass
from compressor.settings import Settings
from compressor.workspace.plan_file import check_drop, given_plan
from compressor.workspace.progress import Steps, Tick
from passes.analysis.counted_cost import Costs
from passes.base import apply
from passes.graph.coverage import attentions, outside_of
from passes.graph.graph import Graph, Site, output_values, value_of
from passes.graph.sites import find_sites
from passes.image_tokens.image_tokens import DropImageTokens

if TYPE_CHECKING:
    from passes.image_tokens.image_tokens import Method

COST_SAMPLES = 8  # samples over which multiply-adds are averaged
# Kinds of labels that only some heads are measured with.
OTHER_LABELS = {
    "class": "a class for each sample",
    "score": "a number for each sample",
    "labels": "a set of labels for each sample",
    "token classes": "a class for each word",
    "pixels": "a mask of classes for each image",
}
MASKS = 32  # masks of each split whose classes are checked before anything else
SELF_SAMPLES = 3  # samples on which torch is compared with itself, unlike the two of the traced example


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
        return self.head.metric(self.data.label_kind, pairs=self.data.pairs)

    @property
    def head(self) -> Head:
        """How the output of the model is evaluated."""
        head = head_for(self.model.task, self.model.problem_type)
        names = self.model.class_names if self.model.task == "token-classification" else None
        tags = None if names is None else tags_of([each[0] if each else "" for each in names.names])
        return head if tags is None else Entities(tags)

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
    """A model and its data, with the traced graph, its sites and their costs; `executor` runs it over the data."""

    graph: Graph
    sites: tuple[Site, ...]
    costs: Costs
    executor: Executor = dataclasses.field(default_factory=InProcess, repr=False)


def model_facts(subject: TracedModel) -> dict[str, Any]:
    """Return the model and its sites as JSON values for a report."""
    model = subject.model
    return {
        "name": model.name,
        "source": model.source,
        "task": model.task,
        "problem_type": model.problem_type,
        "probabilities": model.to_logits is not None,
        "revision": model.revision,
        "hub_id": model.hub_id,
        "random_weights": model.random_weights,
        "inputs": list(model.inputs),
        "outputs": list(model.outputs),
        "id2label": None if model.class_names is None else model.class_names.id2label(),
        **_image_facts(model),
        **({"text_length": model.preprocess.padded} if _pads_texts(model) else {}),
        "sites": [dataclasses.asdict(site) for site in subject.sites],
    }


def _pads_texts(model: Model) -> bool:
    """Return whether the report states to how many tokens texts are padded, None for the longest of a batch."""
    return model.has_two_towers or (model.preprocess.kind == "text" and model.preprocess.padded is not None)


def _image_facts(model: Model) -> dict[str, Any]:
    """Return the size of the images that the preprocessing gives, and whether a checkpoint has to interpolate."""
    if model.preprocess.kind != "image":
        return {}
    size = list(model.preprocess.example[model.inputs[0]].shape[2:])
    return {"image_size": size, "interpolate_pos_encoding": model.interpolates}


def load(settings: Settings, steps: Steps, *, decision: float = 0.0, executor: Executor | None = None) -> TracedModel:
    """Load model and data, trace the model and find its sites; `decision` is the share of the decision split.

    `executor` runs the model over the data; None is this process.

    Raises:
        CompressorError: the model or the data cannot be loaded, they do not fit together, the model cannot be traced,
            it has no sites, its outputs are random, or its traced graph computes something else.
        PassError: `settings.drop` does not fit the sites.
    """
    given_plan(settings.drop)  # a file that cannot be read is refused before the model is loaded
    with steps.step("load the model"):
        model = _load_model(settings)
    if settings.merge_decoder and not model.is_encoder_decoder:
        raise SubjectError(
            f"--merge-decoder merges the files of the decoder of an encoder-decoder, and the task of {model.name} is "
            f"{model.task}; leave --merge-decoder out."
        )
    if model.has_two_towers:
        _check_two_towers(model, settings)
    depths = _depths(settings, model)
    if depths:
        model = with_indices(model, depths)
    if model.has_parts:
        _check_parts(model, settings)
    if settings.target == TRANSFORMERS:
        checkpoint.check_model(model, settings.drop)
    if settings.target == GGUF:
        rules.check_model(model)
        vocabulary.check_tokenizer(model)
    with steps.step("load the data") as tick:
        data = load_data(settings, model, tick, decision=decision)
        model = evaluated_on(model, data)
    for limitation in data.limitations:
        if limitation.feature == CLASS_ORDER:  # it decides on all figures, so it is shown before the search
            steps.warn(str(limitation))
    with steps.step("trace, find the sites"):
        graph, guards = trace_with_guards(model)
        sizes = check_sizes(guards, model, data, one_length_option)
        data = dataclasses.replace(data, limitations=(*data.limitations, *sizes))
        _check_pooled(graph, model)
        _check_trained(graph, model)
        sites = find_sites(graph)
        if not sites and settings.drop != "none":
            raise SubjectError(without_sites(graph, model, "pass --drop none to export it as it is"))
        check_drop(settings.drop, sites)
        data = dataclasses.replace(data, limitations=(*data.limitations, *_outside_of_sites(graph, sites)))
        if depths:  # asked first: a search takes long
            asked = settings.image_stages or ImageTokens("attention", tuple((depth, 0.0) for depth in depths))
            _drop_image_tokens(asked, graph, model, settings)
            model = with_state(model, depths)
        costs = _costs(graph, model, data)
    with steps.step("compare torch with itself"):
        _check_itself(model, graph, data, settings)
        model = with_logits(model, data)
    return TracedModel(model, data, graph, sites, costs, InProcess() if executor is None else executor)


def without_sites(graph: Graph, model: Model, remedy: str) -> str:
    """Return the refusal of a model without residual branches, with the attentions that were found outside of them."""
    paths = outside_of(graph, ())
    found = f"; {_attentions(len(paths), paths)} is outside of any" if len(paths) == 1 else ""
    found = f"; its {_attentions(len(paths), paths)} are outside of any" if len(paths) > 1 else found
    return (
        f"{model.name} has no residual branch (y = x + f(x), also with a constant times x), so there is nothing to "
        f"drop{found}. A gate or a mixture of several states in place of the sum makes no branch; {remedy}."
    )


def _outside_of_sites(graph: Graph, sites: Sequence[Site]) -> Iterator[Limitation]:
    """Yield a limitation if attentions are in no residual branch, so that nothing drops or replaces them."""
    paths = outside_of(graph, sites)
    if sites and paths:
        total = len(dict.fromkeys(attentions(graph).values()))
        yield Limitation(
            "attentions outside of branches",
            f"{len(paths)} of {_attentions(total, paths)}: in no residual branch, so they are not listed, dropped or "
            "replaced; a branch f(x) is added to the whole of its x and is read by nothing else",
        )


def _attentions(count: int, paths: Sequence[str]) -> str:
    """Return a number of attentions, with the first of some paths."""
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return f"{count} attention{'s' * (count != 1)} ({', '.join(paths[:3])}{more})"


def within_bounds(feeds: Mapping[str, Values], model: Model, split: Split) -> Mapping[str, Values]:
    """Return feeds; those of a language model with as many tokens as a batch of a split may have.

    Texts of other models stay whole, as their tokens may belong to an image or to one answer.
    """
    causal = model.task == "text-generation"
    return bounded_texts(feeds, model.dynamic_axes, split.most_tokens) if causal else feeds


def _check_itself(model: Model, graph: Graph, data: Data, settings: Settings) -> None:
    """Compare the graph with its module on some samples.

    A language model that computes something else once its cache holds tokens, as GIT counts those of an image in it, is
    told to leave the cache out if it can.

    Raises:
        CompressorError: they differ, or the module with itself.
    """
    try:
        split = data.calibration.middle(SELF_SAMPLES)
        check_self_parity(model, graph, within_bounds(next(tensor_batches(split, SELF_SAMPLES)), model, split))
    except TracedGraphError as error:
        cached = model.task == "text-generation" and bool(model.state) and settings.cache
        if not cached or not _loads(dataclasses.replace(settings, cache=False)):
            raise
        raise SubjectError(
            f"{model.name} computes other outputs with an empty cache than with tokens in it ({error.place}), and one "
            f"graph holds only the latter; pass --no-cache to export without a cache, {RECOMPUTES}."
        ) from error


def _loads(settings: Settings) -> bool:
    """Return whether a model can be loaded and traced with some settings."""
    try:
        load(settings, Steps(None))
    except CompressorError:
        return False
    return True


def _load_model(settings: Settings) -> Model:
    """Load the model of the settings.

    A refusal that names `--no-cache` is only passed on if the model can be traced without its cache.

    Raises:
        CompressorError: the model cannot be loaded, or its cache is not found.
    """
    try:
        return models.load(
            settings.model,
            task=settings.task,
            problem_type=settings.problem_type,
            revision=settings.revision,
            random_weights=settings.random_weights,
            trust_remote_code=settings.trust_remote_code,
            example_inputs=settings.example_inputs,
            on_disk=settings.max_memory is not None,
            cache=settings.cache,
            image_size=settings.pixels,
            sequence_length=settings.sequence_length,
        )
    except UndetectedCacheError as error:
        try:
            trace_with_guards(error.uncached)
        except OneLengthError as without:
            raise SubjectError(
                f"the KV cache of {error.uncached.name} could not be detected ({error.reason}), and without one, "
                f"{without}"
            ) from without
        except CompressorError as without:
            raise SubjectError(
                f"the KV cache of {error.uncached.name} could not be detected ({error.reason}), and --no-cache does "
                f"not help: {without}"
            ) from without
        raise


def without_image_tokens(graph: Graph, model: Model, settings: Settings) -> Graph:
    """Return a fork that drops image tokens as ``--image-tokens`` says, or the graph without it.

    Raises:
        PassError: the language model does not allow it.
    """
    stages = settings.image_stages
    return graph if stages is None else _drop_image_tokens(stages, graph, model, settings)


def _drop_image_tokens(asked: ImageTokens, graph: Graph, model: Model, settings: Settings) -> Graph:
    fork, method = graph.fork(), cast("Method", asked.method)
    apply(DropImageTokens(asked.stages, method, settings.seed, model.preprocess.image_token), fork)
    return fork


def quarters(model: Model) -> tuple[int, ...]:
    """Return the blocks at a quarter, a half and three quarters of a language model with a KV cache, none twice."""
    blocks = 1 + max((int(name.split(".")[1]) for name in model.state if name.endswith(".key")), default=0)
    return tuple(sorted({max(min(quarter * blocks // 4, blocks - 1), 1) for quarter in (1, 2, 3)}))


def _depths(settings: Settings, model: Model) -> tuple[int, ...]:
    """Return the blocks before which ``--image-tokens`` drops tokens; for ``auto`` those of `quarters`.

    Raises:
        SubjectError: the model reads no images with its texts.
    """
    stages = settings.image_stages
    if stages is None and settings.image_tokens != AUTO:
        return ()
    if model.is_vision_language:
        return quarters(model) if stages is None else tuple(depth for depth, _ in stages.stages)
    raise SubjectError(
        f"--image-tokens {settings.image_tokens} drops image tokens from the prompt of a vision-language model, but "
        f"{model.name} does {model.task}; leave --image-tokens out."
    )


def _check_parts(model: Model, settings: Settings) -> None:
    """Refuse what the files of the parts of a model are not written for."""
    parts = (
        "an encoder-decoder, whose encoder and decoder"
        if model.is_encoder_decoder
        else ("a vision-language model, whose vision tower and language model")
    )
    if settings.target not in PARTS_TARGETS:
        raise SubjectError(
            f"{model.name} is {parts} are files of their own, and --target {settings.target} takes one file; give "
            f"--target {' or '.join(PARTS_TARGETS)}."
        )
    if settings.defer_build or (settings.factorial and not model.is_encoder_decoder):
        option = "--defer-build" if settings.defer_build else "--factorial"
        raise SubjectError(
            f"{model.name} is {parts} are files of their own, and {option} takes one file for each engine; leave "
            f"{option} out."
        )


def _check_two_towers(model: Model, settings: Settings) -> None:
    """Refuse what takes rows of one batch, or a config that counts the blocks of one tower."""
    if settings.target == TRANSFORMERS:
        raise SubjectError(
            f"{model.name} has a tower of images and one of texts, and --target {TRANSFORMERS} leaves out blocks of "
            "one list; choose another --target."
        )
    if settings.defer_build:
        raise SubjectError(
            f"{model.name} takes images and texts in batches of their own, and --defer-build stores rows of one batch; "
            "leave --defer-build out."
        )


def check_original(subject: TracedModel, steps: Steps) -> TracedModel:
    """Return the model and data with a limitation if the original is not certain to be better than chance on it.

    Nothing is checked for random data or weights. Metrics that compare with the original have no chance, and only its
    answers for different samples are compared.

    Raises:
        CompressorError: the original gives one answer for all validation data, is no better than chance on it, or fails
            on it.
    """
    if subject.no_quality_because is not None:
        return subject
    data = subject.data
    with steps.step("check the original"), index_errors_as_data_errors(subject):
        found = chance.check_original(subject.graph, subject.model, data.validation, subject.metric, data.source)
    judged = [part for part in data.parts if part.name in ("decision", "test")]
    found = (*found, *chance.constant_scores(subject.metric, judged))
    return dataclasses.replace(subject, data=dataclasses.replace(data, limitations=(*data.limitations, *found)))


def _costs(graph: Graph, model: Model, data: Data) -> Costs:
    """Return the costs at the sizes of real samples, because the multiply-adds of a text depend on its length."""
    feeds = next(tensor_batches(data.calibration.middle(COST_SAMPLES), COST_SAMPLES))
    if model.has_two_towers:  # a sample is an image and a text
        feeds = take_rows(feeds, range(len(next(iter(feeds.values())))))
    try:
        return Costs(graph, feeds)
    except (IndexError, RuntimeError) as error:
        raise _refused(model, data, error) from error


def load_data(settings: Settings, model: Model, tick: Tick, *, decision: float = 0.0) -> Data:
    """Load the data with the preprocessing of the model.

    Raises:
        CompressorError: the data cannot be read, or does not fit the model.
    """
    source = settings.data
    _check_prompt_options(settings, model)
    if model.task != "text-generation" and (settings.max_length, settings.stride) != (None, None):
        raise SubjectError(
            f"--max-length and --stride cut the texts of language models; {model.name} does {model.task}."
        )
    data = data_module.load(
        str(source or models.SAMPLE / "digits.npz"),
        model.preprocess,
        task=model.task,
        seed=settings.seed,
        shares=Shares(total=settings.samples, decision=decision),
        revision=None,  # --revision applies to the model; that of a data set is part of its name, owner/name@revision
        progress=tick,
        max_length=settings.max_length,
        stride=settings.stride,
        class_names=model.class_names,
        names_file=settings.class_names,
        template=settings.prompt_template,
        logits=logits_per_token(model),
    )
    judged = evaluated_on(model, data)
    _check_labels(data, judged)
    data = _without_other_labels(data, judged)
    if model.task == "text-generation" and not data.random and data.label_kind != "tokens":
        raise SubjectError(f"{data.source} holds no texts or token ids, which a language model needs.")
    return data


def _without_other_labels(data: Data, model: Model) -> Data:
    """Return data without labels of a kind that the head is not measured with, such as classes of a detector's images.

    What was found about them is left out, and a limitation says so.
    """
    read = head_for(model.task, model.problem_type).metrics
    if data.label_kind not in OTHER_LABELS or data.label_kind in read:
        return data
    kinds = ", ".join(OTHER_LABELS[kind] for kind in read if kind in OTHER_LABELS)
    expected = f"expected {kinds}" if kinds else "which takes no labels"
    found = Limitation(
        "labels",
        f"the data has {OTHER_LABELS[data.label_kind]} ({data.reading}), which is not read for {model.task}, "
        f"{expected}; results are compared with the original",
    )
    kept = [each for each in data.limitations if each.feature not in (CLASS_ORDER, ONE_CLASS, EMPTY_CLASSES)]
    return dataclasses.replace(data, label_kind=None, limitations=(*kept, found))


def evaluated_on(model: Model, data: Data) -> Model:
    """Return a model of images and texts as its data evaluates it; other models stay as they are.

    With class names it is a classifier, whose classes are the prompts. Without them, as with pairs of images and texts,
    the embeddings of both towers are evaluated, [rows, 2, width].
    """
    if model.task != ZERO_SHOT:
        return model
    if data.prompts is not None:
        return dataclasses.replace(model, class_names=data.prompts.names)
    why = Limitation(
        "zero-shot accuracy",
        "not measured, because the data has a text for each image instead of class names; the embeddings of both are "
        "compared with those of the original",
    )
    return dataclasses.replace(
        model,
        task="feature-extraction",
        answer="image_embeds",
        stacked=("text_embeds",),
        limitations=model.limitations if data.random else (*model.limitations, why),
    )


def _check_prompt_options(settings: Settings, model: Model) -> None:
    """Refuse options for the prompts of classes where the classes are no texts, or nothing is evaluated."""
    for option, value in (("--class-names", settings.class_names), ("--prompt-template", settings.prompt_template)):
        if value is None:
            continue
        if model.task != ZERO_SHOT:
            raise SubjectError(
                f"{option} is for models of images and texts such as CLIP, but {model.name} does {model.task}; leave "
                f"{option} out."
            )
        if settings.data == "random":
            raise SubjectError(f"found {option} with random data, which has no classes; leave {option} out.")


def _check_labels(data: Data, model: Model) -> None:
    """Refuse labels that do not fit the outputs of the model, for which the metric would be silently wrong.

    Raises:
        SubjectError: a classifier has a single output, or the labels have other classes or another shape.
    """
    classes = model.classes()
    if classes is None or data.random:
        return
    single = head_for(model.task, model.problem_type).metrics.get("class") is not None
    if classes == 1 and single:
        raise SubjectError(
            f"{model.name} has a single output, so it predicts no class; pass --problem-type regression if the output "
            "is a number, or multi_label_classification if it is the logit or the probability of a yes or no."
        )
    _check_class_numbers(data, model, classes)
    _check_numbering(data.calibration.samples, data, model, classes)


def _check_numbering(samples: Samples, data: Data, model: Model, classes: int) -> None:
    """Refuse class names that are not the model's and of another number, because no order makes them its classes."""
    if samples.numbering is None or samples.numbering.by != "order" or len(samples.numbering.numbers) == classes:
        return
    found, names = list(samples.numbering.numbers), model.class_names
    known = [] if names is None else list(names.id2label().values())
    own = f"has other names for them ({listed(known)})" if known else "does not name them"
    raise SubjectError(
        f"{data.source} has {len(found)} class names ({listed(found)}), but {model.name} has {classes} classes and "
        f"{own}; give its names or numbers as labels, or no labels to compare the result with the original."
    )


def _check_class_numbers(data: Data, model: Model, classes: int) -> None:
    """Refuse class numbers that the model does not have, and label sets of another width."""
    labels = [part.labels for part in data.parts if part.labels is not None]
    if data.label_kind == "labels" and any(part.shape[1] != classes for part in labels):
        raise SubjectError(
            f"{data.source} has sets of {labels[0].shape[1]} labels, but {model.name} has {classes}; give a column for "
            "each label of the model, in its order."
        )
    numbers = [part.size // max(1, len(part)) for part in labels]
    if data.label_kind == "score" and model.problem_type == "regression" and any(each != classes for each in numbers):
        raise SubjectError(
            f"{data.source} has one number for each sample, but {model.name} predicts {classes}, of which no labels "
            "are read; give the data without labels, to compare the result with the original."
        )
    largest = data.calibration.samples.largest_class
    if data.label_kind == "class":
        largest = max(int(part.max()) for part in labels)
    if data.label_kind == "pixels":
        largest = max(_largest_class(part.head(MASKS)) for part in data.parts)
    if largest is not None and largest >= classes and model.problem_type != "regression":
        raise SubjectError(
            f"{data.source} has labels up to {largest}, but {model.name} has only {classes} classes, 0 to "
            f"{classes - 1}; give its class numbers or names, or no labels to compare the result with the original."
        )


def _largest_class(part: Split) -> int:
    """Return the largest class in the masks of a split."""
    labels = [batch.labels for batch in part.batches(8)]
    return max(int(each[each != NO_CLASS].max(initial=0)) for each in labels if each is not None)


def _check_pooled(graph: Graph, model: Model) -> None:
    """Refuse a classifier whose logits have more axes than samples and classes, such as one row for each token."""
    value = value_of(output_values(graph)[graph.outputs.index(model.answer)])
    if not isinstance(head_for(model.task, model.problem_type), SingleClass | LabelSets | Regression):
        return
    if isinstance(value, torch.Tensor) and value.ndim > 2:
        shape = " x ".join(map(str, value.shape[1:]))
        features = "image-feature-extraction" if model.preprocess.kind == "image" else "feature-extraction"
        raise SubjectError(
            f"{model.name} returns {model.answer} of {shape} values for each sample; {model.task} expects one for each "
            f"class, so have the model pool its tokens, or pass --task {features} to export it without its classifier."
        )


def _check_trained(graph: Graph, model: Model) -> None:
    """Refuse a checkpoint that lacks weights on which the outputs depend, because they would be random."""
    used = {str(node.target).removeprefix(graph.prefix) for node in graph.nodes() if node.op == "get_attr"}
    absent = [name for name in model.untrained if name in used]
    if absent:
        raise SubjectError(
            f"the checkpoint of {model.name} lacks weights that {model.task} needs: {absent[0]} ({len(absent)} in "
            "all); choose a fine-tuned checkpoint, or another --task."
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
