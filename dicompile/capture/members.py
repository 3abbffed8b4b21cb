"""Blocks of a list are traced once for each kind, however many there are.

A forward is traced with the blocks of its module lists left as they are: each is one node of the graph. What a block
does is captured from the block alone, and a capture holds for whatever module its guards hold for. So the next block is
asked whether they hold for it, too, and takes the same graph with its own tensors; where they do not, it is captured by
itself. In the end the graphs of the blocks go where the nodes are, and their guards below the paths of the blocks.

That is the same as tracing everything at once as long as nobody writes to what a block may read. Where Python writes to
any object that was there before, and wherever anything here is out of the ordinary, the forward is traced as a whole.
"""

from __future__ import annotations

import itertools
import logging
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor

from dicompile.capture.ambient import ambient, hooks_of_all
from dicompile.capture.arguments import Arguments
from dicompile.capture.captured import Captured
from dicompile.capture.dynamo import Traced, trace
from dicompile.capture.functional import laid_out_like
from dicompile.capture.guards import By, Guards, Path, Pins, called_by
from dicompile.capture.standins import shallow, stand_in_for
from dicompile.compat import lazy_graph_module, left_alone
from dicompile.nodes import results_of
from dicompile.text import clean_path

log = logging.getLogger("dicompile")

FEWEST = 2
"""Blocks of one class that make a list worth it."""
SMALLEST = 4
"""Modules of a block that is worth it."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OWN = object()


class Whole(Exception):
    """The forward has to be traced as a whole."""


def capture_by_members(module: nn.Module, arguments: Arguments) -> Captured | None:
    """Capture a module, each kind of block once.

    Args:
        module: the module; it is not run, and its tensors may be fake or on the meta device.
        arguments: of the call.

    Returns:
        None if it has no lists of blocks, or has to be traced as a whole.
    """
    try:
        return capture_members(module, arguments)
    except Exception as reason:  # the whole forward tells whether it is the model's
        log.debug("%s is traced as a whole: %r", type(module).__name__, reason)
        return None


def capture_members(module: nn.Module, arguments: Arguments) -> Captured | None:
    """The same, where whatever is wrong is raised.

    Raises:
        Whole: it has to be traced as a whole.
        CannotCapture: Dynamo cannot take it as one graph.
        Unsettled: the forward changes what it keeps.
    """
    traced = _trace(module, arguments)
    return None if traced is None else traced.captured(module, arguments)


def _trace(module: nn.Module, arguments: Arguments) -> Traced | None:
    members = {} if arguments.numbers else find_members(module)
    if not members:
        return None
    blocks = _Blocks(members, ambient())
    outer = trace(module, arguments, stand_in_for(module, blocks.stand_ins))
    # Dynamo may run the graph of a region again for another block, whose forward it was told not to look into.
    has_regions = any(isinstance(node.target, HigherOrderOperator) for node in outer.graph.graph.nodes)
    return None if outer.writes or has_regions else _Inlined(outer, blocks).traced()


def find_members(module: nn.Module) -> dict[Path, nn.Module]:
    """Blocks that come in lists, by path; of lists within lists the outer ones."""
    if hooks_of_all():
        return {}
    found: dict[Path, nn.Module] = {}

    def search(parent: nn.Module, path: Path) -> None:
        children = {name: child for name, child in parent._modules.items() if child is not None}
        below = path.attribute("_modules") if path.links else path.via(By.DICT).item("_modules")
        classes = [type(child) for child in children.values()] if isinstance(parent, nn.ModuleList) else []
        for name, child in children.items():
            if classes.count(type(child)) >= FEWEST and _is_plain(child):
                found[below.item(name)] = child
            else:
                search(child, below.item(name))

    search(module, Path())
    shared = [id(child) for child in found.values()]
    return {path: child for path, child in found.items() if shared.count(id(child)) == 1}


def _is_plain(block: nn.Module) -> bool:
    """True for a block of some size that nobody changed what calling it means."""
    kind = type(block)
    return (
        not called_by(kind)
        and "forward" not in vars(block)
        and block._compiled_call_impl is None
        and not any(vars(block)[name] for name in _HOOKS)
        and len(list(itertools.islice(block.modules(), SMALLEST))) == SMALLEST
    )


@dataclass(frozen=True)
class _Kind:
    """What blocks of one kind do.

    Attributes:
        block: the one that was captured.
        arguments: of its call; of any call the tensors are alike.
        captured: what it does.
    """

    block: nn.Module
    arguments: Arguments
    captured: Captured

    def results(self) -> list[Tensor]:
        """What its graph returns, as new tensors of the mode that is active."""
        made = [laid_out_like(_example(node)) for node in results_of(self.captured.graph.graph)]
        results = [result for result in made if result is not None]
        if len(results) < len(made):
            raise Whole
        return results

    def packed(self, results: Sequence[Any], given: Sequence[Any]) -> Any:
        """What the block returns, made of what its graph returns and of the tensors among its arguments."""
        own: list[Any] = [_OWN] * len(self.captured.guards.tensors)
        return self.captured.pack(results, [*own, *given])


def _capture_kind(block: nn.Module, arguments: Arguments) -> _Kind:
    real = _real(block, arguments)
    traced = _trace(block, real) or trace(block, real)
    if traced.writes or traced.taken_out:
        raise Whole
    return _Kind(block, arguments, traced.captured(block, real))


def _real(block: nn.Module, arguments: Arguments) -> Arguments:
    """Arguments that Dynamo takes, like those which it made itself."""
    mode = next((t.fake_mode for t in block.parameters() if isinstance(t, FakeTensor)), None)

    def made(like: Tensor) -> Tensor:
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)

    if mode is None:
        tensors = list(map(made, arguments.given))
    else:
        with mode:
            tensors = list(map(made, arguments.given))
    args, kwargs = arguments.filled(tensors)
    return Arguments.of(args, kwargs)


class _Blocks:
    """Stand-ins for blocks, whose forward Dynamo does not look into.

    Args:
        members: the blocks, by path.
        state: global state under which it is found out what blocks do.

    Attributes:
        kinds: what is known of that: each was captured when the first block of the kind was called.
    """

    def __init__(self, members: Mapping[Path, nn.Module], state: tuple[object, ...]) -> None:
        self.kinds: list[_Kind] = []
        self._state = state
        self._pins: dict[tuple[int, int], Pins | str] = {}
        self._most = max(3, len(members) // 2)
        self.places: dict[object, tuple[Path, nn.Module]] = {}
        self.stand_ins: dict[int, nn.Module] = {}
        for path, block in members.items():
            made = self.stand_ins[id(block)] = shallow(block)
            forward = vars(made)["forward"] = left_alone(self._forward_of(block))
            self.places[forward] = path, block

    def _forward_of(self, block: nn.Module) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            arguments = Arguments.of(args, kwargs)
            if ambient() != self._state or not all(type(tensor) is FakeTensor for tensor in arguments.tensors):
                raise Whole
            kind = self.kind_of(block, arguments) or self._new_kind(block, arguments)
            result = kind.packed(kind.results(), arguments.tensors)
            if not _can_return(result):
                raise Whole
            return result

        return forward

    def kind_of(self, block: nn.Module, arguments: Arguments) -> _Kind | None:
        """What a block does when it is called like this, if that is known."""
        alike = (k for k in self.kinds if type(k.block) is type(block) and k.arguments.key == arguments.key)
        return next((kind for kind in alike if isinstance(self.pins(block, kind), Pins)), None)

    def pins(self, block: nn.Module, kind: _Kind) -> Pins | str:
        """What the guards of a kind find in a block, or which of them does not hold."""
        key = id(block), id(kind)
        if key not in self._pins:
            self._pins[key] = kind.captured.guards.pin(block)
        return self._pins[key]

    def _new_kind(self, block: nn.Module, arguments: Arguments) -> _Kind:
        if len(self.kinds) == self._most:
            raise Whole
        self.kinds.append(_capture_kind(block, arguments))
        return self.kinds[-1]


def _can_return(result: Any) -> bool:
    """True for what Dynamo takes as the result of one node."""
    if isinstance(result, (tuple, list)):
        return type(result) in (tuple, list) and all(item is None or isinstance(item, Tensor) for item in result)
    return isinstance(result, Tensor)


@dataclass
class _Inlined:
    """A graph with the graphs of blocks in the place of their nodes.

    Args:
        outer: with blocks as nodes.
        blocks: what they do.
    """

    outer: Traced
    blocks: _Blocks
    _graph: fx.Graph = field(default_factory=fx.Graph)
    _own: dict[int, fx.Node] = field(default_factory=dict)
    _inputs: dict[fx.Node, Any] = field(default_factory=dict)
    _made: dict[fx.Node, Any] = field(default_factory=dict)
    _parts: dict[tuple[Path, int], tuple[Guards, list[Tensor]]] = field(default_factory=dict)

    def traced(self) -> Traced:
        """The whole.

        Raises:
            Whole: a result of a block is used in a way that is not known.
        """
        source = self.outer.graph.graph
        anchor = self._graph.output(())
        placeholders = dict(zip(source.find_nodes(op="placeholder"), self.outer.inputs, strict=True))
        for node, value in placeholders.items():
            self._placeholder(node, value)
        for node in source.nodes:
            if node.op == "call_function" and node.target in self.blocks.places:
                with self._graph.inserting_before(anchor):
                    self._made[node] = self._inline(node, *self.blocks.places[node.target])
            elif node.op not in ("placeholder", "output"):
                with self._graph.inserting_before(anchor):
                    self._made[node] = self._copied(node)
        anchor.args = (fx.node.map_arg(source.output_node().args[0], self._node),)
        inputs = self._sorted_inputs()
        module = lazy_graph_module(self.outer.graph, self._graph)
        guards, own = _joined([(self.outer.guards, self.outer.own), *self._parts.values()])
        codes = self.outer.codes.union(*(kind.captured.codes for kind in self.blocks.kinds))
        return replace(self.outer, graph=module, guards=guards, own=own, inputs=inputs, codes=codes)

    def _placeholder(self, node: fx.Node, value: Any) -> fx.Node:
        """The input for a value; `node` is like it."""
        if id(value) not in self._own:
            first = next(iter(self._graph.nodes))
            with self._graph.inserting_before(first):
                made = self._graph.placeholder(node.name)
            made.target, made.meta = made.name, dict(node.meta)
            self._own[id(value)], self._inputs[made] = made, value
        self._made[node] = self._own[id(value)]
        return self._own[id(value)]

    def _node(self, node: fx.Node) -> fx.Node:
        made = self._made[node]
        if not isinstance(made, fx.Node):
            raise Whole  # a tuple of tensors goes where nobody takes it apart
        return made

    def _copied(self, node: fx.Node) -> Any:
        taken: Any = node.args
        if node.target is operator.getitem and isinstance(self._made.get(taken[0]), (tuple, list)):
            return self._made[taken[0]][taken[1]]
        return self._graph.node_copy(node, self._node)

    def _inline(self, call: fx.Node, path: Path, block: nn.Module) -> Any:
        """Copy what a block does; returns what it returns, of nodes."""
        args, kwargs = fx.node.map_arg((call.args, call.kwargs), _example)
        given = Arguments.of(tuple(args), dict(kwargs))
        kind = self.blocks.kind_of(block, given)
        if kind is None:
            raise Whole
        nodes = {id(_example(node)): self._node(node) for node in reversed(call.all_input_nodes)}
        captured, own = kind.captured, self._own_tensors(path, block, kind)
        tensors: list[Any] = [*own, *(nodes[id(tensor)] for tensor in given.tensors)]
        known: dict[fx.Node, fx.Node] = {}
        for node, place in zip(captured.graph.graph.find_nodes(op="placeholder"), captured.order, strict=True):
            known[node] = self._placeholder(node, own[place]) if place < len(own) else tensors[place]
        for node in captured.graph.graph.nodes:
            if node.op == "get_attr":
                raise Whole
            if node.op not in ("placeholder", "output"):
                known[node] = self._graph.node_copy(node, known.__getitem__)
                known[node].meta["nn_module_stack"] = _below(path, block, node)
        results = [known[node] for node in results_of(captured.graph.graph)]
        return kind.packed(results, tensors[len(own) :])

    def _own_tensors(self, path: Path, block: nn.Module, kind: _Kind) -> list[Tensor]:
        pins = self.blocks.pins(block, kind)
        assert isinstance(pins, Pins)  # else the block would be of another kind
        if (path, id(kind)) not in self._parts:
            self._parts[path, id(kind)] = kind.captured.guards.below(path), pins.tensors
        return pins.tensors

    def _sorted_inputs(self) -> list[Any]:
        """Put the inputs in the order of their first use; returns their values."""
        used = dict.fromkeys(p for node in self._graph.nodes for p in node.all_input_nodes if p.op == "placeholder")
        order = [*used, *(node for node in self._inputs if node not in used)]
        head = next(iter(self._graph.nodes))
        for node in order:
            if node is not head:
                head.prepend(node)
            else:
                head = head.next
        return [self._inputs[node] for node in order]


def _example(node: fx.Node) -> Any:
    return node.meta.get("example_value")


def _joined(parts: Sequence[tuple[Guards, Sequence[Tensor]]]) -> tuple[Guards, list[Tensor]]:
    """Everything that several guards say, and the tensors at its paths."""
    facts = {(fact.path, fact.kind): fact for guards, _ in parts for fact in guards.facts}
    found = {
        p: (t, meta) for guards, own in parts for p, t, meta in zip(guards.tensors, own, guards.metas, strict=True)
    }
    hooks = {path: count for guards, _ in parts for path, count in zip(guards.modules, guards.hooks, strict=True)}
    called = {path: by for guards, _ in parts for path, by in zip(guards.modules, guards.called, strict=True)}
    own = [tensor for tensor, _ in found.values()]
    first = {id(tensor): i for i, tensor in reversed(list(enumerate(own)))}
    joined = Guards(
        facts=tuple(sorted(facts.values(), key=lambda fact: len(fact.path.links))),
        tensors=tuple(found),
        metas=tuple(meta for _, meta in found.values()),
        same=tuple((first[id(tensor)], i) for i, tensor in enumerate(own) if first[id(tensor)] != i),
        modules=tuple(hooks),
        hooks=tuple(hooks.values()),
        called=tuple(called.values()),
    )
    return joined, own


def _below(path: Path, block: nn.Module, node: fx.Node) -> dict[str, tuple[str, type]]:
    """The modules that run a node of a block, from the module that the block is in."""
    stack = {str(id(block)): (f"L['self'].{path.name}", type(block))}
    for key, (inner, kind) in (node.meta.get("nn_module_stack") or {}).items():
        name = clean_path(inner)
        if name:
            stack[f"{path.name} {key}"] = (f"L['self'].{path.name}.{name}", kind)
    return stack
