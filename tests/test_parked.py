"""Weights that lie elsewhere: where they are found, and what a module looks like without the hooks that bring them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, attach_execution_device_hook, remove_hook_from_module
from diffusers.hooks import HookRegistry, apply_group_offloading, apply_layerwise_casting
from diffusers.hooks.group_offloading import (
    GroupOffloadingConfig,
    GroupOffloadingType,
    _apply_group_offloading,
    _maybe_remove_and_reapply_group_offloading,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from dicompile.capture import Arguments, Pins, capture_functional, capture_model
from dicompile.capture.guards import find_place
from dicompile.capture.stored import from_bytes, to_bytes
from dicompile.parked import Parked, brought, forward_under_hooks, homes_of, kind_of, uncovered

CPU = torch.device("cpu")
BLOCKS: dict[str, Any] = {"offload_type": "block_level", "num_blocks_per_group": 1}
LEAVES: dict[str, Any] = {"offload_type": "leaf_level"}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj(x)


class Model(nn.Module):
    """Weights of its own, in blocks, and beside them; and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(4, 4)
        self.register_buffer("shift", torch.randn(4))

    def forward(self, hidden_states: Tensor) -> Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states)
        out: Tensor = self.head(hidden_states * self.scale + self.shift)
        return out


class Stream:
    def synchronize(self) -> None: ...


def streamed(model: Model, folder: Path, level: GroupOffloadingType) -> None:
    """Group offloading with a stream, as far as it goes without an accelerator: weights lie in tensors of the hook."""
    config = GroupOffloadingConfig(
        onload_device=CPU, offload_device=CPU, offload_type=level, non_blocking=True, record_stream=True,
        low_cpu_mem_usage=True, num_blocks_per_group=1, stream=Stream(),  # type: ignore[arg-type]
    )  # fmt: skip
    _apply_group_offloading(model, config)
    del folder


def grouped(options: dict[str, Any]) -> Any:
    return lambda model, folder: apply_group_offloading(model, CPU, CPU, **options)


def on_disk(options: dict[str, Any]) -> Any:
    return lambda model, folder: apply_group_offloading(model, CPU, CPU, offload_to_disk_path=f"{folder}", **options)


HOW: dict[str, Any] = {
    "blocks": grouped(BLOCKS),
    "leaves": grouped(LEAVES),
    "blocks, stream": lambda model, folder: streamed(model, folder, GroupOffloadingType.BLOCK_LEVEL),
    "leaves, stream": lambda model, folder: streamed(model, folder, GroupOffloadingType.LEAF_LEVEL),
    "blocks, disk": on_disk(BLOCKS),
    "leaves, disk": on_disk(LEAVES),
    "sequential": lambda model, folder: accelerate.cpu_offload(model, CPU, offload_buffers=True),
    "sequential, classes": lambda model, folder: accelerate.cpu_offload(
        model, CPU, offload_buffers=True, preload_module_classes=["Block"]
    ),
    "sequential, disk": lambda model, folder: accelerate.disk_offload(model, f"{folder}", CPU, offload_buffers=True),
}


def seen(model: nn.Module) -> dict[str, Any]:
    """All that a module is: every object in every part."""
    return {
        f"{path}.{name}.{key}": id(item)
        for path, part in model.named_modules()
        for name, value in vars(part).items()
        for key, item in (value.items() if name in ("_parameters", "_buffers") else [("", value)])
    }


