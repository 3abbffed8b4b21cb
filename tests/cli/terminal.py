"""Commands as a user runs them: output at the width of a terminal, errors on stderr, exit codes."""

from __future__ import annotations

import sys

import pytest
from typer.testing import CliRunner, Result

from dicompile.cli.main import app, main


def run(*arguments: object, columns: int = 80) -> Result:
    """A command that works."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": str(columns)})
    assert result.exit_code == 0, result.output
    return result


def error_of(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    """What a command that fails says on stderr; nothing is on stdout, and the exit code is 1."""
    monkeypatch.setattr(sys, "argv", ["dicompile", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    out, error = capsys.readouterr()
    assert out == ""
    return error


def check_fits(text: str, columns: int) -> None:
    """Nothing is wider than the terminal, and nothing was cut."""
    assert max(map(len, text.splitlines())) <= columns
    assert "…" not in text
