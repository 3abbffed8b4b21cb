"""The command line as a whole: levels of log and bars, exit codes, and nothing left behind by who stops in between."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

import dicompile
from dicompile.cli.main import app, main
from dicompile.cli.show import make_console
from dicompile.config import environment_with
from dicompile.progress import progress, tracked

log = logging.getLogger("dicompile")


@pytest.fixture
def talkative(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A command that logs on every level, in the place of `dicompile models`."""

    def models() -> None:
        log.info("info")
        log.warning("a [warning]")
        log.error("error")

    for command in app.registered_commands:
        if command.callback is not None and command.callback.__name__ == "models":
            monkeypatch.setattr(command, "callback", models)
    yield


@pytest.mark.usefixtures("talkative")
@pytest.mark.parametrize(
    ("option", "said"),
    [(None, ["a [warning]", "error"]), ("-q", ["error"]), ("--verbose", ["info", "a [warning]", "error"])],
)
def test_what_is_logged_goes_to_stderr_by_level(option: str | None, said: list[str]) -> None:
    before = log.level, log.handlers
    result = CliRunner().invoke(app, [*filter(None, [option]), "models"])
    lines = [line.split(maxsplit=1)[1].strip() for line in result.stderr.splitlines()]
    assert (lines, result.stdout) == (said, "")
    assert (log.level, log.handlers) == before


def test_quiet_and_verbose_exclude_each_other() -> None:
    result = CliRunner().invoke(app, ["-q", "-v", "models"])
    assert (result.exit_code, result.stdout) == (2, "")


def test_the_version_is_printed() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.stdout.startswith(f"dicompile {dicompile.__version__}, torch ")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_commands(shell: str) -> None:
    words = {"_TYPER_COMPLETE_ARGS": "dicompile ins", "COMP_WORDS": "dicompile ins", "COMP_CWORD": "1"}
    more = {"_DICOMPILE_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    result = CliRunner().invoke(app, [], prog_name="dicompile", env={**words, **more})
    assert "inspect" in result.stdout
    assert "plan" not in result.stdout


def stopped(monkeypatch: pytest.MonkeyPatch, stop: Any, folder: Path) -> int:
    """Exit code of a command that is stopped while it has a temporary folder and half a file."""

    def bench(_: typer.Context) -> None:
        with tempfile.TemporaryDirectory(dir=folder):
            stop()

    for command in app.registered_commands:
        if command.callback is not None and command.callback.__name__ == "bench":
            monkeypatch.setattr(command, "callback", bench)
    monkeypatch.setattr(sys, "argv", ["dicompile", "bench"])
    with pytest.raises(SystemExit) as left:
        main()
    assert list(folder.iterdir()) == []
    assert isinstance(left.value.code, int)
    return left.value.code


def test_being_told_to_end_leaves_no_temporary_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert stopped(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGTERM), tmp_path) == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_ctrl_c_leaves_no_temporary_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores it
    try:
        assert stopped(monkeypatch, lambda: signal.raise_signal(signal.SIGINT), tmp_path) == 130
    finally:
        signal.signal(signal.SIGINT, before)


def test_torch_logs_knows_the_name() -> None:
    """``TORCH_LOGS="+dicompile"`` is torch's own way to ask for everything of a module."""
    script = "import torch, logging; log = logging.getLogger('dicompile'); print(log.level, len(log.handlers))"
    environment = environment_with({"TORCH_LOGS": "+dicompile"})
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [f"{logging.DEBUG}", "1"]


class Terminal(Console):
    """stderr of a user who looks at it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(force_terminal=True, width=80, **options)


@pytest.mark.parametrize(("level", "is_shown"), [(logging.NOTSET, True), (logging.ERROR, False)])
def test_bars_are_on_stderr_and_follow_the_level(
    level: int, is_shown: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dicompile.progress.Console", Terminal)
    monkeypatch.setattr(log, "level", level)
    log.manager._clear_cache()  # type: ignore[attr-defined] # of what isEnabledFor has answered
    assert list(tracked("ab", "recording [x]", 2)) == ["a", "b"]
    out, error = capsys.readouterr()
    assert out == ""
    assert ("recording [x]" in error and "2/2" in error) is is_shown
    log.manager._clear_cache()  # type: ignore[attr-defined]


def test_bars_are_for_terminals(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("compiling", 3) as update:
        update(advance=1)
    assert capsys.readouterr() == ("", "")


def test_no_color(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    make_console().print("x", style="bold blue")
    assert capsys.readouterr().out == "\x1b[1;34mx\x1b[0m\n"
    monkeypatch.setenv("NO_COLOR", "1")
    make_console().print("x", style="bold blue")
    assert "34m" not in capsys.readouterr().out
