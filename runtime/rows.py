"""Rows of a batch: some of them run by themselves, and what they leave is put in its place again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dicompile.runtime.contexts import Sample
    from dicompile.runtime.execute import Executor


class Part(NamedTuple):
    """Some rows of a call, as a call of their own.

    Attributes:
        executor: compiled code for so many rows.
        inputs: of that code, but for its constants.
    """

    executor: Executor
    inputs: Sequence[Any]


@dataclass(frozen=True)
class Batch:
    """A call of which some rows may do something else than others.

    Attributes:
        rows: of its batch.
        part: rows of it as a call of their own.
    """

    rows: int
    part: Callable[[Sequence[int]], Part]

    def picked(self, whole: Tensor, rows: Sequence[int] | None) -> Tensor:
        """The part of a value that belongs to some rows; all of it for None."""
        return whole if rows is None else picked(whole, rows, self.rows)


@dataclass(frozen=True)
class Group:
    """Samples that do the same at a step.

    Attributes:
        samples: of the context.
        recalls: whether they recall.
        rows: of the batch, in order; None for all.
    """

    samples: tuple[Sample, ...]
    recalls: bool = False
    rows: tuple[int, ...] | None = None

    def count(self, batch: Batch | None) -> int:
        """Number of its rows."""
        return len(self.rows) if self.rows is not None else 0 if batch is None else batch.rows

    def places(self, sample: Sample) -> tuple[int, ...] | None:
        """Where the rows of one of them are among the rows of the group."""
        if self.rows is None or sample.rows is None:
            return sample.rows
        return tuple(self.rows.index(row) for row in sample.rows)


def picked(whole: Tensor, rows: Sequence[int], count: int) -> Tensor:
    """Some rows of a batch: a copy, ``[len(rows) * s, ...]`` of ``[count * s, ...]``, axes in the same order."""
    each = whole.shape[0] // count
    result = empty_rows(whole, len(rows) * each)
    for first, place, length in _runs(rows):
        result.narrow(0, place * each, length * each).copy_(whole.narrow(0, first * each, length * each))
    return result


def put_together(parts: Sequence[tuple[Sequence[int], Tensor | None]], count: int) -> Tensor:
    """Rows of a batch in their places.

    Args:
        parts: rows, and their values, ``[len(rows) * s, ...]``; 0 for None. At least one has values.
        count: of all rows.
    """
    rows, like = next((rows, value) for rows, value in parts if value is not None)
    each = like.shape[0] // len(rows)
    result = empty_rows(like, count * each)
    for rows, value in parts:
        for first, place, length in _runs(rows):
            there = result.narrow(0, first * each, length * each)
            if value is None:
                there.zero_()
            else:
                there.copy_(value.narrow(0, place * each, length * each))
    return result


def _runs(rows: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Rows that follow each other: the first of them, its place among the rows, and how many they are."""
    start = 0
    for place in range(1, len(rows) + 1):
        if place == len(rows) or rows[place] != rows[place - 1] + 1:
            yield rows[start], start, place - start
            start = place


def empty_rows(like: Tensor, size: int) -> Tensor:
    """Memory for a tensor with another first axis, and its axes in the same order: code was compiled for that."""
    strides = [math.inf if axis == 0 and like.shape[0] == 1 else like.stride(axis) for axis in range(like.ndim)]
    order = sorted(range(like.ndim), key=strides.__getitem__, reverse=True)
    return torch.empty_permuted((size, *like.shape[1:]), order, dtype=like.dtype, device=like.device)
