"""Variants as bytes, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from dicompile.lower.artifact import Compiled, code_bytes, code_of
from dicompile.ops.registry import is_of_torch_or_ours
from dicompile.passes import (
    Chosen,
    InputRef,
    Noise,
    OutputRef,
    Partner,
    Predicted,
    ReuseClock,
    Segment,
    SlotRef,
    TokenCount,
    Value,
    Weights,
)
from dicompile.plan import SlotKind
from dicompile.store import Unwritable, packed, unpacked

_REFERENCES: dict[str, Callable[..., Any]] = {
    cls.__name__: cls for cls in (Value, SlotRef, TokenCount, ReuseClock, Noise, Partner, Predicted, Weights, Chosen)
}


@dataclasses.dataclass(frozen=True)
class Stored:
    """What there is to know of a variant to run it; see `dicompile.lower.Variant`."""

    function: Compiled
    inputs: tuple[InputRef, ...]
    outputs: tuple[OutputRef, ...]
    memory: tuple[int | str, ...]

    def to_bytes(self) -> bytes:
        """It as bytes.

        Raises:
            Unwritable: its code cannot be saved.
        """
        head = [list(map(_reference, self.inputs)), list(map(_reference, self.outputs)), list(self.memory)]
        return packed(head, {"code": code_bytes(self.function)})

    @classmethod
    def of(cls, content: bytes) -> Stored:
        """The reverse; nothing is compiled.

        Args:
            content: of somebody who may run code here.
        """
        (inputs, outputs, memory), parts = unpacked(content)
        return cls(code_of(parts["code"]), _references(inputs), _references(outputs), tuple(memory))


def check_can_be_stored(segment: Segment) -> None:
    """Check that a segment has no operator of somebody else, which may be another one in the next process.

    Raises:
        Unwritable: it has.
    """
    for node in segment.graph.nodes:
        if node.op not in ("placeholder", "output") and not is_of_torch_or_ours(node.target):
            raise Unwritable(f"{node.target}")


def _reference(item: Any) -> list[Any]:
    values = [getattr(item, field.name) for field in dataclasses.fields(item)]
    return [type(item).__name__, *(value.name if isinstance(value, SlotKind) else value for value in values)]


def _references(items: Sequence[Sequence[Any]]) -> tuple[Any, ...]:
    def made(name: str, *values: Any) -> Any:
        return SlotRef(values[0], SlotKind[values[1]], *values[2:]) if name == "SlotRef" else _REFERENCES[name](*values)

    return tuple(made(*item) for item in items)
