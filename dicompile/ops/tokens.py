"""What is known of an operator: where tokens are behind it, or why it mixes them, and how it runs on some of them.

Rules get the node, since where tokens go depends on its arguments and on the shapes of its operands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

from torch import fx

from dicompile.ops.layout import Layout
from dicompile.text import module_path, operator_text


class MixesTokens(Exception):
    """An operator of the branch combines values of different tokens; the text names it and its module."""

    def __init__(self, node: fx.Node, why: str) -> None:
        path = module_path(node)
        super().__init__(f"{operator_text(node.target)}{f' in {path}' if path else ''} {why}")


@dataclass(frozen=True, slots=True)
class Carried:
    """What an operator does to tokens.

    Attributes:
        layout: where they are in its result; of several results, in each of them but for sizes of other axes.
        operands: operands that do not come from the stream but have a value per token, laid out as the result is:
            with as many axes as needed for samples and tokens, though their own may be of one row or missing.
    """

    layout: Layout
    operands: Mapping[fx.Node, Layout] = field(default_factory=dict)


Layouts = Mapping[fx.Node, Layout]


class ChosenTokens(Protocol):
    """Chosen tokens in the place of all: makes calls, and sizes that their arguments need.

    Attributes:
        tokens: number of all tokens.
        alone: True if rows that were joined with the tokens are left out: on the axis of tokens nothing else lies then.
    """

    tokens: int
    alone: bool

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Call an operator on nodes and constants."""

    def size(self, times: int = 1, plus: int = 0) -> fx.Node:
        """``times * (k + plus)`` for `k` chosen tokens."""

    def shape(self, layout: Layout) -> list[Any]:
        """Sizes of a value for chosen tokens."""


CarryRule = Callable[[fx.Node, Layouts], Layout | Carried]
NarrowRule = Callable[[fx.Node, Sequence[Any], Layout, ChosenTokens], fx.Node]
"""Of a node, its arguments for chosen tokens and the layout of its result for all: its result for chosen tokens."""


@dataclass(frozen=True, slots=True)
class Operator:
    """What is known of an operator.

    Attributes:
        carry: what it does to tokens; raises `MixesTokens`.
        narrow: how it runs on chosen tokens; None means by the same call.
    """

    carry: CarryRule
    narrow: NarrowRule | None = None


def mixes(why: str) -> Operator:
    """An operator that mixes tokens whatever its arguments are."""

    def rule(node: fx.Node, _: Layouts) -> NoReturn:
        raise MixesTokens(node, why)

    return Operator(rule)
