from __future__ import annotations

from torch import fx

from dicompile.nodes import walk


def diamond() -> dict[str, fx.Node]:
    """``start`` feeds ``left`` and ``right``, both feed ``end``; ``far`` lies before ``left``."""
    graph = fx.Graph()
    far, start = graph.placeholder("far"), graph.placeholder("start")
    left = graph.call_function(max, (start, far))
    right = graph.call_function(min, (start,))
    return {"far": far, "start": start, "left": left, "right": right, "end": graph.call_function(max, (left, right))}


def test_a_walk_goes_over_every_node_once_the_nearest_first() -> None:
    nodes = diamond()
    assert list(walk([nodes["end"]])) == [nodes[name] for name in ("end", "left", "right", "start", "far")]
    assert list(walk([nodes["start"]], lambda node: node.users)) == [
        nodes[n] for n in ("start", "left", "right", "end")
    ]
    assert list(walk([nodes["left"], nodes["far"], nodes["left"]])) == [nodes[n] for n in ("left", "far", "start")]


def test_a_walk_ends_where_there_are_no_neighbours_and_asks_only_as_far_as_it_is_followed() -> None:
    nodes, asked = diamond(), []

    def neighbours(node: fx.Node) -> list[fx.Node]:
        asked.append(node)
        return [] if node is nodes["left"] else node.all_input_nodes

    assert nodes["far"] not in list(walk([nodes["end"]], neighbours))
    asked.clear()
    assert next(walk([nodes["end"]], neighbours)) is nodes["end"]
    assert not asked
