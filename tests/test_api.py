"""`optimize`, `restore` and the questions an optimized model answers."""

from __future__ import annotations

import ast
import copy
import logging
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import dicompile
from dicompile.errors import AlreadyOptimized, InvalidSchedule, InvalidSetting, NotOptimized, NotYetRun
from dicompile.lower import compile_segment
from dicompile.passes import Segment
from dicompile.plan import Policy
from dicompile.wrapper import _calls_self, record_of
from tests import models
from tests.models import MODELS, PlainDiT, Sample, optimized, run, timesteps

STEPS = 6
INDUCTOR_TOLERANCE = 1e-5
"""Float32 sums in another order, relative to the largest output; ten times what was measured (1e-6)."""

POLICIES: dict[str, list[Policy]] = {
    "dit": [dicompile.FORA(interval=2), dicompile.ToCa(interval=3, ratio=0.2)],
    "pixart": [dicompile.FORA(interval=2), dicompile.ToCaPixArt(interval=3)],
    "sd3": [dicompile.FORA(interval=2)],
    "flux": [dicompile.FORA(interval=2)],
    "plain_dit": [dicompile.FORA(interval=2), dicompile.ToCa(interval=3, ratio=0.2)],
}
CASES = [pytest.param((name, policy), id=f"{name}-{policy.name}") for name, own in POLICIES.items() for policy in own]
only_plain_dit = pytest.mark.parametrize(
    "cached", [case for case in CASES if "plain_dit" in str(case.id)], indirect=True
)


class Cached(NamedTuple):
    """A model with its rewritten graphs run operator by operator, and its first run."""

    sample: Sample
    policy: Policy
    uncached: list[Tensor]
    model: Any
    outputs: list[Tensor]


@pytest.fixture(scope="module", params=CASES)
def cached(request: pytest.FixtureRequest) -> Cached:
    torch.manual_seed(0)
    name, policy = request.param
    sample = MODELS[name](2)
    uncached = run(sample.model, sample.inputs, timesteps(STEPS), seed=3)
    model = optimized(sample, policy, STEPS)
    return Cached(sample, policy, uncached, model, run(model, sample.inputs, timesteps(STEPS), seed=3))


