"""The names of a classifier's classes, from the fields in which transformers and timm store them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from compressor.limitations import Limitation
from compressor.models.base import ModelError

GENERIC = re.compile(r"(LABEL|CLASS)_\d+", re.IGNORECASE)  # names that transformers makes up
PRETRAINED_ON_IMAGENET = re.compile(r"in(1|12|21|22)k")  # in the tag of timm's weights
IMAGENET_CLASSES = 1000
IMAGENET_SHARE = 0.9  # share of classes that must have a name of ImageNet-1k; lists of its names differ in a few


@dataclass(frozen=True)
class ClassNames:
    """The names of the classes of a model.

    Attributes:
        names: all names of each class, by class number. The first is the name in reports. A class without a name has
            an empty tuple.
        contradiction: difference between two fields of the config that name the classes; None if there is none.
    """

    names: tuple[tuple[str, ...], ...]
    contradiction: str | None = None

    def __len__(self) -> int:
        return len(self.names)

    def first(self, number: int) -> str | None:
        """Return the name of a class for reports; None if it has no name."""
        return self.names[number][0] if 0 <= number < len(self.names) and self.names[number] else None

    def id2label(self) -> dict[str, str]:
        """Return the class numbers with the names for reports, as transformers writes them to JSON."""
        return {str(number): names[0] for number, names in enumerate(self.names) if names}

    def known(self, most: int = 5) -> list[str]:
        """Return the first names for reports."""
        return list(self.id2label().values())[:most]

    def numbers(self, name: str) -> tuple[int, ...]:
        """Return the numbers of the classes with this name; more than one if the name is ambiguous.

        The first of these rules that finds a class decides: the name is the same, it is one of several names of the
        class that are separated by commas, or one of both after `normalized`.

        >>> names = ClassNames((("tench, Tinca tinca", "n01440764"), ("not_entailment",)))
        >>> names.numbers("Tinca tinca"), names.numbers("n01440764"), names.numbers("Not entailment")
        ((0,), (0,), (1,))
        """
        tables = self._tables
        return next((table[key] for table, key in zip(tables, _keys(name), strict=True) if key in table), ())

    @cached_property
    def _tables(self) -> tuple[dict[str, tuple[int, ...]], ...]:
        """Return the class numbers by name, one table for each rule of `numbers`."""
        listed = [[name, *_separated(name)] for names in self.names for name in names]
        owners = [number for number, names in enumerate(self.names) for _ in names]

        def table(key: Callable[[str], str], count: int | None) -> dict[str, tuple[int, ...]]:
            found: dict[str, dict[int, None]] = {}
            for number, names in zip(owners, listed, strict=True):
                for name in names[:count]:
                    found.setdefault(key(name), {})[number] = None
            return {name: tuple(numbers) for name, numbers in found.items()}

        return table(str, 1), table(str, None), table(normalized, 1), table(normalized, None)


def normalized(name: str) -> str:
    """Return a name without differences of case, Unicode form, and spaces, underscores and hyphens.

    >>> normalized(" Great_white-Shark")
    'great white shark'
    """
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFKC", name).casefold()).strip()


def _keys(name: str) -> tuple[str, str, str, str]:
    stripped = name.strip()
    return stripped, stripped, normalized(name), normalized(name)


def _separated(name: str) -> list[str]:
    parts = [part.strip() for part in name.split(",")]
    return [part for part in parts if part] if len(parts) > 1 else []


def from_config(config: Any, classes: int) -> ClassNames | None:
    """Return the names in ``id2label`` and ``label2id`` of an object; None if it names no class.

    Made-up names such as ``LABEL_0`` are left out. Further names in ``label2id`` are added to their classes.

    Args:
        config: a config of transformers, or any object with these attributes; ``id2label`` may also be a list.
        classes: number of classes of the model.

    Raises:
        ModelError: a class number in one of the two is not a whole number.
    """
    try:
        id2label = _by_number(getattr(config, "id2label", None))
        label2id = {str(name): int(number) for name, number in (getattr(config, "label2id", None) or {}).items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ModelError(
            f"id2label or label2id of {type(config).__name__} cannot be read ({error}); expected class numbers with "
            "names, and names with class numbers."
        ) from error
    label2id = {name: number for name, number in label2id.items() if not GENERIC.fullmatch(name)}
    if not id2label and not label2id:
        return None
    names: list[dict[str, None]] = [{} for _ in range(classes)]
    for number, name in (*id2label.items(), *((number, name) for name, number in label2id.items())):
        if number in range(classes):
            names[number][name] = None
    return ClassNames(tuple(map(tuple, names)), _contradiction(id2label, label2id, classes))


def _by_number(names: Any) -> dict[int, str]:
    """Return names by class number, from a list, or a mapping whose keys are numbers, without made-up names."""
    pairs = names.items() if isinstance(names, Mapping) else enumerate(names or ())
    by_number = {int(number): str(name) for number, name in pairs}
    return {number: name for number, name in by_number.items() if not GENERIC.fullmatch(name)}


def _contradiction(id2label: Mapping[int, str], label2id: Mapping[str, int], classes: int) -> str | None:
    for number, name in (*id2label.items(), *((number, name) for name, number in label2id.items())):
        if number not in range(classes):
            return f"its config gives {name!r} the class number {number}, but it has {classes} classes"
    for number, name in id2label.items():
        if label2id.get(name, number) != number:
            return f"id2label of its config names class {number} {name!r}, but label2id names class {label2id[name]} so"
    return None


def of_timm(module: Any) -> tuple[ClassNames | None, tuple[Limitation, ...]]:
    """Return the class names of a pretrained timm model, and the limitation if they were inferred.

    They are ``label_names`` and ``label_descriptions`` of its config. Without them, a model with as many classes as a
    subset of ImageNet has the names of that subset, as in timm's own ``infer_imagenet_subset``.
    """
    named = from_timm_config(module.pretrained_cfg, module.num_classes)
    if named is not None:
        return named, ()
    from timm.data import infer_imagenet_subset

    subset = infer_imagenet_subset(module)
    if subset is None:
        return None, ()
    tag = str(module.pretrained_cfg.get("tag") or module.pretrained_cfg.get("hf_hub_id") or "")
    inferred = Limitation(
        "class names",
        f"the model does not name its {module.num_classes:,} classes, so those of {subset} are assumed",
    )
    return _imagenet(subset), () if PRETRAINED_ON_IMAGENET.search(tag) else (inferred,)


def from_timm_config(config: Mapping[str, Any], classes: int) -> ClassNames | None:
    """Return the names in ``label_names`` and ``label_descriptions`` of a timm config; None if it has no names.

    Args:
        config: ``pretrained_cfg`` of a timm model.
        classes: number of classes of the model. Names that a changed classifier inherited do not apply to it.
    """
    if not config.get("label_names") or config.get("num_classes", classes) != classes:
        return None
    names, descriptions = _by_number(config["label_names"]), config.get("label_descriptions") or {}
    listed = [(name, descriptions.get(name)) for name in (names.get(number) for number in range(classes))]
    count = len(config["label_names"])
    wrong = None if count == classes else f"its config names {count} classes in label_names, but it has {classes}"
    return ClassNames(tuple(_unique(description, name) for name, description in listed), wrong)


def _imagenet(subset: str) -> ClassNames:
    """Return the names of a subset of ImageNet: the words of WordNet, and the synset such as n01440764."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo(subset)
    return ClassNames(tuple(map(_unique, info.label_descriptions(), info.label_names())))


