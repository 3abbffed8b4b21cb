"""Let attention deliver the raw score of its tokens on steps that compute it.

Later steps rank tokens by what this attention saw, so the score must leave the segment while queries, keys and values
are at hand. Only [b, n] numbers leave, never a map.

Before::

    %9: f32[2,4,64,8] = aten.scaled_dot_product_attention.default(%6, %7, %8)

After (value norm)::

    %9: f32[2,4,64,8] = aten.scaled_dot_product_attention.default(%6, %7, %8)
    %10: f32[2,4,64] = aten.linalg_vector_norm.default(%8, 2, [-1])
    %11: f32[2,4,64] = aten.rsub.Scalar(%10, 1)
    %12: f32[2,64] = aten.sum.dim_IntList(%11, [1])
    return score[0] = %12

A score by attention or entropy is one call as well (`dicompile.ops.attention_scores`), of queries and keys::

    %10: f32[2,64] = dicompile.attention_received.default(%6, %7, None, None, False)

Attention itself is not touched: it stays one fused call. Under tensor parallelism a rank has some heads of it, and a
score is the mean over ranks, which has the same bits on all of them::

    %11: f32[2,64] = _c10d_functional.all_reduce.default(%10, 'sum', '0')
    %12: f32[2,64] = _c10d_functional.wait_tensor.default(%11)
    %13: f32[2,64] = aten.div.Tensor(%12, 2)
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from dicompile.nodes import node_argument, tensor_of, walk
from dicompile.ops import scores
from dicompile.ops.attention import is_causal, mask_of
from dicompile.ops.attention_scores import operator_for
from dicompile.ops.collectives import find_sum, sum_over_ranks
from dicompile.ops.kinds import NORMS, RESHAPES, VIEWS, is_heavy
from dicompile.ops.ulysses import RECEIVED, ULYSSES
from dicompile.passes.base import PassReport, Segment, SiteNodes, SlotRef
from dicompile.passes.edit import Editor
from dicompile.plan import ScoreBase, SlotKind

aten = torch.ops.aten


@dataclass(frozen=True)
class ScoreTokens:
    """Add the raw token score as an output of computing attention sites."""

    name: ClassVar[str] = "score-tokens"
    exact: ClassVar[bool] = True

    def run(self, segment: Segment) -> PassReport:
        """Add the scores that the steps ask for."""
        editor, changed = Editor(segment), []
        received: dict[fx.Node, fx.Node] = {}
        for position, step in enumerate(segment.steps):
            if step.produces is None or step.produces.clusters is not None:
                continue
            site, base = segment.sites[position], step.produces.base
            attention = site.attention[0]
            with editor.before(attention.next):
                if base is ScoreBase.ENTROPY:
                    raw = raw_score(editor, attention, base, step.produces.share_guidance)
                else:
                    is_known = base is ScoreBase.ATTENTION and attention in received  # of another site of a joint one
                    raw = received[attention] if is_known else over_ranks(editor, _of_keys(editor, site, base))
                    received[attention] = raw
            if base is not ScoreBase.ENTROPY:
                raw = _of_own_tokens(editor, site, raw)
            segment.scores[position] = raw
            editor.output(SlotRef(position, SlotKind.SCORE), raw)
            changed.append(f"site {position}: {base.value}")
        return PassReport(tuple(changed))


def raw_score(editor: Editor, attention: fx.Node, base: ScoreBase, shared: bool = False) -> fx.Node:
    """Raw score of an attention node, in front of which the editor stands.

    Args:
        editor: where the new nodes go.
        attention: a scaled_dot_product_attention node.
        base: which score.
        shared: whether entropies are for a mixture of guidance halves.
    """
    query, key, value = (_with_heads(editor, node_argument(attention, i)) for i in range(3))
    if base is ScoreBase.VALUE_NORM:
        return editor.trace(scores.value_norm, value)
    if base is ScoreBase.LARGE_VALUE_NORM:
        return editor.trace(scores.mean_norm, value)
    if base is ScoreBase.KEY_NORM:
        return editor.trace(scores.mean_norm, key)
    mask = mask_of(attention)
    logits = query, key, mask and _with_heads(editor, mask), attention.kwargs.get("scale"), is_causal(attention)
    if base is ScoreBase.ENTROPY:
        return editor.call(operator_for(tensor_of(query), "attention_entropy"), *logits, shared=shared)
    if attention.target is ULYSSES:
        return editor.call(RECEIVED, query, key, mask, **attention.kwargs)
    return editor.call(operator_for(tensor_of(query), "attention_received"), *logits)


def over_ranks(editor: Editor, score: fx.Node) -> fx.Node:
    """The mean of a score over the ranks whose features are summed in a segment, in front of which the editor stands.

    All of them have to choose the same tokens, so where their features have other bits, this has not.
    """
    among = find_sum(editor.graph.nodes)
    if among is None:
        return score
    ranks, group = among
    return editor.trace(lambda own: sum_over_ranks(own, group) / ranks, score)


def _with_heads(editor: Editor, operand: fx.Node) -> fx.Node:
    """An operand of attention with an axis of heads, which one of a single head may lack."""
    return editor.call(aten.unsqueeze.default, operand, 1) if tensor_of(operand).ndim == 3 else operand


def _of_keys(editor: Editor, site: SiteNodes, base: ScoreBase) -> fx.Node:
    """Raw score of all keys of the site's attention; [b', m]."""
    parts = _before_norms(site) if base is ScoreBase.KEY_NORM else []
    if not parts:
        return raw_score(editor, site.attention[0], base)
    axes = [2 if part.target in RESHAPES else 1 for part in parts]  # a reshape splits heads off behind the tokens

    def norms(*keys: Tensor) -> Tensor:
        return torch.cat([key.float().norm(dim=-1).mean(axis) for key, axis in zip(keys, axes, strict=True)], dim=-1)

    return editor.trace(norms, *parts)


def _before_norms(site: SiteNodes) -> list[fx.Node]:
    """Keys before they are normalised, in parts along the tokens; empty if they are not. Rotations keep norms."""
    key = node_argument(site.attention[0], 1)
    width = tensor_of(key).shape[-1]

    def is_norm(node: fx.Node) -> bool:
        return node.target in NORMS and tensor_of(node).shape[-1] == width

    behind = walk([key], lambda node: () if is_norm(node) or is_heavy(node) else node.all_input_nodes)
    return [node_argument(node, 0) for node in behind if is_norm(node)]


def _of_own_tokens(editor: Editor, site: SiteNodes, raw: fx.Node) -> fx.Node:
    """The part of a score that belongs to the site's own tokens, in the order of its stream; [b, n]."""
    first, size = site.keys
    with editor.before(raw.next):
        if tensor_of(raw).shape[-1] != size:
            raw = editor.call(aten.slice.Tensor, raw, 1, first, first + size)
        if tensor_of(raw).shape == tensor_of(site.stream).shape[:2]:
            return raw
        return _unfold(editor, site, raw)


