"""The wrapper that `optimize` returns for a module: called like it, with every attribute of it where it was."""

from __future__ import annotations

import ast
import contextlib
import copy
import functools
import inspect
import logging
import textwrap
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule

from dicompile.compat import never_traced, without_dynamo
from dicompile.compiler import CompiledFrame, Options
from dicompile.errors import UnsupportedModel
from dicompile.gradients import check_no_mode, check_no_transform, without_gradients
from dicompile.model import ModelCalls
from dicompile.offload import HOOK_ATTRIBUTES, check_hooks, move_groups, move_hook, take_hook_back
from dicompile.opened import tensors_in
from dicompile.runtime import Owner, cache_context
from dicompile.sharded import is_hook_of

log = logging.getLogger("dicompile")

CHILD = "_orig_mod."
"""What the names of an ``OptimizedModule`` begin with."""

_SHOWN = ("frames",)
"""Attributes of `Record` that can be asked for on the wrapper, where the module has none of that name."""


class Calls(Protocol):
    """What a wrapper does when it is called; see `ModelCalls`."""

    owner: Owner

    @property
    def frames(self) -> list[CompiledFrame]:
        """Everything compiled that is kept, what ran last at the end."""
        ...

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run one call."""
        ...


@dataclass
class Record:
    """All that a wrapper knows of itself: its one attribute, so that it hides none of the module's.

    Attributes:
        given: what `optimize` was given.
        module: the module in it; another one where it was compiled by somebody else.
        options: what the user asked for.
        calls: what it does when it is called.
        is_enabled: whether it does it.
    """

    given: nn.Module
    module: nn.Module
    options: Options
    calls: Calls
    is_enabled: bool = True

    @property
    def frames(self) -> list[CompiledFrame]:
        """Everything compiled that is kept, what ran last at the end."""
        return self.calls.frames


class CachedModel(OptimizedModule):
    """An optimized module: called like the original, with every attribute of the original where it was.

    It is a ``torch._dynamo.OptimizedModule``, which diffusers, accelerate and peft know how to unwrap. Other than with
    ``torch.compile``, weights have the names of the original: in `state_dict`, `named_parameters` and `named_buffers`,
    and in the `state_dict` of a module around it; so have modules, among which the original is ``_orig_mod``.
    """

    _dicompile: Record

    def __init__(self, given: nn.Module, options: Options, calls: Calls | None = None) -> None:
        module = without_compile(given)
        check_hooks(module)
        super().__init__(module, None)  # type: ignore[arg-type]
        object.__setattr__(self, "_dicompile", Record(given, module, options, calls or ModelCalls(module, options)))
        move_hook(module, self)
        self.register_load_state_dict_pre_hook(_name_for_child)  # type: ignore[no-untyped-call]

    def _initialize(self) -> None:
        """Nothing of Dynamo's."""

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is optimized alike, and has captured nothing yet."""
        record = self._dicompile
        return type(self), (record.given, record.options), {"is_enabled": record.is_enabled}

    def __deepcopy__(self, memo: dict[int, Any]) -> CachedModel:
        """A copy is optimized alike, and has captured nothing yet."""
        record = self._dicompile
        made = type(self)(copy.deepcopy(record.given, memo), copy.deepcopy(record.options, memo))
        made._dicompile.is_enabled = record.is_enabled
        return made

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._dicompile.is_enabled = state["is_enabled"]

    def __getattr__(self, name: str) -> Any:
        if name in HOOK_ATTRIBUTES:
            raise AttributeError(name)  # hooks of the original run inside of it
        try:
            value = super().__getattr__(name)
        except AttributeError:
            if name in _SHOWN:
                return getattr(self._dicompile, name)
            raise
        return types.MethodType(value.__func__, self) if _calls_forward(value) else value

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":
            raise UnsupportedModel(
                f"{type(self._orig_mod).__name__} is optimized, and cannot become a {value.__name__}",
                where="a library that changes the class of a module",
                why="the new class would be called in the place of compiled code",
                fix="dicompile.restore it first; see docs/parallel.md for what goes with caching",
            )
        if name in HOOK_ATTRIBUTES:
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name in HOOK_ATTRIBUTES:
            object.__delattr__(self, name)
        else:
            super().__delattr__(name)

    def register_forward_pre_hook(self, hook: Any, **options: Any) -> Any:
        """Hooks of the wrapper run around compiled code.

        Raises:
            UnsupportedModel: it is FSDP's, which would gather all weights there; nothing has been sharded yet.
        """
        if is_hook_of("torch.distributed.fsdp", hook):
            raise UnsupportedModel(
                f"{type(self._orig_mod).__name__} is optimized, and cannot be sharded as a whole",
                where="fully_shard",
                why="FSDP would gather its weights around compiled code, which gathers what it reads itself",
                fix="model = dicompile.restore(model), then fully_shard(model), then dicompile.optimize(model, ...)",
            )
        return super().register_forward_pre_hook(hook, **options)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Weights and buffers by the original's names."""
        return self._orig_mod.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Take weights by the original's names, or by those of an ``OptimizedModule``, ``_orig_mod.`` and the name."""
        if any(name.startswith(CHILD) for name in state_dict):
            state_dict = {name.removeprefix(CHILD): value for name, value in state_dict.items()}
        return self._orig_mod.load_state_dict(state_dict, *args, **kwargs)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters by the original's names; all of them lie below the wrapper."""
        if recurse:
            yield from self._orig_mod.named_parameters(prefix, recurse, remove_duplicate)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Buffers by the original's names; all of them lie below the wrapper."""
        if recurse:
            yield from self._orig_mod.named_buffers(prefix, recurse, remove_duplicate)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Itself, the original, and what lies in that by the original's names: guiders of diffusers look for blocks."""
        memo = set() if memo is None else memo
        if self in memo:
            return
        if remove_duplicate:
            memo.add(self)
        yield prefix, self
        child = CHILD.removesuffix(".")
        for name, module in self._orig_mod.named_modules(memo, prefix, remove_duplicate):
            yield (".".join(filter(None, (prefix, child))) if module is self._orig_mod else name), module

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """The original under no name: those who put names of weights together of these get the original's."""
        yield "", self._orig_mod

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """That of the original: pipelines ask whether a component is a model of theirs."""
        return type(self._modules["_orig_mod"]) if "_modules" in vars(self) else type(self)

    @never_traced("it is optimized by dicompile, and compiled already: torch.compile has nothing to add")
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model; it samples, so no gradients are recorded while it is enabled.

        Raises:
            UnsupportedCall: it is traced, transformed or within a mode; or, later, differentiated.
        """
        if "_diffusers_hook" in vars(self):
            move_groups(self, self._dicompile.module)
        if not self._dicompile.is_enabled:
            return nn.Module.__call__(self, *args, **kwargs)
        name = type(self._orig_mod).__name__
        check_no_transform(name)
        if not self._dicompile.options.backend.is_eager:
            check_no_mode(name)
        with without_dynamo(), torch.no_grad():
            result = nn.Module.__call__(self, *args, **kwargs)
        return without_gradients(name, result, self._differentiated(args, kwargs))

    def _differentiated(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
        """What gradients may be meant for: arguments, and weights of a model in training."""
        yield from tensors_in((args, kwargs))
        if self._orig_mod.training:
            yield from self._orig_mod.parameters()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the original's forward returns, by compiled code; hooks of the wrapper run around it."""
        record = self._dicompile
        return record.calls(args, kwargs) if record.is_enabled else record.given(*args, **kwargs)

    def compile(self, *_: Any, **__: Any) -> None:
        """It is compiled already; ``pipe.transformer.compile()`` has nothing to add."""
        log.info("%s is compiled by dicompile: compile() changes nothing", type(self._orig_mod).__name__)

    @contextlib.contextmanager
    def cache_context(self, name: str, **_: Any) -> Iterator[None]:
        """Guidance context, as diffusers pipelines open it on their denoiser."""
        with cache_context(name):
            yield


