"""Every contestant gets the same calls, around the same weights."""

from __future__ import annotations

import itertools

import pytest
import torch

from dicompile.bench.models import SUBJECTS, Subject
from dicompile.bench.workload import Workload

every_subject = pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS)


def quick(subject: Subject) -> Workload:
    return Workload.of(subject, subject.size("quick"), 2, "cpu", torch.float32)


@every_subject
def test_inputs_and_weights_are_the_same_every_time(subject: Subject) -> None:
    def of(workload: Workload) -> list[torch.Tensor]:
        given = [value for value in workload.inputs.values() if isinstance(value, torch.Tensor)]
        return [*workload.ends, *given, *workload.module.parameters()]

    assert all(map(torch.equal, of(quick(subject)), of(quick(subject))))


def test_copies_share_weights_and_nothing_else() -> None:
    workload = quick(SUBJECTS["dit"])
    copied = workload.copy()
    assert all(a is b for a, b in zip(copied.parameters(), workload.module.parameters(), strict=True))
    copied.transformer_blocks[0].forward = None
    assert workload.module.transformer_blocks[0].forward is not None


@every_subject
def test_the_schedule_is_what_the_model_receives(subject: Subject) -> None:
    workload, received, seen = quick(subject), [], []

    def model(timestep: torch.Tensor, **_: object) -> None:
        received.append(timestep[0].item())
        seen.append(workload.now)

    list(workload.calls(model, 3))
    assert received == pytest.approx(workload.schedule(3), rel=1e-6)
    assert seen == list(subject.timesteps(3)) == [999, 666, 333]
    assert received[0] == pytest.approx(0.999 if subject.name == "flux" else 999)


def test_the_latent_moves_in_a_straight_line() -> None:
    workload, latents = quick(SUBJECTS["sd3"]), []
    list(workload.calls(lambda hidden_states, **_: latents.append(hidden_states), 4))
    assert torch.equal(latents[0], workload.ends[0])
    moved = [b - a for a, b in itertools.pairwise(latents)]
    assert all(torch.allclose(m, (workload.ends[1] - workload.ends[0]) / 4, atol=1e-6) for m in moved)
