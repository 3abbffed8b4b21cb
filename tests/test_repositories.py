"""Denoisers as their own repositories write them: captured, as in eager mode, and cached by the plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("einops")

import dicompile
from dicompile.errors import PolicyDoesNotFit
from tests import repositories
from tests.models import Sample, frames_of, plain_dit, redraw, timesteps
from tests.repositories import CAPTION, DiT, Guided, STDiT3, UViT

pytestmark = pytest.mark.nightly
STEPS = 8
T = timesteps(STEPS)
LATENT, TIME = "x", ("t", "timestep", "timesteps")
PROMPTS = {"short": (2, 3), "long": (4, 6)}
"""Words of both guidance halves."""


def dit(*, fused: bool = True, guidance: float | None = None) -> Sample:
    model = redraw(DiT(fused_attn=fused))
    return Sample(model if guidance is None else Guided(model, guidance).eval(), plain_dit(1).inputs)


def uvit(*, checkpoints: bool = False) -> Sample:
    inputs = {"x": torch.randn(2, 4, 8, 8), "timesteps": torch.full((2,), 500.0), "y": torch.tensor([1, 10])}
    return Sample(redraw(UViT(use_checkpoint=checkpoints)), inputs)


def stdit(*, checkpoints: bool = False, own_times: bool = False) -> Sample:
    model = redraw(STDiT3())
    for block in (*model.spatial_blocks, *model.temporal_blocks):
        block.grad_checkpointing = checkpoints
    inputs = {"x": torch.randn(2, 4, 3, 8, 8), "timestep": torch.full((2,), 500), **caption(*PROMPTS["short"])}
    inputs |= {"fps": torch.full((2,), 24.0), "height": torch.full((2,), 64.0), "width": torch.full((2,), 64.0)}
    if own_times:
        inputs["x_mask"] = torch.tensor([[True, False, True]] * 2)
    return Sample(model, inputs)


def caption(*lengths: int) -> dict[str, Tensor]:
    mask = (torch.arange(6)[None] < torch.tensor(lengths)[:, None]).long()
    return {"y": torch.randn(len(lengths), 1, 6, CAPTION), "mask": mask}


MODELS: dict[str, Callable[[], Sample]] = {
    "DiT": dit,
    "DiT, attention by matmul": lambda: dit(fused=False),
    "DiT, guided": lambda: dit(guidance=4.0),
    "U-ViT": uvit,
    "U-ViT, checkpoints": lambda: uvit(checkpoints=True),
    "STDiT3, frames of other times": lambda: stdit(own_times=True),
    "STDiT3, checkpoints": lambda: stdit(checkpoints=True),
}
CACHED = {name: make for name, make in MODELS.items() if not name.endswith("checkpoints")}


def prompts(sample: Sample) -> list[dict[str, Any]]:
    """Inputs with captions of different lengths, for a model that takes any."""
    lengths = PROMPTS.values() if "mask" in sample.inputs else ()
    return [sample.inputs | caption(*of_prompt) for of_prompt in lengths] or [sample.inputs]


def at(step: int, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs of one step."""
    name = next(name for name in TIME if name in inputs)
    latent = torch.randn(inputs[LATENT].shape, generator=torch.Generator().manual_seed(step))
    return {**inputs, LATENT: latent, name: torch.full_like(inputs[name], T[step])}


@torch.no_grad()
def sampled(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    return [model(**at(step, inputs)) for step in range(STEPS)]


@pytest.mark.parametrize("name", MODELS)
def test_compiled_by_itself_it_is_the_model(name: str) -> None:
    sample = MODELS[name]()
    model = dicompile.optimize(sample.model, "none", mode="eager")
    for inputs in prompts(sample):
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs), sample.model(**inputs), rtol=1e-5, atol=1e-6)
    assert len(frames_of(model)) == len(prompts(sample))


