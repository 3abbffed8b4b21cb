"""The plan: explicit, frozen, printable before anything is compiled."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from dicompile.analysis import BlockId, ModelStructure
from dicompile.plan.action import Action, Score, Slot
from dicompile.plan.gate import Gate
from dicompile.plan.memory import UNLIMITED, CacheOptions
from dicompile.plan.recall import GatedRecall
from dicompile.plan.schedule import TimestepSchedule
from dicompile.text import ranges_text, size_text

FLOPS_PER_BYTE = 165.0
"""Balance of an H200 in bfloat16: 790 TFLOP/s over 4.8 TB/s; used for the predicted speedup."""
ROOFLINE = "FLOPs and bytes by roofline"
"""What times follow from where nothing was measured."""

WORTHWHILE = 1.05
"""Predicted speedup below which no gain is expected."""

_NUMBER = re.compile(r"\.\d+")  # of blocks and layers in a module path


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
        kind: "full", "partial", "mixed", "reuse", "skip", or "gated", for display.
        sites: one entry per site, in order, then one per span.
        live: slots that some later step reads; everything else is dropped after the step.
        flops: operations of the step.
        score_flops: the part of them that scores its tokens, which publications leave out.
        bytes: memory traffic of the step, nothing fused.
        time: roofline time of the step, in operations; in seconds where times were measured.
        full: of a gated step, what it does where the probe has drifted: everything. The rest is about recalling.
        verified: of a gated step, number of the span that may be computed beside what is recalled of it, to compare.
        check: operations of that, and their roofline time; not in `flops` and `time`.
        is_adapted: the LoRA weights that come with the policy's predictor are added.
    """

    kind: str
    sites: tuple[SiteStep, ...] = field(repr=False)
    live: frozenset[Slot] = field(repr=False)
    flops: int = 0
    score_flops: int = 0
    bytes: int = 0
    time: float = 0.0
    full: StepPlan | None = field(repr=False, default=None)
    verified: int | None = None
    check: tuple[int, float] = (0, 0.0)
    is_adapted: bool = False

    def writing(self, site: int, slots: tuple[Slot, ...]) -> StepPlan:
        """The step, of which one site writes other slots."""
        return replace(self, sites=replaced(self.sites, site, writes=slots))

    @property
    def signature(self) -> tuple[object, ...]:
        """Equal for steps that can run the same compiled program: everything but token counts and clocks."""
        of_sites = ((site.action.uncounted, site.reads, site.writes, site.score) for site in self.sites)
        return self.is_adapted, *of_sites


def replaced(sites: tuple[SiteStep, ...], number: int, writes: tuple[Slot, ...]) -> tuple[SiteStep, ...]:
    """Sites of a step, of which one writes other slots."""
    return (*sites[:number], replace(sites[number], writes=writes), *sites[number + 1 :])


@dataclass(frozen=True, slots=True)
class Dropped:
    """Sites that do what they do together, dropped from a plan that needed too much memory.

    Attributes:
        sites: their numbers; of spans, too.
        labels: what they are called, "3.mlp".
        bytes: what they held at most.
        flops: operations of the run that remembering them would save.
    """

    sites: tuple[int, ...]
    labels: tuple[str, ...]
    bytes: int
    flops: int


