"""``torch.compile(model, backend="dicache")``."""

from __future__ import annotations

import logging
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dicompile
from dicompile.plan import Policy
from tests import models
from tests.models import MODELS, run, timesteps

STEPS = 6
CASES = [
    ("plain_dit", dicompile.FORA(interval=2)),
    ("plain_dit", dicompile.ToCa(interval=3, ratio=0.2)),
    ("dit", dicompile.FORA(interval=2)),
    ("dit", dicompile.ToCa(interval=3, ratio=0.2)),
]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    """Every test compiles anew, with static shapes first."""
    torch._dynamo.reset()


def compiled(model: nn.Module, fullgraph: bool = True, **options: Any) -> Any:
    return torch.compile(model, backend="dicache", fullgraph=fullgraph, options=options)


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("name", "policy"), CASES, ids=[f"{name}-{policy.name}" for name, policy in CASES])
@pytest.mark.sampled
def test_it_does_what_optimize_does(name: str, policy: Policy) -> None:
    sample = MODELS[name](2)
    wanted = run(
        dicompile.optimize(sample.model, policy, schedule=STEPS, mode="eager"), sample.inputs, timesteps(STEPS)
    )
    model = compiled(sample.model, policy=policy, steps=STEPS, mode="eager")
    got = run(model, sample.inputs, timesteps(STEPS))
    assert same(got, wanted)
    assert not same(got, run(sample.model, sample.inputs, timesteps(STEPS)))
    assert same(run(model, sample.inputs, timesteps(STEPS)), got)


def test_it_does_what_optimize_does_compiled() -> None:
    sample = models.plain_dit(2)
    policy = dicompile.FORA(interval=2)
    wanted = run(dicompile.optimize(sample.model, policy, schedule=4), sample.inputs, timesteps(4))
    assert same(run(compiled(sample.model, policy=policy, steps=4), sample.inputs, timesteps(4)), wanted)


def test_a_schedule_of_timesteps_does_what_a_number_of_steps_does() -> None:
    sample = models.plain_dit(1)
    by_number = compiled(sample.model, policy="fora", steps=4, mode="eager")
    wanted = run(by_number, sample.inputs, timesteps(4))
    torch._dynamo.reset()
    by_timesteps = compiled(sample.model, policy="fora", schedule=timesteps(4), mode="eager")
    assert same(run(by_timesteps, sample.inputs, timesteps(4)), wanted)


class Residual(nn.Module):
    """A branch that could be cached, and little to compile."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


def test_without_options_it_compiles_and_caches_nothing() -> None:
    model = nn.Sequential(Residual(), Residual()).eval()
    got = torch.compile(model, backend="dicache")
    with torch.no_grad():
        for latent in torch.randn(2, 2, 8, 16):
            torch.testing.assert_close(got(latent), model(latent), rtol=0, atol=1e-5)
    assert "dicache" in torch._dynamo.list_backends()


WITHOUT_IMPORT = """
import sys
import torch
from torch import Tensor, nn

class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x):
        return x + self.mlp(x)

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 16), Residual(), Residual(), nn.Linear(16, 16)).eval()
assert not any(name.startswith("dicompile") for name in sys.modules)
compiled = torch.compile(model, backend="dicache", options={"policy": "fora", "steps": 3, "mode": "eager"})
with torch.no_grad():
    latents = [torch.randn(2, 8, 16) for _ in range(3)]
    print([torch.equal(compiled(x), model(x)) for x in latents])
