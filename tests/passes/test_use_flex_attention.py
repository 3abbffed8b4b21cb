"""`attention="flex"`: attention with a mask goes to torch's flex_attention, and no other; all of it without a GPU."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._dynamo.utils import counters

import dicompile
from dicompile.errors import InvalidSetting
from dicompile.lower import Backend, Code, ask_workers, requests_of
from dicompile.ops import flex
from dicompile.ops.attention_kernels import check_fits
from dicompile.ops.attention_scores import is_attention_score
from dicompile.passes import PASSES, Segment, passes_for
from dicompile.passes.score_tokens import ScoreTokens
from dicompile.passes.use_attention_kernel import UseFlexAttention
from dicompile.plan import ScoreBase
from tests.models import Sample, dit, frames_of, pixart, timesteps
from tests.passes.runs import STEPS, runs_of
from tests.passes.segments import (
    BATCH,
    FULL,
    HEADS,
    WIDTH,
    WORDS,
    Attention,
    Cut,
    chain,
    cut,
    produce,
    rewritten,
    run_segment,
)

FLEX = torch.ops.dicompile.flex_attention.default


class Masked(Attention):
    """Cross-attention that does not see the last words."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        query, key, value = self.split(self.query(x)), self.split(self.key(c)), self.split(self.value(c))
        mask = (torch.arange(c.shape[1]) < c.shape[1] - 2).view(1, 1, 1, -1)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return x + self.proj(attended.transpose(1, 2).reshape(x.shape))


def masked_block() -> Cut:
    return cut(chain(Attention(), Masked(), c=torch.randn(BATCH, WORDS, WIDTH)), 1)


def with_captions(layers: int) -> Sample:
    """PixArt, whose second caption is shorter than the first."""
    sample = pixart(layers)
    sample.inputs["encoder_attention_mask"] = torch.ones(2, 12)
    sample.inputs["encoder_attention_mask"][1, 5:] = 0
    return sample


def targets(segment: Segment) -> list[Any]:
    return [node.target for node in segment.graph.nodes]


def test_attention_with_a_mask_goes_there() -> None:
    block = masked_block()
    segment = rewritten(block.segment, [FULL], UseFlexAttention())
    assert "dicompile.flex_attention.default(" in str(segment)
    assert "scaled_dot_product" not in str(segment)
    assert UseFlexAttention() in passes_for("flex")
    assert passes_for("sdpa") == PASSES
    found, expected = (run_segment(each, block.arguments) for each in (segment, block.segment))
    for output, value in expected.items():
        assert torch.equal(found[output], value)


def test_attention_without_a_mask_stays_with_torch() -> None:
    block = cut(chain(Attention()))
    segment = rewritten(block.segment, [FULL], UseFlexAttention())
    assert str(segment) == str(rewritten(block.segment, [FULL]))


def test_on_a_gpu_a_score_reads_its_log_sum_exp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "NARROWEST", WIDTH // HEADS)
    scored = rewritten(masked_block().segment, [produce(ScoreBase.ENTROPY)], ScoreTokens())
    with scored.fake_mode:
        for node in scored.graph.nodes:
            if isinstance(node.meta.get("val"), Tensor):
                node.meta["val"] = torch.empty_like(node.meta["val"], device="cuda")
    segment = rewritten(scored, scored.steps, UseFlexAttention())
    (call,) = (node for node in segment.graph.nodes if node.target is FLEX)
    (score,) = filter(is_attention_score, segment.graph.nodes)
    assert call.args[-1] is True
    assert score.kwargs["lse"].args == (call, 1)


def test_on_a_cpu_a_score_shares_the_weights_of_attention_as_before() -> None:
    steps = [produce(ScoreBase.ENTROPY)]
    segment, expected = (rewritten(masked_block().segment, steps, *passes_for(way)) for way in ("flex", "sdpa"))
    assert targets(segment) == targets(expected)
    assert torch.ops.dicompile.attention_and_entropy.default in targets(segment)


@pytest.mark.parametrize("policy", ["none", "toca-pixart"])
def test_where_nothing_is_compiled_results_have_the_same_bits(policy: str) -> None:
    sample = with_captions(2)
    found, expected = (runs_of(sample, policy, backend="eager", attention=way) for way in ("flex", "sdpa"))
    for output, reference in zip(found, expected, strict=True):
        assert torch.equal(output, reference)


