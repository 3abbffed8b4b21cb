"""ClusCa beside its published rule, put in the place of the modules of plain DiT, PixArt and FLUX."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dicompile
from dicompile.analysis import ModelStructure, Site, SiteKind
from dicompile.errors import InvalidPolicy, PolicyDoesNotFit
from dicompile.ops.clusters import cluster_flops
from dicompile.plan import CacheOptions, Cadence, Policy, Propagate, Reuse, Rule, SlotKind, TimestepSchedule, make_plan
from dicompile.runtime import current_session
from tests import models
from tests.models import PlainDiT, Sample, optimized, timesteps
from tests.plan.toys import TOKENS, toy

pytestmark = pytest.mark.usefixtures("own_session")

STEPS = 11
TIMES = timesteps(STEPS)


@dataclass
class Published:
    """One run of the published code: `DiTBlock.forward`, `Kmeans.fit`, `propagation_update_cache`, `taylor_formula`."""

    interval: int
    order: int
    clusters: int
    share: float
    warmup: int
    seed: int = 0
    rounds: int = 100
    step: int = -1
    latest: int = 0
    is_full: bool = True
    distance: int = 0
    factors: dict[int, list[Tensor]] = field(default_factory=dict)
    labels: dict[int, Tensor] = field(default_factory=dict)
    means: dict[int, Tensor] = field(default_factory=dict)
    chosen: dict[int, Tensor] = field(default_factory=dict)

    def begin(self) -> None:
        self.step += 1
        self.is_full = self.step < self.warmup or self.step - self.latest == self.interval
        self.distance, self.latest = self.step - self.latest, self.step if self.is_full else self.latest
        self.chosen.clear()

    def drawn(self, site: int, like: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(hash((self.seed, self.step, site)) & 0x7FFFFFFF)
        return torch.rand(like.shape[:2], generator=generator)

    def forecast(self, site: int, value: Callable[[], Tensor]) -> Tensor:
        if not self.is_full:
            return sum(f * self.distance**k / math.factorial(k) for k, f in enumerate(self.factors[site]))  # type: ignore[return-value]
        old, new = self.factors.get(site, []), [value()]
        for lower in old[: self.order]:
            new.append((new[-1] - lower) / self.distance)
        self.factors[site] = new
        return new[0]

    def propagate(self, site: int, last: int, value: Callable[[], Tensor], share: float) -> Tensor:
        if self.is_full:
            return self.forecast(site, value)
        every, labels, noise = value(), self.labels[last], self.drawn(site, value())
        old = self.factors[site][0].clone()
        self.chosen[site] = torch.zeros(len(labels), self.clusters, dtype=torch.int64)
        for b, row in enumerate(labels):
            mean = torch.zeros(self.clusters, every.shape[-1])
            for cluster in range(self.clusters):
                members = (row == cluster).nonzero().flatten()
                if len(members):
                    token = members[noise[b, members].argmax()]
                    self.chosen[site][b, cluster] = token
                    old[b, token] = mean[cluster] = every[b, token]
            old[b] = share * mean[row] + (1 - share) * old[b]
        self.factors[site][0] = old
        return self.forecast(site, value)

    def cluster(self, site: int, stream: Tensor) -> None:
        if not self.is_full:
            return
        noise = self.drawn(site, stream)
        means, labels = [], []
        for b, tokens in enumerate(stream):
            first = (noise[b, : self.clusters] * len(tokens)).long()
            mean = self.means[site][b] if site in self.means else tokens[first]
            for _ in range(self.rounds):
                label = (tokens[:, None] - mean[None]).abs().sum(-1).argmin(-1)
                new = torch.stack([tokens[label == k].sum(0) / max(1, int((label == k).sum()))
                                   for k in range(self.clusters)])  # fmt: skip
                if torch.allclose(mean, new, rtol=1e-4):
                    break
                mean = new
            means.append(mean)
            labels.append(label)
        self.means[site], self.labels[site] = torch.stack(means), torch.stack(labels)


class Installed:
    """The rule in the modules of a model."""

    def __init__(self, rule: Published, model: Any, structure: ModelStructure) -> None:
        self.rule, self.structure = rule, structure
        (self.flux if hasattr(model, "single_transformer_blocks") else self.plain)(model)

    def site(self, start: str) -> int:
        return next(int(site.id) for site in self.structure.sites if site.name.startswith(start))

    def forecast(self, module: nn.Module, site: int, method: str = "forward") -> None:
        follow(module, method, lambda value: self.rule.forecast(site, value))

    def propagate(self, module: nn.Module, start: str, last: int, share: float) -> None:
        site = self.site(start)
        follow(module, "forward", lambda value: self.rule.propagate(site, last, value, share))

    def plain(self, model: Any) -> None:
        name, mlp = ("blocks", "mlp") if hasattr(model, "blocks") else ("transformer_blocks", "ff")
        blocks = getattr(model, name)
        last = self.site(f"{name}.{len(blocks) - 1}.{mlp}")
        for number, block in enumerate(blocks):
            if mlp == "mlp":
                self.forecast(block, int(self.structure.blocks[number].sites[0]), "attend")
            else:
                self.forecast(block.attn1, self.site(f"{name}.{number}.attn1"))
                self.forecast(block.attn2, self.site(f"{name}.{number}.attn2"))
            self.propagate(getattr(block, mlp), f"{name}.{number}.{mlp}", last, self.rule.share)
        blocks[-1].register_forward_hook(lambda *call: self.rule.cluster(last, call[2]))

    def flux(self, model: Any) -> None:
        end = f"transformer_blocks.{len(model.transformer_blocks) - 1}"
        last = [self.site(f"{end}.{ff}.net") for ff in ("ff_context", "ff")]
        for number, block in enumerate(model.transformer_blocks):
            joint = [s for s in self.structure.sites if s.block == number and s.kind is SiteKind.JOINT_ATTENTION]
            follow(block.attn, "forward", lambda value, joint=joint: self.attended(value(), joint))
            self.propagate(block.ff_context, f"transformer_blocks.{number}.ff_context.net", last[0], 0.0)
            self.propagate(block.ff, f"transformer_blocks.{number}.ff.net", last[1], self.rule.share)
        for number, block in enumerate(model.single_transformer_blocks):
            self.forecast(block.proj_out, self.site(f"single_transformer_blocks.{number}"))

        def cluster(*call: Any) -> None:
            for site, stream in zip(last, call[2], strict=True):
                self.rule.cluster(site, stream)

        model.transformer_blocks[-1].register_forward_hook(cluster)

    def attended(self, values: tuple[Tensor, ...], joint: list[Site]) -> tuple[Tensor, ...]:
        """What a joint attention adds to either stream."""
        by_tokens = {site.tokens.count: int(site.id) for site in joint}
        return tuple(self.rule.forecast(by_tokens[value.shape[1]], lambda value=value: value) for value in values)


def follow(module: nn.Module, method: str, around: Callable[[Callable[[], Any]], Any]) -> None:
    """Let a method of a module return what `around` makes of calling it."""
    real = getattr(module, method)
    setattr(module, method, lambda *args, **kwargs: around(lambda: real(*args, **kwargs)))


@functools.cache
def structure_of(name: str) -> ModelStructure:
    return models.structure(SAMPLES[name]())


def plain(size: int) -> Sample:
    torch.manual_seed(size)
    inputs = {"x": torch.randn(2, 4, size, size), "t": torch.full((2,), 500), "y": torch.tensor([1, 10])}
    return Sample(models.redraw(PlainDiT(3, width=16, size=size)), inputs)


SAMPLES: dict[str, Callable[[], Sample]] = {
    "16 tokens": lambda: plain(8),
    "36 tokens": lambda: plain(12),
    "pixart": lambda: models.pixart(2),
    "flux": models.flux,
}
CASES = [
    ("16 tokens", {"interval": 4, "order": 4, "clusters": 4, "share": 0.005, "warmup": 2}),
    ("36 tokens", {"interval": 3, "order": 2, "clusters": 6, "share": 0.3, "warmup": 1}),
    ("36 tokens", {"interval": 3, "order": 0, "clusters": 5, "share": 0.0, "warmup": 1, "seed": 3}),
    ("36 tokens", {"interval": 2, "order": 1, "clusters": 5, "share": 1.0, "warmup": 3, "rounds": 2}),
    ("pixart", {"interval": 4, "order": 1, "clusters": 8, "share": 0.1, "warmup": 2}),
    ("flux", {"interval": 5, "order": 1, "clusters": 4, "share": 0.2, "warmup": 3}),
]


def drifting(sample: Sample, step: int) -> dict[str, Any]:
    """Inputs of a step of a run: the latent moves from one to another."""
    generator, inputs = torch.Generator().manual_seed(5), dict(sample.inputs)
    latent = next(name for name in ("hidden_states", "x") if name in inputs)
    time = next(name for name in ("timestep", "t") if name in inputs)
    start, end = (torch.randn(inputs[latent].shape, generator=generator) for _ in range(2))
    now = TIMES[step] / 1000 if inputs[time].is_floating_point() else TIMES[step]
    return inputs | {latent: start + (end - start) * (step / STEPS) ** 0.5, time: torch.full_like(inputs[time], now)}


def call(model: nn.Module, sample: Sample, step: int) -> Tensor:
    with torch.no_grad():
        found = model(**drifting(sample, step))
    result: Tensor = found[0] if isinstance(found, tuple) else found
    return result


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.sampled
def test_clusters_tokens_and_outputs_are_those_of_the_published_rule(name: str, options: dict[str, Any]) -> None:
    sample = SAMPLES[name]()
    model = optimized(sample, dicompile.ClusCa(**options), STEPS)
    current_session().keep_chosen = True
    peer, rule = copy.deepcopy(sample.model), Published(**options)
    with dicompile.session():
        call(model, sample, 0)
    Installed(rule, peer, dicompile.structure_of(model))
    for step in range(STEPS):
        rule.begin()
        found, expected = call(model, sample, step), call(peer, sample, step)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=lambda text, step=step: f"{step}: {text}")
        context = models.state_of(model).contexts[""]
        assert {int(site) for site in context.chosen} == set(rule.chosen)
        for site, tokens in context.chosen.items():
            assert torch.equal(tokens, rule.chosen[int(site)]), (step, site)
        for slot, value in zip(dicompile.plan_of(model).slots, context.store, strict=False):
            if slot.kind is SlotKind.CLUSTER and value is not None:
                assert torch.equal(value, rule.labels[int(slot.site)]), (step, slot)
    assert all(len(labels.unique()) > 2 for labels in rule.labels.values()), "the test would say nothing"
    assert len(rule.labels) == (2 if name == "flux" else 1)
    kinds = [planned.kind for planned in dicompile.plan_of(model).steps]
    assert kinds.count("partial") > STEPS / 3


def test_the_computed_tokens_correct_forecasts_and_others_follow_them() -> None:
    sample, options = plain(12), {"interval": 4, "order": 1, "clusters": 6, "warmup": 2}
    found = {
        name: [call(model, sample, step) for step in range(4)]
        for name, model in {
            "forecast": optimized(sample, dicompile.TaylorSeer(4, 1), STEPS),
            "alone": optimized(sample, dicompile.ClusCa(**options, share=0.0), STEPS),
            "followed": optimized(sample, dicompile.ClusCa(**options, share=0.2), STEPS),
        }.items()
    }
    for step, (forecast, alone, followed) in enumerate(zip(*found.values(), strict=True)):
        assert torch.equal(forecast, alone) == (step < 2)
        assert torch.equal(alone, followed) == (step < 2)


def test_a_picture_depends_on_the_others_of_its_batch_by_what_is_drawn_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def same(shape: tuple[int, int], seed: tuple[int, int, int], device: torch.device, **_: bool) -> Tensor:
        generator = torch.Generator(device).manual_seed(seed[1] * 100 + seed[2])
        return torch.rand(1, shape[1], generator=generator).expand(shape).contiguous()

    monkeypatch.setattr("dicompile.runtime.values.drawn", same)
    sample = plain(12)
    policy = dicompile.ClusCa(3, 1, clusters=6, share=0.2)
    model = optimized(sample, policy, STEPS)
    together = [call(model, sample, step) for step in range(6)]
    for row in range(2):
        alone = optimized(sample, policy, STEPS)
        for step, both in enumerate(together):
            inputs = {name: value[row : row + 1] for name, value in drifting(sample, step).items()}
            with torch.no_grad():
                torch.testing.assert_close(alone(**inputs), both[row : row + 1], rtol=1e-4, atol=1e-5)


def test_slots_in_fewer_bits_hold_the_history_as_well() -> None:
    sample = plain(12)
    policy = dicompile.ClusCa(3, 1, clusters=6, share=0.2)
    exact = optimized(sample, policy, STEPS)
    for dtype, close in (("bfloat16", 0.02), ("float8_e4m3fn", 0.2)):
        narrow = optimized(sample, policy, STEPS, cache_dtype=dtype)
        for step in range(7):
            first, second = call(exact, sample, step), call(narrow, sample, step)
            assert float((first - second).abs().max()) < close * float(first.abs().max())


def test_the_plan_counts_tokens_clusters_and_what_is_kept() -> None:
    structure, clusters, layers = structure_of("36 tokens"), 6, 3
    policy, schedule = dicompile.ClusCa(4, 2, clusters=clusters), TimestepSchedule(STEPS - 1)
    plan = make_plan(structure, policy, schedule)
    mlp = sum(site.flops for site in structure.sites if site.kind is SiteKind.MLP)
    own = cluster_flops(2 * 36, 16, clusters, 100)
    found = [step.flops - structure.flops for step in plan.steps if step.kind == "full"]
    assert found == [own, own, own, 0], "the last is for nobody"
    assert [step.score_flops for step in plan.steps if step.kind == "full"] == found
    partial = [step.flops for step in plan.steps if step.kind == "partial"]
    rest = structure.flops - sum(site.flops for site in structure.sites)
    assert partial == [rest + round(mlp * clusters / 36)] * 6
    value, labels, means = 2 * 36 * 16 * 4, 2 * 36 * 8, 2 * clusters * 16 * 4
    assert plan.held(0) == 2 * layers * value + means
    assert plan.held(1) == 2 * layers * 2 * value + labels + means
    assert plan.held(6) == 2 * layers * 3 * value + labels
    assert plan.held(STEPS - 2) == 0
    less = make_plan(structure, policy, schedule, CacheOptions.of(plan.cache_bytes // 2, "degrade"))
    assert less.dropped
    assert less.cache_bytes <= plan.cache_bytes // 2


def test_text_is_computed_and_moves_nothing_and_single_stream_blocks_are_forecast() -> None:
    structure = structure_of("flux")
    plan = make_plan(structure, dicompile.ClusCa(5, 1, 4, share=0.2, warmup=3), TimestepSchedule.of(TIMES))
    step = plan.steps[3]
    shares = {}
    for site, planned in zip(structure.sites, step.sites, strict=False):
        if site.kind is SiteKind.MLP:
            assert planned.action.clusters is not None
            shares[site.tokens.count] = planned.action.clusters.share
        else:
            assert planned.action.symbol == "f"
    assert shares == {16: 0.2, 6: 0.0}
    assert len([slot for slot in plan.slots if slot.kind is SlotKind.CLUSTER]) == 2


REFUSED = [
    (toy([["self-attention"]]), dicompile.ClusCa(clusters=4), "of every cluster in mlp, but the model has none"),
    (toy([["self-attention", "mlp"]]), dicompile.ClusCa(), f"the branch has {TOKENS} tokens"),
    (
        toy([["self-attention", "mlp"]]),
        Policy(name="x", cadence=Cadence(interval=2), rules=(Rule(do=Propagate(clusters=4)),)),
        "refreshes single tokens, which this branch does not allow",
    ),
    (
        toy([["self-attention", "mlp"]], spans=True),
        Policy(name="x", cadence=Cadence(interval=2), rules=(
            Rule(sites=("block",), do=Propagate(clusters=4, otherwise=Reuse(what="update"))),)),
        "it has no branch of its own",
    ),
    (
        toy([["self-attention", "mlp"]]),
        Policy(name="x", cadence=Cadence(interval=3), rules=(
            Rule(sites=("mlp",), when="odd", do=Propagate(clusters=4)),
            Rule(sites=("mlp",), do=Propagate(clusters=5)),
        )),
        "another rule for it wants 5 in 100 rounds",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("structure", "policy", "said"), REFUSED)
def test_what_does_not_fit_is_refused(structure: ModelStructure, policy: Policy, said: str) -> None:
    with pytest.raises(PolicyDoesNotFit, match=said):
        make_plan(structure, policy, TimestepSchedule.of(6))


def test_beside_a_gate_it_is_refused() -> None:
    gate = dicompile.Gate(probe="residual", threshold=0.1)
    with pytest.raises(InvalidPolicy, match="one of its rules does 'propagate'"):
        Policy(name="x", cadence=Cadence(gate=gate), outside=(1, 0), rules=(Rule(sites=("mlp",), do=Propagate()),))


def test_it_is_data() -> None:
    policy = dicompile.ClusCa(5, 1, share=0.01)
    assert Policy.from_yaml(policy.to_yaml()) == policy
