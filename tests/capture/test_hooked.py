"""Which forwards that diffusers has put hooks around do the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.layer_skip import FeedForwardSkipHook
from torch import nn

from dicompile.capture.hooked import do_the_same


class OwnHook(ModelHook):
    """Of somebody who may keep anything in it."""


def with_tensor() -> ModelHook:
    hook = FeedForwardSkipHook(1.0)
    hook.scale = torch.ones(1)
    return hook


def of_setting(dropout: float) -> Callable[[], ModelHook]:
    return lambda: FeedForwardSkipHook(dropout)


def forwards(*hooks: Callable[[], ModelHook], module: nn.Module | None = None) -> Any:
    """The forward of a module with hooks around it, which it loses again."""
    module = nn.Linear(2, 2) if module is None else module
    registry = HookRegistry.check_if_exists_or_initialize(module)
    for number, make in enumerate(hooks):
        registry.register_hook(make(), str(number))
    forward = module.forward
    for number in reversed(range(len(hooks))):
        registry.remove_hook(str(number))
    return forward


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([of_setting(1.0)], [of_setting(1.0)], True),
        ([of_setting(1.0)], [of_setting(0.5)], False),
        ([of_setting(1.0)], [of_setting(1)], False),
        ([of_setting(1.0), of_setting(0.5)], [of_setting(1.0), of_setting(0.5)], True),
        ([of_setting(1.0), of_setting(0.5)], [of_setting(0.5), of_setting(1.0)], False),
        ([of_setting(1.0), of_setting(0.5)], [of_setting(0.5)], False),
        ([OwnHook], [OwnHook], False),
        ([with_tensor], [with_tensor], False),
        ([], [], True),
        ([], [of_setting(1.0)], False),
    ],
)
def test_hooks_of_equal_settings_do_the_same(first: Any, second: Any, expected: bool) -> None:
    module = nn.Linear(2, 2)
    forwards(of_setting(1.0), module=module)  # from then on it has a forward of its own
    assert do_the_same(forwards(*first, module=module), forwards(*second, module=module)) is expected


def test_hooks_around_another_module_do_something_else() -> None:
    assert not do_the_same(forwards(of_setting(1.0)), forwards(of_setting(1.0)))


def test_functions_of_others_do_the_same_only_if_they_are_one() -> None:
    def made(value: float) -> Callable[[], float]:
        return lambda: value

    first = made(1.0)
    assert do_the_same(first, first)
    assert not do_the_same(first, made(1.0))
