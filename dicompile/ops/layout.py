"""Where samples and tokens are in a value: which axes count them, and in which order.

An axis is a product of parts, the outermost first. A stream ``[b, n, d]`` has one part each: samples, tokens, channels.
``view(b, h, w, d)`` splits tokens into two parts, ``view(b * n, d)`` joins samples and tokens in one axis, a transpose
moves parts, and joining keys of text and picture puts other rows around the tokens. As long as every part is known,
chosen tokens can stand in for all: the outermost part of tokens becomes their number, the other parts become 1.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace


class Of(enum.Enum):
    """What a part of an axis counts."""

    SAMPLES = "samples"
    TOKENS = "tokens"
    OTHERS = "others"


@dataclass(frozen=True, slots=True)
class Part:
    """One factor of an axis.

    Attributes:
        size: its number of rows.
        of: what they are.
        stride: number of samples or tokens from one row to the next.
        before: rows in front of the tokens that are none of them.
        after: rows behind the tokens that are none of them.
    """

    size: int
    of: Of = Of.OTHERS
    stride: int = 0
    before: int = 0
    after: int = 0

    @property
    def is_padded(self) -> bool:
        """True if other rows lie around the tokens."""
        return bool(self.before or self.after)


Axis = tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """Parts of every axis of a value that holds all tokens of all samples."""

    axes: tuple[Axis, ...]

    @classmethod
    def of(cls, axes: Iterable[Axis]) -> Layout:
        """Layout of axes whose parts may have one row or count on from each other."""
        return cls(tuple(_joined(parts) for parts in axes))

    @classmethod
    def of_stream(cls, shape: Sequence[int], token_axes: Sequence[int]) -> Layout:
        """Layout of a stream: samples on the first axis, unless tokens are.

        Args:
            shape: of the stream.
            token_axes: axes that count tokens, the slowest first.
        """
        axes: list[Axis] = [(Part(int(size)),) for size in shape]
        if 0 not in token_axes:
            axes[0] = (Part(int(shape[0]), Of.SAMPLES, 1),)
        stride = 1
        for axis in reversed(token_axes):
            axes[axis] = (Part(int(shape[axis]), Of.TOKENS, stride),)
            stride *= int(shape[axis])
        return cls.of(axes)

    def counts(self, axis: int, of: Of | None = None) -> bool:
        """True if an axis counts samples or tokens, or one of them."""
        return any(part.of is not Of.OTHERS and of in (None, part.of) for part in self.axes[axis])

    @property
    def has_tokens(self) -> bool:
        """True if any axis counts tokens."""
        return any(self.counts(axis, Of.TOKENS) for axis in range(len(self.axes)))

    @property
    def of_samples(self) -> tuple[Part, ...]:
        """Parts that count samples, the outermost first."""
        return self._of(Of.SAMPLES)

    @property
    def of_tokens(self) -> tuple[Part, ...]:
        """Parts that count tokens, the outermost first: chosen tokens are counted by that one."""
        return self._of(Of.TOKENS)

    @property
    def counted(self) -> tuple[Part, ...]:
        """Both."""
        return (*self.of_samples, *self.of_tokens)

    def _of(self, of: Of) -> tuple[Part, ...]:
        parts = (part for axis in self.axes for part in axis if part.of is of)
        return tuple(sorted(parts, key=lambda part: -part.stride))

    @property
    def token_share(self) -> float:
        """Share of tokens among the rows that they are in: less than 1 where other rows lie around them."""
        part = self.of_tokens[0]
        return (part.size - part.before - part.after) / part.size

    def padding(self, axis: int) -> Part | None:
        """The part of an axis that has other rows around tokens."""
        return next((part for part in self.axes[axis] if part.is_padded), None)

    def size(self, axis: int) -> int:
        """Number of rows of an axis."""
        return math.prod(part.size for part in self.axes[axis])

    def moved(self, order: Iterable[int]) -> Layout:
        """Axes in another order, or some of them; -1 stands for a new axis of one row."""
        return Layout(tuple(() if axis < 0 else self.axes[axis] for axis in order))

    def resized(self, axis: int, size: int) -> Layout:
        """With another number of rows on an axis that counts neither samples nor tokens."""
        return self.with_axis(axis, (Part(size),))

    def with_axis(self, axis: int, parts: Axis) -> Layout:
        """With other parts on one axis."""
        return Layout((*self.axes[:axis], _joined(parts), *self.axes[axis + 1 :]))

    def reshaped(self, shape: Sequence[int]) -> Layout | None:
        """The same rows in the same order under another shape; None where that cuts a part apart unevenly."""
        left = list(reversed(_joined(part for axis in self.axes for part in axis)))
        axes = []
        for size in shape:
            taken: list[Part] = []
            missing = int(size)
            while missing > 1:
                part = left.pop()
                if missing % part.size == 0:
                    taken.append(part)
                    missing //= part.size
                elif part.size % missing == 0 and not part.is_padded:
                    inner = part.size // missing
                    taken.append(replace(part, size=missing, stride=part.stride * inner))
                    left.append(replace(part, size=inner))
                    missing = 1
                else:
                    return None
            axes.append(_joined(taken))
        return Layout(tuple(axes))

    def __str__(self) -> str:
        return "[" + ", ".join(" ".join(_part_text(part) for part in axis) or "1" for axis in self.axes) + "]"


def _part_text(part: Part) -> str:
    around = f"{part.before}+" if part.before else ""
    behind = f"+{part.after}" if part.after else ""
    inner = part.size - part.before - part.after
    return f"{around}{inner}{'' if part.of is Of.OTHERS else part.of.value[0]}{behind}"


def _joined(parts: Iterable[Part]) -> Axis:
    """Parts without those of one row, neighbours that count on from each other as one."""
    result: list[Part] = []
    for part in parts:
        if part.size == 1:
            continue
        if result and _counts_on(result[-1], part):
            result.append(replace(part, size=result.pop().size * part.size))
        else:
            result.append(part)
    return tuple(result)


def _counts_on(outer: Part, inner: Part) -> bool:
    if outer.of is not inner.of or outer.is_padded or inner.is_padded:
        return False
    return outer.of is Of.OTHERS or outer.stride == inner.stride * inner.size
