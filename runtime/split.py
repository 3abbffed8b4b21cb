"""A step of which some rows do something else than others: which rows go together, and what they leave."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from dicompile.plan import Gate
from dicompile.runtime.contexts import Sample
from dicompile.runtime.rows import Batch, Group, put_together
from dicompile.runtime.steps import GatedStep, Step


@dataclass(frozen=True)
class Split:
    """A step of which some rows do something else than others.

    Attributes:
        step: as it is for all rows.
        groups: rows that do the same; a guidance half that leads before the one that follows it.
        hoisted: what is computed outside of the steps, for all rows, by name.
        is_paired: both guidance halves have the same latents, where one call has both.
    """

    step: GatedStep
    groups: tuple[Group, ...]
    hoisted: Mapping[str, Any]
    is_paired: bool


@dataclass(frozen=True)
class Ran:
    """What some rows have left.

    Attributes:
        group: which rows.
        step: what they did, as it is planned for all rows.
        results: of the model.
        contents: by the number of a slot, what was stored.
        left: what a guidance half that follows reads, where this one leads.
        fetched: bytes of weights that were brought for it.
    """

    group: Group
    step: Step
    results: list[Any]
    contents: Mapping[int, torch.Tensor]
    left: torch.Tensor | None
    fetched: int


def grouped(samples: Sequence[Sample], recalls: Sequence[bool], step: GatedStep, gate: Gate) -> tuple[Group, ...]:
    """Samples that do the same: that compute, or recall with the same weights, and are verified or not."""
    found: dict[Hashable, list[Sample]] = {}
    for sample, is_recall in zip(samples, recalls, strict=True):
        key: Hashable = None
        if is_recall:
            drift = sample.drift
            weights = id(sample) if step.aligned is not None else drift.full if step.recalled.program.weights else ()
            key = weights, gate.is_verified(drift.run, drift.recalled)
        found.setdefault((is_recall, key), []).append(sample)
    return tuple(
        Group(tuple(alike), is_recall, tuple(sorted(row for sample in alike for row in sample.rows or ())) or None)
        for (is_recall, _), alike in cast("dict[tuple[bool, object], list[Sample]]", found).items()
    )


def slots_after(
    ran: Sequence[Ran], before: Sequence[torch.Tensor | None], batch: Batch
) -> tuple[list[torch.Tensor | None], set[int]]:
    """Slots after a step of which some rows did something else than others, and those that are put together anew."""
    store, copied = list[torch.Tensor | None](), set[int]()
    for number, sources in enumerate(zip(*(one.step.moves for one in ran), strict=True)):
        source = sources[0]
        if source is None or (source >= 0 and set(sources) == {source}):
            store.append(None if source is None else before[source])
            continue
        values = [
            one.contents[number] if source < 0 else _rows_of(before[source], one.group, batch)
            for one, source in zip(ran, sources, strict=True)
        ]
        if all(value is None for value in values):
            store.append(None)
            continue
        store.append(put_together([(one.group.rows or (), v) for one, v in zip(ran, values, strict=True)], batch.rows))
        copied.add(number)
    return store, copied


def _rows_of(whole: torch.Tensor | None, group: Group, batch: Batch) -> torch.Tensor | None:
    return None if whole is None else batch.picked(whole, group.rows)