"""


def test_torch_compile_finds_it_without_importing_dicompile() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_IMPORT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == "[True, False, True]"


def test_an_unknown_option_is_named_with_the_known_ones() -> None:
    sample = models.plain_dit(1)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        run(compiled(sample.model, polcy="fora"), sample.inputs, [999])
    assert (
        "InvalidSetting: backend 'dicache' has no option 'polcy'\n"
        "  where: torch.compile\n"
        "  fix:   its options are: policy, steps, schedule, timestep, latent, hoist, backend, options, compile_mode, "
        "warmup, dynamic, attention, mode, max_cache_bytes, over_budget, cache_dtype, cache_device"
    ) in str(caught.value)


def test_a_caching_policy_needs_a_number_of_steps() -> None:
    sample = models.plain_dit(1)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        run(compiled(sample.model, policy="fora"), sample.inputs, [999])
    assert (
        "InvalidSetting: policy 'fora-3' needs to know the number of steps\n"
        "  where: torch.compile(backend='dicache')\n"
        "  why:   a plan says for every step what is computed\n"
        "  fix:   options={'policy': ..., 'steps': 50}"
    ) in str(caught.value)


def test_a_model_without_residual_branches_compiles_and_one_line_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)).eval()
    latent = torch.randn(2, 8)
    with caplog.at_level(logging.INFO, logger="dicompile"), torch.no_grad():
        got = compiled(model, policy="fora", steps=3, mode="eager")
        assert all(torch.equal(got(latent * i), model(latent * i)) for i in range(3))
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("dicompile")]
    assert [line for line in lines if "pieces of code" not in line] == [
        "no cacheable branch in this graph: compiled without caching"
    ]


@pytest.mark.parametrize(
    ("name", "dynamic"), [("plain_dit", None), ("plain_dit", True), ("plain_dit", False), ("dit", None)]
)
@pytest.mark.sampled
def test_every_batch_size_gets_what_it_gets_alone(name: str, dynamic: bool | None) -> None:
    sample = MODELS[name](1)
    model = torch.compile(
        sample.model,
        backend="dicache",
        dynamic=dynamic,
        fullgraph=True,
        options={"policy": dicompile.FORA(interval=2), "steps": 4, "mode": "eager"},
    )

    def batch(size: int) -> dict[str, Any]:
        return {k: v[:size] if isinstance(v, torch.Tensor) else v for k, v in sample.inputs.items()}

    got = [run(model, batch(size), timesteps(4)) for size in (2, 4, 2)]
    assert same(got[0], got[2])
    for size, outputs in ((2, got[0]), (4, got[1])):
        alone = dicompile.optimize(sample.model, dicompile.FORA(interval=2), schedule=4, mode="eager")
        assert same(outputs, run(alone, batch(size), timesteps(4)))


class Broken(nn.Module):
    """A DiT with a graph break inside: its later blocks are a graph of their own, which the timestep does not enter."""

    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        self.whole = whole

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        whole = self.whole
        tokens, condition = whole.tokens(x), whole.condition(t, y)
        for number, block in enumerate(whole.blocks):
            if number == 1:
                torch._dynamo.graph_break()
            tokens = block(tokens, condition)
        return whole.picture(tokens, condition, *x.shape[2:])


def broken() -> tuple[nn.Module, dict[str, Any]]:
    sample = models.plain_dit(3)
    return Broken(sample.model), sample.inputs


def test_graphs_behind_a_break_follow_the_step_of_the_first_one() -> None:
    model, inputs = broken()
    whole = dicompile.optimize(model.whole, dicompile.FORA(interval=3), schedule=STEPS, mode="eager")
    wanted = run(whole, inputs, timesteps(STEPS))
    got = compiled(model, fullgraph=False, policy=dicompile.FORA(interval=3), steps=STEPS, mode="eager")
    outputs = run(got, inputs, timesteps(STEPS))
    for output, expected in zip(outputs, wanted, strict=True):
        torch.testing.assert_close(output, expected)
    assert not torch.equal(outputs[1], run(model, inputs, timesteps(STEPS))[1])
    # A run that was left in the middle leaves nothing behind, whichever graph it concerns.
    run(got, inputs, timesteps(STEPS)[:2])
    assert same(run(got, inputs, timesteps(STEPS)), outputs)


def test_graphs_behind_a_break_keep_guidance_partners_apart() -> None:
    model, inputs = broken()
    other = {**inputs, "y": inputs["y"].flip(0)}
    got = compiled(model, fullgraph=False, policy=dicompile.FORA(interval=3), steps=STEPS, mode="eager")
    alone = [run(got, given, timesteps(STEPS)) for given in (inputs, other)]
    both: list[list[Tensor]] = [[], []]
    for step, t in enumerate(timesteps(STEPS)):
        for outputs, given in zip(both, (inputs, other), strict=True):
            outputs.append(models.call(got, given, t, step))
    assert same(both[0], alone[0]) and same(both[1], alone[1])


def test_blocks_that_share_one_graph_behind_breaks_do_not_share_what_is_stored() -> None:
    sample = models.plain_dit(3)

    class EveryBlock(Broken):
        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            whole = self.whole
            tokens, condition = whole.tokens(x), whole.condition(t, y)
            for block in whole.blocks:
                torch._dynamo.graph_break()
                tokens = block(tokens, condition)
            return whole.picture(tokens, condition, *x.shape[2:])

    wanted = run(
        dicompile.optimize(sample.model, dicompile.FORA(interval=3), schedule=STEPS, mode="eager"),
        sample.inputs,
        timesteps(STEPS),
    )
    got = compiled(
        EveryBlock(sample.model), fullgraph=False, policy=dicompile.FORA(interval=3), steps=STEPS, mode="eager"
    )
    for output, expected in zip(run(got, sample.inputs, timesteps(STEPS)), wanted, strict=True):
        torch.testing.assert_close(output, expected)


def marked(inputs: dict[str, Any], t: int, step: int) -> dict[str, Any]:
    """What `models.call` calls with, every batch dimension marked as dynamic."""
    given = {
        "x": torch.randn(inputs["x"].shape, generator=torch.Generator().manual_seed(step)),
        "t": torch.full_like(inputs["t"], t),
        "y": inputs["y"].clone(),
    }
    for value in given.values():
        torch._dynamo.mark_dynamic(value, 0)
    return given


def test_a_dimension_marked_dynamic_stays_dynamic() -> None:
    sample = models.plain_dit(2)
    model = compiled(sample.model, policy=dicompile.FORA(interval=2), steps=4, mode="eager")
    for size in (4, 2):
        inputs = {k: v[:size].clone() if isinstance(v, Tensor) else v for k, v in sample.inputs.items()}
        alone = dicompile.optimize(sample.model, dicompile.FORA(interval=2), schedule=4, mode="eager")
        wanted = run(alone, inputs, timesteps(4))
        with torch._dynamo.config.patch(error_on_recompile=size == 2), torch.no_grad():
            assert same([model(**marked(inputs, t, i)) for i, t in enumerate(timesteps(4))], wanted)


@pytest.mark.parametrize("mode", ["eager", "inductor"])
def test_a_graph_that_cannot_be_captured_is_compiled_plainly_and_one_line_says_why(
    mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Counts(nn.Module):
        def forward(self, x: Tensor, seen: Tensor) -> Tensor:
            seen += 1
            return x * 2

    seen = torch.zeros(1)
    with caplog.at_level(logging.INFO, logger="dicompile"), torch.no_grad():
        got = compiled(Counts(), policy="fora", steps=3, mode=mode)
        assert all(torch.equal(got(torch.ones(2, 3) * i, seen), torch.ones(2, 3) * 2 * i) for i in range(3))
    assert seen.item() == 3
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("dicompile")]
    assert lines == [
        "compiled without caching: the model writes to its inputs: seen "
        "(a step that is skipped could not repeat the write)"
    ]
