"""The self-test says what works, and what does not with what to do about it."""

from __future__ import annotations

from typing import Any

import pytest
from typer.testing import CliRunner

from dicompile.cli import doctor
from dicompile.cli.main import app


def test_it_names_what_is_there_and_compiles_a_model() -> None:
    result = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "100"})
    assert result.exit_code == 0, result.output
    for said in ("torch", "GPU", "C++ compiler", "extras", "cache folder", "works:"):
        assert said in result.output


def test_what_cannot_compile_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        def call(*_: Any) -> None:
            raise RuntimeError("no compiler\nlong story")

        return call

    monkeypatch.setattr(doctor.dicompile, "optimize", broken)
    result = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "100"})
    assert result.exit_code == 1
    assert "does not work: RuntimeError: no compiler" in result.output
    assert "fix:" in result.output and "long story" not in result.output
