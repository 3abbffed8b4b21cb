"""Weights that lie elsewhere until the part they belong to runs: where each is, and what lies under the hooks.

accelerate (sequential offloading: ``cpu_offload``, ``disk_offload``), diffusers (group offloading) and FSDP
(``fully_shard``: a part of each weight is on every rank) put hooks around the forward of a part, which bring its
weights before it runs and take them away afterwards. Compiled code runs several parts as one, and of others nothing at
all. So it runs none of these hooks: a capture sees the forward under them, and the weights where they will be
(`uncovered`). What a call gets in the place of such a weight is `Parked`: it tells where the value is now. Only what a
call of a program reads is brought, one call ahead (`dicompile.runtime.storage`).

Hooks stay where they are: pipelines look up their device in them, and the module without us runs as ever.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import safetensors
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from dicompile.compat import local_part
from dicompile.sharded import MARKS, Gathering, Sharding, casts_of, shardings_of
from dicompile.tensor_parallel import HOOKS, is_divided, of_one_rank

GROUP = "group_offloading"
OF_GROUPS = frozenset({GROUP, "lazy_prefetch_group_offloading", "layer_execution_tracker"})
"""Hooks by which diffusers offloads groups; the last two find out in which order groups run."""

_ALIGNED = 64
"""Bytes to which torch aligns memory of its own."""

_FORWARDS = ("forward", "_old_forward")
"""Where a module has the forward with hooks around it, and accelerate the one without."""

HOOKED = frozenset({*_FORWARDS, "_hf_hook", "_diffusers_hook", *MARKS})
"""Attributes of a module that has hooks of accelerate, diffusers or FSDP."""


@dataclass(frozen=True, eq=False, slots=True)
class Home:
    """Where the value of a weight is while its part does not run.

    Attributes:
        device: that it is wanted on.
        find: the value, on any device, by the tensor that lies in the module.
        held: the tensor that holds it, by the same; the one in the module, where only a file does.
        is_in_module: the tensor in the module holds the value, on whatever device.
        sharding: how it is spread over ranks, if it is.
    """

    device: torch.device
    find: Callable[[Tensor], Tensor]
    held: Callable[[Tensor], Tensor]
    is_in_module: bool
    sharding: Sharding | None = None

    def dtype_of(self, tensor: Tensor) -> torch.dtype:
        """In which the value of a tensor that lies in the module is wanted."""
        return tensor.dtype if self.sharding is None else self.sharding.dtype


@dataclass(frozen=True, eq=False, slots=True)
class Parked:
    """Stands for a weight among the inputs of compiled code, until a call reads it.

    Attributes:
        tensor: what lies in the module, with the shape and strides of the weight.
        home: where its value is.
    """

    tensor: Tensor
    home: Home

    @property
    def dtype(self) -> torch.dtype:
        """Of the value."""
        return self.home.dtype_of(self.tensor)

    @property
    def nbytes(self) -> int:
        """Bytes of the value."""
        return self.tensor.numel() * self.dtype.itemsize

    @property
    def held(self) -> Tensor:
        """The tensor that tells by its identity and version whether the value has changed."""
        return self.home.held(self.tensor)

    def find(self) -> Tensor:
        """The value, on whatever device it is, in whatever layout."""
        return self.home.find(self.tensor)

    def reserve(self) -> Tensor:
        """Memory for the value, where it is wanted."""
        like = self.tensor
        return torch.empty_strided(like.shape, like.stride(), dtype=self.dtype, device=self.home.device)

    def bring(self) -> Tensor:
        """The value where it is wanted, as the code wants it; no copy where it is like that already."""
        value, like = self.find(), self.tensor
        is_alike = (value.device, value.dtype, value.stride()) == (self.home.device, self.dtype, like.stride())
        if is_alike and not value.data_ptr() % _ALIGNED:  # out of a file it may lie anywhere, and round otherwise
            return value.detach()
        return self.reserve().copy_(value, non_blocking=True)  # whoever reads it is queued behind


def homes_of(module: nn.Module) -> dict[int, Home]:
    """Homes of all weights of a module that hooks bring and take away, by the id of the tensor in the module."""
    found: dict[int, Home] = {}
    for part in module.modules():
        for hook in aligning_hooks(part):
            if hook.offload:
                found |= {id(tensor): _mapped(hook, name) for name, tensor in _tensors_of(part, hook)}
        group = group_of(part)
        if group is not None:
            home = _grouped(group)
            found |= {id(tensor): home for tensor in _tensors_in(group)}
    return found | {id(weight): _sharded(sharding) for weight, sharding in shardings_of(module)}


def aligning_hooks(part: nn.Module) -> tuple[Any, ...]:
    """Hooks of accelerate that bring weights of a part, or its arguments, to a device; none if there is any other."""
    hooks = hooks_of(part)
    return hooks if all(type(hook) is sys.modules["accelerate.hooks"].AlignDevicesHook for hook in hooks) else ()


def hooks_of(part: nn.Module) -> tuple[Any, ...]:
    """Hooks of accelerate on a part, one by one."""
    hook = vars(part).get("_hf_hook")
    if hook is None:
        return ()
    return tuple(hook.hooks) if isinstance(hook, sys.modules["accelerate.hooks"].SequentialHook) else (hook,)


def group_of(part: nn.Module) -> Any:
    """The group of diffusers' group offloading that is loaded when a part runs, or None."""
    registry = registry_of(part)
    hook = None if registry is None else registry.get_hook(GROUP)
    return None if hook is None else hook.group


