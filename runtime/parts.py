"""A step of which rows go on in different ways: each group runs as a call of its own, and what they leave is joined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from dicompile.runtime.gated import measure, nobody, verify
from dicompile.runtime.invariants import laid_out
from dicompile.runtime.report import MIXED, RECALLED
from dicompile.runtime.rows import Group, Part, picked, put_together
from dicompile.runtime.slots import keep, read_slots
from dicompile.runtime.split import Ran, Split, slots_after
from dicompile.runtime.steps import GatedStep
from dicompile.runtime.storage import run_calls
from dicompile.runtime.values import load_values
from dicompile.runtime.work import Work


def run_split(work: Work, split: Split, parts: Sequence[Part]) -> Sequence[Any]:
    """Run the groups of rows of a step, and put together what they leave.

    Args:
        work: the whole call.
        split: its step.
        parts: every group as a call of its own.

    Returns:
        What the model returns for all rows.
    """
    context, batch, step = work.context, work.batch, split.step
    assert context is not None
    assert batch is not None
    ran: list[Ran] = []
    for group, part in zip(split.groups, parts, strict=True):
        ran.append(_run_part(work, split, group, part, ran[0].left if ran else None))
    results = [
        put_together([(one.group.rows or (), value) for one, value in zip(ran, values, strict=True)], batch.rows)
        if isinstance(values[0], torch.Tensor) and values[0].ndim
        else values[0]
        for values in zip(*(one.results for one in ran), strict=True)
    ]
    if step.full.is_led:  # the half that leads stores nothing, and the other one recalls
        ended = [(sample, step.recalled) for sample in context.samples]
        context.store = [None if source is None else context.store[source] for source in step.recalled.moves]
        keep(work, ended, is_paired=split.is_paired)
    else:
        ended = [(sample, one.step) for one in ran for sample in one.group.samples]
        context.store, copied = slots_after(ran, context.store, batch)
        keep(work, ended, copied=copied)
    is_mixed = not step.full.is_led and len({one.group.recalls for one in ran}) > 1
    work.state.report.count(MIXED if is_mixed else RECALLED, work.state.cache_bytes, sum(one.fetched for one in ran))
    return results


def _run_part(whole: Work, split: Split, group: Group, part: Part, led: torch.Tensor | None) -> Ran:
    """Run some rows of a step, from its beginning.

    Args:
        whole: the call of all rows.
        split: its step.
        group: the rows.
        part: the rows as a call of their own.
        led: what the guidance half that leads has returned, for the one that follows.
    """
    batch, rows, sample = whole.batch, group.rows or (), group.samples[0]
    assert batch is not None
    planned = split.step.recalled if group.recalls else split.step.full
    gated = part.executor.steps.planned_for_others(planned.plan, planned.index)
    assert isinstance(gated, GatedStep)
    step = gated.recalled if group.recalls else gated.full
    work = replace(whole, code=part.executor, inputs=(*part.inputs, *part.executor.constants), registers=[])
    try:
        work.begin(gated)
        registers = work.registers
        for name, register in (*gated.program.invariants, *step.program.invariants):
            assert work.code.tables is not None
            item, value = work.code.tables.invariants[name], split.hoisted[name]
            is_shared = tuple(value.shape) == item.shape
            registers[register] = value if is_shared else laid_out(picked(value, rows, batch.rows), item)
        run_calls(gated.program, registers, None, supply=work.supply)
        load_values(work, step, sample.drift)
        for _, register, content, _ in read_slots(whole, planned, group.samples, step.reads):
            registers[register] = picked(content, rows, batch.rows)
        for register in step.program.partners:
            registers[register] = nobody(work) if led is None else led
        run_calls(step.program, registers, None, supply=work.supply)
        verify(work, step, group)
        measure(work, step, group)
        for register in step.stored_copies:
            registers[register] = registers[register].clone()
        return Ran(
            group,
            planned,
            step.outputs(registers),
            {i: registers[~source] for i, source in enumerate(step.moves) if source is not None and source < 0},
            registers[step.anchors[0][1]] if step.is_led and step.anchors else None,
            work.fetched,
        )
    finally:
        work.end()
