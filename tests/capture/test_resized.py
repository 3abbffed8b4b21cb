"""Calls of other sizes: which sizes a model lets vary, found by tracing it, and what was said of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dicompile
from dicompile.capture import Arguments, marked_dims
from dicompile.capture import resized as resizing
from dicompile.capture.captured import Captured
from dicompile.capture.resized import resized
from dicompile.errors import InvalidSetting
from tests.models import flux


class Image(nn.Module):
    """Channels, rows and columns; as many channels as rows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.conv(x) * timestep[:, None, None, None]


class Square(Image):
    """Takes as many rows as columns."""

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(x + x.transpose(2, 3), timestep)


class Tokens(nn.Module):
    """As many tokens as features, and a position for each."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor, text: Tensor, ids: Tensor) -> Tensor:
        return (self.linear(x) + ids[:, None]) * text.mean(1, keepdim=True)


class Grid(nn.Module):
    """The grid of its tokens comes as Python numbers, one list for each sample."""

    def forward(self, x: Tensor, shapes: list[tuple[int, int, int]]) -> Tensor:
        _, height, width = shapes[0]
        positions = torch.arange(height).repeat_interleave(width)
        return x + positions[:, None]


class Fixed(nn.Module):
    """A table of positions for just these tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(12, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table


def varying(module: nn.Module, **inputs: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the call of other sizes."""
    found = resized(module, Arguments.of((), inputs))
    if found is None:
        return {}
    return {name: tuple(value.shape) for name, value in found[0].kwargs.items() if isinstance(value, Tensor)}


def test_rows_and_columns_vary_each_by_itself_and_channels_stay() -> None:
    found = varying(Image(), x=torch.zeros(2, 8, 8, 8), timestep=torch.zeros(2))
    batch, channels, rows, columns = found["x"]
    assert (channels, found["timestep"]) == (8, (batch,))
    assert len({batch / 2, rows / 8, columns / 8, 1}) == 4


def test_sizes_that_vary_only_together_are_one() -> None:
    found = varying(Square(), x=torch.zeros(2, 8, 6, 6), timestep=torch.zeros(2))
    assert found["x"][2] == found["x"][3] != 6


def test_as_many_tokens_as_features_and_as_text() -> None:
    found = varying(Tokens(), x=torch.zeros(16, 1, 16), text=torch.zeros(16, 16, 16), ids=torch.zeros(16, 16))
    assert found["x"] == (found["ids"][0], 1, 16)
    assert found["x"][0] != 16
    assert found["text"][1] != 16


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the forward could be traced to the end, for every other set of sizes that was tried."""
    noted: list[bool] = []
    capture = resizing._captured

    def noting(module: nn.Module, arguments: Arguments) -> Captured | None:
        captured = capture(module, arguments)
        noted.append(captured is not None)
        return captured

    monkeypatch.setattr(resizing, "_captured", noting)
    return noted


def test_all_sizes_that_vary_are_traced_to_the_end_once(traced: list[bool]) -> None:
    found = varying(Image(), x=torch.zeros(2, 8, 6, 10), timestep=torch.zeros(2))
    assert found["x"] == (10, 8, 18, 20)
    assert traced.count(True) == 1


def test_where_not_all_sizes_can_vary_at_once_each_is_tried_by_itself(traced: list[bool]) -> None:
    found = varying(Square(), x=torch.zeros(2, 8, 6, 6), timestep=torch.zeros(2))
    assert (found["x"][0] != 2, found["x"][2] != 6) == (True, True)
    assert not traced[0]
    assert traced.count(True) == 2


def test_a_mask_has_as_many_numbers_as_there_are_tokens(traced: list[bool]) -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
            return x + (text * mask[..., None]).mean(1, keepdim=True)

    found = varying(Masked(), x=torch.zeros(1, 12, 4), text=torch.zeros(1, 5, 4), mask=torch.zeros(1, 5))
    assert found["text"][1] == found["mask"][1] != 5
    assert traced[0]


def test_python_numbers_change_with_the_sizes_that_they_count() -> None:
    arguments = Arguments.of((torch.zeros(2, 12, 5),), {"shapes": [(1, 3, 4), (1, 3, 4)]})
    found = resized(Grid(), arguments)
    assert found is not None
    (x,), (first, second) = found[0].args, found[0].kwargs["shapes"]
    assert first == second
    assert x.shape[1] == first[1] * first[2] != 12


def test_a_size_of_the_model_stays() -> None:
    assert varying(Fixed(), x=torch.zeros(1, 12, 4)) == {}
    assert varying(Fixed(), x=torch.zeros(2, 12, 4)) == {"x": (4, 12, 4)}


def test_nothing_is_run_and_nothing_changes() -> None:
    class Counting(Image):
        calls = 0

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            type(self).calls += 0 if torch.compiler.is_compiling() else 1
            return super().forward(x, timestep)

    x, model = torch.randn(2, 8, 8, 8), Counting()
    before, state = x.clone(), {name: id(value) for name, value in vars(model).items()}
    resized(model, Arguments.of((), {"x": x, "timestep": torch.zeros(2)}))
    assert torch.equal(x, before)
    assert (Counting.calls, {name: id(value) for name, value in vars(model).items()}) == (0, state)


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 1, 0)])
def test_tensors_lie_in_memory_as_those_that_were_given(order: tuple[int, ...]) -> None:
    shape = [4, 6, 16]
    x = torch.zeros([shape[i] for i in order]).permute([order.index(i) for i in range(3)])
    found = resized(nn.Linear(16, 16), Arguments.of((x,), {}))
    assert found is not None
    made = found[0].args[0]
    assert made.shape != x.shape
    assert sorted(range(3), key=made.stride) == sorted(range(3), key=x.stride)