def registry_of(part: nn.Module) -> Any:
    """Hooks of diffusers on a part, or None; those of a wrapper of it run around that."""
    registry = vars(part).get("_diffusers_hook")
    return registry if registry is not None and registry._module_ref is part else None


def _tensors_of(part: nn.Module, hook: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors that a hook of accelerate brings, by name."""
    from accelerate.utils.modeling import named_module_tensors

    yield from named_module_tensors(
        part, include_buffers=hook.offload_buffers, recurse=hook.place_submodules, remove_non_persistent=True
    )


def _tensors_in(group: Any) -> Iterator[Tensor]:
    for part in group.modules:
        yield from part.parameters()
        yield from part.buffers()
    yield from group.parameters
    yield from group.buffers


def _mapped(hook: Any, name: str) -> Home:
    def held(tensor: Tensor) -> Tensor:
        kept = _in_memory(hook.weights_map, name)
        return tensor if kept is None else kept

    return Home(place_of(hook.execution_device), lambda _: hook.weights_map[name], held, is_in_module=False)


def _in_memory(weights: Any, name: str) -> Tensor | None:
    """A weight out of a map of accelerate's; None where it would be read from a file."""
    library = sys.modules["accelerate.utils.offload"]
    while isinstance(weights, library.PrefixedDataset):
        weights, name = weights.dataset, f"{weights.prefix}{name}"
    kept = weights.state_dict if isinstance(weights, library.OffloadedWeightsLoader) else weights
    return kept.get(name) if isinstance(kept, dict) else None


def _grouped(group: Any) -> Home:
    device, back = place_of(group.onload_device), place_of(group.offload_device)
    on_disk = group.offload_to_disk_path is not None

    def find(tensor: Tensor) -> Tensor:
        if not on_disk:
            kept: Tensor = group.cpu_param_dict.get(tensor, tensor)
            return kept
        key: str | None = group.tensor_to_key.get(tensor)
        if key is None or tensor.device == device != back:  # a call of the part was broken off
            return tensor
        with safetensors.safe_open(group.safetensors_file_path, framework="pt", device="cpu") as file:
            read: Tensor = file.get_tensor(key)
            return read

    return Home(device, find, lambda tensor: tensor, is_in_module=not on_disk)


def _sharded(sharding: Sharding) -> Home:
    def find(tensor: Tensor) -> Tensor:
        return Gathering([(tensor, sharding)]).take()[0]

    return Home(sharding.device, find, local_part, is_in_module=False, sharding=sharding)


def place_of(device: Any) -> torch.device:
    """A device with its number, as tensors on it name it."""
    place = torch.device(device)
    current = torch.accelerator.current_accelerator()
    if current is None or str(place) != current.type:
        return place
    return torch.device(place.type, torch.accelerator.current_device_index())


# The forward under the hooks.


def forward_under_hooks(part: nn.Module) -> tuple[dict[str, Any], str]:
    """Dictionary and key of the forward of a part that has one of its own, without hooks that offload."""
    own = vars(part)
    place = own, "forward"
    if _made_in(own["forward"], "accelerate.hooks") and aligning_hooks(part):
        place = own, "_old_forward"
    registry = registry_of(part)
    if registry is not None and _made_in(place[0][place[1]], "diffusers.hooks.hooks"):
        outer = 0  # the last ones are the outermost
        while outer < len(registry._hook_order) and registry._hook_order[~outer] in OF_GROUPS:
            outer += 1
        if outer:
            place = vars(registry._fn_refs[-outer]), "forward"
    return place


def _made_in(forward: Any, python_module: str) -> bool:
    return isinstance(forward, functools.partial) and forward.func.__module__ == python_module


def is_own_method(part: nn.Module, forward: Any) -> bool:
    """True for the forward that the class of a part gives it."""
    is_method = isinstance(forward, types.MethodType) and forward.__self__ is part
    return is_method and forward.__func__ is getattr(type(part), "forward", None)


@contextlib.contextmanager
def uncovered(module: nn.Module) -> Iterator[None]:
    """While open, a module is as if nobody had offloaded it: without those hooks, and with fakes for what is not there.

    Fakes have the device on which the weights are wanted. No other thread may look at the module meanwhile.
    """
    homes, mode, fakes = homes_of(module), FakeTensorMode(), dict[int, Tensor]()
    with contextlib.ExitStack() as undo:
        for part in module.modules():
            _show_forward(part, undo)
            _hide_hooks(part, undo)
            for tensors in (part._parameters, part._buffers) if homes else ():
                _show_tensors(tensors, homes, mode, fakes, undo)
            _show_parts(part._parameters, homes, undo)
        yield


def _show_forward(part: nn.Module, undo: contextlib.ExitStack) -> None:
    own = vars(part)
    if "forward" not in own:
        return
    holder, key = forward_under_hooks(part)
    if holder is own and key == "forward":
        return
    under, kept = holder[key], {name: own.pop(name) for name in _FORWARDS if name in own}
    if not is_own_method(part, under):
        own["forward"] = under
    undo.callback(own.update, kept)


def _hide_hooks(part: nn.Module, undo: contextlib.ExitStack) -> None:
    own = vars(part)
    if own.keys() >= MARKS:
        undo.callback(own.update, {name: own.pop(name) for name in MARKS})
    for hooks in (own[name] for name in HOOKS):
        kept, seen = dict(hooks), {key: seen_as(hook) for key, hook in hooks.items()}
        if all(seen[key] is hook for key, hook in kept.items()):
            continue  # hooks of the user's own; somebody may be running the module
        undo.callback(hooks.update, kept)
        undo.callback(hooks.clear)
        hooks.clear()
        hooks.update({key: hook for key, hook in seen.items() if hook is not None})


def seen_as(value: Any) -> Any:
    """What a capture sees in the place of a hook, or weight, of FSDP or tensor parallelism; None if nothing is left.

    Everything else is what it is.
    """
    return of_one_rank(casts_of(value))


def _show_parts(weights: dict[str, Any], homes: Mapping[int, Home], undo: contextlib.ExitStack) -> None:
    """What a rank has of weights that tensor parallelism has divided is the weight."""
    for name, weight in list(weights.items()):
        if is_divided(weight) and id(weight) not in homes:
            weights[name] = local_part(weight)
            undo.callback(_put_back, weights, name, weights[name], weight)


def _show_tensors(
    tensors: dict[str, Any],
    homes: Mapping[int, Home],
    mode: FakeTensorMode,
    fakes: dict[int, Tensor],
    undo: contextlib.ExitStack,
) -> None:
    for name, tensor in tensors.items():
        home = homes.get(id(tensor))
        if home is None or (home.is_in_module and tensor.device == home.device):
            continue
        if id(tensor) not in fakes:
            fakes[id(tensor)] = _fake(tensor, home, mode)
        tensors[name] = fakes[id(tensor)]
        undo.callback(_put_back, tensors, name, fakes[id(tensor)], tensor)


def _fake(tensor: Tensor, home: Home, mode: FakeTensorMode) -> Tensor:
    with mode:
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=home.dtype_of(tensor), device=home.device)
    if not isinstance(tensor, nn.Parameter):
        return made
    return nn.Parameter(made, requires_grad=tensor.requires_grad)


def _put_back(tensors: dict[str, Any], name: str, shown: Tensor, tensor: Tensor) -> None:
    if tensors.get(name) is shown:
        tensors[name] = tensor


def kind_of(tensor: Tensor, home: Home | None = None) -> type:
    """Type of a tensor; of a fake one that of what it stands for, and of a shard that of the whole weight."""
    if isinstance(tensor, FakeTensor) or (home is not None and home.sharding is not None):
        return nn.Parameter if isinstance(tensor, nn.Parameter) else Tensor
    return type(tensor)


def brought(value: Any) -> Any:
    """A value that is where it is wanted: what is parked is brought."""
    return value.bring() if isinstance(value, Parked) else value
