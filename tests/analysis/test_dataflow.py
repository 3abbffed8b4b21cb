from __future__ import annotations

import operator

import networkx as nx
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from dicompile.analysis import Dataflow


@st.composite
def graphs(draw: st.DrawFn) -> fx.Graph:
    graph = fx.Graph()
    nodes = [graph.placeholder(f"x{i}") for i in range(draw(st.integers(1, 3)))]
    for _ in range(draw(st.integers(0, 20))):
        left, right = draw(st.sampled_from(nodes)), draw(st.sampled_from(nodes))
        nodes.append(graph.call_function(operator.add, (left, right)))
    graph.output((draw(st.sampled_from(nodes)),))
    return graph


@settings(deadline=None)
@given(graphs())
def test_ancestors_descendants_and_paths_are_those_of_networkx(graph: fx.Graph) -> None:
    flow = Dataflow(graph)
    expected = nx.DiGraph()
    expected.add_nodes_from(graph.nodes)
    expected.add_edges_from((parent, node) for node in graph.nodes for parent in node.all_input_nodes)
    for node in graph.nodes:
        before, after = nx.ancestors(expected, node) | {node}, nx.descendants(expected, node) | {node}
        assert set(flow.members(flow.ancestors[node])) == before
        assert set(flow.members(flow.descendants[node])) == after
        for other in graph.nodes:
            assert flow.is_ancestor(other, node) == (other in before)
            between = set(flow.members(flow.between(other, node)))
            assert between == ((nx.descendants(expected, other) & before) if other in before else set())


@settings(deadline=None)
@given(graphs(), st.data())
def test_a_set_of_nodes_comes_back_in_graph_order(graph: fx.Graph, data: st.DataObject) -> None:
    flow = Dataflow(graph)
    chosen = data.draw(st.lists(st.sampled_from(list(graph.nodes))))
    assert list(flow.members(flow.bits(chosen))) == [node for node in graph.nodes if node in set(chosen)]
    assert flow.select(lambda node: node in chosen) == flow.bits(chosen)
