"""Which models are refused when their steps should be recorded as CUDA graphs, on devices of fake tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import dicompile
from dicompile.errors import InvalidSetting
from dicompile.lower.hoist import PLAIN_TENSORS
from dicompile.lower.recordable import check_can_record, needs_host
from tests import models
from tests.lower.captured import captured
from tests.models import run, timesteps


def operators(function: Any, *arguments: Tensor, mode: FakeTensorMode) -> list[fx.Node]:
    with mode:
        graph: fx.Graph = make_fx(function)(*arguments).graph
    return [node for node in graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x.relu().topk(2)[0], []),
        (lambda x: x * torch.zeros((), device=x.device), []),
        (lambda x: x + torch.arange(4).to(x.device), ["aten._to_copy.default"]),
        (lambda x: x.cpu() + 1, ["aten._to_copy.default"]),
    ],
    ids=["on the device", "a number", "from the host", "to the host"],
)
def test_copies_to_or_from_the_host_are_found(function: Any, expected: list[str]) -> None:
    with FakeTensorMode() as mode:
        x = torch.empty(4, device="cuda")
    assert [str(node.target) for node in operators(function, x, mode=mode) if needs_host(node)] == expected


def test_operators_that_ask_the_host_for_memory_are_found() -> None:
    graph = fx.Graph()
    assert needs_host(graph.call_function(torch.ops.aten.nonzero.default, (graph.placeholder("x"),)))


def elsewhere(device: str = "cuda:0") -> list[Any]:
    """Arguments of the captured plain DiT that lie on a device that is not there."""
    arguments = captured(models.plain_dit, 2).arguments()
    with FakeTensorMode():
        return [torch.empty(value.shape, dtype=value.dtype, device=device) for value in arguments]


def refusal(arguments: list[Any], computed: Any = ()) -> str:
    with pytest.raises(InvalidSetting) as caught:
        check_can_record(captured(models.plain_dit, 2).capture, arguments, computed)
    return str(caught.value)


def test_inputs_on_a_cpu_are_refused_by_name() -> None:
    plain = captured(models.plain_dit, 2)
    assert refusal(plain.arguments()) == (
        f"steps cannot be recorded as CUDA graphs: input {plain.capture.inputs[0].name} lies on cpu\n"
        "  where: compile_mode\n  why:   CUDA graphs need a CUDA device, and all on it\n"
        "  fix:   leave out compile_mode='reduce-overhead'"
    )


def test_several_devices_and_tensors_of_others_are_refused() -> None:
    assert "inputs lie on cuda:0, cuda:1" in refusal([*elsewhere()[:-1], elsewhere("cuda:1")[-1]])
    assert "is a FakeTensor\n" in refusal(elsewhere())


def test_what_lies_on_one_device_can_be_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dicompile.lower.recordable.PLAIN_TENSORS", (*PLAIN_TENSORS, FakeTensor))
    capture = captured(models.plain_dit, 2).capture
    computed = {node.name for node in capture.graph.nodes}
    assert check_can_record(capture, elsewhere(), computed) == torch.device("cuda:0")
    monkeypatch.setattr("dicompile.lower.recordable.needs_host", lambda node: "conv" in str(node.target))
    assert " in embed\n" in refusal(elsewhere(), computed)
    assert check_can_record(capture, elsewhere(), ()) == torch.device("cuda:0")


def test_both_front_ends_refuse_a_model_on_a_cpu() -> None:
    sample = models.plain_dit(1)
    model = dicompile.optimize(sample.model, "fora", schedule=timesteps(4), compile_mode="reduce-overhead")
    with pytest.raises(InvalidSetting, match="lies on cpu"):
        run(model, sample.inputs, timesteps(4))
    torch._dynamo.reset()
    options = {"policy": "fora", "steps": 4, "compile_mode": "reduce-overhead"}
    bare = torch.compile(sample.model, backend="dicache", options=options)
    with pytest.raises(InvalidSetting, match="lies on cpu"):
        run(bare, sample.inputs, timesteps(4))
