"""Timesteps that are Python numbers: one graph for all of them, or one each where Python reads them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dicompile.capture import Arguments, capture_call, open_numbers
from dicompile.capture.numbers import filled, listed, numbers_in
from dicompile.wrapper import record_of
from tests.capture.follow import WAYS, WIDTH, counted, optimized, same

USES: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "full": lambda x, t: x * torch.cos(torch.full((x.shape[0],), t, dtype=x.dtype))[:, None],
    "full without dtype": lambda x, t: x * torch.full((x.shape[0],), t)[:, None],
    "tensor": lambda x, t: x * torch.cos(torch.tensor([t], dtype=x.dtype)),
    "tensor of some": lambda x, t: x * torch.cos(torch.tensor([[t, 1.0]], dtype=x.dtype)).sum(),
    "scalar": lambda x, t: x * torch.tensor(t, dtype=torch.float32),
    "scalar without dtype": lambda x, t: x * torch.tensor(t),
    "as_tensor": lambda x, t: x * torch.as_tensor(t, dtype=x.dtype),
    "product": lambda x, t: x * t,
    "sum": lambda x, t: x + t / 1000,
    "from the left": lambda x, t: t * x + (1 - t),
    "arithmetic": lambda x, t: x * (t * 2 + 1) / 3 - t**2,
    "difference": lambda x, t: x - t,
    "quotient": lambda x, t: x / (t + 1),
    "methods": lambda x, t: x.mul(t).add(t),
    "in place": lambda x, t: x.clone().mul_(t),
    "float": lambda x, t: x * float(t),
    "negative": lambda x, t: x * -t,
    "alpha": lambda x, t: torch.add(x, x, alpha=t),
    "arange": lambda x, t: x * torch.arange(4.0, dtype=x.dtype).sum() * t,
    "floor": lambda x, t: x * (t // 2),
    "modulo": lambda x, t: x * (t % 3),
    "power": lambda x, t: x.abs().pow(t),
    "clamp": lambda x, t: x.clamp(max=t),
    "maximum": lambda x, t: x * max(t, 2),
    "filled": lambda x, t: x * torch.full_like(x, t),
    "new full": lambda x, t: x * x.new_full((1,), t),
    "new tensor": lambda x, t: x * x.new_tensor([t]),
    "integer tensor": lambda x, t: x * torch.full((1,), t, dtype=torch.long),
    "half": lambda x, t: x.half() * t,
    "integers": lambda x, t: torch.ones_like(x, dtype=torch.long) * t,
    "integers divided": lambda x, t: torch.ones_like(x, dtype=torch.long) / (t + 1),
    "masked": lambda x, t: x.masked_fill(x > 0, t),
    "where": lambda x, t: torch.where(x > 0, x, t),
    "branch": lambda x, t: x if t > 2 else x * 2,
    "range": lambda x, t: sum((x for _ in range(int(t))), x),
    "compared": lambda x, t: x * (x > t),
}


class Uses(nn.Module):
    def __init__(self, how: str, way: str = "dynamo") -> None:
        super().__init__()
        self.how, self.is_read = how, way == "running"
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, timestep: Any, mask: Tensor | None = None) -> Tensor:
        if self.is_read and mask.any():
            x = x + 1
        return USES[self.how](self.linear(x), timestep)


@pytest.mark.parametrize("how", USES)
@pytest.mark.parametrize("numbers", [(1.0, 2.5, 3.0), (1, 2, 3), (1, 1.0, 2)])
@pytest.mark.sampled
def test_every_number_gives_what_the_module_gives(how: str, numbers: tuple[Any, ...]) -> None:
    module = Uses(how)
    model = optimized(module)
    x = torch.randn(2, WIDTH)
    for number in (*numbers, *numbers):
        try:
            module(x, number)
        except Exception as error:  # the caller's mistake
            with pytest.raises(type(error)):
                model(x=x, timestep=number)
        else:
            same(model, module, x=x, timestep=number)
            with torch.no_grad():
                assert model(x=x, timestep=number).dtype == module(x, number).dtype
    assert counted(model) <= len(numbers) + 1  # an open one of integers, and then of each


@pytest.mark.parametrize(
    "how", ["full", "tensor", "tensor of some", "product", "sum", "quotient", "from the left", "float"]
)
def test_all_numbers_share_one_graph(how: str) -> None:
    module = Uses(how)
    model = optimized(module)
    for number in (1.0, 2.0, 3.5, float("nan"), -0.0, np.float32(2.5)):
        same(model, module, x=torch.randn(2, WIDTH), timestep=number)
    assert counted(model) == 1


def test_a_number_that_python_reads_is_captured_for_each(caplog: pytest.LogCaptureFixture) -> None:
    module = Uses("branch")
    model = optimized(module)
    with caplog.at_level(logging.INFO, "dicompile"):
        for number in (1.0, 2.0, 3.0, 1.0, 3.0):
            same(model, module, x=torch.randn(2, WIDTH), timestep=number)
    assert counted(model) == 3
    lines = [record.getMessage() for record in caplog.records if "every value of it is captured" in record.getMessage()]
    assert lines == ["the timestep of Uses is a number that Python reads: every value of it is captured by itself"]


@pytest.mark.parametrize("way", WAYS)
def test_one_and_one_point_zero_and_true_are_three(way: str) -> None:
    module = Uses("scalar without dtype", way)
    model = optimized(module)
    mask = torch.ones(2, dtype=torch.bool)
    for _ in range(2):
        for number in (1, 1.0, True):
            same(model, module, x=torch.randn(2, WIDTH), timestep=number, mask=mask)
    assert counted(model) == 3 and record_of(model).calls.is_run == (way == "running")


def test_a_tensor_after_a_number_and_back() -> None:
    module = Uses("product")
    model = optimized(module)
    for number in (1.0, torch.tensor(2.0), 3.0, torch.tensor([4.0])):
        same(model, module, x=torch.randn(2, WIDTH), timestep=number)
    assert counted(model) == 3


def test_the_graph_reads_no_number() -> None:
    module = Uses("full")
    captured = capture_call(module, Arguments.of((), {"x": torch.ones(2, WIDTH), "timestep": 2.0}, ("timestep",)))
    assert numbers_in(captured.graph.graph) == []
    assert ("timestep", False) in captured.names
    text = captured.graph.code
    open_numbers(captured.graph)  # there is nothing left to do
    assert captured.graph.code == text


@pytest.mark.parametrize("value", [2, 2.5])
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.int64])
def test_filled_and_listed_are_what_torch_makes(value: Any, dtype: torch.dtype | None) -> None:
    number = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)
    torch.testing.assert_close(filled((2, 3), number, dtype=dtype).clone(), torch.full((2, 3), value, dtype=dtype))
    torch.testing.assert_close(listed(number, dtype=dtype).clone(), torch.tensor(value, dtype=dtype))
    torch.testing.assert_close(listed([[number, 1]], dtype=dtype), torch.tensor([[value, 1]], dtype=dtype))