def words_of_synsets(*, defined: bool = False) -> dict[str, str]:
    """Return the words of each synset of ImageNet, such as ``tench, Tinca tinca`` of ``n01440764``.

    Args:
        defined: whether the definition follows, as in ``crane: large long-necked wading bird``.
    """
    from timm.data import ImageNetInfo

    words: dict[str, str] = {}
    for subset in ("imagenet-22k", "imagenet-1k"):  # the larger one lacks synsets of the smaller one
        info = ImageNetInfo(subset)
        words |= dict(zip(info.label_names(), info.label_descriptions(detailed=defined), strict=True))
    return words


def _unique(*names: str | None) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name in names if name))


def with_synsets(names: ClassNames | None) -> ClassNames | None:
    """Add the synsets of ImageNet-1k to its class names, so that its class folders match, such as n01440764.

    Names of another data set are returned unchanged.
    """
    if names is None or len(names) != IMAGENET_CLASSES:
        return names
    imagenet = _imagenet("imagenet-1k")
    shared = sum(_share_a_name(*pair) for pair in zip(names.names, imagenet.names, strict=True))
    if shared < IMAGENET_SHARE * IMAGENET_CLASSES:
        return names
    merged = (_unique(*own, synset) for own, (_, synset) in zip(names.names, imagenet.names, strict=True))
    return ClassNames(tuple(merged), names.contradiction)


def _share_a_name(one: Sequence[str], other: Sequence[str]) -> bool:
    return not _words(one).isdisjoint(_words(other))


def _words(names: Iterable[str]) -> set[str]:
    return {normalized(word) for name in names for word in (name, *_separated(name))}


def of_module(module: Any, classes: int) -> ClassNames | None:
    """Return the class names of a user-defined module; None if it has none.

    They are its attribute ``id2label`` (a list, or a dict by class number), that of its ``config``, or ``label_names``
    of its ``pretrained_cfg``, if it is a model of timm.

    Raises:
        ModelError: ``id2label`` or ``label2id`` cannot be read.
    """
    for holder in (module, getattr(module, "config", None)):
        if (names := from_config(holder, classes)) is not None:
            return names
    config = getattr(module, "pretrained_cfg", None)
    return from_timm_config(config, classes) if isinstance(config, Mapping) else None
