"""The plan: explicit, frozen, printable before anything is compiled."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from dicompile.analysis import BlockId, ModelStructure
from dicompile.plan.action import Action, Score, Slot, SlotKind
from dicompile.plan.schedule import TimestepSchedule

FLOPS_PER_BYTE = 165.0
"""Balance of an H200 in bfloat16: 790 TFLOP/s over 4.8 TB/s; used for the predicted speedup."""


@dataclass(frozen=True, slots=True)
class SiteStep:
    """What one site does at one step.

    Attributes:
        action: see `Action`.
        clock: reuse steps of this site since it was last computed whole; ages of tokens are counted by it.
        reads: slots it needs, written at earlier steps or by earlier sites of this step.
        writes: slots that a later step reads before they are written again.
        history: older values that must move up one age when this step stores a new one.
        score: base (and sharing) that the site's attention has to deliver into its score slot, or None.
        source: site whose score slot ranks the tokens of this one, or None.
    """

    action: Action
    clock: int = 0
    reads: tuple[Slot, ...] = ()
    writes: tuple[Slot, ...] = ()
    history: int = 0
    score: Score | None = None
    source: int | None = None


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What the whole model does at one step.

    Attributes:
        kind: "full", "partial", "mixed", "reuse" or "skip", for display.
        sites: one entry per site, in order, then one per span.
        live: slots that some later step reads; everything else is dropped after the step.
        flops: operations of the step.
        bytes: memory traffic of the step, nothing fused.
        time: roofline time of the step, in operations.
    """

    kind: str
    sites: tuple[SiteStep, ...] = field(repr=False)
    live: frozenset[Slot] = field(repr=False)
    flops: int = 0
    bytes: int = 0
    time: float = 0.0

    @property
    def signature(self) -> tuple[object, ...]:
        """Equal for steps that can run the same compiled program: everything but token counts and clocks."""
        return tuple(
            (
                site.action.weights,
                site.action.what,
                site.action.tokens and (site.action.tokens.score, site.action.tokens.context),
                site.reads,
                site.writes,
                site.score,
            )
            for site in self.sites
        )


@dataclass(frozen=True)
class Plan:
    """Actions, slots and cost of a whole sampling run.

    Attributes:
        policy: name of the policy.
        schedule: the timesteps.
        steps: one entry per evaluation of the model.
        baseline_flops: operations of the run without caching.
        baseline_time: its roofline time, in operations.
        slot_bytes: size of every slot.
        block_sites: numbers of the sites of every block.
        block_spans: numbers of the spans of a block, by its first site.
        stack: numbers of the spans of the stack.
    """

    policy: str
    schedule: TimestepSchedule
    steps: tuple[StepPlan, ...]
    baseline_flops: int
    baseline_time: float
    slot_bytes: dict[Slot, int] = field(repr=False)
    block_sites: tuple[tuple[int, ...], ...] = field(repr=False, default=())
    block_spans: dict[int, tuple[int, ...]] = field(repr=False, default_factory=dict)
    stack: tuple[int, ...] = field(repr=False, default=())

    @property
    def flops(self) -> int:
        """Operations of the run, matrix products only."""
        return sum(step.flops for step in self.steps)

    @property
    def flop_speedup(self) -> float:
        """Operations without caching over operations with it."""
        return self.baseline_flops / self.flops if self.flops else 1.0

    @property
    def predicted_speedup(self) -> float:
        """Roofline estimate at `FLOPS_PER_BYTE`, nothing fused."""
        time = sum(step.time for step in self.steps)
        return self.baseline_time / time if time else 1.0

    @property
    def cache_bytes(self) -> int:
        """Largest number of bytes held between two steps, for one guidance context."""
        return max((sum(self.slot_bytes[slot] for slot in step.live) for step in self.steps), default=0)

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Every slot that is ever held."""
        return tuple(sorted({slot for step in self.steps for slot in step.live}))

    def grid(self) -> str:
        """Step x block picture: one character per site, blocks separated by spaces."""
        lines = []
        for number, step in enumerate(self.steps):
            cells = " ".join(self._cell(step, block) for block in self.block_sites)
            stack = "".join(step.sites[i].action.symbol for i in self.stack)
            cells += f"  | {stack}" if stack.strip("F") else ""
            share = step.flops / (self.baseline_flops / len(self.steps)) if self.baseline_flops else 0.0
            timestep = f"{self.schedule.timesteps[number]:8.2f}" if self.schedule.timesteps else ""
            lines.append(f"{number:>4}{timestep} {step.kind:<8} {share:7.1%}  {cells}")
        return "\n".join(lines)

    def _cell(self, step: StepPlan, block: tuple[int, ...]) -> str:
        """Symbols of a block's sites, or of the span around them where that one is reused or refreshed."""
        symbols = "".join(step.sites[i].action.symbol for i in block)
        around = "".join(step.sites[i].action.symbol for i in self.block_spans.get(block[0], ()))
        return symbols if set(symbols) != {"-"} or not around.strip("F") else around.ljust(len(symbols), "-")

    def summary(self) -> str:
        """One line of figures."""
        kinds = Counter(step.kind for step in self.steps)
        return (
            f"{self.policy}: {len(self.steps)} steps ({', '.join(f'{n} {kind}' for kind, n in kinds.items())}), "
            f"{self.flops / 1e9:.3f} GFLOP ({self.flop_speedup:.2f}x fewer), predicted {self.predicted_speedup:.2f}x, "
            f"cache {self.cache_bytes / 2**20:.2f} MiB in {len(self.slots)} slots"
        )

    def __str__(self) -> str:
        legend = "F computed   t some tokens   . reused   f forecast   b blended   - skipped, a span is reused"
        return f"{self.summary()}\n{legend}\n{self.grid()}"


def slot_bytes(structure: ModelStructure, slot: Slot) -> int:
    """Bytes of a slot."""
    site = structure.everything[slot.site]
    if slot.kind is SlotKind.VALUE:
        return site.core_bytes
    if slot.kind is SlotKind.ATTENTION:
        return site.attention_bytes
    return site.shape[0] * site.tokens.count * 4


def sites_by_block(structure: ModelStructure) -> tuple[tuple[int, ...], ...]:
    """Numbers of the sites of every block."""
    return tuple(tuple(int(i) for i in structure.blocks[BlockId(b)].sites) for b in range(len(structure.blocks)))
