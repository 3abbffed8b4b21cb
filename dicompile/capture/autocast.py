"""Autocast made explicit: every cast that it would make becomes a node, and its regions go.

A graph made above the Autocast key holds operators as the model called them and, around a region, calls that switch
autocast on and off. Which arguments are cast is decided below, when an operator runs, so that without the switches the
graph means something else.

Before::

    %3 = _enter_autocast('cpu', torch.bfloat16, True, None)
    %4: f32[2,16] = aten.linear.default(%2, %0, %1)
    _exit_autocast(%3)

After::

    %3: bf16[16] = aten._to_copy.default(%1, dtype=torch.bfloat16)
    %4: bf16[16,16] = aten._to_copy.default(%0, dtype=torch.bfloat16)
    %5: bf16[2,16] = aten._to_copy.default(%2, dtype=torch.bfloat16)
    %6: bf16[2,16] = aten.linear.default(%5, %4, %3)

No list of operators is kept here: torch's own autocast kernel runs and is recorded. Operators that have none, and whose
parts would be cast (einsum), become these parts. It has to happen before the graph becomes functional, because what a
model writes as ``h.float()`` disappears where `h` is float32 without autocast.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._C import DispatchKey, DispatchKeySet
from torch._ops import HigherOrderOperator, OpOverload
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from dicompile.capture.constants import spell_out_constants
from dicompile.errors import CannotCapture
from dicompile.text import module_path, operator_text

aten = torch.ops.aten

State = tuple[tuple[str, bool, torch.dtype], ...]

_KEYS = sorted(
    (key for name, key in DispatchKey.__members__.items() if name.startswith("Autocast")), key=lambda key: -key.value
)
_PARTS = DispatchKeySet(
    DispatchKey.Undefined
)  # the composite kernel itself; `decompose` would only record the operator
_COMPOSITES = (DispatchKey.CompositeExplicitAutograd, DispatchKey.CompositeExplicitAutogradNonFunctional)
_MAX_ROUNDS = 16


def autocast_key() -> tuple[tuple[str, torch.dtype], ...]:
    """Device types for which autocast is on in this thread, and what each casts to: what a capture depends on."""
    return tuple((kind, dtype) for kind, enabled, dtype in _state() if enabled)


def make_autocast_explicit(graph_module: fx.GraphModule, arguments: Sequence[object]) -> fx.GraphModule:
    """A graph that means with autocast off what the given one means in the state of autocast that is on now.

    Args:
        graph_module: torch-level or ATen graph; not changed.
        arguments: one value per placeholder; fake tensors, whose mode is active.

    Returns:
        An ATen graph with the same placeholders, or the graph itself where autocast is not on and never switched on.

    Raises:
        CannotCapture: autocast would reach into an operator that holds functions, or that has no end of parts.
    """
    if not (torch._C._is_any_autocast_enabled() or _regions(graph_module)):
        return graph_module
    made, rounds = _rewritten(graph_module, arguments), 1
    with torch._C._DisableAutocast():
        while regions := _regions(made):
            if rounds == _MAX_ROUNDS:
                raise _refusal(regions[0].next, "it cannot be taken apart into operators that are cast as a whole")
            made, rounds = _rewritten(made, arguments), rounds + 1
    return made


def share_casts(graph: fx.Graph) -> None:
    """Cast every input of a functional graph once to each dtype, as autocast's cache does for weights."""
    for source in graph.find_nodes(op="placeholder"):
        casts: dict[object, fx.Node] = {}
        for user in list(source.users):
            if user.target is aten._to_copy.default:
                first = casts.setdefault(tuple(user.kwargs.items()), user)
                if first is not user:
                    user.replace_all_uses_with(first)
                    graph.erase_node(user)


def drop_regions(graph: fx.Graph) -> None:
    """Remove what is left of autocast once it is explicit: regions that switch off what is off."""
    for node in reversed(graph.nodes):
        if node.target in (_enter_autocast, _exit_autocast):
            graph.erase_node(node)


def _regions(graph_module: fx.GraphModule) -> list[fx.Node]:
    """Where a graph switches autocast on."""
    entered = graph_module.graph.find_nodes(op="call_function", target=_enter_autocast)
    return [node for node in entered if node.args[2]]


def _refusal(node: fx.Node, why: str) -> CannotCapture:
    path = module_path(node)
    return CannotCapture(
        f"what autocast does to {operator_text(node.target)}{f' in {path}' if path else ''} cannot be written out",
        where="capture",
        why=why,
        fix="call it with autocast off and its arguments cast: torch.autocast(..., enabled=False)",
    )


def _rewritten(graph_module: fx.GraphModule, arguments: Sequence[object]) -> fx.GraphModule:
    def run(*values: object) -> Any:
        interpreter = _Explicit(graph_module)
        interpreter.extra_traceback = False  # it would be added to messages of our own
        return interpreter.run(*values)

    made: fx.GraphModule = make_fx(run, tracing_mode="real", pre_dispatch=True)(*arguments)
    with torch._C._DisableAutocast():
        spell_out_constants(made)  # they would become inputs of the next round
    return made


