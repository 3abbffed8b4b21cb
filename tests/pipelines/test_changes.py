"""What users do to a pipeline between runs: switch it off and on, move, copy, save, interrupt, adapt, offload it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import (
    AutoPipelineForText2Image,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
)

import dicompile
from dicompile.errors import AlreadyOptimized, CallOutsideSchedule, InvalidSchedule, NotOptimized
from dicompile.wrapper import record_of
from tests.models import pixart
from tests.pipelines import pipes
from tests.pipelines.pipes import Sampler, kinds

# diffusers gives torch tensors to numpy.array, and torch 2.13 does not know numpy 2's keyword `copy` yet.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")

FORA = dicompile.FORA(interval=2)
STEPS = 4


def optimized(sampler: Sampler, policy: Any = FORA) -> Sampler:
    dicompile.optimize(sampler.pipe, policy, mode="eager")
    return sampler


# On and off.


def test_a_disabled_pipeline_is_the_untouched_one_and_keeps_what_was_compiled() -> None:
    sampler = pipes.flux_under_fora()
    untouched = pipes.flux()(STEPS)
    cached = sampler(STEPS)
    frames = list(sampler.pipe.transformer.frames)
    dicompile.disable(sampler.pipe)
    assert torch.equal(sampler(STEPS), untouched)
    dicompile.enable(sampler.pipe)
    assert torch.equal(sampler(STEPS), cached)
    assert sampler.pipe.transformer.frames == frames


def test_switching_in_the_middle_of_a_run_reads_nothing_of_before() -> None:
    sampler = pipes.flux_under_fora()

    def switch(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        dicompile.disable(pipe) if step == 0 else dicompile.enable(pipe)
        return tensors

    sampler(6, callback_on_step_end=switch)
    report = dicompile.report(sampler.pipe)
    assert (report.began, report.kinds.total(), report.cold_starts) == (2, 4, [])
    assert report.kinds == kinds(dicompile.plan_of(sampler.pipe))


def test_a_disabled_model_records_gradients_and_an_enabled_one_does_not() -> None:
    sampler = optimized(pipes.dit(), "none")
    model = sampler.pipe.transformer
    inputs = {
        "hidden_states": torch.randn(1, 4, 16, 16),
        "timestep": torch.tensor([9]),
        "class_labels": torch.tensor([1]),
    }
    dicompile.disable(model)
    assert model(**inputs).sample.requires_grad
    dicompile.enable(model)
    sampler.scheduler.set_timesteps(1)
    inputs["timestep"] = sampler.scheduler.timesteps
    assert not model(**inputs).sample.requires_grad


@pytest.mark.parametrize("switch", [dicompile.disable, dicompile.enable])
def test_an_untouched_pipeline_cannot_be_switched(switch: Callable[[Any], None]) -> None:
    with pytest.raises(NotOptimized, match="this FluxPipeline was not optimized"):
        switch(pipes.flux().pipe)


def test_another_policy_comes_after_restoring() -> None:
    sampler = optimized(pipes.flux())
    with pytest.raises(AlreadyOptimized, match="the pipeline's transformer is optimized already"):
        dicompile.optimize(sampler.pipe, "taylorseer")
    dicompile.optimize(dicompile.restore(sampler.pipe), "taylorseer", mode="eager")
    sampler(STEPS)
    assert dicompile.plan_of(sampler.pipe).policy.startswith("taylorseer")


# Moving, copying, saving.


def test_another_dtype_and_back() -> None:
    sampler = pipes.sd3()
    half = {name: value.bfloat16() for name, value in sampler.options.items()}
    sampler.pipe.to(torch.bfloat16)
    wanted = sampler(STEPS, **half)
    sampler.pipe.to(torch.float32)
    original = sampler.pipe.transformer
    optimized(sampler, "none").pipe.to(torch.bfloat16)
    assert original.dtype is sampler.pipe.transformer.dtype is torch.bfloat16
    assert torch.equal(sampler(STEPS, **half), wanted)
    sampler.pipe.to("cpu", torch.float32)
    assert dicompile.restore(sampler.pipe).transformer.dtype is torch.float32


def test_a_copy_is_optimized_alike_and_stands_alone() -> None:
    sampler = pipes.flux_under_fora()
    wanted = sampler(STEPS)
    twin = Sampler(copy.deepcopy(sampler.pipe), sampler.options)
    assert record_of(twin.pipe.transformer).module is not record_of(sampler.pipe.transformer).module
    assert record_of(twin.pipe.transformer).options.link.source is twin.pipe.scheduler
    assert torch.equal(twin(STEPS), wanted)
    with torch.no_grad():
        twin.pipe.transformer.proj_out.weight.zero_()
    assert not torch.equal(twin(STEPS), wanted)
    assert torch.equal(sampler(STEPS), wanted)


def test_a_pipeline_made_of_an_optimized_one_follows_its_own_scheduler() -> None:
    sampler = optimized(pipes.flux())
    other = pipes.flux_img2img()
    components = {**sampler.pipe.components, "vae": other.pipe.vae}
    pipe = FluxImg2ImgPipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    Sampler(pipe, other.options)(6)
    report = dicompile.report(pipe)
    assert (report.began, report.cold_starts) == (1, [])
    assert report.kinds == kinds(dicompile.plan_of(pipe))


@pytest.mark.parametrize(
    "made",
    [
        lambda pipe: FluxPipeline.from_pipe(pipe, transformer=pipe.transformer),
        AutoPipelineForText2Image.from_pipe,
    ],
)
def test_pipelines_made_by_diffusers_of_an_optimized_one_take_turns_with_it(made: Callable[[Any], Any]) -> None:
    sampler = optimized(pipes.flux_img2img())
    wanted = sampler(STEPS)
    other = Sampler(made(sampler.pipe), {**pipes.FLUX_PROMPTS[1], "height": 32, "width": 32})
    assert other.pipe.transformer is sampler.pipe.transformer
    other.pipe.set_progress_bar_config(disable=True)
    first = other(STEPS, seed=3)
    assert torch.equal(sampler(STEPS), wanted)
    assert torch.equal(other(STEPS, seed=3), first)
    assert dicompile.report(other.pipe).kinds == kinds(dicompile.plan_of(other.pipe))


def beside(sampler: Sampler) -> Sampler:
    """A second pipeline around the same components, but for a scheduler of its own."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    pipe = FluxPipeline(**{**sampler.pipe.components, "scheduler": scheduler})
    pipe.set_progress_bar_config(disable=True)
    return Sampler(pipe, sampler.options)


