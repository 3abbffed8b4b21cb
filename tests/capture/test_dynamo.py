from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dicompile.analysis import analyse
from dicompile.capture import capture_model
from dicompile.errors import CannotCapture
from tests.capture.captured import one_block
from tests.models import PlainDiT


def test_weights_on_the_meta_device_give_the_sites_of_the_real_model() -> None:
    real, expected = one_block()
    inputs = {key: value.to("meta") for key, value in real.inputs.items()}
    torch._dynamo.reset()
    with torch.device("meta"):
        found = capture_model(PlainDiT(layers=1).eval(), inputs)
    assert found.inputs == expected.inputs
    assert all(node.meta["val"].device.type == "meta" for node in found.graph.nodes if node.op == "placeholder")
    here, there = analyse(found), analyse(expected)
    assert [(s.name, s.kind, s.shape, s.flops) for s in here.sites] == [
        (s.name, s.kind, s.shape, s.flops) for s in there.sites
    ]


class Scales(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Refuses(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x * 2
        return x


def test_a_model_that_branches_on_its_data_cannot_be_captured_and_the_text_says_why() -> None:
    with pytest.raises(CannotCapture) as error:
        capture_model(Refuses(), {"x": torch.randn(2, 4)})
    lines = str(error.value).splitlines()
    assert lines[0] == "Refuses reads a value computed from its latent in Python"
    assert lines[1] == "  where: capture, __bool__()"
    assert lines[2].startswith("  why:   what it computes then differs from step to step")
    assert lines[3].startswith("  fix:   ")
    assert "branching" in str(error.value.__cause__)  # what Dynamo said


def test_models_of_one_class_can_be_captured_any_number_of_times() -> None:
    """Dynamo gives up after eight compilations of a forward, those of other instances included."""
    torch._dynamo.reset()
    found = [capture_model(Scales(width), {"x": torch.randn(2, width)}) for width in range(1, 12)]
    assert [len(capture.inputs) for capture in found] == [2] * 11
