"""Published methods beside other people's code for them: equal decisions, and outputs within 1e-4.

The peers are the hooks of diffusers, and cache-dit; they run beside dicompile on the same tiny model, latents and
timesteps. Where they differ from what was published, or from themselves, the test says so.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import (
    apply_faster_cache,
    apply_first_block_cache,
    apply_mag_cache,
    apply_pyramid_attention_broadcast,
    apply_taylorseer_cache,
)
from diffusers.hooks.faster_cache import FasterCacheBlockHook
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor, nn

import dicompile
from dicompile.plan import Cadence, Forecast, Policy, Rule
from dicompile.policies.magcache import RATIOS
from tests import models
from tests.models import Sample, optimized, redraw, timesteps

STEPS = 12
TIMES = timesteps(STEPS)
SAME = 1e-4


def cogvideox(layers: int = 2) -> Sample:
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        num_layers=layers, sample_width=8, sample_height=8, sample_frames=5, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=6, text_embed_dim=24,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 6, 24),
        "timestep": torch.full((1,), 500),
        "return_dict": False,
    }
    redraw(model)
    for block in model.transformer_blocks:  # its attention hardly shows otherwise
        for weight in (block.norm1.linear.weight, block.attn1.to_v.weight, block.attn1.to_out[0].weight):
            weight.data *= 4
    return Sample(model, inputs)


@pytest.fixture(autouse=True)
def fixed() -> None:
    torch.manual_seed(0)


def alike(sample: Sample, seed: int = 1) -> list[Any]:
    """Latents of a run that moves a little at every step."""
    shape = next(sample.inputs[name] for name in ("hidden_states", "x") if name in sample.inputs).shape
    generator = torch.Generator().manual_seed(seed)
    start, end = (torch.randn(shape, generator=generator) for _ in range(2))
    return [start + (end - start) * step / STEPS for step in range(STEPS)]


def outputs(model: nn.Module, sample: Sample, around: Callable[[], Any] = contextlib.nullcontext) -> list[Tensor]:
    """What a model returns at every step of a run."""
    inputs, found = dict(sample.inputs), []
    latent = next(name for name in ("hidden_states", "x") if name in inputs)
    time = next(name for name in ("timestep", "t") if name in inputs)
    for step, value in zip(TIMES, alike(sample), strict=True):
        divided = step / 1000 if inputs[time].is_floating_point() else step
        inputs |= {latent: value, time: torch.full_like(inputs[time], divided)}
        with torch.no_grad(), around():
            found.append(model(**inputs)[0])
    return found


@contextlib.contextmanager
def counted(module: nn.Module) -> Iterator[list[int]]:
    """Steps at which a module inside a model ran; the reader appends the number of every step before it."""
    calls = [0]
    handle = module.register_forward_hook(lambda *_: calls.__setitem__(-1, calls[-1] + 1))
    try:
        yield calls
    finally:
        handle.remove()


def by_peer(
    sample: Sample, enable: Callable[[nn.Module], Any], last: Callable[[nn.Module], nn.Module]
) -> tuple[list[Tensor], list[bool]]:
    """What a copy of the model returns with a peer's cache, and at which steps one of its modules ran."""
    model = copy.deepcopy(sample.model)
    enable(model)
    with counted(last(model)) as calls:

        @contextlib.contextmanager
        def step() -> Iterator[None]:
            calls.append(0)
            with CacheMixin.cache_context(model, "cond"):  # half of the transformers of diffusers lack it
                yield

        found = outputs(model, sample, step)
    return found, [count > 0 for count in calls[1:]]


def by_dicompile(sample: Sample, policy: Any) -> tuple[list[Tensor], Any]:
    """What the optimized model returns, and its plan."""
    model = optimized(sample, policy, STEPS)
    return outputs(model, sample), dicompile.plan_of(model)