@pytest.mark.parametrize("has_run", [False, True])
def test_a_pipeline_with_another_scheduler_is_told_what_to_do(has_run: bool) -> None:
    sampler = optimized(pipes.flux())
    if has_run:
        sampler(STEPS)
    with pytest.raises(CallOutsideSchedule if has_run else InvalidSchedule) as caught:
        beside(sampler)(STEPS)
    assert "another pipeline around the same model" in caught.value.fix
    assert "dicompile.optimize(other, policy)" in caught.value.fix
    assert torch.isfinite(sampler(STEPS)).all()


def test_two_pipelines_with_schedulers_of_their_own_are_optimized_each_by_itself() -> None:
    sampler = optimized(pipes.flux())
    original = record_of(sampler.pipe.transformer).module
    wanted = sampler(STEPS)
    other = beside(sampler)
    dicompile.optimize(other.pipe, dicompile.FORA(interval=3), mode="eager")
    assert record_of(other.pipe.transformer).module is original
    with pytest.raises(AlreadyOptimized, match="the pipeline's transformer is optimized already"):
        dicompile.optimize(other.pipe, FORA)
    for one in (other, sampler, other):
        one(STEPS)
        plan = dicompile.plan_of(one.pipe)
        assert plan.schedule.timesteps == tuple(one.scheduler.timesteps.tolist())
        assert dicompile.report(one.pipe).kinds == kinds(plan)
        assert dicompile.report(one.pipe).cold_starts == []
    assert torch.equal(sampler(STEPS), wanted)
    assert dicompile.restore(other.pipe).transformer is original
    assert torch.equal(sampler(STEPS), wanted)


def test_an_optimized_pipeline_saves_its_denoiser(tmp_path: Path) -> None:
    sampler = optimized(pipes.dit())
    original = record_of(sampler.pipe.transformer).module
    sampler(2)
    sampler.pipe.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "model_index.json").read_text())
    assert saved["transformer"] == ["diffusers", "DiTTransformer2DModel"]
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path / "transformer")
    weights = original.state_dict()
    assert loaded.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.state_dict().items())
    sampler.pipe.transformer = loaded.eval()
    assert torch.equal(sampler(2), optimized_anew(sampler, original)(2))


def optimized_anew(sampler: Sampler, original: Any) -> Sampler:
    sampler.pipe.transformer = original
    return sampler


# Interruptions.


