"""Fitted weights, shared or one row for each site: what they do, what they are refused for, and their files."""

from __future__ import annotations

import pytest

from dicompile.errors import PolicyDoesNotFit
from dicompile.plan import Cadence, Fitted, Origin, Policy, Rule, Table, TimestepSchedule, make_plan
from tests.plan.toys import toy

KINDS = [["self-attention", "mlp"], ["self-attention", "mlp"]]
LABELS = ("0.self-attention", "0.mlp", "1.self-attention", "1.mlp")
PER_SITE = ((0.9,), (0.8,), (0.7,), (0.6,))


def fitted(
    weights: tuple[object, ...] = ((), PER_SITE, (), PER_SITE), at: tuple[int, ...] = (0, 2), **options: object
) -> Policy:
    rule = Rule(do=Fitted(weights=weights, **options))
    return Policy(name="fitted", cadence=Cadence(at=at), rules=(rule,))


def actions(policy: Policy, step: int, schedule: int | TimestepSchedule = 4) -> list[tuple[float, ...]]:
    plan = make_plan(toy(KINDS), policy, TimestepSchedule.of(schedule))
    return [site.action.weights for site in plan.steps[step].sites]


def test_every_site_has_its_own_weights() -> None:
    assert actions(fitted(), 1) == [(0.0, *own) for own in PER_SITE]


def test_weights_follow_the_order_of_the_sites_that_the_rule_names() -> None:
    rule = Rule(sites=("mlp",), do=Fitted(weights=((), ((0.5,), (0.25,)), (), (0.125,))))
    policy = Policy(name="fitted", cadence=Cadence(at=(0, 2)), rules=(rule,))
    assert actions(policy, 1) == [(1.0,), (0.0, 0.5), (1.0,), (0.0, 0.25)]
    assert actions(policy, 3) == [(1.0,), (0.0, 0.125), (1.0,), (0.0, 0.125)]


@pytest.mark.parametrize(
    "weights", [((), PER_SITE, (), PER_SITE), ((), (0.9,), (), (0.8,)), ((), PER_SITE, (), (0.8,))]
)
def test_they_are_plain_data(weights: tuple[object, ...]) -> None:
    policy = fitted(weights, origin=Origin(file="calibration", sites=LABELS))
    assert Policy.from_yaml(policy.to_yaml()) == policy
    assert Policy.from_json(policy.to_json()) == policy


def test_a_run_that_begins_later_takes_them_where_its_history_is_the_one_they_were_fitted_to() -> None:
    later = TimestepSchedule.of(4).rest(1)
    assert actions(fitted(), 2, later) == [(0.0, *own) for own in PER_SITE]
    assert actions(fitted(((), PER_SITE, PER_SITE, PER_SITE), at=(0,)), 1, later) == [(0.0, 1.0)] * 4


def test_a_table_says_which_sites_take_them_and_which_are_computed() -> None:
    compute = ((True,), (False, True, False, True), (False,), (False,))
    some, both = ((0.9,), (), (0.7,), ()), ((0.1,), (0.2, -0.1), (0.3,), (0.4, -0.2))
    table = Table(compute=compute, otherwise=Fitted(weights=((), some, both, both)))
    policy = Policy(name="sites", rules=(Rule(do=table),))
    assert Policy.from_yaml(policy.to_yaml()) == policy
    assert actions(policy, 1) == [(0.0, 0.9), (1.0,), (0.0, 0.7), (1.0,)]
    assert actions(policy, 2) == [(0.0, *own) for own in both]


def test_of_a_run_that_begins_later_every_site_of_a_table_has_its_own_history() -> None:
    """The second MLP alone is computed between; from then on its history is the one that its weights were fitted to."""
    compute = ((True,), (True,), (False, False, False, True), (False,))
    at_2, at_3 = ((0.9,), (0.8,), (0.7,), ()), ((0.5,), (0.4,), (0.3,), (0.2, 0.1))
    table = Table(compute=compute, otherwise=Fitted(weights=((), (), at_2, at_3)))
    later = TimestepSchedule.of(4).rest(1)
    assert actions(Policy(name="sites", rules=(Rule(do=table),)), 2, later) == [(0.0, *own) for own in at_3]


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (fitted(((), PER_SITE[:3], (), PER_SITE[:3])), "weights for 3 sites, the model has 4"),
        (fitted(((), PER_SITE, ())), "fitted to 3 steps, the schedule has 4"),
        (fitted(origin=Origin(file="calibration", sites=(*LABELS[:3], "1.cross-attention"))), "1.cross-attention"),
    ],
)
def test_weights_of_another_model_or_sampler_are_refused(policy: Policy, said: str) -> None:
    with pytest.raises(PolicyDoesNotFit, match=said):
        actions(policy, 1)


def test_weights_of_other_timesteps_are_refused() -> None:
    policy = fitted(origin=Origin(file="calibration", timesteps=(900.0, 600.0, 300.0, 100.0)))
    assert actions(policy, 1, TimestepSchedule.of([900.0, 600.0, 300.0, 100.0]))
    with pytest.raises(PolicyDoesNotFit, match="timestep 300 at step 3, the schedule 400"):
        actions(policy, 1, TimestepSchedule.of([900.0, 600.0, 400.0, 100.0]))