def distance(first: list[Tensor], second: list[Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(first, second, strict=True))


def is_full(plan: Any) -> list[bool]:
    return [step.kind == "full" for step in plan.steps]


@pytest.mark.parametrize("threshold", [0.06, 0.24])
def test_magcache_skips_the_steps_that_diffusers_skips(threshold: float) -> None:
    """Theirs leaves out the step that the reference code for FLUX computes in any case."""
    sample = models.flux()
    config = MagCacheConfig(threshold, 3, 0.2, STEPS, FLUX_MAG_RATIOS)
    theirs, computed = by_peer(
        sample, lambda model: apply_mag_cache(model, config), lambda model: model.single_transformer_blocks[-1].attn
    )
    ours, plan = by_dicompile(sample, dicompile.MagCache(RATIOS["flux"], threshold, 3, 0.2))
    assert is_full(plan) == computed
    assert 0 < sum(computed) < STEPS
    assert distance(ours, theirs) < SAME
    uncached = outputs(sample.model, sample)
    assert distance(ours, uncached) > 10 * SAME


def test_the_table_of_flux_is_the_published_one() -> None:
    assert RATIOS["flux"] == pytest.approx(FLUX_MAG_RATIOS.tolist())


@pytest.mark.parametrize("build", [models.flux, cogvideox])
def test_pab_reuses_the_attention_that_diffusers_reuses(build: Callable[[], Sample]) -> None:
    sample = build()
    step = iter(TIMES)
    now = [0]

    def enable(model: nn.Module) -> None:
        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=3,
            spatial_attention_timestep_skip_range=(200, 850),
            current_timestep_callback=lambda: now[0],
        )
        apply_pyramid_attention_broadcast(model, config)
        model.register_forward_pre_hook(lambda *_: now.__setitem__(0, next(step)))

    def last(model: nn.Module) -> nn.Module:
        return model.transformer_blocks[0].attn1.to_q if build is cogvideox else model.transformer_blocks[0].attn.to_q

    theirs, computed = by_peer(sample, enable, last)
    ours, plan = by_dicompile(sample, dicompile.PAB(3, timesteps=(200, 850), what="core"))
    assert is_full(plan) == computed
    assert 0 < sum(computed) < STEPS
    assert distance(ours, theirs) < SAME
    assert distance(ours, outputs(sample.model, sample)) > 10 * SAME


