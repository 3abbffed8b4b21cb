"""Every mistake has its text: what happened, where, why, and the fix."""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

import dicompile
from dicompile import errors
from dicompile.learn.latents import Latents
from dicompile.parallel import CONTEXT_PARALLEL, TENSOR_PARALLEL, check_equal, check_ranks
from dicompile.passes import PASSES
from dicompile.policies import POLICIES, load_predictor
from dicompile.serve import Batcher
from tests import models
from tests.models import optimized, run

INTERNAL = {errors.IllegalGraph, errors.StaleRead}
"""Bugs of dicompile, not of the user; provoked where they are found: passes and runtime."""


class Writes(nn.Module):
    """Writes to the tensor it is given."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x.mul_(2) + t


class Perceptron(nn.Module):
    """Takes a timestep and has no residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layer(x) * t.sin()


class Pipeline:
    """What an object needs to look like a pipeline."""

    def __init__(self, **components: nn.Module) -> None:
        self.scheduler = DDIMScheduler()
        vars(self).update(components)

    @property
    def components(self) -> dict[str, Any]:
        return vars(self)


def plain_dit() -> nn.Module:
    return models.plain_dit(1).model


def call_plain_dit(policy: Any, timesteps: list[int], schedule: Any, **options: Any) -> None:
    sample = models.plain_dit(1)
    model = dicompile.optimize(sample.model, policy, schedule=schedule, mode="eager", **options)
    run(model, sample.inputs, timesteps)


def call_module(module: nn.Module, policy: Any) -> None:
    dicompile.optimize(module, policy, schedule=2, mode="eager")(torch.randn(2, 8), torch.ones(2, 1))


def differentiate() -> None:
    sample = models.plain_dit(1)
    model = dicompile.optimize(sample.model, "none", mode="eager")
    model(**sample.inputs | {"x": sample.inputs["x"].requires_grad_()}).sum().backward()


def transform() -> None:
    sample = models.plain_dit(1)
    model = dicompile.optimize(sample.model, "none", mode="eager")
    torch.func.grad(lambda x: model(**sample.inputs | {"x": x}).sum())(sample.inputs["x"])


def call_with_disabled_passes(value: str) -> None:
    with mock.patch.dict(os.environ, {"DICOMPILE_PASSES": value}):
        call_plain_dit("none", [999], 1)


def call_odd_batch() -> None:
    sample = models.pixart(1)
    inputs = {k: v[:1] if isinstance(v, Tensor) else v for k, v in sample.inputs.items()}
    run(dicompile.optimize(sample.model, dicompile.ToCaPixArt(), schedule=4, mode="eager"), inputs, [999])


def call_without_cross_attention() -> None:
    sample = models.dit(1)
    run(optimized(sample, dicompile.ToCa(score="entropy"), 4), sample.inputs, [999])


