"""Captures that models of one class share: whatever holds for another module is taken, and nothing else."""

from __future__ import annotations

import gc
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dicompile
from dicompile.capture import capture_functional
from dicompile.learn.graph import learnable
from tests.models import PlainDiT, Sample, dit, flux, pixart, plain_dit, redraw, timesteps

T = timesteps(4)


class Scaled(PlainDiT):
    """With a number that its forward reads, and a mask that its Python does."""

    scale = 1.0

    def forward(self, x: Tensor, t: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        h, c = self.tokens(x) * self.scale, self.condition(t, y)
        blocks = self.blocks if mask is None else self.blocks[: int(mask.sum())]
        for block in blocks:
            h = block(h, c)
        return self.picture(h, c, *x.shape[2:])


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[nn.Module]]:
    """The modules that are captured, in order."""
    done: list[nn.Module] = []

    def capture(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        done.append(module)
        return capture_functional(module, *args, **kwargs)

    monkeypatch.setattr("dicompile.capture.shared.capture_functional", capture)
    yield done
    done.clear()


def test_training_finds_what_a_run_has_led_to_and_is_found_itself(
    captures: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dicompile.learn.graph.capture_by_dynamo", None)
    sample = dit(1)
    model = dicompile.optimize(sample.model, "none", schedule=T, backend="eager")
    expected = model(**sample.inputs)[0]
    made = learnable(sample.model, sample.inputs)
    torch.testing.assert_close(made.predict(sample.inputs), expected)
    fewer = {**sample.inputs, "hidden_states": sample.inputs["hidden_states"][:2],
             "timestep": sample.inputs["timestep"][:2], "class_labels": sample.inputs["class_labels"][:2]}  # fmt: skip
    learnable(sample.model, fewer)
    assert captures == [sample.model, sample.model]
    model(**fewer)
    assert len(captures) == 2


def scaled(layers: int = 2, seed: int = 0) -> nn.Module:
    return redraw(Scaled(layers), seed)


def check(module: nn.Module, policy: str = "none", **more: Any) -> None:
    """A run of an optimized module follows the module, or, where it caches, computes the first step right."""
    model = dicompile.optimize(module, policy, schedule=T, mode="eager")
    for step, time in enumerate(T):
        inputs = torch.randn(2, 4, 16, 16), torch.full((2,), float(time)), torch.tensor([1, 2])
        result = model(*inputs, **more)
        if policy == "none" or not step:
            torch.testing.assert_close(result, module(*inputs, **more), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [plain_dit, pixart, flux])
@pytest.mark.sampled
def test_a_second_policy_and_a_second_model_capture_nothing(
    make: Callable[[], Sample], captures: list[nn.Module]
) -> None:
    samples = make(), make()
    for parameter in samples[1].model.parameters():
        parameter.data = parameter.data * 1.25
    for policy in ("none", "fora", "toca"):
        for model, inputs in samples:
            optimized = dicompile.optimize(model, policy, schedule=T, mode="eager")
            given = {**inputs, next(n for n in inputs if n in ("t", "timestep")): torch.full((1,), float(T[0]))}
            given = {n: v.expand(len(next(iter(inputs.values())))) if n in ("t", "timestep") else v
                     for n, v in given.items()}  # fmt: skip
            result, expected = optimized(**given), model(**given)
            first = [r if isinstance(r, Tensor) else r[0] for r in (result, expected)]
            torch.testing.assert_close(*first, rtol=1e-4, atol=1e-5)
    assert len(captures) == 1


def test_models_of_another_depth_or_setting_have_captures_of_their_own(captures: list[nn.Module]) -> None:
    for module in (scaled(2), scaled(3), scaled(2, seed=1)):
        check(module)
    assert len(captures) == 2
    other = scaled()
    other.scale = 0.5  # type: ignore[assignment]
    check(other)
    assert len(captures) == 3


def forward_of_its_own(self: Any, x: Tensor, t: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
    result: Tensor = 2.0 * Scaled.forward(self, x, t, y, mask)
    return result


def attention_of_its_own(self: Any, x: Tensor) -> Tensor:
    result: Tensor = 0.5 * self.proj(x)
    return result


def test_methods_that_one_module_was_given_are_seen(captures: list[nn.Module]) -> None:
    check(scaled())
    patched, inside = scaled(), scaled()
    patched.forward = types.MethodType(forward_of_its_own, patched)
    inside.blocks[1].attend = types.MethodType(attention_of_its_own, inside.blocks[1])  # type: ignore[index, union-attr]
    check(patched)
    check(inside)
    check(scaled())
    assert len(captures) >= 3


def test_values_that_python_read_are_compared(captures: list[nn.Module]) -> None:
    for count, number in ((1, 1), (1, 1), (2, 2)):
        check(scaled(), mask=torch.arange(3) < count)
        assert len(captures) == number


def test_hooks_are_seen(captures: list[nn.Module]) -> None:
    check(scaled())
    hooked = scaled()
    hooked.blocks[0].register_forward_hook(lambda module, args, output: 2 * output)  # type: ignore[index, union-attr]
    check(hooked)
    assert len(captures) == 2


def test_a_forward_that_closes_over_objects_is_not_kept_for_others(captures: list[nn.Module]) -> None:
    def make(factor: float) -> nn.Module:
        class Local(Scaled):
            def forward(self, *args: Any, **kwargs: Any) -> Tensor:
                return factor * super().forward(*args, **kwargs)

        return redraw(Local(2))

    for factor in (1.0, 3.0):
        check(make(factor))
    assert len(captures) == 2


def test_nothing_of_a_model_stays(captures: list[nn.Module]) -> None:
    module = scaled()
    weights = [weakref.ref(module), *(weakref.ref(p) for p in module.parameters())]
    check(module, "fora")
    del module
    captures.clear()
    gc.collect()
    assert not any(weight() is not None for weight in weights)
    check(scaled())
    assert not captures


def test_reset_forgets_them(captures: list[nn.Module]) -> None:
    check(scaled())
    dicompile.reset()
    check(scaled())
    assert len(captures) == 2
