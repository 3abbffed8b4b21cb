"""Requests in one batch: each gets what it gets by itself, and memory goes back with whoever had it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dicompile
from dicompile import errors
from dicompile.plan import Adapter
from dicompile.policies import TokenCache
from dicompile.serve import Batcher
from tests import models
from tests.models import PlainDiT, Sample, redraw
from tests.pipelines import pipes
from tests.policies import predictors
from tests.serve.clients import alone, at_once, served

PATIENCE = 20.0
"""Seconds: nobody runs before everybody waits, however slow the machine is."""
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
"""Products of more rows may round in another way."""


def batcher_of(sample: Sample, **options: Any) -> Batcher:
    return Batcher(sample.model, **{"backend": "eager", "patience": PATIENCE, "sizes": (1, 2)} | options)


@pytest.mark.parametrize(
    ("make", "policies", "ahead"),
    [
        (models.plain_dit, ["fora", "fora", "none"], 1),  # two pictures, both halves of guidance: four rows each
        (models.plain_dit, ["toca", "toca", "duca"], 0),  # tokens are chosen for both halves
        (models.plain_dit, ["taylorseer", "taylorseer", "fora"], 0),
        (models.flux, ["fora", "fora", "toca"], 1),  # one row each, and ids that all rows share
    ],
)
@pytest.mark.sampled
def test_every_request_gets_what_it_gets_by_itself(
    make: Callable[..., Sample], policies: list[str], ahead: int
) -> None:
    sample = make(layers=2)
    requests = [(policy, 7 - i * ahead, 11 + i) for i, policy in enumerate(policies)]
    batcher = batcher_of(sample)
    for request, outputs in zip(requests, served(batcher, sample, requests, ahead), strict=True):
        assert isinstance(outputs, list), outputs
        for ours, theirs in zip(outputs, alone(sample, *request), strict=True):
            torch.testing.assert_close(ours, theirs, **CLOSE)
    done = batcher.served()
    assert sum(size * count for size, count in done.batches.items()) == sum(done.steps.values())
    assert sum(done.steps.values()) == sum(steps for _, steps, _ in requests)
    assert done.batches[2] > 0
    assert (done.open, done.waiting, done.cache_bytes, done.reserved_bytes, done.finished) == (0, 0, 0, 0, 3)


def test_cutoffs_of_low_frequencies_tell_requests_apart() -> None:
    """All weights are the same, and what is made of them is not."""
    sample = models.plain_dit(layers=2)
    requests = [(dicompile.FreqCa(interval=3, cutoff=cutoff), 8, 1) for cutoff in (0.1, 0.6)]
    found = served(batcher_of(sample, patience=0.2), sample, requests)
    for request, outputs in zip(requests, found, strict=True):
        for ours, theirs in zip(outputs, alone(sample, *request), strict=True):
            torch.testing.assert_close(ours, theirs, **CLOSE)
    assert not torch.allclose(found[0][4], found[1][4], atol=1e-3)


def test_requests_at_different_steps_are_one_batch() -> None:
    sample = models.plain_dit(layers=2)
    batcher = batcher_of(sample)
    outputs = served(batcher, sample, [("none", 4, 1), ("none", 4, 2)])
    assert batcher.served().batches == {1: 2, 2: 3}  # the first one's first step, and the last one's last
    for seed, ours in zip((1, 2), outputs, strict=True):
        torch.testing.assert_close(ours, alone(sample, "none", 4, seed), **CLOSE)


def test_requests_whose_steps_differ_are_not() -> None:
    sample = models.plain_dit(layers=2)
    batcher = batcher_of(sample)
    served(batcher, sample, [("fora", 4, 1), ("none", 4, 2)])
    assert batcher.served().batches == {1: 6, 2: 1}  # full steps that store, and reuse; the last one stores nothing


def steps_of(sample: Sample, policy: Any, steps: int) -> list[Any]:
    """What each step of a run does."""
    model = models.optimized(sample, policy, steps)
    models.call(model, sample.inputs, 999, 0)
    programs, schedule = models.frames_of(model)[-1].programs, dicompile.plan_of(model).schedule
    return [programs.step(schedule, i).does for i in range(steps)]


def test_steps_are_the_same_function_whatever_policy_and_step_they_are_of() -> None:
    sample = models.plain_dit(layers=2)
    three, five = (steps_of(sample, dicompile.FORA(interval=n), 7) for n in (3, 5))
    assert three[0] == three[3] == five[1]  # full, and stored
    assert three[1] == three[5] == five[2] == five[5]  # reused
    assert len({three[0], three[1], three[6]}) == 3  # nothing reads what the last one computes
    refreshed = steps_of(sample, "toca", 6)
    assert refreshed[0] == refreshed[1] == three[6]
    assert refreshed[3] != refreshed[4]  # other numbers of tokens, and ages, which weigh in their scores


def test_what_rows_share_has_to_be_equal() -> None:
    sample = models.flux(layers=1)
    other = Sample(sample.model, sample.inputs | {"img_ids": sample.inputs["img_ids"] + 1})
    batcher = batcher_of(sample)
    first, second = at_once(
        lambda: served(batcher, sample, [("none", 2, 1)])[0], lambda: served(batcher, other, [("none", 2, 1)])[0]
    )
    assert batcher.served().batches == {1: 4}
    torch.testing.assert_close(second, alone(other, "none", 2, 1), **CLOSE)
    assert not torch.allclose(first[0], second[0])


def test_what_a_thread_has_set_for_itself_has_to_be_equal() -> None:
    sample = models.plain_dit(layers=1)
    batcher, times = batcher_of(sample), models.timesteps(2)
    requests = [batcher.request("none", schedule=times) for _ in range(2)]  # both are waited for

    def run(request: Any, mode: Any) -> list[Tensor]:
        with request, mode:
            return models.run(request.model, sample.inputs, times)

    outside, inside = at_once(
        lambda: run(requests[0], torch.no_grad()), lambda: run(requests[1], torch.inference_mode())
    )
    assert batcher.served().batches == {1: 4}
    assert [output.is_inference() for output in (*outside, *inside)] == [False, False, True, True]


def test_steps_with_lora_weights_run_by_themselves() -> None:
    """Each with its own: the code of batches has nobody's."""
    sample, steps = models.plain_dit(predictors.LAYERS), predictors.STEPS
    other = {name: Adapter(adapter.down, -adapter.up) for name, adapter in predictors.lora().items()}
    policies = [TokenCache(each, ratio=0.6) for each in (predictors.adapted(), predictors.adapted(other))]
    requests = [(policy, steps, 11) for policy in policies]
    batcher = batcher_of(sample, patience=0.2)
    outputs = served(batcher, sample, requests)
    for request, found in zip(requests, outputs, strict=True):
        for ours, theirs in zip(found, alone(sample, *request), strict=True):
            torch.testing.assert_close(ours, theirs, **CLOSE)
    assert not torch.allclose(outputs[0][-2], outputs[1][-2], atol=1e-3)
    done = batcher.served()
    assert done.batches[1] >= done.steps["mixed"] == 6


