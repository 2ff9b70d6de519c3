"""Options, each declared once: a field of a settings class carries its default, its help and its bounds.

The command line, the Python API, the checks and the reference are made from these fields. The module imports only the
standard library and `compressor.errors`, so that `--help` stays fast.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
import numbers
import os
import textwrap
from collections.abc import Callable, Collection
from dataclasses import Field, dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

from compressor.errors import SettingsError

Value = TypeVar("Value")
Class = TypeVar("Class", bound=type)
Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")

_KEY = "option"
# The types of fields with their words.
TYPES: dict[str, tuple[type, str]] = {
    "str": (str, "a text"),
    "Path": (os.PathLike, "a path"),
    "int": (int, "an integer"),
    "float": (numbers.Real, "a number"),
    "bool": (bool, "True or False"),
}
LONGEST = 60  # characters of a value in a message
# Options whose values can be paths.
PATHS = frozenset({"model", "data", "drop", "output", "prices", "class_names", "what", "include_path", "against_data"})


@dataclass(frozen=True)
class Option:
    """Facts about an option that the name, the type and the default of its field do not state.

    Attributes:
        help: what the option does. The help of a positional argument continues the sentence "NAME is".
        unset: the default in words, where None or an empty value stands for it.
        choices: the allowed values; empty allows every value of the type.
        least: smallest allowed number.
        above: bound that a number must exceed.
        most: largest allowed number.
        unit: ``percent``, ``milliseconds``, ``seconds`` or ``bytes``.
        metavar: name of the value in ``--help``; None takes that of the type, or lists the choices.
        letter: short form of the option, without the minus sign.
        bare: value of the option where none follows it; None requires one.
        positional: an argument of the command rather than an option.
        repeatable: the option may be given several times; the value is a tuple.
    """

    help: str
    unset: str = ""
    choices: tuple[str, ...] = ()
    least: float | None = None
    above: float | None = None
    most: float | None = None
    unit: str | None = None
    metavar: str | None = None
    letter: str = ""
    bare: str | None = None
    positional: bool = False
    repeatable: bool = False


def option(default: Value, help: str, **facts: Any) -> Value:
    """Declare a field of a settings class as an option; `facts` are the other attributes of `Option`."""
    return dataclasses.field(default=default, metadata={_KEY: Option(help, **facts)})


def like(settings: type, name: str, **changes: Any) -> Any:
    """Declare a field as the option `name` of another settings class, apart from some facts or the default."""
    field = fields_of(settings)[name]
    default = changes.pop("default", field.default)
    return dataclasses.field(default=default, metadata={_KEY: dataclasses.replace(facts_of(field), **changes)})


def fields_of(settings: type) -> dict[str, Field[Any]]:
    """Return the fields of a settings class by name."""
    return {field.name: field for field in dataclasses.fields(settings)}


def facts_of(field: Field[Any]) -> Option:
    """Return the facts about the option that a field declares."""
    return cast(Option, field.metadata[_KEY])


def flag(name: str) -> str:
    """Return the name of an option on the command line, without the minus signs.

    >>> flag("heal_budget")
    'heal-budget'
    """
    return name.replace("_", "-")


def check_options(settings: Any) -> None:
    """Compare every field with the type, the choices and the bounds of its option.

    Raises:
        SettingsError: a value is of another type, is none of the choices, or is out of bounds.
    """
    _take_plain_integers(settings)
    _expand_home(settings)
    for name, field in fields_of(type(settings)).items():
        facts, value = facts_of(field), getattr(settings, name)
        if value is None and field.default is None:
            continue
        if facts.choices and value not in facts.choices:
            raise SettingsError(f"unknown {name} {value!r}; expected {' or '.join(facts.choices)}.")
        if (expected := _type_in_words(value, field)) is not None:
            raise SettingsError(f"{flag(name)} is {_value_in_words(value)}; expected {expected}.")
        if not _within(value, facts):
            raise SettingsError(f"{flag(name)} is {_shown(value)}; expected {_exceeded(value, field)}.")


def _take_plain_integers(settings: Any) -> None:
    """Replace the integers of NumPy, which JSON does not take, by those of Python."""
    for name in fields_of(type(settings)):
        value = getattr(settings, name)
        whole = isinstance(value, numbers.Integral)
        if whole and not isinstance(value, int):
            object.__setattr__(settings, name, int(value))


def _expand_home(settings: Any) -> None:
    """Replace a leading ``~/`` in paths by the home folder; a shell leaves it in ``--output=~/out``."""
    for name in fields_of(type(settings)).keys() & PATHS:
        value = getattr(settings, name)
        if isinstance(value, tuple):
            object.__setattr__(settings, name, tuple(map(at_home, value)))
        elif isinstance(value, str | Path):
            object.__setattr__(settings, name, at_home(value))


def at_home(path: Value) -> Value:
    """Return a path or a text with a leading ``~/`` replaced by the home folder, if there is one."""
    if not isinstance(path, str | Path) or not str(path).startswith("~/"):
        return path
    with contextlib.suppress(RuntimeError):  # no home folder
        return cast(Value, type(path)(Path(path).expanduser()))
    return path


def _type_in_words(value: object, field: Field[Any]) -> str | None:
    """Return the type of a field in words if a value does not have it; None if it has, or if the type has no words."""
    annotation = field.type.__name__ if isinstance(field.type, type) else str(field.type)
    names = annotation.removesuffix(" | None").split(" | ")
    if not set(names) <= TYPES.keys():
        return None
    is_switch = isinstance(value, bool) and "bool" not in names  # Python counts it as an integer
    if not is_switch and any(isinstance(value, TYPES[name][0]) for name in names):
        return None
    return " or ".join(TYPES[name][1] for name in names)


def _value_in_words(value: object) -> str:
    """Return a value as it is written, or the class of a value that would fill more than a line."""
    short = isinstance(value, str | int | float | None) and len(repr(value)) <= LONGEST
    return repr(value) if short else f"of the type {type(value).__name__}"


def _within(value: float, facts: Option) -> bool:
    """Return whether a number is finite and within the bounds of an option; without bounds, any value is."""
    least, above, most = facts.least, facts.above, facts.most
    if least is None and above is None:
        return True
    low_enough = value < math.inf if most is None else value <= most
    return low_enough and (least is None or value >= least) and (above is None or value > above)


def _bounds(field: Field[Any]) -> str:
    """Return the bounds of an option in words, or nothing if it has none."""
    facts = facts_of(field)
    number = "percentage" if facts.unit == "percent" else "number"
    if facts.above is not None:
        return f"a finite {number} above {facts.above:g}"
    if facts.least is None:
        return ""
    if facts.most is not None and not _is_integer(field):
        return f"{facts.least:g} to {facts.most:g}{' percent' if facts.unit == 'percent' else ''}"
    return f"at least {facts.least:g}" if _is_integer(field) else f"a finite {number} of at least {facts.least:g}"


def _exceeded(value: float, field: Field[Any]) -> str:
    """Return the bound of an option that a number exceeds, in words."""
    most = facts_of(field).most
    return f"at most {most:,}" if most is not None and _is_integer(field) and value > most else _bounds(field)


def _shown(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _is_integer(field: Field[Any]) -> bool:
    return str(field.type).removesuffix(" | None") == "int"


def documented(settings: Class) -> Class:
    """Append the section "Attributes" to the docstring of a settings class, with the options that it declares."""
    own = [field for name, field in fields_of(settings).items() if name in inspect.get_annotations(settings)]
    lines = [f"    {field.name}: {_description(field)}" for field in own]
    wrapped = (textwrap.fill(line, 120, subsequent_indent=" " * 8, break_on_hyphens=False) for line in lines)
    settings.__doc__ = "\n".join([inspect.cleandoc(settings.__doc__ or ""), "", "Attributes:", *wrapped, ""])
    return settings


def _description(field: Field[Any]) -> str:
    """Return help, choices, unit, bounds and default of an option as sentences for the reference of the Python API."""
    facts = facts_of(field)
    bounds = _bounds(field)
    sentences = (
        f"False (``--no-{flag(field.name)}``): {facts.help}" if field.default is True else facts.help,
        f"One of {', '.join(facts.choices)}." if facts.choices and facts.metavar is None else "",
        f"In {facts.unit}." if facts.unit not in (None, "percent") else "",
        f"Expected: {bounds}." if bounds else "",
        f"Default: {facts.unset}." if facts.unset else "",
    )
    return " ".join(sentence for sentence in sentences if sentence)


def takes_fields(
    settings: Callable[Arguments, Value], names: Collection[str] | None = None
) -> Callable[[Callable[[Value], Result]], Callable[Arguments, Result]]:
    """Give a function the fields of a settings class as arguments, in place of the settings that it takes.

    Positional options are positional arguments, all others are keyword arguments. A type checker accepts the arguments
    of the class.

    Args:
        settings: the settings class.
        names: the fields to take; the others keep their defaults. None takes all.
    """
    fields = [field for name, field in fields_of(cast(type, settings)).items() if names is None or name in names]

    def decorate(function: Callable[[Value], Result]) -> Callable[Arguments, Result]:
        returned = inspect.signature(function).return_annotation
        signature = inspect.Signature([_parameter(field) for field in fields], return_annotation=returned)

        @functools.wraps(function)
        def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            try:
                given = signature.bind(*args, **kwargs).arguments
            except TypeError as error:
                raise TypeError(f"{function.__name__}(): {error}") from None
            return function(cast(Callable[..., Value], settings)(**given))

        call.__signature__ = signature  # type: ignore[attr-defined]
        return call

    return decorate


def _parameter(field: Field[Any]) -> inspect.Parameter:
    """Return the parameter of a field; a positional tuple becomes ``*name``."""
    kinds, annotation = inspect.Parameter, str(field.type)
    if facts_of(field).positional and annotation.startswith("tuple["):
        element = annotation.removeprefix("tuple[").removesuffix(", ...]")
        return inspect.Parameter(field.name, kinds.VAR_POSITIONAL, annotation=element)
    kind = kinds.POSITIONAL_OR_KEYWORD if facts_of(field).positional else kinds.KEYWORD_ONLY
    return inspect.Parameter(field.name, kind, default=field.default, annotation=annotation)