def marked(size: int, axis: int, mark: Callable[..., None] = torch._dynamo.mark_dynamic) -> dict[str, Tensor]:
    inputs = {"x": torch.zeros(size, 8, 6, 6), "timestep": torch.zeros(size)}
    mark(inputs["x"], axis)
    return inputs


def test_only_what_was_marked_varies() -> None:
    inputs = marked(2, 3)
    assert varying(Image(), **inputs) == {"x": (2, 8, 6, 12), "timestep": (2,)}
    assert len(marked_dims(Arguments.of((), inputs))) == 1


def test_what_is_marked_static_stays() -> None:
    assert varying(Image(), **marked(2, 2, torch._dynamo.mark_static))["x"][2] == 6


@pytest.mark.parametrize(
    ("size", "axis", "why", "fix"),
    [
        (2, 1, "Image cannot be captured with another size than 8", "take the mark off, or use maybe_mark_dynamic"),
        (1, 0, "a size of 1 means something else to many operators", "call it with a larger size first"),
    ],
)
def test_a_mark_that_cannot_be_kept_is_refused_by_name(size: int, axis: int, why: str, fix: str) -> None:
    model = dicompile.optimize(Image(), "none")
    with pytest.raises(InvalidSetting) as caught, torch.no_grad():
        model(**marked(size, axis))
    assert str(caught.value) == (
        f"dimension {axis} of x cannot be dynamic\n  where: mark_dynamic\n  why:   {why}\n  fix:   {fix}"
    )
    with torch.no_grad():  # and nothing is left behind
        model(**marked(2, 3, torch._dynamo.mark_static))


def test_marks_and_static_code_contradict_each_other() -> None:
    model = dicompile.optimize(Image(), "none", dynamic=False)
    with pytest.raises(InvalidSetting, match="are marked, and may not be dynamic"), torch.no_grad():
        model(**marked(2, 3))


def test_text_of_as_many_features_as_there_are_image_tokens() -> None:
    sample = flux(1)
    batch = sample.inputs["hidden_states"].shape[0]
    inputs = {**sample.inputs, "hidden_states": torch.zeros(batch, 24, 4), "img_ids": torch.zeros(24, 3)}
    assert inputs["encoder_hidden_states"].shape[-1] == 24
    found = varying(sample.model, **inputs)
    assert found["hidden_states"][1] == found["img_ids"][0] != 24
    assert found["encoder_hidden_states"][-1] == 24
