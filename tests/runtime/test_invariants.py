"""What is computed outside of the steps: the same results as without, whatever happens to what it is made of."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dicompile
from dicompile.errors import InvalidSetting
from dicompile.lower import CHUNK, inductor
from dicompile.plan import TimestepSchedule
from dicompile.runtime import execute, invariants
from dicompile.runtime.invariants import MOST_TABLES, MOST_WRONG, RESTS, _times_of_chunk
from tests.models import MODELS, call, dit, optimized, pixart, plain_dit, run, state_of, timesteps

STEPS = 20
SCHEDULE = timesteps(STEPS)
ROUNDING = 1e-5
Change = Callable[[nn.Module, dict[str, Any]], None]


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten.addmm, torch.ops.aten.mm, torch.ops.aten.linear)
        return func(*args, **(kwargs or {}))


def products(model: Any, inputs: dict[str, Any], step: int) -> int:
    with Products() as counting:
        call(model, inputs, SCHEDULE[step], step)
    return counting.count


def close(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=ROUNDING, atol=ROUNDING) for a, b in zip(first, second, strict=True))


def tables(model: Any) -> list[Any]:
    return [table for kept in state_of(model).tables.values() for table in kept.tables]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("policy", ["none", "fora", "toca"])
@pytest.mark.sampled
def test_results_are_those_of_steps_that_compute_everything(name: str, policy: str) -> None:
    sample = MODELS[name]()
    expected = run(optimized(sample, policy, STEPS), sample.inputs, SCHEDULE)
    conditioned = optimized(sample, policy, STEPS, hoist="conditioning")
    assert all(map(torch.equal, run(conditioned, sample.inputs, SCHEDULE), expected))
    model = optimized(sample, policy, STEPS, hoist="all")
    first = run(model, sample.inputs, SCHEDULE)
    others = sum(not close([one], [other]) for one, other in zip(first, expected, strict=True))
    assert others <= (policy == "toca")  # of two tokens that score alike, rounding may choose the other one
    assert all(map(torch.equal, run(model, sample.inputs, SCHEDULE), first))


class Crossed(nn.Module):
    """Two products of one shape: of one the text comes before the weight among the inputs, of the other after it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.randn(16, 16) / 4) for _ in range(2))
        self.up = nn.Linear(16, 16)

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, other: Tensor) -> Tensor:
        x = x + text.mean()
        keys = text @ self.first
        x = x + self.up(x @ self.second) * torch.sin(timestep)[:, None, None]
        return x + self.up(x * keys) + self.up(x * (other @ self.second))


def test_values_of_one_structure_take_their_inputs_in_one_order() -> None:
    torch.manual_seed(0)
    module = Crossed().eval()
    inputs = {name: torch.randn(16, 16) for name in ("text", "other")}
    results = []
    for hoist in ("off", "all"):
        model = dicompile.optimize(module, "none", schedule=SCHEDULE, backend="eager", hoist=hoist)
        with torch.no_grad():
            results.append(model(x=torch.ones(2, 16, 16), timestep=torch.full((2,), float(SCHEDULE[0])), **inputs))
        if hoist == "all":
            assert len(dicompile.structure_of(model).invariants) == 2
    torch.testing.assert_close(*results, rtol=ROUNDING, atol=ROUNDING)


def test_modulation_of_sixteen_steps_is_computed_at_once() -> None:
    sample = dit(layers=3)
    model, plain = optimized(sample, "none", STEPS, hoist="all"), optimized(sample, "none", STEPS)
    run(model, sample.inputs, SCHEDULE)
    run(plain, sample.inputs, SCHEDULE)
    counts = [products(model, sample.inputs, step) for step in range(STEPS)]
    whole, timed = products(plain, sample.inputs, 0), 3 * 3 + 3
    assert counts == [whole if step % 16 == 0 else whole - timed for step in range(STEPS)]