@pytest.mark.nightly
@pytest.mark.parametrize(
    "policy", ["none", dicompile.ToCaPixArt(score="random"), "toca-pixart"], ids=["none", "random", "toca"]
)
def test_compiled_results_are_those_of_torch(policy: Any) -> None:
    sample = with_captions(2)
    expected = runs_of(sample, policy, backend="eager")
    found = runs_of(sample, policy, attention="flex")
    for output, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(output, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("score", ["random", "entropy"])
def test_refreshed_tokens_attend_by_it_unless_a_score_on_a_cpu_shares_their_weights(score: Any) -> None:
    sample = with_captions(1)
    model = dicompile.optimize(
        sample.model, dicompile.ToCaPixArt(score=score), schedule=timesteps(STEPS), backend="eager", attention="flex"
    )
    for timestep in timesteps(STEPS):
        model(**{**sample.inputs, "timestep": torch.full_like(sample.inputs["timestep"], timestep)})
    variants = {v.name: targets(v.segment) for v in frames_of(model)[0].programs.variants.variants if "rtt" in v.name}
    assert [FLEX in found for found in variants.values()] == [score == "random"]


@pytest.mark.nightly
def test_other_batches_have_the_results_of_torch() -> None:
    sample = with_captions(1)
    model = dicompile.optimize(sample.model, "none", attention="flex")
    for times in (1, 2, 3):
        inputs = {
            name: value.repeat(times, *[1] * (value.ndim - 1)) if isinstance(value, Tensor) else value
            for name, value in sample.inputs.items()
        }
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs)[0], sample.model(**inputs)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.nightly
def test_what_a_worker_compiled_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    block = masked_block()
    segment = rewritten(block.segment, [FULL], *passes_for("flex"))
    code = Code(segment, Backend(attention="flex"))
    for future in ask_workers(requests_of([code], Backend(attention="flex"))):
        future.result(300)
    counters.clear()
    found = code(*[block.arguments[reference] for reference in segment.inputs])
    assert counters["inductor"]["fxgraph_cache_hit"] == 1
    assert counters["inductor"]["fxgraph_cache_miss"] == 0
    torch.testing.assert_close(found[0], block.output(), rtol=1e-4, atol=1e-5)


@contextmanager
def refused(where: str, why: str) -> Iterator[None]:
    with pytest.raises(InvalidSetting, match="attention 'flex' can compute no attention of this model") as error:
        yield
    assert (error.value.where, error.value.why) == (where, why)


def test_a_model_without_masks_is_refused() -> None:
    with refused("transformer_blocks.0.attn1", "it has no mask"):
        runs_of(dit(1), "none", backend="eager", attention="flex")


def test_a_graph_without_attention_is_refused() -> None:
    graph = fx.Graph()
    graph.output([])
    with refused("the model", "it has none"):
        check_fits(graph, flex.FLEX)


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("DEVICES", ("cuda",), "it is on cpu, not on cuda"),
        ("DTYPES", (), "it is in float32, not in float32, float16 or bfloat16"),
        ("has_kernel_for_cpu", lambda: False, "torch's kernel for a CPU needs AVX2"),
    ],
)
def test_where_it_can_compute_nothing_it_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: Any, why: str
) -> None:
    monkeypatch.setattr(flex, name, value)
    with refused("transformer_blocks.0.attn2", why):
        runs_of(with_captions(1), "none", backend="eager", attention="flex")


def attention_node(
    shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, of_values: int | None = None, **options: Any
) -> fx.Graph:
    """One attention with a mask on a GPU that is not there."""
    graph = fx.Graph()
    shapes = {"query": shape, "key": shape, "value": (*shape[:-1], of_values or shape[-1]), "mask": (1, 9)}
    nodes = [graph.placeholder(name) for name in shapes]
    with torch._subclasses.FakeTensorMode():
        for node, size in zip(nodes, shapes.values(), strict=True):
            node.meta["val"] = torch.empty(size, dtype=dtype, device="cuda")
        call = graph.call_function(torch.ops.aten.scaled_dot_product_attention.default, (*nodes,), options)
        call.meta["val"] = torch.empty(shapes["value"], dtype=dtype, device="cuda")
    graph.output([call])
    return graph


@pytest.mark.parametrize(
    ("graph", "why"),
    [
        (attention_node((2, 4, 9, 8)), "its heads are 8 wide, not 16 to 256"),
        (attention_node((2, 4, 9, 64), of_values=512), "its heads are 64 and 512 wide, not 16 to 256"),
        (attention_node((2, 4, 9, 64), torch.float64), "it is in float64, not in float32, float16 or bfloat16"),
        (attention_node((4, 9, 64)), "queries and keys are not [b, h, n, d] of one width"),
        (attention_node((2, 4, 9, 64), dropout_p=0.5), "it has dropout"),
    ],
)
def test_what_its_kernel_for_a_gpu_does_not_take_is_refused(graph: fx.Graph, why: str) -> None:
    with refused("scaled_dot_product_attention_default", why):
        check_fits(graph, flex.FLEX)


@pytest.mark.parametrize("width", [16, 40, 72, 256])
def test_other_widths_than_powers_of_two_are_taken(width: int, caplog: pytest.LogCaptureFixture) -> None:
    check_fits(attention_node((2, 4, 9, width)), flex.FLEX)
    assert not caplog.records


def test_what_has_a_mask_and_stays_is_said(caplog: pytest.LogCaptureFixture) -> None:
    graph = attention_node((2, 4, 9, 64))
    (call,) = graph.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default)
    with graph.inserting_before(call):
        graph.node_copy(call).kwargs = {"dropout_p": 0.1}
    with caplog.at_level(logging.WARNING, "dicompile"):
        check_fits(graph, flex.FLEX)
    assert "1 of 2 attentions stay with torch: scaled_dot_product_attention_default" in caplog.text
    assert "it has dropout" in caplog.text


def test_attention_without_a_mask_beside_some_with_one_is_no_news(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "dicompile"):
        runs_of(with_captions(1), "none", backend="eager", attention="flex")
    assert not caplog.records
