"""Class names as texts, for models of images and texts: each class is a prompt, and an image has that of its folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from compressor.choices import TEMPLATE_GAP
from compressor.data.class_labels import listed, with_class_numbers
from compressor.data.readers.base import Feeds, Samples
from compressor.data.readers.texts import text_of
from compressor.data.text_lengths import MOST_UNKNOWN
from compressor.errors import DataError
from compressor.limitations import Limitation
from compressor.models.class_names import ClassNames, words_of_synsets
from compressor.models.preprocess import Preprocess

AT_ONCE = 128  # images beside the prompts of as many classes or more
FOLDERS = "the class names of the data"
SYNSET = re.compile(r"n\d{8}")  # a noun of WordNet, as the folders of ImageNet are named


@dataclass(frozen=True)
class ClassPrompts:
    """The classes of images, as texts.

    Attributes:
        template: makes a prompt of a name, which stands for ``{}``.
        names: the names, by class number; the first name of each class stands in its prompt.
        source: the file that the names come from, or `FOLDERS`.
        own_template: whether the template was given, and not that of the model.
    """

    template: str
    names: ClassNames
    source: str
    own_template: bool = False

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts, by class number."""
        return tuple(self.template.replace(TEMPLATE_GAP, names[0]) for names in self.names.names)

    def sentence(self) -> str:
        """Return a sentence with the classes and the template."""
        return (
            f"Zero-shot: {len(self.names):,} class names ({listed(self.names.known(len(self.names)))}; from "
            f"{self.source}) in the prompt {self.template!r}."
        )

    def describe(self) -> dict[str, Any]:
        """Return the entry of report.json, as JSON values."""
        return {
            "template": self.template,
            "class_names": [names[0] for names in self.names.names],
            "class_names_from": self.source,
        }


def with_class_prompts(
    samples: Samples, preprocess: Preprocess, spec: str, *, file: str | Path | None, template: str | None
) -> tuple[Samples, ClassPrompts | None]:
    """Add the prompts of all classes to the inputs of every batch; pairs of images and texts stay as they are.

    Args:
        samples: the samples of a reader.
        preprocess: preprocessing of a model of images and texts.
        spec: name of the data in messages.
        file: file of class names, see `read_class_names`; None takes those of the data.
        template: the prompt template; None takes that of the model.

    Returns:
        The samples, and the prompts; None for pairs of images and texts.

    Raises:
        DataError: there are no class names, those of the data are not in the file, or the model has no tokenizer.
    """
    if samples.has_texts:
        _check_unasked(spec, file, template)
        return samples, None
    names = _names(samples, spec, file)
    prompts = ClassPrompts(
        preprocess.template if template is None else template,
        names,
        FOLDERS if file is None else Path(file).name,
        template is not None,
    )
    if preprocess.text is None:
        raise DataError(
            f"{spec} holds images, whose class names the model reads as texts, but it has no tokenizer; add its "
            "tokenizer files (tokenizer.json, tokenizer_config.json)"
        )
    tokens = preprocess.text(list(prompts.prompts), None)
    limitations = (*samples.limitations, *_limitations(prompts, tokens, preprocess))
    samples = with_class_numbers(replace(samples, limitations=limitations), names, spec)
    if samples.numbering is not None and samples.numbering.by == "order":
        raise DataError(
            f"{spec} has the class names {listed(list(samples.numbering.numbers))}, none of which is in "
            f"{Path(str(file)).name} ({listed(names.known())}); give a line for each: NAME, or FOLDER, a tab and NAME"
        )
    at_once = min(len(names), AT_ONCE)
    return replace(samples, feeds=_beside(samples.feeds, tokens), at_once=at_once), prompts


def read_class_names(path: Path) -> ClassNames:
    """Read a file with a class a line: its name, or the name of its folder, a tab, and its name.

    Raises:
        DataError: it cannot be read, or has fewer than two names, or a name twice.
    """
    try:
        lines = [line.strip() for line in text_of(path, path.name).split("\n") if line.strip()]
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}); check --class-names") from error
    cells = [[cell.strip() for cell in line.split("\t")] for line in lines]
    wrong = next((line for line, found in zip(lines, cells, strict=True) if len(found) > 2 or not all(found)), None)
    if wrong is not None:
        raise DataError(f"{path.name} has the line {wrong[:40]!r}; expected NAME, or FOLDER, a tab and NAME")
    names = tuple(tuple(dict.fromkeys(reversed(found))) for found in cells)
    return _checked(names, path.name)


