"""Guidance reuse beside the hook of diffusers for FasterCache, and whatever programs may do between two halves."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers import FasterCacheConfig
from diffusers.hooks import apply_faster_cache
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import dicompile
from dicompile.backend import read_options
from dicompile.errors import CannotBatch, InvalidPolicy, InvalidSetting, PolicyDoesNotFit
from dicompile.passes.low_band import low_part
from dicompile.plan import Cadence, Gate, LowBand, Policy, Reuse, Rule, WeightedBands
from dicompile.serve import Batcher
from tests import models
from tests.models import Sample, optimized, timesteps

pytestmark = pytest.mark.usefixtures("own_session")

STEPS = 11
TIMES = timesteps(STEPS)
HALVES = ("cond", "uncond")
FULL = [step for step in range(STEPS) if TIMES[step] >= 641 or step % 5 == 0]


@pytest.fixture(scope="module")
def sample() -> Sample:
    torch.manual_seed(0)
    found = models.sd3(2)
    inputs = {name: value[:1] if isinstance(value, Tensor) else value for name, value in found.inputs.items()}
    return Sample(found.model, inputs)


@pytest.fixture(scope="module")
def model(sample: Sample) -> Any:
    """One for all tests, each of which has a session of its own."""
    return optimized(sample, dicompile.GuidanceReuse(), STEPS)


@pytest.fixture(scope="module")
def texts(sample: Sample) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: {
            key: torch.randn(sample.inputs[key].shape, generator=generator)
            for key in ("encoder_hidden_states", "pooled_projections")
        }
        for name in HALVES
    }


def latents(seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    start, end = (torch.randn(1, 4, 16, 16, generator=generator) for _ in range(2))
    return [start + (end - start) * step / STEPS for step in range(STEPS)]


def call(
    model: nn.Module, sample: Sample, text: dict[str, Tensor], step: int, latent: Tensor, name: str = ""
) -> Tensor:
    inputs = sample.inputs | text | {"hidden_states": latent, "timestep": torch.full((1,), TIMES[step])}
    with torch.no_grad(), dicompile.cache_context(name) if name else contextlib.nullcontext():
        return model(**inputs)[0]


def kinds(model: nn.Module) -> list[str]:
    return [found.kind for found in dicompile.report(model).calls]


@pytest.mark.filterwarnings("ignore:torch.meshgrid")  # of theirs
@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (1.1, 1.1), (0.5, 1.5)])
def test_it_reuses_what_the_hook_of_diffusers_reuses(
    sample: Sample, texts: dict[str, dict[str, Tensor]], low: float, high: float
) -> None:
    """Theirs has both halves in one batch, and runs half of it."""
    model = optimized(sample, dicompile.GuidanceReuse(low=low, high=high), STEPS)
    peer, now = copy.deepcopy(sample.model), [0]
    config = FasterCacheConfig(
        spatial_attention_block_skip_range=None,  # type: ignore[arg-type]
        alpha_low_frequency=low,
        alpha_high_frequency=high,
        tensor_format="BCHW",
        current_timestep_callback=lambda: TIMES[now[0]],
        attention_weight_callback=lambda _: 0.5,
        _unconditional_conditional_input_kwargs_identifiers=[
            "hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"
        ],
    )  # fmt: skip
    apply_faster_cache(peer, config)
    batches: list[int] = []
    peer.transformer_blocks[0].register_forward_pre_hook(
        lambda _, args, kwargs: batches.append(kwargs["hidden_states"].shape[0]), with_kwargs=True
    )
    both = {key: torch.cat([texts[name][key] for name in reversed(HALVES)]) for key in texts["cond"]}
    for step, latent in enumerate(latents()):
        now[0] = step
        found = {name: call(model, sample, texts[name], step, latent, name) for name in HALVES}
        with torch.no_grad():
            inputs = sample.inputs | both | {
                "hidden_states": latent.repeat(2, 1, 1, 1), "timestep": torch.full((2,), TIMES[step])
            }  # fmt: skip
            uncond, cond = peer(**inputs)[0].chunk(2)
        torch.testing.assert_close(found["cond"], cond, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["uncond"], uncond, rtol=1e-4, atol=1e-5)
    assert [step for step, count in enumerate(batches) if count == 2] == FULL
    assert kinds(model)[0::2] == ["full"] * STEPS
    assert [step for step, kind in enumerate(kinds(model)[1::2]) if kind == "full"] == FULL
    assert "the gate recalled at 5 of 10 steps" in str(dicompile.report(model))


def call_both(
    model: nn.Module,
    sample: Sample,
    texts: dict[str, dict[str, Tensor]],
    order: Sequence[str],
    step: int,
    latent: Tensor,
) -> dict[str, Tensor]:
    """What one call with both halves returns, by half."""
    text = {key: torch.cat([texts[name][key] for name in order]) for key in texts["cond"]}
    inputs = sample.inputs | text | {
        "hidden_states": torch.cat([latent] * 2), "timestep": torch.full((2,), TIMES[step])
    }  # fmt: skip
    with torch.no_grad():
        return dict(zip(order, model(**inputs)[0].chunk(2), strict=True))


@pytest.fixture(scope="module", params=["uncond-cond", "cond-uncond"])
def together(request: pytest.FixtureRequest, sample: Sample) -> tuple[Any, list[str]]:
    """A model that has both halves in one batch, and their order."""
    return optimized(sample, dicompile.GuidanceReuse(halves=request.param), STEPS), request.param.split("-")


def test_both_halves_in_one_batch_are_what_they_are_one_by_one(
    model: Any, sample: Sample, texts: dict[str, dict[str, Tensor]], together: tuple[Any, list[str]]
) -> None:
    """The same decisions, and half of the work at steps that recall; `prepare` knows that their batch is half."""
    both, order = together
    with dicompile.session():
        call_both(both, sample, texts, order, 0, latents()[0])
    dicompile.prepare(both)
    made = [len(frame.programs.variants.variants) for frame in models.frames_of(both)]
    flops = []
    for step, latent in enumerate(latents()):
        with FlopCounterMode(display=False) as counter:
            found = call_both(both, sample, texts, order, step, latent)
        flops.append(counter.get_total_flops())
        for name in HALVES:
            expected = call(model, sample, texts[name], step, latent, name)
            torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-5)
    assert [step for step, kind in enumerate(kinds(both)) if kind == "full"] == FULL
    assert flops == [flops[0] if step in FULL else flops[0] // 2 for step in range(STEPS)]
    assert sorted(len(frame.programs.variants.variants) for frame in models.frames_of(both)) == sorted(made)
    plan, report = dicompile.plan_of(both), dicompile.report(both)
    assert sum(flops) / flops[0] / STEPS == pytest.approx(plan.flops / plan.baseline_flops)
    assert (report.peak_cache_bytes, report.cache_bytes) == (plan.cache_bytes, 0)
    assert f"where a batch has the same latents in both halves ({'-'.join(order)})" in str(plan)


WEIGHTED = {"low": 1.3, "high": 0.7}


def test_weights_of_frequencies_are_those_of_every_step_since_the_last_full_one(
    sample: Sample, texts: dict[str, dict[str, Tensor]]
) -> None:
    """Both halves in one batch, at all timesteps; at step 6 the latents differ, and the count begins anew."""
    bands = WeightedBands(**WEIGHTED, low_between=(-1, 1001), high_between=(-1, 1001))
    policy = dicompile.GuidanceReuse(timesteps=(-1, 1001), halves="cond-uncond", **WEIGHTED)
    policy = policy.model_copy(update={"rules": (Rule(sites=("model",), do=bands),)})
    model, difference, since = optimized(sample, policy, STEPS), torch.zeros(()), 0
    for step, latent in enumerate(latents()):
        text = {key: torch.cat([texts[name][key] for name in HALVES]) for key in texts["cond"]}
        two = torch.cat([latent, latent + 1 if step == 6 else latent])
        inputs = sample.inputs | text | {"hidden_states": two, "timestep": torch.full((2,), TIMES[step])}
        with torch.no_grad():
            cond, uncond = sample.model(**inputs)[0].chunk(2)
            found = model(**inputs)[0].chunk(2)
        torch.testing.assert_close(found[0], cond, rtol=1e-4, atol=1e-5)
        if step in (0, 5, 6, 7, 10):  # at 6 there is no difference to store, and so none to recall at 7
            difference, since = uncond - cond, 0
        else:
            since += 1
            low = low_part(difference, LowBand("fft2", 0.2), (0, 0))
            uncond = cond + WEIGHTED["low"] ** since * low + WEIGHTED["high"] ** since * (difference - low)
        torch.testing.assert_close(found[1], uncond, rtol=1e-4, atol=1e-5, msg=f"step {step}")


def test_weights_of_one_step_do_not_compound_if_told(sample: Sample, texts: dict[str, dict[str, Tensor]]) -> None:
    bands = WeightedBands(low=2.0, high=2.0, low_between=(-1, 1001), high_between=(-1, 1001), compound=False)
    policy = dicompile.GuidanceReuse(timesteps=(-1, 1001))
    model = optimized(sample, policy.model_copy(update={"rules": (Rule(sites=("model",), do=bands),)}), STEPS)
    found = run(model, sample, texts, [HALVES] * STEPS)
    difference = found["uncond"][0][2] - found["cond"][0][2]
    for step in (1, 2, 3, 4):
        expected = found["cond"][step][2] + 2 * difference
        torch.testing.assert_close(found["uncond"][step][2], expected, rtol=1e-4, atol=1e-5)


def test_frequencies_need_a_picture() -> None:
    flux = models.flux(1)
    model = optimized(flux, dicompile.GuidanceReuse(**WEIGHTED), STEPS)
    with pytest.raises(PolicyDoesNotFit, match=r"which this model does not allow\n.*\n.*has no height and width"):
        models.call(model, flux.inputs, TIMES[0], 1)


def test_weights_of_frequencies_need_timesteps(sample: Sample) -> None:
    gate = Gate(probe="partner", leads="cond")
    policy = Policy(
        name="x", cadence=Cadence(interval=2, gate=gate), rules=(Rule(sites=("model",), do=WeightedBands()),)
    )
    model = dicompile.optimize(sample.model, policy, schedule=4, backend="eager")
    with pytest.raises(PolicyDoesNotFit, match="weighs frequencies between timesteps 99 and 901, and no timesteps"):
        models.call(model, sample.inputs, TIMES[0], 1)


def test_halves_of_different_latents_are_computed(
    sample: Sample, texts: dict[str, dict[str, Tensor]], together: tuple[Any, list[str]]
) -> None:
    """Two pictures without guidance, say; and a difference that was taken from such a batch is not used."""
    both, order = together
    for step, latent in enumerate(latents()):
        text = {key: torch.cat([texts[name][key] for name in order]) for key in texts["cond"]}
        is_other = step in (5, 8)
        two = torch.cat([latent, latent + 1 if is_other else latent])
        inputs = sample.inputs | text | {"hidden_states": two, "timestep": torch.full((2,), TIMES[step])}
        with torch.no_grad():
            found = both(**inputs)[0]
            if is_other:
                torch.testing.assert_close(found, sample.model(**inputs)[0], rtol=1e-4, atol=1e-5)
    assert kinds(both)[4:] == ["recalled", "full", "full", "recalled", "full", "full", "full"]


def test_an_odd_number_of_rows_is_no_two_halves(
    sample: Sample, texts: dict[str, dict[str, Tensor]], together: tuple[Any, list[str]]
) -> None:
    with pytest.raises(CannotBatch, match=r"was called with 1 row, which are no two guidance halves"):
        call(together[0], sample, texts["cond"], 0, latents()[0])


def test_half_a_batch_is_refused_where_rows_cannot_be_apart() -> None:
    policy, sample = dicompile.GuidanceReuse(halves="cond-uncond"), models.plain_dit(1)
    with pytest.raises(CannotBatch, match=r"tells the rows of a request apart"):
        Batcher(sample.model).request(policy, schedule=TIMES)
    with pytest.raises(InvalidSetting, match=r"tells the rows of a batch apart, which the backend cannot"):
        read_options({"policy": policy.to_dict(), "steps": STEPS})


def run(
    model: nn.Module, sample: Sample, texts: dict[str, dict[str, Tensor]], order: Sequence[Sequence[str]]
) -> dict[str, list[tuple[int, str, Tensor]]]:
    """Steps with some calls each, in an order: what every half was, and returned."""
    found: dict[str, list[tuple[int, str, Tensor]]] = {name: [] for name in HALVES}
    for step, (latent, names) in enumerate(zip(latents(), order, strict=True)):
        for name in names:
            value = call(model, sample, texts[name], step, latent, name)
            found[name].append((step, dicompile.report(model).calls[-1].kind, value))
    return found


@pytest.mark.parametrize("case", ["the other one first", "alone", "without names"])
def test_without_a_partner_before_it_everything_is_computed(
    model: Any, sample: Sample, texts: dict[str, dict[str, Tensor]], case: str
) -> None:
    names = {"the other one first": HALVES[::-1], "alone": ("uncond",), "without names": HALVES}[case]
    for step, latent in enumerate(latents()):
        for name in names:
            found = call(model, sample, texts[name], step, latent, "" if case == "without names" else name)
            torch.testing.assert_close(found, call(sample.model, sample, texts[name], step, latent))
    assert set(kinds(model)) == {"full"}
    assert "was never applied" in str(dicompile.report(model))


def test_a_half_that_joins_late_computes_its_first_step(
    model: Any, sample: Sample, texts: dict[str, dict[str, Tensor]]
) -> None:
    found = run(model, sample, texts, [HALVES[: 1 + (step > 6)] for step in range(STEPS)])
    assert [kind for _, kind, _ in found["cond"]] == ["full"] * STEPS
    assert [kind for _, kind, _ in found["uncond"]] == ["full", "recalled", "recalled", "full"]
    step, _, value = found["uncond"][1]
    cond = {name: call(sample.model, sample, texts[name], 7, latents()[7]) for name in HALVES}
    expected = call(sample.model, sample, texts["cond"], step, latents()[step]) + cond["uncond"] - cond["cond"]
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


def test_a_half_that_joins_for_the_last_two_steps_computes_them(
    model: Any, sample: Sample, texts: dict[str, dict[str, Tensor]]
) -> None:
    """Nothing is left to decide then, and still the output is stored."""
    for step, latent in list(enumerate(latents()))[-2:]:
        for name in HALVES:
            with torch.no_grad():
                wanted = call(sample.model, sample, texts[name], step, latent)
            torch.testing.assert_close(call(model, sample, texts[name], step, latent, name), wanted)


def test_a_difference_that_was_taken_without_a_partner_is_not_used(
    model: Any, sample: Sample, texts: dict[str, dict[str, Tensor]]
) -> None:
    """At step 5 the halves come the other way round: there is no difference, so the next steps compute."""
    order = [HALVES[::-1] if step == 5 else HALVES for step in range(STEPS)]
    found = run(model, sample, texts, order)
    assert [kind for _, kind, _ in found["uncond"]] == [
        *["full"] * 4, "recalled", "full", "full", *["recalled"] * 3, "full",
    ]  # fmt: skip
    step, _, value = found["uncond"][7]
    before = {name: call(sample.model, sample, texts[name], 6, latents()[6]) for name in HALVES}
    expected = call(sample.model, sample, texts["cond"], step, latents()[step]) + before["uncond"] - before["cond"]
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


def test_a_partner_with_another_latent_is_none(model: Any, sample: Sample, texts: dict[str, dict[str, Tensor]]) -> None:
    for step, (one, other) in enumerate(zip(latents(1), latents(2), strict=True)):
        call(model, sample, texts["cond"], step, one, "cond")
        found = call(model, sample, texts["uncond"], step, other, "uncond")
        torch.testing.assert_close(found, call(sample.model, sample, texts["uncond"], step, other))
    assert set(kinds(model)) == {"full"}


def test_of_two_partners_with_one_latent_none_is_chosen(
    model: Any, sample: Sample, texts: dict[str, dict[str, Tensor]]
) -> None:
    """Two prompts for one picture, by regions: which of them the difference is to cannot be told."""
    region = {key: value.flip(-1) for key, value in texts["cond"].items()}
    for step, latent in enumerate(latents()):
        for text in (texts["cond"], region):
            call(model, sample, text, step, latent, "cond")
        found = call(model, sample, texts["uncond"], step, latent, "uncond")
        torch.testing.assert_close(found, call(sample.model, sample, texts["uncond"], step, latent))
    assert set(kinds(model)) == {"full"}


def test_two_pictures_in_turn_have_a_partner_each(
    model: Any, sample: Sample, texts: dict[str, dict[str, Tensor]]
) -> None:
    """Equal names and texts: the latent alone tells whose difference is whose."""
    expected: dict[int, list[Tensor]] = {}
    for seed in (1, 2):
        with dicompile.session():
            expected[seed] = [
                call(model, sample, texts[name], step, latent, name)
                for step, latent in enumerate(latents(seed)) for name in HALVES
            ]  # fmt: skip
    found: dict[int, list[Tensor]] = {1: [], 2: []}
    for step in range(STEPS):
        for name in HALVES:
            for seed in (1, 2):
                found[seed].append(call(model, sample, texts[name], step, latents(seed)[step], name))
    for seed in (1, 2):
        for ours, theirs in zip(found[seed], expected[seed], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert "recalled" in kinds(model)


def test_what_a_partner_returned_is_remembered_as_it_was(
    model: Any, sample: Sample, texts: dict[str, dict[str, Tensor]]
) -> None:
    found: dict[bool, list[Tensor]] = {}
    for is_written in (False, True):
        with dicompile.session():
            found[is_written] = []
            for step, latent in enumerate(latents()):
                for name in HALVES:
                    value = call(model, sample, texts[name], step, latent, name)
                    found[is_written].append(value.clone())
                    if is_written:
                        value.zero_()
    for ours, theirs in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_memory_is_that_of_the_plan_and_goes_back(
    model: Any, sample: Sample, texts: dict[str, dict[str, Tensor]]
) -> None:
    run(model, sample, texts, [HALVES] * STEPS)
    plan, report = dicompile.plan_of(model), dicompile.report(model)
    assert plan.cache_bytes == 2 * 4 * 16 * 16 * 4, "the difference, and what the half returned"
    assert (report.peak_cache_bytes, report.cache_bytes) == (2 * plan.cache_bytes, 0)
    assert "do this where the context 'cond', which computes every step, was called before, and else" in str(plan)
    assert [step.full is None for step in plan.steps] == [step in FULL for step in range(STEPS)]
    assert plan.baseline_flops == plan.most_flops
    assert 2 * STEPS * plan.flops == (STEPS + len(FULL)) * plan.baseline_flops, "both halves together"


def test_each_way_has_what_is_computed_outside_of_the_steps() -> None:
    torch.manual_seed(0)
    sample, steps = models.plain_dit(1), 4
    found, latent = dict[str, list[Tensor]](), torch.randn(4, 4, 16, 16)
    for hoist in ("off", "all"):
        model = optimized(sample, dicompile.GuidanceReuse(2, (-1, 2000)), steps, hoist=hoist)
        for time in timesteps(steps):
            for name, label in zip(HALVES, (1, 10), strict=True):
                with torch.no_grad(), dicompile.cache_context(name):
                    output = model(latent, torch.full((4,), time), torch.full((4,), label))
                found.setdefault(hoist, []).append(output)
        assert kinds(model)[1::2] == ["full", "recalled", "full", "full"]
    assert dicompile.report(model).hoisted_bytes > 0
    for ours, theirs in zip(found["all"], found["off"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_an_output_of_another_shape_is_refused() -> None:
    with pytest.raises(PolicyDoesNotFit, match=r"which this model's output does not allow"):
        other = models.pixart()
        optimized(other, dicompile.GuidanceReuse(), STEPS)(**other.inputs | {"timestep": torch.full((2,), 999)})


@pytest.mark.parametrize(
    ("gate", "rule", "why"),
    [
        (Gate(probe="partner", leads="cond"), Reuse(what="update"), "does not recall its difference to it"),
        (Gate(probe="latent", threshold=0.1), Reuse(what="difference"), "but waits for none"),
        (None, Reuse(what="difference"), "but waits for none"),
    ],
)
def test_gate_and_rule_belong_together(gate: Gate | None, rule: Reuse, why: str) -> None:
    with pytest.raises(InvalidPolicy, match=why):
        Policy(name="x", cadence=Cadence(gate=gate), rules=(Rule(sites=("model",), do=rule),))


@pytest.mark.parametrize("options", [{"probe": "partner"}, {"probe": "latent", "leads": "cond"}])
def test_a_name_is_for_gates_that_wait(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidPolicy, match="the name of a context is for gates that wait for a guidance partner"):
        Gate(threshold=0.1, **options)


def test_it_goes_to_text_and_back() -> None:
    for policy in (
        dicompile.GuidanceReuse(),
        dicompile.GuidanceReuse(halves="uncond-cond"),
        dicompile.GuidanceReuse(**WEIGHTED),
    ):
        assert Policy.from_yaml(policy.to_yaml()) == policy
