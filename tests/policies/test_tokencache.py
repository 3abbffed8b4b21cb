"""TokenCache: block selection, schedules, files, and sampling against the superposition written out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import dicompile
from dicompile.analysis import SiteKind, analyse
from dicompile.capture import capture_model
from dicompile.errors import InvalidPolicy, InvalidPredictor, PolicyDoesNotFit
from dicompile.lower.predictor import FirstBlock
from dicompile.plan import Policy, PredictorFacts
from dicompile.policies import POLICIES, Predictor, get_policy, load_predictor
from dicompile.policies.tokencache import keep_counts, keep_counts_of_blocks, percentiles, round_robin
from tests.models import Sample, optimized, plain_dit, run, timesteps

STEPS, LAYERS, TOKENS, WIDTH = 6, 3, 64, 32


def facts(kind: str = "table", blocks: int = LAYERS, times: list[int] | None = None) -> PredictorFacts:
    return PredictorFacts(
        kind=kind,
        blocks=tuple(f"{i}.block" for i in range(blocks)),
        timesteps=tuple(map(float, times or timesteps(STEPS))),
        penalty=0.1,
        seed=0,
        iterations=1,
    )


def table(tmp_path: Path, blocks: int = LAYERS, tokens: int = TOKENS, steps: int = STEPS) -> Path:
    importance = torch.rand(steps, blocks, tokens, generator=torch.Generator().manual_seed(3))
    Predictor(importance, facts(blocks=blocks, times=timesteps(steps))).save(tmp_path / "table.safetensors")
    return tmp_path / "table.safetensors"


def network(tmp_path: Path, sample: Sample) -> Path:
    capture = capture_model(sample.model, sample.inputs)
    names = FirstBlock.of(capture, analyse(capture)).parameters
    known = {**dict(sample.model.named_parameters()), **dict(sample.model.named_buffers())}
    generator = torch.Generator().manual_seed(5)
    head = {"head.weight": torch.randn(LAYERS, WIDTH, generator=generator), "head.bias": torch.zeros(LAYERS)}
    importance = torch.rand(STEPS, LAYERS, TOKENS, generator=generator)
    made = Predictor(importance, facts("network"), {n: known[n].detach() for n in names} | head)
    made.save(tmp_path / "network.safetensors")
    return tmp_path / "network.safetensors"


def test_two_phases_take_turns() -> None:
    assert round_robin(10, (3, 1), 0.5) == (0, 4, 5, 7, 9)
    assert round_robin(50, (3, 1), 0.5) == (*range(0, 25, 4), *range(25, 50, 2))
    assert round_robin(4, (1, 1), 0.5) == (0, 2)
    assert round_robin(3, (5, 5), 0.0) == (0,)


def test_percentiles_follow_the_importance() -> None:
    even = torch.ones(10, 2, 3)
    assert percentiles(even, 5) == (0, 2, 4, 6, 8)
    late = torch.cat([torch.full((5, 2, 3), 0.01), torch.ones(5, 2, 3)])
    assert percentiles(late, 3)[0] == 0
    assert min(percentiles(late, 3)[1:]) >= 5


def test_a_global_ratio_spreads_over_blocks_by_importance() -> None:
    importance = torch.zeros(1, 2, 8)
    importance[0, 0, :3], importance[0, 1, :5] = 0.9, 0.8
    assert keep_counts(importance, 0.5) == ((3, 5),)
    assert keep_counts(importance, 13 / 16) == ((3, 0),)
    assert keep_counts(importance, 0.0) == ((8, 8),)
    assert keep_counts(importance, 0.5, multiple=4) == ((4, 4),)


def test_block_selection_caches_the_least_important_blocks() -> None:
    importance = torch.tensor([0.2, 0.9, 0.1, 0.5])[None, :, None].expand(2, 4, 10)
    assert keep_counts_of_blocks(importance, 0.5, 0.7) == ((3, 10, 3, 10),) * 2


def reference(sample: Sample, policy: dicompile.Policy, importance: Tensor, kv: str) -> list[Tensor]:
    """The plain DiT with tokens superposed as the paper says, equation by equation."""
    model, table = sample.model, policy.rules[0].do
    stored: dict[int, Tensor] = {}
    outputs = []
    for step, time in enumerate(timesteps(STEPS)):
        counts = table.counts[step]

        def block_forward(
            block: Any, number: int, x: Tensor, c: Tensor, step: int = step, counts: Any = counts
        ) -> Tensor:
            keep = counts[number]
            if keep == TOKENS:
                after = type(block).forward(block, x, c)
                stored[number] = after - x
                return after
            alpha = importance[step, number].expand(len(x), -1)
            chosen = alpha.argsort(dim=1, descending=True, stable=True)[:, :keep]
            rows = torch.arange(len(x))[:, None]
            if keep and kv == "kept":
                part = x[rows, chosen]
                fresh = type(block).forward(block, part, c) - part
            elif keep:
                fresh = (type(block).forward(block, x, c) - x)[rows, chosen]
            if keep:
                stored[number] = stored[number].clone()
                stored[number][rows, chosen] = fresh
            return x + stored[number]

        for number, block in enumerate(model.blocks):
            block.forward = lambda x, c, b=block, n=number, f=block_forward: f(b, n, x, c)
        try:
            outputs += run(model, sample.inputs, [time], seed=step)
        finally:
            for block in model.blocks:
                del block.forward
    return outputs


@pytest.mark.parametrize("kv", ["all", "kept"])
def test_kept_tokens_are_computed_and_others_add_their_last_update(tmp_path: Path, kv: str) -> None:
    sample, path = plain_dit(LAYERS), table(tmp_path)
    policy = dicompile.TokenCache(path, ratio=0.6, intervals=(2, 1), kv=kv)
    fast = optimized(sample, policy, STEPS)
    found = [run(fast, sample.inputs, [t], seed=i)[0] for i, t in enumerate(timesteps(STEPS))]
    for step, (one, other) in enumerate(
        zip(found, reference(sample, policy, load_predictor(path).importance, kv), strict=True)
    ):
        assert torch.allclose(one, other, atol=2e-5), f"step {step}: {(one - other).abs().max():.1e}"


def test_a_network_ranks_tokens_by_what_it_sees(tmp_path: Path) -> None:
    sample = plain_dit(LAYERS)
    policy = dicompile.TokenCache(network(tmp_path, sample), ratio=0.6, guidance="separate")
    fast = optimized(sample, policy, STEPS)
    first, again = (run(fast, sample.inputs, timesteps(STEPS)) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    partial = next(step for step in dicompile.plan_of(fast).steps if step.kind == "partial")
    found = dicompile.structure_of(fast)
    kept = sum(s.action.tokens.count if s.action.tokens else 0 for s in partial.sites) / TOKENS / LAYERS
    assert partial.flops > found.flops / LAYERS + kept * 0.5 * found.flops, "the predictor is counted"


def test_keeping_everything_changes_nothing(tmp_path: Path) -> None:
    sample = plain_dit(LAYERS)
    fast = optimized(sample, dicompile.TokenCache(table(tmp_path), ratio=0.0), STEPS)
    expected = run(optimized(sample, "none", STEPS), sample.inputs, timesteps(STEPS))
    found = run(fast, sample.inputs, timesteps(STEPS))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_predictor_is_for_one_model(tmp_path: Path) -> None:
    sample = plain_dit(LAYERS)
    with pytest.raises(PolicyDoesNotFit, match="4 blocks of 64 tokens, the model has 3 of 64") as caught:
        run(optimized(sample, dicompile.TokenCache(table(tmp_path, blocks=4)), STEPS), sample.inputs, timesteps(STEPS))
    assert "table.safetensors" in str(caught.value)
    with pytest.raises(PolicyDoesNotFit, match="3 blocks of 16 tokens"):
        run(optimized(sample, dicompile.TokenCache(table(tmp_path, tokens=16)), STEPS), sample.inputs, timesteps(STEPS))
    with pytest.raises(PolicyDoesNotFit, match="has 9 steps, the schedule 6"):
        run(optimized(sample, dicompile.TokenCache(table(tmp_path, steps=9)), STEPS), sample.inputs, timesteps(STEPS))


def test_a_network_of_another_width_is_refused(tmp_path: Path) -> None:
    path = network(tmp_path, plain_dit(LAYERS))
    known = load_predictor(path)
    name = next(name for name in known.parameters if name.endswith("qkv.weight"))
    known.parameters[name] = torch.zeros(5, 5)
    known.save(path)
    sample = plain_dit(LAYERS)
    with pytest.raises(PolicyDoesNotFit, match=r"shape \(5, 5\), the model \(96, 32\)"):
        run(optimized(sample, dicompile.TokenCache(path), STEPS), sample.inputs, timesteps(STEPS))


def test_files_that_hold_no_predictor(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("nothing")
    with pytest.raises(InvalidPredictor, match="not a safetensors file"):
        load_predictor(tmp_path / "text.safetensors")
    with pytest.raises(InvalidPredictor, match="not a safetensors file"):
        load_predictor(tmp_path / "missing.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InvalidPredictor, match="does not say what its predictor was trained for"):
        load_predictor(tmp_path / "other.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "bare.safetensors", {"facts": facts().model_dump_json()})
    with pytest.raises(InvalidPredictor, match="holds no importance"):
        load_predictor(tmp_path / "bare.safetensors")


@pytest.mark.parametrize(
    ("importance", "what"),
    [
        (torch.full((STEPS, LAYERS, TOKENS), torch.nan), "not finite"),
        (torch.rand(STEPS + 1, LAYERS, TOKENS), r"has shape .* say 6 steps and 3 blocks"),
        (torch.rand(STEPS, LAYERS, TOKENS).double(), "is float64, not float32"),
    ],
)
def test_importance_that_its_facts_do_not_describe(importance: Tensor, what: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidPredictor, match=what):
        Predictor(importance, facts())
    path = tmp_path / "wrong.safetensors"
    save_file({"importance": importance}, path, {"facts": facts().model_dump_json()})
    if importance.dtype == torch.float32:  # a file is read as float32
        with pytest.raises(InvalidPredictor, match=what) as caught:
            load_predictor(path)
        assert caught.value.where == str(path)


@pytest.mark.parametrize("made", [table, lambda path: network(path, plain_dit(LAYERS))], ids=["table", "network"])
def test_a_predictor_is_as_good_as_its_file(made: Any, tmp_path: Path) -> None:
    path = made(tmp_path)
    runs = []
    for predictor in (path, load_predictor(path)):
        sample = plain_dit(LAYERS)
        fast = optimized(sample, get_policy("tokencache", predictor=predictor, ratio=0.6), STEPS)
        runs.append(run(fast, sample.inputs, timesteps(STEPS)))
        assert "partial" in dicompile.report(fast).kinds
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_a_policy_with_a_predictor_itself_is_data_that_cannot_be_written(tmp_path: Path) -> None:
    path = table(tmp_path)
    known = load_predictor(path)
    policy = dicompile.TokenCache(known)
    assert policy == dicompile.TokenCache(known)
    assert hash(policy) == hash(dicompile.TokenCache(known))
    assert policy != dicompile.TokenCache(load_predictor(path))
    holder = Policy(name="other", elsewhere=(dicompile.Elsewhere(policy=policy),))
    for write in (policy.to_yaml, policy.to_json, policy.to_dict, holder.to_json):
        with pytest.raises(InvalidPolicy, match=r"cannot be written\n.*predictor"):
            write()
    assert Policy.from_yaml(dicompile.TokenCache(path).to_yaml()).predictor == str(path)


def test_it_needs_a_file_and_shares_within_range(tmp_path: Path) -> None:
    assert "tokencache" in POLICIES
    with pytest.raises(InvalidPolicy, match="predictor"):
        get_policy("tokencache")
    with pytest.raises(InvalidPolicy, match=r"'ratio' cannot be 1\.5"):
        dicompile.TokenCache(table(tmp_path), ratio=1.5)


def test_no_block_spans_without_blocks() -> None:
    found = analyse(capture_model(plain_dit(2).model, plain_dit(2).inputs))
    assert [span.kind for span in found.spans] == [SiteKind.BLOCK, SiteKind.BLOCK, SiteKind.STACK]
