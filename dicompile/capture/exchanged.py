"""Context parallelism by Ulysses as one operator: the exchanges around an attention become a part of it.

Captured, queries, keys and values are sent to other ranks, head by head, and the output comes back; between them are
the tokens of all ranks, which the rest of the graph has nothing of. Folded, attention has the tokens of its rank, as it
would have all tokens on one, so everything that is known of attention holds for it.

Before::

    %3: f32[352] = aten.view(aten.clone(aten.permute(aten.view(%2, [1, 11, 2, 1, 16]), [2, 1, 0, 3, 4])), [352])
    %4: f32[352] = _c10d_functional.all_to_all_single(%3, [176, 176], [176, 176], '0')
    ... likewise keys and values
    %9: f32[1,1,22,16] = aten.scaled_dot_product_attention.default(%6, %7, %8)
    ... and the output, back to [1, 11, 2, 16]

After::

    %3: f32[1,2,11,16] = aten.transpose.int(%2, 1, 2)
    %6: f32[1,2,11,16] = dicompile.ulysses_attention.default(%3, %4, %5, ranks=2, group='0')
    %7: f32[1,11,2,16] = aten.transpose.int(%6, 1, 2)

What is folded is proved, factor by factor of every axis (`dicompile.ops.layout`); what is not stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import fx

from dicompile.capture.canonical import call_before
from dicompile.nodes import node_argument, tensor_of
from dicompile.ops.attention import has_dropout, is_causal, mask_of
from dicompile.ops.collectives import is_called
from dicompile.ops.kinds import ATTENTION, RESHAPES
from dicompile.ops.layout import Axis, Layout, Of, Part
from dicompile.ops.operators import carry
from dicompile.ops.tokens import MixesTokens
from dicompile.ops.ulysses import ULYSSES

aten = torch.ops.aten

EXCHANGE, WAIT = "all_to_all_single", "wait_tensor"
MOVES = (*RESHAPES, aten.permute.default, aten.transpose.int, aten.clone.default, aten.contiguous.default)
LABELS = ("bnN", "dhH")
"""What takes the place of samples and tokens in a `Layout`: of a factor that is neither it knows the size alone, so
samples and tokens are followed first, and then channels and heads."""

LOCAL, OF_ALL = ("b", "n", "Hh", "d"), ("b", "h", "Nn", "d")
"""Axes of a rank's own tokens with all heads, and of all tokens with some heads; see `_Factors`."""


def fold_exchanges(graph: fx.Graph) -> None:
    """Fold the exchanges around every attention of a canonical graph into it; its fake mode must be active."""
    for node in graph.find_nodes(op="call_function", target=ATTENTION):
        whole = _Whole.around(node)
        if whole is not None:
            whole.fold()


@dataclass(frozen=True)
class _Factors:
    """Factors of axes by their letters.

    They are samples b, channels d, heads h and tokens n of one rank, and the ranks by whose heads or tokens they are, H
    and N.
    """

    b: int
    h: int
    n: int
    d: int
    ranks: int

    def layout(self, label: str, axes: Sequence[str]) -> Layout:
        """Axes of these factors, the outermost first."""
        return Layout.of(self.axis(label, axis) for axis in axes)

    def axis(self, label: str, letters: str) -> Axis:
        """One of them."""
        sizes = {"b": (self.b, 1), "d": (self.d, 1), "n": (self.n, 1), "h": (self.h, 1)}
        sizes |= {"N": (self.ranks, self.n), "H": (self.ranks, self.h)}
        kinds = {label[0]: Of.SAMPLES, label[1]: Of.TOKENS, label[2]: Of.TOKENS}
        return tuple(
            Part(sizes[letter][0], kinds[letter], sizes[letter][1]) if letter in kinds else Part(sizes[letter][0])
            for letter in letters
        )