def test_keys_of_the_text_are_computed_once_for_every_conditioning() -> None:
    sample = pixart(layers=3)
    other = {**sample.inputs, "encoder_hidden_states": torch.randn_like(sample.inputs["encoder_hidden_states"])}
    model, plain = optimized(sample, "fora", STEPS, hoist="conditioning"), optimized(sample, "fora", STEPS)
    for _ in range(2):  # the second generation captures nothing, so that only its own products are counted
        counts = []
        for step, t in enumerate(SCHEDULE[:4]):
            for inputs in (sample.inputs, other):
                with Products() as counting:
                    found = call(model, inputs, t, step)
                with Products() as whole:
                    assert torch.equal(found, call(plain, inputs, t, step))
                counts.append(whole.count - counting.count)
        assert len(tables(model)) == 2
    kinds = [step.kind for step in dicompile.plan_of(model).steps[:4] for _ in range(2)]
    # Steps that reuse attention read neither keys nor text, so that there is nothing to save.
    assert counts[:2] == [0, 0]
    assert counts[2:] == [8 if kind == "full" else 0 for kind in kinds[2:]]
    assert {8, 0} <= set(counts[2:])


def edit(model: nn.Module, _: dict[str, Any]) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)


def edit_data(model: nn.Module, _: dict[str, Any]) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(1.5)


def swap_data(model: nn.Module, _: dict[str, Any]) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.5


def swap(model: nn.Module, _: dict[str, Any]) -> None:
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach() * 1.5))


def edit_text(_: nn.Module, inputs: dict[str, Any]) -> None:
    inputs["encoder_hidden_states"].mul_(1.5)


def edit_a_number(_: nn.Module, inputs: dict[str, Any]) -> None:
    inputs["encoder_hidden_states"][0, 5, 3] += 20.0


def swap_text(_: nn.Module, inputs: dict[str, Any]) -> None:
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"] * 1.5


@pytest.mark.parametrize("change", [edit, edit_data, swap_data, swap, edit_text, edit_a_number, swap_text])
@pytest.mark.parametrize("policy", ["none", "fora"])
@pytest.mark.sampled
def test_what_changes_in_the_middle_of_a_generation_counts_from_then_on(policy: str, change: Change) -> None:
    results = []
    for hoist in ("off", "all"):
        torch.manual_seed(0)
        sample = pixart(layers=2)
        model, inputs = optimized(sample, policy, STEPS, hoist=hoist), sample.inputs
        before = [call(model, inputs, t, step) for step, t in enumerate(SCHEDULE[:9])]
        change(sample.model, inputs)
        results.append(before + [call(model, inputs, t, 9 + step) for step, t in enumerate(SCHEDULE[9:])])
    assert close(*results)


def test_conditioning_that_is_made_anew_with_equal_values_is_the_same() -> None:
    sample = pixart(layers=2)
    model = optimized(sample, "none", STEPS, hoist="all")
    for step, t in enumerate(SCHEDULE[:3]):
        call(model, {**sample.inputs, "encoder_hidden_states": sample.inputs["encoder_hidden_states"].clone()}, t, step)
    assert len(tables(model)) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_timesteps_of_later_steps_are_told_from_the_schedule(dtype: torch.dtype) -> None:
    schedule = TimestepSchedule.of(SCHEDULE)
    times = torch.tensor(SCHEDULE, dtype=torch.float32)
    functions = [lambda t: t.to(dtype), lambda t: t.to(dtype) / 1000, lambda t: 1 - t.to(dtype) / 1000]
    for function in functions[: 3 if dtype.is_floating_point else 1]:
        given = function(times)
        found = _times_of_chunk(given[17].expand(2), schedule, 17)
        assert found is not None
        assert torch.equal(found[:4], given[16:, None].expand(4, 2))
    assert _times_of_chunk((times[17] ** 2).to(dtype), schedule, 17) is None
    assert _times_of_chunk(times[17].to(dtype), TimestepSchedule.of(STEPS), 17) is None


def test_another_function_of_the_timestep_is_computed_at_every_step() -> None:
    sample = MODELS["sd3"]()
    found = []
    for hoist in ("off", "all"):
        model = dicompile.optimize(sample.model, "none", schedule=STEPS, mode="eager", hoist=hoist)
        found.append(run(model, sample.inputs, SCHEDULE))
    assert all(map(torch.equal, *found))


def test_a_row_counts_only_for_the_very_timestep() -> None:
    """A sampler may be a little off its schedule, so little that the step is the same."""
    sample = plain_dit(layers=2)
    results = []
    for hoist in ("off", "all"):
        model = optimized(sample, "none", STEPS, hoist=hoist)
        with torch.no_grad():
            for step, t in enumerate(SCHEDULE[:4]):
                time = torch.full((4,), t + 0.3 * (step == 2))
                results.append(model(**{**sample.inputs, "t": time}))
    assert close(results[:4], results[4:])


