"""Programs: few variants whatever the depth, runs of reused blocks fused, registers freed, layouts as compiled."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import dicompile
from dicompile.capture import Role
from dicompile.compiler import Programs
from dicompile.lower import Call, Constant, Program, pieces
from dicompile.passes import Segment
from dicompile.plan import Cadence, Plan, Policy, Refresh, Reuse, Rule, Table, TimestepSchedule, TokenScore
from dicompile.runtime import Executor, Owner, SchedulerLink, Signature, current_session
from tests.lower.captured import captured
from tests.models import MODELS, Sample, dit, flux, pixart, plain_dit, timesteps
from tests.passes.segments import WIDTH, Channels, Mlp, chain

STEPS = 9
SCHEDULE = TimestepSchedule.of(tuple(timesteps(STEPS)))


def programs(make: Callable[..., Sample], *layers: int, policy: Any) -> Programs:
    return captured(make, *layers).programs(policy)


def all_programs(made: Programs, schedule: TimestepSchedule = SCHEDULE) -> list[Program]:
    """The program of every step, and of every step at which a run may begin."""
    first = [made.step(schedule.rest(i), 0).program for i in range(schedule.steps)]
    return [*first, *(made.step(schedule, i).program for i in range(schedule.steps))]


def plan(made: Programs) -> Plan:
    return made.plan(SCHEDULE)


def kinds(made: Programs) -> list[str]:
    """Variants by what their sites do, whatever block they were first made for."""
    all_programs(made)
    return sorted(variant.name.rpartition("-")[2] for variant in made.variants.variants)


@pytest.mark.parametrize("policy", ["none", "fora", "toca"])
@pytest.mark.sampled
def test_the_number_of_variants_does_not_grow_with_depth(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dicompile.lower.pieces.RUNS", (2, 1))  # first run, runs between, shorter last one
    assert kinds(programs(plain_dit, 7, policy=policy)) == kinds(programs(plain_dit, 5, policy=policy))


def test_blocks_that_compute_share_their_variants_at_any_depth() -> None:
    def computing(layers: int) -> list[str]:
        return [kind for kind in kinds(programs(plain_dit, layers, policy="toca")) if kind.strip("r")]

    assert computing(12) == computing(5)


@pytest.mark.parametrize("policy", ["none", "fora", "toca"])
@pytest.mark.sampled
def test_the_number_of_variants_does_not_grow_with_steps(policy: str) -> None:
    made = programs(plain_dit, 2, policy=policy)
    all_programs(made, TimestepSchedule.of(tuple(timesteps(40))))
    few = kinds(made)
    all_programs(made, TimestepSchedule.of(tuple(timesteps(160))))
    assert kinds(made) == few


def names(program: Program) -> list[str]:
    return [call.name.split(":")[0] for call in program.calls]


def test_a_run_of_reused_blocks_is_one_call_of_at_most_eight_blocks() -> None:
    made = programs(plain_dit, 12, policy="fora")
    kind_of_step = {step.kind: i for i, step in enumerate(plan(made).steps)}
    assert names(made.step(SCHEDULE, kind_of_step["reuse"]).program) == [
        "prologue", "blocks0-5", "blocks6-11", "epilogue",
    ]  # fmt: skip
    assert len(made.step(SCHEDULE, kind_of_step["full"]).program.calls) == 14


@pytest.mark.parametrize(
    ("kinds", "lengths"),
    [
        ("a" * 3, (2, 1)), ("a" * 7, (4, 2, 1)), ("a" * 8, (8,)), ("a" * 9, (1, 8)), ("a" * 12, (6, 6)),
        ("a" * 28, (7, 7, 7, 7)), ("ab" * 14, (4, 8, 8, 8)), ("a" * 19 + "b" * 38, (6, 6, 6, 7, 8, 8, 8, 8)),
    ],
)  # fmt: skip
def test_a_run_is_cut_into_few_parts_and_few_different_ones(kinds: str, lengths: tuple[int, ...]) -> None:
    assert pieces._cut(tuple(kinds)) == lengths


@pytest.mark.parametrize("kinds", ["a" * 19, "a" * 23, "aab" * 7, "a" * 5 + "b" * 20, "a" * 7 + "b" + "c" * 14])
def test_no_other_way_to_cut_a_run_has_fewer_different_parts(kinds: str) -> None:
    def parts(lengths: Sequence[int]) -> set[str]:
        ends = itertools.accumulate(lengths)
        return {kinds[end - length : end] for end, length in zip(ends, lengths, strict=True)}

    longest = pieces.RUNS[0]
    ways = itertools.product(range(1, longest + 1), repeat=math.ceil(len(kinds) / longest))
    fewest = min(len(parts(way)) for way in ways if sum(way) == len(kinds))
    found = pieces._cut(tuple(kinds))
    assert sum(found) == len(kinds)
    assert len(found) == math.ceil(len(kinds) / longest)
    assert len(parts(found)) == fewest


def test_the_variants_of_28_blocks_are_few() -> None:
    def table(step: int, site: int) -> bool:
        return step % 2 == 0 or (step * 7 + site * 5) % 3 == 0

    learned = tuple(tuple(table(step, site) for site in range(56)) for step in range(10))
    policies = {
        "fora": 4, "taylorseer": 5, "toca": 6, "duca": 9,
        Policy(name="l2c", rules=(Rule(do=Table(compute=learned)),)): 6,
    }  # fmt: skip
    schedule = TimestepSchedule.of(tuple(timesteps(10)))
    for policy, most in policies.items():
        made = programs(plain_dit, 28, policy=policy)
        for i in range(schedule.steps):
            made.step(schedule, i)
        assert len([variant for variant in made.variants.variants if variant.outputs]) <= most, policy


def test_code_that_returns_more_than_a_step_stores_is_taken_for_it_and_nothing_more_is_stored() -> None:
    rows = ((True, True), (False, False), (True, False), (False, True), (True, True), (True, True))
    policy = Policy(name="rows", rules=(Rule(do=Table(compute=tuple(row * 2 for row in rows))),))
    schedule = TimestepSchedule.of(tuple(timesteps(len(rows))))
    made = programs(plain_dit, 2, policy=policy)
    all_programs(made, schedule)
    for i, step in enumerate(made.plan(schedule).steps):
        stored = {slot for slot, _ in made.step(schedule, i).program.writes}
        assert stored == {written for site in step.sites for written in site.writes}
    computing = {variant.name for variant in made.variants.variants if variant.name.endswith("-ff")}
    assert len(computing) == 1


def test_a_full_step_that_keeps_nothing_shares_the_code_of_those_that_keep_everything() -> None:
    made = programs(plain_dit, 3, policy="fora")
    first, *_, last = (made.step(SCHEDULE, i) for i, step in enumerate(plan(made).steps) if step.kind == "full")
    assert bool(first.program.writes) != bool(last.program.writes)
    assert [kind for kind in kinds(made) if kind.strip("r") and kind != "plain"] == ["ff"]


@pytest.mark.parametrize("model", [dit, pixart])
def test_the_first_block_shares_the_code_of_the_others_whatever_lies_before_it(model: Callable[..., Sample]) -> None:
    made = programs(model, 4, policy="none")  # its stream comes out of a convolution, channel by channel
    calls = made.step(SCHEDULE, 0).program.calls
    assert len({call.function for call in calls if call.name.startswith("block")}) == 1


def test_what_joins_two_streams_for_the_blocks_that_follow_is_a_call_of_its_own() -> None:
    calls = programs(flux, 2, policy="none").step(SCHEDULE, 0).program.calls
    named = {call.name.split(":")[0]: call.function for call in calls}
    assert list(named) == ["prologue", "block0", "block1", "before-block2", "block2", "block3", "epilogue"]
    assert named["block2"] is named["block3"]


class Streaming(torch.nn.Module):
    """Blocks on what a convolution makes, whose stream is what comes out, as it lies in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Conv2d(4, WIDTH, 2, 2)
        self.blocks = torch.nn.ModuleList(Mlp() for _ in range(3))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first = h = self.embed(x).flatten(2).transpose(1, 2) + t[:, None, None]
        for block in self.blocks:
            h = block(h)
        return h, first


