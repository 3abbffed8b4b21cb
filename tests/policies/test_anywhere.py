"""Published names without options: the setting for the kind of model that they meet."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

import dicompile
from dicompile.analysis import SiteKind
from dicompile.errors import PolicyDoesNotFit
from dicompile.plan import Policy, TimestepSchedule, make_plan
from dicompile.policies import DuCa, get_policy
from tests import models
from tests.capture.captured import structure
from tests.lower.captured import captured
from tests.models import MODELS, PlainBlock, optimized, pixart, run, timesteps
from tests.stdit import stdit
from tests.zoo import images


@pytest.mark.parametrize(
    ("name", "build", "chosen"),
    [
        ("toca", "dit", "toca-3"),
        ("toca", "plain_dit", "toca-3"),
        ("toca", "pixart", "toca-pixart-3"),
        ("toca", "flux", "toca-flux-4"),
        ("toca", "sd3", "toca-flux-4"),
        ("duca", "dit", "duca-3"),
        ("duca", "pixart", "duca-pixart-3"),
        ("duca", "flux", "duca-flux-5"),
    ],
)
def test_a_name_means_the_setting_for_the_kind_of_model(name: str, build: str, chosen: str) -> None:
    plan = make_plan(structure(build), get_policy(name), TimestepSchedule(20))
    assert plan.policy == chosen
    assert plan.flop_speedup > 1.2
    assert not plan.first_that_fits
    assert plan.summary().startswith(f"{chosen} (setting for " if plan.meant_for else f"{chosen}: 20 steps")
    assert bool(plan.meant_for) == (build in ("pixart", "flux", "sd3"))


def test_films_have_settings_of_their_own() -> None:
    found = captured(stdit).structure
    assert make_plan(found, get_policy("toca"), TimestepSchedule(20)).policy == "toca-opensora-3"
    assert make_plan(found, get_policy("duca"), TimestepSchedule(20)).policy == "duca-opensora-3"


@pytest.mark.parametrize(
    ("name", "chosen"), [pytest.param("toca", "toca-flux-4", marks=pytest.mark.nightly), ("duca", "duca-flux-5")]
)
def test_attention_and_mlp_of_one_add_are_refreshed_as_single_stream_blocks_are(name: str, chosen: str) -> None:
    """AuraFlow adds both at once, in text and picture, which share an attention: there is no branch of another kind."""
    case = next(case for case in images.CASES if case.name == "AuraFlowTransformer2DModel")
    model, eager = dicompile.optimize(case.model(), name, schedule=list(case.timesteps[:6]), mode="eager"), case.model()
    for step in range(6):
        got, wanted = model(**case.at(step))[0], eager(**case.at(step))[0]
        assert (got - wanted).norm() < 0.1 * wanted.norm()
    plan = dicompile.plan_of(model)
    assert plan.policy == chosen
    assert {action.symbol for action in (site.action for site in plan.steps[3].sites[:6])} == {"t"}
    assert dicompile.report(model).cold_starts == []


def test_a_setting_that_does_not_fit_is_named_beside_the_one_that_does() -> None:
    """An odd batch cannot share guidance, and 6 x 6 tokens have no 4 x 4 cells: PixArt's setting is for neither."""
    sample = pixart()
    sample.inputs["hidden_states"] = torch.randn(1, 4, 12, 12)
    sample.inputs["encoder_hidden_states"] = torch.randn(1, 12, 24)
    sample.inputs["timestep"] = torch.full((1,), 500)
    plan = make_plan(models.structure(sample), get_policy("toca"), TimestepSchedule(20))
    assert plan.policy == "toca-3"
    assert plan.notes() == [
        "this is the first published setting that fits; refused: 'toca-pixart-3' gives a bonus per 4x4 cell of tokens"
    ]
    assert plan.notes()[0] in str(plan)
    named = get_policy("toca").elsewhere[-1].policy
    assert not make_plan(models.structure(sample), named, TimestepSchedule(20)).first_that_fits


