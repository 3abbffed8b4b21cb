"""Spans: runs of sites on one residual stream, which can be reused as a whole.

A run goes on while the next branch starts from the value that the last add left, moved about but not computed with, and
of the same shape. Streams that are joined (FLUX: text and image, then both as one) therefore make several runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from torch import fx

from dicompile.analysis.dataflow import Dataflow
from dicompile.analysis.residual import Branch
from dicompile.analysis.structure import WHOLE, Probe, Site, SiteId, SiteKind, Span, TokenFact, TokenWise, Trunk
from dicompile.analysis.token_work import TokenWork, token_axis, token_work
from dicompile.analysis.transport import carried
from dicompile.analysis.work import owned_work
from dicompile.nodes import tensor_of, walk
from dicompile.ops.kinds import is_attention, is_heavy


def spans_of_blocks(
    flow: Dataflow, branches: Sequence[Branch], sites: Sequence[Site], groups: Sequence[Sequence[int]]
) -> tuple[Span, ...]:
    """Spans of every block; their numbers follow those of the sites.

    Args:
        flow: of the graph.
        branches: all branches of the model.
        sites: the sites made of them.
        groups: numbers of the sites of every block.
    """
    runs = [run for group in groups for run in find_runs(branches, sites, group)]
    return tuple(_spans(flow, branches, sites, runs, SiteKind.BLOCK, SiteId(len(sites))))


def spans_of_trunk(
    flow: Dataflow,
    branches: Sequence[Branch],
    sites: Sequence[Site],
    groups: Sequence[Sequence[int]],
    number: SiteId,
    latent: fx.Node | None = None,
    trunk: Trunk = WHOLE,
) -> tuple[Span, ...]:
    """Spans of the stack, then the probe.

    Args:
        flow: of the graph.
        branches: all branches of the model.
        sites: the sites made of them.
        groups: numbers of the sites of every block.
        number: of the first one.
        latent: the input that is denoised.
        trunk: what the spans of the stack cover, and what is watched.
    """
    inner = groups[trunk.before : len(groups) - trunk.after]
    runs = find_runs(branches, sites, sorted(i for group in inner for i in group))
    spans = list(_spans(flow, branches, sites, runs, SiteKind.STACK, number))
    number = SiteId(number + len(spans))
    of_latent = [i for i, branch in enumerate(branches) if latent and flow.is_ancestor(latent, branch.stream)]
    if trunk.probe is Probe.RESIDUAL:
        spans += _first_blocks(flow, branches, sites, of_latent, trunk.before, number)
    elif trunk.probe is Probe.MODULATED and of_latent:
        spans += _modulated(flow, branches[of_latent[0]], sites[of_latent[0]], number)
    return tuple(spans)


def _spans(
    flow: Dataflow,
    branches: Sequence[Branch],
    sites: Sequence[Site],
    runs: Sequence[Sequence[int]],
    kind: SiteKind,
    number: SiteId,
) -> Iterator[Span]:
    """A span for every run of sites."""
    last = last_adds(flow, branches)
    work = owned_work(flow, [branches[run[-1]].add for run in runs], [branches[run[0]].stream for run in runs])
    for i, (run, own) in enumerate(zip(runs, work, strict=True)):
        start, end = branches[run[0]].stream, branches[run[-1]].add
        inside = [sites[k] for k in run]
        yield _span(flow, start, end, kind, SiteId(number + i), inside, own, is_last=end in last)


def _first_blocks(
    flow: Dataflow,
    branches: Sequence[Branch],
    sites: Sequence[Site],
    of_latent: Sequence[int],
    count: int,
    number: SiteId,
) -> Iterator[Span]:
    """What the first blocks add to the latent's stream, if one stream goes through all of them."""
    first = [i for i in of_latent if sites[i].block < count]
    for run in find_runs(branches, sites, first):
        inside = [sites[i] for i in run]
        if (inside[0].block, inside[-1].block) == (0, count - 1):
            start, end = branches[run[0]].stream, branches[run[-1]].add
            yield _span(flow, start, end, SiteKind.PROBE, number, inside, (0.0, 0.0), is_last=False)
            return


def _modulated(flow: Dataflow, branch: Branch, site: Site, number: SiteId) -> Iterator[Span]:
    """What enters the first product of a branch."""
    entering = (
        node.all_input_nodes[0]
        for node in flow.members(flow.descendants[branch.source] & branch.region)
        if is_heavy(node) and flow.is_ancestor(branch.source, node.all_input_nodes[0])
    )
    value = next(entering, branch.source)
    if value is not branch.source:
        span = _span(flow, branch.source, value, SiteKind.PROBE, number, [site], (0.0, 0.0), is_last=False)
        yield replace(span, inside=())


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
    if kind is not SiteKind.BLOCK:
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
