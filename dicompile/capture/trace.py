"""Capture a model by running it once: for models that read values of their inputs in Python, which Dynamo cannot take.

Everything that Python reads from a tensor (``.tolist()``, ``if mask.any():``, ``x[mask]``) is written down together
with the inputs it came from. The graph then holds for calls with the same values there, and whoever uses it has to
compare them (`Trace.reads`). Values computed from the latent or the timestep differ at every step: a model that reads
those cannot be captured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, make_fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from dicompile.capture.arguments import Inputs, filler, flatten_arguments
from dicompile.capture.canonical import drop_switches
from dicompile.capture.flex import written_out
from dicompile.capture.inputs import Input, Role
from dicompile.errors import CannotCapture
from dicompile.nodes import walk

# Functions that return Python values, and those whose result has as many elements as the values say.
_READS = frozenset({
    Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__bool__, Tensor.__int__, Tensor.__float__,
    Tensor.__index__, Tensor.__contains__, Tensor.equal, Tensor.allclose, torch.equal, torch.allclose,
})  # fmt: skip
_SIZED_BY_VALUES = frozenset({
    Tensor.nonzero, torch.nonzero, torch.argwhere, Tensor.argwhere, torch.unique, Tensor.unique, torch.bincount,
    Tensor.bincount, torch.unique_consecutive, Tensor.unique_consecutive,
})  # fmt: skip

Flat = tuple[list[Any], pytree.TreeSpec]


@dataclass(frozen=True)
class Trace:
    """What one run of a model did.

    Attributes:
        graph: ATen graph; its placeholders are the module's tensors, the tensors among its inputs, and constants.
        names: name of each placeholder, and whether it belongs to the module.
        reads: positions of the placeholders whose values Python read, with the operator that did and its module.
        constants: values of the last placeholders.
        unpack: the model's result, made of the graph's.
    """

    graph: fx.GraphModule
    names: tuple[tuple[str, bool], ...]
    reads: Mapping[int, str]
    constants: tuple[Tensor, ...]
    unpack: Callable[[Sequence[Tensor]], Any]

    def check(self, inputs: Sequence[Input], model: str) -> None:
        """Check that no value was read that differs at every step.

        Args:
            inputs: what the placeholders are.
            model: its name, for the message.

        Raises:
            CannotCapture: one was.
        """
        for position, how in self.reads.items():
            if inputs[position].role in (Role.LATENT, Role.TIMESTEP):
                raise CannotCapture(
                    f"{model} reads a value computed from its {inputs[position].role.value} in Python",
                    where=f"capture, {how}",
                    why="what it computes then differs from step to step, so that no graph holds for two of them",
                    fix="compute that part of its forward with tensors alone, or run the model as it is",
                )


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a module by name."""
    parameters = module.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(module.named_buffers(remove_duplicate=False))}


def trace_model(module: nn.Module, inputs: Inputs) -> Trace:
    """Run a module once and write down what it does.

    Args:
        module: the module; a forward of it computes with real values.
        inputs: its arguments.

    Raises:
        CannotCapture: it computes with tensors in a way that leaves no trace.
    """
    own = module_tensors(module)
    given = [*own.values(), *inputs.tensors.values()]
    reading = _Reading()
    packed: list[Callable[[Sequence[Tensor]], Any]] = []

    def run(*tensors: Tensor) -> list[Tensor]:
        args, kwargs = inputs.pack(tensors[len(own) :])
        before = flatten_arguments((args, kwargs))
        with reading:
            result = torch.func.functional_call(
                module, dict(zip(own, tensors, strict=False)), tuple(args), dict(kwargs), tie_weights=False
            )
        _refuse_writes(before, flatten_arguments((args, kwargs)), type(module).__name__)
        leaves, spec = pytree.tree_flatten(result)
        packed.append(filler(leaves, spec))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    try:
        with torch.no_grad(), fx.traceback.preserve_node_meta(), _module_paths(module), written_out():
            graph = make_fx(run, tracing_mode="real", pre_dispatch=True)(*given)
    except RuntimeError as error:
        raise CannotCapture(
            f"{type(module).__name__} cannot be traced",
            where=f"capture, {_current_path() or 'forward'}",
            why=str(error).splitlines()[0],
            fix="move data-dependent Python out of its forward",
        ) from error
    drop_switches(graph.graph)
    constants = _lift_constants(graph)
    names = [(name, True) for name in own] + [(name, False) for name in inputs.tensors]
    names += [(f"constant_{i}", True) for i in range(len(constants))]
    return Trace(graph, tuple(names), _read_inputs(graph.graph, reading.nodes), tuple(constants), packed[-1])