def test_with_options_a_name_is_the_function_that_takes_them() -> None:
    assert get_policy("duca", interval=4) == DuCa(interval=4)
    assert not get_policy("duca", interval=4).elsewhere


@pytest.mark.parametrize("name", ["toca", "duca"])
def test_all_settings_are_in_the_file(name: str) -> None:
    policy = get_policy(name)
    assert Policy.from_yaml(policy.to_yaml()) == policy
    assert hash(policy) == hash(Policy.from_json(policy.to_json()))


@pytest.mark.parametrize("score", ["value-norm", "random"])
def test_without_attention_scores_no_attention_map_exists_anywhere(score: str) -> None:
    """V-caching: attention stays the fused call that it was, whatever the step does."""
    sample = MODELS["dit"]()
    fast = optimized(sample, DuCa(score=score, ratio=0.3), 12)
    run(fast, sample.inputs, timesteps(12))
    variants = fast.frames[-1].programs.variants.variants
    operators = {str(node.target) for variant in variants for node in variant.segment.graph.nodes}
    assert "aten.scaled_dot_product_attention.default" in operators
    assert not [name for name in operators if "softmax" in name or "matmul" in name or "bmm" in name]


def test_attention_scores_are_an_operator_and_no_map() -> None:
    sample = MODELS["dit"]()
    fast = optimized(sample, DuCa(score="attention", ratio=0.3), 12)
    run(fast, sample.inputs, timesteps(12))
    variants = fast.frames[-1].programs.variants.variants
    operators = {str(node.target) for variant in variants for node in variant.segment.graph.nodes}
    assert "dicompile.attention_and_received.default" in operators
    assert not [name for name in operators if "softmax" in name or "matmul" in name or "bmm" in name]


def test_a_branch_that_mixes_tokens_is_reused_whole_and_plan_and_log_name_operator_and_random_scores(
    caplog: pytest.LogCaptureFixture,
) -> None:
    case = next(case for case in images.CASES if case.name == "SanaTransformer2DModel")
    model = dicompile.optimize(case.model(), "duca", schedule=list(case.timesteps[:6]), mode="eager")
    with caplog.at_level(logging.WARNING, logger="dicompile"):
        for step in range(6):
            model(**case.at(step))
    why = "aten.conv2d.default in transformer_blocks.*.ff.conv_depth mixes neighbouring tokens"
    mixes = "refreshes single tokens, which this branch does not allow"
    notes = [
        "this is the first published setting that fits, its scores are random; "
        f"refused: 'duca-pixart-3' {mixes}; 'duca-3' {mixes}",
        f"reused whole instead of refreshed: mlp of blocks 0-2: {why}",
    ]
    plan = dicompile.plan_of(model)
    assert plan.notes() == notes
    assert all(note in str(plan) for note in notes)
    assert [record.getMessage() for record in caplog.records] == [f"policy {plan.policy}: {note}" for note in notes]
    convolved = [site.id for site in dicompile.structure_of(model).sites if site.kind is SiteKind.MLP]
    assert all(step.sites[i].action.tokens is None for step in plan.steps for i in convolved)
    assert any(step.sites[i].action.symbol == "." for step in plan.steps for i in convolved)


class ByMatmul(PlainBlock):
    """Attention written out, as older repositories have it."""

    def attended(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) * (c // self.heads) ** -0.5).softmax(-1)
        return (weights @ v).transpose(1, 2).reshape(b, n, c)


def test_attention_that_is_no_operator_tells_no_scores() -> None:
    sample = models.plain_dit(2)
    for number in range(2):
        sample.model.blocks[number] = ByMatmul(32, 2)
    found = models.structure(sample)
    with pytest.raises(PolicyDoesNotFit, match="ranks tokens by attention, but the attention is not over the same"):
        make_plan(found, dicompile.ToCa(), TimestepSchedule(20))
    assert make_plan(found, get_policy("toca"), TimestepSchedule(20)).policy == "toca-3-random"