class _Exchange(NamedTuple):
    """An exchange, and the calls that only move values before and behind it."""

    before: Sequence[fx.Node]
    node: fx.Node
    behind: Sequence[fx.Node]

    @property
    def ranks(self) -> int:
        """How many exchange equal parts; 0 if parts are unequal."""
        sent, received = self.node.args[1:3]
        sizes = [*sent, *received]  # type: ignore[misc]
        return len(sent) if len({*map(str, sizes)}) == 1 else 0  # type: ignore[arg-type]

    def turns(self, start: Sequence[str], end: Sequence[str], sent: str, factors: _Factors) -> bool:
        """True if values of the axes `start` come out with the axes `end`, the factor `sent` replaced by its other."""
        return all(self._turns(label, start, end, sent, factors) for label in LABELS)

    def _turns(self, label: str, start: Sequence[str], end: Sequence[str], sent: str, factors: _Factors) -> bool:
        flat = _carried(self.before, factors.layout(label, start))
        parts = flat and flat.reshaped((factors.ranks, flat.size(0) // factors.ranks))
        if parts is None or parts.axes[0] != factors.axis(label, sent):
            return False
        other = factors.axis(label, "N" if sent == "H" else "H")
        return _carried(self.behind, Layout.of([(*other, *parts.axes[1])])) == factors.layout(label, end)


def _carried(calls: Sequence[fx.Node], layout: Layout) -> Layout | None:
    for call in calls:
        try:
            layout = carry(call, {node_argument(call, 0): layout}).layout
        except MixesTokens:
            return None
    return layout


@dataclass(frozen=True)
class _Whole:
    """An attention between exchanges.

    Attributes:
        attention: of some heads of all tokens.
        own: queries, keys and values before they are exchanged; [b, n, h, d].
        output: what has been exchanged; [b, n, h, d].
        ranks: how many exchange.
        group: name of their process group.
        between: all nodes that the folded attention takes the place of.
    """

    attention: fx.Node
    own: Sequence[fx.Node]
    output: fx.Node
    ranks: int
    group: object
    between: Set[fx.Node]

    @classmethod
    def around(cls, attention: fx.Node) -> _Whole | None:
        """What is around an attention, where that is proved to be Ulysses."""
        operands = [node_argument(attention, i) for i in range(3)]
        heads = {tensor_of(operand).shape[1] for operand in operands if tensor_of(operand).ndim == 4}
        if len(heads) != 1 or not _is_of_keys(mask_of(attention)) or is_causal(attention) or has_dropout(attention):
            return None
        found = [_left(attention), *map(_given, operands)]
        around = [each for each in found if each is not None]
        if len(around) != len(found) or len({(each.ranks, each.node.args[-1]) for _, each in around}) != 1:
            return None
        (output, exchange), *given = around
        between = {node for _, each in around for node in (*each.before, each.node, *each.behind)}
        own = [node for node, _ in given]
        return cls(attention, own, output, exchange.ranks, exchange.node.args[-1], {*between, attention})

    def fold(self) -> None:
        """Put the one operator in the place of all."""
        at = self.attention
        own = [call_before(at, aten.transpose.int, (node, 1, 2), {}) for node in self.own]
        scale = {"scale": at.kwargs["scale"]} if at.kwargs.get("scale") is not None else {}
        mask = mask_of(at)
        operands = own if mask is None else [*own, mask]
        folded = call_before(at, ULYSSES, operands, {"ranks": self.ranks, "group": self.group, **scale})
        self.output.replace_all_uses_with(call_before(at, aten.transpose.int, (folded, 1, 2), {}))
        for node in reversed(at.graph.nodes):
            if node in self.between and not node.users:
                at.graph.erase_node(node)


def _is_of_keys(mask: fx.Node | None) -> bool:
    """True for a mask that is the same for all heads and queries, and for none."""
    return mask is None or (tensor_of(mask).ndim == len(OF_ALL) and [*tensor_of(mask).shape[1:3]] == [1, 1])


def _factors(value: fx.Node, ranks: int) -> _Factors | None:
    """Of some heads of all tokens; [b, h, ranks * n, d]."""
    batch, heads, tokens, width = (int(size) for size in tensor_of(value).shape)
    return _Factors(batch, heads, tokens // ranks, width, ranks) if ranks > 1 and tokens % ranks == 0 else None


def _given(operand: fx.Node) -> tuple[fx.Node, _Exchange] | None:
    """What an operand of attention is before it is exchanged, and the exchange."""
    behind, sent = _moved(operand)
    if not is_called(sent, EXCHANGE):
        return None
    before: list[fx.Node] = []
    node = node_argument(sent, 0)
    while True:
        exchange = _Exchange(before[::-1], sent, behind[::-1])
        factors = _factors(operand, exchange.ranks)
        if factors is None:
            return None
        own = [factors.b, factors.n, factors.ranks * factors.h, factors.d]
        if [*tensor_of(node).shape] == own and exchange.turns(LOCAL, OF_ALL, "H", factors):
            return node, exchange
        if node.target not in MOVES:
            return None
        before.append(node)
        node = node_argument(node, 0)


def _moved(node: fx.Node) -> tuple[list[fx.Node], fx.Node]:
    """The calls that only move values, from the last to the first, and what they begin with."""
    moves = []
    while node.target in MOVES or is_called(node, WAIT):
        moves.append(node)
        node = node_argument(node, 0)
    return moves, node


def _left(attention: fx.Node) -> tuple[fx.Node, _Exchange] | None:
    """The output of attention when it has been exchanged, and the exchange."""
    before: list[fx.Node] = []
    node = attention
    while len(node.users) == 1:
        (node,) = node.users
        if is_called(node, EXCHANGE):
            return _arrived(attention, before, node)
        if node.target not in MOVES:
            return None
        before.append(node)
    return None


def _arrived(attention: fx.Node, before: Sequence[fx.Node], sent: fx.Node) -> tuple[fx.Node, _Exchange] | None:
    behind: list[fx.Node] = []
    node = sent
    while len(node.users) == 1:
        (node,) = node.users
        if node.target not in MOVES and not is_called(node, WAIT):
            return None
        behind.append(node)
        exchange = _Exchange(before, sent, tuple(behind))
        factors = _factors(attention, exchange.ranks)
        if factors is None:
            return None
        if tensor_of(node).ndim == len(LOCAL) and exchange.turns(OF_ALL, LOCAL, "N", factors):
            return node, exchange
    return None
