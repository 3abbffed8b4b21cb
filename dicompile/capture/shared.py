"""Captures that models of one class share: a second model, or a second policy on the same one, is captured no more.

A capture holds for whatever module its guards hold for. They are paths and facts, so they can be held against any
module of the class; parameters are inputs.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dicompile.capture.arguments import Arguments
from dicompile.capture.call import capture_functional
from dicompile.capture.captured import Captured
from dicompile.capture.guards import PLAIN, By, Fact, Guards, Path, Pins
from dicompile.capture.normalise import Capture
from dicompile.capture.roles import NOTHING_SAID, Said
from dicompile.capture.stored import from_bytes, stored_under, to_bytes
from dicompile.latest import Latest
from dicompile.ops.collectives import groups_of
from dicompile.ops.registry import registered
from dicompile.parked import brought
from dicompile.store import Store, Unwritable

log = logging.getLogger("dicompile")

MOST_CAPTURES = 8
"""Captures that are kept for models to come."""


@dataclass(frozen=True)
class Known:
    """A capture, and what it holds for besides its guards.

    Attributes:
        captured: the graph as it was captured, with its guards.
        capture: the functional graph.
        read: values of the inputs that Python read, by position.
    """

    captured: Captured
    capture: Capture
    read: Mapping[int, Tensor]

    def was_read(self, inputs: Sequence[Any]) -> bool:
        """True if the inputs that Python read have the values that it read."""
        return all(is_equal(value, brought(inputs[i])) for i, value in self.read.items())


class Captures:
    """The latest captures of the process, by what they are captures of.

    Args:
        most: number of classes and arguments whose captures are kept, and of captures of each.
    """

    def __init__(self, most: int = MOST_CAPTURES) -> None:
        self._most = most
        self._known: Latest[tuple[Known, ...]] = Latest(most)

    def find(
        self, key: tuple[object, ...], module: nn.Module, arguments: Arguments, store: Store
    ) -> tuple[Known, Pins] | None:
        """A capture that holds for a module and the arguments of a call, and what its guards found.

        Args:
            key: what it has to be a capture of.
            module: the module.
            arguments: of the call.
            store: captures of other processes.
        """
        for known in self._known.get((key, registered())) or ():
            captured, pins = known.captured, known.captured.guards.pin(module)
            if isinstance(pins, Pins) and known.was_read(captured.pick(captured.tensors(pins.tensors, arguments))):
                return known, pins
        return self._load(key, module, store)

    def _load(self, key: tuple[object, ...], module: nn.Module, store: Store) -> tuple[Known, Pins] | None:
        if not store.is_open:
            return None
        with contextlib.suppress(Unwritable):
            for kept in itertools.islice(store.get("capture", stored_under(key)), self._most):
                found = from_bytes(kept.content, module)
                if found is not None:
                    kept.used()
                    known = Known(*found, {})
                    self._put(key, known)
                    return known, known.captured.guards.found(module)
        return None

    def keep(self, key: tuple[object, ...], known: Known, module: nn.Module, store: Store) -> None:
        """Keep a capture, if it holds nothing of the module that it was made of, and names no process group.

        Args:
            key: what it is a capture of.
            known: the capture.
            module: what was captured.
            store: where it goes for other processes, if it means the same there.
        """
        if not (is_portable(known.captured.guards) and _is_plain(key)) or groups_of(known.capture.graph):
            return
        self._put(key, known)
        if store.is_open:
            try:
                store.put("capture", stored_under(key), to_bytes(module, known.captured, known.capture))
            except Unwritable as reason:
                log.info("%s is captured anew in every process: it has %s", type(module).__name__, reason)

    def _put(self, key: tuple[object, ...], known: Known) -> None:
        full = key, registered()
        self._known.put(full, (known, *(self._known.get(full) or ()))[: self._most])

    def clear(self) -> None:
        """Forget all of them."""
        self._known.clear()


CAPTURES = Captures()


def key_of_class(module: nn.Module, said: Said, key: tuple[object, ...]) -> tuple[object, ...]:
    """What a capture is one of, for all models of the process.

    Args:
        module: of the class.
        said: what the user says of its inputs.
        key: of the arguments of a call, and of global state.
    """
    return type(module), said.timestep, said.latent, *key


def known_capture(
    module: nn.Module,
    arguments: Arguments,
    key: tuple[object, ...],
    store: Store,
    said: Said = NOTHING_SAID,
    *,
    by_running: bool = False,
) -> tuple[Known, Pins]:
    """The capture for a call, one that another model, policy or process has led to or a new one.

    Args:
        module: the module; it may be run, with copies of the arguments.
        arguments: of the call.
        key: of the arguments, and of global state.
        store: captures of other processes.
        said: what the user says of the inputs.
        by_running: Dynamo is known not to take it.

    Returns:
        It, and what its guards found in the module.

    Raises:
        CannotCapture: no graph can be had that would hold for the next call.
        InvalidSetting: the user named an input that is not there.
    """
    key = key_of_class(module, said, key)
    found = CAPTURES.find(key, module, arguments, store)
    if found is not None:
        return found
    captured, capture = capture_functional(module, arguments, said, by_running=by_running)
    pins = captured.guards.found(module)
    inputs = captured.pick(captured.tensors(pins.tensors, arguments))
    known = Known(captured, capture, {i: inputs[i].clone() for i in captured.reads})
    CAPTURES.keep(key, known, module, store)
    return known, pins


BUILT_IN = (types.ModuleType, types.MethodDescriptorType, types.WrapperDescriptorType, types.GetSetDescriptorType)


def is_equal(first: Tensor, second: Tensor) -> bool:
    """True for equal values of one shape on one device."""
    return first.shape == second.shape and first.device == second.device and torch.equal(first, second)


def is_portable(guards: Guards) -> bool:
    """True if guards name nothing but what every module of the class has: no closures, no objects of one module."""
    paths = (*guards.tensors, *guards.modules, *(fact.path for fact in guards.facts))
    are_portable = all(map(_is_portable_path, paths)) and all(map(_is_portable_fact, guards.facts))
    return are_portable and _is_plain(guards.called)


def _is_portable_path(path: Path) -> bool:
    return all(_is_plain(key.contents() if by is By.CELL else key) for by, key in path.links)


def _is_portable_fact(fact: Fact) -> bool:
    if fact.kind == "same":
        return _is_portable_path(fact.expected)
    if fact.kind == "wrapped":
        return _is_plain(fact.expected.kind)
    return _is_plain(fact.expected)


def _is_plain(value: Any) -> bool:
    """True for numbers, names, and what can be imported by its name; and for tuples and sets of such."""
    if isinstance(value, (tuple, frozenset)):
        return all(map(_is_plain, value))
    if isinstance(value, types.BuiltinFunctionType):
        bound: Any = value.__self__
        return isinstance(bound, (type, types.ModuleType, types.NoneType)) or _is_of_pybind(bound)
    if isinstance(value, types.MethodType):
        return _is_plain((value.__self__, value.__func__))
    if isinstance(value, (classmethod, staticmethod)):
        return _is_plain(value.__func__)
    if isinstance(value, property):
        return _is_plain((value.fget, value.fset, value.fdel))
    return isinstance(value, (PLAIN, *BUILT_IN)) or _is_imported(value)


def _is_of_pybind(value: Any) -> bool:
    return type(value).__module__.startswith("pybind11")


def _is_imported(value: Any) -> bool:
    """True for a class or function that lies where its name says, or behind a decorator there."""
    if isinstance(value, type) and value.__module__ == "builtins":
        return True
    found: Any = sys.modules.get(getattr(value, "__module__", None) or "")
    for part in getattr(value, "__qualname__", "").split("."):
        found = getattr(found, part, None)
    found = found.fget if isinstance(found, property) else getattr(found, "__func__", found)
    while found is not value and hasattr(found, "__wrapped__"):
        found = found.__wrapped__
    return found is value
