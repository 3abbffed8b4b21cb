"""Which context a call continues: told by shapes, name, way, conditioning and latent, with few comparisons."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dicompile.plan import TimestepSchedule
from dicompile.runtime import contexts as module
from dicompile.runtime.contexts import MOST_TWINS, Call, Contexts, ContextState, new_label
from dicompile.runtime.given import Given

SCHEDULE = TimestepSchedule(100)
COND, UNCOND = torch.ones(3), torch.zeros(3)


def call(
    prompt: Tensor | None = None, latent: Tensor | None = None, name: str = "", way: object = None,
    geometry: object = "shape", signals: frozenset[str] = frozenset(), **more: Tensor,
) -> Call:  # fmt: skip
    conditioning = more if prompt is None else {"prompt": prompt, **more}
    return Call(name, geometry, way, {k: Given.of(v) for k, v in conditioning.items()}, signals, latent)


def window(number: int, step: int, batch: int = 1) -> Tensor:
    """Latent of a window, or of a seed, at a step: a bit further on than at the step before."""
    first, other = (
        torch.randn(batch, 4, 8, generator=torch.Generator().manual_seed(1000 * number + draw)) for draw in (999, step)
    )
    return first + 0.2 * other


class Followed:
    """Contexts of a run; knows which one every call got, and the step at which it began."""

    def __init__(self) -> None:
        self.contexts = Contexts()
        self.now: int | None = None

    def __call__(self, step: int, *calls: Call) -> list[str | None]:
        """Labels of the contexts that the calls of a step continue; None where they start one."""
        return [self._one(step, made) for made in calls]

    def _one(self, step: int, made: Call) -> str | None:
        if step != self.now:
            self.contexts.next_step(step - 1)
            self.now = step
        found = self.contexts.find(made, step)
        label = None if found is None else self.contexts.label_of(found)
        context = found or self.contexts.open(made, step, SCHEDULE.rest(step))
        if context is not None:
            context.follow(made, step)
        return label


def test_equal_inputs_are_the_same_wherever_they_lie() -> None:
    tensor = torch.randn(2, 3)
    kept = Given.of(tensor)
    assert kept.is_same(Given.of(tensor))
    assert kept.is_same(Given.of(tensor.expand(2, 3)))
    assert kept.is_same(Given.of(tensor.clone()))
    assert not kept.is_same(Given.of(tensor + 1))
    assert not kept.is_same(Given.of(tensor[:1]))
    assert not kept.is_same(Given.of(tensor.double()))
    assert not kept.is_same(Given.of(tensor.t().contiguous().t()[:, :2]))


def test_an_input_that_was_written_since_is_not_the_same() -> None:
    tensor = torch.randn(2, 3)
    kept, before = Given.of(tensor), tensor.clone()
    tensor += 1
    assert not kept.is_same(Given.of(tensor))
    assert not kept.is_same(Given.of(before))


def test_inputs_at_one_place_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_comparison(*_: object) -> bool:
        raise AssertionError("waits for the device")

    monkeypatch.setattr(torch, "equal", no_comparison)
    tensor = torch.randn(1, 3)
    assert Given.of(tensor.expand(4, 3)).is_same(Given.of(tensor.expand(4, 3)))


def test_inference_tensors_have_no_versions_and_are_the_same_where_they_lie() -> None:
    with torch.inference_mode():
        tensor = torch.randn(2, 3)
    assert Given.of(tensor).is_same(Given.of(tensor))
    assert Given.of(tensor).is_same(Given.of(tensor.clone()))


# Conditioning -------------------------------------------------------------------------------------------------------


def test_a_call_continues_the_partner_with_its_conditioning_whatever_the_order() -> None:
    run, size = Followed(), torch.full((2,), 7.0)
    assert run(0, call(COND, size=size), call(UNCOND, size=size)) == [None, None]
    assert run(1, call(UNCOND.clone(), size=size), call(COND.clone(), size=size)) == ["#1", ""]
    assert run(2, call(COND, size=size), call(COND + 1, size=size), call(UNCOND, size=size)) == ["", None, "#1"]
    assert run(3, call(COND, size=size), call(COND + 1, size=size), call(UNCOND, size=size)) == ["", "#2", "#1"]


def test_calls_without_any_conditioning_are_one_context() -> None:
    run = Followed()
    assert [run(step, call()) for step in range(3)] == [[None], [""], [""]]


def test_a_context_that_was_continued_at_a_step_is_not_continued_again_at_it() -> None:
    run = Followed()
    run(0, call(COND))
    assert run(1, call(COND), call(COND)) == ["", None]


def test_an_input_that_always_varies_stops_to_count_after_a_step() -> None:
    run = Followed()

    def partners(step: int) -> tuple[Call, Call]:
        varying = torch.tensor([step])
        return call(COND, varying=varying), call(UNCOND, varying=varying)

    assert run(0, *partners(0)) == [None, None]
    assert run(1, *partners(1)) == [None, None]
    assert run(2, *partners(2)) == ["#2", "#3"]
    assert run.contexts.varying == {"varying"}
    assert run(3, *partners(3)) == ["#2", "#3"]


def test_a_signal_of_the_step_keeps_its_context_at_the_second_step_already() -> None:
    run = Followed()

    def partners(step: int) -> tuple[Call, Call]:
        control, signals = torch.randn(2, 3), frozenset({"control"})
        return call(COND, control=control, signals=signals), call(UNCOND, control=control, signals=signals)

    assert run(0, *partners(0)) == [None, None]
    for step in range(1, 4):
        assert run(step, *partners(step)) == ["", "#1"]
    assert run.contexts.varying == set()


def test_an_input_in_which_only_a_newcomer_differs_still_counts() -> None:
    run = Followed()
    run(0, call(COND))
    assert run(1, call(UNCOND), call(COND)) == [None, ""]
    assert run(2, call(UNCOND), call(COND)) == ["#1", ""]
    assert run.contexts.varying == set()


def test_calls_that_have_nothing_to_continue_teach_nothing() -> None:
    run = Followed()
    run(0, call(COND))
    run(1)
    run(2, call(UNCOND))
    run(3, call(UNCOND))
    assert run.contexts.varying == set()


# Names, shapes, ways -------------------------------------------------------------------------------------------------


def test_a_name_that_only_one_context_has_tells_it_whatever_the_conditioning_is() -> None:
    run = Followed()
    run(0, call(COND, name="cond"), call(COND, name="uncond"))
    assert run(1, call(COND + 1, name="uncond"), call(COND + 1, name="cond")) == ["uncond", "cond"]
    assert run(2, call(COND)) == [None]


def test_of_several_contexts_with_a_name_the_conditioning_tells() -> None:
    run = Followed()
    run(0, call(COND, name="cond"), call(UNCOND, name="cond"))
    assert list(run.contexts) == ["cond", "cond#1"]
    assert run(1, call(UNCOND, name="cond"), call(COND, name="cond")) == ["cond#1", "cond"]


def test_other_shapes_are_other_contexts() -> None:
    run = Followed()
    assert run(0, call(COND, geometry="high"), call(COND, geometry="wide")) == [None, None]
    assert run(1, call(COND, geometry="wide"), call(COND, geometry="high")) == ["#1", ""]
    assert run(2, call(COND, geometry="square")) == [None]


@pytest.mark.parametrize("name", ["", "cond"])
def test_partners_that_toggle_a_setting_are_told_by_it(name: str) -> None:
    run = Followed()
    layers, skipped = (lambda step, way=way: call(COND, window(0, step), name, way) for way in ("all", "skip"))
    assert run(0, layers(0), skipped(0)) == [None, None]
    assert run(1, skipped(1), layers(1)) == [new_label(name, [name]), name]
    assert run(2, layers(2), skipped(2)) == [name, new_label(name, [name])]


def test_a_setting_that_changes_in_the_middle_of_a_run_ends_no_context() -> None:
    run = Followed()
    run(0, call(COND, way="slow"))
    assert run(1, call(COND, way="fast")) == [""]
    assert run(2, call(COND, way="fast")) == [""]
    assert run.contexts[""].way == "fast"


# Latents -------------------------------------------------------------------------------------------------------------


def test_windows_are_told_by_their_latents_whatever_the_order() -> None:
    run, labels = Followed(), ["", "#1", "#2"]
    assert run(0, *[call(COND, window(i, 0)) for i in range(3)]) == [None] * 3
    for step in range(1, 7):
        order = [(step + i) % 3 for i in range(3)]
        assert run(step, *[call(COND, window(i, step)) for i in order]) == [labels[i] for i in order]


def test_a_latent_that_is_no_step_on_from_any_starts_a_context() -> None:
    run = Followed()
    run(0, *[call(COND, window(i, 0)) for i in range(2)])
    assert run(1, call(COND, window(7, 1)), call(COND, window(1, 1)), call(COND, window(0, 1))) == [None, "#1", ""]


def test_a_latent_that_is_a_step_on_from_two_starts_a_context() -> None:
    run, first = Followed(), window(0, 0)
    run(0, call(COND, first), call(COND, first + 0.1 * window(1, 0)))
    assert run(1, call(COND, first + 0.05 * window(1, 0))) == [None]


def test_two_windows_that_lie_close_together_are_told_while_they_are_closer_to_themselves() -> None:
    run, first, other = Followed(), window(0, 0), window(0, 0) + 0.5 * window(1, 0)
    run(0, call(COND, first), call(COND, other))
    assert run(1, call(COND, 1.01 * other), call(COND, 1.01 * first)) == ["#1", ""]


def test_latents_that_are_missing_or_of_other_shapes_tell_nothing() -> None:
    run = Followed()
    run(0, call(COND), call(COND))
    assert run(1, call(COND), call(COND)) == [None, None]


def test_a_batch_in_which_a_row_was_given_to_another_sample_starts_a_context() -> None:
    run, other = Followed(), torch.cat([window(0, 1), window(5, 0)])
    run(0, call(COND, torch.cat([window(0, 0), window(1, 0)])))
    assert run(1, call(COND, other)) == [None]
    assert run(2, call(COND, torch.cat([window(0, 2), window(5, 1)]))) == ["#1"]


def test_equal_calls_of_a_step_continue_one_each() -> None:
    run = Followed()
    assert run(0, *[call(COND, window(0, 0)) for _ in range(3)]) == [None] * 3
    for step in range(1, 4):
        labels = run(step, *[call(COND, window(0, step)) for _ in range(3)])
        assert set(labels) == {"", "#1", "#2"}


def test_equal_calls_in_which_nothing_moves_continue_one_each() -> None:
    run, latent = Followed(), window(0, 0)
    for step in range(4):
        labels = run(step, *[call(COND, latent) for _ in range(3)])
        assert set(labels) == ({None} if not step else {"", "#1", "#2"})


# Bounds --------------------------------------------------------------------------------------------------------------


def test_calls_that_nothing_tells_apart_take_the_place_of_one_another() -> None:
    run, most = Followed(), 0
    for step in range(3):
        for _ in range(150):
            run(step, call(COND, window(0, step)))
            most = max(most, len(run.contexts))
    assert most == MOST_TWINS


def test_the_place_of_a_twin_is_given_on_empty_and_with_a_plan_of_its_own() -> None:
    run = Followed()
    for step in range(2):
        run(step, *[call(COND, window(0, step)) for _ in range(MOST_TWINS)])
    run.contexts[""].store, run.contexts[""].held = [torch.ones(1)], 4
    opened = run.contexts.open(call(COND, window(0, 1)), 1, SCHEDULE.rest(1))
    assert opened is run.contexts[""]
    assert (opened.store, opened.held, opened.step, opened.schedule) == ([], 0, None, SCHEDULE.rest(1))


def test_too_many_contexts_of_a_step_remember_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "MOST", 3)
    run = Followed()
    with caplog.at_level(logging.WARNING, "dicompile"):
        run(0, *[call(COND + i) for i in range(5)])
    assert list(run.contexts) == ["", "#1", "#2"]
    assert "more than 3 calls of one step" in caplog.text
    assert run(1, *[call(COND + i) for i in range(5)]) == ["", "#1", "#2", None, None]


def test_what_was_not_called_at_the_last_step_is_released() -> None:
    run = Followed()
    run(0, call(COND), call(UNCOND))
    left = run.contexts["#1"]
    left.store, left.held = [torch.ones(2)], 8
    run(1, call(COND))
    assert left.store != []  # it could come yet
    run(2, call(COND))
    assert (list(run.contexts), left.store, left.held, left.given) == ([""], [], 0, {})
    assert run(3, call(UNCOND)) == [None]


def test_a_context_keeps_a_copy_of_its_latent_and_the_conditioning_itself() -> None:
    run, latent = Followed(), window(0, 0)
    run(0, call(COND, latent))
    context: ContextState = run.contexts[""]
    assert context.latent is not latent
    assert context.latent is not None
    assert torch.equal(context.latent, latent)
    assert context.given["prompt"].tensor is COND


def test_labels_are_names_with_numbers_where_needed() -> None:
    assert new_label("", []) == ""
    assert new_label("", ["", "#1"]) == "#2"
    assert new_label("cond", ["", "#1"]) == "cond"
    assert new_label("cond", ["cond"]) == "cond#1"


# All of it -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), windows=st.integers(1, 4), named=st.booleans(), ways=st.integers(1, 2))
def test_every_call_of_a_guided_film_continues_itself(
    data: st.DataObject, windows: int, named: bool, ways: int
) -> None:
    """Windows, prompts and settings in any order; guidance may pause."""
    run, context_of, before = Followed(), dict[Any, str](), set[Any]()
    prompts: dict[str, Callable[[], Tensor]] = {"cond": COND.clone, "uncond": UNCOND.clone}
    for step in range(5):
        guided = data.draw(st.booleans())
        asked = [(w, p, way) for w in range(windows) for p in prompts for way in range(ways) if guided or p == "cond"]
        for window_, prompt, way in data.draw(st.permutations(asked)):
            key = window_, prompt, way
            latent = window(window_, step)
            (label,) = run(step, call(prompts[prompt](), latent, prompt if named else "", way))
            assert label == (context_of[key] if key in before else None)
            if label is None:
                context_of[key] = next(reversed(run.contexts))
        before = set(asked)