def test_a_stream_that_leaves_the_model_lies_in_memory_as_the_model_leaves_it() -> None:
    model, inputs = Streaming().eval(), {"x": torch.randn(2, 4, 8, 8), "t": torch.ones(2)}
    cached = dicompile.optimize(model, "none", backend="eager")
    with torch.no_grad():
        found, wanted = cached(**inputs), model(**inputs)
    assert [value.stride() for value in found] == [value.stride() for value in wanted]
    assert not wanted[1].is_contiguous()
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_a_block_that_computes_anything_ends_a_run() -> None:
    def middle(sites: Sequence[Any]) -> bool:
        return any(site.action.computes for site in sites)

    refresh = Refresh(ratio=0.3, by_depth={"start": 0.0, "slope": 1.0}, score=TokenScore(base="random"))
    policy = Policy(
        name="deep-first", cadence={"interval": 3}, rules=(Rule(sites=("mlp",), do=refresh), Rule(do=Reuse()))
    )
    made = programs(plain_dit, 4, policy=policy)
    step = next(i for i, s in enumerate(plan(made).steps) if s.kind == "partial")
    assert not middle(plan(made).steps[step].sites[:2])
    assert names(made.step(SCHEDULE, step).program) == ["prologue", "block0", "block1", "block2", "block3", "epilogue"]


