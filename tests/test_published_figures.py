"""Operations of the published settings, from structure alone: the models are built of fake tensors, without weights.

Published figures: papers and repositories of ToCa, DuCa and FORA, as collected in ../shared/specs, section 5. Those of
ToCa were produced with its code's quirk of deciding again in every block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel, PixArtTransformer2DModel
from torch._subclasses.fake_tensor import FakeTensorMode

import dicompile
from dicompile.analysis import ModelStructure, analyse
from dicompile.capture import capture_model
from dicompile.plan import Cadence, Policy, Reuse, Rule, TimestepSchedule, make_plan

QUIRK: dict[str, Any] = {"decide": "block", "depth_denominator": 27}


def dit() -> tuple[torch.nn.Module, dict[str, Any]]:
    """DiT-XL/2 at 256 x 256, with guidance."""
    model = DiTTransformer2DModel(
        num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28, sample_size=32,
        patch_size=2, attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero", norm_elementwise_affine=False,
    )  # fmt: skip
    labels = torch.tensor([1, 1000])
    return model, {"hidden_states": torch.randn(2, 4, 32, 32), "timestep": torch.ones(2), "class_labels": labels}


def pixart() -> tuple[torch.nn.Module, dict[str, Any]]:
    """PixArt-alpha at 256 x 256, with guidance and 20 caption tokens."""
    model = PixArtTransformer2DModel(
        num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28, sample_size=32,
        cross_attention_dim=1152, caption_channels=4096, norm_type="ada_norm_single", use_additional_conditions=False,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 4, 32, 32),
        "timestep": torch.ones(2),
        "encoder_hidden_states": torch.randn(2, 20, 4096),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def flux() -> tuple[torch.nn.Module, dict[str, Any]]:
    """FLUX.1-dev at 1024 x 1024, guidance distilled: 11.9 B parameters, of which none exists here."""
    return FluxTransformer2DModel(guidance_embeds=True), {
        "hidden_states": torch.randn(1, 4096, 64),
        "timestep": torch.ones(1),
        "encoder_hidden_states": torch.randn(1, 512, 4096),
        "pooled_projections": torch.randn(1, 768),
        "img_ids": torch.zeros(4096, 3),
        "txt_ids": torch.zeros(512, 3),
        "guidance": torch.ones(1),
    }


@pytest.fixture(scope="module")
def structure_of() -> Callable[[Callable[[], Any]], ModelStructure]:
    known: dict[Any, ModelStructure] = {}

    def structure_of(build: Callable[[], Any]) -> ModelStructure:
        if build not in known:
            torch._dynamo.reset()
            with FakeTensorMode():
                model, inputs = build()
                known[build] = analyse(capture_model(model.eval(), inputs))
        return known[build]

    return structure_of


def by_toca_code(interval: int) -> Policy:
    """FORA as ToCa's code for PixArt counts it: steps go up."""
    return Policy(name="fora-up", cadence=Cadence(interval=interval, counting="up"), rules=(Rule(do=Reuse()),))


TERA = [
    (dit, 50, dicompile.NoCache(), 23.74),
    (dit, 50, dicompile.ToCa(**QUIRK), 10.23),
    (dit, 50, dicompile.FORA(3), 8.57),
    (dit, 50, dicompile.DuCa(**QUIRK), 9.58),
]
TERA_NIGHTLY = [  # the capture of all 57 blocks takes a minute
    (flux, 50, dicompile.NoCache(), 3719.5),
    (flux, 50, dicompile.ToCaFlux(4, depth_denominator=27), 1263.2),
    (flux, 50, dicompile.ToCaFlux(5, depth_denominator=27), 1126.8),
    (flux, 50, dicompile.ToCaFlux(6, depth_denominator=27), 990.3),
    (flux, 50, dicompile.ToCaFlux(3, ratio=0.0), 1320.1),
]
RATIOS = [
    (dit, 250, dicompile.ToCa(interval=4, schedule="ddpm250", **QUIRK), 2.73),
    (pixart, 20, dicompile.ToCaPixArt(ratio=0.3, **QUIRK), 1.94),
    (pixart, 20, dicompile.ToCaPixArt(ratio=0.4, **QUIRK), 1.77),
    (pixart, 20, by_toca_code(3), 2.856),  # published 2.80: that code projects the caption's keys and values anew
]


@pytest.mark.parametrize(
    ("build", "steps", "policy", "published"),
    TERA + [pytest.param(*row, marks=pytest.mark.nightly) for row in TERA_NIGHTLY],
    ids=lambda v: getattr(v, "name", getattr(v, "__name__", v)),
)
@pytest.mark.sampled
def test_operations(structure_of: Any, build: Any, steps: int, policy: Policy, published: float) -> None:
    plan = make_plan(structure_of(build), policy, TimestepSchedule(steps))
    computed = (plan.flops - plan.score_flops) / 1e12  # the papers do not count what scores cost
    print(
        f"{build.__name__:<7} {steps} steps {policy.name:<12} published {published:8.2f} T  computed {computed:8.2f} T"
    )
    assert computed == pytest.approx(published, rel=0.003)


@pytest.mark.parametrize(
    ("build", "steps", "policy", "published"), RATIOS, ids=lambda v: getattr(v, "name", getattr(v, "__name__", v))
)
@pytest.mark.sampled
def test_ratios(structure_of: Any, build: Any, steps: int, policy: Policy, published: float) -> None:
    plan = make_plan(structure_of(build), policy, TimestepSchedule(steps))
    computed = plan.baseline_flops / (plan.flops - plan.score_flops)
    print(f"{build.__name__:<7} {steps} steps {policy.name:<14} published {published:.2f}x  computed {computed:.2f}x")
    assert computed == pytest.approx(published, abs=0.006)
