"""The flow for models that Dynamo cannot take whole: captured by running them, once per shape and per value they read.

Dynamo's guards are missing here, so what a graph depends on is compared at every call: the shapes of all tensors, the
arguments that are no tensors, the module's own settings, and the inputs that the model's Python read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dicompile.capture import PLAIN, Inputs, Trace, autocast_key, module_tensors, trace_model
from dicompile.compiler import CompiledFrame, Options, compile_frame

Settings = Mapping[tuple[int, str], object]


class TracedModel:
    """A module that is called like the original and runs what was captured.

    Args:
        module: the original.
        options: what the user asked for.
        on_compiled: told of everything that was compiled.
    """

    def __init__(self, module: nn.Module, options: Options, on_compiled: Callable[[CompiledFrame], None]) -> None:
        self._module, self._options, self._on_compiled = module, options, on_compiled
        self._known: dict[tuple[object, ...], list[_Known]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run one call.

        Raises:
            CannotCapture: the model reads values that differ at every step.
        """
        inputs = Inputs.of(self._module, args, kwargs)
        own = module_tensors(self._module)
        arguments = [*own.values(), *inputs.tensors.values()]
        key = (*inputs.key, *((name, t.dtype, t.device) for name, t in own.items()), autocast_key())
        alike = self._known.setdefault(key, [])
        settings = module_settings(self._module)
        known = next((known for known in alike if known.serves(settings, arguments)), None)
        if known is None:
            known = self._capture(inputs, arguments, settings)
            alike.append(known)
        return known.trace.unpack(known.frame.run(*arguments, *known.trace.constants))

    def _capture(self, inputs: Inputs, arguments: Sequence[Tensor], before: Settings) -> _Known:
        trace = trace_model(self._module, inputs)
        after = module_settings(self._module)
        frame = compile_frame(trace.graph, trace.names, [*arguments, *trace.constants], self._options)
        trace.check(frame.structure.inputs, type(self._module).__name__)
        self._on_compiled(frame)
        # What a forward changes itself (tables it keeps, counters) says nothing about its next call.
        settled = {key: value for key, value in after.items() if key in before and _same(before[key], value)}
        read = {i: arguments[i].clone() for i in trace.reads if i < len(arguments)}
        return _Known(trace, frame, settled, read)


@dataclass
class _Known:
    trace: Trace
    frame: CompiledFrame
    settings: Settings
    read: Mapping[int, Tensor]

    def __post_init__(self) -> None:
        # The tensor that was compared last and its version: pipelines pass the same mask at every step, and comparing
        # values waits for the device.
        self._seen: dict[int, tuple[Tensor, int]] = {}

    def serves(self, now: Settings, arguments: Sequence[Tensor]) -> bool:
        if not all(key in now and _same(now[key], value) for key, value in self.settings.items()):
            return False
        return all(self._equal(i, arguments[i]) for i in self.read)

    def _equal(self, position: int, tensor: Tensor) -> bool:
        if tensor.is_inference():  # writes to it are not counted
            return torch.equal(self.read[position], tensor)
        seen, version = self._seen.get(position, (None, 0))
        if seen is tensor and version == tensor._version:
            return True
        if not torch.equal(self.read[position], tensor):
            return False
        self._seen[position] = tensor, tensor._version
        return True


def module_settings(module: nn.Module) -> Settings:
    """Everything of a module and its children that is no tensor and can be compared: what its Python may branch on."""
    found: dict[tuple[int, str], object] = {}
    for child in module.modules():
        for name, value in vars(child).items():
            if isinstance(value, PLAIN):
                found[id(child), name] = value
            elif isinstance(value, dict) and name == "_modules":
                found[id(child), name] = tuple(id(part) for part in value.values())
            elif isinstance(value, dict) and all(isinstance(item, PLAIN) for item in value.values()):
                found[id(child), name] = dict(value)
            elif isinstance(value, (list, tuple)) and all(isinstance(item, PLAIN) for item in value):
                found[id(child), name] = tuple(value)
            elif callable(value):  # the processor of an attention, an activation, a forward that was replaced
                found[id(child), name] = id(value)
    return found


def _same(first: object, second: object) -> bool:
    return first is second or (type(first) is type(second) and first == second)
