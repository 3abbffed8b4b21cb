"""TokenCache: block selection, schedules, files, and sampling against the superposition written out by hand."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import dicompile
from dicompile.analysis import SiteKind, analyse
from dicompile.capture import capture_model
from dicompile.errors import InvalidPolicy, InvalidPredictor, PolicyDoesNotFit
from dicompile.lower.predictor import FirstBlock
from dicompile.plan import Adapter, Policy
from dicompile.policies import POLICIES, Predictor, get_policy, load_predictor
from dicompile.policies.tokencache import keep_counts, keep_counts_of_blocks, percentiles, round_robin
from tests.models import Sample, optimized, plain_dit, run, timesteps
from tests.policies.predictors import LAST, LAYERS, STEPS, TOKENS, WIDTH, adapted, facts, lora, without_lora

NO_LORA: Mapping[str, Adapter] = {}


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


def reference(
    sample: Sample, policy: dicompile.Policy, importance: Tensor, kv: str, adapters: Mapping[str, Adapter] = NO_LORA
) -> list[Tensor]:
    """The plain DiT with tokens superposed as the paper says, equation by equation; LoRA weights merged."""
    model, table = sample.model, policy.rules[0].do
    merged = copy.deepcopy(model)
    for name, adapter in adapters.items():
        merged.get_parameter(name).data += adapter.up @ adapter.down
    stored: dict[int, Tensor] = {}
    outputs = []
    for step, time in enumerate(timesteps(STEPS)):
        counts = table.counts[step]

        def block_forward(
            block: Any, number: int, x: Tensor, c: Tensor, step: int = step, counts: Any = counts
        ) -> Tensor:
            keep = counts[number]
            if keep == TOKENS:
                own = block if counts == (TOKENS,) * LAYERS else merged.blocks[number]
                after = type(own).forward(own, x, c)
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


def by_step(fast: Any, sample: Sample) -> list[Tensor]:
    """A run with the latents of the reference."""
    return [run(fast, sample.inputs, [time], seed=step)[0] for step, time in enumerate(timesteps(STEPS))]


@pytest.mark.parametrize("kv", ["all", "kept"])
def test_kept_tokens_are_computed_and_others_add_their_last_update(tmp_path: Path, kv: str) -> None:
    sample, path = plain_dit(LAYERS), table(tmp_path)
    policy = dicompile.TokenCache(path, ratio=0.6, intervals=(2, 1), kv=kv)
    fast = optimized(sample, policy, STEPS)
    found = by_step(fast, sample)
    for step, (one, other) in enumerate(
        zip(found, reference(sample, policy, load_predictor(path).importance, kv), strict=True)
    ):
        assert torch.allclose(one, other, atol=2e-5), f"step {step}: {(one - other).abs().max():.1e}"


def test_at_prediction_steps_the_last_block_computes_every_token_with_its_lora() -> None:
    sample, known = plain_dit(LAYERS), adapted()
    policy = dicompile.TokenCache(known, ratio=0.6, intervals=(2, 1))
    assert all(row[-1] == TOKENS for row in policy.rules[0].do.counts)
    fast = optimized(sample, policy, STEPS)
    found = by_step(fast, sample)
    expected = reference(sample, policy, known.importance, "all", known.adapters)
    without = reference(sample, policy, known.importance, "all")
    kinds = [step.kind for step in dicompile.plan_of(fast).steps]
    assert kinds == ["full", "mixed", "mixed", "full", "mixed", "full"]
    for kind, one, other, plain in zip(kinds, found, expected, without, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=0)
        assert torch.equal(other, plain) == (kind == "full")


def test_weights_that_are_edited_are_read_beside_the_lora() -> None:
    sample, known = plain_dit(LAYERS), adapted()
    policy = dicompile.TokenCache(known, ratio=0.6)
    fast, block = optimized(sample, policy, STEPS), sample.model.blocks[-1]
    before = by_step(fast, sample)
    with torch.no_grad():
        block.proj.weight.data.mul_(1.5)  # counts no version
        block.mlp[0].weight.copy_(-block.mlp[0].weight)
    block.mlp[2].weight = torch.nn.Parameter(block.mlp[2].weight * 0.7)
    found = by_step(fast, sample)
    expected = reference(sample, policy, known.importance, "all", known.adapters)
    for one, other, old in zip(found, expected, before, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=0)
        assert not torch.allclose(one, old, atol=1e-3)


def test_a_lora_of_nothing_changes_nothing() -> None:
    sample, zero = plain_dit(LAYERS), {name: Adapter(a.down, 0 * a.up) for name, a in lora().items()}
    policy = dicompile.TokenCache(adapted(zero), ratio=0.6)
    policies = (policy, without_lora(policy))
    runs = [run(optimized(sample, each, STEPS), sample.inputs, timesteps(STEPS)) for each in policies]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_where_nothing_is_cached_there_is_no_lora() -> None:
    sample = plain_dit(LAYERS)
    fast = optimized(sample, dicompile.TokenCache(adapted(), ratio=0.0), STEPS)
    expected = run(optimized(sample, "none", STEPS), sample.inputs, timesteps(STEPS))
    found = run(fast, sample.inputs, timesteps(STEPS))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_step_that_reuses_every_other_block_is_a_prediction_step_too() -> None:
    sample, known = plain_dit(LAYERS), adapted()
    policy = dicompile.TokenCache(known, ratio=1.0, intervals=(1, 1))
    assert policy.rules[0].do.counts[1] == (0, 0, TOKENS)
    found = by_step(optimized(sample, policy, STEPS), sample)
    for one, other in zip(found, reference(sample, policy, known.importance, "all", known.adapters), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=0)


def test_what_the_lora_costs_is_in_the_plan() -> None:
    sample, policy = plain_dit(LAYERS), dicompile.TokenCache(adapted(), ratio=0.6)
    numbers = sum(a.numel() + b.numel() for a, b in lora().values())
    assert policy.adapters == numbers
    plans = []
    for each in (policy, without_lora(policy)):
        fast = optimized(sample, each, STEPS)
        run(fast, sample.inputs, timesteps(STEPS))
        plans.append(dicompile.plan_of(fast))
    for step, plain in zip(*(plan.steps for plan in plans), strict=True):
        assert step.is_adapted == (step.kind != "full")
        assert step.flops - plain.flops == 2 * 4 * TOKENS * numbers * step.is_adapted


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


def test_lora_weights_are_in_the_file(tmp_path: Path) -> None:
    known = adapted()
    known.save(tmp_path / "adapted.safetensors")
    read = load_predictor(tmp_path / "adapted.safetensors")
    assert read.facts.adapted == 1
    assert read.adapters.keys() == known.adapters.keys()
    for name, adapter in known.adapters.items():
        torch.testing.assert_close(read.adapters[name].down, adapter.down, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(read.adapters[name].up, adapter.up, rtol=1e-3, atol=1e-4)
    assert not read.parameters
    policy = dicompile.TokenCache(tmp_path / "adapted.safetensors")
    assert Policy.from_yaml(policy.to_yaml()).adapters == known.adapter_numbers


@pytest.mark.parametrize(
    ("adapters", "blocks", "what"),
    [
        ({}, 1, "1 adapted blocks, and it has LoRA weights of 0"),
        (lora(), 0, "0 adapted blocks, and it has LoRA weights of 4"),
        (lora(), LAYERS, "3 adapted blocks"),
        (lora() | {LAST[0]: Adapter(torch.zeros(2, 4), torch.zeros(4, 3))}, 1, "do not go together"),
        (lora() | {LAST[1]: Adapter(torch.full((2, 4), torch.nan), torch.zeros(4, 2))}, 1, "are not finite"),
    ],
)
def test_lora_weights_that_make_no_sense(adapters: dict[str, Adapter], blocks: int, what: str) -> None:
    with pytest.raises(InvalidPredictor, match=what):
        Predictor(torch.rand(STEPS, LAYERS, TOKENS), facts(adapted=blocks), adapters=adapters)


@pytest.mark.parametrize("lost", ["lora_A.", "lora_B."])
def test_a_file_that_holds_half_of_the_lora_weights(lost: str, tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    adapted().save(path)
    tensors = {name: tensor for name, tensor in load_file(path).items() if name != lost + LAST[2]}
    save_file(tensors, path, {"facts": facts(adapted=1).model_dump_json()})
    with pytest.raises(InvalidPredictor, match=r"LoRA weights of blocks\.2\.mlp\.0\.weight do not go together"):
        load_predictor(path)


@pytest.mark.parametrize(
    ("adapters", "what"),
    [
        ({"blocks.1.proj.weight": lora()[LAST[1]]}, r"blocks\.1\.proj\.weight of shape \(32, 32\), the model None"),
        ({"blocks.2.modulation.1.weight": lora()[LAST[1]]}, r"modulation.* the model None"),
        ({LAST[1]: lora()[LAST[0]]}, r"of shape \(96, 32\), the model \(32, 32\)"),
    ],
)
def test_lora_weights_of_another_model_are_refused(adapters: dict[str, Adapter], what: str) -> None:
    sample = plain_dit(LAYERS)
    with pytest.raises(PolicyDoesNotFit, match=what):
        run(optimized(sample, dicompile.TokenCache(adapted(adapters)), STEPS), sample.inputs, timesteps(STEPS))


def test_a_policy_is_for_the_lora_that_it_was_made_with() -> None:
    sample, policy = plain_dit(LAYERS), dicompile.TokenCache(adapted())
    for changed in ({"adapters": 0}, {"predictor": Predictor(adapted().importance, facts())}):
        with pytest.raises(PolicyDoesNotFit, match="made for a predictor with LoRA weights of"):
            run(optimized(sample, policy.model_copy(update=changed), STEPS), sample.inputs, timesteps(STEPS))


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
