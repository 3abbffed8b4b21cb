"""What happens to one site at one step: the algebra that all published policies are written in.

    value = weights[0] * fresh + weights[1] * h1 + weights[2] * h2 + ...

`h1` is the last stored value of the site, `h2` the one before. Computing is ``(1,)``, reusing is ``(0, 1)``, a forecast
is ``(0, w1, w2, ...)``, a learned blend is ``(b, 1 - b)``, and ``(0,)`` skips a site whose value nobody asks for. A
selection restricts `fresh` to chosen tokens; the others take the rest of the sum: a token refresh is ``(1, 1)``.

The same holds for spans, which are runs of sites on one stream: one block, or the whole stack.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

from dicompile.analysis import SiteId


class What(enum.Enum):
    """Which value of a site or span is stored and reused."""

    CORE = "core"
    """Branch output before the gate; the gate of the current step is applied to it."""

    UPDATE = "update"
    """Branch output after the gate; of a span: stream at its end minus stream at its start."""

    ATTENTION = "attention"
    """Output of the attention itself; projections and gates of the current step are applied to it."""

    STREAM = "stream"
    """Of a span: the stream at its end."""

    DIFFERENCE = "difference"
    """Of the whole model: its output minus that of a guidance partner at the same step, to which it is added again."""

    @property
    def is_added(self) -> bool:
        """True if the value is added to another one."""
        return self in (What.UPDATE, What.DIFFERENCE)


class ScoreBase(enum.Enum):
    """What makes a token worth refreshing (ToCa arXiv 2410.05317, section 3; DuCa arXiv 2412.18911)."""

    ATTENTION = "attention"
    """Attention that the token received in the block's attention, summed over queries; large first."""

    ENTROPY = "entropy"
    """Entropy of the token's row of the block's cross-attention map; large first."""

    VALUE_NORM = "value-norm"
    """Sum over heads of 1 - norm of the token's value in the block's attention: small norms first."""

    LARGE_VALUE_NORM = "large-value-norm"
    """Norm of the token's value, mean over heads: large norms first, as ToCa's FLUX code has it."""

    KEY_NORM = "key-norm"
    """Norm of the token's key before its normalisation and rotation, mean over heads; large first."""

    SIMILARITY = "similarity"
    """One minus the cosine between the stream before the site and the stored value; large first."""

    NORM = "norm"
    """Norm of the stream before the site; large first."""

    RANDOM = "random"
    """Uniform in [0, 1)."""

    PREDICTED = "predicted"
    """Importance in (0, 1) by a trained cache predictor (TokenCache, arXiv 2409.18523)."""

    CLUSTER = "cluster"
    """One token of every cluster of tokens that are alike, at random (ClusCa, arXiv 2509.10312); see `Clusters`."""

    @property
    def needs_attention(self) -> bool:
        """True if the block's attention delivers the score on steps that compute it."""
        return self in _FROM_ATTENTION

    @property
    def needs_logits(self) -> bool:
        """True if the score multiplies queries and keys once more."""
        return self in (ScoreBase.ATTENTION, ScoreBase.ENTROPY)


_FROM_ATTENTION = frozenset({
    ScoreBase.ATTENTION, ScoreBase.ENTROPY, ScoreBase.VALUE_NORM, ScoreBase.LARGE_VALUE_NORM, ScoreBase.KEY_NORM,
})  # fmt: skip


class Context(enum.Enum):
    """Which attention the refreshed tokens of a branch see."""

    STORED = "stored"
    """Rows of the stored attention output (FLUX single-stream blocks in ToCa)."""

    ALL = "all"
    """Keys and values of all tokens, computed anew; only queries are restricted."""

    KEPT = "kept"
    """Keys and values of the refreshed tokens only."""


@dataclass(frozen=True, slots=True)
class Clusters:
    """Which tokens are alike, and how far a computed one stands for the others of its cluster.

    Attributes:
        count: how many there are per sample.
        rounds: most rounds of k-means in which they are found.
        share: of the computed token in the zeroth order of the others', unitless.
    """

    count: int
    rounds: int
    share: float = 0.0


@dataclass(frozen=True, slots=True)
class Score:
    """How tokens are ranked; the ratio of highest scores is refreshed.

    Attributes:
        base: see `ScoreBase`; normalised to unit length over the tokens (random and predicted are not).
        age_weight: added per reuse step since the token was last refreshed.
        grid_cell: edge of the cells of the token grid; 0 switches the bonus off.
        grid_bonus: the best token of every cell gets this multiple of its score on top.
        share_guidance: average the base over the two guidance halves of the batch, so that both refresh the same
            tokens.
        clusters: for a base of `ScoreBase.CLUSTER`, or None.
    """

    base: ScoreBase
    age_weight: float = 0.0
    grid_cell: int = 0
    grid_bonus: float = 0.0
    share_guidance: bool = False
    clusters: Clusters | None = None

    def __post_init__(self) -> None:
        if (self.base is ScoreBase.CLUSTER) != (self.clusters is not None):
            raise ValueError("clusters belong to a score by cluster, and to no other")


@dataclass(frozen=True, slots=True)
class Selection:
    """Tokens that are computed fresh.

    Attributes:
        score: how they are chosen.
        count: how many per sample.
        context: which attention they see; of no matter for branches without attention over their own tokens.
    """

    score: Score
    count: int
    context: Context = Context.STORED