@pytest.mark.parametrize("build", [models.flux, cogvideox])
@pytest.mark.parametrize("growth", [0.0, 0.06])
def test_fastercache_goes_on_from_the_attention_that_diffusers_goes_on_from(
    build: Callable[[], Sample], growth: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Theirs takes its own guess for the attention two steps ago; the paper takes what was computed, and so do we."""
    sample, step, now = build(), iter(range(STEPS)), [0]
    theirs_anyhow = FasterCacheBlockHook.new_forward

    def keeps_what_is_computed(hook: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        computed = hook.state.cache
        found = theirs_anyhow(hook, module, *args, **kwargs)
        if TIMES[now[0]] < 600 and now[0] % 2:
            hook.state.cache = computed
        return found

    def enable(model: nn.Module) -> None:
        config = FasterCacheConfig(
            spatial_attention_timestep_skip_range=(-1, 600),
            is_guidance_distilled=True,
            attention_weight_callback=lambda _: 0.3 + growth * now[0],
            current_timestep_callback=lambda: TIMES[now[0]],
        )
        apply_faster_cache(model, config)
        model.register_forward_pre_hook(lambda *_: now.__setitem__(0, next(step)))

    def last(model: nn.Module) -> nn.Module:
        return model.transformer_blocks[0].attn1.to_q if build is cogvideox else model.transformer_blocks[0].attn.to_q

    as_it_is, _ = by_peer(sample, enable, last)
    step = iter(range(STEPS))
    monkeypatch.setattr(FasterCacheBlockHook, "new_forward", keeps_what_is_computed)
    theirs, computed = by_peer(sample, enable, last)
    ours, plan = by_dicompile(sample, dicompile.FasterCache(2, (-1, 600), 0.3, growth))
    assert is_full(plan) == computed
    assert 0 < sum(computed) < STEPS
    assert distance(ours, theirs) < SAME
    second = [number for number, ran in enumerate(computed) if not ran][1]
    assert distance(ours[:second], as_it_is[:second]) < SAME < distance(ours[second:], as_it_is[second:])
    assert distance(ours, outputs(sample.model, sample)) > 10 * SAME


def recalls(model: nn.Module) -> list[bool]:
    return [decision.recalls for decision in dicompile.report(model).decisions]


@pytest.mark.parametrize(
    ("build", "threshold"), [(models.flux, 0.5), (models.flux, 0.6), (models.pixart, 0.2), (models.pixart, 0.25)]
)
@pytest.mark.sampled
def test_first_block_cache_decides_as_diffusers_does(build: Callable[[], Sample], threshold: float) -> None:
    sample = build()
    flux = build is models.flux
    theirs, computed = by_peer(
        sample,
        lambda model: apply_first_block_cache(model, FirstBlockCacheConfig(threshold)),
        lambda model: model.single_transformer_blocks[-1].attn if flux else model.transformer_blocks[-1].attn1,
    )
    model = optimized(sample, dicompile.FirstBlockCache(threshold), STEPS)
    ours = outputs(model, sample)
    assert [False, *recalls(model)] == [not ran for ran in computed]
    assert distance(ours, theirs) < SAME


@pytest.mark.parametrize(("first", "last", "warmup", "longest"), [(1, 0, 2, None), (2, 1, 1, 2)])
def test_dbcache_decides_as_cache_dit_does(first: int, last: int, warmup: int, longest: int | None) -> None:
    cache_dit = pytest.importorskip("cache_dit")
    sample = models.pixart(4)

    def enable(model: nn.Module) -> None:
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=first,
            Bn_compute_blocks=last,
            residual_diff_threshold=0.25,
            max_warmup_steps=warmup,
            max_continuous_cached_steps=-1 if longest is None else longest,
            enable_separate_cfg=False,
            num_inference_steps=STEPS,
        )
        adapter = cache_dit.BlockAdapter(
            transformer=model,
            blocks=model.transformer_blocks,
            forward_pattern=cache_dit.ForwardPattern.Pattern_3,
            check_forward_pattern=False,
        )
        cache_dit.enable_cache(adapter, cache_config=config)

    theirs, computed = by_peer(sample, enable, lambda model: model.transformer_blocks[first].attn1)
    model = optimized(sample, dicompile.DBCache(first, last, 0.25, warmup, longest), STEPS)
    ours = outputs(model, sample)
    assert [*[False] * warmup, *recalls(model)] == [not ran for ran in computed]
    assert 0 < sum(recalls(model)) < STEPS - warmup
    assert distance(ours, theirs) < SAME


@pytest.mark.parametrize("order", [1, 2])
def test_taylorseer_forecasts_attention_as_diffusers_does(order: int) -> None:
    """Theirs has a first interval of its own: after the warmup it forecasts one step, whatever the interval."""
    sample, interval, warmup = models.flux(), 4, 3
    config = TaylorSeerCacheConfig(interval, warmup, None, order, torch.float32)
    theirs, computed = by_peer(
        sample, lambda model: apply_taylorseer_cache(model, config), lambda model: model.transformer_blocks[0].attn.to_q
    )
    full = (*range(warmup), *range(warmup + 1, STEPS, interval))
    assert [step in full for step in range(STEPS)] == computed
    by_attention = Policy(
        name="attention alone",
        cadence=Cadence(at=full),
        rules=(
            Rule(sites=("joint-attention",), do=Forecast(order=order)),
            Rule(sites=("parallel",), do=Forecast(order=order, what="attention")),
        ),
    )
    ours, plan = by_dicompile(sample, by_attention)
    assert is_full(plan) == computed
    assert distance(ours, theirs) < SAME
    published = dicompile.TaylorSeer(interval, order, warmup).cadence
    assert [moment.step for moment in published.moments(STEPS) if moment.others] != list(full)