def _unfold(editor: Editor, site: SiteNodes, raw: fx.Node) -> fx.Node:
    """Undo the folding of tokens into the batch that attention along one axis needs: move scores as its output moves.

    Spatial attention of a film sees [b * frames, rows * columns] tokens, temporal attention the opposite.
    """
    attention = site.attention[0]
    carried: dict[fx.Node, fx.Node] = {}
    view = editor.call(aten.view.default, raw, [tensor_of(raw).shape[0], 1, tensor_of(raw).shape[1], 1])
    carried[attention] = editor.call(aten.expand.default, view, list(tensor_of(attention).shape))
    nodes = list(editor.graph.nodes)
    for node in nodes[nodes.index(attention) + 1 : nodes.index(site.core) + 1]:
        source = next((parent for parent in node.all_input_nodes if parent in carried), None)
        if source is None:
            continue
        with editor.before(node.next):
            if node.target in VIEWS or node.target in RESHAPES or node.target is operator.getitem:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda item: carried.get(item, item))
                target = aten.reshape.default if node.target in RESHAPES else node.target
                carried[node] = editor.call(target, *args, **kwargs)
            else:
                narrow = editor.call(aten.slice.Tensor, carried[source], -1, 0, 1)
                carried[node] = editor.call(aten.expand.default, narrow, list(tensor_of(node).shape))
    with editor.before(carried[site.core].next):
        return editor.call(aten.select.int, carried[site.core], -1, 0)