class Watch:
    """Counts runs of programs, and doubts, call by call, as if the CPU were an accelerator."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs, self.doubts, own = 0, 0, execute.run_calls

        def run_calls(*arguments: Any, **options: Any) -> None:
            self.runs += 1
            own(*arguments, **options)

        class Counted(invariants.Doubt):
            def __init__(watched, *arguments: Any) -> None:  # noqa: N805 - self is the watch
                self.doubts += 1
                super().__init__(*arguments)

        monkeypatch.setattr(execute, "run_calls", run_calls)
        monkeypatch.setattr(invariants, "Doubt", Counted)
        monkeypatch.setattr(invariants, "_is_waited_for", lambda tensor: True)

    def take(self) -> tuple[int, int]:
        """Runs and doubts since the last time."""
        taken, self.runs, self.doubts = (self.runs, self.doubts), 0, 0
        return taken


def test_an_accelerator_runs_a_step_before_its_timestep_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = dit(layers=2)
    expected = run(optimized(sample, "fora", STEPS, hoist="all"), sample.inputs, SCHEDULE)
    watch, found, counts = Watch(monkeypatch), [], []
    model = optimized(sample, "fora", STEPS, hoist="all")
    for step, t in enumerate(SCHEDULE):
        found.append(call(model, sample.inputs, t, step))
        counts.append(watch.take())
    assert all(map(torch.equal, found, expected))
    kinds = [step.kind for step in dicompile.plan_of(model).steps] + ["full"]
    frees = [here == "reuse" != after for here, after in itertools.pairwise(kinds)]
    assert 0 < sum(frees) < kinds.count("reuse")
    # The first step of a chunk has to be compared to know the others; one that frees slots is not run twice.
    assert counts == [(1, int(step % CHUNK != 0 and not frees[step])) for step in range(STEPS)]


def test_where_only_conditioning_is_hoisted_no_timestep_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    sample, asked = pixart(layers=2), []
    monkeypatch.setattr(invariants, "_is_waited_for", asked.append)
    monkeypatch.setattr(invariants, "_times_of_chunk", lambda *arguments: asked.append(arguments))
    run(optimized(sample, "fora", STEPS, hoist="conditioning"), sample.inputs, SCHEDULE)
    assert asked == []


@pytest.mark.parametrize("policy", ["none", "fora", "toca"])
def test_a_step_runs_again_where_another_timestep_came_than_was_foretold(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, results, runs = Watch(monkeypatch), [], []
    sample = plain_dit(layers=2)
    off_by = dict.fromkeys((2, 4, 5, 7, 8, 10, STEPS - 1), 0.3)
    for hoist in ("off", "all"):
        model = optimized(sample, policy, STEPS, hoist=hoist)
        with torch.no_grad():
            for step, t in enumerate(SCHEDULE):
                results.append(model(**{**sample.inputs, "t": torch.full((4,), t + off_by.get(step, 0.0))}))
                runs.append(watch.take())
    assert close(results[:STEPS], results[STEPS:])
    assert {run for run, _ in runs[:STEPS]} == {1}
    twice = [step for step, (run, doubts) in enumerate(runs[STEPS:]) if run == 2]
    assert len(twice) == MOST_WRONG
    assert set(twice) <= set(off_by)
    assert not any(doubts for _, doubts in runs[STEPS + twice[-1] + 1 :])
    assert tables(model) == []


def test_a_gate_watches_what_the_timestep_that_came_leads_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one was foretold, and what is watched had been computed with that."""
    watch, results, drifts = Watch(monkeypatch), [], []
    sample, policy = plain_dit(layers=3), dicompile.FirstBlockCache(threshold=0.5)
    for hoist in ("off", "all"):
        model = optimized(sample, policy, STEPS, hoist=hoist)
        with torch.no_grad():
            for step, t in enumerate(SCHEDULE):
                time = torch.full((4,), t + 0.3 * (step in (2, 5)))
                results.append(model(**{**sample.inputs, "t": time}))
        drifts.append([decision.drift for decision in dicompile.report(model).decisions])
    assert watch.doubts > 0
    assert close(results[:STEPS], results[STEPS:])
    assert drifts[0] == pytest.approx(drifts[1], rel=1e-4)