class _Explicit(fx.Interpreter):
    """Runs a graph as autocast would, while every operator that it calls is recorded.

    What is no operator yet, and operators whose parts alone are cast, are recorded as their parts, within a region of
    their own, which the next round makes explicit.
    """

    def run(self, *args: Any, **kwargs: Any) -> Any:
        before = _state()
        try:
            return super().run(*args, **kwargs)
        finally:
            _restore(before)

    def run_node(self, n: fx.Node) -> Any:
        if isinstance(n.target, HigherOrderOperator):
            raise _refusal(n, "it holds a function")
        return super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is _enter_autocast:
            return _enter(*args)
        if target is _exit_autocast:
            return _restore(*args)
        if isinstance(target, OpOverload):
            return _call_operator(target, args, kwargs)
        if not torch._C._is_any_autocast_enabled() or _is_no_function_of_tensors(target, args, kwargs):
            return super().call_function(target, args, kwargs)
        return _call_in_region(target, args, kwargs)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target == "item":  # a Python number that came as a tensor, see `read_inputs`
            with disable_proxy_modes_tracing():
                return args[0].item()
        return _call_in_region(getattr(args[0], target), args[1:], kwargs)


def _is_no_function_of_tensors(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """True for other switches, and for taking one of several results."""
    takes_part = target is operator.getitem and not isinstance(args[0], Tensor)
    return takes_part or not _tensors((args, kwargs))


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def _state() -> State:
    kinds = torch._C._autocast_supported_devices()
    return tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds)


def _restore(state: State) -> None:
    for kind, enabled, dtype in state:
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)


def _enter(kind: str, dtype: torch.dtype | None = None, enabled: bool = True, cache: bool | None = None) -> State:
    """Begin a region; returns the state before it."""
    before = _state()
    if kind != "cuda":  # without such a device torch would leave it off, but the tensors may be fake
        region = torch.autocast(kind, dtype, enabled, cache)
        enabled, dtype = region._enabled, region.fast_dtype
    torch.set_autocast_enabled(kind, enabled)
    torch.set_autocast_dtype(kind, dtype or torch.get_autocast_dtype(kind))
    return before


def _call_in_region(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Record the operators of a function as they are, between switches for the state that is on."""
    entered = [_enter_autocast(kind, dtype, True, False) for kind, dtype in autocast_key()]
    result = function(*args, **kwargs)
    for _ in entered:
        _exit_autocast(None)
    return result


def _call_operator(overload: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Record an operator with the casts of its autocast kernel, as its parts if only they are cast, or as it is."""
    keys = [key for key in _keys((args, kwargs)) if not torch._C._dispatch_tls_is_dispatch_key_excluded(key)]
    for key in keys:
        if overload.has_kernel_for_dispatch_key(key):
            return overload.redispatch(DispatchKeySet(key), *args, **kwargs)
    if keys and _is_composite(overload, args, kwargs) and _has_cast_parts(overload, args, kwargs):
        return _call_in_region(functools.partial(overload.redispatch, _PARTS), args, kwargs)
    with torch._C._DisableAutocast():
        return overload(*args, **kwargs)


def _keys(values: Any) -> list[DispatchKey]:
    """Autocast keys of the devices of some values, in the dispatcher's order."""
    present = [torch._C._dispatch_keys(tensor) for tensor in _tensors(values)]
    return [key for key in _KEYS if any(keys.has(key) for keys in present)]


def _is_composite(overload: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the kernel that runs calls other operators, which autocast would meet; views and writes call none."""
    has_kernel = functools.partial(torch._C._dispatch_has_kernel_for_dispatch_key, overload.name())
    if not has_kernel(DispatchKey.CompositeImplicitAutograd):
        is_explicit = any(has_kernel(key) for key in _COMPOSITES)
        if overload.is_view or overload._schema.is_mutable or not is_explicit:
            return False
    # A build of torch without CUDA has none of its kernels; most operators have one wherever they have one for CPUs.
    backends = ["CPU", *(key.name.removeprefix("Autocast") for key in _keys((args, kwargs)))]
    return not any(has_kernel(backend) for backend in backends)


def _has_cast_parts(overload: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the parts of a composite operator, or theirs, differ with autocast; one that writes is not run for it."""
    if overload._schema.is_mutable:
        return True
    with disable_proxy_modes_tracing():
        with _Parts() as cast:
            overload.redispatch(_PARTS, *args, **kwargs)
        with torch._C._DisableAutocast(), _Parts() as plain:
            overload.redispatch(_PARTS, *args, **kwargs)
    if cast.dtypes != plain.dtypes:
        return True
    return any(_has_cast_parts(*part) for part in cast.calls if part[0] is not overload and _is_composite(*part))


class _Parts(TorchDispatchMode):
    """What an operator calls below autocast, and the dtypes that go in and come out."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[OpOverload, Sequence[Any], Mapping[str, Any]]] = []
        self.dtypes: list[tuple[OpOverload, list[torch.dtype]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace != "prim":  # a question about a tensor: its device, its layout
            self.calls.append((func, args, kwargs))
            self.dtypes.append((func, [tensor.dtype for tensor in _tensors((args, kwargs, result))]))
        return result