def test_no_policy_no_slots() -> None:
    made = programs(plain_dit, 2, policy="none")
    assert plan(made).slots == ()
    assert plan(made).cache_bytes == 0
    for program in all_programs(made):
        assert (program.reads, program.writes, program.ints, program.noise, program.chosen) == ((), (), (), (), ())


def test_steps_that_differ_in_token_counts_only_share_a_program() -> None:
    made = programs(plain_dit, 1, policy="toca")
    schedule = TimestepSchedule.of(tuple(timesteps(30)))
    partial = [made.step(schedule, i) for i, step in enumerate(made.plan(schedule).steps) if step.kind == "partial"]
    tokens = [step.planned.sites[1].action.tokens for step in partial]
    assert len({chosen.count for chosen in tokens if chosen is not None}) > 3
    assert len({id(step.program) for step in partial}) == 2  # with and without a step after it that reads


STORE = """\
%25, %26 = prologue:prologue-plain(%2, %0, %1, %3, %4, %5, %6, %7, %8, %9, %10)
%27, %28, %29 = block0:block0-ff(%26, %11, %12, %25, %13, %14, %15, %16, %17, %18, %19, %20)
%30 = epilogue:epilogue-plain(%26, %21, %22, %27, %23, %24)
slot value[0] = %28
slot value[1] = %29
return (30,)"""
REUSE = """\
%27 = slot value[0]
%28 = slot value[1]
%25, %26 = prologue:prologue-plain(%2, %0, %1, %3, %4, %5, %6, %7, %8, %9, %10)
%29 = block0:block0-rr(%26, %11, %12, %25, %27, %28)
%30 = epilogue:epilogue-plain(%26, %21, %22, %29, %23, %24)
return (30,)"""


def test_a_program_prints_as_loads_calls_and_stores() -> None:
    made = programs(plain_dit, 1, policy="fora")
    texts = [str(made.step(SCHEDULE, i).program) for i in range(2)]
    assert texts == [STORE, REUSE]


def check_registers(program: Program, inputs: int) -> None:
    """Nothing is read before it is there or after it was freed; nothing is kept that nobody needs."""
    held = set(range(inputs)) | {register for _, register in program.reads}
    held |= {item.register for item in (*program.ints, *program.noise)}
    for call in program.calls:
        assert held.issuperset(call.inputs)
        assert held.isdisjoint(call.outputs)
        held |= set(call.outputs)
        assert held.issuperset(call.frees)
        held -= set(call.frees)
    results = {register for register in program.results if not isinstance(register, Constant)}
    kept = results | {register for _, register in (*program.writes, *program.chosen)}
    assert held - set(range(inputs)) == kept - set(range(inputs))
    assert max((r for call in program.calls for r in (*call.inputs, *call.outputs)), default=0) < program.registers


