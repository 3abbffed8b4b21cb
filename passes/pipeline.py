"""Run the passes over one segment: verify after each, write before and after, time, report."""

from __future__ import annotations

import operator
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from dicompile.config import DebugFolder, Settings
from dicompile.errors import IllegalGraph, InvalidSetting
from dicompile.ops.registry import HeadsFirst
from dicompile.passes.base import LocalStep, Pass, PassReport, Segment, Value

LEGAL_FUNCTIONS = (operator.getitem, operator.add, operator.mul)


@dataclass(frozen=True)
class PassRun:
    """One pass on one segment.

    Attributes:
        name: of the pass.
        report: what it did.
        seconds: how long it took.
    """

    name: str
    report: PassReport
    seconds: float


def rewrite(
    segment: Segment,
    steps: Sequence[LocalStep],
    live: frozenset[int],
    passes: Sequence[Pass],
    *,
    settings: Settings,
    debug: DebugFolder,
    name: str,
) -> tuple[Segment, tuple[PassRun, ...]]:
    """Rewrite a copy of `segment` for what its sites do at a step.

    Args:
        segment: the unmodified segment.
        steps: one entry per site.
        live: numbers of the values that must leave the segment; others are dropped.
        passes: in order.
        settings: passes left out by name.
        debug: where the text of every stage goes.
        name: of the segment, for the text files.

    Raises:
        IllegalGraph: a pass broke the graph.
    """
    check_names(passes, settings)
    result = segment.copy(steps)
    _keep_outputs(result, live)
    debug.write(f"{name}-captured", result)
    runs = []
    for item in passes:
        if item.name in settings.disabled_passes:
            continue
        start = time.perf_counter()
        with torch._C._DisableAutocast():  # operators that a pass adds mean what they say
            report = item.run(result)
        runs.append(PassRun(item.name, report, time.perf_counter() - start))
        verify(result, item.name)
        if report.changed:
            debug.write(f"{name}-{item.name}", _Commented(report.changed, result))
    result.computed.clear()  # of use to passes alone, and it holds all values that ever were
    result.graph_module.recompile()
    return result, tuple(runs)


def check_names(passes: Sequence[Pass], settings: Settings) -> None:
    """Raise if the environment leaves out a pass that does not exist.

    Raises:
        InvalidSetting: it does.
    """
    known = [item.name for item in passes]
    for name in sorted(settings.disabled_passes.difference(known)):
        raise InvalidSetting(
            f"DICOMPILE_PASSES leaves out {name!r}, but no pass has this name",
            where="environment",
            fix=f"the passes are: {', '.join(dict.fromkeys(known))}",
        )


def verify(segment: Segment, after: str) -> None:
    """Check that the graph is well-formed, typed, and made of legal operators only.

    Raises:
        IllegalGraph: it is not.
    """
    complaint = _lint(segment.graph)
    placeholders = [node for node in segment.graph.nodes if node.op == "placeholder"]
    if len(placeholders) != len(segment.inputs) or len(segment.results) != len(segment.outputs):
        complaint = "inputs or outputs do not match their references"
    for node in segment.graph.nodes:
        if node.op not in ("placeholder", "output") and not _is_legal(node):
            complaint = f"{node.format_node()} is not an ATen operator"
        elif node.op != "output" and "val" not in node.meta:
            complaint = f"{node.name} has no value"
    if complaint:
        raise IllegalGraph(complaint, where=f"after pass {after}", fix="report this with DICOMPILE_DEBUG=folder")


@dataclass(frozen=True)
class _Commented:
    """A segment under the lines of a report; made into text only where somebody reads it."""

    lines: Sequence[str]
    segment: Segment

    def __str__(self) -> str:
        return "\n".join([*(f"# {line}" for line in self.lines), str(self.segment)])


def _lint(graph: fx.Graph) -> str | None:
    try:
        graph.lint()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def _is_legal(node: fx.Node) -> bool:
    known = isinstance(node.target, (torch._ops.OpOverload, HeadsFirst)) or node.target in LEGAL_FUNCTIONS
    return node.op == "call_function" and known


def _keep_outputs(segment: Segment, live: frozenset[int]) -> None:
    pairs = [
        (ref, node)
        for ref, node in zip(segment.outputs, segment.results, strict=True)
        if not isinstance(ref, Value) or ref.index in live
    ]
    segment.graph.output_node().args = ([node for _, node in pairs],)
    segment.outputs = [ref for ref, _ in pairs]
