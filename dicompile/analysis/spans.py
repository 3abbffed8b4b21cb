"""Spans: runs of sites on one residual stream, which can be reused as a whole.

A run goes on while the next branch starts from the value that the last add left, moved about but not computed with, and
of the same shape. Streams that are joined (FLUX: text and image, then both as one) therefore make several runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import fx

from dicompile.analysis.dataflow import Dataflow
from dicompile.analysis.residual import Branch
from dicompile.analysis.structure import Site, SiteId, SiteKind, Span, TokenFact, TokenWise
from dicompile.analysis.token_work import TokenWork, token_axis, token_work
from dicompile.analysis.transport import carried
from dicompile.analysis.work import owned_work
from dicompile.nodes import tensor_of, walk
from dicompile.ops.kinds import is_attention


def make_spans(
    flow: Dataflow, branches: Sequence[Branch], sites: Sequence[Site], groups: Sequence[Sequence[int]]
) -> tuple[Span, ...]:
    """Spans of every block, then of the stack; their numbers follow those of the sites."""
    of_blocks = [run for group in groups for run in find_runs(branches, sites, group)]
    of_stack = find_runs(branches, sites, range(len(branches)))
    last = last_adds(flow, branches)
    spans: list[Span] = []
    for kind, runs in ((SiteKind.BLOCK, of_blocks), (SiteKind.STACK, of_stack)):
        work = owned_work(flow, [branches[run[-1]].add for run in runs], [branches[run[0]].stream for run in runs])
        for run, own in zip(runs, work, strict=True):
            start, end = branches[run[0]].stream, branches[run[-1]].add
            number = SiteId(len(sites) + len(spans))
            spans.append(_span(flow, start, end, kind, number, [sites[i] for i in run], own, is_last=end in last))
    return tuple(spans)


def _span(
    flow: Dataflow,
    start: fx.Node,
    end: fx.Node,
    kind: SiteKind,
    number: SiteId,
    inside: Sequence[Site],
    work: tuple[float, float],
    *,
    is_last: bool,
) -> Span:
    region = list(flow.members(flow.between(start, end)))
    tokens = _token_work(flow, start, end, region, inside, kind)
    value = tensor_of(end)
    return Span(
        id=number,
        block=inside[-1].block,
        name=" .. ".join(dict.fromkeys((inside[0].name, inside[-1].name))),
        kind=kind,
        stream=inside[-1].stream,
        source=start.name,
        core=end.name,
        update=end.name,
        add=end.name,
        attention=(),
        shape=tuple(int(size) for size in value.shape),
        itemsize=value.element_size(),
        tokens=tokens.fact,
        flops=round(work[0]),
        token_flops=tokens.flops,
        bytes=round(work[1]),
        attention_flops=sum(flow.work[node][0] for node in region if is_attention(node)),
        update_itemsize=value.element_size(),
        key_flops=tokens.key_flops,
        inside=tuple(site.id for site in inside),
        is_last=is_last,
    )


def _token_work(
    flow: Dataflow, start: fx.Node, end: fx.Node, region: Sequence[fx.Node], inside: Sequence[Site], kind: SiteKind
) -> TokenWork:
    """What a span can do with chosen tokens."""
    if kind is SiteKind.STACK:
        why = "tokens of later blocks attend to all tokens of earlier ones"
    elif any(site.kind is SiteKind.JOINT_ATTENTION for site in inside):
        why = "another stream needs the same attention over all tokens"
    else:
        return token_work(flow, start, end, region)
    shape = tensor_of(start).shape
    axis = token_axis(shape)
    return TokenWork(TokenFact(TokenWise.NO, axis, int(shape[axis]), why))


def find_runs(branches: Sequence[Branch], sites: Sequence[Site], members: Iterable[int]) -> list[list[int]]:
    """Cut sites into runs.

    Args:
        branches: all branches of the model.
        sites: the sites made of them.
        members: numbers of the sites to cut, in execution order.

    Returns:
        Runs in the order in which they end.
    """
    runs: list[list[int]] = []
    for i in members:
        branch = branches[i]
        run = next(
            (r for r in runs if _continues(branches[r[-1]], branch) and sites[r[-1]].stream == sites[i].stream), []
        )
        if not run:
            runs.append(run)
        run.append(i)
    return sorted(runs, key=lambda run: run[-1])


def last_adds(flow: Dataflow, branches: Sequence[Branch]) -> set[fx.Node]:
    """Residual adds that the model's output reads without passing through another one."""
    adds = {branch.add for branch in branches}
    return adds.intersection(walk(flow.nodes[-1:], lambda node: () if node in adds else node.all_input_nodes))


def _continues(before: Branch, after: Branch) -> bool:
    same_shape = before.add.meta["val"].shape == after.stream.meta["val"].shape
    return same_shape and before.add in carried(after.stream, {before.add})