@pytest.mark.parametrize("policy", ["none", "fora", "toca"])
@pytest.mark.parametrize("layers", [1, 3])
def test_registers_are_filled_before_they_are_read_and_freed_after_their_last_use(policy: str, layers: int) -> None:
    made = programs(plain_dit, layers, policy=policy)
    for program in all_programs(made):
        check_registers(program, inputs=len(made.structure.inputs))


def test_a_register_is_freed_by_the_last_call_that_uses_it() -> None:
    program = programs(plain_dit, 2, policy="none").step(SCHEDULE, 0).program
    first, second, last = program.calls[-3:]
    stream = second.outputs[0]
    assert stream in last.frees
    assert first.outputs[0] in second.frees


class Backwards(Channels):
    """A block with the branch first in its sum, so that the layout of the sum follows the branch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mix(x.transpose(1, 2)).transpose(1, 2) + x


def backwards(_: int) -> Sample:
    return chain(Backwards(), Mlp(), Backwards(), Mlp())


def channels(_: int) -> Sample:
    return chain(Channels(), Mlp(), Channels(), Mlp())


LAYOUTS: dict[str, Callable[..., Sample]] = {**MODELS, "channels": channels, "backwards": backwards}


def checked(complaints: list[str]) -> Callable[[Segment, str], Callable[..., Any]]:
    """A compiler that runs operator by operator and compares every argument and result with what was promised."""

    def compile_segment(segment: Segment, _: str) -> Callable[..., Any]:
        expected = [node.meta["val"] for node in segment.graph.nodes if node.op == "placeholder"]

        def call(*arguments: Any) -> Any:
            results = segment.graph_module(*arguments)
            promised = [*expected, *(node.meta["val"] for node in segment.results)]
            for ref, fake, real in zip(
                [*segment.inputs, *segment.outputs], promised, [*arguments, *results], strict=True
            ):
                if isinstance(fake, torch.Tensor) and not same_layout(fake, real):
                    complaints.append(f"{ref}: {fake.shape} {fake.stride()}, got {real.shape} {real.stride()}")
            return results

        return call

    return compile_segment


def same_layout(fake: torch.Tensor, real: torch.Tensor) -> bool:
    """True if dtype, shape and strides agree; symbolic sizes and strides of axes with one element are not compared."""
    if any(isinstance(size, torch.SymInt) for size in fake.shape):
        return fake.dtype == real.dtype and fake.ndim == real.ndim
    strides = [(a, b) for a, b, n in zip(fake.stride(), real.stride(), fake.shape, strict=True) if n != 1]
    return fake.dtype == real.dtype and fake.shape == real.shape and all(a == b for a, b in strides)


@pytest.mark.parametrize("model", LAYOUTS)
@pytest.mark.sampled
def test_every_variant_gets_and_gives_values_of_the_layout_it_was_compiled_for(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    complaints: list[str] = []
    monkeypatch.setattr("dicompile.lower.inductor.compile_segment", checked(complaints))
    refresh = Rule(sites=("mlp",), do=Refresh(ratio=0.3, score=TokenScore(base="random")))
    rules = (Rule(do=Reuse()),) if model in ("channels", "backwards") else (refresh, Rule(do=Reuse()))
    made = captured(LAYOUTS[model], 1 if model == "flux" else 2)
    source = made.programs(Policy(name="all kinds", cadence=Cadence(interval=3), rules=rules))
    owner, latent = Owner(SchedulerLink(STEPS)), made.capture.input_position(Role.LATENT)
    executor = Executor(source, Signature(latent=latent))
    for _ in range(STEPS):
        executor.run(owner, made.arguments())
    assert current_session().state_of(owner).report.cold_starts == []
    assert complaints == []


def test_calls_of_one_variant_share_its_function() -> None:
    program = programs(plain_dit, 4, policy="none").step(SCHEDULE, 0).program
    blocks: list[Call] = [call for call in program.calls if call.name.startswith("block")]
    assert blocks[1].function is blocks[2].function is blocks[3].function
