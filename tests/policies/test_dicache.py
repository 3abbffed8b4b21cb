"""DiCache beside its rule written out on the blocks of a tiny FLUX: equal decisions, and outputs within 1e-4."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dicompile
from dicompile.errors import InvalidPolicy, PolicyDoesNotFit
from dicompile.plan import Aligned, Cadence, Gate, Policy, Rule
from tests import models
from tests.models import Sample, optimized, timesteps

STEPS = 14
TIMES = timesteps(STEPS)


@pytest.fixture(scope="module")
def sample() -> Sample:
    torch.manual_seed(0)
    return models.flux()


def latents(sample: Sample) -> list[Tensor]:
    """A trajectory that goes on slowly, then fast."""
    generator = torch.Generator().manual_seed(1)
    shape = sample.inputs["hidden_states"].shape
    start, end = (torch.randn(shape, generator=generator) for _ in range(2))
    return [start + (end - start) * (step / STEPS) ** 1.5 for step in range(STEPS)]


class Added(nn.Module):
    """Blocks of FLUX that add a value to the picture."""

    def __init__(self, value: Tensor | float) -> None:
        super().__init__()
        self.value = value

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        return encoder_hidden_states, hidden_states + self.value


@dataclass
class Reference:
    """One run, as the code of the authors for FLUX has it."""

    model: nn.Module
    depth: int
    threshold: float
    warmup: int
    total: float = 0.0
    before: Tensor | None = None
    computed: list[bool] = field(default_factory=list)
    stretches: list[float] = field(default_factory=list)
    stored: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # what the first blocks add, and all of them

    def call(self, inputs: dict[str, Any]) -> Tensor:
        step, start, seen = len(self.computed), *self.look(inputs)
        probe = seen[self.depth - 1]
        computes = step < self.warmup or step == STEPS - 1
        if not computes:
            assert self.before is not None
            self.total += float((probe - self.before).abs().mean() / self.before.abs().mean())
            computes = self.total >= self.threshold
        self.before = probe
        self.computed.append(computes)
        if computes:
            self.total = 0.0
            self.stored.insert(0, (probe - start, seen[-1] - start))
            return self.model(**inputs)[0]
        (last, value), *others = self.stored
        if others:
            before, older = others[0]
            way = ((probe - start - before).abs().mean() / (last - before).abs().mean()).clip(1, 1.5)
            self.stretches.append(float(way))
            value = older + way * (value - older)
        return self.adding(value, inputs)

    def look(self, inputs: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
        """The embedded picture, and the picture behind every block."""
        model, text = self.model, inputs["encoder_hidden_states"].shape[1]
        found: list[Tensor] = []
        handles = [model.x_embedder.register_forward_hook(lambda *seen: found.append(seen[-1]))]
        handles += [
            block.register_forward_hook(lambda *seen: found.append(seen[-1][1]))
            for block in (*model.transformer_blocks, *model.single_transformer_blocks)
        ]
        model(**inputs)
        for handle in handles:
            handle.remove()
        assert text  # the single blocks of diffusers give text and picture back one by one
        return found[0], found[1:]

    def adding(self, value: Tensor, inputs: dict[str, Any]) -> Tensor:
        model = self.model
        kept = model.transformer_blocks, model.single_transformer_blocks
        model.transformer_blocks, model.single_transformer_blocks = nn.ModuleList([Added(value)]), nn.ModuleList()
        try:
            return model(**inputs)[0]
        finally:
            model.transformer_blocks, model.single_transformer_blocks = kept


@pytest.mark.parametrize(("depth", "threshold", "warmup"), [(1, 0.3, 3), (2, 0.4, 2), (1, 0.3, 1)])
@pytest.mark.sampled
def test_it_decides_and_computes_as_published(sample: Sample, depth: int, threshold: float, warmup: int) -> None:
    """With one full step for sure, what that stored is reused: theirs aligns from the second one on."""
    rule = Reference(sample.model, depth, threshold, warmup)
    model = optimized(sample, dicompile.DiCache(depth, threshold, warmup), STEPS)
    for latent, time in zip(latents(sample), TIMES, strict=True):
        inputs = sample.inputs | {"hidden_states": latent, "timestep": torch.full((1,), time / 1000)}
        with torch.no_grad():
            found, expected = model(**inputs)[0], rule.call(inputs)
        if warmup > 1:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    decisions = [decision.recalls for decision in dicompile.report(model).decisions]
    assert [*[False] * warmup, *decisions, False] == [not ran for ran in rule.computed]
    assert 1 < sum(decisions) < len(decisions) - 1, "the test would say nothing"
    assert any(1.0 < way < 1.5 for way in rule.stretches), "the test would say nothing"


def test_the_first_blocks_run_at_every_step_and_the_stack_is_all_of_them(sample: Sample) -> None:
    model = optimized(sample, dicompile.DiCache(1, 9.0, 3), STEPS)
    for latent, time in zip(latents(sample), TIMES, strict=True):
        with torch.no_grad():
            model(**sample.inputs | {"hidden_states": latent, "timestep": torch.full((1,), time / 1000)})
    plan = dicompile.plan_of(model)
    assert dicompile.report(model).kinds == {"full": 4, "recalled": 10}
    recalled = plan.steps[4]
    row = plan.grid().splitlines()[4]
    assert row.split("%")[1].split("|")[0].split() == ["FFFF", "----", "-", "-"]
    assert row.endswith("| fff")
    first = sum(site.flops for site in dicompile.structure_of(model).sites if site.block == 0)
    assert first <= recalled.flops < first * 1.2
    assert dicompile.report(model).peak_cache_bytes == plan.cache_bytes


@pytest.mark.parametrize("depth", [4, 7])
def test_blocks_that_the_model_does_not_have_are_refused(sample: Sample, depth: int) -> None:
    with pytest.raises(PolicyDoesNotFit, match=f"runs {depth} blocks at every step, the model has 4"):
        optimized(sample, dicompile.DiCache(depth), STEPS)(**sample.inputs)


def test_without_watched_blocks_there_is_nothing_to_align_with() -> None:
    for gate in (None, Gate(probe="latent", threshold=0.1)):
        with pytest.raises(InvalidPolicy, match="aligns what it recalls with what the first blocks add"):
            Policy(name="x", cadence=Cadence(gate=gate), rules=(Rule(sites=("stack",), do=Aligned()),))


def test_a_depth_is_for_probes_that_go_through_blocks() -> None:
    with pytest.raises(InvalidPolicy, match="watches the latent through 2 blocks"):
        Gate(probe="latent", depth=2, threshold=0.1)


def test_it_goes_to_text_and_back() -> None:
    assert Policy.from_yaml(dicompile.DiCache().to_yaml()) == dicompile.DiCache()
