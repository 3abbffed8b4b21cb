"""Spans: runs of sites on one residual stream, which can be reused as a whole.

A run goes on while the next branch starts from the value that the last add left, moved about but not computed with, and
of the same shape. Streams that are joined (FLUX: text and image, then both as one) therefore make several runs.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
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
    last = last_adds(flow, branches)
    return tuple(_spans(flow, branches, sites, runs, SiteKind.BLOCK, SiteId(len(sites)), last))


def spans_of_trunk(
    flow: Dataflow,
    branches: Sequence[Branch],
    sites: Sequence[Site],
    groups: Sequence[Sequence[int]],
    number: SiteId,
    given: tuple[fx.Node | None, fx.Node | None] = (None, None),
    trunk: Trunk = WHOLE,
) -> tuple[Span, ...]:
    """Spans of the stack and of the model, then what is watched.

    Args:
        flow: of the graph.
        branches: all branches of the model.
        sites: the sites made of them.
        groups: numbers of the sites of every block.
        number: of the first one.
        given: the input that is denoised, and the one that says how much noise there is in it.
        trunk: what the spans of the stack cover, and what is watched.
    """
    covered = groups[: len(groups) - trunk.after]
    inner = covered[trunk.before :]
    runs = find_runs(branches, sites, sorted(i for group in inner for i in group))
    last = last_adds(flow, [branches[i] for group in covered for i in group])  # what the blocks after them read as well
    spans, latent = list(_spans(flow, branches, sites, runs, SiteKind.STACK, number, last)), given[0]
    if trunk.model and latent is not None and sites:
        spans += _whole_model(flow, latent, sites, SiteId(number + len(spans)))
    number = SiteId(number + len(spans))
    of_latent = [i for i, branch in enumerate(branches) if latent and flow.is_ancestor(latent, branch.stream)]
    if trunk.probe in (Probe.RESIDUAL, Probe.STREAM):
        kinds = (SiteKind.PROBE, SiteKind.TRACE) if trunk.traces else (SiteKind.PROBE,)
        spans += _first_blocks(flow, branches, sites, of_latent, trunk.watched or trunk.before, number, kinds)
    elif trunk.probe is not None and of_latent:
        first = of_latent[0]
        start, value = _early_value(flow, branches[first], trunk.probe, *given)
        if value is not None:
            span = _span(flow, start, value, SiteKind.PROBE, number, [sites[first]], (0.0, 0.0), is_last=False)
            spans.append(replace(span, inside=()))
    return tuple(spans)


def _spans(
    flow: Dataflow,
    branches: Sequence[Branch],
    sites: Sequence[Site],
    runs: Sequence[Sequence[int]],
    kind: SiteKind,
    number: SiteId,
    last: Container[fx.Node],
) -> Iterator[Span]:
    """A span for every run of sites; those that end with one of `last` are read from outside."""
    work = owned_work(flow, [branches[run[-1]].add for run in runs], [branches[run[0]].stream for run in runs])
    for i, (run, own) in enumerate(zip(runs, work, strict=True)):
        start, end = branches[run[0]].stream, branches[run[-1]].add
        inside = [sites[k] for k in run]
        yield _span(flow, start, end, kind, SiteId(number + i), inside, own, is_last=end in last)


def _whole_model(flow: Dataflow, latent: fx.Node, sites: Sequence[Site], number: SiteId) -> Iterator[Span]:
    """What the model adds to its latent, if its output is one tensor that can be added to that."""
    results = [node for node in flow.nodes[-1].all_input_nodes if flow.is_ancestor(latent, node)]
    if len(results) != 1 or results[0].op != "call_function":
        return
    given, made = tensor_of(latent), tensor_of(results[0])
    if (given.shape, given.dtype) == (made.shape, made.dtype):
        ((flops, size),) = owned_work(flow, results, [latent])
        yield _span(flow, latent, results[0], SiteKind.MODEL, number, sites, (flops, size), is_last=True)


def _first_blocks(
    flow: Dataflow,
    branches: Sequence[Branch],
    sites: Sequence[Site],
    of_latent: Sequence[int],
    count: int,
    number: SiteId,
    kinds: Sequence[SiteKind],
) -> Iterator[Span]:
    """What the first blocks add to the latent's stream, if one stream goes through all of them; one span of a kind."""
    first = [i for i in of_latent if sites[i].block < count]
    for run in find_runs(branches, sites, first):
        inside = [sites[i] for i in run]
        if (inside[0].block, inside[-1].block) == (0, count - 1):
            start, end = branches[run[0]].stream, branches[run[-1]].add
            for i, kind in enumerate(kinds):
                yield _span(flow, start, end, kind, SiteId(number + i), inside, (0.0, 0.0), is_last=False)
            return


