"""Capture by running: what Python reads is known, and the graph holds for equal values only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import dicompile
from dicompile.capture import Arguments, Captured, capture_graph, values_of
from dicompile.capture.flex import attend
from dicompile.capture.trace import capture_by_running, check_reads
from dicompile.errors import CannotCapture
from dicompile.wrapper import record_of

WIDTH = 8


class Reads(nn.Module):
    """Reads the mask in Python, in a way of the test's choice, and otherwise computes with tensors."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, t: Tensor, mask: Tensor) -> Tensor:
        return WAYS[self.how](self.linear(x) * torch.cos(t)[:, None, None], mask)


def write(x: Tensor, mask: Tensor) -> Tensor:
    x[:, mask[0]] = 0
    return x


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "tolist": lambda x, mask: x[:, : max(mask.sum(1).tolist())],
    "if": lambda x, mask: x if mask.all() else x * 2,
    "boolean index": lambda x, mask: x[:, mask[0]],
    "slice": lambda x, mask: x[:, : mask[0].sum()],
    "nonzero": lambda x, mask: x.index_select(1, torch.nonzero(mask[0]).flatten()),
    "repeat": lambda x, mask: x.repeat_interleave(mask[0].long() + 1, dim=1),
    "view": lambda x, mask: x.view(x.shape[0], mask.sum() // mask.sum(), -1),
    "write": write,
}


def given(kept: int) -> dict[str, Tensor]:
    mask = torch.arange(6)[None] < kept
    return {"x": torch.randn(2, 6, WIDTH), "t": torch.rand(2), "mask": mask.expand(2, 6).clone()}


def run(module: nn.Module, **inputs: Any) -> tuple[Captured, Sequence[Tensor]]:
    arguments = Arguments.of((), inputs)
    captured = capture_by_running(module, arguments)
    return captured, values_of(module, captured, arguments)


def result(captured: Captured, graph: Any, values: Sequence[Tensor]) -> Any:
    with torch.no_grad():
        return captured.pack(tuple(graph(*values)), ())


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.sampled
def test_the_graph_does_what_the_model_did_and_the_read_input_is_known(how: str) -> None:
    module, inputs = Reads(how).eval(), given(4)
    captured, values = run(module, **inputs)
    capture = capture_graph(captured.graph, captured.names, values)
    with torch.no_grad():
        torch.testing.assert_close(result(captured, capture.graph_module, values), module(**inputs))
    assert [captured.names[position][0] for position in captured.reads] == ["mask"]
    check_reads(captured, [item.role for item in capture.inputs], "Reads")


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.sampled
def test_other_values_of_what_was_read_are_captured_anew_and_equal_ones_are_not(how: str) -> None:
    module = Reads(how).eval()
    model = dicompile.optimize(module, "none", mode="eager")
    with torch.no_grad():
        for kept, frames in ((4, 1), (4, 1), (6, 2), (4, 2)):
            inputs = given(kept)
            torch.testing.assert_close(model(**inputs), module(**inputs))
            if record_of(model).calls.is_run:  # Dynamo takes some of the ways by itself
                assert len(model.frames) == frames


def test_values_are_compared_anew_in_inference_mode_where_writes_are_not_counted() -> None:
    module = Reads("boolean index").eval()
    model = dicompile.optimize(module, "none", mode="eager")
    with torch.inference_mode():
        inputs = given(4)
        for kept in (4, 2):
            inputs["mask"][:, kept:] = False
            torch.testing.assert_close(model(**inputs), module(**inputs))


class StoredInHalf(nn.Module):
    """Puts weights into the dtype of the computation and back, and reads the mask in Python."""

    def __init__(self, kept: float = 1.0) -> None:
        super().__init__()
        self.linear, self.kept = nn.Linear(WIDTH, WIDTH).bfloat16(), kept

    def forward(self, x: Tensor, t: Tensor, mask: Tensor) -> Tensor:
        for weight in self.linear.parameters():
            weight.data = weight.data.to(x.dtype)
        x = self.linear(x[:, : mask[0].sum()]) * torch.cos(t)[:, None, None]
        for weight in self.linear.parameters():
            weight.data = (weight.data * self.kept).to(torch.bfloat16)
        return x + self.linear.bias.data


def test_the_data_of_weights_is_followed_and_given_back() -> None:
    module, inputs = StoredInHalf().eval(), given(4)
    memory = [weight.data_ptr() for weight in module.parameters()]
    captured, values = run(module, **inputs)
    assert [weight.data_ptr() for weight in module.parameters()] == memory
    capture = capture_graph(captured.graph, captured.names, values)
    with torch.no_grad():
        torch.testing.assert_close(result(captured, capture.graph_module, values), module(**inputs))