class ScalarTime(PlainDiT):
    """Takes one timestep, of any shape."""

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        return super().condition(t.reshape(-1).expand(len(y)), y)


def test_a_timestep_for_all_rows_becomes_one_for_each() -> None:
    sample = models.plain_dit(layers=2)
    sample = Sample(redraw(ScalarTime(layers=2)), sample.inputs | {"t": torch.tensor(500)})
    batcher = batcher_of(sample)
    outputs = served(batcher, sample, [("fora", 4, 1), ("fora", 4, 2), ("fora", 4, 3)])
    assert max(batcher.served().batches) > 1
    for seed, ours in zip((1, 2, 3), outputs, strict=True):
        torch.testing.assert_close(ours, alone(sample, "fora", 4, seed), **CLOSE)


class OneTime(PlainDiT):
    """Takes one timestep for all rows, and no other."""

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        return super().condition(t[None] if t.ndim == 0 else t[None, None], y)


class NormalisesBatch(PlainDiT):
    """Rows depend on the mean of the batch."""

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        c = super().condition(t, y)
        return c - c.mean(0, keepdim=True)


class CountsRows(PlainDiT):
    """Rows depend on their place in the batch."""

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        return super().condition(t, y) + torch.arange(len(y))[:, None]


@pytest.mark.parametrize(
    ("model", "inputs", "why"),
    [
        (OneTime, {"t": torch.tensor(500)}, "takes one timestep for all rows"),
        (NormalisesBatch, {}, "aten.mean.dim combines all samples"),
        (CountsRows, {}, "aten.arange.default depends on the size of the batch"),
    ],
)
@pytest.mark.sampled
def test_a_model_whose_rows_depend_on_each_other_is_refused_by_name(
    model: type[nn.Module], inputs: dict[str, Any], why: str
) -> None:
    sample = Sample(redraw(model(layers=2)), models.plain_dit(layers=2).inputs | inputs)
    batcher = batcher_of(sample)
    jobs = [lambda seed=seed: served(batcher, sample, [("none", 2, seed)])[0] for seed in (1, 2)]
    found = at_once(*jobs)
    assert all(isinstance(error, errors.CannotBatch) for error in found), found
    assert why in str(found[0])
    assert batcher.served().cache_bytes == batcher.served().reserved_bytes == 0