class BranchesKept:
    """FORA written by hand: attention and MLPs return what they returned at the last full step."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.is_full = module, True
        for name, part in module.named_modules():
            if name.rpartition(".")[2] in ("attn", "cross_attn", "mlp"):
                part.forward = self._kept(part.forward)  # type: ignore[method-assign]

    def _kept(self, compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
        kept: list[Tensor] = []

        def forward(*args: Any) -> Tensor:
            if self.is_full:
                kept[:] = [compute(*args)]
            return kept[0]

        return forward

    @torch.no_grad()
    def __call__(self, is_full: bool, inputs: dict[str, Any]) -> Tensor:
        self.is_full = is_full
        return self.module(**inputs)


@pytest.mark.parametrize("name", CACHED)
def test_fora_keeps_its_branches(name: str) -> None:
    sample, by_hand = CACHED[name](), BranchesKept(CACHED[name]().model)
    model = dicompile.optimize(sample.model, dicompile.FORA(interval=3), schedule=T, mode="eager")
    for inputs in prompts(sample):
        got = sampled(model, inputs)
        kinds = [step.kind for step in dicompile.plan_of(model).steps]
        assert Counter(kinds) == dicompile.report(model).kinds == {"full": 4, "reuse": 4}
        for step, kind in enumerate(kinds):
            wanted = by_hand(kind == "full", at(step, inputs))
            torch.testing.assert_close(got[step], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", ["toca", "duca"])
@pytest.mark.parametrize("name", CACHED)
def test_steps_that_choose_tokens_follow_the_plan(name: str, policy: str) -> None:
    sample = CACHED[name]()
    model = dicompile.optimize(sample.model, policy, schedule=T, mode="eager")
    for inputs in prompts(sample):
        assert all(torch.isfinite(result).all() for result in sampled(model, inputs))
        report = dicompile.report(model)
        assert report.kinds == Counter(step.kind for step in dicompile.plan_of(model).steps)
        assert report.kinds["partial"] and not report.cold_starts


@pytest.mark.parametrize("policy", ["fora", "toca", "duca"])
def test_the_original_dit_is_cached_as_a_plain_one_is(policy: str) -> None:
    plain, original = plain_dit(2), DiT(2)
    with torch.no_grad():
        for own, other in zip(original.parameters(), plain.model.parameters(), strict=True):
            own.copy_(other)
    models = [dicompile.optimize(m, policy, schedule=T, mode="eager") for m in (original.eval(), plain.model)]
    for got, wanted in zip(*(sampled(model, plain.inputs) for model in models), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.fixture
def mode_put_back() -> Iterator[None]:
    yield
    repositories.ATTENTION_MODE = "flash"


@pytest.mark.usefixtures("mode_put_back")
def test_a_global_mode_of_attention_is_followed() -> None:
    sample = uvit()
    model = dicompile.optimize(sample.model, "none", mode="eager")
    for count, mode in enumerate(("flash", "xformers", "math"), start=1):
        repositories.ATTENTION_MODE = mode
        with torch.no_grad():
            assert torch.equal(model(**sample.inputs), sample.model(**sample.inputs))
        assert len(frames_of(model)) == count


def test_captions_that_were_packed_tell_no_scores() -> None:
    sample = stdit()
    model = dicompile.optimize(sample.model, "toca-opensora", schedule=T, mode="eager")
    with pytest.raises(PolicyDoesNotFit, match=r"aten.split_with_sizes.default in spatial_blocks.0.cross_attn splits"):
        model(**sample.inputs)
    policy = dicompile.ToCaOpenSora(score="random")
    model = dicompile.optimize(sample.model, policy, schedule=T, mode="eager")
    sampled(model, sample.inputs)
    kinds = {site.kind.value: "" for site in dicompile.structure_of(model).sites}
    assert list(kinds) == ["self-attention", "cross-attention", "mlp"]
    assert dicompile.report(model).kinds == Counter(step.kind for step in dicompile.plan_of(model).steps)