def _early_value(
    flow: Dataflow, branch: Branch, probe: Probe, latent: fx.Node | None, timestep: fx.Node | None
) -> tuple[fx.Node, fx.Node | None]:
    """A value that is known before the first branch on the latent's stream runs, and where it comes from."""
    if probe is Probe.LATENT and latent is not None:
        return latent, latent
    modulated = _modulated(flow, branch)
    if probe is Probe.MODULATED or modulated is None:
        return branch.source, modulated
    product = _modulation(flow, branch.source, modulated, timestep)
    if probe is Probe.MODULATION or product is None:
        return branch.source, product
    return branch.source, _before_activation(flow, product, timestep)


def _modulated(flow: Dataflow, branch: Branch) -> fx.Node | None:
    """What enters the first product of a branch."""
    entering = (
        node.all_input_nodes[0]
        for node in flow.members(flow.descendants[branch.source] & branch.region)
        if is_heavy(node) and flow.is_ancestor(branch.source, node.all_input_nodes[0])
    )
    value = next(entering, branch.source)
    return None if value is branch.source else value


def _modulation(flow: Dataflow, start: fx.Node, end: fx.Node, timestep: fx.Node | None) -> fx.Node | None:
    """The one product of the timestep by which a stream is modulated on the way from `start` to `end`."""
    if timestep is None:
        return None
    way = set(flow.members(flow.between(start, end)))
    beside = {node for member in way for node in member.all_input_nodes} - way - {start}
    timed = [node for node in beside if flow.is_ancestor(timestep, node) and not flow.is_ancestor(start, node)]
    reached = walk(timed, lambda node: () if is_heavy(node) else node.all_input_nodes)
    products = [node for node in reached if is_heavy(node) and flow.is_ancestor(timestep, node)]
    return products[0] if len(products) == 1 else None


def _before_activation(flow: Dataflow, product: fx.Node, timestep: fx.Node | None) -> fx.Node | None:
    """What enters a product, before the activation in between."""
    assert timestep is not None
    value = next(node for node in product.all_input_nodes if flow.is_ancestor(timestep, node))
    while len(value.all_input_nodes) == 1 and not is_heavy(value):
        value = value.all_input_nodes[0]
    return value if value.op == "call_function" else None


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
        picture=_picture(flow, end) if is_last else (0, 0),
    )


def _picture(flow: Dataflow, end: fx.Node) -> tuple[int, int]:
    """Tokens of a stream that the model's output reads: all of them, or those of the one slice that it reads."""
    shape = tensor_of(end).shape
    axis = token_axis(shape)
    readers = [node for node in end.users if flow.is_ancestor(node, flow.nodes[-1])]
    slices = [node for node in readers if node.target is torch.ops.aten.slice.Tensor and node.args[1] == axis]
    if not slices:
        return 0, int(shape[axis])
    if len(slices) < len(readers) or len({node.args[2:] for node in slices}) > 1:
        return 0, 0
    first = slices[0].args[2] if len(slices[0].args) > 2 else 0
    return (first, int(tensor_of(slices[0]).shape[axis])) if isinstance(first, int) and first >= 0 else (0, 0)


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