@pytest.mark.parametrize("how", HOW)
def test_every_weight_is_found_wherever_it_is(how: str, tmp_path: Path) -> None:
    model = Model()
    wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    HOW[how](model, tmp_path)
    homes = homes_of(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        parked = Parked(tensor, homes[id(tensor)])
        value = brought(parked)
        assert torch.equal(value, wanted[name])
        assert not value.requires_grad
        assert not value.data_ptr() % 64
        assert torch.equal(parked.find(), wanted[name])
        assert parked.reserve().shape == value.shape
        assert parked.held.shape == value.shape


@pytest.mark.parametrize("how", HOW)
def test_an_uncovered_module_is_as_if_nobody_had_offloaded_it(how: str, tmp_path: Path) -> None:
    model, x = Model(), torch.randn(2, 4)
    plain = Model()
    wanted = model(x)
    HOW[how](model, tmp_path)
    before = seen(model)
    with uncovered(model):
        assert all("forward" not in vars(part) and "_old_forward" not in vars(part) for part in model.modules())
        for (name, tensor), like in zip(
            model.state_dict(keep_vars=True).items(), plain.state_dict(keep_vars=True).values(), strict=True
        ):
            assert (kind_of(tensor), tensor.shape, tensor.device, tensor.requires_grad) == (
                type(like), like.shape, CPU, like.requires_grad
            ), name  # fmt: skip
            assert isinstance(tensor, FakeTensor) is ("disk" in how or "sequential" in how)
    assert seen(model) == before
    if "stream" not in how:  # which there is none of
        torch.testing.assert_close(model(x), wanted)


def test_an_error_while_it_is_uncovered_leaves_it_as_it_was() -> None:
    model = Model()
    accelerate.cpu_offload(model, CPU)
    before = seen(model)
    with pytest.raises(KeyboardInterrupt), uncovered(model):
        raise KeyboardInterrupt
    assert seen(model) == before


def test_a_capture_sees_weights_where_they_will_be() -> None:
    """On a device that is not there, with a module whose weights are on the meta device."""
    model, plain = Model(), Model()
    accelerate.cpu_offload(model, "cuda:0", offload_buffers=True)
    assert model.head.weight.is_meta
    with uncovered(model):
        mode = model.head.weight.fake_mode  # type: ignore[union-attr]
        with mode:
            x = torch.empty(2, 4, device="cuda:0")
        capture = capture_model(model, {"hidden_states": x})
    assert {node.meta["val"].device for node in capture.graph.nodes if "val" in node.meta} == {torch.device("cuda:0")}
    assert str(capture) == str(capture_model(plain, {"hidden_states": torch.randn(2, 4)}))


def test_hooks_that_only_move_arguments_are_left_out_as_well() -> None:
    model = Model()
    attach_execution_device_hook(model, CPU)
    assert homes_of(model) == {}
    before = seen(model)
    with uncovered(model):
        assert all("forward" not in vars(part) for part in model.modules())
        assert not any(isinstance(weight, FakeTensor) for weight in model.parameters())
    assert seen(model) == before


def test_hooks_of_others_are_no_offloading() -> None:
    model = Model()
    add_hook_to_module(model.head, ModelHook())
    apply_layerwise_casting(model.blocks[0], torch.float16, torch.float32)
    assert homes_of(model) == {}
    for part in (model.head, model.blocks[0].proj):
        assert forward_under_hooks(part) == (vars(part), "forward")
        assert find_place(part, "forward") == (vars(part), "forward")
    before = seen(model)
    with uncovered(model):
        assert seen(model) == before


def test_what_lies_under_the_offloading_hooks_stays() -> None:
    model = Model()
    apply_layerwise_casting(model.head, torch.float16, torch.float32)
    casting = vars(model.head)["forward"]
    apply_group_offloading(model, CPU, CPU, **LEAVES)
    holder, key = forward_under_hooks(model.head)
    assert holder[key] is casting
    with uncovered(model):
        assert vars(model.head)["forward"] is casting
        assert "forward" not in vars(model.blocks[0].proj)
    assert find_place(model.blocks[0].proj, "forward") == (vars(nn.Linear), "forward")


def test_a_weight_that_was_put_in_the_place_of_another_is_its_own_value() -> None:
    model = Model()
    apply_group_offloading(model, CPU, CPU, **BLOCKS)
    model.head.weight = nn.Parameter(torch.ones(4, 4))
    parked = Parked(model.head.weight, homes_of(model)[id(model.head.weight)])
    assert torch.equal(brought(parked), torch.ones(4, 4))


def test_values_come_in_the_dtype_and_layout_of_the_module() -> None:
    model = Model()
    model.head.weight.data = torch.randn(4, 4).t()
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    accelerate.cpu_offload(model, CPU, state_dict=state)
    value = brought(Parked(model.head.weight, homes_of(model)[id(model.head.weight)]))
    assert (value.dtype, value.stride()) == (torch.float32, (1, 4))
    assert torch.equal(value, state["head.weight"].float())


def test_nothing_is_parked_when_the_hooks_are_gone() -> None:
    model = Model()
    accelerate.cpu_offload(model, CPU)
    assert homes_of(model)
    remove_hook_from_module(model, recurse=True)
    assert homes_of(model) == {}


def test_a_capture_of_an_offloaded_module_holds_for_others_and_the_other_way_round() -> None:
    model, plain, inputs = Model(), Model(), Arguments.of((), {"hidden_states": torch.randn(2, 4)})
    accelerate.cpu_offload(model, CPU)
    with uncovered(model):
        captured, capture = capture_functional(model, inputs)
        content = to_bytes(model, captured, capture)
    assert isinstance(captured.guards.pin(plain), Pins)
    assert from_bytes(content, plain) is not None
    captured, capture = capture_functional(plain, inputs)
    content = to_bytes(plain, captured, capture)
    pins = captured.guards.pin(model, homes_of(model))
    assert isinstance(pins, Pins)
    assert {type(value) for value in pins.given(pins.tensors)} == {Parked, Tensor}  # buffers stay with accelerate
    assert isinstance(captured.guards.pin(model), str)
    with uncovered(model):
        assert from_bytes(content, model) is not None


def test_hooks_that_come_or_go_or_change_lead_to_a_new_look(tmp_path: Path) -> None:
    model = Model()
    captured, _ = capture_functional(model, Arguments.of((), {"hidden_states": torch.randn(2, 4)}))
    pins: Any = captured.guards.pin(model)
    for change in (
        lambda: apply_group_offloading(model, CPU, CPU, **BLOCKS),
        lambda: _maybe_remove_and_reapply_group_offloading(model),
        lambda: HookRegistry.check_if_exists_or_initialize(model).remove_hook("group_offloading"),
        lambda: accelerate.cpu_offload(model, CPU),
        lambda: remove_hook_from_module(model.blocks[1].proj),
        lambda: remove_hook_from_module(model, recurse=True),
        lambda: accelerate.disk_offload(model, f"{tmp_path}", CPU),
    ):
        assert pins.hold() is not None
        change()
        assert pins.hold() is None
        pins = captured.guards.pin(model, homes_of(model))
        assert isinstance(pins, Pins), pins
