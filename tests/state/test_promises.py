"""What never changes a result, and where each of these is tested.

| promise | test |
|---|---|
| two models of one class are independent | here |
| repeated runs are bitwise equal | tests/runtime/test_generations.py |
| after an exception or interrupt in a call: as if fresh | tests/runtime/test_generations.py, tests/state/machine.py |
| changed steps, resolution, batch size, prompt length between runs | here |
| own sampling loops need no reset, wherever a run was left | here, tests/runtime/test_generations.py |
| optimized again for another policy: as if fresh | here |
| restore and disable are bit-exact | tests/test_api.py, tests/state/machine.py |
| a plan that never reuses equals no policy | tests/test_api.py |
| threads at once | tests/runtime/test_contexts.py |
| generations that take turns in one thread, in sessions | here, tests/runtime/test_contexts.py |
| a sample does not depend on its batch mates | here |
| a cancelled task leaves nothing behind | here |
| guidance in all its ways | here, tests/runtime/test_contexts.py |
| windows and equal calls that nothing names | tests/runtime/test_windows.py, tests/runtime/test_which_context.py |
| samples and frames at steps of their own | tests/runtime/test_clock.py, tests/runtime/test_identify.py |
| results and inputs are the caller's | tests/runtime/test_windows.py |
| no stale read | tests/runtime/test_stamps.py, and checked in every test (``DICOMPILE_CHECK``) |
| all of it together, at random | tests/state/test_machine.py |
"""

from __future__ import annotations

import asyncio
import functools
from dataclasses import replace

import pytest
import torch

import dicompile
from dicompile.errors import NotOptimized
from tests import models
from tests.models import call, optimized, run, timesteps
from tests.state.runs import GUIDANCE, SETUPS, STEPS, Optimized, Run, Sampling

POLICIES = ["fora", "toca", "duca"]


@functools.cache
def used(model: str, policy: str) -> Optimized:
    """A model that all tests here use one after the other."""
    return Optimized(model, policy)


@functools.cache
def fresh(wanted: Run) -> list[str]:
    """What a run gives in a session where nothing happened."""
    with dicompile.session():
        return Sampling(wanted, used(wanted.model, wanted.policy)).finish()


def sampling(wanted: Run, calls: int = 0) -> Sampling:
    """A run that has made some calls."""
    made = Sampling(wanted, used(wanted.model, wanted.policy))
    for _ in range(calls):
        made.call()
    return made


def plain(policy: str = "duca", **changes: object) -> Run:
    return replace(Run("plain_dit", policy, STEPS), **changes)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.sampled
def test_a_run_that_was_left_at_any_call_leaves_no_trace_on_another_prompt(policy: str, guidance: str) -> None:
    """Without a scheduler nothing announces the next run, and the noise may be the same."""
    first, second = plain(policy, guidance=guidance), plain(policy, guidance=guidance, prompt=1)
    expected = fresh(second)
    for calls in range(1, sampling(first).total):
        sampling(first, calls)
        assert sampling(second).finish() == expected, calls


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("first", "second"), [("until 2", "until 3"), ("order", "none"), ("joins late", "contexts")])
@pytest.mark.sampled
def test_a_run_that_was_left_leaves_no_trace_on_one_that_guides_otherwise(policy: str, first: str, second: str) -> None:
    """The batch may change in the middle of a run, so that one run ends with shapes another one goes on with."""
    left, expected = plain(policy, guidance=first), fresh(plain(policy, guidance=second, prompt=1))
    for calls in range(1, sampling(left).total):
        sampling(left, calls)
        assert sampling(plain(policy, guidance=second, prompt=1)).finish() == expected, calls


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("guidance", ["contexts", "order"])
def test_guidance_by_two_calls_is_guidance_by_one(policy: str, guidance: str) -> None:
    """Partners do not see each other; in a batch of both, sums run in another order."""
    with dicompile.session():
        one, two = sampling(plain(policy, guidance="batched")), sampling(plain(policy, guidance=guidance))
        one.finish()
    with dicompile.session():
        two.finish()
    torch.testing.assert_close(two.latents[0], one.latents[0], rtol=1e-4, atol=1e-4)


def test_guidance_that_begins_or_ends_in_the_middle_never_reads_the_partner() -> None:
    """What the conditional half gives does not depend on whether the other half was called first."""
    model, times = used("plain_dit", "fora").model, timesteps(STEPS)
    setup = SETUPS["plain_dit"]
    halves = [setup.conditioning(1, 0, torch.Generator().manual_seed(1)), setup.conditioning(1, 0, None)]

    def cond(partner_at: tuple[int, ...]) -> list[torch.Tensor]:
        outputs = []
        with dicompile.session(), torch.no_grad():
            for step, time in enumerate(times):
                x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(step))
                for half in (1, 0) if step in partner_at else (0,):
                    output = model(x=x, t=torch.full((1,), time), **{k: v.clone() for k, v in halves[half].items()})
                outputs.append(output)
        return outputs

    alone = cond(())
    for partner_at in ((0, 1), (1, 2), (2, 3, 4, 5), (0, 2, 4), (5,), tuple(range(STEPS))):
        assert all(torch.equal(a, b) for a, b in zip(cond(partner_at), alone, strict=True)), partner_at


