"""Weights that hooks bring part by part: plans and bits as without, and what is skipped has nothing brought."""

from __future__ import annotations

import functools
import itertools
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from torch import Tensor

import dicompile
from dicompile.errors import CannotBatch, CannotCapture, UnsupportedModel
from dicompile.learn.graph import learnable
from dicompile.model import ModelCalls
from dicompile.serve import Batcher
from dicompile.wrapper import record_of
from tests import models
from tests.models import run, timesteps
from tests.pipelines import pipes
from tests.pipelines.pipes import Sampler, kinds
from tests.pipelines.test_order import add_lora, cast_layers, fuse_lora, unload_lora

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

FORA = dicompile.FORA(interval=2)
STEPS = 4
CPU = torch.device("cpu")
BLOCKS: dict[str, Any] = {"offload_type": "block_level", "num_blocks_per_group": 1}
LEAVES: dict[str, Any] = {"offload_type": "leaf_level"}


def optimized(sampler: Sampler, policy: Any = FORA, **options: Any) -> Sampler:
    dicompile.optimize(sampler.pipe, policy, backend="eager", **options)
    return sampler


def blocks(sampler: Sampler, folder: Path) -> None:
    sampler.pipe.enable_group_offload(CPU, **BLOCKS)


def leaves_on_disk(sampler: Sampler, folder: Path) -> None:
    sampler.pipe.transformer.enable_group_offload(CPU, CPU, offload_to_disk_path=f"{folder}", **LEAVES)


def sequential(sampler: Sampler, folder: Path) -> None:
    """As `enable_sequential_cpu_offload` does it, which wants an accelerator."""
    model = sampler.pipe.transformer
    accelerate.cpu_offload(model, CPU, offload_buffers=len(model._parameters) > 0)


def on_disk(sampler: Sampler, folder: Path) -> None:
    accelerate.disk_offload(sampler.pipe.transformer, f"{folder}", CPU, offload_buffers=True)


HOW: dict[str, Callable[[Sampler, Path], None]] = {
    "blocks": blocks, "leaves on disk": leaves_on_disk, "sequential": sequential, "on disk": on_disk,
}  # fmt: skip
PIPES: dict[str, Callable[[], Sampler]] = {"flux": pipes.flux, "wan": pipes.wan}


@functools.cache
def untouched(pipe: str) -> Tensor:
    return PIPES[pipe]()(STEPS)


@functools.cache
def cached(pipe: str) -> Tensor:
    return optimized(PIPES[pipe]())(STEPS)


