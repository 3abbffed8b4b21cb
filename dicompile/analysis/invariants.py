"""Loop invariants: which matrix products of a call do not depend on the latent.

What depends on the conditioning alone (projections of the text, its keys and values, tables of positions) is the same
for a whole generation; what depends on the timestep besides (the modulation of every block) is the same for every
latent at a step, so that the whole schedule can be computed at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx

from dicompile.analysis.dataflow import Dataflow, union
from dicompile.analysis.structure import Pace, Site
from dicompile.capture import Capture, Role
from dicompile.ops.kinds import SINUSOIDS, is_heavy
from dicompile.ops.registry import HeadsFirst, is_unknown
from dicompile.ops.wrapped import WRAPPED_LINEAR


def find_invariants(flow: Dataflow, capture: Capture, sites: Sequence[Site]) -> dict[str, Pace]:
    """Values that are worth computing outside of the steps, by name, in graph order.

    They are results of matrix products, and sines and cosines of positions. Casts, views and sums behind them cost
    nothing within a kernel, and stay where they are. Where tokens or frames have timesteps of their own, what depends
    on them is as large as the latent itself, and stays, too.

    Args:
        flow: of the captured graph.
        capture: the captured model.
        sites: its sites; what policies may remember is not touched, where its stream has no latent (refiners of text).
    """
    given = {role: flow.bits(_placeholders(flow, capture, role)) for role in Role}
    signals = flow.bits(
        node
        for node, item in zip(_all_placeholders(flow), capture.inputs, strict=True)
        if item.is_signal or not isinstance(node.meta["val"], Tensor)
    )
    latent = given[Role.LATENT] | signals
    if not given[Role.LATENT]:
        return {}
    batch = max(node.meta["val"].shape[:1].numel() for node in _placeholders(flow, capture, Role.LATENT))
    named = {node.name: node for node in flow.nodes}
    kept = [named[name] for site in sites for name in (site.core, site.update, site.add, *site.attention)]
    free = [site for site in sites if not flow.ancestors[named[site.add]] & latent]
    barred = flow.bits(kept) | union(flow.descendants[named[site.source]] for site in free)
    barred |= union(flow.descendants[node] for node in flow.nodes if _may_differ(node))
    found: dict[str, Pace] = {}
    for node in flow.nodes:
        before = flow.ancestors[node]
        if node.op != "call_function" or before & (latent | barred):
            continue
        pace = Pace.STEP if before & given[Role.TIMESTEP] else Pace.GENERATION
        depends = bool(before & (given[Role.TIMESTEP] | given[Role.CONDITIONING]))
        if is_heavy(node) and depends:
            if _is_worth(node, pace, batch):
                found[node.name] = pace
            else:
                barred |= flow.descendants[node]
        elif node.target in SINUSOIDS and pace is Pace.GENERATION:
            found[node.name] = pace
    return found


def _all_placeholders(flow: Dataflow) -> list[fx.Node]:
    return [node for node in flow.nodes if node.op == "placeholder"]


def _placeholders(flow: Dataflow, capture: Capture, role: Role) -> Iterator[fx.Node]:
    pairs = zip(_all_placeholders(flow), capture.inputs, strict=True)
    return (node for node, item in pairs if item.role is role)


def _may_differ(node: fx.Node) -> bool:
    """True for operators that may return something else when they are called again, or of which nobody knows."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return node.op == "call_function" and isinstance(node.target, HeadsFirst)
    is_random = torch.Tag.nondeterministic_seeded in node.target.tags
    is_known = node.target.namespace in ("aten", "prims") or node.target is WRAPPED_LINEAR
    return is_random or is_unknown(node) or not is_known


def _is_worth(node: fx.Node, pace: Pace, batch: int) -> bool:
    """True for a tensor; one for every step has to be a row for every sample, not for every token or frame."""
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        return False
    return pace is Pace.GENERATION or value.shape[:-1].numel() <= batch
