"""What captures and calls see of layers that tensor parallelism has divided; one rank here, two in `tests/parallel`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import accelerate
import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import dicompile
from dicompile.analysis import analyse
from dicompile.capture import members
from dicompile.capture.arguments import Arguments
from dicompile.capture.call import capture_functional
from dicompile.capture.guards import Guards, Pins
from dicompile.compat import local_part
from dicompile.errors import UnsupportedModel
from dicompile.offload import check_whole
from dicompile.parked import seen_as, uncovered
from dicompile.tensor_parallel import HOOKS, SumOverRanks, divided_layers
from tests.models import redraw
from tests.passes.segments import Attention, chain


@pytest.fixture(autouse=True)
def one_rank(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


class Stack(nn.Module):
    """Blocks of one kind."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Mlp() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Mlp(nn.Module):
    def __init__(self, *, bias: bool = True) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(4, 8, bias), nn.LayerNorm(8), nn.Linear(8, 4, bias)
        self.words = nn.Embedding(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


def divided(plan: dict[str, Any] | None = None, *, bias: bool = True) -> Mlp:
    """A model that is divided among one rank."""
    model = redraw(Mlp(bias=bias))
    parallelize_module(
        model, init_device_mesh("cpu", (1,)), plan or {"up": ColwiseParallel(), "down": RowwiseParallel()}
    )
    return model


def hooks_of(part: nn.Module) -> list[Any]:
    return [hook for name in HOOKS for hook in vars(part)[name].values()]


X = torch.arange(8.0).reshape(1, 2, 4)


@pytest.mark.parametrize("bias", [True, False])
def test_a_graph_has_plain_weights_and_a_sum_behind_what_is_cut_row_wise(bias: bool) -> None:
    model = divided(bias=bias)
    with uncovered(model):
        captured, capture = capture_functional(model, Arguments.of((X,), {}))
    called = [str(node.target) for node in capture.graph.nodes if node.op == "call_function"]
    assert called == [
        "aten.linear.default", "aten.relu.default", "aten.linear.default", "_c10d_functional.all_reduce.default",
        "_c10d_functional.wait_tensor.default", *["aten.add.Tensor"] * (1 + bias),
    ]  # fmt: skip
    pins = captured.guards.found(model)
    assert {type(tensor) for tensor in pins.tensors} == {Tensor}
    with torch.no_grad():
        torch.testing.assert_close(capture.graph_module(*captured.pick([*pins.tensors, X]))[0], model(X))


def test_while_it_is_uncovered_a_module_has_what_a_rank_has_and_then_what_it_had() -> None:
    model = divided()
    weights, hooks = dict(model.named_parameters()), [hooks_of(model.up), hooks_of(model.down)]
    with uncovered(model):
        assert model.up.weight is local_part(weights["up.weight"])
        assert hooks_of(model.up) == []
        assert hooks_of(model.down) == [SumOverRanks(distributed.group.WORLD.group_name)]  # type: ignore[union-attr]
    assert all(weight is weights[name] for name, weight in model.named_parameters())
    assert [hooks_of(model.up), hooks_of(model.down)] == hooks


def test_calls_find_what_a_rank_has_of_the_weights_that_are_there() -> None:
    model = divided()
    with uncovered(model):
        captured, _ = capture_functional(model, Arguments.of((X,), {}))
    pins = captured.guards.found(model)
    names = [path.name for path in captured.guards.tensors]

    def weight(pins: Pins) -> Tensor | None:
        tensors = pins.hold()
        return None if tensors is None else tensors[names.index("up.weight")]

    assert weight(pins) is local_part(model.up.weight)
    model.up.weight = nn.Parameter(-model.up.weight)
    assert isinstance(model.up.weight, DTensor)
    assert weight(pins) is local_part(model.up.weight)
    model.double()
    assert weight(pins) is None
    assert "float64" in str(captured.guards.pin(model))
    model.float().up.weight = nn.Parameter(torch.ones(8, 4))
    assert weight(pins) is None
    assert isinstance(captured.guards.pin(divided()), Pins)


def test_hooks_that_come_or_go_lead_to_a_new_look() -> None:
    model, plain = divided(), redraw(Mlp())
    with uncovered(model):
        guards: Guards = capture_functional(model, Arguments.of((X,), {}))[0].guards
    assert isinstance(guards.pin(plain), str)
    pins = guards.found(model)
    model.up.register_forward_hook(lambda *_: None)
    assert pins.hold() is None


def test_blocks_of_one_kind_are_captured_once() -> None:
    model = redraw(Stack(3))
    mesh, plan = init_device_mesh("cpu", (1,)), {"up": ColwiseParallel(), "down": RowwiseParallel()}
    for block in model.blocks:
        parallelize_module(block, mesh, plan)
    with (
        mock.patch("dicompile.capture.members._capture_kind", wraps=members._capture_kind) as captured,
        uncovered(model),
    ):
        capture_functional(model, Arguments.of((X,), {}))
    assert captured.call_count == 1


def test_attention_in_front_of_a_sum_has_heads_on_every_rank() -> None:
    model = chain(Attention()).model
    parallelize_module(model.blocks[0], init_device_mesh("cpu", (1,)), {"proj": RowwiseParallel()})
    with uncovered(model), mock.patch("torch.distributed.get_world_size", return_value=2):
        capture = capture_functional(model, Arguments.of((), chain(Attention()).inputs))[1]
        (site,) = analyse(capture).sites
    assert site.ranks == 2


def test_hooks_of_the_users_own_stay_where_they_are_while_it_is_uncovered() -> None:
    """Another thread may be running the module, which nobody has divided."""

    class Untouched(OrderedDict[int, Any]):
        def clear(self) -> None:
            raise AssertionError("hooks were taken away")

    model = redraw(Mlp())
    model.up._forward_hooks = Untouched({0: lambda *_: None})
    with uncovered(model):
        assert len(model.up._forward_hooks) == 1


def test_guards_look_again_at_a_model_that_was_another_while_it_was_uncovered_and_at_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DICOMPILE_CACHE_DIR", "off")

    def looks(model: nn.Module) -> int:
        dicompile.reset()
        with mock.patch.object(Guards, "found", autospec=True, side_effect=Guards.found) as found:
            dicompile.optimize(model, "none", mode="eager")(X)
        return found.call_count

    assert looks(divided()) == looks(redraw(Mlp())) + 1


def test_training_needs_whole_weights() -> None:
    with pytest.raises(UnsupportedModel, match="layers of Mlp are divided by tensor parallelism"):
        check_whole(divided(), "training")


def test_torch_finds_no_layers_in_an_optimized_model_and_says_so() -> None:
    model = dicompile.optimize(redraw(Mlp()), "none", schedule=4)
    with pytest.warns(UserWarning, match="could not be resolved"):
        parallelize_module(model, init_device_mesh("cpu", (1,)), {"up": ColwiseParallel()})
    assert not any(isinstance(weight, DTensor) for weight in model.parameters())


def divided_module(model: nn.Module) -> None:
    distribute_module(model.up, init_device_mesh("cpu", (1,)))


def hooked(model: nn.Module) -> None:
    style(up=ColwiseParallel())(model)
    model.up.register_forward_hook(lambda *_: None)


def offloaded(model: nn.Module) -> None:
    accelerate.cpu_offload(model.words, torch.device("cpu"))
    style(up=ColwiseParallel())(model)


def in_two_dimensions(model: nn.Module) -> None:
    from torch.distributed.tensor import distribute_tensor

    mesh = init_device_mesh("cpu", (1, 1))
    style(up=ColwiseParallel())(model)
    model.up.weight = nn.Parameter(distribute_tensor(torch.ones(8, 4), mesh, [Shard(0), Replicate()]))


def with_plain_bias(model: nn.Module) -> None:
    style(down=RowwiseParallel())(model)
    model.down.bias = nn.Parameter(torch.ones(4))


def style(**plan: Any) -> Callable[[nn.Module], Any]:
    return lambda model: parallelize_module(model, init_device_mesh("cpu", (1,)), plan)


LAYOUT = "is laid out in another way"


@pytest.mark.parametrize(("divide", "where", "text"), [
    (style(up=ColwiseParallel(output_layouts=Replicate())), "up", LAYOUT),
    (style(up=ColwiseParallel(input_layouts=Shard(1))), "up", LAYOUT),
    (style(up=ColwiseParallel(use_local_output=False)), "up", LAYOUT),
    (style(down=RowwiseParallel(output_layouts=Shard(1))), "down", LAYOUT),
    (style(down=RowwiseParallel(input_layouts=Replicate())), "down", LAYOUT),
    (style(norm=SequenceParallel()), "norm", "it is a LayerNorm"),
    (style(words=ColwiseParallel()), "words", "it is a Embedding"),
    (style(up=PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate())), "up", LAYOUT),
    (divided_module, "up", LAYOUT),
    (hooked, "up", LAYOUT),
    (in_two_dimensions, "up", "are not column-wise"),
    (with_plain_bias, "down", "plain ones are not row-wise"),
    (offloaded, "Mlp", "and weights offloaded"),
])  # fmt: skip
def test_other_ways_are_refused_before_anything_is_captured(
    divide: Callable[[nn.Module], Any], where: str, text: str
) -> None:
    model = redraw(Mlp())
    divide(model)
    with pytest.raises(UnsupportedModel, match="divided by tensor parallelism") as raised:
        dicompile.optimize(model, "fora", schedule=4)
    assert f"where: {where}" in str(raised.value)
    assert text in str(raised.value)


def test_what_is_not_of_tensor_parallelism_is_what_it_is() -> None:
    model = redraw(Mlp())
    hook = model.up.register_forward_hook(lambda *_: None)
    (own,) = hooks_of(model.up)
    assert seen_as(own) is own
    assert seen_as(model.up.weight) is model.up.weight
    assert list(divided_layers(model)) == []
    hook.remove()