class PooledBlock(models.PlainBlock):
    """Keys and values are means over four tokens, as in models that compress them."""

    def attended(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        key, value = (part.reshape(b, n // 4, 4, c).mean(2) for part in (key, value))
        return nn.functional.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])[:, 0]


def call_attention_over_other_tokens() -> None:
    sample = models.plain_dit(1)
    sample.model.blocks[0] = PooledBlock(32, 2)
    run(optimized(sample, dicompile.ToCa(), 4), sample.inputs, [999])


def optimize_pipeline_twice() -> None:
    pipe = dicompile.optimize(Pipeline(transformer=plain_dit()), "none")
    dicompile.optimize(pipe, "none")


def refresh_of_attention() -> dicompile.Policy:
    rule = dicompile.Rule(sites=("self-attention",), do=dicompile.Refresh(ratio=0.5))
    return dicompile.Policy(name="mine", cadence=dicompile.Cadence(interval=2), rules=(rule,))


class NoTime(nn.Module):
    """Its noise level has a name and a place that tell nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        return x + self.linear(x) * level[:, None, None]


def call_for_request(
    around: Any = contextlib.nullcontext(),  # noqa: B008 - has no state
    end: Callable[[Any], object] = lambda _: None,
    timeout: float | None = None,
) -> None:
    """A call of a request's model, after something happened to the request, or within something."""
    sample = models.plain_dit(layers=2)
    batcher = Batcher(sample.model, backend="eager")
    with around, batcher.request("fora", schedule=models.timesteps(4), timeout=timeout) as request:
        end(request)
        models.call(request.model, sample.inputs, 999, 0)


CASES: list[tuple[type[errors.DicompileError], Callable[[], Any], str]] = [
    (
        errors.UnknownPolicy,
        lambda: dicompile.optimize(plain_dit(), "forra", schedule=4),
        "no policy is called 'forra'\n"
        "  why:   it is neither a published name nor an existing .yaml or .json file\n"
        f"  fix:   did you mean fora? use one of: {', '.join(POLICIES)}",
    ),
    (
        errors.InvalidPolicy,
        lambda: dicompile.get_policy("fora", intervall=2),
        "policy 'fora' has no option 'intervall'\n  where: options\n  fix:   its options are: interval",
    ),
    (
        errors.InvalidPolicy,
        lambda: dicompile.FORA(interval=0),
        "option 'interval' cannot be 0\n"
        "  where: Cadence\n"
        "  why:   Input should be greater than 0\n"
        "  fix:   see the policy's docstring",
    ),
    (
        errors.InvalidPolicy,
        lambda: dicompile.ToCa(schedule="ddim25"),
        "option 'schedule' cannot be 'ddim25'\n  where: ToCa\n  fix:   'ddim50' or 'ddpm250'",
    ),
    (
        errors.InvalidPolicy,
        lambda: dicompile.optimize(plain_dit(), {"name": "mine", "rulez": []}),
        "unknown option 'rulez'\n  where: Policy\n  fix:   remove it, or check its spelling",
    ),
    (
        errors.InvalidPolicy,
        lambda: dicompile.Policy.from_yaml("name: [", "mine.yaml"),
        "this is not valid YAML\n"
        "  where: mine.yaml\n"
        "  why:   while parsing a flow node did not find expected node content in "
        '"<unicode string>", line 2, column 1\n'
        "  fix:   compare policy.to_yaml()",
    ),
    (
        errors.PolicyDoesNotFit,
        lambda: call_plain_dit(refresh_of_attention(), [999], 4),
        "policy 'mine' refreshes single tokens, which this branch does not allow\n"
        "  where: site 0, blocks.0 (self-attention)\n"
        "  why:   aten.scaled_dot_product_attention.default in blocks.0 reads keys and values of all tokens\n"
        "  fix:   set where_mixed='reuse' to reuse it whole, or use a policy that does, "
        "such as dicompile.FORA(interval=3)",
    ),
    (
        errors.PolicyDoesNotFit,
        lambda: call_plain_dit(dicompile.ToCa(score="entropy"), [999], 4),
        "policy 'toca-3' ranks tokens by entropy, for which there is no cross-attention in the block\n"
        "  where: site 1, blocks.0.mlp.0 (mlp)\n"
        "  why:   the block has self-attention, mlp\n"
        "  fix:   choose another score, for example score='random'",
    ),
    (
        errors.PolicyDoesNotFit,
        lambda: call_plain_dit(dicompile.ToCa(grid_cell=3), [999], 4),
        "policy 'toca-3' gives a bonus per 3x3 cell of tokens\n"
        "  where: site 1, blocks.0.mlp.0 (mlp)\n"
        "  why:   the token grid is 8x8\n"
        "  fix:   set grid_cell=0 to switch the bonus off",
    ),
    (
        errors.PolicyDoesNotFit,
        call_without_cross_attention,
        "policy 'toca-3' ranks tokens by entropy, for which there is no cross-attention in the block\n"
        "  where: site 1, transformer_blocks.0.ff.net.0.proj (mlp)\n"
        "  why:   the block has self-attention, mlp\n"
        "  fix:   choose another score, for example score='random'",
    ),
    (
        errors.PolicyDoesNotFit,
        call_attention_over_other_tokens,
        "policy 'toca-3' ranks tokens by attention, but the attention is not over the same tokens\n"
        "  where: site 1, blocks.0.mlp.0 (mlp)\n"
        "  why:   aten.mean.dim in blocks.0 combines all tokens\n"
        "  fix:   choose another score, for example score='random'",
    ),
    (
        errors.PolicyDoesNotFit,
        call_odd_batch,
        "policy 'toca-pixart-3' shares tokens between guidance halves, but the batch is 1\n"
        "  where: site 1, transformer_blocks.0.attn2.to_q (cross-attention)\n"
        "  why:   the two halves of classifier-free guidance must be in one batch\n"
        "  fix:   set share_guidance=False",
    ),
    (
        errors.CacheTooLarge,
        lambda: call_plain_dit("fora", [999], 4, max_cache_bytes="40 KiB"),
        "policy 'fora-3' needs a cache of 64.00 KiB, but only 40.00 KiB are allowed\n"
        "  where: plan of 4 steps, for one guidance context\n"
        "  why:   after step 1 it holds 1 x value of mlp (32.00 KiB each), "
        "1 x value of self-attention (32.00 KiB each)\n"
        "  fix:   max_cache_bytes=65536, or cache_dtype='bfloat16' (needs 32.00 KiB), "
        "or over_budget='degrade' (1.30x fewer FLOPs instead of 1.87x)",
    ),
    (
        errors.NoSitesFound,
        lambda: call_module(Perceptron(), "fora"),
        "Perceptron has no cacheable branch\n"
        "  where: analysis, 0.000 GFLOP a call\n"
        "  why:   no residual add with a matrix product in its branch depends on the latent\n"
        "  fix:   use policy 'none' to compile it without caching",
    ),
    (
        errors.InvalidSchedule,
        lambda: dicompile.optimize(plain_dit(), "fora"),
        "policy 'fora-3' needs a schedule\n"
        "  where: dicompile.optimize\n"
        "  why:   a plan says for every step what is computed\n"
        "  fix:   optimize(model, policy, schedule=scheduler), or schedule=50 for a number of steps",
    ),
    (
        errors.InvalidSchedule,
        lambda: dicompile.optimize(plain_dit(), "fora", schedule=0),
        "a schedule of 0 steps with 0 timesteps\n"
        "  where: TimestepSchedule\n"
        "  fix:   give at least one step and one timestep per step",
    ),
    (
        errors.InvalidSchedule,
        lambda: dicompile.optimize(plain_dit(), "fora", schedule="ddim"),
        "cannot read a schedule from str\n"
        "  where: TimestepSchedule.of\n"
        "  fix:   give a number of steps, a list of timesteps, or a diffusers scheduler",
    ),
    (
        errors.InvalidSchedule,
        lambda: call_plain_dit("fora", [999], DDIMScheduler()),
        "DDIMScheduler has no inference timesteps yet\n"
        "  where: TimestepSchedule.of\n"
        "  why:   set_timesteps was not called\n"
        "  fix:   call scheduler.set_timesteps(steps) before the first call of the model",
    ),
    (
        errors.CallOutsideSchedule,
        lambda: call_plain_dit("fora", [999, 700], [999, 500]),
        "the model was called at timestep 700, which is not on the schedule\n"
        "  where: 2 steps from 999 to 500\n"
        "  why:   the policy's plan has no step for it\n"
        "  fix:   optimize with the scheduler that drives the sampling, after its set_timesteps",
    ),
    (
        errors.CallOutsideSchedule,
        lambda: call_plain_dit("fora", [999, 500, 100], 2),
        "this is step 3 of a schedule of 2 steps\n"
        "  where: timestep 100 after 500\n"
        "  why:   the policy's plan ends here\n"
        "  fix:   give the number of steps that the sampler makes, or its scheduler",
    ),
    (
        errors.CannotCapture,
        lambda: call_module(Writes(), "none"),
        "the model writes to its inputs: x\n"
        "  where: capture\n"
        "  why:   a step that is skipped could not repeat the write\n"
        "  fix:   copy the tensor inside the model before writing to it",
    ),
    (
        errors.UnsupportedCall,
        differentiate,
        "PlainDiT is optimized, and was asked for gradients\n"
        "  where: backward\n"
        "  why:   caching is for sampling: a step that reuses has no gradient, and compiled code records none\n"
        "  fix:   differentiate through the model as it is (dicompile.disable(model), then dicompile.enable(model)), "
        "or call it under torch.no_grad()",
    ),
    (
        errors.UnsupportedCall,
        transform,
        "PlainDiT is optimized, and was called within torch.func (grad)\n"
        "  where: a call of the model\n"
        "  why:   compiled code reads and stores what it remembers, which no transform sees\n"
        "  fix:   dicompile.disable(model) around it, or dicompile.restore(model)",
    ),
    (
        errors.NotOptimized,
        lambda: dicompile.restore(plain_dit()),
        "this PlainDiT was not optimized\n  fix:   dicompile.optimize(model, policy)",
    ),
    (
        errors.NotOptimized,
        lambda: dicompile.plan_of(Pipeline(transformer=plain_dit())),
        "this Pipeline was not optimized\n  fix:   dicompile.optimize(model, policy)",
    ),
    (
        errors.AlreadyOptimized,
        lambda: dicompile.optimize(dicompile.optimize(plain_dit())),
        "this PlainDiT is optimized already\n  fix:   model = dicompile.restore(model) first",
    ),
    (
        errors.AlreadyOptimized,
        optimize_pipeline_twice,
        "the pipeline's transformer is optimized already\n  fix:   dicompile.restore(pipe) first",
    ),
    (
        errors.InvalidRouter,
        lambda: dicompile.LearningToCache("gone.safetensors"),
        "there is no router gone.safetensors\n"
        "  where: load_router\n"
        "  fix:   give the file that `dicompile train-router` wrote, or a published checkpoint",
    ),
    (
        errors.InvalidRouter,
        lambda: dicompile.Router(torch.zeros(5, 2)),
        "these are not the logits of a router\n"
        "  where: router\n"
        "  why:   5 steps are odd: every cache step needs a full step of its own before it\n"
        "  fix:   train it again with an even --steps",
    ),
    (
        errors.InvalidPredictor,
        lambda: load_predictor("gone.safetensors"),
        "this is not a safetensors file\n"
        "  where: gone.safetensors\n"
        "  why:   No such file or directory: gone.safetensors\n"
        "  fix:   give the file that `dicompile train-predictor` wrote",
    ),
    (
        errors.InvalidTrainingData,
        lambda: Latents.load(Path("gone.safetensors")),
        "cannot train on gone.safetensors\n"
        "  where: gone.safetensors\n"
        "  why:   No such file or directory: gone.safetensors\n"
        "  fix:   write a safetensors file with latents [n, c, ...] and conditioning [n, ...] by forward argument",
    ),
    (
        errors.InvalidRecording,
        lambda: dicompile.Recording.load("gone.safetensors"),
        "gone.safetensors is not a recording\n"
        "  where: gone.safetensors\n"
        "  why:   No such file or directory: gone.safetensors\n"
        "  fix:   make one: with dicompile.calibrate(pipe) as recording: ...; recording.save(file)",
    ),
    (
        errors.InvalidTiming,
        lambda: dicompile.Timing.load("gone.json"),
        "gone.json holds no times of steps\n"
        "  where: gone.json\n"
        "  why:   gone.json cannot be read: No such file or directory: gone.json\n"
        "  fix:   make it: with dicompile.measure(pipe) as timing: ...; timing.save(file)",
    ),
    (
        errors.CannotBatch,
        lambda: call_for_request(around=torch.autocast("cpu", torch.bfloat16)),
        "PlainDiT cannot serve several requests: autocast is on\n"
        "  where: dicompile.serve\n"
        "  why:   every thread has a state of its own\n"
        "  fix:   cast the model: .to(dtype)",
    ),
    (
        errors.RequestEnded,
        lambda: call_for_request(end=lambda request: request.cancel()),
        "the request has ended (cancelled), and its model was called\n"
        "  where: dicompile.serve\n"
        "  fix:   open another one: batcher.request(...)",
    ),
    (
        errors.RequestTimedOut,
        lambda: call_for_request(end=lambda _: time.sleep(0.1), timeout=0.01),
        "the request took longer than 0.01 s\n"
        "  where: dicompile.serve\n"
        "  fix:   a longer timeout, fewer requests at once, or a policy that computes less",
    ),
    (
        errors.UnsupportedParallelism,
        lambda: check_ranks(
            CONTEXT_PARALLEL,
            dicompile.FirstBlockCache(threshold=0.1),
            in_background=False,
            is_observed=False,
            records_steps=False,
        ),
        "the ranks of a context-parallel model could take different steps\n"
        "  where: compiler\n"
        "  why:   the gate of policy 'first-block-0.1' decides by the tokens of its rank\n"
        "  fix:   use a policy that is planned ahead, such as dicompile.FORA(interval=3)",
    ),
    (
        errors.UnsupportedParallelism,
        lambda: check_ranks(
            TENSOR_PARALLEL, dicompile.FORA(interval=3), in_background=False, is_observed=False, records_steps=True
        ),
        "the ranks of a tensor-parallel model could take different steps\n"
        "  where: compiler\n"
        "  why:   a rank that records a CUDA graph of a step runs it several times, and one that has it, once\n"
        '  fix:   leave out compile_mode="reduce-overhead"',
    ),
    (
        errors.PlansDiffer,
        lambda: check_equal(("1d", "c7"), "rank 1: policy fora-3, 4 steps"),
        "2 different plans on 2 ranks that run one model together\n"
        "  where: rank 1: policy fora-3, 4 steps\n"
        "  why:   a rank that computes would wait for one that reuses\n"
        "  fix:   give all ranks the same policy, schedule, number of steps and memory budget",
    ),
    (
        errors.NotYetRun,
        lambda: dicompile.plan_of(dicompile.optimize(plain_dit())),
        "PlainDiT has not run yet\n"
        "  why:   structure and plan depend on the shapes of the first call\n"
        "  fix:   call the model once, or use `dicompile inspect`",
    ),
    (
        errors.UnsupportedModel,
        lambda: dicompile.optimize("DiT-XL/2", "fora"),
        "str is neither a torch.nn.Module nor a pipeline with a scheduler\n"
        "  where: dicompile\n"
        "  fix:   give the denoiser and its scheduler: optimize(model, policy, schedule=scheduler)",
    ),
    (
        errors.UnsupportedModel,
        lambda: dicompile.optimize(Pipeline(vae=nn.Linear(2, 2)), "fora"),
        "Pipeline has no denoiser\n"
        "  where: components vae\n"
        "  why:   none takes an argument that is called after a timestep, other than ControlNets and encoders\n"
        '  fix:   optimize(pipe, policy, components=["its name"]), or give the denoiser itself and schedule=scheduler',
    ),
    (
        errors.TimestepNotFound,
        lambda: dicompile.optimize(NoTime(), "fora", schedule=4, mode="eager")(torch.randn(2, 8, 4), torch.ones(2)),
        "which input of NoTime is the timestep cannot be told\n"
        "  where: inputs x, level\n"
        "  why:   none is called after time, and none alone goes into a sinusoidal embedding\n"
        '  fix:   optimize(..., timestep="its name"), or timestep="none" where every call is a step',
    ),
    (
        errors.InvalidSetting,
        lambda: dicompile.optimize(plain_dit(), timestep="noise"),
        "PlainDiT has no argument 'noise' that could be its timestep\n"
        "  where: timestep='noise'\n"
        "  fix:   its arguments are: x, t, y",
    ),
    (
        errors.InvalidSetting,
        lambda: dicompile.optimize(plain_dit(), mode="fast"),
        "backend 'fast' does not exist\n  where: dicompile\n  fix:   use one of: inductor, eager",
    ),
    (
        errors.InvalidSetting,
        lambda: dicompile.optimize(plain_dit(), max_cache_bytes="2 gallons"),
        "max_cache_bytes cannot be '2 gallons'\n"
        "  where: dicompile.optimize\n"
        "  fix:   give a number of bytes, or text such as '2GiB' or '500MB'",
    ),
    (
        errors.InvalidSetting,
        lambda: call_with_disabled_passes("drop-dead"),
        "DICOMPILE_PASSES has the item 'drop-dead'\n"
        "  where: environment\n"
        "  why:   passes run by default, so an item can only leave one out\n"
        "  fix:   DICOMPILE_PASSES=-drop-dead",
    ),
    (
        errors.InvalidSetting,
        lambda: call_with_disabled_passes("-drop-deed"),
        "DICOMPILE_PASSES leaves out 'drop-deed', but no pass has this name\n"
        "  where: environment\n"
        f"  fix:   the passes are: {', '.join(dict.fromkeys(item.name for item in PASSES))}",
    ),
]


CATALOGUE = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, errors.DicompileError) and kind is not errors.DicompileError
]
REMADE = {"pickle": lambda error: pickle.loads(pickle.dumps(error)), "copy": copy.copy, "deepcopy": copy.deepcopy}


