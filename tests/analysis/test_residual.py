"""Streams, branches, cores and kinds: on the archetypes, and on small models with one shape each."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dicompile
from dicompile.analysis import ModelStructure, analyse
from dicompile.capture import Capture
from tests.capture.captured import captured, node_of, structure, tiny
from tests.models import MODELS, flux

WIDTH, TOKENS, TEXT = 8, 6, 5
LATENT, TEXT_TOKENS = (2, TOKENS, WIDTH), (2, TEXT, WIDTH)


@pytest.mark.parametrize("name", MODELS)
def test_the_core_is_the_last_projection_and_the_update_its_gated_value(name: str) -> None:
    graph, found = captured(name), structure(name)
    for site in found.sites:
        core, update, add = (node_of(graph, node) for node in (site.core, site.update, site.add))
        assert str(core.target) == "aten.linear.default", site
        assert str(add.target) == "aten.add.Tensor", site
        assert set(add.all_input_nodes) == {update, node_of(graph, site.source)}, site
        # PixArt's cross-attention has no gate, only the division by a rescale factor of 1.
        gate = "aten.div.Tensor" if site.kind.value == "cross-attention" else "aten.mul.Tensor"
        assert str(update.target) == gate, site
        assert core in update.all_input_nodes or str(update.target) == "aten.mul.Tensor", site


def test_the_core_of_pixarts_self_attention_lies_before_its_gate_and_its_division() -> None:
    graph, site = captured("pixart"), structure("pixart").sites[0]
    gated = node_of(graph, site.update)
    (divided,) = [node for node in gated.all_input_nodes if str(node.target) == "aten.div.Tensor"]
    assert divided.args[0] is node_of(graph, site.core)


class Model(nn.Module):
    """A stack of two blocks of one test's own, with the inputs of a text-conditional model."""

    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(2))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, text: Tensor, t: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, text, torch.cos(t)[:, None, None])
        return self.head(x)


