"""What happened since the last generation began."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from html import escape

from dicompile.html import fragment, table
from dicompile.runtime.gate import Decision
from dicompile.runtime.graphs import RECORDED, REPLAYED
from dicompile.text import size_text

UNCACHED = "uncached"
"""Kind of a call that came before its code was compiled."""

RECALLED = "recalled"
"""Kind of a call at which a gate has decided to recall."""

MIXED = "mixed"
"""Kind of a call at which a gate has decided to recall for some samples, and to compute others."""

MOST_CALLS = 4096
"""Calls of one generation whose times are kept."""


@dataclass(frozen=True, slots=True)
class CallReport:
    """One call of the model.

    Attributes:
        step: of the schedule; None where the model has none.
        kind: of the step that it was; "uncached" if it came before its code was compiled.
        seconds: that the call took on the host, without `compile_seconds`. A GPU may still be at work then.
        compile_seconds: of these the part in which something was captured, rewritten, compiled, or waited for.
        cache_bytes: bytes of the slots held after it, over all contexts.
    """

    step: int | None
    kind: str
    seconds: float
    compile_seconds: float
    cache_bytes: int


@dataclass
class RunReport:
    """Counts of one generation, over all guidance contexts.

    Attributes:
        kinds: calls by kind of step; "uncached" are those of a generation that began before its code was compiled.
        began: step of the schedule at which the generation began; above 0 where a pipeline leaves the first ones out.
        cold_starts: calls that computed everything because nothing was remembered, with the step.
        cold_reasons: why, by step.
        outside: calls that belong to no step, and computed everything.
        unapplied: name of the policy, where the generation reached its last step and every call computed everything.
        cache_bytes: bytes of the slots held now.
        peak_cache_bytes: the most that was held between two calls.
        hoisted_bytes: the most that was held of what is computed outside of the steps.
        recorded: calls for which a CUDA graph was recorded.
        replayed: calls that ran as one that was there.
        graph_bytes: what CUDA graphs held at the last call, and hold after the generation: all slots, wherever
            something lies in them, copies of the inputs, and a pool for the rest. Kernels and their arguments, which
            the driver keeps, are not in it.
        fetched_bytes: of weights that were brought for calls, by their kind, where weights are offloaded part by part.
        decisions: of gates, one for every call at which one decided, or for every sample of it.
        calls: every call in order, with its time; the latest `MOST_CALLS` of a model that is called on and on without a
            schedule.
        latest: kind of the latest call.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    began: int = 0
    cold_starts: list[int] = field(default_factory=list)
    cold_reasons: dict[int, str] = field(default_factory=dict)
    outside: int = 0
    unapplied: str = ""
    cache_bytes: int = 0
    peak_cache_bytes: int = 0
    hoisted_bytes: int = 0
    recorded: int = 0
    replayed: int = 0
    graph_bytes: int = 0
    fetched_bytes: Counter[str] = field(default_factory=Counter)
    decisions: list[Decision] = field(default_factory=list)
    calls: list[CallReport] = field(default_factory=list, repr=False, compare=False)
    latest: str = field(default="", repr=False, compare=False)

    def decide(self, decision: Decision) -> None:
        """Note what a gate said."""
        self.decisions.append(decision)

    def count(self, kind: str, cache_bytes: int, fetched_bytes: int = 0) -> None:
        """Note a call, how many bytes are held after it, and how many of weights were brought for it."""
        self.kinds[kind] += 1
        if fetched_bytes:
            self.fetched_bytes[kind] += fetched_bytes
        self.latest = kind
        self.hold(cache_bytes)

    def start_cold(self, step: int, why: str) -> None:
        """Note that a call computes everything for want of stored values."""
        self.cold_starts.append(step)
        self.cold_reasons[step] = why

    def time(self, step: int | None, seconds: float, compile_seconds: float) -> None:
        """Note how long the latest call took; see `CallReport`."""
        self.calls.append(CallReport(step, self.latest, seconds, compile_seconds, self.cache_bytes))
        del self.calls[:-MOST_CALLS]

    def end(self, policy: str) -> None:
        """Note a call of the last step, and whether the policy did anything until then."""
        self.unapplied = policy if set(self.kinds) <= {"full"} else ""

    def hold(self, cache_bytes: int) -> None:
        """Note how many bytes are held after a call."""
        self.cache_bytes = cache_bytes
        self.peak_cache_bytes = max(self.peak_cache_bytes, cache_bytes)

    def hoist(self, held: int) -> None:
        """Note how many bytes are held of what is computed outside of the steps."""
        self.hoisted_bytes = max(self.hoisted_bytes, held)

    def record(self, how: str, held: int) -> None:
        """Note how a call ran where steps are recorded, and how many bytes that takes."""
        self.recorded += how == RECORDED
        self.replayed += how == REPLAYED
        self.graph_bytes = held

    def add(self, other: RunReport) -> None:
        """Add what another model, or the same one with other shapes, did in the same generation.

        Peaks are added as if they had come together.
        """
        self.kinds += other.kinds
        self.began = min(self.began, other.began)
        self.cold_starts = sorted(self.cold_starts + other.cold_starts)
        self.cold_reasons = {**other.cold_reasons, **self.cold_reasons}
        self.calls = sorted(self.calls + other.calls, key=lambda call: -1 if call.step is None else call.step)
        self.outside += other.outside
        self.unapplied = (self.unapplied or other.unapplied) if set(self.kinds) <= {"full"} else ""
        self.cache_bytes += other.cache_bytes
        self.peak_cache_bytes += other.peak_cache_bytes
        self.hoisted_bytes += other.hoisted_bytes
        self.recorded += other.recorded
        self.replayed += other.replayed
        self.graph_bytes += other.graph_bytes
        self.fetched_bytes += other.fetched_bytes
        self.decisions = [*self.decisions, *other.decisions]

    @property
    def fetched(self) -> str:
        """How much of the weights was brought for one call of each kind, in one line; nothing where they stay."""
        kinds = ", ".join(f"{size_text(n // self.kinds[kind])} a {kind} call" for kind, n in self.fetched_bytes.items())
        return f"weights brought part by part: {size_text(self.fetched_bytes.total())} in all, {kinds}" if kinds else ""

    @property
    def gate(self) -> str:
        """What gates did, in one line: quartiles of the drift, and a threshold that would have decided otherwise."""
        recalled = sum(decision.recalls for decision in self.decisions)
        drifts = sorted(decision.drift for decision in self.decisions if decision.drift is not None)
        if not drifts:
            return f"the gate recalled at {recalled} of {len(self.decisions)} steps" if recalled else ""
        quartiles = " ".join(f"{drifts[round(share * (len(drifts) - 1))]:.3g}" for share in (0.25, 0.5, 0.75))
        told = f"the gate recalled at {recalled} of {len(self.decisions)} steps, drift {quartiles} (quartiles)"
        if not recalled:
            told += f": never, a threshold above {drifts[0]:.3g} would have"
        elif recalled == len(self.decisions):
            told += f": always, one of {drifts[-1]:.3g} would not have"
        return told

    def _repr_html_(self) -> str:
        """The report in a notebook: one row per kind of call."""
        rows = []
        for kind, count in self.kinds.items():
            seconds = [call.seconds for call in self.calls if call.kind == kind]
            mean = f"{1000 * sum(seconds) / len(seconds):.1f} ms" if seconds else ""
            rows.append((kind, f"{count}", mean))
        return fragment(f"<p>{escape(str(self))}</p>", table(("calls", "number", "mean time"), rows, numbers=2))

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.items())
        began = f"; began at step {self.began}" if self.began else ""
        cold = f"; computed for want of stored values at steps {self.cold_starts}" if self.cold_starts else ""
        cold += "; its code was still being compiled" if self.kinds[UNCACHED] else ""
        cold += f"; {self.outside} calls outside of the schedule computed whole" if self.outside else ""
        cold += f"; {self.gate}" if self.gate else ""
        cold += f"; policy {self.unapplied} was never applied" if self.unapplied else ""
        peak, now = size_text(self.peak_cache_bytes), size_text(self.cache_bytes)
        cache = f"; cache {peak} at most, {now} now" if self.peak_cache_bytes else ""
        hoisted = f"; hoisted {size_text(self.hoisted_bytes)}" if self.hoisted_bytes else ""
        graphs = f"; CUDA graphs {self.recorded} recorded, {self.replayed} replayed, {size_text(self.graph_bytes)}"
        more = f"{graphs if self.graph_bytes else ''}{f'; {self.fetched}' if self.fetched else ''}"
        return f"{self.kinds.total()} calls: {kinds}{began}{cold}{cache}{hoisted}{more}"