def test_weights_that_differ_after_every_call_are_refused() -> None:
    module = dicompile.optimize(StoredInHalf(kept=0.5).eval(), "none", mode="eager")
    with pytest.raises(CannotCapture, match=r"changes what it keeps at every call\n(.*\n)*.*self.linear.weight.data"):
        module(**given(4))


class WritesData(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x.data = x.data[:, : mask[0].sum()]
        return x * 2


def test_data_of_an_argument_that_is_written_is_refused() -> None:
    inputs = given(4)
    with pytest.raises(CannotCapture, match="the model writes to its inputs: x"):
        run(WritesData(), x=inputs["x"], mask=inputs["mask"])


class Constants(nn.Module):
    """Tensors that are neither parameters nor buffers, used in turns."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.randn(WIDTH), torch.randn(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 10 and x.sum() > 0:
            return x
        return (x * self.first + self.second) * self.first - self.second


def test_every_constant_goes_where_it_came_from() -> None:
    module, x = Constants(), torch.randn(2, WIDTH)
    captured, values = run(module, x=x)
    assert captured.constants == () and {name for name, _ in captured.names} == {"first", "second", "x"}
    torch.testing.assert_close(result(captured, captured.graph, values), module(x))


def test_results_come_back_packed_as_the_model_packs_them() -> None:
    class Packs(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"sample": [x * 2], "count": 3}

    captured, values = run(Packs(), x=torch.ones(2))
    packed = result(captured, captured.graph, values)
    assert packed["count"] == 3 and torch.equal(packed["sample"][0], torch.full((2,), 2.0))


class Adds(nn.Module):
    def forward(self, x: Tensor, cache: Any) -> Tensor:
        if cache.mode == "write":
            cache.value = x
        return x + cache.parts[0].value


def cache(value: float, mode: str = "read") -> SimpleNamespace:
    return SimpleNamespace(mode=mode, parts=[SimpleNamespace(value=torch.full((2,), value))])


def test_an_object_is_looked_into() -> None:
    module, x = Adds(), torch.ones(2)
    captured, values = run(module, x=x, cache=cache(1.0))
    assert [name for name, _ in captured.names] == ["x", "cache.parts.0.value"]
    other = Arguments.of((), {"x": x, "cache": cache(2.0)})
    assert other.key == Arguments.of((), {"x": x, "cache": cache(1.0)}).key
    assert other.key != Arguments.of((), {"x": x, "cache": cache(1.0, "other")}).key
    assert torch.equal(result(captured, captured.graph, other.tensors), torch.full((2,), 3.0))
    assert len(values) == 2


def test_an_object_that_is_written_to_is_refused_and_stays_as_it_is() -> None:
    given = cache(1.0, "write")
    with pytest.raises(CannotCapture, match="writes to a list, dictionary or object"):
        run(Adds(), x=torch.ones(2), cache=given)
    assert not hasattr(given, "value")


def test_an_object_that_cannot_be_looked_into_is_refused() -> None:
    with pytest.raises(CannotCapture, match="holds an object of class ndarray"):
        Arguments.of((torch.ones(2),), {"cache": SimpleNamespace(value=np.ones(2))})


def test_a_model_that_writes_to_a_dictionary_of_its_caller_is_refused() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor, cache: dict[str, Tensor]) -> Tensor:
            cache["x"] = x * 2
            return x

    with pytest.raises(CannotCapture, match="writes to a list, dictionary or object"):
        run(Writes(), x=torch.ones(2), cache={})


def test_a_setting_of_the_module_that_changes_is_captured_anew() -> None:
    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = 2.0
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.linear(x)[:, : max(mask.tolist())] * self.scale

    module = Scales().eval()
    model = dicompile.optimize(module, "none", mode="eager")
    x, mask = torch.randn(2, 6, WIDTH), torch.tensor([3, 4])
    with torch.no_grad():
        first = model(x, mask)
        module.scale = 3.0
        second = model(x, mask)
        torch.testing.assert_close(second, module(x, mask))
    assert not torch.equal(first, second)
    module.linear.weight.data.mul_(2)  # weights are inputs: no new graph
    frames = len(model.frames)
    with torch.no_grad():
        torch.testing.assert_close(model(x, mask), module(x, mask))
    assert len(model.frames) == frames


@pytest.mark.parametrize("score", [None, "relative"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_written_out(score: str | None, masked: bool) -> None:
    query, key, value = (torch.randn(1, 2, 256, 16) for _ in range(3))
    relative = (lambda s, b, h, q, k: s + 0.01 * (q - k)) if score else None
    mask = create_block_mask(lambda b, h, q, k: q >= k, 1, 1, 256, 256, device="cpu") if masked else None
    wanted = flex_attention(query, key, value, score_mod=relative, block_mask=mask)
    torch.testing.assert_close(attend(query, key, value, relative, mask), wanted)
    if not score and not masked:
        torch.testing.assert_close(wanted, F.scaled_dot_product_attention(query, key, value))
