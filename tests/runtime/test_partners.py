"""Partners: a call continues the one that had the same conditioning, without a copy and with few comparisons."""

from __future__ import annotations

import pytest
import torch

from dicompile.runtime.partners import Given, Partners, new_label


def given(*tensors: torch.Tensor) -> dict[int, Given]:
    return {position: Given.of(tensor) for position, tensor in enumerate(tensors)}


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


def test_a_call_continues_the_partner_with_its_conditioning_whatever_the_order() -> None:
    cond, uncond, more = torch.ones(3), torch.zeros(3), torch.full((2,), 7.0)
    before = [("", given(cond, more)), ("#1", given(uncond, more))]
    partners = Partners()
    assert partners.continued(given(uncond.clone(), more), before) == "#1"
    assert partners.continued(given(cond.clone(), more), before) == ""
    assert partners.continued(given(cond + 1, more), before) is None
    assert partners.continued(given(cond, more), []) is None
    assert partners.continued({}, [("", {})]) == ""


def test_of_equal_partners_the_first_goes_on() -> None:
    cond = torch.ones(3)
    assert Partners().continued(given(cond), [("", given(cond)), ("#1", given(cond))]) == ""


def test_an_input_that_always_varies_stops_to_count_after_a_step() -> None:
    partners, cond, uncond = Partners(), torch.ones(3), torch.zeros(3)

    def at(step: int) -> list[tuple[str, dict[int, Given]]]:
        return [(label, given(prompt, torch.tensor([step]))) for label, prompt in (("", cond), ("#1", uncond))]

    for _, now in at(1):
        assert partners.continued(now, at(0)) is None
    partners.next_step()
    assert partners.varying == {1}
    for label, now in at(2):
        assert partners.continued(now, at(1)) == label


def test_an_input_in_which_only_a_newcomer_differs_still_counts() -> None:
    partners, cond, uncond = Partners(), torch.ones(3), torch.zeros(3)
    assert partners.continued(given(uncond), [("", given(cond))]) is None
    assert partners.continued(given(cond), [("", given(cond))]) == ""
    partners.next_step()
    assert partners.varying == set()


def test_calls_that_have_nothing_to_continue_teach_nothing() -> None:
    partners = Partners()
    assert partners.continued(given(torch.ones(3)), []) is None
    partners.next_step()
    assert partners.varying == set()


def test_labels_are_names_with_numbers_where_needed() -> None:
    assert new_label("", []) == ""
    assert new_label("", ["", "#1"]) == "#2"
    assert new_label("cond", ["", "#1"]) == "cond"
    assert new_label("cond", ["cond"]) == "cond#1"
