"""Loop invariants: what does not depend on the latent, and is worth computing outside of the steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dicompile.analysis import ModelStructure, Pace
from dicompile.capture import Role
from tests.models import PlainDiT, Sample, dit, flux, pixart, plain_dit, redraw, sd3, structure

GENERATION, STEP = Pace.GENERATION, Pace.STEP


def paces(found: ModelStructure) -> Counter[Pace]:
    return Counter(found.invariants.values())


@pytest.mark.parametrize(
    ("sample", "timed"),
    [
        (dit, 3 * 3 + 3),  # of every block: its embedding of the timestep, two products, and its modulation; the head's
        (pixart, 3),  # the embedding, and the one modulation of all blocks
        (plain_dit, 2 + 3 + 1),
    ],
)
@pytest.mark.sampled
def test_modulation_depends_on_the_step(sample: Callable[[], Sample], timed: int) -> None:
    assert paces(structure(sample()))[STEP] == timed


def test_keys_and_values_of_the_text_hold_for_a_generation() -> None:
    found = structure(pixart(layers=3))
    assert paces(found)[GENERATION] == 2 + 2 * 3  # the caption's projection; keys and values of three blocks
    assert found.invariant_flops[GENERATION] > found.invariant_flops[STEP] > 0


@pytest.mark.parametrize("sample", [sd3, flux])
def test_text_that_the_picture_writes_to_stays_in_the_steps(sample: Callable[[], Sample]) -> None:
    found = structure(sample())
    inside = {name for site in found.sites for name in (site.core, site.update, site.add, *site.attention)}
    assert found.invariants
    assert not inside & found.invariants.keys()


class Noisy(PlainDiT):
    """Its conditioning is drawn anew at every call."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, t + torch.rand_like(t, dtype=torch.float32), y)


def test_what_is_drawn_anew_is_no_invariant() -> None:
    sample = plain_dit()
    assert structure(Sample(redraw(Noisy(3)), sample.inputs)).invariants == {}


class Modulated(nn.Module):
    """A branch that a timestep scales, one for every sample or one for every token."""

    def __init__(self) -> None:
        super().__init__()
        self.modulate, self.up = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        scale = self.modulate(torch.sin(timestep[..., None] * torch.arange(16)))
        return x + self.up(x * (1 + scale))


@pytest.mark.parametrize(("timesteps", "count"), [(1, 1), (64, 0)])
def test_what_has_rows_for_tokens_is_not_kept(timesteps: int, count: int) -> None:
    inputs = {"x": torch.randn(2, 64, 16), "timestep": torch.rand(2, timesteps)}
    found = structure(Sample(Modulated().eval(), inputs))
    assert Role.TIMESTEP in {item.role for item in found.inputs}
    assert paces(found)[STEP] == count