def _names(samples: Samples, spec: str, file: str | Path | None) -> ClassNames:
    if file is not None:
        return read_class_names(Path(file))
    if samples.class_names is None:
        raise DataError(
            f"{spec} has no class names, which the model reads as texts; give --class-names FILE with a name a line, a "
            "folder of images for each class, or a text for each image in metadata.jsonl"
        )
    return _checked(tuple(map(_readable, _words_of_synsets(samples.class_names, spec))), spec)


def _words_of_synsets(names: Sequence[str], spec: str) -> list[tuple[str, ...]]:
    """Return each name of a folder, behind the first word of its WordNet synset if all are synsets of ImageNet.

    Raises:
        DataError: all have the form of a synset, and one is none of ImageNet.
    """
    if not all(SYNSET.fullmatch(name) for name in names):
        return [(name,) for name in names]
    words = words_of_synsets()
    unknown = next((name for name in names if name not in words), None)
    if unknown is not None:
        raise DataError(f"{spec} has the folder {unknown}, which is no synset of ImageNet; give names by --class-names")
    first = [words[name].split(", ")[0] for name in names]
    # Synsets may share their first word, as the crane that flies and the one that lifts; a definition follows there.
    defined = words_of_synsets(defined=True) if len(set(first)) < len(first) else {}
    shared = {word for word in first if first.count(word) > 1}
    return [(defined[name] if word in shared else word, name) for name, word in zip(names, first, strict=True)]


def _readable(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the first name of a folder as words, and all as they are."""
    return tuple(dict.fromkeys([" ".join(names[0].replace("_", " ").split()) or names[0], *names]))


def _checked(names: tuple[tuple[str, ...], ...], source: str) -> ClassNames:
    """Return the names of classes.

    Raises:
        DataError: there are fewer than two, or two classes have the same.
    """
    first = [each[0] for each in names]
    if len(names) < 2:
        raise DataError(f"{source} has {len(names)} class names; expected at least 2")
    twice = next((name for name in first if first.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{source} has the class name {twice!r} twice; expected another name for each class")
    return ClassNames(names)


def _check_unasked(spec: str, file: str | Path | None, template: str | None) -> None:
    """Refuse options for prompts where each image has a text of its own."""
    for option, value in (("--class-names", file), ("--prompt-template", template)):
        if value is not None:
            raise DataError(f"{spec} has a text for each image, so {option} would have no effect; leave it out")


def _limitations(prompts: ClassPrompts, tokens: Feeds, preprocess: Preprocess) -> Iterator[Limitation]:
    """Yield limitations for an assumed template, and for prompts that are truncated.

    Raises:
        DataError: the tokenizer does not know the words of the prompts.
    """
    if not prompts.own_template:
        yield Limitation(
            "prompt template",
            f"{prompts.template!r} is assumed for {len(prompts.names):,} classes; give --prompt-template for another",
        )
    if prompts.source == FOLDERS and all(SYNSET.fullmatch(names[-1]) for names in prompts.names.names):
        yield Limitation(
            "class names",
            f"the folders are synsets of WordNet, so {prompts.names.names[0][-1]} is read as "
            f"{prompts.names.names[0][0]!r}, its first word; give --class-names for others",
        )
    elif all(names[0].isdecimal() for names in prompts.names.names):
        yield Limitation(
            "class names",
            f"they are numbers, so a prompt is {prompts.prompts[0]!r}; give --class-names FILE if they have names",
        )
    if preprocess.lengths is not None and preprocess.limit is not None:
        long = sum(length > preprocess.limit for length in preprocess.lengths(list(prompts.prompts), None))
        if long:
            yield Limitation(
                "length of texts",
                f"{long:,} of {len(prompts.names):,} prompts are truncated to {preprocess.limit} tokens",
            )
    ids = tokens["input_ids"]
    words = ~np.isin(ids, [token for token in preprocess.special if token != preprocess.unknown])
    unknown = 0.0 if preprocess.unknown is None else float((ids == preprocess.unknown).sum() / max(1, words.sum()))
    if unknown > MOST_UNKNOWN:
        raise DataError(
            f"{unknown:.0%} of the tokens of the class names are unknown to the tokenizer ({preprocess.tokenizer}), as "
            f"in {prompts.prompts[0]!r}; give names in its language with --class-names"
        )


def _beside(feeds: Callable[[Sequence[int]], Feeds], tokens: Feeds) -> Callable[[Sequence[int]], Feeds]:
    """Return the inputs of a batch with the prompts of all classes, which have another number of rows."""
    return lambda indices: feeds(indices) | {name: value.copy() for name, value in tokens.items()}
