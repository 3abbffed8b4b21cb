"""Whose features: the identity of a model, to which everything that is remembered belongs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from dicompile.runtime.graphs import Graphs


class Owner:
    """One model, as sessions know it. What they remember of it goes with it.

    Args:
        link: to its schedule.

    Attributes:
        has_time: some code of it takes a timestep.
        constant: step of the code for which Dynamo made a constant of the timestep, by its signature.
    """

    def __init__(self, link: Any) -> None:
        self.link = link
        self._graphs: weakref.WeakKeyDictionary[object, Graphs] = weakref.WeakKeyDictionary()
        self.has_time = False
        self.constant: dict[object, int] = {}

    def graphs_of(self, code: object, make: Callable[[], Graphs]) -> Graphs:
        """Recorded steps of some code that it runs; they go with it, and with the code."""
        found = self._graphs.get(code)
        if found is None:
            known = weakref.WeakKeyDictionary(self._graphs)  # another thread may be looking through the old one
            found = known[code] = make()
            self._graphs = known
        return found

    @property
    def graph_bytes(self) -> int:
        """Bytes that recorded steps hold."""
        return sum(graphs.bytes for graphs in self._graphs.values())

    def trim(self) -> None:
        """Release recorded steps that no generation uses now."""
        for graphs in self._graphs.values():
            graphs.trim()


class Owners:
    """Models by their tensors: compiled code that several instances of a class share gets nothing else of them.

    Args:
        link: to their schedule.
    """

    def __init__(self, link: Any) -> None:
        self._link = link
        self._known: dict[tuple[int, ...], tuple[list[weakref.ref[Tensor]], Owner]] = {}
        self._nobody = Owner(link)

    def of(self, tensors: Sequence[Tensor]) -> Owner:
        """The model that has these tensors."""
        if not tensors:
            return self._nobody
        ids = tuple(map(id, tensors))
        known = self._known.get(ids)
        if known is not None and all(map(_is_alive, known[0])):
            return known[1]
        self._known = {key: entry for key, entry in self._known.items() if all(map(_is_alive, entry[0]))}
        owner = Owner(self._link)
        self._known[ids] = [weakref.ref(tensor) for tensor in tensors], owner
        return owner


def _is_alive(reference: weakref.ref[Tensor]) -> bool:
    return reference() is not None
