"""Blocks of a list are traced once for each kind; what comes out is what tracing everything gives."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, fx, nn
from torch._dynamo import funcname_cache

import dicompile
from dicompile.capture import Arguments, Captured, members, normalised, values_of
from dicompile.capture.call import capture_call
from dicompile.capture.dynamo import capture_by_dynamo
from dicompile.text import tensor_text
from tests.models import MODELS, dit, plain_dit

SHARED = types.SimpleNamespace(scale=1.0, number=0)


class Block(nn.Module):
    """A branch of two linear layers; what else it does, a subclass says."""

    def __init__(self, number: int, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.act, self.down = nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        self.number, self.scale = number, 1.0

    def forward(self, x: Tensor, t: Tensor) -> Any:
        return x + self.branch(x, t) * self.scale

    def branch(self, x: Tensor, t: Tensor) -> Tensor:
        made: Tensor = self.down(self.act(self.up(self.norm(x))))
        return made * torch.cos(t)[:, None, None]


class Net(nn.Module):
    """A stack of blocks."""

    def __init__(self, kind: Callable[[int], nn.Module] = Block, depth: int = 6) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind(i) for i in range(depth))
        self.head = nn.Linear(8, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, t)
        return self.head(x)  # type: ignore[no-any-return]


class Numbered(Block):
    """Depends on its place in the list."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x + self.branch(x, t) / (1 + self.number % 2)


class InPlace(Block):
    """Writes to what it is given, and returns it."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x += self.branch(x, t)
        return x


class InPlaceNet(Net):
    """Leaves its input as it is."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x * 2, t)


class Pair(Block):
    """Returns several values, one of them as it came."""

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, None]:
        return x + self.branch(x, t), t, None


class PairNet(Net):
    """Takes them apart."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for block in self.blocks:
            x, t, nothing = block(x, t)
            assert nothing is None
        return self.head(x)  # type: ignore[no-any-return]


class Named(Block):
    """Returns a dictionary."""

    def forward(self, x: Tensor, t: Tensor) -> dict[str, Tensor]:
        return {"x": x + self.branch(x, t)}


class NamedNet(Net):
    """Looks into it."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, t)["x"]
        return self.head(x)  # type: ignore[no-any-return]


class ReadsShared(Block):
    """Reads what a model, or another block, writes."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x + self.branch(x, t) * (1 + SHARED.number)


class TellsBlocks(Net):
    """Tells every block its number, by an object that all of them read."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            SHARED.number = i
            x = block(x, t)
        SHARED.number = 0
        return self.head(x)  # type: ignore[no-any-return]


class Counts(ReadsShared):
    """Counts the blocks that ran in a shared object."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        SHARED.number = SHARED.number + 1 if self.number else 0
        made = x + self.branch(x, t) * (1 + SHARED.number)
        if self.number == 5:
            SHARED.number = 0
        return made


class Cast(Net):
    """Runs its blocks in half precision."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            for block in self.blocks:
                x = block(x, t)
        return self.head(x.float())  # type: ignore[no-any-return]


class Nested(Net):
    """Stages of blocks."""

    def __init__(self) -> None:
        super().__init__(depth=0)
        self.stages = nn.ModuleList(Net(depth=4) for _ in range(3))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x, t)
        return self.head(x)  # type: ignore[no-any-return]


def tied() -> Net:
    """Every block has the first one's linear layers."""
    net = Net()
    for block in net.blocks:
        block.up = net.blocks[0].up  # type: ignore[union-attr]
    return net


def one_scaled() -> Net:
    """One block is set otherwise than the rest."""
    net = Net()
    net.blocks[3].scale = 0.5  # type: ignore[union-attr]
    return net


def one_hooked() -> Net:
    """One block has a hook."""
    net = Net()
    net.blocks[2].register_forward_hook(lambda _, __, result: result * 2)
    return net


NETS: dict[str, Callable[[], nn.Module]] = {
    "plain": Net, "numbered": lambda: Net(Numbered), "in place": lambda: InPlaceNet(InPlace),
    "pairs": lambda: PairNet(Pair), "dictionaries": lambda: NamedNet(Named), "told": lambda: TellsBlocks(ReadsShared),
    "counting": lambda: Net(Counts), "cast": Cast, "nested": Nested,
    "tied": tied, "one scaled": one_scaled, "one hooked": one_hooked,
}  # fmt: skip