def _refuse_writes(before: Flat, after: Flat, model: str) -> None:
    if before[1] == after[1] and all(old is new for old, new in zip(before[0], after[0], strict=True)):
        return
    raise CannotCapture(
        f"{model} writes to a list, dictionary or object among its arguments",
        where="capture",
        why="a step that is skipped could not repeat the write",
        fix="return what is written instead",
    )


class _Reading(TorchFunctionMode):
    """Lets Python read values while a graph is traced, and remembers of which nodes."""

    def __init__(self) -> None:
        self.nodes: list[tuple[fx.Node, str]] = []

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _READS or func in _SIZED_BY_VALUES:
            return self._untraced(func, args, kwargs)
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            args = (args[0], self._indices(args[1]), *args[2:])
        elif func in (torch.masked_select, Tensor.masked_select):
            func, args = Tensor.__getitem__, (args[0], self._indices(args[1]))
        elif func in (torch.repeat_interleave, Tensor.repeat_interleave):
            return self._repeat_interleave(*args, **kwargs)
        try:
            return func(*args, **kwargs)
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
            return func(*args, **kwargs)

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
            if known is not None:
                where = f" in {_current_path()}" if _current_path() else ""
                self.nodes.append((known.proxy.node, f"{getattr(func, '__name__', func)}(){where}"))


@contextlib.contextmanager
def _module_paths(root: nn.Module) -> Iterator[None]:
    """While open, every new node knows the module that runs."""
    paths = {id(module): path for path, module in root.named_modules()}
    meta = fx.traceback.get_current_meta()
    stacks: list[dict[str, tuple[str, type]]] = [{}]

    def enter(module: nn.Module, _: Any) -> None:
        path = paths.get(id(module))
        stack = dict(stacks[-1])
        if path:
            stack[path] = (path, type(module))
        stacks.append(stack)
        meta["nn_module_stack"] = stack

    def leave(module: nn.Module, _: Any, __: Any) -> None:
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


def _lift_constants(graph_module: fx.GraphModule) -> list[Tensor]:
    """Make placeholders of the tensors that a graph holds; returns them in order."""
    graph = graph_module.graph
    last = graph.find_nodes(op="placeholder")[-1]
    lifted: dict[str, fx.Node] = {}
    constants: list[Tensor] = []
    for node in graph.find_nodes(op="get_attr"):
        if node.target not in lifted:
            value = getattr(graph_module, node.target)
            if not isinstance(value, Tensor):
                continue  # the function of a higher-order operator
            constants.append(value)
            delattr(graph_module, node.target)
            with graph.inserting_after(last):
                last = lifted[node.target] = graph.placeholder(node.target)
        node.replace_all_uses_with(lifted[node.target])
        graph.erase_node(node)
    graph_module.recompile()
    return constants


def _read_inputs(graph: fx.Graph, read: Sequence[tuple[fx.Node, str]]) -> dict[int, str]:
    """Positions of the placeholders that the read nodes were computed from."""
    position = {node: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}
    found: dict[int, str] = {}
    for start, how in read:
        for node in walk([start]):
            if node in position:
                found.setdefault(position[node], how)
    return dict(sorted(found.items()))
