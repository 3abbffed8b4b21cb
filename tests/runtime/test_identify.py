"""Where a call stands: step, context and report together, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dicompile.runtime import Owner, SchedulerLink, Session, Signature
from dicompile.runtime.identify import Place, identify
from dicompile.runtime.session import ModelState
from tests.models import timesteps

TIMES = timesteps(6)
SIGNATURE = Signature(0, 1, (("prompt", 2),), geometry="film")
COND, UNCOND = torch.ones(1, 3), torch.zeros(1, 3)


class Film:
    """A model of frames that have a timestep each; what it computes is of no matter."""

    def __init__(self) -> None:
        self.session, self.owner = Session(), Owner(SchedulerLink(TIMES))

    def __call__(self, times: Sequence[float], prompt: torch.Tensor = COND) -> Place:
        place = identify(SIGNATURE, self.owner, self.session, [torch.tensor([times]), torch.ones(1, 4, 3), prompt])
        if place.context is not None:
            place.context.follow(place.call, place.step)
        return place

    @property
    def state(self) -> ModelState:
        return self.session.state_of(self.owner)


def test_frames_that_go_on_together_are_steps_of_their_context() -> None:
    film = Film()
    for step, time in enumerate(TIMES):
        places = [film([0, time, time], prompt) for prompt in (COND, UNCOND)]
        assert [place.step for place in places] == [step, step]
        assert list(film.state.contexts.values()) == [place.context for place in places]
    assert (film.state.report.outside, film.state.report.cold_starts) == (0, [])


def test_frames_that_go_on_one_after_the_other_are_computed_whole_while_the_largest_timestep_stays() -> None:
    film, first, second = Film(), TIMES[0], TIMES[1]
    assert film([first, first, first]).context is not None
    for times in ([second, first, first], [TIMES[2], second, first]):
        for prompt in (COND, UNCOND):
            assert film(times, prompt).context is None
    assert film.state.report.outside == 4
    assert film.state.contexts == {}
    place = film([TIMES[3], TIMES[2], second])
    assert (place.step, place.context is not None) == (1, True)
    assert film([TIMES[4], TIMES[3], second]).context is None
    assert film.state.report.outside == 5
    assert film.state.report.cold_starts == [1]