def interrupt(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    pipe._interrupt = step == 1
    return tensors


def fail(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    if step == 1:
        raise KeyboardInterrupt
    return tensors


def test_runs_that_were_interrupted_leave_no_trace() -> None:
    sampler = optimized(pipes.flux(guided=True), "taylorseer")
    fresh = sampler(6)
    left = sampler(6, seed=2, callback_on_step_end=interrupt)
    assert not torch.equal(left, fresh)
    assert dicompile.report(sampler.pipe).kinds.total() == 4
    assert torch.equal(sampler(6), fresh)
    with pytest.raises(KeyboardInterrupt):
        sampler(6, seed=2, callback_on_step_end=fail)
    assert torch.equal(sampler(6), fresh)


# Adapters.


def add_lora(pipe: Any, name: str, seed: int) -> None:
    from peft import LoraConfig

    torch.manual_seed(seed)
    config = LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_q", "to_v"])
    pipe.transformer.add_adapter(config, adapter_name=name)


LORA: dict[str, Callable[[Any], None]] = {
    "load": lambda pipe: add_lora(pipe, "first", 1),
    "load another": lambda pipe: add_lora(pipe, "second", 2),
    "weigh them": lambda pipe: pipe.set_adapters(["first", "second"], [0.3, 0.8]),
    "fuse": lambda pipe: pipe.fuse_lora(components=["transformer"], lora_scale=0.5),
    "unfuse": lambda pipe: pipe.unfuse_lora(components=["transformer"]),
    "take one away": lambda pipe: pipe.delete_adapters("second"),
    "unload": lambda pipe: pipe.unload_lora_weights(),
}


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_adapters_come_and_go_as_on_an_untouched_pipeline() -> None:
    pytest.importorskip("peft")
    untouched, sampler = pipes.wan(), optimized(pipes.wan(), "none")
    plain = last = untouched(2)
    for change, apply in LORA.items():
        apply(untouched.pipe)
        apply(sampler.pipe)
        wanted = untouched(2)
        assert torch.equal(sampler(2), wanted), change
        assert not torch.equal(wanted, last), change
        last = wanted
    assert torch.allclose(last, plain, rtol=0, atol=1e-4)  # fusing leaves rounding behind


def test_a_loaded_adapter_is_cached_like_any_model() -> None:
    pytest.importorskip("peft")
    sampler = optimized(pipes.wan())
    plain = sampler(6)
    add_lora(sampler.pipe, "first", 1)
    adapted = sampler(6)
    assert not torch.equal(adapted, plain)
    assert dicompile.report(sampler.pipe).kinds == kinds(dicompile.plan_of(sampler.pipe), sampler.calls)
    assert dicompile.report(sampler.pipe).cold_starts == []
    assert torch.equal(sampler(6), adapted)


# Offloading of whole models; of parts in test_offload.py.


class Recorder(ModelHook):
    """Stands for a hook that moves weights to the device and back: the weights are gone outside of a call."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.calls.append("to the device")
        module.proj_out.weight.data.mul_(2)
        return args, kwargs

    def post_forward(self, module: Any, output: Any) -> Any:
        self.calls.append("back")
        module.proj_out.weight.data.div_(2)
        return output


@pytest.mark.parametrize("first", ["optimize", "hook"])
def test_hooks_of_accelerate_run_around_every_call(first: str) -> None:
    sampler, hook = pipes.flux(), Recorder()
    original = sampler.pipe.transformer
    plain = sampler(STEPS)
    add_hook_to_module(original, hook)
    wanted = sampler(STEPS)
    assert not torch.equal(wanted, plain)
    if first == "optimize":
        remove_hook_from_module(original)
        optimized(sampler, "none")
        add_hook_to_module(sampler.pipe.transformer, hook)
    else:
        optimized(sampler, "none")
    hook.calls.clear()
    assert torch.equal(sampler(STEPS), wanted)
    assert hook.calls == ["to the device", "back"] * STEPS
    assert len(sampler.pipe.transformer.frames) == 1
    dicompile.disable(sampler.pipe)
    assert torch.equal(sampler(STEPS), wanted)
    assert dicompile.restore(sampler.pipe).transformer is original
    assert torch.equal(sampler(STEPS), wanted)
    remove_hook_from_module(original)
    assert torch.equal(sampler(STEPS), plain)
    assert not {"_hf_hook", "_old_forward"} & set(vars(original))


@pytest.mark.parametrize("first", ["optimize", "offload"])
def test_whole_models_may_be_offloaded(first: str) -> None:
    sampler = pipes.flux()
    wanted = sampler(STEPS)
    if first == "optimize":
        optimized(sampler, "none")
    _, hook = accelerate.cpu_offload_with_hook(sampler.pipe.transformer, "cpu")
    if first == "offload":
        optimized(sampler, "none")
    assert torch.equal(sampler(STEPS), wanted)
    hook.offload()
    assert torch.equal(sampler(STEPS), wanted)


# Weights in another dtype than they compute in.


@pytest.mark.parametrize("when", ["before optimize", "after optimize", "after a run"])
@pytest.mark.sampled
def test_weights_cast_layer_by_layer_compute_as_they_do_untouched(when: str) -> None:
    sample = pixart(1)
    untouched = sample.model.bfloat16()
    halves = {name: sample.inputs[name].bfloat16() for name in ("hidden_states", "encoder_hidden_states")}
    inputs = sample.inputs | halves
    model, casts = copy.deepcopy(untouched), {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.bfloat16}
    untouched.enable_layerwise_casting(**casts)
    if when == "before optimize":
        model.enable_layerwise_casting(**casts)
    model = dicompile.optimize(model, "none", mode="eager")
    if when == "after a run":
        model(**inputs)
    if when != "before optimize":
        model.enable_layerwise_casting(**casts)
    stored = {name: (weight.data_ptr(), weight.dtype) for name, weight in model.named_parameters()}
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], untouched(**inputs)[0])
    assert stored == {name: (weight.data_ptr(), weight.dtype) for name, weight in model.named_parameters()}
    assert torch.float8_e4m3fn in {dtype for _, dtype in stored.values()}
