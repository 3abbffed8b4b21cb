"""What happens to one site at one step: the algebra that all published policies are written in.

    value = weights[0] * fresh + weights[1] * h1 + weights[2] * h2 + ...

`h1` is the last stored value of the site, `h2` the one before. Computing is ``(1,)``, reusing is ``(0, 1)``, a forecast
is ``(0, w1, w2, ...)``, a learned blend is ``(b, 1 - b)``. A selection restricts `fresh` to chosen tokens; the others
keep h1.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from dicompile.analysis import SiteId


class What(enum.Enum):
    """Which value of a site is stored and reused."""

    CORE = "core"
    """Branch output before the gate; the gate of the current step is applied to it."""

    UPDATE = "update"
    """Branch output after the gate."""


class ScoreBase(enum.Enum):
    """What makes a token worth refreshing (ToCa arXiv 2410.05317, section 3; DuCa arXiv 2412.18911)."""

    ATTENTION = "attention"
    """Attention that the token received in the block's self-attention, summed over queries; large first."""

    ENTROPY = "entropy"
    """Entropy of the token's row of the block's cross-attention map; large first."""

    VALUE_NORM = "value-norm"
    """Sum over heads of 1 - norm of the token's value in the block's self-attention; large first."""

    RANDOM = "random"
    """Uniform in [0, 1)."""


@dataclass(frozen=True, slots=True)
class Score:
    """How tokens are ranked; the ratio of highest scores is refreshed.

    Attributes:
        base: see `ScoreBase`; normalised to unit length over the tokens (random is not).
        age_weight: added per reuse step since the token was last refreshed.
        grid_cell: edge of the square cells of the token grid; 0 switches the bonus off.
        grid_bonus: the best token of every cell gets this multiple of its score on top.
        share_guidance: average the base over the two guidance halves of the batch, so that both refresh the same
            tokens.
    """

    base: ScoreBase
    age_weight: float = 0.0
    grid_cell: int = 0
    grid_bonus: float = 0.0
    share_guidance: bool = False


@dataclass(frozen=True, slots=True)
class Selection:
    """Tokens that are computed fresh.

    Attributes:
        score: how they are chosen.
        count: how many per sample.
    """

    score: Score
    count: int


@dataclass(frozen=True, slots=True)
class Action:
    """What happens to one site at one step.

    Attributes:
        weights: see the module docstring; the first belongs to the fresh value.
        what: which value is remembered.
        tokens: restricts the fresh value to some tokens; None means all.
    """

    weights: tuple[float, ...] = (1.0,)
    what: What = What.CORE
    tokens: Selection | None = None

    def __post_init__(self) -> None:
        if not self.weights:
            raise ValueError("an action needs at least the weight of the fresh value")
        if self.tokens is not None and self.weights != (1.0,):
            raise ValueError("a token refresh takes fresh tokens as they are: weights must be (1.0,)")

    @property
    def computes(self) -> bool:
        """True if the branch runs, at least for some tokens."""
        return self.weights[0] != 0.0

    @property
    def history(self) -> int:
        """Number of stored values that it reads."""
        return 1 if self.tokens is not None else sum(1 for _ in self.weights[1:])

    @property
    def symbol(self) -> str:
        """One character for the plan's grid."""
        if self.tokens is not None:
            return "t"
        if self.weights == (1.0,):
            return "F"
        if self.weights == (0.0, 1.0):
            return "."
        return "f" if not self.computes else "b"


COMPUTE = Action()
REUSE = Action(weights=(0.0, 1.0))


class SlotKind(enum.Enum):
    """What a slot remembers."""

    VALUE = "value"
    """Stored value of the site, shape of its core."""

    STAMP = "stamp"
    """Per token: the reuse step after which it was last refreshed, counted from the last full step; [b, n] int32."""

    SCORE = "score"
    """Per token: raw score base of the block's attention; [b, n] float32."""


@dataclass(frozen=True, slots=True, order=True)
class Slot:
    """One remembered tensor.

    Attributes:
        site: whose.
        kind: see `SlotKind`.
        age: 0 for the newest value, 1 for the one stored before it, ...
    """

    site: SiteId
    kind_name: str
    age: int = 0

    @classmethod
    def of(cls, site: SiteId, kind: SlotKind, age: int = 0) -> Slot:
        """The slot of a kind."""
        return cls(site, kind.value, age)

    @property
    def kind(self) -> SlotKind:
        """See `SlotKind`."""
        return SlotKind(self.kind_name)

    def __str__(self) -> str:
        return f"{self.kind_name}[{self.site}]" + (f"-{self.age}" if self.age else "")
