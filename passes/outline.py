"""Cut a piece out of the captured graph and make it a segment of its own."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor, fx

from dicompile.analysis import Dataflow, ModelStructure, Site, Span
from dicompile.capture import Capture, Role
from dicompile.compat import lazy_graph_module
from dicompile.passes.base import Segment, SiteNodes, Value, is_dense, strides_of
from dicompile.passes.edit import Editor


@dataclass(frozen=True)
class Outline:
    """A segment before any rewrite, and where its values come from.

    Attributes:
        segment: the piece with numbered inputs and outputs.
        inputs: names of the captured nodes that enter, by number.
        outputs: names of the captured nodes that leave, by number.
    """

    segment: Segment
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def boundary(nodes: Sequence[fx.Node], also: Container[str] = ()) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the values that enter and leave a set of nodes, each in order of first use; `also` leave in any case."""
    inside = set(nodes)
    entering = dict.fromkeys(p.name for node in nodes for p in node.all_input_nodes if p not in inside)
    leaving = [node.name for node in nodes if node.name in also or any(user not in inside for user in node.users)]
    return tuple(entering), tuple(leaving)


def outline(
    capture: Capture,
    structure: ModelStructure,
    nodes: Sequence[fx.Node],
    sites: Sequence[Site],
    given: Mapping[str, Tensor] = MappingProxyType({}),
) -> Outline:
    """Copy `nodes` into a graph of their own.

    Args:
        capture: the captured model.
        structure: its structure.
        nodes: nodes of the captured graph, in order.
        sites: sites whose branches lie within the nodes, and spans that end there.
        given: values that enter and leave otherwise than the captured graph says, by name.
    """
    inside = {node.name for node in nodes}
    # A span may start in the middle of one piece (FLUX joins its streams there) and end in another.
    entering, leaving = boundary(nodes, {span.source for span in structure.spans if span.add not in inside})
    entering += tuple(dict.fromkeys(s.source for s in sites if s.source not in inside and s.source not in entering))
    graph, copies = fx.Graph(), {}
    named = {node.name: node for node in capture.graph.nodes}
    values = {name: given.get(name, named[name].meta["val"]) for name in (*entering, *leaving)}
    placeholders = zip(capture.graph.find_nodes(op="placeholder"), capture.inputs, strict=True)
    owned = {node.name for node, item in placeholders if item.role is Role.PARAMETER}
    for i, name in enumerate(entering):
        copies[named[name]] = graph.placeholder(f"value_{i}")
        copies[named[name]].meta = {**named[name].meta, "val": values[name]}
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output([copies[named[name]] for name in leaving])
    segment = Segment(
        graph_module=lazy_graph_module(capture.graph_module, graph),
        inputs=[Value(i) for i in range(len(entering))],
        outputs=[Value(i) for i in range(len(leaving))],
        sites=tuple(
            SiteNodes(
                stream=copies[named[site.source]],
                core=copies[named[site.core]],
                update=copies[named[site.update]],
                add=copies[named[site.add]],
                attention=tuple(copies[named[name]] for name in site.attention),
                token_axis=site.tokens.axis,
                tokens=site.tokens.count,
                keys=site.keys,
                is_span=site.kind.is_span,
                picture=site.picture if isinstance(site, Span) else (0, 0),
            )
            for site in sites
        ),
        grid=structure.grid,
        fake_mode=capture.fake_mode,
        owned=frozenset(i for i, name in enumerate(entering) if name in owned),
        layouts={i: strides_of(values[name]) for i, name in enumerate(leaving) if is_dense(values[name])},
    )
    if not given.keys().isdisjoint(entering):
        Editor(segment).propagate()
    return Outline(segment, entering, leaving)


def outline_until(
    capture: Capture, structure: ModelStructure, end: str, sites: Sequence[Site] = ()
) -> tuple[Outline, int]:
    """Cut out everything that leads to one value.

    Args:
        capture: the captured model.
        structure: its structure.
        end: name of the value's node.
        sites: sites on the way.

    Returns:
        The piece, and the number of the value among its outputs.
    """
    flow = Dataflow(capture.graph)
    last = next(node for node in flow.nodes if node.name == end)
    nodes = [node for node in flow.members(flow.ancestors[last]) if node.op == "call_function"]
    whole = outline(capture, structure, nodes, sites)
    return whole, whole.outputs.index(end)