def brought(sampler: Sampler) -> dict[str, int]:
    """Bytes that were brought for one call of each kind."""
    report = dicompile.report(sampler.pipe)
    return {kind: fetched // report.kinds[kind] for kind, fetched in report.fetched_bytes.items()}


def weight_bytes(sampler: Sampler) -> int:
    return sum(weight.nbytes for weight in sampler.pipe.transformer.parameters())


OFTEN = {("flux", how) for how in HOW} | {("wan", "sequential")}  # which has weights beside its parts


@pytest.mark.parametrize("when", ["before optimize", "after a run"])
@pytest.mark.parametrize(
    ("pipe", "how"),
    [pytest.param(*pair, marks=() if pair in OFTEN else pytest.mark.nightly) for pair in itertools.product(PIPES, HOW)],
)
@pytest.mark.sampled
def test_the_same_plan_and_bits_in_either_order(pipe: str, how: str, when: str, tmp_path: Path) -> None:
    sampler = PIPES[pipe]()
    original = sampler.pipe.transformer
    if when == "after a run":
        assert torch.equal(optimized(sampler)(STEPS), cached(pipe))
    HOW[how](sampler, tmp_path)
    if when == "before optimize":
        optimized(sampler)
    assert torch.equal(sampler(STEPS), cached(pipe))
    report = dicompile.report(sampler.pipe)
    assert report.kinds == kinds(dicompile.plan_of(sampler.pipe), sampler.calls)
    assert (report.cold_starts, len(sampler.pipe.transformer.frames)) == ([], 1)
    each = brought(sampler)
    assert 0 < each["reuse"] < 0.6 * each["full"]
    assert each["full"] < 1.1 * weight_bytes(sampler)  # what first and last calls read comes twice
    assert report.fetched in " ".join(str(dicompile.summary(sampler.pipe)).split())
    dicompile.disable(sampler.pipe)
    torch.testing.assert_close(sampler(STEPS), untouched(pipe))  # weights out of files lie at odd places
    dicompile.enable(sampler.pipe)
    assert torch.equal(sampler(STEPS), cached(pipe))
    assert dicompile.restore(sampler.pipe).transformer is original
    torch.testing.assert_close(sampler(STEPS), untouched(pipe))
    assert torch.equal(optimized(sampler)(STEPS), cached(pipe))  # once more, with the hooks that it had then
    assert brought(sampler) == each


@pytest.mark.parametrize("pipe", PIPES)
@pytest.mark.parametrize("first", ["optimize", "offload"])
@pytest.mark.sampled
def test_hooks_that_are_removed_are_gone(first: str, pipe: str, tmp_path: Path) -> None:
    sampler = PIPES[pipe]()
    for action in ("optimize", "offload") if first == "optimize" else ("offload", "optimize"):
        optimized(sampler) if action == "optimize" else sequential(sampler, tmp_path)
    sampler(STEPS)
    assert dicompile.report(sampler.pipe).fetched_bytes
    sampler.pipe.remove_all_hooks()
    assert torch.equal(sampler(STEPS), cached(pipe))
    assert not dicompile.report(sampler.pipe).fetched_bytes
    assert len(sampler.pipe.transformer.frames) == 1
    original = dicompile.restore(sampler.pipe).transformer
    assert not any({"_hf_hook", "_old_forward"} & set(vars(part)) for part in original.modules())
    assert not any(weight.is_meta for weight in original.parameters())
    assert torch.equal(sampler(STEPS), untouched(pipe))


def test_pipelines_find_their_device_by_the_hooks() -> None:
    for first in ("optimize", "offload"):
        sampler = pipes.flux()
        if first == "optimize":
            optimized(sampler)
        accelerate.cpu_offload(sampler.pipe.transformer, "meta")
        if first == "offload":
            optimized(sampler)
        sampler.pipe.vae = None
        assert sampler.pipe._execution_device == torch.device("meta")


def test_groups_that_are_asked_for_on_the_wrapper_are_those_of_the_model() -> None:
    """As diffusers does after it has loaded an adapter into a pipeline."""
    sampler = optimized(pipes.flux())
    original = record_of(sampler.pipe.transformer).module
    apply_group_offloading(sampler.pipe.transformer, CPU, CPU, **BLOCKS)
    assert torch.equal(sampler(STEPS), cached("flux"))
    _maybe_remove_and_reapply_group_offloading(sampler.pipe.transformer)
    assert torch.equal(sampler(STEPS), cached("flux"))
    assert 0 < brought(sampler)["reuse"] < brought(sampler)["full"]
    _maybe_remove_and_reapply_group_offloading(sampler.pipe.transformer)
    assert dicompile.restore(sampler.pipe).transformer is original
    assert "_diffusers_hook" in vars(original.transformer_blocks[0])
    assert torch.equal(sampler(STEPS), untouched("flux"))


def test_groups_on_the_wrapper_cannot_be_files(tmp_path: Path) -> None:
    sampler = optimized(pipes.flux())
    apply_group_offloading(sampler.pipe.transformer, CPU, CPU, offload_to_disk_path=f"{tmp_path}", **BLOCKS)
    with pytest.raises(UnsupportedModel, match="were written to a folder as one"):
        sampler(STEPS)


def test_a_model_that_is_offloaded_and_one_that_is_not_share_what_was_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    dicompile.reset()
    count = []
    original = dicompile.capture.shared.capture_functional
    monkeypatch.setattr(
        "dicompile.capture.shared.capture_functional", lambda *a, **k: count.append(1) or original(*a, **k)
    )
    one, other = optimized(pipes.flux()), pipes.flux()
    accelerate.cpu_offload(other.pipe.transformer, CPU)
    optimized(other)
    for sampler in (other, one, other):
        assert torch.equal(sampler(STEPS), cached("flux"))
    assert len(count) <= 2  # the first ones of `cached`, if it was not asked before
    assert not dicompile.report(one.pipe).fetched_bytes


def test_a_call_waits_while_another_thread_captures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Which sees fakes in the place of weights meanwhile."""
    sample, inside = models.plain_dit(1), threading.Event()
    apply_group_offloading(sample.model, CPU, CPU, offload_to_disk_path=f"{tmp_path}", **BLOCKS)
    model = models.optimized(sample, "none", 2)
    (wanted, _) = run(model, sample.inputs, timesteps(2))
    capture = dicompile.capture.shared.capture_functional

    def slow(*args: Any, **kwargs: Any) -> Any:
        inside.set()
        time.sleep(0.3)
        return capture(*args, **kwargs)

    dicompile.reset()
    monkeypatch.setattr("dicompile.capture.shared.capture_functional", slow)
    fewer = {name: value[:2] for name, value in sample.inputs.items()}
    with ThreadPoolExecutor() as pool:
        other = pool.submit(run, model, fewer, timesteps(2))
        assert inside.wait(60)
        found = pool.submit(models.call, model, sample.inputs, 999, 0)
        assert torch.equal(found.result(), wanted)
        assert all(len(result) == 2 for result in other.result())


# What changes weights.


def scaled(pipe: Any) -> None:
    with torch.no_grad():
        pipe.transformer.transformer_blocks[0].attn.to_q.weight.mul_(1.5)


def exchanged(pipe: Any) -> None:
    weight = pipe.transformer.transformer_blocks[0].attn.to_q.weight
    weight.data = weight.data * 1.5


def loaded(pipe: Any) -> None:
    state = {name: tensor * 1.01 for name, tensor in pipe.transformer.state_dict().items()}
    pipe.transformer.load_state_dict(state)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "an edit": scaled, "other data": exchanged, "other weights": loaded, "an adapter": add_lora,
    "a fused adapter": fuse_lora, "an adapter that is unloaded": unload_lora,
    "casts": lambda pipe: pipe.transformer.to(torch.float64).to(torch.float32),
    "other projections": lambda pipe: pipe.transformer.fuse_qkv_projections(),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.sampled
def test_weights_that_change_between_runs_are_those_that_are_brought(change: str, tmp_path: Path) -> None:
    plain, sampler = optimized(pipes.flux(), hoist="all"), optimized(pipes.flux(), hoist="all")
    plain(STEPS)
    CHANGES[change](plain.pipe)
    blocks(sampler, tmp_path)
    sampler(STEPS)
    CHANGES[change](sampler.pipe)
    wanted = plain(STEPS)
    assert torch.equal(sampler(STEPS), wanted)
    if change != "an adapter that is unloaded":
        assert not torch.equal(wanted, cached("flux"))
    assert dicompile.report(sampler.pipe).fetched_bytes


def test_adapters_come_and_go_between_two_rounds_of_sequential_offloading(tmp_path: Path) -> None:
    """diffusers removes the hooks, loads the adapter, and offloads again."""
    plain, sampler = optimized(pipes.flux()), optimized(pipes.flux())
    add_lora(plain.pipe)
    sequential(sampler, tmp_path)
    sampler(STEPS)
    remove_hook_from_module(sampler.pipe.transformer, recurse=True)
    add_lora(sampler.pipe)
    sequential(sampler, tmp_path)
    assert torch.equal(sampler(STEPS), plain(STEPS))
    assert dicompile.report(sampler.pipe).fetched_bytes


def test_a_model_may_be_spread_over_its_device_and_a_disk(tmp_path: Path) -> None:
    sample = models.plain_dit(2)
    plain = models.optimized(sample, "fora", STEPS)
    wanted = run(plain, sample.inputs, timesteps(STEPS))
    model = dicompile.restore(plain)
    places = {name: "cpu" for name, _ in model.named_children() if name != "blocks"}
    places |= {"blocks.0": "cpu", "blocks.1": "disk", "position": "cpu"}
    with warnings.catch_warnings(action="ignore"):  # about a parameter that is no module
        accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=f"{tmp_path}", force_hooks=True)
    spread_out = models.optimized(sample, "fora", STEPS)
    assert all(map(torch.equal, run(spread_out, sample.inputs, timesteps(STEPS)), wanted))
    block = sum(weight.nbytes for weight in model.blocks[1].parameters())
    assert dicompile.report(spread_out).fetched_bytes["full"] / dicompile.report(spread_out).kinds["full"] == block


def test_weights_in_the_map_of_accelerate_may_be_edited_within_a_run() -> None:
    plain, sampler = optimized(pipes.flux(), hoist="all"), optimized(pipes.flux(), hoist="all")
    accelerate.cpu_offload(sampler.pipe.transformer, CPU)
    embedder = sampler.pipe.transformer.time_text_embed.timestep_embedder.linear_1._hf_hook.weights_map
    weights = {id(plain): plain.pipe.transformer.time_text_embed.timestep_embedder.linear_1.weight.data}
    weights[id(sampler)] = embedder["weight"]

    def edited(which: Sampler) -> Tensor:
        def edit(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if step == 1:
                weights[id(which)].mul_(0.5)
            return tensors

        return which(STEPS, callback_on_step_end=edit)

    assert torch.equal(edited(sampler), edited(plain))


# Everything that runs programs besides the steps.


@pytest.mark.parametrize(
    "policy", [dicompile.FirstBlockCache(threshold=0.5), dicompile.SpeCa(), dicompile.ToCaFlux(), dicompile.DiCache()]
)
@pytest.mark.sampled
def test_gates_verifications_and_scores_find_their_weights(policy: Any, tmp_path: Path) -> None:
    wanted = optimized(pipes.flux(), policy)(8)
    sampler = pipes.flux()
    on_disk(sampler, tmp_path)
    assert torch.equal(optimized(sampler, policy)(8), wanted)
    assert dicompile.report(sampler.pipe).fetched_bytes


def test_an_offloaded_model_can_be_calibrated(tmp_path: Path) -> None:
    plain, sampler = pipes.flux(), pipes.flux()
    sequential(sampler, tmp_path)
    found = []
    for each in (plain, sampler):
        with dicompile.calibrate(each.pipe, backend="eager") as recording:
            each(STEPS)
        found.append(str(recording.frontier()))
    assert found[0] == found[1]


def test_compiled_code_gets_what_it_was_compiled_for(tmp_path: Path) -> None:
    sample = models.plain_dit(2)
    plain = dicompile.optimize(sample.model, "fora", schedule=timesteps(STEPS))
    wanted = run(plain, sample.inputs, timesteps(STEPS))
    model = dicompile.restore(plain)
    accelerate.disk_offload(model, f"{tmp_path}", CPU, offload_buffers=True)
    model = dicompile.optimize(model, "fora", schedule=timesteps(STEPS))
    assert all(map(torch.equal, run(model, sample.inputs, timesteps(STEPS)), wanted))
    report = dicompile.report(model)
    assert report.hoisted_bytes
    each = {kind: fetched / report.kinds[kind] for kind, fetched in report.fetched_bytes.items()}
    assert each["reuse"] < each["full"] / 4  # what no latent reaches was computed once


def test_slots_and_weights_may_both_be_elsewhere(tmp_path: Path) -> None:
    sampler = optimized(pipes.flux(), cache_device="cpu")
    blocks(sampler, tmp_path)
    assert torch.equal(sampler(STEPS), cached("flux"))


# What is refused.


def test_casts_under_the_hooks_are_followed_where_the_weights_are_there(tmp_path: Path) -> None:
    sampler = pipes.pixart()
    cast_layers(sampler.pipe)
    wanted = sampler(STEPS)
    HOW["blocks"](sampler, tmp_path)
    assert torch.equal(optimized(sampler, "none")(STEPS), wanted)


def test_casts_under_the_hooks_are_refused_where_the_weights_are_on_disk(tmp_path: Path) -> None:
    sampler = pipes.flux()
    cast_layers(sampler.pipe)
    HOW["on disk"](sampler, tmp_path)
    with pytest.raises(CannotCapture, match="has to be run to capture it, and its weights are brought part by"):
        optimized(sampler)(STEPS)


def casts_outside(sampler: Sampler) -> None:
    sampler.pipe.transformer.enable_group_offload(CPU, CPU, **LEAVES)
    cast_layers(sampler.pipe)


def hooked_part(sampler: Sampler) -> None:
    add_hook_to_module(sampler.pipe.transformer.proj_out, ModelHook())


def spread(sampler: Sampler) -> None:
    for i, block in enumerate(sampler.pipe.transformer.transformer_blocks):
        accelerate.cpu_offload(block, f"cuda:{i}")
    add_hook_to_module(sampler.pipe.transformer.proj_out, AlignDevicesHook("cpu", io_same_device=True))


def split(sampler: Sampler) -> None:
    accelerate.cpu_offload(sampler.pipe.transformer, CPU)
    sampler.pipe.transformer._parallel_config = SimpleNamespace(context_parallel_config=None)


def nowhere(sampler: Sampler) -> None:
    sampler.pipe.transformer.proj_out.to("meta")


def quantised(sampler: Sampler) -> None:
    library = pytest.importorskip("torchao.quantization")
    library.quantize_(sampler.pipe.transformer, library.Int8WeightOnlyConfig())
    sampler.pipe.transformer.enable_group_offload(CPU, CPU, **LEAVES)


REFUSED: dict[str, tuple[Callable[[Sampler], None], str]] = {
    "casts outside": (casts_outside, "has hooks around those that offload its groups"),
    "a hook on a part": (hooked_part, "a part of FluxTransformer2DModel has a ModelHook of accelerate"),
    "two devices": (spread, "parts of FluxTransformer2DModel run on several devices"),
    "no weights": (nowhere, "has a weight that is nowhere"),
    "quantised": (quantised, "are quantised, and are brought part by part"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("when", ["before optimize", "after a run"])
@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_had_is_refused_by_name_in_either_order(what: str, when: str) -> None:
    sampler, (change, why) = pipes.flux(), REFUSED[what]
    if when == "before optimize":
        change(sampler)
        with pytest.raises(UnsupportedModel, match=why):
            optimized(sampler)
        return
    optimized(sampler)(1)
    change(sampler)
    with pytest.raises(UnsupportedModel, match=why):
        sampler(1)


@pytest.mark.parametrize("when", ["before optimize", "after a run"])
def test_ranks_cannot_have_weights_brought(when: str) -> None:
    sampler = pipes.flux()
    for action in (split, optimized) if when == "before optimize" else (optimized, lambda each: each(1), split):
        action(sampler)
    with pytest.raises(UnsupportedModel, match=r"are brought part by part\n  where: model\.enable_parallelism"):
        sampler(1)


@pytest.mark.parametrize("when", ["before optimize", "after optimize"])
def test_recorded_steps_cannot_have_weights_brought(when: str, tmp_path: Path) -> None:
    sampler = pipes.flux()
    if when == "before optimize":
        sequential(sampler, tmp_path)
    dicompile.optimize(sampler.pipe, FORA, compile_mode="reduce-overhead")
    if when == "after optimize":
        sequential(sampler, tmp_path)
    with pytest.raises(UnsupportedModel, match="are brought part by part\n  where: compile_mode"):
        sampler(1)


def test_training_and_serving_want_the_weights_there() -> None:
    sample = models.plain_dit(1)
    for block in sample.model.blocks:
        accelerate.cpu_offload(block, CPU)
    with pytest.raises(UnsupportedModel, match="where: training"):
        learnable(sample.model, sample.inputs)
    batcher = Batcher(sample.model, backend="eager")
    with batcher.request("none", schedule=timesteps(2)) as request, pytest.raises(CannotBatch, match="brought part by"):
        models.call(request.model, sample.inputs, 999, 0)


def test_arguments_go_where_the_weights_are_wanted() -> None:
    """Hooks would move them, too; to a device without values, which stands for any."""
    sample = models.plain_dit(1)
    accelerate.cpu_offload(sample.model, "meta")
    calls = record_of(dicompile.optimize(sample.model, "none", mode="eager")).calls
    assert isinstance(calls, ModelCalls)
    assert {tensor.device for tensor in calls.arguments((), sample.inputs).given} == {CPU}
    calls._homes()
    assert {tensor.device for tensor in calls.arguments((), sample.inputs).given} == {torch.device("meta")}
    remove_hook_from_module(sample.model, recurse=True)
    calls._homes()
    assert {tensor.device for tensor in calls.arguments((), sample.inputs).given} == {CPU}