@dataclass(frozen=True, slots=True)
class LowBand:
    """The low frequencies of a value over its tokens, or over a picture.

    Attributes:
        basis: "dct": the cosine transform over rows and columns of the tokens. "fft": the Fourier transform over the
            tokens as they follow each other. "fft2": that over the last two axes, of frequencies in a circle.
        cutoff: highest of them, as a share of the highest that there is; of "fft2" the radius, as a share of the
            shorter axis, rounded down.
        grid: rows and columns of the tokens; None where the model's are known.
    """

    basis: str
    cutoff: float
    grid: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Action:
    """What happens to one site or span at one step.

    Attributes:
        weights: see the module docstring; the first belongs to the fresh value.
        what: which value is remembered.
        tokens: restricts the fresh value to some tokens; None means all.
        is_aligned: the weights are examples; the real ones follow, while sampling, from what a gate watches.
        low: what is taken of the newest stored value whatever the weights say; None for nothing.
        low_weight: weight of that; None takes it as it is.
    """

    weights: tuple[float, ...] = (1.0,)
    what: What = What.CORE
    tokens: Selection | None = None
    is_aligned: bool = False
    low: LowBand | None = None
    low_weight: float | None = None

    def __post_init__(self) -> None:
        if not self.weights:
            raise ValueError("an action needs at least the weight of the fresh value")
        if self.tokens is not None and (self.weights[0] != 1.0 or len(self.weights) < 2):
            raise ValueError("a token refresh takes fresh tokens as they are and others from the store: (1, w1, ...)")

    @classmethod
    def refresh(cls, tokens: Selection, what: What = What.CORE) -> Action:
        """Compute the chosen tokens, keep the stored value of the others."""
        return cls((1.0, 1.0), what, tokens)

    @property
    def uncounted(self) -> Action:
        """Equal for actions that differ in nothing but how many tokens they choose."""
        return self if self.tokens is None else replace(self, tokens=replace(self.tokens, count=0))

    @property
    def factors(self) -> tuple[float, ...]:
        """What code reads where the weights are not 0 and 1: they, then the weight of low frequencies that has one."""
        return self.weights if self.low_weight is None else (*self.weights, self.low_weight)

    @property
    def computes(self) -> bool:
        """True if the branch runs, at least for some tokens."""
        return self.weights[0] != 0.0

    @property
    def is_full(self) -> bool:
        """True if the fresh value is taken as it is, for all tokens."""
        return self.weights == (1.0,)

    @property
    def is_skip(self) -> bool:
        """True if the site has no value at all, because a span around it is reused."""
        return self.weights == (0.0,)

    @property
    def refreshes_store(self) -> bool:
        """True if chosen tokens replace theirs in the stored value; beside forecasts they serve their step only."""
        return self.tokens is not None and self.weights == (1.0, 1.0)

    @property
    def clusters(self) -> Clusters | None:
        """Of tokens that stand for others of their cluster, or None; then all stored values change with the newest."""
        return self.tokens.score.clusters if self.tokens is not None else None

    @property
    def symbol(self) -> str:
        """One character for the plan's grid."""
        if self.tokens is not None:
            return "t"
        if self.is_full:
            return "F"
        if self.is_skip:
            return "-"
        if self.weights == (0.0, 1.0):
            return "."
        return "b" if self.computes else "f"


COMPUTE = Action()
REUSE = Action(weights=(0.0, 1.0))
SKIP = Action(weights=(0.0,))


class SlotKind(enum.Enum):
    """What a slot remembers."""

    VALUE = "value"
    """Stored value of the site, as its action's `What` says."""

    ATTENTION = "attention"
    """Output of the site's attention, [b, h, n, d]."""

    STAMP = "stamp"
    """Per token: the reuse step after which it was last refreshed, counted from the last full step; [b, n] int32."""

    SCORE = "score"
    """Per token: raw score base of the block's attention; [b, n] float32."""

    VALUE_SCALE = "value-scale"
    """What the stored value is to be multiplied by, per row of its last axis, where its dtype has little range."""

    ATTENTION_SCALE = "attention-scale"
    """The same for the stored attention."""

    CLUSTER = "cluster"
    """Per token: number of its cluster; [b, n] int64. Of the last site of its kind on a stream, for all of them."""

    CENTROID = "centroid"
    """Mean of the tokens of every cluster, from which the next clustering starts; [b, k, d] float32."""

    ANCHOR = "anchor"
    """What a gate compares with: a probe, or the model's output, at the last full step."""

    @property
    def scale(self) -> SlotKind | None:
        """Kind of the slot that holds the scales of this one, or None."""
        return {SlotKind.VALUE: SlotKind.VALUE_SCALE, SlotKind.ATTENTION: SlotKind.ATTENTION_SCALE}.get(self)

    @property
    def is_scale(self) -> bool:
        """True for slots of scales."""
        return self in (SlotKind.VALUE_SCALE, SlotKind.ATTENTION_SCALE)

    @property
    def is_made_here(self) -> bool:
        """False for what comes with another slot, or leaves the model anyway: no action asks for it."""
        return not self.is_scale and self is not SlotKind.ANCHOR


HISTORIC = (SlotKind.VALUE, SlotKind.ATTENTION, SlotKind.VALUE_SCALE, SlotKind.ATTENTION_SCALE)
"""Kinds of slot that move up one age when a new value is stored."""

_KINDS = {kind.value: kind for kind in SlotKind}


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
        return _KINDS[self.kind_name]

    def __str__(self) -> str:
        return f"{self.kind_name}[{self.site}]" + (f"-{self.age}" if self.age else "")