@pytest.mark.parametrize(("kind", "mistake", "text"), CASES)
def test_a_mistake_is_told_with_its_fix(
    kind: type[errors.DicompileError], mistake: Callable[[], Any], text: str
) -> None:
    with pytest.raises(errors.DicompileError) as caught:
        mistake()
    assert type(caught.value) is kind
    assert str(caught.value) == text
    assert caught.value.fix


def test_every_error_of_the_catalogue_is_provoked_here() -> None:
    assert {kind for kind, _, _ in CASES} == set(CATALOGUE) - INTERNAL


def test_details_that_are_not_given_leave_no_line() -> None:
    assert str(errors.NotYetRun("it has not run")) == "it has not run"
    assert str(errors.NotYetRun("it has not run", fix="run it")) == "it has not run\n  fix:   run it"


def test_an_error_is_caught_as_what_python_calls_it() -> None:
    states = {
        errors.CallOutsideSchedule, errors.CannotCapture, errors.NotOptimized, errors.AlreadyOptimized,
        errors.NotYetRun, errors.IllegalGraph, errors.StaleRead, errors.PlansDiffer, errors.RequestEnded,
        errors.RequestTimedOut, errors.UnsupportedCall,
    }  # fmt: skip
    assert {kind for kind in CATALOGUE if issubclass(kind, RuntimeError)} == states
    assert {kind for kind in CATALOGUE if issubclass(kind, ValueError)} == set(CATALOGUE) - states


