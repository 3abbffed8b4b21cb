"""Constants in a model's Python: operators make them, so that any piece of the graph can."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import dicompile
from dicompile.capture import capture_model


class Marks(nn.Module):
    """Writes a number into a mask and multiplies by a table that stands in its source."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor, t: Tensor, mask: Tensor) -> Tensor:
        mask = mask.clone()
        mask[:, 0] = True
        scale = torch.tensor([[0.5, 1.0, 2.0, 4.0]]) * torch.cos(t)[:, None]
        return x + self.inner(x) * (mask * scale)[..., None]


INPUTS = {"x": torch.randn(2, 4, 4), "t": torch.ones(2), "mask": torch.zeros(2, 4, dtype=torch.bool)}


def test_constants_become_operators() -> None:
    capture = capture_model(Marks(), INPUTS)
    assert capture.graph.find_nodes(op="get_attr") == []
    text = str(capture)
    assert "aten.full.default([], True, dtype=torch.bool, device=cpu)" in text
    assert "lift_fresh_copy" not in text


def test_a_model_with_constants_runs_in_pieces() -> None:
    model = Marks()
    wanted = model(**INPUTS)
    assert torch.equal(dicompile.optimize(model, mode="eager")(**INPUTS), wanted)
