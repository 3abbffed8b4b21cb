"""Capture a model by running it once: for models that read values of their inputs in Python, which Dynamo cannot take.

Everything that Python reads from a tensor (``.tolist()``, ``if mask.any():``, ``x[mask]``) is written down together
with the inputs it came from. The graph then holds for calls with the same values there, and whoever uses it has to
compare them (`Captured.reads`). Values computed from the latent or the timestep differ at every step: a model that
reads those cannot be captured. What Python reads of the module itself, `reads` notes.

The run computes with copies of the arguments, and buffers that it wrote to are put back: a refusal changes nothing.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, make_fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from dicompile.capture.ambient import entry_of
from dicompile.capture.arguments import Arguments, TakenOut, Watched
from dicompile.capture.canonical import drop_switches
from dicompile.capture.captured import Captured, Unsettled, packer
from dicompile.capture.data import FollowedData
from dicompile.capture.flex import written_out
from dicompile.capture.guards import Guards, Path
from dicompile.capture.reads import Reads
from dicompile.capture.roles import Role
from dicompile.compat import transforms_undone
from dicompile.errors import CannotCapture, DicompileError
from dicompile.nodes import walk
from dicompile.opened import tensors_in_result
from dicompile.ops.collectives import is_collective_operator
from dicompile.text import first_line

# Functions that return Python values, and those whose result has as many elements as the values say.
_READS = frozenset({
    Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__bool__, Tensor.__int__, Tensor.__float__,
    Tensor.__index__, Tensor.__contains__, Tensor.equal, Tensor.allclose, torch.equal, torch.allclose,
})  # fmt: skip
_SIZED_BY_VALUES = frozenset({
    Tensor.nonzero, torch.nonzero, torch.argwhere, Tensor.argwhere, torch.unique, Tensor.unique, torch.bincount,
    Tensor.bincount, torch.unique_consecutive, Tensor.unique_consecutive,
})  # fmt: skip


def capture_by_running(module: nn.Module, arguments: Arguments) -> Captured:
    """Run a module once and write down what it does.

    Args:
        module: the module; a forward of it computes with real values.
        arguments: of the call; their numbers are constants of the graph.

    Raises:
        CannotCapture: it computes with tensors, or depends on Python, in a way that leaves no trace.
        Unsettled: it changed what it keeps.
    """
    own = module_tensors(module)
    copied, forward = arguments.copied(), getattr(module, entry_of(module))
    reads, reading, data = Reads(module, own), _Reading(), FollowedData()
    returned: list[Any] = []
    taken_out: list[tuple[TakenOut, ...]] = []

    def run(*_: Tensor) -> list[Tensor]:
        watched = Watched(copied.args, copied.kwargs)
        with data, reading, reads.noted():
            result = forward(*copied.args, **copied.kwargs)
        taken_out.append(watched.taken_out(type(module).__name__))
        _refuse_data(data, copied, module)
        returned.append(result)
        return tensors_in_result(result)

    parts_run_as_they_are = torch._dynamo.config.patch(error_on_nested_fx_trace=False)  # whoever has compiled them
    one_fake_mode = tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True)))  # else one for every node
    with (
        torch.no_grad(),
        _buffers_put_back(module),
        written_out(),
        reads.uncached(),
        transforms_undone(),
        parts_run_as_they_are,
        one_fake_mode,
    ):
        try:
            with fx.traceback.preserve_node_meta(), _module_paths(module):
                graph = make_fx(run, tracing_mode="real", pre_dispatch=True)(*own.values(), *copied.tensors)
            changed = [
                *reads.kept(),
                *reads.replaced(),
                *reads.drawn(),
                *(f"{p}.data" for p, t in own.items() if data.is_changed(t)),
            ]
        except DicompileError:
            data.undo()
            raise
        except Exception as error:
            data.undo()
            where = _current_path()
            forward(*arguments.copied().args, **arguments.copied().kwargs)  # the caller's own mistake raises
            raise CannotCapture(
                f"{type(module).__name__} cannot be traced",
                where=f"capture, {where or 'forward'}",
                why=first_line(error),
                fix="move data-dependent Python out of its forward",
            ) from error
    drop_switches(graph.graph)
    if changed:
        raise Unsettled(changed)
    captured = _captured(module, arguments, copied, graph, own, reads, reading, returned[-1])
    return replace(captured, taken_out=taken_out[-1])


def _captured(
    module: nn.Module,
    arguments: Arguments,
    copied: Arguments,
    graph: fx.GraphModule,
    own: dict[Path, Tensor],
    reads: Reads,
    reading: _Reading,
    result: Any,
) -> Captured:
    name = type(module).__name__
    used = {
        path: t for (path, t), p in zip(own.items(), graph.graph.find_nodes(op="placeholder"), strict=False) if p.users
    }
    paths = list(dict.fromkeys([*used, *reads.tensors]))
    guards = Guards.of(module, reads.facts, paths, reads.modules)
    pins = guards.pin(module)
    if isinstance(pins, str):
        raise Unsettled([pins])
    values = [*(own.get(path, reads.tensors.get(path)) for path in paths), *copied.tensors]
    place = {id(value): i for i, value in reversed(list(enumerate(values)))}
    lifted = [*_lift_constants(graph), *_lift_read(graph, reading)]
    unknown = [
        value for value, is_made in lifted if id(value) not in place and not is_made and id(value) not in reading.made
    ]
    if unknown:
        raise CannotCapture(
            f"{name} computes with a tensor of shape {list(unknown[0].shape)} that lies neither in it nor in its "
            "arguments",
            where="capture",
            why="whether it is the same at the next call cannot be told",
            fix="register it as a buffer, or pass it",
        )
    constants = [value for value, _ in lifted if id(value) not in place]
    place |= {id(value): len(values) + i for i, value in enumerate(constants)}
    given = [*own.values(), *copied.tensors, *(value for value, _ in lifted)]
    order = _drop_unused(graph, [place.get(id(value)) for value in given])
    results = tensors_in_result(result)
    pack = packer(result, results, ())
    assert pack is not None
    names = [*((path.name, True) for path in paths), *((name, False) for name in arguments.names(module))]
    names += [(f"constant_{i}", True) for i in range(len(constants))]
    return Captured(
        graph=graph,
        names=tuple(names[i] for i in order),
        order=tuple(order),
        constants=tuple(constants),
        guards=guards,
        pack=pack,
        reads=_read_inputs(graph.graph, reading.nodes),
        is_run=True,
    )


def _refuse_data(data: FollowedData, arguments: Arguments, module: nn.Module) -> None:
    """Refuse a forward that assigned to the ``data`` of an argument.

    Raises:
        CannotCapture: it did.
    """
    written = [n for n, t in zip(arguments.names(module), arguments.tensors, strict=True) if data.is_changed(t)]
    if written:
        raise CannotCapture(
            f"the model writes to its inputs: {', '.join(written)}",
            where="capture",
            why="a step that is skipped could not repeat the write",
            fix="copy the tensor inside the model before writing to it",
        )


def module_tensors(module: nn.Module) -> dict[Path, Tensor]:
    """Parameters and buffers of a module by path, each once."""
    found = {}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        path = Path()
        for part in name.split("."):
            path = path.attribute(part)
        found[path] = tensor
    return found


def check_reads(captured: Captured, roles: Sequence[Role], model: str) -> None:
    """Check that no value was read that differs at every step.

    Args:
        captured: the graph.
        roles: what its placeholders are.
        model: its name, for the message.

    Raises:
        CannotCapture: one was.
    """
    for position, how in captured.reads.items():
        if roles[position] in (Role.LATENT, Role.TIMESTEP):
            raise CannotCapture(
                f"{model} reads a value computed from its {roles[position].value} in Python",
                where=f"capture, {how}",
                why="what it computes then differs from step to step, so that no graph holds for two of them",
                fix="compute that part of its forward with tensors alone, or run the model as it is",
            ) from captured.refused


@contextlib.contextmanager
def _buffers_put_back(module: nn.Module) -> Iterator[None]:
    """Put back what the run writes to buffers, and buffers in whose place it puts others."""
    kept = [(child, name, b, b.clone()) for child in module.modules() for name, b in child.named_buffers(recurse=False)]
    try:
        yield
    finally:
        for child, name, buffer, value in kept:
            child._buffers[name] = buffer
            if buffer.shape != value.shape or not torch.equal(buffer, value):
                buffer.data = value


class _Reading(TorchFunctionMode):
    """Lets Python read values while a graph is traced.

    Attributes:
        nodes: the nodes whose values were read, and how.
        made: tensors that were computed aside, out of what was read.
        read: tensors that no operator of the graph takes, and how they were read.
    """

    def __init__(self) -> None:
        self.nodes: list[tuple[fx.Node, str]] = []
        self.made: dict[int, Tensor] = {}
        self.read: dict[int, tuple[Tensor, str]] = {}

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_collective_operator(func):
            raise CannotCapture(
                "the model exchanges values with other ranks, and cannot be run to capture it",
                where=f"capture, {_current_path() or 'forward'}",
                why="another rank that has captured it already, or has not begun to, would not answer",
                fix="make its forward one that torch.compile(fullgraph=True) takes",
            )
        if func in _READS or func in _SIZED_BY_VALUES:
            return self._untraced(func, args, kwargs)
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            args = (args[0], self._indices(args[1]), *args[2:])
        elif func in (torch.masked_select, Tensor.masked_select):
            value, mask = torch.broadcast_tensors(args[0], args[1] if len(args) > 1 else kwargs.pop("mask"))
            func, args = Tensor.__getitem__, (value, self._indices(mask))
        elif func in (torch.repeat_interleave, Tensor.repeat_interleave):
            return self._repeat_interleave(*args, **kwargs)
        try:
            return func(*args, **kwargs)
        except DicompileError:
            raise
        except RuntimeError as error:
            # torch reads the values of tensors that are given where it wants ints: x.view(lengths[0]).
            if "aten.item" not in str(error) and "_local_scalar_dense" not in str(error):
                raise
        args, kwargs = pytree.tree_map_only(Tensor, self._as_int, (tuple(args), kwargs))
        return func(*args, **kwargs)

    def _repeat_interleave(self, value: Tensor, repeats: Any = None, dim: int | None = None, **kwargs: Any) -> Tensor:
        if not isinstance(repeats, Tensor):
            return torch.repeat_interleave(value, repeats, dim, **kwargs)
        where = self._untraced(torch.repeat_interleave, (repeats,), {})
        return value.flatten()[where] if dim is None else value.index_select(dim, where)

    def _as_int(self, value: Tensor) -> Any:
        if value.ndim or value.is_floating_point():
            return value
        return self._untraced(Tensor.item, (value,), {})

    def _untraced(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        for leaf in pytree.tree_leaves((args, kwargs)):
            self._note(leaf, func)
        with disable_proxy_modes_tracing():
            result = func(*args, **kwargs)
        self.made |= {id(leaf): leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)}
        return result

    def _indices(self, index: Any) -> Any:
        """The index with the positions of true values in place of boolean masks."""
        if isinstance(index, tuple):
            flat = (self._indices(part) for part in index)
            return tuple(part for parts in flat for part in (parts if isinstance(parts, tuple) else (parts,)))
        if isinstance(index, slice):
            bounds = (index.start, index.stop, index.step)
            return slice(*(self._as_int(bound) if isinstance(bound, Tensor) else bound for bound in bounds))
        if not isinstance(index, Tensor) or index.dtype not in (torch.bool, torch.uint8):
            return index
        return self._untraced(Tensor.nonzero, (index,), {"as_tuple": True}) if index.ndim else index

    def _note(self, value: object, func: Any) -> None:
        mode = get_proxy_mode()
        if isinstance(value, Tensor) and mode is not None:
            known = mode.tracer.tensor_tracker.get(value)
            how = f"{getattr(func, '__name__', func)}()" + (f" in {_current_path()}" if _current_path() else "")
            if known is not None:
                self.nodes.append((known.proxy.node, how))
            elif id(value) not in self.made:
                self.read[id(value)] = value, how


@contextlib.contextmanager
def _module_paths(root: nn.Module) -> Iterator[None]:
    """While open, every new node knows the module that runs."""
    paths = {id(module): path for path, module in root.named_modules()}
    meta = fx.traceback.get_current_meta()
    thread = threading.get_ident()
    stacks: list[dict[str, tuple[str, type]]] = [{}]

    def enter(module: nn.Module, _: Any) -> None:
        if threading.get_ident() != thread:
            return
        path = paths.get(id(module))
        stack = dict(stacks[-1])
        if path:
            stack[path] = (path, type(module))
        stacks.append(stack)
        meta["nn_module_stack"] = stack

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        if threading.get_ident() != thread:
            return
        stacks.pop()
        meta["nn_module_stack"] = stacks[-1]

    hooks = (
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        meta.pop("nn_module_stack", None)


def _current_path() -> str:
    stack = fx.traceback.get_current_meta().get("nn_module_stack")
    return next(reversed(stack)) if stack else ""


def _lift_constants(graph_module: fx.GraphModule) -> list[tuple[Tensor, bool]]:
    """Make placeholders of the tensors that a graph holds.

    Returns:
        They, in order, and whether they were written out in Python (``torch.tensor([0.5, 2.0])``).
    """
    graph = graph_module.graph
    last = graph.find_nodes(op="placeholder")[-1]
    lifted: dict[str, fx.Node] = {}
    constants: list[tuple[Tensor, bool]] = []
    for node in graph.find_nodes(op="get_attr"):
        if node.target not in lifted:
            value = getattr(graph_module, node.target)
            if not isinstance(value, Tensor):
                continue  # the function of a higher-order operator
            constants.append((value, all("lift_fresh" in str(user.target) for user in node.users)))
            delattr(graph_module, node.target)
            with graph.inserting_after(last):
                last = lifted[node.target] = graph.placeholder(node.target)
        node.replace_all_uses_with(lifted[node.target])
        graph.erase_node(node)
    graph_module.recompile()
    return constants


def _lift_read(graph_module: fx.GraphModule, reading: _Reading) -> list[tuple[Tensor, bool]]:
    """Make placeholders of the tensors that were read and nothing else, which Python did not write out."""
    graph = graph_module.graph
    for i, (_, how) in enumerate(reading.read.values()):
        with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
            reading.nodes.append((graph.placeholder(f"read_{i}"), how))
    return [(value, False) for value, _ in reading.read.values()]


def _drop_unused(graph_module: fx.GraphModule, order: Sequence[int | None]) -> list[int]:
    """Remove the placeholders of tensors that were not read; returns the places of the others."""
    kept = []
    for placeholder, place in zip(graph_module.graph.find_nodes(op="placeholder"), order, strict=True):
        if place is None:
            graph_module.graph.erase_node(placeholder)
        else:
            kept.append(place)
    graph_module.recompile()
    return kept


def _read_inputs(graph: fx.Graph, read: Sequence[tuple[fx.Node, str]]) -> dict[int, str]:
    """Positions of the placeholders that the read nodes were computed from."""
    position = {node: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}
    found: dict[int, str] = {}
    for start, how in read:
        for node in walk([start]):
            if node in position:
                found.setdefault(position[node], how)
    return dict(sorted(found.items()))