def _name_for_child(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Among the weights of a module around it are those of the original by its names; torch looks for the child's."""
    for name in [name for name in state_dict if name.startswith(prefix)]:
        state_dict[prefix + CHILD + name.removeprefix(prefix).removeprefix(CHILD)] = state_dict.pop(name)


def _calls_forward(value: Any) -> bool:
    """True for a method that calls the module, such as ``forward_with_cfg``: it has to call the wrapper."""
    return isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module) and _calls_self(value.__func__)


@functools.lru_cache(maxsize=1024)
def _calls_self(function: Any) -> bool:
    """True for a function in which ``self.forward(...)`` or ``self(...)`` stands."""
    code = getattr(function, "__code__", None)
    if code is None or not code.co_argcount:
        return False
    if "forward" in code.co_names:
        return True
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):  # made without a file
        return False
    except SystemError:  # another thread parsed, too: not every CPython can do that (python/cpython#106905)
        return _calls_self(function)
    called = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return any(isinstance(function, ast.Name) and function.id == code.co_varnames[0] for function in called)


def find_optimized(module: nn.Module) -> CachedModel | None:
    """An optimized module, also where somebody put ``torch.compile`` around it; None for all others."""
    inner = without_compile(module)
    return inner if isinstance(inner, CachedModel) else None


def without_compile(module: nn.Module) -> nn.Module:
    """A module without what ``torch.compile`` put around it."""
    while isinstance(module, OptimizedModule) and not isinstance(module, CachedModel):
        module = module._orig_mod
    return module


def record_of(model: CachedModel) -> Record:
    """What a wrapper knows of itself."""
    return model._dicompile


def released(model: CachedModel) -> nn.Module:
    """What `optimize` was given, with the hooks that the wrapper got meanwhile."""
    record = record_of(model)
    take_hook_back(model, record.module)
    move_groups(model, record.module)
    return record.given