@pytest.mark.parametrize("remake", REMADE.values(), ids=REMADE)
@pytest.mark.parametrize("kind", [errors.DicompileError, *CATALOGUE])
def test_an_error_carries_its_text(
    kind: type[errors.DicompileError], remake: Callable[[errors.DicompileError], errors.DicompileError]
) -> None:
    error = kind("it broke", where="here", why="it had to", fix="mend it")
    again = remake(remake(error))
    assert type(again) is kind
    assert str(again) == str(error) == "it broke\n  where: here\n  why:   it had to\n  fix:   mend it"
    assert (again.what, again.where, again.why, again.fix) == ("it broke", "here", "it had to", "mend it")


def test_a_mistake_inside_a_policy_is_told_by_the_part_that_has_it() -> None:
    """pydantic wraps what is raised while it validates, if it is a ValueError; see `invalid_policy`."""
    data = {"name": "mine", "rules": [{"do": {"do": "refresh", "ratio": 0.5, "otherwise": {"do": "reuse", "wat": 1}}}]}
    for make in (dicompile.Policy.from_dict, lambda given: dicompile.Policy(**given)):
        with pytest.raises(errors.InvalidPolicy) as caught:
            make(data)
        assert (caught.value.what, caught.value.where) == ("unknown option 'wat'", "Reuse")