class Block(nn.Module):
    """Layers that the blocks below put together."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.post = nn.LayerNorm(WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.mix = nn.Linear(TOKENS, TOKENS)
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def attend(self, x: Tensor, context: Tensor) -> Tensor:
        query, key, value = (
            layer(y).unflatten(-1, (2, -1)).transpose(1, 2)
            for layer, y in ((self.query, x), (self.key, context), (self.value, context))
        )
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x)))


def found_in(block: type[nn.Module]) -> tuple[Capture, ModelStructure]:
    graph = tiny(Model(block), x=torch.randn(LATENT), text=torch.randn(TEXT_TOKENS), t=torch.ones(2))
    return graph, analyse(graph)


def kinds(found: ModelStructure) -> list[list[str]]:
    return [[site.kind.value for site in found.sites_of(block)] for block in found.blocks]


class ConvolvedMlp(Block):
    def forward(self, x: Tensor, text: Tensor, t: Tensor) -> Tensor:
        h = self.up(self.conv(self.norm(x).transpose(1, 2)).transpose(1, 2))
        return x + t * self.down(F.silu(h))


class MixedMlp(Block):
    def forward(self, x: Tensor, text: Tensor, t: Tensor) -> Tensor:
        return x + t * self.mix(self.norm(x).transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (ConvolvedMlp, "aten.conv1d.default in blocks.{b}.conv mixes neighbouring tokens"),
        (MixedMlp, "aten.linear.default in blocks.{b}.mix contracts the token axis"),
    ],
)
def test_an_mlp_that_mixes_tokens_is_a_site_but_not_token_wise_and_the_reason_names_operator_and_module(
    block: type[nn.Module], reason: str
) -> None:
    _, found = found_in(block)
    assert kinds(found) == [["mlp"], ["mlp"]]
    assert [str(site.tokens) for site in found.sites] == [f"no: {reason.format(b=b)}" for b in range(2)]
    assert [site.token_flops for site in found.sites] == [0, 0]


class CrossAttention(Block):
    def forward(self, x: Tensor, text: Tensor, t: Tensor) -> Tensor:
        return x + self.out(self.attend(self.norm(x), text))


class Parallel(Block):
    def forward(self, x: Tensor, text: Tensor, t: Tensor) -> Tensor:
        h = self.norm(x)
        return x + t * (self.out(self.attend(h, h)) + self.mlp(h))


class Two(Block):
    def forward(self, x: Tensor, text: Tensor, t: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + self.out(self.attend(h, h))
        return x + self.mlp(self.post(x))


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (CrossAttention, ["cross-attention"]),
        (Parallel, ["parallel"]),
        (Two, ["self-attention", "mlp"]),
    ],
)
def test_kinds_of_branch(block: type[nn.Module], expected: list[str]) -> None:
    assert kinds(found_in(block)[1]) == [expected] * 2


class Sandwich(Block):
    def forward(self, x: Tensor, text: Tensor, t: Tensor) -> Tensor:
        return x + t * self.scale * self.post(self.mlp(self.norm(x)))


class SelfGated(Block):
    def forward(self, x: Tensor, text: Tensor, t: Tensor) -> Tensor:
        return x + t * (torch.sigmoid(x) * self.mlp(self.norm(x)))


class Negative(Block):
    def forward(self, x: Tensor, text: Tensor, t: Tensor) -> Tensor:
        return -(self.mlp(x) / 2) + x


@pytest.mark.parametrize(
    ("block", "core"),
    [
        (Sandwich, "aten.layer_norm.default"),  # a norm after the branch is part of what is cached
        (SelfGated, "aten.mul.Tensor"),  # a gate made from the stream itself is no gate: it needs the stream
        (Negative, "aten.linear.default"),
    ],
)
def test_where_the_gate_ends_and_the_core_begins(block: type[nn.Module], core: str) -> None:
    graph, found = found_in(block)
    assert [str(node_of(graph, site.core).target) for site in found.sites] == [core] * 2
    assert all(site.core != site.update for site in found.sites)


class NoBranch(Block):
    """Adds that are no residual branches: nothing is multiplied, it is scaled, or comes from elsewhere."""

    def forward(self, x: Tensor, text: Tensor, t: Tensor) -> Tensor:
        x = x + F.silu(x) * t
        x = torch.add(x, self.mlp(x), alpha=2)
        return x + self.out(text.mean(1, keepdim=True)).expand(x.shape)


def test_adds_that_are_no_branches_are_not_found() -> None:
    assert found_in(NoBranch)[1].sites == ()


class LongSkip(nn.Module):
    """The whole stack is a branch too, but not a site: the sites lie inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Two() for _ in range(2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = x
        for block in self.blocks:
            h = block(h, h, t)
        return x + h * torch.cos(t)[:, None, None]


def test_a_long_skip_around_sites_is_no_site() -> None:
    found = analyse(tiny(LongSkip(), x=torch.randn(LATENT), t=torch.ones(2)))
    assert kinds(found) == [["self-attention", "mlp"]] * 2


class Casts(nn.Module):
    """Keeps its stream in float32 and computes its branches in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Two().to(torch.bfloat16) for _ in range(2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block.mlp(x.to(torch.bfloat16)).to(torch.float32) * torch.cos(t)[:, None, None]
        return x


def test_the_core_is_stored_in_the_precision_it_was_computed_in() -> None:
    graph = tiny(Casts(), x=torch.randn(LATENT), t=torch.ones(2))
    found = analyse(graph)
    assert [site.core_bytes for site in found.sites] == [2 * TOKENS * WIDTH * 2] * 2
    assert len(found.streams) == 1


class Joined(nn.Module):
    """Two streams that become one half way, as in FLUX."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text, self.both = Two(), Two(), nn.ModuleList(Two() for _ in range(2))

    def forward(self, x: Tensor, text: Tensor, t: Tensor) -> Tensor:
        text = text + self.text.mlp(text) * x.mean() * torch.cos(t)[:, None, None]
        x = x + self.image.mlp(x)
        both = torch.cat([text, x], 1)
        for block in self.both:
            both = block(both, both, t)
        return both[:, TEXT:]


def test_a_stream_goes_on_through_joins_and_slices() -> None:
    found = analyse(tiny(Joined(), x=torch.randn(LATENT), text=torch.randn(TEXT_TOKENS), t=torch.ones(2)))
    assert [site.stream for site in found.sites] == [0, 1, 1, 1, 1, 1]


class Flat(nn.Module):
    """Tokens of all samples in one axis: a site, but token refresh needs a batch axis."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block.mlp(x) * torch.cos(t)
        return x


def test_a_stream_without_a_batch_axis_is_not_token_wise() -> None:
    found = analyse(tiny(Flat(), x=torch.randn(12, WIDTH), t=torch.ones(1)))
    assert [str(site.tokens) for site in found.sites] == [
        "no: the stream has 2 axes instead of batch, token and channel"
    ] * 2


class NoLatent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(4, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, y: Tensor) -> Tensor:
        h = self.embedding(y)
        return h + self.linear(h)


def test_a_model_without_a_latent_has_no_sites() -> None:
    found = analyse(tiny(NoLatent(), y=torch.ones(3, dtype=torch.int64)))
    assert (found.sites, found.blocks, found.streams, found.grid) == ((), (), (), None)
    assert found.flops == 2 * 3 * WIDTH * WIDTH


def test_one_text_for_a_batch_of_pictures_is_a_stream_like_any_other() -> None:
    """Pipelines do not repeat embeddings that users give them for several pictures."""
    sample = flux(2)
    pictures = ("hidden_states", "timestep", "guidance", "pooled_projections")
    batch = {name: torch.cat([value] * 2) if name in pictures else value for name, value in sample.inputs.items()}
    model = dicompile.optimize(sample.model, dicompile.FORA(interval=2), schedule=4, mode="eager")
    with torch.no_grad():
        torch.testing.assert_close(model(**batch)[0], sample.model(**batch)[0])
    found, alone = dicompile.structure_of(model), structure("flux")
    assert [(block.path, len(block.sites)) for block in found.blocks] == [
        (block.path, len(block.sites)) for block in alone.blocks
    ]
    assert [site.kind for site in found.sites] == [site.kind for site in alone.sites]
