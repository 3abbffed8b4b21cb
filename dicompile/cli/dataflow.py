"""The dataflow of a block, condensed until it can be read: operators of one module that hang together are one box."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx
from torch import fx

from dicompile.analysis import Block, ModelStructure
from dicompile.capture import Capture, Role
from dicompile.text import module_path, operator_text

_SHAPES_ONLY = frozenset({
    "getitem", "view", "reshape", "permute", "transpose", "slice", "unsqueeze", "squeeze", "chunk", "split", "expand",
    "select", "clone", "_to_copy", "unflatten", "flatten", "alias", "contiguous", "split_with_sizes", "unbind",
    "_unsafe_view", "t",
})  # fmt: skip
"""Operators that compute nothing, and so deserve no box."""

_HEAVY = ("scaled_dot_product", "linear", "addmm", "bmm", "mm", "matmul", "convolution", "conv", "einsum")
_NAME = re.compile(r"^(?:aten\.)?([^.]+)")


@dataclass(frozen=True)
class Box:
    """Operators that are drawn as one.

    Attributes:
        module: path within the block; empty for the block itself.
        what: what is computed, or what comes in.
        sites: numbers of the sites that it belongs to.
        kind: "input", "add" of a residual stream, or "work".
        nodes: names of the nodes.
    """

    module: str
    what: str
    sites: tuple[int, ...]
    kind: str
    nodes: tuple[str, ...]

    @property
    def label(self) -> str:
        """Two lines at most."""
        return "\n".join(filter(None, (self.module, self.what)))


def block_flow(capture: Capture, structure: ModelStructure, block: Block) -> nx.DiGraph:
    """Boxes of a block by number, attribute "box", and who reads whose result."""
    nodes = {node.name: node for node in capture.graph.nodes}
    inside = {name: nodes[name] for name in block.nodes}
    flow = nx.DiGraph()
    flow.add_nodes_from(inside)
    flow.add_edges_from((source.name, name) for name, node in inside.items() for source in node.all_input_nodes)
    sites = _sites_of(flow, structure, block)
    flow.remove_nodes_from(
        [name for name in list(flow) if name not in inside and not _is_value(nodes[name], structure)]
    )
    groups = _groups(flow, inside, {site.add for site in structure.sites_of(block)}, sites)
    condensed = nx.condensation(nx.quotient_graph(flow, groups, create_using=nx.DiGraph))
    result = nx.DiGraph()
    for number, parts in condensed.nodes(data="members"):
        members = tuple(name for part in parts for name in part)
        result.add_node(number, box=_box(members, nodes, inside, sites, structure, block))
    result.add_edges_from(condensed.edges)
    return _without_trivial(result)


def _is_value(node: fx.Node, structure: ModelStructure) -> bool:
    """True for what comes into the block and depends on an input, not for weights."""
    return bool(
        structure.dependence.get(node.name, frozenset()) & {i.role for i in structure.inputs if i.role.is_given}
    )


def _sites_of(flow: nx.DiGraph, structure: ModelStructure, block: Block) -> dict[str, tuple[int, ...]]:
    """Of every node, the sites between whose source and update it lies."""
    found: dict[str, tuple[int, ...]] = {}
    for site in structure.sites_of(block):
        after = nx.descendants(flow, site.source) if site.source in flow else set(flow)
        before = (nx.ancestors(flow, site.update) | {site.update}) & after
        for name in before:
            found[name] = (*found.get(name, ()), int(site.id))
    return found


def _groups(
    flow: nx.DiGraph, inside: Mapping[str, fx.Node], adds: set[str], sites: Mapping[str, tuple[int, ...]]
) -> list[set[str]]:
    """Nodes of one module and site that hang together; residual adds and values from outside stay alone."""

    def place(name: str) -> object:
        alone = name in adds or name not in inside
        return name if alone else (module_path(inside[name]), sites.get(name))

    alike = nx.Graph()
    alike.add_nodes_from(flow)
    alike.add_edges_from((a, b) for a, b in flow.edges if place(a) == place(b))
    return [set(part) for part in nx.connected_components(alike)]


def _box(
    members: Sequence[str],
    nodes: Mapping[str, fx.Node],
    inside: Mapping[str, fx.Node],
    sites: Mapping[str, tuple[int, ...]],
    structure: ModelStructure,
    block: Block,
) -> Box:
    added = [site for site in structure.sites_of(block) if site.add in members]
    if members[0] not in inside:
        return Box("", _outside(members[0], structure), (), "input", tuple(members))
    if added:
        return Box("", f"+ stream {added[0].stream}", tuple(int(site.id) for site in added), "add", tuple(members))
    names = [_operator(nodes[name]) for name in members]
    path = min((module_path(nodes[name]) for name in members), key=len)
    local = path.removeprefix(block.path).strip(".")
    number = tuple(sorted({i for name in members for i in sites.get(name, ())}))
    return Box(local, _what(names), number, "work", tuple(members))


def _outside(name: str, structure: ModelStructure) -> str:
    roles = structure.dependence.get(name, frozenset())
    stream = next((s for s in structure.sites if s.source == name), None)
    if stream is not None:
        return f"stream {stream.stream}"
    given = ", ".join(sorted(role.value for role in roles if role.is_given))
    return "from what came before" if Role.LATENT in roles else f"from {given}"


def _operator(node: fx.Node) -> str:
    match = _NAME.match(operator_text(node.target))
    return match[1] if match else node.name


def _what(names: Iterable[str]) -> str:
    """The heaviest operator of some, or the ones that compute anything."""
    counts = Counter(name for name in names if name not in _SHAPES_ONLY)
    heavy = [name for start in _HEAVY for name in counts if name.startswith(start)]
    shown = heavy[:1] or [name for name, _ in counts.most_common(3)]
    return ", ".join(shown)


def _without_trivial(flow: nx.DiGraph) -> nx.DiGraph:
    """Leave out boxes that compute nothing: who read them reads what they read."""
    for number in list(nx.topological_sort(flow)):
        box: Box = flow.nodes[number]["box"]
        if not box.what:
            flow.add_edges_from((a, b) for a in flow.predecessors(number) for b in flow.successors(number))
            flow.remove_node(number)
    return flow
