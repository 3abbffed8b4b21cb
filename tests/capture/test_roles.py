from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dicompile.capture import Input, Role
from tests.capture.captured import captured, roles, sample, tiny
from tests.models import MODELS

ROLES = {
    "dit": {"hidden_states": "latent", "timestep": "timestep", "class_labels": "conditioning"},
    "pixart": {"hidden_states": "latent", "timestep": "timestep", "encoder_hidden_states": "conditioning"},
    "sd3": {
        "hidden_states": "latent",
        "timestep": "timestep",
        "pooled_projections": "conditioning",
        "encoder_hidden_states": "conditioning",
    },
    "flux": {
        "hidden_states": "latent",
        "timestep": "timestep",
        "guidance": "conditioning",
        "pooled_projections": "conditioning",
        "encoder_hidden_states": "conditioning",
        "txt_ids": "conditioning",
        "img_ids": "conditioning",
    },
    "plain_dit": {"x": "latent", "t": "timestep", "y": "conditioning"},
}


@pytest.mark.parametrize("name", MODELS)
def test_every_argument_gets_its_role(name: str) -> None:
    assert roles(captured(name)) == ROLES[name]


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_inputs_under_their_dotted_names(name: str) -> None:
    model, found = sample(name).model, captured(name)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    parameters = [item.name for item in found.inputs if item.role is Role.PARAMETER]
    assert len(parameters) == len(set(parameters))
    assert set(parameters) <= set(tensors)
    assert {key for key, _ in model.named_parameters() if "blocks" in key} <= set(parameters)
    placeholders = [node for node in found.graph.nodes if node.op == "placeholder"]
    for node, item in zip(placeholders, found.inputs, strict=True):
        if item.role is Role.PARAMETER:
            assert node.meta["val"].shape == tensors[item.name].shape, item.name
    assert not [node for node in found.graph.nodes if node.op == "get_attr"]


def test_position_is_that_of_the_first_input_with_a_role() -> None:
    found = captured("pixart")
    position = found.input_position(Role.TIMESTEP)
    assert position is not None
    assert found.inputs[position] == Input("timestep", Role.TIMESTEP)
    assert tiny(Sinusoid(), x=torch.randn(2, 4, 8), w=torch.ones(2, 3)).input_position(Role.TIMESTEP) is None


def test_parameters_print_with_an_at_sign_and_arguments_without() -> None:
    assert Input("blocks.0.weight", Role.PARAMETER).label == "@blocks.0.weight"
    assert Input("x", Role.LATENT).label == "x"


class Sinusoid(nn.Module):
    """Embeds whatever it is given beside x."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, **scalars: Tensor) -> Tensor:
        for value in scalars.values():
            x = x + torch.cos(value.reshape(-1, *[1] * (x.ndim - 1))).mean()
        return self.linear(x)


class ScalarTimes(Sinusoid):
    def forward(self, x: Tensor, guidance: Tensor, sigma: Tensor) -> Tensor:
        return self.linear(x) * torch.cos(guidance[:, None, None]) * torch.sin(sigma[:, None, None])


def test_of_two_embedded_scalars_the_one_called_after_time_is_the_timestep() -> None:
    found = tiny(ScalarTimes(), x=torch.randn(2, 4, 8), guidance=torch.ones(2), sigma=torch.ones(2))
    assert roles(found) == {"x": "latent", "guidance": "conditioning", "sigma": "timestep"}


class TokenTimes(Sinusoid):
    def forward(self, x: Tensor, positions: Tensor, t: Tensor) -> Tensor:
        x = x + torch.sin(positions).sum(-1)[None, :, None]
        return self.linear(x) * torch.cos(t[:, :, None])


def test_a_timestep_per_token_is_found_and_a_position_table_is_not_one() -> None:
    found = tiny(TokenTimes(), x=torch.randn(2, 6, 8), positions=torch.randn(6, 3), t=torch.ones(2, 6))
    assert roles(found) == {"x": "latent", "positions": "conditioning", "t": "timestep"}


class Projected(Sinusoid):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.linear(x) + torch.cos(self.linear(t))[:, None]


def test_a_vector_that_is_projected_before_it_meets_a_sinusoid_is_no_timestep() -> None:
    assert roles(tiny(Projected(), x=torch.randn(2, 6, 8), t=torch.ones(2, 8)))["t"] == "conditioning"


class ContextFirst(Sinusoid):
    def forward(self, context: Tensor, flags: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return (self.linear(x) + context.mean(1, keepdim=True)) * torch.cos(t)[:, None, None] * flags[:, None, None]


def test_the_latent_is_the_floating_input_shaped_like_the_output_wherever_it_stands() -> None:
    found = tiny(
        ContextFirst(),
        context=torch.randn(2, 5, 8),
        flags=torch.ones(2, dtype=torch.int64),
        x=torch.randn(2, 6, 8),
        t=torch.ones(2),
    )
    assert roles(found) == {"context": "conditioning", "flags": "conditioning", "x": "latent", "t": "timestep"}