def test_policies_share_code() -> None:
    sample = models.plain_dit(layers=2)
    batcher = batcher_of(sample)
    served(batcher, sample, [("fora", 4, 1), ("fora", 4, 2)])
    before = batcher.served().captures
    served(batcher, sample, [(dicompile.FORA(interval=2), 6, 1), (dicompile.FORA(interval=4), 6, 2)])
    assert batcher.served().captures == before == 1


@pytest.mark.parametrize("fails", [False, True])
def test_warming_up_runs_a_batch_of_every_size(fails: bool) -> None:
    sample = models.plain_dit(layers=2)
    batcher = batcher_of(sample, patience=0.0)

    def opened(number: int) -> Callable[[], None]:
        request = batcher.request("fora", schedule=models.timesteps(3))

        def run() -> None:
            with request:
                models.run(request.model, sample.inputs, models.timesteps(3), number)
                if fails:
                    raise ValueError("no picture")

        return run

    with pytest.raises(ValueError, match="no picture") if fails else contextlib.nullcontext():
        batcher.warm_up(opened)
    done = batcher.served()
    assert done.batches == ({1: 3} if fails else {1: 3, 2: 3})
    assert (done.captures, done.open, batcher.turns.patience) == (0 if fails else 1, 0, 0.0)


def held_request(batcher: Batcher, sample: Sample, **options: Any) -> Any:
    """A request in the middle of its run."""
    request = batcher.request("fora", schedule=models.timesteps(4), **options)
    models.call(request.model, sample.inputs, models.timesteps(4)[0], 0)
    assert request.session.cache_bytes > 0
    return request


def test_cancelling_releases_what_it_remembers_at_once() -> None:
    sample = models.plain_dit(layers=2)
    batcher = batcher_of(sample)
    request = held_request(batcher, sample)
    request.cancel()
    done = batcher.served()
    assert (done.open, done.cancelled, done.cache_bytes, done.reserved_bytes) == (0, 1, 0, 0)
    with pytest.raises(errors.RequestEnded, match="cancelled"):
        models.call(request.model, sample.inputs, 750, 0)


def test_a_call_that_waits_stops_when_its_request_is_cancelled() -> None:
    sample = models.plain_dit(layers=2)
    batcher = batcher_of(sample)
    with held_request(batcher, sample) as request, batcher.request("fora", schedule=4):  # one that never calls

        def cancel_when_it_waits() -> None:
            while not batcher.served().waiting:
                time.sleep(0.001)
            request.cancel()

        error, _ = at_once(lambda: models.call(request.model, sample.inputs, 749, 1), cancel_when_it_waits)
        assert type(error) is errors.RequestEnded
        assert batcher.served().cache_bytes == 0 == batcher.served().waiting