def test_conditioning_that_is_never_the_same_is_not_computed_ahead_on_an_accelerator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Equal values could be found only by waiting for it."""
    monkeypatch.setattr(invariants, "_is_same", lambda before, now: False)
    sample = pixart(layers=2)
    model = optimized(sample, "none", STEPS, hoist="all")
    text = sample.inputs["encoder_hidden_states"]
    for step, t in enumerate(SCHEDULE[:4]):
        call(model, {**sample.inputs, "encoder_hidden_states": text.clone()}, t, step)
        assert [bool(table.chunks) for table in tables(model)] == [True, False, False, False][
            max(step - 2, 0) : step + 1
        ]


def test_samples_at_different_timesteps() -> None:
    sample = dit(layers=2)
    inputs = {**sample.inputs, "timestep": torch.tensor([999, 500, 999, 500])}
    with torch.no_grad():
        expected = sample.model(**inputs)[0]
        found = optimized(sample, "fora", STEPS, hoist="all")(**inputs)[0]
    torch.testing.assert_close(found, expected, rtol=ROUNDING, atol=ROUNDING)


def test_inference_mode_keeps_nothing_of_what_counts_no_version() -> None:
    sample = pixart(layers=2)
    model = optimized(sample, "none", STEPS, hoist="all")
    with torch.inference_mode():
        text = sample.inputs["encoder_hidden_states"].clone()
        inputs = {**sample.inputs, "encoder_hidden_states": text}
        call(model, inputs, SCHEDULE[0], 0)
        text.mul_(1.5)
        found = call(model, inputs, SCHEDULE[1], 1)
        expected = call(sample.model, inputs, SCHEDULE[1], 1)
    torch.testing.assert_close(found, expected, rtol=ROUNDING, atol=ROUNDING)
    assert tables(model) == []


def test_nothing_is_held_after_the_last_step_or_an_error() -> None:
    sample = pixart(layers=2)
    model = optimized(sample, "fora", STEPS, hoist="all")
    for step, t in enumerate(SCHEDULE[:-1]):
        call(model, sample.inputs, t, step)
        assert len(tables(model)) == 1
    assert sum(table.bytes for table in tables(model)) == dicompile.report(model).hoisted_bytes > 0
    call(model, sample.inputs, SCHEDULE[-1], STEPS)
    assert tables(model) == []
    call(model, sample.inputs, SCHEDULE[0], 0)
    dicompile.free(model)
    assert tables(model) == []


def test_windows_share_a_table_to_the_last_one() -> None:
    sample = pixart(layers=2)
    model = optimized(sample, "none", STEPS, hoist="all")
    for step, t in enumerate(SCHEDULE):
        for window in range(3):
            call(model, sample.inputs, t, 3 * step + window)
            assert len(tables(model)) == int((step, window) != (STEPS - 1, 2))


def test_where_conditioning_is_ever_another_nothing_is_computed_ahead() -> None:
    sample = pixart(layers=2)
    model, plain = (optimized(sample, "none", STEPS, hoist=hoist) for hoist in ("all", "off"))
    for number in range(2 * MOST_TABLES):
        inputs = {**sample.inputs, "encoder_hidden_states": torch.randn_like(sample.inputs["encoder_hidden_states"])}
        found, expected = (call(each, inputs, SCHEDULE[0], number) for each in (model, plain))
        torch.testing.assert_close(found, expected, rtol=ROUNDING, atol=ROUNDING)
    assert len(tables(model)) == MOST_TABLES
    assert [bool(table.chunks) for table in tables(model)] == [False] * MOST_TABLES


def test_conditioning_that_has_changed_is_not_held_to_the_end() -> None:
    sample = pixart(layers=2)
    model = optimized(sample, "none", STEPS, hoist="all")
    for step, t in enumerate(SCHEDULE[:8]):
        text = torch.randn_like(sample.inputs["encoder_hidden_states"])
        call(model, {**sample.inputs, "encoder_hidden_states": text}, t, step)
        assert len(tables(model)) == min(step, RESTS) + 1


def test_a_budget_hoists_nothing_that_nobody_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "_compiled", lambda graph_module, *_: graph_module.forward)
    sample = pixart(layers=2)
    model = optimized(sample, "fora", STEPS, mode="inductor", max_cache_bytes="1MiB")
    call(model, sample.inputs, SCHEDULE[0], 0)
    assert tables(model) == []


def test_there_is_no_other_way_to_hoist() -> None:
    with pytest.raises(InvalidSetting, match="use one of: off, conditioning, all"):
        dicompile.optimize(dit().model, "none", hoist="everything")
