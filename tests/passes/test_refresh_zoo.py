"""refresh-tokens over real blocks: of every kind of branch, chosen tokens come out as if all had been computed."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import pytest
import torch
from torch import fx

from dicompile.analysis import ModelStructure, Site, TokenWise, analyse
from dicompile.capture import Capture, capture_model
from dicompile.passes import Chosen, LocalStep, Noise, SlotRef, TokenCount, Value, outline
from dicompile.passes.drop_dead import DropDead
from dicompile.passes.refresh_tokens import RefreshTokens
from dicompile.plan import Context, Score, ScoreBase, SlotKind
from tests.passes.segments import Cut, rewritten, run_segment
from tests.zoo.coverage import CASES

POISON = 1e9
FEWER_ROWS = 1e-4
"""A product with fewer rows may be summed in another order, and blocks of random weights have large values."""

NAMES = (
    "PixArtTransformer2DModel[alpha]", "SD3Transformer2DModel[3.5]", "WanTransformer3DModel [t2v]",
    "FluxTransformer2DModel", "CogVideoXTransformer3DModel",
)  # fmt: skip
MORE = (
    "QwenImageTransformer2DModel[text]", "Lumina2Transformer2DModel", "HunyuanDiT2DModel", "LTXVideoTransformer3DModel",
    "CosmosTransformer3DModel [1.0]", "ZImageTransformer2DModel",
)  # fmt: skip


def cut_of(captured: Capture, structure: ModelStructure, sites: tuple[Site, ...]) -> Cut:
    """The whole model as one segment, with some of its sites, and values for its inputs: any will do."""
    made = outline(captured, structure, [node for node in captured.graph.nodes if node.op == "call_function"], sites)
    generator = torch.Generator().manual_seed(0)
    given = {node.name: node.meta["val"] for node in captured.graph.find_nodes(op="placeholder")}
    return Cut(made.segment, {Value(i): any_value(given[name], generator) for i, name in enumerate(made.inputs)})


def any_value(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Small random numbers, indices of the first rows, masks that hide nothing."""
    if not (like.is_floating_point() or like.is_complex()):
        return torch.full(like.shape, like.dtype == torch.bool, dtype=like.dtype)
    return 0.3 * torch.randn(like.shape, dtype=like.dtype, generator=generator)


def rows_beside(graph: fx.Graph) -> Iterator[fx.Node]:
    """Sizes of more rows than there are chosen tokens (of their last place, one less is looked up)."""
    sizes = graph.find_nodes(op="call_function", target=operator.add)
    return (size for size in sizes if isinstance(size.meta["val"], torch.SymInt) and size.args[1] != -1)


@pytest.mark.parametrize("name", [*NAMES, *(pytest.param(name, marks=pytest.mark.nightly) for name in MORE)])
@pytest.mark.sampled
def test_chosen_tokens_of_a_real_branch_come_out_as_if_all_were_computed(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    torch._dynamo.reset()
    captured = capture_model(case.model(), case.at(0))
    structure = analyse(captured)
    # Sites of the first blocks of every kind, each once.
    kinds = {(structure.blocks[site.block].kind, site.kind, site.stream): site for site in reversed(structure.sites)}
    sites = tuple(site for site in kinds.values() if site.tokens.wise is not TokenWise.NO)
    assert {site.tokens.wise for site in sites} >= {TokenWise.YES}
    block = cut_of(captured, structure, sites)
    for position, site in enumerate(sites):
        context = Context.STORED if site.tokens.wise is TokenWise.YES else Context.ALL
        step = LocalStep((1.0, 1.0), refresh=Score(ScoreBase.RANDOM), context=context, writes=(SlotKind.VALUE,))
        steps = [step if i == position else LocalStep() for i in range(len(sites))]
        segment = rewritten(block.segment, steps, RefreshTokens(), DropDead())
        assert not list(rows_beside(segment.graph)), "a value holds more rows than the chosen tokens"
        core, value = block.core(position), SlotRef(position, SlotKind.VALUE)
        samples, tokens, width = core.shape
        values = {
            **block.arguments, value: core, TokenCount(position): max(1, tokens // 3),
            Noise(position, share_guidance=False): torch.rand(samples, tokens),
        }  # fmt: skip
        rows = run_segment(segment, values)[Chosen(position)][..., None].expand(-1, -1, width)
        results = run_segment(segment, {**values, value: core.scatter(1, rows, POISON)})
        torch.testing.assert_close(results[value], core, rtol=FEWER_ROWS, atol=FEWER_ROWS)
        kept = torch.ones_like(core, dtype=torch.bool).scatter(1, rows, False)
        assert torch.equal(results[value][kept], core[kept])


def test_a_branch_reads_the_attention_that_another_one_runs_at_the_same_step() -> None:
    """The two streams of a joint attention, one computed whole, of the other a few tokens."""
    case = next(case for case in CASES if case.name == "AuraFlowTransformer2DModel")
    captured = capture_model(case.model(), case.at(0))
    structure = analyse(captured)
    block = cut_of(captured, structure, structure.sites[:2])
    score, value = Score(ScoreBase.RANDOM), SlotRef(1, SlotKind.VALUE)
    step = LocalStep((1.0, 1.0), refresh=score, writes=(SlotKind.VALUE,), attention=0)
    segment = rewritten(block.segment, [LocalStep(), step], RefreshTokens(), DropDead())
    assert not [ref for ref in segment.inputs if isinstance(ref, SlotRef) and ref.kind is SlotKind.ATTENTION]
    samples, tokens, _ = block.core(1).shape
    noise = {Noise(1, share_guidance=False): torch.rand(samples, tokens)}
    results = run_segment(segment, {**block.arguments, value: block.core(1) * 0, TokenCount(1): tokens, **noise})
    torch.testing.assert_close(results[value], block.core(1), rtol=FEWER_ROWS, atol=FEWER_ROWS)