def test_a_request_that_takes_too_long_releases_what_it_remembers() -> None:
    sample = models.plain_dit(layers=2)
    batcher = batcher_of(sample)
    warm = held_request(batcher, sample)  # captures
    warm.close()
    request = batcher.request("fora", schedule=models.timesteps(4), timeout=0.3)
    ended = threading.Event()
    while batcher.served().open and not ended.wait(0.01):
        pass
    assert batcher.served().timed_out == 1
    with pytest.raises(errors.RequestTimedOut, match=r"longer than 0\.3 s"):
        models.call(request.model, sample.inputs, 999, 0)


def test_who_does_not_fit_waits() -> None:
    sample = models.plain_dit(layers=2)
    bytes_ = models.optimized(sample, "fora", 4)
    models.call(bytes_, sample.inputs, 999, 0)
    limit = dicompile.plan_of(bytes_).cache_bytes
    batcher = batcher_of(sample, max_cache_bytes=limit, patience=0.01)
    outputs = at_once(*[lambda seed=seed: served(batcher, sample, [("fora", 4, seed)])[0] for seed in (1, 2, 3)])
    for seed, ours in zip((1, 2, 3), outputs, strict=True):
        torch.testing.assert_close(ours, alone(sample, "fora", 4, seed), **CLOSE)
    assert batcher.served().most_reserved_bytes == limit
    small = batcher_of(sample, max_cache_bytes=limit - 1)
    with pytest.raises(errors.CacheTooLarge), small.request("fora", schedule=models.timesteps(4)) as request:
        models.call(request.model, sample.inputs, 999, 0)


def test_nobody_waits_for_a_request_that_has_no_memory_yet() -> None:
    sample = models.plain_dit(layers=2)
    batcher = batcher_of(sample)
    with held_request(batcher, sample) as request:
        batcher.budget.limit = batcher.budget.taken
        other = batcher.request("fora", schedule=models.timesteps(4))

        def go_on_when_it_waits() -> None:
            while not batcher.served().queued:
                time.sleep(0.001)
            start = time.monotonic()
            models.call(request.model, sample.inputs, models.timesteps(4)[1], 1)
            waited = time.monotonic() - start
            other.cancel()
            assert waited < PATIENCE

        error, none = at_once(lambda: models.call(other.model, sample.inputs, 999, 2), go_on_when_it_waits)
        assert type(error) is errors.RequestEnded
        assert none is None


def test_autocast_and_weights_that_hooks_move_are_refused_by_name() -> None:
    sample = models.plain_dit(layers=2)
    with (
        batcher_of(sample).request("fora", schedule=models.timesteps(4)) as request,
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(errors.CannotBatch, match="autocast is on"),
    ):
        models.call(request.model, sample.inputs, 999, 0)
    sample.model._hf_hook = object()
    with pytest.raises(errors.UnsupportedModel, match="moved by hooks"):
        batcher_of(sample)


def test_calls_of_a_step_that_were_not_announced_are_refused() -> None:
    sample = models.plain_dit(layers=2)
    batcher = batcher_of(sample)
    with batcher.request("fora", schedule=models.timesteps(4)) as request:
        models.call(request.model, sample.inputs, 999, 0)
        with pytest.raises(errors.CacheTooLarge, match="contexts=2"):
            models.call(request.model, sample.inputs | {"y": torch.tensor([3, 4, 5, 6])}, 999, 0)


def test_a_pipeline_is_called_as_ever() -> None:
    sampler = pipes.dit()
    batcher = Batcher(sampler.pipe.transformer, backend="eager", patience=0.05, sizes=(1, 2))

    def generate(seed: int) -> Tensor:
        with batcher.pipeline(sampler.pipe, "fora") as pipe:
            return pipes.Sampler(pipe, sampler.options)(steps=4 + seed, seed=seed)

    pictures = at_once(*[lambda seed=seed: generate(seed) for seed in (1, 2, 3)])
    assert type(sampler.pipe.transformer) is not dicompile.CachedModel
    pipe = dicompile.optimize(sampler.pipe, "fora", backend="eager")
    for seed, picture in zip((1, 2, 3), pictures, strict=True):
        torch.testing.assert_close(picture, pipes.Sampler(pipe, sampler.options)(steps=4 + seed, seed=seed), **CLOSE)
    assert 2 in batcher.served().batches
