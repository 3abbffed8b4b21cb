from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import dicompile
from dicompile.capture import Capture, capture_model
from dicompile.errors import CannotCapture
from tests.capture.captured import captured, one_block, operators, run_graph, sample, tiny
from tests.models import MODELS, Sample, capture


def is_in_place(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.sampled
def test_the_graph_computes_bitwise_what_the_model_computes(name: str) -> None:
    model, inputs = sample(name)
    with torch.no_grad():
        expected = first(model(**inputs))
    assert torch.equal(run_graph(captured(name), model, inputs), expected)


@pytest.mark.parametrize("name", MODELS)
def test_the_graph_is_functional_and_free_of_dropout_and_assertions(name: str) -> None:
    found = captured(name)
    assert not [node.name for node in found.graph.nodes if is_in_place(node)]
    assert not {op for op in operators(found) if "dropout" in op or "assert" in op}
    assert all(isinstance(n.target, torch._ops.OpOverload) or "getitem" in str(n.target) for n in calls(found))


@pytest.mark.parametrize("name", MODELS)
def test_attention_linear_and_norm_stay_single_operators(name: str) -> None:
    kept = {"aten.scaled_dot_product_attention.default", "aten.linear.default", "aten.layer_norm.default"}
    assert kept <= operators(captured(name))


def calls(found: Capture) -> list[fx.Node]:
    return [node for node in found.graph.nodes if node.op == "call_function"]


class WritesInPlace(nn.Module):
    """Rotates half of the channels by writing into slices, as many RoPE implementations do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        rotated = torch.empty_like(x)
        rotated[..., 0::2] = x[..., 1::2] * torch.cos(t)[:, None, None]
        rotated[..., 1::2] = x[..., 0::2]
        rotated[:, :2] *= 2
        return self.linear(rotated.add_(1)).relu_()


def test_in_place_writes_of_the_model_become_dataflow() -> None:
    model, inputs = WritesInPlace(), {"x": torch.randn(2, 4, 8), "t": torch.full((2,), 0.5)}
    found = tiny(model, **inputs)
    assert not [node.name for node in found.graph.nodes if is_in_place(node)]
    assert torch.equal(run_graph(found, model, inputs), model(**inputs))
    placeholder = next(node for node in found.graph.nodes if node.name.startswith("arg") and node.meta["val"].ndim == 3)
    linear = next(node for node in found.graph.nodes if node.target is torch.ops.aten.linear.default)
    assert placeholder in ancestors(linear), "the write is not on a path from the input to the layer that reads it"


def ancestors(node: fx.Node) -> set[fx.Node]:
    found, queue = set(), [node]
    while queue:
        new = [parent for parent in queue.pop().all_input_nodes if parent not in found]
        found.update(new)
        queue += new
    return found


class Dropouts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, t: Tensor, always: bool) -> Tensor:
        x = self.dropout(self.linear(x)) * F.dropout(t, 0.0, training=True).to(torch.float32)[:, None, None]
        return F.dropout(x, 0.25, training=always)


def test_dropout_that_does_nothing_is_removed_and_the_one_that_acts_is_kept() -> None:
    inputs = {"x": torch.randn(2, 4, 8), "t": torch.ones(2)}
    assert not {op for op in operators(tiny(Dropouts(), **inputs, always=False)) if "dropout" in op}
    active = [node for node in calls(tiny(Dropouts(), **inputs, always=True)) if "dropout" in str(node.target)]
    assert [node.args[1:] for node in active] == [(0.25, True)]


class WritesItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, t: Tensor, latent: Tensor) -> Tensor:
        latent.mul_(2)
        return self.linear(latent) * t[:, None, None]


class WritesItsBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros(8))

    def forward(self, t: Tensor, latent: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(latent) * t[:, None, None] + self.calls


@pytest.mark.parametrize(("model", "written"), [(WritesItsInput(), "latent"), (WritesItsBuffer(), "calls")])
def test_a_model_that_writes_to_its_inputs_is_refused_by_the_name_of_the_input(model: nn.Module, written: str) -> None:
    with pytest.raises(CannotCapture) as error:
        tiny(model, t=torch.ones(2), latent=torch.randn(2, 4, 8))
    assert str(error.value) == (
        f"the model writes to its inputs: {written}\n"
        "  where: capture\n"
        "  why:   a step that is skipped could not repeat the write\n"
        "  fix:   copy the tensor inside the model before writing to it"
    )


def test_nodes_print_with_operator_inputs_and_module_path() -> None:
    lines = str(captured("plain_dit")).splitlines()
    assert "@blocks.0.qkv.weight: f32[96,32] = input" in lines
    number = next(line.split(":")[0] for line in lines if line.endswith("# blocks.0.qkv"))
    source = next(line for line in lines if line.endswith("# blocks.0.qkv")).split("(")[1].split(",")[0]
    call = f"aten.linear.default({source}, @blocks.0.qkv.weight, @blocks.0.qkv.bias)"
    assert f"{number}: f32[4,64,96] = {call}  # blocks.0.qkv" in lines


def test_values_are_fake_and_keep_the_sizes_of_the_call() -> None:
    _, found = one_block()
    values = [node.meta["val"] for node in calls(found) if isinstance(node.meta["val"], Tensor)]
    assert all(
        isinstance(value, torch._subclasses.FakeTensor) and value.fake_mode is found.fake_mode for value in values
    )
    assert all(isinstance(size, int) for value in values for size in value.shape)


def test_capture_under_inference_mode_makes_the_same_graph() -> None:
    (model, inputs), expected = one_block()
    with torch.inference_mode():
        found = capture(Sample(model, {key: value.clone() for key, value in inputs.items()}))
    assert str(found) == str(expected)


class Halves(nn.Module):
    def __init__(self, *, reads: bool) -> None:
        super().__init__()
        self.linear, self.reads = nn.Linear(8, 8), reads

    def forward(self, x: Tensor, timestep: Tensor, mask: Tensor) -> Tensor:
        kept = x[mask] if self.reads else x[:4]  # Dynamo does not take the first
        return self.linear(kept) * torch.cos(timestep)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("reads", [False, True], ids=["Dynamo", "by running"])
def test_weights_of_inference_mode_that_want_gradients_are_taken(reads: bool, context: type[torch.no_grad]) -> None:
    with torch.inference_mode():
        module = Halves(reads=reads).eval()
        inputs = {"x": torch.randn(6, 8), "timestep": torch.rand(1), "mask": torch.arange(6) < 4}
        expected = module(**inputs)
    assert module.linear.weight.is_inference() and module.linear.weight.requires_grad
    with context():
        assert torch.equal(dicompile.optimize(module, "none", mode="eager")(**inputs), expected)


class TakesTheTypeOf(nn.Module):
    def forward(self, x: Tensor, timestep: Tensor, table: Tensor) -> Tensor:
        room = torch.empty_like(x)
        room.copy_(table)
        return x * torch.cos(timestep) + table.type_as(x) + room


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_taking_the_type_of_another_tensor_moves_to_its_device(dtype: torch.dtype) -> None:
    x, timestep = torch.empty(4, 8, dtype=dtype, device="meta"), torch.empty(1, dtype=dtype, device="meta")
    found = capture_model(TakesTheTypeOf(), {"x": x, "timestep": timestep, "table": torch.randn(4, 8)})
    moves = [node for node in found.graph.nodes if node.target is torch.ops.aten._to_copy.default]
    assert [(node.meta["val"].dtype, node.meta["val"].device.type) for node in moves] == [(dtype, "meta")] * 2


class WritesToWindows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.windows = Windows()

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.windows(x * torch.cos(timestep))


class Windows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x[:, 1:].as_strided((2, 2), (8, 1)).mul_(2)
        return x


def test_a_write_that_cannot_be_made_functional_is_named_with_its_module() -> None:
    with pytest.raises(
        CannotCapture, match=r"aten.mul_.Tensor in windows cannot be made functional\n(.*\n)*.*as_strided"
    ):
        capture_model(WritesToWindows(), {"x": torch.randn(2, 8), "timestep": torch.rand(1)})
