"""Options that commands share are spelled once."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Annotated

import typer
from typer.main import get_command
from typer.testing import CliRunner

from dicompile.cli import options
from dicompile.cli.main import app


@dataclass(frozen=True)
class Group:
    name: Annotated[str, typer.Argument()]
    size: Annotated[int, typer.Option(min=1)] = 3


def test_the_fields_of_a_group_are_options_in_its_place() -> None:
    @options.spread
    def command(group: Group, *, loud: Annotated[bool, typer.Option("--loud")] = False) -> None:
        """Say it."""
        typer.echo(f"{group} {loud}")

    assert list(inspect.signature(command).parameters) == ["name", "size", "loud"]
    assert command.__doc__ == "Say it."
    small = typer.Typer()
    small.command()(command)
    assert CliRunner().invoke(small, ["a", "--size", "4", "--loud"]).stdout == f"{Group('a', 4)} True\n"
    assert CliRunner().invoke(small, ["a"]).stdout == f"{Group('a')} False\n"
    assert CliRunner().invoke(small, ["a", "--size", "0"]).exit_code == 2


def test_commands_that_look_at_a_model_take_the_same() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    shared = {*names_in(options.Subject), *names_in(options.Cache)}
    texts = [
        {option.name: option.get_help_record(typer.Context(command)) for option in command.params}
        for command in (commands["inspect"], commands["plan"])
    ]
    texts = [{name: text for name, text in own.items() if name in shared} for own in texts]
    assert texts[0] == texts[1]
    assert set(texts[0]) == shared


def names_in(group: type) -> list[str]:
    return list(inspect.signature(group).parameters)