def test_anything_about_the_inputs_may_change_between_runs() -> None:
    base = Run("pixart", "taylorseer", STEPS)
    changes = [{}, {"steps": 4}, {"size": 1}, {"size": 2}, {"batch": 2}, {"prompt": 1}, {"seed": 1}]
    runs = [replace(base, **change) for change in changes]
    for wanted in [*runs, *reversed(runs)]:
        assert sampling(wanted).finish() == fresh(wanted), wanted


def test_two_models_of_one_class_are_independent() -> None:
    samples = [models.plain_dit(1), models.plain_dit(1)]
    models.redraw(samples[1].model, seed=1)
    optimized_ones = [optimized(sample, "fora", STEPS) for sample in samples]
    alone = [run(m, s.inputs, timesteps(STEPS)) for m, s in zip(optimized_ones, samples, strict=True)]
    together: list[list[torch.Tensor]] = [[], []]
    for step, time in enumerate(timesteps(STEPS)):
        for sample, model, outputs in zip(samples, optimized_ones, together, strict=True):
            outputs.append(call(model, sample.inputs, time, step))
    for outputs, expected in zip(together, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    untouched = run(samples[1].model, samples[1].inputs, timesteps(STEPS))
    dicompile.restore(optimized_ones[1])
    again = run(optimized_ones[0], samples[0].inputs, timesteps(STEPS))
    assert all(torch.equal(a, b) for a, b in zip(again, alone[0], strict=True))
    assert all(
        torch.equal(a, b)
        for a, b in zip(run(samples[1].model, samples[1].inputs, timesteps(STEPS)), untouched, strict=True)
    )


def test_a_model_that_is_optimized_again_does_what_its_new_policy_says() -> None:
    module = SETUPS["plain_dit"].make().model
    for policy in ("fora", "duca", "fora"):
        again = Optimized("plain_dit", policy, module)
        left = Sampling(plain(policy, prompt=1), again)
        left.call()
        left.call()
        assert Sampling(plain(policy), again).finish() == fresh(plain(policy))
        dicompile.restore(again.model)


@pytest.mark.parametrize("policy", POLICIES)
def test_generations_take_turns_in_sessions_of_one_model(policy: str) -> None:
    first, second, other = plain(policy), plain(policy, prompt=1), plain("fora", seed=1)
    expected = [fresh(wanted) for wanted in (first, second, other)]
    one, two, three = sampling(first), sampling(second), sampling(other)
    own = None
    while not one.is_finished:
        one.call()
        with dicompile.session(own or two.optimized.model) as own:
            two.call()
            if not three.is_finished and three.optimized is not two.optimized:
                three.call()  # another model: it goes on in the session around
        if not three.is_finished and three.optimized is not one.optimized:
            three.call()
    assert (one.digests, two.digests) == tuple(expected[:2])
    assert policy == "fora" or three.digests == expected[2]


def test_a_session_of_a_model_wants_an_optimized_one() -> None:
    with pytest.raises(NotOptimized, match="this PlainDiT was not optimized"):
        dicompile.session(models.plain_dit(1).model)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_sample_does_not_depend_on_its_batch_mates(policy: str) -> None:
    model = used("plain_dit", policy).model
    labels = torch.tensor([1, 2, 3, 4])

    def sample(others: int) -> list[torch.Tensor]:
        latent = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(others))
        latent[2] = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(100))
        given, outputs = torch.where(torch.arange(4) == 2, labels, labels + others), []
        with dicompile.session():
            for time in timesteps(STEPS):
                output = model(latent, torch.full((4,), time), given)
                latent = latent - 0.1 * output
                outputs.append(output[2])
        return outputs

    wanted = sample(0)
    for others in (1, 2, 3):
        assert all(torch.equal(a, b) for a, b in zip(sample(others), wanted, strict=True))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("in_session", [False, True])
def test_a_cancelled_task_leaves_nothing_behind(policy: str, in_session: bool) -> None:
    wanted, other = plain(policy), plain(policy, prompt=1)
    expected, expected_other = fresh(wanted), fresh(other)

    async def sample(what: Run) -> list[str]:
        made = sampling(what)
        while not made.is_finished:
            made.call()
            await asyncio.sleep(0)
        return made.digests

    async def main() -> None:
        for calls in range(1, STEPS):
            left = asyncio.create_task(sample(wanted))
            kept = None if in_session else asyncio.create_task(sample(other))
            for _ in range(calls + 1):
                await asyncio.sleep(0)
            left.cancel()
            with pytest.raises(asyncio.CancelledError):
                await left
            assert kept is None or await kept == expected_other
            assert await sample(other) == expected_other
            assert await sample(wanted) == expected

    if in_session:  # tasks share it; they run one after the other
        with dicompile.session():
            asyncio.run(main())
    else:
        asyncio.run(main())
