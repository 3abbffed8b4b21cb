"""Stock diffusers pipelines, tiny and random, with their denoiser optimized."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    HeunDiscreteScheduler,
    PixArtAlphaPipeline,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn

import dicompile
from dicompile.errors import AlreadyOptimized, NotOptimized, NotYetRun, UnsupportedModel
from dicompile.plan import Policy
from tests import models

STEPS = 6
# diffusers 0.42 gives torch tensors to numpy.array, and torch 2.13 does not know numpy 2's keyword `copy` yet.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")


class Case(NamedTuple):
    """A pipeline and one way to call it."""

    pipe: Any
    call: Callable[[int], Tensor]


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def dit() -> Case:
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=1, sample_size=16,
        patch_size=2, attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero", norm_elementwise_affine=False,
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=16)
    pipe = quiet(DiTPipeline(models.redraw(transformer), vae.eval(), DDIMScheduler()))

    def call(steps: int) -> Tensor:
        images = pipe([1, 2], num_inference_steps=steps, generator=noise(), output_type="pt").images
        assert images.shape == (2, 3, 16, 16)
        return images

    return Case(pipe, call)


def pixart() -> Case:
    transformer = models.pixart(1).model
    pipe = quiet(PixArtAlphaPipeline(None, None, None, transformer, DPMSolverMultistepScheduler()))
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[:, 9:] = 0
    text = {
        "prompt_embeds": torch.randn(1, 12, 24), "prompt_attention_mask": mask, "negative_prompt": None,
        "negative_prompt_embeds": torch.randn(1, 12, 24), "negative_prompt_attention_mask": torch.ones_like(mask),
    }  # fmt: skip

    def call(steps: int) -> Tensor:
        return pipe(
            **text, num_inference_steps=steps, generator=noise(), use_resolution_binning=False, output_type="latent"
        ).images

    return Case(pipe, call)


def sd3() -> Case:
    transformer = models.sd3(2).model
    nothing = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "text_encoder_3"))
    tokenizers = dict.fromkeys(("tokenizer", "tokenizer_2", "tokenizer_3"))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = quiet(StableDiffusion3Pipeline(transformer=transformer, scheduler=scheduler, **nothing, **tokenizers))
    text = {
        "prompt_embeds": torch.randn(1, 8, 24), "pooled_prompt_embeds": torch.randn(1, 40),
        "negative_prompt_embeds": torch.randn(1, 8, 24), "negative_pooled_prompt_embeds": torch.randn(1, 40),
    }  # fmt: skip

    def call(steps: int) -> Tensor:
        return pipe(**text, num_inference_steps=steps, generator=noise(), output_type="latent").images

    return Case(pipe, call)


def flux(**guidance: Any) -> Case:
    transformer = models.flux(1).model
    nothing = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = quiet(FluxPipeline(transformer=transformer, scheduler=scheduler, **nothing))
    text = {"prompt_embeds": torch.randn(1, 6, 24), "pooled_prompt_embeds": torch.randn(1, 40)}

    def call(steps: int) -> Tensor:
        return pipe(
            **text, **guidance, num_inference_steps=steps, generator=noise(), height=64, width=64, output_type="latent"
        ).images

    return Case(pipe, call)


PIPELINES: dict[str, Callable[[], Case]] = {"dit": dit, "pixart": pixart, "sd3": sd3, "flux": flux}
FORA = dicompile.FORA(interval=2)
CACHED = [
    ("dit", FORA),
    ("dit", dicompile.ToCa(interval=3, ratio=0.2)),
    ("pixart", FORA),
    ("pixart", dicompile.ToCaPixArt(interval=3)),
    ("sd3", FORA),
    ("flux", FORA),
]


def planned(pipe: Any) -> Counter[str]:
    return Counter(step.kind for step in dicompile.plan_of(pipe).steps)


@pytest.mark.parametrize("name", PIPELINES)
def test_without_caching_pictures_are_equal(name: str) -> None:
    pipe, call = PIPELINES[name]()
    wanted = call(3)
    assert torch.isfinite(wanted).all()
    assert dicompile.optimize(pipe, "none", mode="eager") is pipe
    assert torch.equal(call(3), wanted)
    assert dicompile.report(pipe).kinds == {"full": 3}


@pytest.mark.parametrize(("name", "policy"), CACHED, ids=[f"{name}-{policy.name}" for name, policy in CACHED])
def test_with_caching_a_run_follows_the_plan_and_restore_undoes_it(name: str, policy: Policy) -> None:
    pipe, call = PIPELINES[name]()
    transformer, config = pipe.transformer, dict(pipe.config)
    wanted = call(STEPS)

    assert dicompile.optimize(pipe, policy, mode="eager") is pipe
    got = call(STEPS)
    assert torch.isfinite(got).all()
    assert not torch.equal(got, wanted)
    assert planned(pipe).total() == STEPS
    assert set(planned(pipe)) - {"full"}
    assert dicompile.report(pipe).kinds == planned(pipe)
    assert dicompile.report(pipe).cold_starts == []
    assert torch.equal(call(STEPS), got)

    assert dicompile.restore(pipe) is pipe
    assert pipe.transformer is transformer
    assert dict(pipe.config) == config
    assert torch.equal(call(STEPS), wanted)


def test_compiled_without_caching_pictures_are_close() -> None:
    pipe, call = dit()
    wanted = call(2)
    dicompile.optimize(pipe)
    # Float32 sums in another order; pictures are in 0..1 and the sampler amplifies, measured 1e-6.
    assert torch.allclose(call(2), wanted, rtol=0, atol=1e-5)


def test_another_number_of_steps_is_planned_anew_without_compiling() -> None:
    pipe, call = dit()
    dicompile.optimize(pipe, FORA, mode="eager")
    for steps in (4, 6, 4):
        call(steps)
        assert len(dicompile.plan_of(pipe).steps) == steps
        assert dicompile.plan_of(pipe).schedule.timesteps == tuple(pipe.scheduler.timesteps.tolist())
        assert dicompile.report(pipe).kinds == planned(pipe)
        assert dicompile.report(pipe).kinds.total() == steps
    assert len(pipe.transformer.frames) == 1


def test_another_batch_follows_the_plan_too() -> None:
    pipe, _ = dit()
    dicompile.optimize(pipe, FORA, mode="eager")
    for labels in ([1, 2], [3], [1, 2]):
        pipe(labels, num_inference_steps=4, output_type="pt")
        assert dicompile.report(pipe).kinds == planned(pipe)
        assert dicompile.structure_of(pipe).sites[0].shape[0] == 2 * len(labels)


@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, HeunDiscreteScheduler])
def test_a_scheduler_that_replaces_the_first_one_is_followed(scheduler: Any) -> None:
    pipe, call = dit()
    dicompile.optimize(pipe, FORA, mode="eager")
    call(4)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    call(4)
    assert dicompile.plan_of(pipe).schedule.timesteps == tuple(pipe.scheduler.timesteps.tolist())
    assert dicompile.report(pipe).kinds == planned(pipe)
    assert dicompile.report(pipe).cold_starts == []


def test_a_scheduler_that_evaluates_timesteps_twice_gets_a_step_for_every_evaluation() -> None:
    pipe, call = dit()
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    dicompile.optimize(pipe, FORA, mode="eager")
    call(4)
    assert len(dicompile.plan_of(pipe).steps) == 7
    assert dicompile.report(pipe).kinds == planned(pipe)


def test_guidance_in_two_calls_keeps_two_caches() -> None:
    pipe, call = flux(
        true_cfg_scale=3.0,
        negative_prompt_embeds=torch.randn(1, 6, 24),
        negative_pooled_prompt_embeds=torch.randn(1, 40),
    )
    wanted = call(4)
    dicompile.optimize(pipe, "none", mode="eager")
    assert torch.equal(call(4), wanted)
    dicompile.optimize(dicompile.restore(pipe), FORA, mode="eager")
    call(4)
    assert dicompile.report(pipe).kinds == Counter({kind: 2 * count for kind, count in planned(pipe).items()})
    assert dicompile.report(pipe).cold_starts == []


def test_an_optimized_pipeline_saves_its_denoiser(tmp_path: Path) -> None:
    pipe, call = dit()
    original = pipe.transformer
    dicompile.optimize(pipe, FORA, mode="eager")
    call(2)
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["transformer"] == [
        "diffusers",
        "DiTTransformer2DModel",
    ]
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path / "transformer")
    assert loaded.config.num_layers == original.config.num_layers
    weights = original.state_dict()
    assert loaded.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.state_dict().items())


def test_optimizing_a_pipeline_twice_is_refused() -> None:
    pipe, _ = sd3()
    dicompile.optimize(pipe, FORA, mode="eager")
    with pytest.raises(AlreadyOptimized, match="the pipeline's transformer is optimized already"):
        dicompile.optimize(pipe, FORA, mode="eager")


def test_an_untouched_pipeline_has_nothing_to_restore_or_tell() -> None:
    pipe, _ = sd3()
    for ask in (dicompile.restore, dicompile.plan_of, dicompile.structure_of, dicompile.report):
        with pytest.raises(NotOptimized, match="this StableDiffusion3Pipeline was not optimized"):
            ask(pipe)


def test_an_optimized_pipeline_that_has_not_run_has_nothing_to_tell() -> None:
    pipe, _ = sd3()
    dicompile.optimize(pipe, FORA, mode="eager")
    for ask in (dicompile.plan_of, dicompile.structure_of, dicompile.report):
        with pytest.raises(NotYetRun, match="SD3Transformer2DModel has not run yet"):
            ask(pipe)


class NoDenoiser:
    """Looks like a pipeline; none of its modules takes a timestep."""

    def __init__(self) -> None:
        self.scheduler = DDIMScheduler()
        self.components = {"vae": nn.Linear(2, 2), "scheduler": self.scheduler}


@pytest.mark.parametrize("thing", [NoDenoiser(), object(), "model", None])
def test_what_has_no_denoiser_is_refused(thing: Any) -> None:
    with pytest.raises(UnsupportedModel):
        dicompile.optimize(thing, FORA)
