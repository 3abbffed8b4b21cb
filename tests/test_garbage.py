"""Python's garbage collector stands still while graphs are made, and only then."""

from __future__ import annotations

import gc
from typing import Any

import pytest

import dicompile
from dicompile import compiler
from dicompile.capture import shared
from dicompile.garbage import uncollected
from dicompile.lower import variants
from tests.models import dit, run, timesteps

T = timesteps(3)


def test_nothing_is_collected_while_a_model_is_captured_planned_and_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, bool] = {}

    def spied(module: Any, name: str) -> None:
        original = getattr(module, name)

        def spy(*args: Any, **kwargs: Any) -> Any:
            seen[name] = seen.get(name, False) or gc.isenabled()
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, spy)

    spied(shared, "capture_functional")
    spied(compiler, "analyse")
    spied(variants, "rewrite")
    dicompile.reset()  # what other tests captured is not captured again
    sample = dit(2)
    run(dicompile.optimize(sample.model, "fora", schedule=T, backend="eager"), sample.inputs, T)
    assert seen == {"capture_functional": False, "analyse": False, "rewrite": False}
    assert gc.isenabled()


def test_it_goes_on_after_an_error_and_stays_off_for_who_has_switched_it_off() -> None:
    with pytest.raises(ZeroDivisionError), uncollected():
        _ = 1 / 0
    assert gc.isenabled()
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