def error(got: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest difference over all steps, relative to the largest output."""
    scale = max(float(w.abs().max()) for w in wanted)
    return max(float((g - w).abs().max()) for g, w in zip(got, wanted, strict=True)) / scale


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    """True if two runs are equal bit by bit."""
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def owned(module: nn.Module) -> dict[str, Any]:
    """Everything reachable as an attribute of a module, its children and their classes, by identity."""
    found: dict[str, Any] = {}
    for path, child in module.named_modules():
        for owner in (child, type(child)):
            for name, value in vars(owner).items():
                key = f"{path}.{'' if owner is child else 'class.'}{name}"
                found[key] = dict(value) if isinstance(value, dict) else id(value)
    return found


# Numerics.


@pytest.mark.nightly  # by day the plain DiT below stands for all
@pytest.mark.parametrize("name", [name for name in MODELS if name != "plain_dit"])
def test_compiled_without_caching_equals_the_model(name: str) -> None:
    sample = MODELS[name](1)
    wanted = run(sample.model, sample.inputs, timesteps(2))
    model = optimized(sample, "none", 2, mode="inductor")
    assert error(run(model, sample.inputs, timesteps(2)), wanted) < INDUCTOR_TOLERANCE
    assert len(model.frames) == 1


def test_compiled_a_plan_that_computes_everything_equals_no_caching_bit_by_bit_and_both_the_model() -> None:
    sample, steps = models.plain_dit(1), 3
    without_caching = optimized(sample, "none", steps, mode="inductor")
    plain = run(without_caching, sample.inputs, timesteps(steps))
    assert error(plain, run(sample.model, sample.inputs, timesteps(steps))) < INDUCTOR_TOLERANCE
    assert len(without_caching.frames) == 1
    always = optimized(sample, dicompile.FORA(interval=1), steps, mode="inductor")
    assert same(run(always, sample.inputs, timesteps(steps)), plain)
    assert dicompile.report(always).kinds == {"full": steps}


@pytest.mark.sampled
def test_caching_changes_the_steps_that_reuse_and_no_others(cached: Cached) -> None:
    kinds = [step.kind for step in dicompile.plan_of(cached.model).steps]
    assert "full" in kinds
    assert set(kinds) - {"full"}
    for step, kind in enumerate(kinds):
        same_bits = torch.equal(cached.outputs[step], cached.uncached[step])
        if any(site.score for site in dicompile.plan_of(cached.model).steps[step].sites):
            assert error([cached.outputs[step]], [cached.uncached[step]]) < INDUCTOR_TOLERANCE
        else:
            assert same_bits == (kind == "full"), f"step {step} is {kind}"


@pytest.mark.sampled
def test_a_run_follows_its_plan(cached: Cached) -> None:
    kinds = [step.kind for step in dicompile.plan_of(cached.model).steps]
    assert dicompile.report(cached.model).kinds == {kind: kinds.count(kind) for kind in set(kinds)}
    assert dicompile.report(cached.model).cold_starts == []


@pytest.mark.sampled
def test_two_runs_with_one_seed_are_equal_bit_by_bit(cached: Cached) -> None:
    sample, model = cached.sample, cached.model
    assert not same(run(model, sample.inputs, timesteps(STEPS), seed=4), cached.outputs)
    assert same(run(model, sample.inputs, timesteps(STEPS), seed=3), cached.outputs)
    assert len(model.frames) == 1


@pytest.fixture(scope="module")
def compiled(cached: Cached) -> Cached:
    """The same model compiled by Inductor, and its run with the same seed."""
    model = optimized(cached.sample, cached.policy, STEPS, mode="inductor")
    return cached._replace(model=model, outputs=run(model, cached.sample.inputs, timesteps(STEPS), seed=3))


@only_plain_dit
@pytest.mark.sampled
def test_compiled_runs_are_close_to_the_rewritten_graphs(cached: Cached, compiled: Cached) -> None:
    assert error(compiled.outputs, cached.outputs) < INDUCTOR_TOLERANCE


@only_plain_dit
@pytest.mark.sampled
def test_two_compiled_runs_with_one_seed_are_equal_bit_by_bit(compiled: Cached) -> None:
    inputs = compiled.sample.inputs
    assert not same(run(compiled.model, inputs, timesteps(STEPS), seed=4), compiled.outputs)
    assert same(run(compiled.model, inputs, timesteps(STEPS), seed=3), compiled.outputs)


@only_plain_dit
@pytest.mark.sampled
def test_the_plan_does_not_depend_on_the_mode(cached: Cached, compiled: Cached) -> None:
    assert str(dicompile.plan_of(compiled.model)) == str(dicompile.plan_of(cached.model))


@only_plain_dit
@pytest.mark.sampled
def test_a_weight_edited_in_place_is_used_by_the_next_compiled_run(compiled: Cached) -> None:
    sample = compiled.sample
    weight = sample.model.blocks[1].mlp[2].weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(2)
        wanted = run(sample.model, sample.inputs, timesteps(STEPS)[:1], seed=3)
        got = run(compiled.model, sample.inputs, timesteps(STEPS)[:1], seed=3)
        weight.copy_(before)
    assert error(got, wanted) < INDUCTOR_TOLERANCE
    assert error(got, compiled.outputs[:1]) > 1000 * INDUCTOR_TOLERANCE


# Compilation.


def test_another_timestep_does_not_recompile() -> None:
    sample = models.plain_dit(2)
    model = optimized(sample, dicompile.FORA(interval=2), STEPS)
    run(model, sample.inputs, timesteps(STEPS))
    torch._dynamo.utils.counters.clear()
    run(model, sample.inputs, timesteps(STEPS), seed=1)
    assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert len(model.frames) == 1


def test_the_number_of_compilations_does_not_grow_with_depth_or_steps() -> None:
    counts = []
    for layers, steps in ((3, 6), (6, 12)):
        sample = models.plain_dit(layers)
        model = optimized(sample, dicompile.FORA(interval=2), steps)
        run(model, sample.inputs, timesteps(steps))
        counts.append(len(model.frames[0].programs.variants.variants))
    assert counts[0] == counts[1]


@torch._dynamo.config.patch(recompile_limit=2)
def test_every_model_of_a_class_is_optimized_however_many_there_are() -> None:
    """Dynamo keeps compiled code by class and runs a model uncompiled when that fills up."""
    for _ in range(3):
        sample = models.plain_dit(1)
        model = optimized(sample, dicompile.FORA(interval=2), 2)
        run(model, sample.inputs, timesteps(2))
        assert len(model.frames) == 1


@torch._dynamo.config.patch(recompile_limit=2)
def test_every_batch_size_is_optimized_however_many_there_are() -> None:
    sample = models.plain_dit(1)
    model = optimized(sample, dicompile.FORA(interval=2), 2)
    for batch in (1, 2, 3, 4):
        run(model, {name: value[:batch] for name, value in sample.inputs.items()}, timesteps(2))
    assert len(model.frames) == 4


def test_another_dtype_recompiles_and_still_works() -> None:
    sample = models.dit(2)
    model = optimized(sample, dicompile.FORA(interval=2), STEPS)
    run(model, sample.inputs, timesteps(STEPS))
    model.to(torch.bfloat16)
    assert sample.model.dtype is model.dtype is torch.bfloat16
    inputs = sample.inputs | {
        "hidden_states": sample.inputs["hidden_states"].bfloat16(),
        "timestep": torch.full((4,), 999),
    }
    with torch.no_grad():
        wanted = sample.model(**inputs)[0]
    got = model(**inputs)[0]
    assert got.dtype is torch.bfloat16
    assert torch.equal(got, wanted)
    assert len(model.frames) == 2
    assert dicompile.structure_of(model).sites[0].itemsize == 2


def test_half_of_the_wrapper_is_half_of_the_module() -> None:
    sample = models.plain_dit(1)
    model = optimized(sample, "none", 2)
    model.half()
    assert {p.dtype for p in sample.model.parameters()} == {torch.float16}


def test_loaded_weights_are_used_by_the_next_run() -> None:
    sample = models.plain_dit(2)
    model = optimized(sample, dicompile.FORA(interval=2), 2)
    run(model, sample.inputs, timesteps(2))
    other = models.redraw(copy.deepcopy(sample.model), seed=5)
    sample.model.load_state_dict(other.state_dict())
    got = run(model, sample.inputs, timesteps(2))
    assert torch.equal(got[0], run(other, sample.inputs, timesteps(2))[0])


def test_no_gradients_are_recorded() -> None:
    sample = models.plain_dit(1)
    assert sample.model(**sample.inputs).requires_grad
    assert not dicompile.optimize(sample.model, mode="eager")(**sample.inputs).requires_grad


def test_after_preparing_no_call_compiles_whenever_its_context_joins() -> None:
    """A run with a table of its own for every step, so that joining late needs other code."""
    sample = models.plain_dit(2)
    rows = tuple(tuple((site + step) % 3 == 0 for site in range(4)) for step in range(STEPS))
    table = dicompile.Table(compute=((True,) * 4, *rows[1:]), otherwise=dicompile.Forecast(order=1, what="update"))
    policy = Policy(name="table", rules=(dicompile.Rule(do=table),))
    model = optimized(sample, policy, STEPS)
    model(**sample.inputs | {"t": torch.full((4,), timesteps(STEPS)[0])})
    variants = model.frames[0].programs.variants
    dicompile.prepare(model, late=False)
    of_the_run = len(variants.variants)
    dicompile.prepare(model)
    prepared = len(variants.variants)
    assert prepared > of_the_run
    for late in range(1, STEPS):
        dicompile.free(model)
        run(model, sample.inputs, timesteps(STEPS)[late:])
        assert dicompile.report(model).began == late
    run(model, sample.inputs, timesteps(STEPS))
    assert len(variants.variants) == prepared


def test_only_what_has_run_can_be_prepared() -> None:
    with pytest.raises(NotYetRun, match="PlainDiT has not run yet"):
        dicompile.prepare(optimized(models.plain_dit(1), "none", 1))


# The wrapper and the module in it.


def test_the_module_stays_reachable_through_the_wrapper() -> None:
    sample = models.dit(1)
    model = optimized(sample, "none", 1)
    assert model.config is sample.model.config
    assert model.dtype is sample.model.dtype is torch.float32
    assert model.transformer_blocks is sample.model.transformer_blocks
    assert record_of(model).module is sample.model
    assert all(a is b for a, b in zip(model.parameters(), sample.model.parameters(), strict=True))


def same_tensors(first: Any, second: Any) -> bool:
    """True if two mappings have the same names in the same order, and the very tensors."""
    first, second = dict(first), dict(second)
    return [*first] == [*second] and all(first[name].data_ptr() == second[name].data_ptr() for name in first)


def test_weights_have_the_names_of_the_module() -> None:
    module = models.pixart(1).model
    model = dicompile.optimize(module, mode="eager")
    around = nn.ModuleDict({"denoiser": model})
    assert same_tensors(model.state_dict(), module.state_dict())
    assert model.state_dict()._metadata == module.state_dict()._metadata
    assert same_tensors(around.state_dict(), nn.ModuleDict({"denoiser": module}).state_dict())
    assert same_tensors(model.named_parameters(), module.named_parameters())
    assert same_tensors(model.named_buffers(), module.named_buffers())
    assert dict(model.named_buffers())
    assert not dict(model.named_parameters(recurse=False))  # whoever hooks into every part finds them in the module
    assert not dict(model.named_buffers(recurse=False))
    assert list(model.named_children()) == [("", module)]


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("around", [False, True])
def test_weights_are_loaded_by_the_names_of_the_module_or_those_of_torch_compile(prefix: str, around: bool) -> None:
    module = models.plain_dit(1).model
    model = dicompile.optimize(module, mode="eager")
    other = models.redraw(models.PlainDiT(1), seed=5).state_dict()
    given = {f"{'denoiser.' if around else ''}{prefix}{name}": tensor for name, tensor in other.items()}
    target = nn.ModuleDict({"denoiser": model}) if around else model
    target.load_state_dict(given)
    assert all(torch.equal(tensor, other[name]) for name, tensor in module.state_dict().items())
    name, lost = given.popitem()
    with pytest.raises(RuntimeError, match="Missing key"):
        target.load_state_dict(given)
    result = target.load_state_dict({**given, f"{name}_stray": lost}, strict=False)
    assert len(result.missing_keys) == len(result.unexpected_keys) == 1


def test_attributes_set_on_the_wrapper_land_on_the_module() -> None:
    sample = models.dit(1)
    model = optimized(sample, "none", 1)
    model.note = "mine"
    assert sample.model.note == "mine"
    model.train()
    assert sample.model.training


def test_nothing_is_patched_on_the_module() -> None:
    sample = models.dit(2)
    before = owned(sample.model)
    model = optimized(sample, dicompile.FORA(interval=2), 3)
    run(model, sample.inputs, timesteps(3))
    assert owned(sample.model) == before
    assert all(
        not hooks
        for child in sample.model.modules()
        for hooks in (child._forward_hooks, child._forward_pre_hooks, child._backward_hooks)
    )
    assert all("forward" not in vars(child) for child in sample.model.modules())


def test_restore_gives_the_module_back_as_it_was() -> None:
    sample = models.dit(2)
    before = run(sample.model, sample.inputs, timesteps(3))
    model = optimized(sample, dicompile.FORA(interval=2), 3)
    assert not same(run(model, sample.inputs, timesteps(3)), before)
    assert dicompile.restore(model) is sample.model
    assert same(run(sample.model, sample.inputs, timesteps(3)), before)


def test_a_restored_module_can_be_optimized_again() -> None:
    sample = models.plain_dit(1)
    model = optimized(Sample(dicompile.restore(optimized(sample, "none", 2)), {}), dicompile.FORA(interval=2), 2)
    run(model, sample.inputs, timesteps(2))
    assert dicompile.plan_of(model).policy == "fora-2"


def test_optimizing_twice_is_refused() -> None:
    model = optimized(models.plain_dit(1), "none", 1)
    with pytest.raises(AlreadyOptimized, match="PlainDiT is optimized already"):
        dicompile.optimize(model, "none")


def test_restoring_what_was_not_optimized_is_refused() -> None:
    with pytest.raises(NotOptimized, match="this PlainDiT was not optimized"):
        dicompile.restore(models.plain_dit(1).model)


# Arguments.


def test_a_caching_policy_needs_a_schedule() -> None:
    with pytest.raises(InvalidSchedule, match="policy 'fora-3' needs a schedule"):
        dicompile.optimize(models.plain_dit(1).model, "fora")


def test_no_caching_needs_no_schedule() -> None:
    sample = models.plain_dit(1)
    model = dicompile.optimize(sample.model, mode="eager")
    assert same(run(model, sample.inputs, timesteps(3)), run(sample.model, sample.inputs, timesteps(3)))


def test_an_unknown_mode_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidSetting, match="inductor, eager"):
        dicompile.optimize(models.plain_dit(1).model, "none", mode="fast")


@pytest.mark.parametrize("schedule", [4, timesteps(4), torch.tensor(timesteps(4)), dicompile.TimestepSchedule(4)])
def test_a_schedule_may_be_a_number_a_list_a_tensor_or_a_schedule(schedule: Any) -> None:
    sample = models.plain_dit(1)
    model = dicompile.optimize(sample.model, dicompile.FORA(interval=2), schedule=schedule, mode="eager")
    run(model, sample.inputs, timesteps(4))
    assert dicompile.report(model).kinds == {"full": 3, "reuse": 1}


@pytest.mark.parametrize(
    "policy", ["fora", dicompile.FORA(), dicompile.FORA().to_dict()], ids=["name", "policy", "plain data"]
)
def test_a_policy_may_be_a_name_a_policy_or_plain_data(policy: Any) -> None:
    sample = models.plain_dit(1)
    model = optimized(sample, policy, 4)
    run(model, sample.inputs, timesteps(4))
    assert dicompile.plan_of(model).policy == "fora-3"


# Questions.


@pytest.mark.parametrize("ask", [dicompile.plan_of, dicompile.structure_of, dicompile.report])
def test_questions_before_the_first_call_are_refused(ask: Any) -> None:
    with pytest.raises(NotYetRun, match="PlainDiT has not run yet"):
        ask(optimized(models.plain_dit(1), "none", 1))


@pytest.mark.parametrize("ask", [dicompile.plan_of, dicompile.structure_of, dicompile.report])
def test_questions_about_an_untouched_module_are_refused(ask: Any) -> None:
    with pytest.raises(NotOptimized, match="this PlainDiT was not optimized"):
        ask(models.plain_dit(1).model)


def test_structure_plan_and_report_print_themselves() -> None:
    sample = models.plain_dit(2)
    model = optimized(sample, dicompile.FORA(interval=2), 4)
    run(model, sample.inputs, timesteps(4))
    structure = str(dicompile.structure_of(model)).splitlines()
    assert structure[0] == "inputs   x: latent, t: timestep, y: conditioning"
    assert sum("self-attention" in line for line in structure) == sum(" mlp " in line for line in structure) == 2
    plan = str(dicompile.plan_of(model)).splitlines()
    assert plan[0].startswith("fora-2: 4 steps (3 full, 1 reuse), ")
    assert [line.split()[-2:] for line in plan[2:]] == [["FF", "FF"], ["FF", "FF"], ["..", ".."], ["FF", "FF"]]
    report = str(dicompile.report(model))
    assert report == "4 calls: 3 full, 1 reuse; cache 128.00 KiB at most, 0 bytes now"


def test_a_run_in_which_the_policy_did_nothing_says_so_at_its_end(caplog: pytest.LogCaptureFixture) -> None:
    sample = models.plain_dit(1)
    model = optimized(sample, dicompile.FORA(interval=2), STEPS)
    every = timesteps(STEPS)
    with caplog.at_level(logging.WARNING, logger="dicompile"):
        run(model, sample.inputs, every)
        assert not dicompile.report(model).unapplied
        run(model, sample.inputs, [every[0], every[2]])
        assert not dicompile.report(model).unapplied, "it may still be applied"
        assert not caplog.records
        run(model, sample.inputs, [every[0], every[2], every[5]])  # somebody skips steps: none continues another
    report = dicompile.report(model)
    assert str(report) == (
        "3 calls: 3 full; computed for want of stored values at steps [2, 5]; policy fora-2 was never applied"
    )
    assert [record.getMessage() for record in caplog.records] == [f"nothing was reused in a whole run: {report}"]


def test_questions_are_about_the_shapes_that_ran_last() -> None:
    sample = models.plain_dit(1)
    halves = {name: value[:2] for name, value in sample.inputs.items()}
    model = optimized(sample, dicompile.FORA(interval=2), 4)
    for inputs, steps in ((sample.inputs, 4), (halves, 3), (sample.inputs, 2), (halves, 1)):
        run(model, inputs, timesteps(4)[:steps])
        assert dicompile.structure_of(model).sites[0].shape[0] == len(inputs["x"])
        assert dicompile.report(model).kinds.total() == steps
    assert len(model.frames) == 2


class OfAnyDepth(models.PlainDiT):
    """Leaves out blocks, as layer-skip guidance does."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor, depth: int = 2) -> Tensor:
        h, c = self.tokens(x), self.condition(t, y)
        for block in self.blocks[:depth]:
            h = block(h, c)
        return self.picture(h, c, *x.shape[2:])


def test_questions_are_about_the_last_call_however_many_sites_it_has() -> None:
    sample = Sample(models.redraw(OfAnyDepth(2)), models.plain_dit(1).inputs)
    model = optimized(sample, dicompile.FORA(interval=2), 4)
    for depth in (2, 1, 2, 1):
        run(model, {**sample.inputs, "depth": depth}, timesteps(4))
        assert len(dicompile.structure_of(model).sites) == 2 * depth
        assert len(dicompile.plan_of(model).steps[0].sites) == len(dicompile.structure_of(model).everything)


def test_a_second_policy_compiles_only_what_no_earlier_one_had(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[object] = []

    def counted(segment: Segment, mode: str) -> Any:
        compiled.append(segment)
        return compile_segment(segment, mode)

    monkeypatch.setattr("dicompile.lower.inductor.compile_segment", counted)
    counts = []
    for policy in ("none", "fora", "fora", dicompile.ToCa(ratio=0.3)):
        sample = models.plain_dit(4)  # another module of the same class each time
        made = dicompile.optimize(sample.model, policy, schedule=timesteps(6), mode="eager")
        run(made, sample.inputs, timesteps(6))
        counts.append(len(compiled))
        compiled.clear()
    assert counts[0] == 3  # prologue, block, epilogue
    assert 0 < counts[1] <= 3  # storing, reused
    assert counts[2] == 0
    assert counts[3] > 0


class Guided(PlainDiT):
    """Guidance in a method of the model, as the repositories of DiT and PixArt have it."""

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, scale: float) -> Tensor:
        half = x[: len(x) // 2]
        cond, uncond = self.forward(torch.cat([half, half]), t, y).chunk(2)
        guided = uncond + scale * (cond - uncond)
        return torch.cat([guided, guided])

    def called(self, x: Tensor, t: Tensor, y: Tensor, scale: float) -> Tensor:
        """The same by a call of the module."""
        half = x[: len(x) // 2]
        cond, uncond = self(torch.cat([half, half]), t, y).chunk(2)
        guided = uncond + scale * (cond - uncond)
        return torch.cat([guided, guided])


def test_a_parser_that_another_thread_disturbs_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """python/cpython#106905: ``compile`` in two threads at once raises this in some versions."""
    parse, disturbed = ast.parse, ["AST constructor recursion depth mismatch (before=159, after=68)"]

    def parsed(source: str) -> ast.Module:
        if disturbed:
            raise SystemError(disturbed.pop())
        return parse(source)

    _calls_self.cache_clear()
    monkeypatch.setattr(ast, "parse", parsed)
    assert _calls_self(Guided.called)
    assert not disturbed


@pytest.mark.parametrize("method", ["forward_with_cfg", "called"])
def test_methods_that_call_the_module_are_cached_too(method: str) -> None:
    module = models.redraw(Guided(2))
    optimized = dicompile.optimize(module, dicompile.FORA(interval=3), schedule=timesteps(STEPS), mode="eager")
    for number, time in enumerate(timesteps(STEPS)):
        inputs = torch.randn(4, 4, 16, 16), torch.full((4,), float(time)), torch.tensor([1, 2, 10, 10]), 3.0
        result = getattr(optimized, method)(*inputs)
        if not number:
            torch.testing.assert_close(result, getattr(module, method)(*inputs), rtol=1e-4, atol=1e-4)
    assert dicompile.report(optimized).kinds == {"full": 3, "reuse": 3}
    dicompile.disable(optimized)
    assert torch.equal(getattr(optimized, method)(*inputs), getattr(module, method)(*inputs))
