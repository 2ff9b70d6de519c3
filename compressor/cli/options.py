"""Options of the command line, made from the fields of the settings classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import Field
from typing import Any, TypeVar

import click

from compressor.cli.param_types import Bytes, Duration, Milliseconds, Names, Numbers, Percentage
from compressor.options import Option, facts_of, fields_of, flag

Command = TypeVar("Command", bound=Callable[..., Any])

UNITS: dict[str | None, click.ParamType[Any]] = {
    "milliseconds": Milliseconds(),
    "seconds": Duration(),
    "bytes": Bytes(),
    "percent": Percentage(),
}
TYPES: dict[str, click.ParamType[Any]] = {
    "int": click.INT,
    "float": click.FLOAT,
    "tuple[int, ...]": Numbers(),
    "tuple[str, ...]": Names(),
}

quiet_option = click.option("--quiet", "-q", is_flag=True, help="Show no progress.")


def field_options(settings: type, *names: str) -> Callable[[Command], Command]:
    """Add the options of some fields of a settings class to a command, listed in this order by ``--help``."""

    def add(command: Command) -> Command:
        for name in reversed(names):
            command = field_option(settings, name)(command)
        return command

    return add


def field_option(settings: type, name: str, **changes: Any) -> Callable[[Command], Command]:
    """Add the option of one field to a command; `changes` replace its default or facts of its `Option`."""
    field = fields_of(settings)[name]
    default = changes.pop("default", field.default)
    facts = dataclasses.replace(facts_of(field), **changes)
    if facts.positional:
        return click.argument(name, nargs=-1) if default == () else click.argument(name, required=False)
    help = facts.help + (f"  [default: {facts.unset}]" if facts.unset else "")
    if isinstance(default, bool):
        no = "no-" if default else ""
        return click.option(
            f"--{no}{flag(name)}", name, is_flag=True, flag_value=not default, default=default, help=help
        )
    kind = _parameter_type(field, facts)
    without_value: dict[str, Any] = {} if facts.bare is None else {"is_flag": False, "flag_value": facts.bare}
    return click.option(
        f"--{flag(name)}",
        *([f"-{facts.letter}"] if facts.letter else []),
        name,
        type=kind,
        multiple=facts.repeatable,
        default=kind.text(default) if isinstance(kind, Duration) else default,
        show_default=True,
        metavar=facts.metavar,
        help=help,
        **without_value,
    )


def argument_help(settings: type, name: str) -> str:
    """Return the help of a positional argument, which click lists nowhere, as a sentence for the end of ``--help``."""
    facts = facts_of(fields_of(settings)[name])
    return f"{name.upper()} is {facts.help}" + (f"  [default: {facts.unset}]" if facts.unset else "")


def _parameter_type(field: Field[Any], facts: Option) -> click.ParamType[Any]:
    """Return the parameter type of a field, from its choices, unit and annotation."""
    annotation = str(field.type).removesuffix(" | None")
    if facts.choices:
        return click.Choice(facts.choices)
    if facts.unit in UNITS:
        return UNITS[facts.unit]
    if annotation == "int" and facts.least is not None:
        return click.IntRange(min=int(facts.least))
    return click.STRING if facts.repeatable else TYPES.get(annotation, click.STRING)
