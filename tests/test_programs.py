"""Programs as people write them: signals, windows, rows, numbers, settings that partners toggle, compiles of others."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dicompile
from dicompile.wrapper import record_of
from tests.models import PlainDiT, call, frames_of, plain_dit, redraw, run, state_of, timesteps

STEPS = 8
T = timesteps(STEPS)
FORA = dicompile.FORA(interval=3)


class Controlled(PlainDiT):
    """With the residual of a ControlNet, a second timestep, and a factor that its user sets."""

    scale = 1.0

    def forward(self, x: Tensor, t: Tensor, y: Tensor, control: Tensor, timestep_r: Tensor) -> Tensor:  # type: ignore[override]
        h, c = self.tokens(x) + control, self.condition(t, y) + self.condition(timestep_r, y) * self.scale
        for block in self.blocks:
            h = block(h, c)
        return self.picture(h, c, *x.shape[2:])


def latent(step: int, seed: int = 0, batch: int = 2) -> Tensor:
    """A latent that goes on a little at every step."""
    start, way = (torch.randn(batch, 4, 16, 16, generator=torch.Generator().manual_seed(s)) for s in (seed, 99 + seed))
    return start + 0.05 * step * way


def signals(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {"control": torch.randn(2, 64, 32, generator=generator), "timestep_r": torch.full((2,), 900.0 - step)}


def time(step: int) -> Tensor:
    return torch.full((2,), float(T[step]))


def test_signals_that_change_at_every_step_cost_a_run_nothing() -> None:
    model = dicompile.optimize(redraw(Controlled(2)), FORA, schedule=T, mode="eager")
    labels = torch.tensor([1, 2])
    for step in range(STEPS):
        model(latent(step), time(step), labels, **signals(step))
    plan = dicompile.plan_of(model)
    assert dict(dicompile.report(model).kinds) == {k: sum(s.kind == k for s in plan.steps) for k in ("full", "reuse")}
    assert dicompile.report(model).cold_starts == []
    assert len(frames_of(model)) == 1


def test_halves_with_noise_of_their_own_are_partners() -> None:
    sample = plain_dit(2)
    model = dicompile.optimize(sample.model, FORA, schedule=T, mode="eager")
    alone = [dicompile.optimize(sample.model, FORA, schedule=T, mode="eager") for _ in range(2)]
    labels = torch.tensor([1, 2]), torch.tensor([3, 4])
    for step in range(STEPS):
        for half in (0, 1):
            arguments = latent(step) + 0.01 * half, time(step), labels[half]
            assert torch.equal(model(*arguments), alone[half](*arguments))


@pytest.mark.parametrize("rotates", [False, True])
def test_windows_continue_their_own_trajectory_in_any_order(rotates: bool) -> None:
    sample, labels = plain_dit(2), torch.tensor([1, 2])
    model = dicompile.optimize(sample.model, FORA, schedule=T, mode="eager")
    alone = [dicompile.optimize(sample.model, FORA, schedule=T, mode="eager") for _ in range(3)]
    for step in range(STEPS):
        for i in range(3):
            window = (i + step) % 3 if rotates else i
            arguments = latent(step, seed=window), time(step), labels
            assert torch.equal(model(*arguments), alone[window](*arguments))
    assert dicompile.report(model).cold_starts == []


def test_windows_that_nothing_tells_apart_compute() -> None:
    sample, labels = plain_dit(2), torch.tensor([1, 2])
    model = dicompile.optimize(sample.model, FORA, schedule=T, mode="eager")
    for step in range(STEPS):
        for window in range(2):
            arguments = torch.randn(2, 4, 16, 16), time(step), labels
            torch.testing.assert_close(model(*arguments), sample.model(*arguments), rtol=1e-4, atol=1e-5)
            del window


def test_partners_that_toggle_a_setting_keep_their_caches_apart() -> None:
    module = redraw(Controlled(2))
    model = dicompile.optimize(module, FORA, schedule=T, mode="eager")
    alone = {scale: dicompile.optimize(module, FORA, schedule=T, mode="eager") for scale in (0.0, 1.0)}
    for step in range(STEPS):
        for scale in (0.0, 1.0):
            module.scale = scale
            arguments = latent(step), time(step), torch.tensor([1, 2])
            assert torch.equal(model(*arguments, **signals(0)), alone[scale](*arguments, **signals(0)))
    assert len(frames_of(model)) == 2


def test_rows_of_a_batch_at_different_steps_compute_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    sample, labels = plain_dit(2), torch.tensor([1, 2])
    model = dicompile.optimize(sample.model, FORA, schedule=T, mode="eager")
    with caplog.at_level(logging.WARNING, "dicompile"):
        for step in range(4):
            arguments = latent(step), torch.tensor([float(T[step]), float(T[step + 3])]), labels
            assert torch.equal(model(*arguments), sample.model(*arguments))
    assert dicompile.report(model).outside == 4
    assert [record.getMessage() for record in caplog.records] == [
        "computed whole, and nothing is remembered: samples of one batch are at different timesteps: 999, 624"
    ]


NUMBERS: dict[str, Callable[[int], Any]] = {
    "float": float, "int": int, "float32": np.float32, "int64": np.int64,
    "0-d tensor": lambda t: torch.tensor(float(t)),
}  # fmt: skip


class TakesNumbers(PlainDiT):
    def forward(self, x: Tensor, t: Any, y: Tensor) -> Tensor:
        if not isinstance(t, Tensor):
            t = torch.full((x.shape[0],), t, device=x.device, dtype=torch.float32)
        return super().forward(x, t.expand(x.shape[0]), y)


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.sampled
def test_a_timestep_may_be_a_number(kind: str, by_name: bool) -> None:
    module, labels = redraw(TakesNumbers(2)), torch.tensor([1, 2])
    model = dicompile.optimize(module, FORA, schedule=T, mode="eager")
    wanted = dicompile.optimize(module, FORA, schedule=T, mode="eager")
    for _ in range(2):
        for step in range(STEPS):
            number = NUMBERS[kind](T[step])
            got = model(latent(step), t=number, y=labels) if by_name else model(latent(step), number, labels)
            torch.testing.assert_close(got, wanted(latent(step), time(step), labels), rtol=1e-5, atol=1e-6)
    assert len(frames_of(model)) == 1


@pytest.mark.parametrize("kind", ["float", "int"])
def test_a_timestep_of_the_bare_backend_may_be_a_number(kind: str) -> None:
    torch._dynamo.reset()
    module, labels = redraw(TakesNumbers(2)), torch.tensor([1, 2])
    options = {"policy": FORA, "steps": STEPS, "mode": "eager"}
    model = torch.compile(module, backend="dicache", options=options)
    wanted = dicompile.optimize(module, FORA, schedule=STEPS, mode="eager")
    for _ in range(2):
        for step in range(STEPS):
            got = model(latent(step), NUMBERS[kind](T[step]), labels)
            torch.testing.assert_close(got, wanted(latent(step), time(step), labels), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shares_options", [False, True])
def test_two_models_of_one_class_on_the_bare_backend_share_code_and_nothing_else(shares_options: bool) -> None:
    torch._dynamo.reset()
    sample, options = plain_dit(2), {"policy": FORA, "steps": STEPS, "mode": "eager"}
    modules = [redraw(PlainDiT(2), seed) for seed in (1, 2)]
    bare = [torch.compile(m, backend="dicache", options=options if shares_options else dict(options)) for m in modules]
    alone = [dicompile.optimize(m, FORA, schedule=STEPS, mode="eager") for m in modules]
    for step, timestep in enumerate(T):
        for i in (0, 1):
            wanted = call(alone[i], sample.inputs, timestep, step)
            torch.testing.assert_close(call(bare[i], sample.inputs, timestep, step), wanted, rtol=1e-5, atol=1e-6)


def compiled_in_place_before(module: nn.Module) -> Any:
    module.compile(backend="eager")
    return dicompile.optimize(module, FORA, schedule=T, mode="eager")


def compiled_in_place_after(module: nn.Module) -> Any:
    model = dicompile.optimize(module, FORA, schedule=T, mode="eager")
    model.compile(backend="eager")
    return model


def compiled_around(module: nn.Module) -> Any:
    return torch.compile(dicompile.optimize(module, FORA, schedule=T, mode="eager"), backend="eager")


def compiled_inside(module: nn.Module) -> Any:
    return dicompile.optimize(torch.compile(module, backend="eager"), FORA, schedule=T, mode="eager")


@pytest.mark.parametrize("make", [compiled_in_place_before, compiled_in_place_after, compiled_around, compiled_inside])
def test_another_compile_changes_nothing(make: Callable[[nn.Module], Any]) -> None:
    torch._dynamo.reset()
    sample = plain_dit(2)
    wanted = run(dicompile.optimize(sample.model, FORA, schedule=T, mode="eager"), sample.inputs, T)
    model = make(plain_dit(2).model)
    got = run(model, sample.inputs, T)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_restore_gives_back_what_was_compiled_by_others() -> None:
    given = torch.compile(plain_dit(1).model, backend="eager")
    assert dicompile.restore(dicompile.optimize(given, "none", mode="eager")) is given


def test_threads_beside_compiled_code_of_others_lose_nothing() -> None:
    samples = [plain_dit(1), plain_dit(2)]
    models = [dicompile.optimize(s.model, FORA, schedule=T, mode="eager") for s in samples]
    wanted = [run(m, s.inputs, T) for m, s in zip(models, samples, strict=True)]
    stop, wrong = threading.Event(), []

    def foreign() -> None:
        compiled = torch.compile(lambda x: (x * 2).sin(), backend="eager", fullgraph=True)
        size = 0
        while not stop.is_set():
            size += 1
            compiled(torch.randn(3 + size % 5))

    def sampling(i: int) -> None:
        for _ in range(30):
            got = run(models[i], samples[i].inputs, T)
            if not all(torch.equal(a, b) for a, b in zip(got, wanted[i], strict=True)):
                wrong.append(i)

    threads = [threading.Thread(target=sampling, args=(i,)) for i in (0, 1)]
    beside = threading.Thread(target=foreign)
    for thread in (beside, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    beside.join()
    assert wrong == []
    assert [len(frames_of(model)) for model in models] == [1, 1]


@pytest.mark.parametrize("restored", [False, True])
def test_nothing_of_a_model_that_was_dropped_is_alive(restored: bool) -> None:
    sample = plain_dit(2)
    model = dicompile.optimize(sample.model, FORA, schedule=T, mode="eager")
    run(model, sample.inputs, T)
    held = [sample.model, sample.model.head.weight, model, frames_of(model)[0], record_of(model).calls]
    references = [weakref.ref(thing) for thing in held]
    held.clear()
    if restored:
        dicompile.restore(model)
    inputs = sample.inputs
    del model, sample, inputs
    gc.collect()
    assert [reference() for reference in references] == [None] * len(references)


def test_equal_calls_have_a_bounded_number_of_contexts() -> None:
    sample = plain_dit(1)
    model = dicompile.optimize(sample.model, FORA, schedule=T, mode="eager")
    for _ in range(50):
        call(model, sample.inputs, T[0], 0)
    assert len(state_of(model).contexts) <= 8


class DecidesOnItsNumber(TakesNumbers):
    def forward(self, x: Tensor, t: Any, y: Tensor) -> Tensor:
        return super().forward(x, t, y) if t > 500 else super().forward(x, t, y) * 2


@pytest.mark.parametrize("kind", ["float", "float32"])
def test_a_number_that_python_decides_on_is_captured_once_per_value(kind: str) -> None:
    module, labels = redraw(DecidesOnItsNumber(1)), torch.tensor([1, 2])
    model = dicompile.optimize(module, FORA, schedule=[900, 100], mode="eager")
    for _ in range(2):
        for step, timestep in enumerate((900, 100)):
            number = NUMBERS[kind](timestep)
            # FORA computes both steps of so short a run.
            torch.testing.assert_close(model(latent(step), number, labels), module(latent(step), number, labels))
    assert len(frames_of(model)) == 2


def test_a_mistake_beside_a_number_changes_nothing() -> None:
    module, labels = redraw(TakesNumbers(1)), torch.tensor([1, 2])
    model = dicompile.optimize(module, FORA, schedule=T, mode="eager")
    with pytest.raises(RuntimeError, match="channels"):
        model(torch.randn(2, 5, 16, 16), 999.0, labels)
    for step in range(STEPS):
        model(latent(step), float(T[step]), labels)
    assert len(frames_of(model)) == 1
