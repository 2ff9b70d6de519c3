"""Options: one declared field becomes a command-line option, an argument, a check and an entry of the reference."""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner

from compressor.benchmark.bench_settings import BenchSettings
from compressor.cli.options import field_option, field_options
from compressor.commands import InspectSettings, SweepSettings
from compressor.errors import SettingsError
from compressor.options import check_options, documented, facts_of, fields_of, like, option, takes_fields
from compressor.settings import Settings


@documented
@dataclass(frozen=True)
class Baking:
    """Options of baking."""

    recipe: str | None = option(None, "a file or a name.", unset="bread", positional=True)
    oven: str = option("gas", "Kind of oven.", choices=("gas", "electric"), letter="k")
    time: float = option(300.0, "Baking time.", above=0.0, unit="seconds")
    salt: float | None = option(None, "Share of salt, in %.", least=0.0, most=100.0, unit="percent")
    loaves: int | None = option(None, "Number of loaves.", unset="as many as fit", least=1)
    steam: bool = option(True, "Bake without steam.")
    seeds: tuple[str, ...] = option((), "Seeds.", repeatable=True)

    def __post_init__(self) -> None:
        check_options(self)


@takes_fields(Baking)
def bake(settings: Baking) -> Baking:
    """Bake."""
    return settings


@click.command()
@field_options(Baking, *fields_of(Baking))
def command(**options: Any) -> None:
    """Bake."""
    click.echo(repr(Baking(**options)))


def test_one_declaration_makes_an_option_of_the_command_line() -> None:
    shown = CliRunner().invoke(command, ["--help"], terminal_width=100).output
    assert "Usage: command [OPTIONS] [RECIPE]" in shown
    for line in (
        "  -k, --oven [gas|electric]  Kind of oven.  [default: gas]",
        "  --time DURATION            Baking time.  [default: 5m]",
        "  --salt FLOAT               Share of salt, in %.",
        "  --loaves INTEGER RANGE     Number of loaves.  [default: as many as fit]  [x>=1]",
        "  --no-steam                 Bake without steam.",
        "  --seeds TEXT               Seeds.",
    ):
        assert line in shown.splitlines()
    given = ["rye", "-k", "electric", "--time", "90s", "--loaves", "2", "--no-steam", "--seeds", "a", "--seeds", "b"]
    expected = Baking("rye", oven="electric", time=90.0, loaves=2, steam=False, seeds=("a", "b"))
    assert CliRunner().invoke(command, given).output == f"{expected!r}\n"
    assert CliRunner().invoke(command, []).output == f"{Baking()!r}\n"


def test_one_declaration_makes_an_argument_of_a_function() -> None:
    parameters = inspect.signature(bake).parameters
    assert {name: each.default for name, each in parameters.items()} == {
        name: field.default for name, field in fields_of(Baking).items()
    }
    assert [name for name, each in parameters.items() if each.kind is not each.KEYWORD_ONLY] == ["recipe"]
    assert bake("rye", loaves=2) == Baking("rye", loaves=2)
    assert (bake.__name__, bake.__doc__) == ("bake", "Bake.")
    with pytest.raises(TypeError, match=r"bake\(\): too many positional arguments"):
        bake("rye", "gas")
    only_time = takes_fields(Baking, ("time",))(lambda settings: settings)
    assert only_time(time=1.0) == Baking(time=1.0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'oven'"):
        only_time(oven="gas")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"oven": "coal"}, "unknown oven 'coal'; expected gas or electric."),
        ({"oven": None}, "unknown oven None; expected gas or electric."),
        ({"time": 0.0}, "time is 0; expected a finite number above 0."),
        ({"time": float("inf")}, "time is inf; expected a finite number above 0."),
        ({"salt": float("nan")}, "salt is nan; expected 0 to 100 percent."),
        ({"salt": 101}, "salt is 101; expected 0 to 100 percent."),
        ({"loaves": 0}, "loaves is 0; expected at least 1."),
        ({"loaves": "2"}, "loaves is '2'; expected an integer."),
        ({"loaves": 2.5}, "loaves is 2.5; expected an integer."),
        ({"loaves": True}, "loaves is True; expected an integer."),
        ({"salt": "1%"}, "salt is '1%'; expected a number."),
        ({"time": None}, "time is None; expected a number."),
        ({"steam": "no"}, "steam is 'no'; expected True or False."),
        ({"recipe": ["rye"] * 99}, "recipe is of the type list; expected a text."),
    ],
)
def test_one_declaration_makes_a_check(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Baking(**options)
    assert str(caught.value) == message


def test_integers_of_numpy_become_those_of_python() -> None:
    """The settings go into report.json, which is written behind all measurements."""
    assert type(Baking(loaves=np.int64(2)).loaves) is int


def test_one_declaration_makes_an_entry_of_the_reference() -> None:
    assert inspect.cleandoc(Baking.__doc__ or "").splitlines() == [
        "Options of baking.",
        "",
        "Attributes:",
        "    recipe: a file or a name. Default: bread.",
        "    oven: Kind of oven. One of gas, electric.",
        "    time: Baking time. In seconds. Expected: a finite number above 0.",
        "    salt: Share of salt, in %. Expected: 0 to 100 percent.",
        "    loaves: Number of loaves. Expected: at least 1. Default: as many as fit.",
        "    steam: False (``--no-steam``): Bake without steam.",
        "    seeds: Seeds.",
    ]


def test_an_option_is_declared_like_another_apart_from_the_changes() -> None:
    @dataclass(frozen=True)
    class Frying(Baking):
        loaves: int | None = like(Baking, "loaves", default=3, unset="")

    assert Frying() == Frying(loaves=3)
    assert facts_of(fields_of(Frying)["loaves"]).least == 1
    assert list(fields_of(Frying)) == list(fields_of(Baking))

    @click.command()
    @field_option(Baking, "loaves", help="Loaves.", unset="")
    def fry(loaves: int | None) -> None:
        click.echo(loaves)

    assert "  --loaves INTEGER RANGE  Loaves.  [x>=1]" in CliRunner().invoke(fry, ["--help"]).output.splitlines()


@pytest.mark.parametrize("settings", [Settings, SweepSettings, InspectSettings, BenchSettings])
def test_every_field_is_an_option_with_a_default_and_help(settings: type) -> None:
    for name, field in fields_of(settings).items():
        assert getattr(settings, name) == field.default
        assert facts_of(field).help.endswith(".")


def test_bench_takes_sequences_and_paths_and_records_plain_values() -> None:
    settings = BenchSettings([Path("a.onnx")], batch=[1, 8], data=Path("texts.txt"))  # type: ignore[arg-type]
    plain = settings.to_dict()
    assert (plain["what"], plain["batch"], plain["data"]) == (("a.onnx",), (1, 8), "texts.txt")
    with pytest.raises(SettingsError, match="rounds is 0; expected at least 1"):
        BenchSettings(("a.onnx",), rounds=0)