@dataclass(frozen=True)
class Plan:
    """Actions, slots and cost of a whole sampling run.

    Attributes:
        policy: name of the policy.
        schedule: the timesteps.
        steps: one entry per evaluation of the model.
        baseline_flops: operations of the run without caching.
        baseline_time: its time, as that of the steps.
        slot_bytes: size of every slot.
        block_sites: numbers of the sites of every block.
        block_spans: numbers of the spans of a block, by its first site.
        stack: numbers of the spans of the stack.
        model: number of the span of the whole model, where the policy asks for it.
        labels: of every site and span, by number: "3.mlp".
        cache: how much may be remembered, and in which numbers.
        dropped: what is computed at every step because there is no room to remember it.
        whole: labels of the sites that the policy would refresh token by token, but which mix tokens and are reused
            whole instead, with the operator that forbids more.
        unmatched: kinds of site for which the policy has a rule, and the model no site.
        meant_for: kind of model that the policy is the published setting for, where that was asked for by name.
        first_that_fits: of a published name: which settings come before the policy, and do not fit.
        wanted_bytes: where something was dropped, what the policy would have held at most without it.
        wanted_flops: and the operations it would have taken.
        gate: what decides at gated steps; None where there are none.
        probe: number of the span that it watches.
        trace: number of the span that is held against what it was, where values are recalled by that.
        recalls: of a gated policy, what stands in for a site or span.
        clock: what times follow from, in words.
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
    model: tuple[int, ...] = field(repr=False, default=())
    labels: tuple[str, ...] = field(repr=False, default=())
    cache: CacheOptions = UNLIMITED
    dropped: tuple[Dropped, ...] = ()
    whole: tuple[tuple[str, str], ...] = ()
    unmatched: tuple[str, ...] = ()
    meant_for: str = ""
    first_that_fits: str = ""
    wanted_bytes: int = 0
    wanted_flops: int = 0
    gate: Gate | None = None
    probe: int | None = None
    trace: int | None = None
    recalls: Mapping[int, GatedRecall] = field(repr=False, default_factory=dict)
    clock: str = ROOFLINE

    @property
    def flops(self) -> int:
        """Operations of the run, matrix products only; with a gate, the least that its limits allow.

        With one that waits for a partner, the mean of the half that leads and the one that recalls.
        """
        least = sum(step.flops for step in self.at_best)
        return (least + self.most_flops) // 2 if self.waits else least

    @property
    def most_flops(self) -> int:
        """Operations of a run in which no gate recalls."""
        return sum((step.full or step).flops for step in self.steps)

    @property
    def waits(self) -> bool:
        """True if a call recalls where a guidance partner, who computes everything, was there before."""
        return self.gate is not None and bool(self.gate.leads)

    @property
    def at_best(self) -> tuple[StepPlan, ...]:
        """The steps of a run in which the gate recalls as often as its limits allow."""
        if self.gate is None:
            return self.steps
        run, recalled, result = 0, 0, list[StepPlan]()
        recalls = self.gate.most_recalled([step.full is not None for step in self.steps])
        for step, is_recalled in zip(self.steps, recalls, strict=True):
            flops, time = step.check if self.gate.is_verified(run, recalled) else (0, 0.0)
            done = replace(step, flops=step.flops + flops, time=step.time + time)
            result.append(done if is_recalled else step.full or step)
            run, recalled = (run + 1, recalled + 1) if is_recalled else (0, recalled)
        return tuple(result)

    @property
    def score_flops(self) -> int:
        """The part of them that scores tokens, which publications leave out."""
        return sum(step.score_flops for step in self.steps)

    @property
    def flop_speedup(self) -> float:
        """Operations without caching over operations with it."""
        return self.baseline_flops / self.flops if self.flops else 1.0

    @property
    def predicted_speedup(self) -> float:
        """By measured times, or a roofline at `FLOPS_PER_BYTE`, nothing fused; with a gate, the most that it allows."""
        time = sum(step.time for step in self.at_best)
        if self.waits:
            time = (time + sum((step.full or step).time for step in self.steps)) / 2
        return self.baseline_time / time if time else 1.0

    @property
    def cache_bytes(self) -> int:
        """Largest number of bytes held between two steps, for one guidance context (see `dicompile.plan.memory`)."""
        return max(map(self.held, range(len(self.steps))), default=0)

    @property
    def fullest(self) -> int:
        """The first step after which most is held."""
        held = [self.held(step) for step in range(len(self.steps))]
        return held.index(max(held))

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Every slot that is ever held."""
        return tuple(sorted({slot for step in self.steps for slot in step.live}))

    def grid(self) -> str:
        """Step x block picture: one character per site, blocks separated by spaces."""
        lines = []
        for number, step in enumerate(self.steps):
            cells = " ".join(self._cell(step, block) for block in self.block_sites)
            stack = "".join(step.sites[i].action.symbol for i in (*self.stack, *self.model))
            cells += f"  | {stack}" if stack.strip("F") else ""
            share = step.flops / (self.baseline_flops / len(self.steps)) if self.baseline_flops else 0.0
            timestep = f"{self.schedule.timesteps[number]:8.2f}" if self.schedule.timesteps else ""
            lines.append(f"{self.schedule.before + number:>4}{timestep} {step.kind:<8} {share:7.1%}  {cells}")
        return "\n".join(lines)

    def _cell(self, step: StepPlan, block: tuple[int, ...]) -> str:
        """Symbols of a block's sites, or of the span around them where that one is reused or refreshed."""
        symbols = "".join(step.sites[i].action.symbol for i in block)
        around = "".join(step.sites[i].action.symbol for i in self.block_spans.get(block[0], ()))
        return symbols if set(symbols) != {"-"} or not around.strip("F") else around.ljust(len(symbols), "-")

    def summary(self) -> str:
        """One line of figures."""
        kinds = ", ".join(f"{n} {kind}" for kind, n in Counter(step.kind for step in self.steps).items())
        meant_for = f" (setting for {self.meant_for})" if self.meant_for else ""
        return (
            f"{self.policy}{meant_for}: {len(self.steps)} steps ({kinds}), {self._work()}, "
            f"cache {self.cache_bytes / 2**20:.2f} MiB in {len(self.slots)} slots"
            + (f" ({self.cache})" if str(self.cache) else "")
        )

    def _work(self) -> str:
        work = f"{self.flops / 1e9:.3f}"
        if self.gate is None:
            return f"{work} GFLOP ({self.flop_speedup:.2f}x fewer), predicted {self.prediction()}"
        return (
            f"{work} to {self.most_flops / 1e9:.3f} GFLOP (at most {self.flop_speedup:.2f}x fewer), "
            f"predicted {self.prediction(' at most')}"
        )

    def prediction(self, word: str = "") -> str:
        """The predicted speedup, a word for it, and what it follows from."""
        return f"{self.predicted_speedup:.2f}x{word} ({self.clock})"

    def drops(self) -> str:
        """One line about what was dropped to fit the budget; empty if nothing was."""
        if not self.dropped:
            return ""
        return (
            f"dropped, as {size_text(self.cache.max_bytes or 0)} do not hold {size_text(self.wanted_bytes)}: "
            f"{_by_kind([label for item in self.dropped for label in item.labels])}; "
            f"computing them at every step costs {(self.flops - self.wanted_flops) / 1e9:.3f} GFLOP more"
        )

    def notes(self) -> list[str]:
        """Where the plan is not what was asked for: the setting, what it dropped, reuses whole, and did not find."""
        by_reason: dict[str, list[str]] = {}
        for label, reason in self.whole:
            by_reason.setdefault(_NUMBER.sub(".*", reason), []).append(label)
        whole = [
            f"reused whole instead of refreshed: {_by_kind(labels)}: {reason}" for reason, labels in by_reason.items()
        ]
        unmatched = [f"a rule for {kinds} sites: the model has none" for kinds in self.unmatched]
        return [*filter(None, (self.first_that_fits, self.drops())), *whole, *unmatched]

    def held(self, step: int) -> int:
        """Bytes held between step number `step` of the run and the next one, for one guidance context."""
        return sum(self.slot_bytes[slot] for slot in self.steps[step].live)

    def speedup_of(self, step: int) -> float:
        """Predicted time of a step without caching over that of step number `step` of the run."""
        return self.baseline_time / len(self.steps) / self.steps[step].time if self.steps[step].time else 1.0

    def no_gain(self) -> str:
        """Why no gain worth the name is expected, in one line; empty if one is."""
        if self.predicted_speedup >= WORTHWHILE:
            return ""
        full = sum(step.kind == "full" for step in self.steps)
        if full == len(self.steps):
            why = "every step computes everything"
        elif full * 2 > len(self.steps):
            why = (
                f"{full} of {len(self.steps)} steps compute everything; more steps, or a longer interval, leave others"
            )
        elif self.flop_speedup >= WORTHWHILE:
            why = "what is saved is cheap: at these sizes memory traffic and launches decide, not operations"
        else:
            why = "the sites that are reused are a small part of the work"
        return f"no gain expected, {self.prediction()}: {why}"

    def _repr_html_(self) -> str:
        """The plan in a notebook."""
        from dicompile.plan.html import plan_html

        return plan_html(self)

    def __str__(self) -> str:
        legend = "F computed   t some tokens   . reused   f forecast   b blended   - skipped, a span is reused"
        if self.gate is not None:
            where = "the last forecast was near enough" if self.gate.verifies else "the probe has drifted little"
            if self.gate.leads:
                where = f"the context {self.gate.leads!r}, which computes every step, was called before"
            if self.gate.leads and self.gate.halves:
                where = f"a batch has the same latents in both halves ({self.gate.halves}), for the half that follows"
            each = ", for every sample by itself" if self.gate.decides == "sample" else ""
            legend += f"\ngated steps do this where {where}{each}, and else compute everything"
        return "\n".join((self.summary(), *self.notes(), legend, self.grid()))


def _by_kind(labels: Sequence[str]) -> str:
    """Labels of sites with those of one kind together: "mlp of blocks 0-3 7, the stack"."""
    blocks: dict[str, list[int]] = {}
    for label in labels:
        block, _, kind = label.partition(".")
        blocks.setdefault(kind, []).append(int(block))
    parts = [
        f"the {kind}"
        if kind in ("stack", "model")
        else f"{kind} of block{'s'[: len(set(numbers)) - 1]} {ranges_text(numbers)}"
        for kind, numbers in blocks.items()
    ]
    return ", ".join(parts)


def sites_by_block(structure: ModelStructure) -> tuple[tuple[int, ...], ...]:
    """Numbers of the sites of every block."""
    return tuple(tuple(int(i) for i in structure.blocks[BlockId(b)].sites) for b in range(len(structure.blocks)))