def inputs() -> dict[str, Tensor]:
    return {"x": torch.randn(2, 5, 8), "t": torch.rand(2)}


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Classes of what Dynamo was asked to trace."""
    seen: list[str] = []
    original = members.trace

    def trace(module: nn.Module, *rest: Any) -> Any:
        seen.append(type(module).__name__)
        return original(module, *rest)

    monkeypatch.setattr(members, "trace", trace)
    return seen


@pytest.mark.parametrize("name", NETS)
@pytest.mark.sampled
def test_it_computes_what_the_model_computes(name: str) -> None:
    torch.manual_seed(0)
    net, given = NETS[name](), inputs()
    with torch.no_grad():
        expected = net(**{key: value.clone() for key, value in given.items()})
        optimized = dicompile.optimize(net, "none", mode="eager")
        for _ in range(2):
            assert torch.equal(optimized(**{key: value.clone() for key, value in given.items()}), expected)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.sampled
def test_it_is_the_graph_of_the_whole_forward(name: str) -> None:
    model, given = MODELS[name]()
    arguments = Arguments.of((), given)
    made = members.capture_by_members(model, arguments)
    assert made is not None
    whole = capture_by_dynamo(model, arguments)

    def text(captured: Captured) -> list[str]:
        graph = normalised(model, captured, values_of(model, captured, arguments)).graph_module
        return [
            f"{node.target} {tensor_text(node.meta['val'])}" for node in graph.graph.nodes if node.op == "call_function"
        ]

    assert text(made) == text(whole)
    for paths, expected in ((made.guards.tensors, whole.guards.tensors), (made.guards.modules, whole.guards.modules)):
        assert {path.name for path in paths} == {path.name for path in expected}


def test_every_kind_of_block_is_traced_once_at_any_depth(traces: list[str]) -> None:
    seen = {}
    for depth in (2, 4):
        traces.clear()
        capture_call(dit(depth).model, Arguments.of((), dit(depth).inputs))
        seen[depth] = list(traces)
    assert seen[2] == seen[4]
    assert seen[4].count("DiTTransformer2DModel") == 1
    assert seen[4].count("BasicTransformerBlock") == 2  # the first one takes a stream of another memory layout


class Around(ModelHook):
    """Changes what goes in and comes out, by a setting of the module and one of its own."""

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs | {"x": kwargs["x"] * module.factor}

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return output + module.head.bias


def by_diffusers(model: nn.Module) -> None:
    for name in ("first", "second"):
        HookRegistry.check_if_exists_or_initialize(model).register_hook(Around(), name)


def by_a_function(model: nn.Module) -> None:
    forward = model.forward

    def halved(x: Tensor, t: Tensor, *, by: float = 2.0) -> Tensor:
        return forward(x, t) / by

    model.forward = halved


@pytest.mark.parametrize("put_around", [by_diffusers, by_a_function])
def test_a_forward_that_a_library_has_put_hooks_around_is_traced_by_kinds_too(
    traces: list[str], put_around: Callable[[nn.Module], None]
) -> None:
    model = Net()
    model.factor = 2.0  # type: ignore[assignment]
    forward = model.forward
    put_around(model)
    hooked = model.forward
    given = inputs()
    captured = capture_call(model, arguments := Arguments.of((), given))
    assert traces.count("Net") == traces.count("Block") == 1
    assert model.forward is hooked
    graph = normalised(model, captured, values_of(model, captured, arguments)).graph_module
    (made,) = graph(*captured.pick(captured.tensors(captured.guards.found(model).tensors, arguments)))
    assert torch.equal(made, model(**given))
    assert not torch.equal(made, forward(**given))
    model.factor = 3.0  # type: ignore[assignment]
    assert isinstance(captured.guards.pin(model), str) is (put_around is by_diffusers)


def test_no_python_code_is_written_and_no_file_is_tokenized_for_each_block(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[fx.Graph] = []
    original = fx.Graph.python_code

    def python_code(graph: fx.Graph, *rest: Any, **options: Any) -> Any:
        written.append(graph)
        return original(graph, *rest, **options)

    monkeypatch.setattr(fx.Graph, "python_code", python_code)
    funcname_cache.clearcache()
    seen = {}
    for depth in (2, 4):
        written.clear()
        model, given = dit(depth)
        arguments = Arguments.of((), given)
        captured = capture_call(model, arguments)
        normalised(model, captured, values_of(model, captured, arguments))
        seen[depth] = len(written), max(len(graph.nodes) for graph in written)
    assert seen[2] == seen[4]  # the outer forward, and a block of each kind
    assert not funcname_cache.cache


def test_blocks_of_unlike_settings_are_kinds_of_their_own(traces: list[str]) -> None:
    capture_call(Net(Numbered), Arguments.of((), inputs()))
    assert traces.count("Numbered") > 2  # every number is one: the forward reads it, so it is traced as a whole
    traces.clear()
    capture_call(one_scaled(), Arguments.of((), inputs()))
    assert traces.count("Block") == 2


@pytest.mark.parametrize("net", [TellsBlocks(ReadsShared), Net(Counts)], ids=["model writes", "block writes"])
def test_where_python_writes_the_forward_is_traced_as_a_whole(net: nn.Module) -> None:
    assert members.capture_by_members(net, Arguments.of((), inputs())) is None


@pytest.mark.parametrize(
    "edit",
    [
        lambda net: setattr(net.blocks[4], "scale", 3.0),
        lambda net: setattr(net.blocks[4], "act", nn.SiLU()),
        lambda net: net.blocks.__delitem__(1),
        lambda net: net.blocks.append(Block(7)),
        lambda net: net.blocks[5].register_forward_hook(lambda _, __, result: result + 1),
        lambda net: setattr(net.blocks[2], "forward", lambda x, t: x * 2),
        lambda net: setattr(net.blocks[2], "branch", lambda x, t: x * 2),
        lambda net: setattr(net.blocks[0].up, "weight", net.blocks[1].up.weight),
        lambda net: net.blocks.__setitem__(3, Block(9)),
    ],
    ids=["scale", "activation", "removed", "added", "hook", "forward", "method", "tied", "replaced"],
)
@pytest.mark.sampled
def test_an_edit_of_any_block_is_seen(edit: Callable[[Any], Any]) -> None:
    torch.manual_seed(0)
    net, given = Net(), inputs()
    optimized = dicompile.optimize(net, "none", mode="eager")
    with torch.no_grad():
        assert torch.equal(optimized(**given), net(**given))
        edit(net)
        assert torch.equal(optimized(**given), net(**given))


def test_nothing_of_the_model_is_touched() -> None:
    net = Net()
    before = {name: (id(module), dict(vars(module))) for name, module in net.named_modules()}
    assert members.capture_by_members(net, Arguments.of((), inputs())) is not None
    assert {name: (id(module), dict(vars(module))) for name, module in net.named_modules()} == before


def test_a_deep_model_has_the_sites_of_all_blocks() -> None:
    model, given = plain_dit(10)
    optimized = dicompile.optimize(model, "none", backend="eager")
    with torch.no_grad():
        optimized(**given)
    assert len(dicompile.structure_of(optimized).blocks) == 10
