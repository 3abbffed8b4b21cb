"""What a run did, step by step, beside what was planned for it: for a terminal and for a notebook."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dicompile.html import fragment, table
from dicompile.plan import Plan, StepPlan
from dicompile.plan.html import plan_html
from dicompile.runtime import CallReport, RunReport
from dicompile.runtime.report import RECALLED, UNCACHED
from dicompile.text import plain_text, ranges_text, size_text

DONE = {
    "F": "computed",
    "t": "some\ntokens",
    "b": "blended",
    "f": "forecast",
    ".": "reused",
    "-": "in a\nspan",
}
"""Heading of the column that counts the sites which do this at a step; those in a span are done by it, as a whole."""

SLOWER = 1.5
"""How much longer than planned a cached step may take, against a full one, before that is said."""
FEW = 3
"""Calls of a kind from which on a median of their times says something."""


@dataclass(frozen=True, slots=True)
class StepSummary:
    """What happened at one step, over all guidance contexts.

    Attributes:
        step: of the schedule.
        calls: number of calls by kind.
        sites: how many sites of the model did what, by the symbol of their action, in one call as planned; in a call
            that found nothing stored all of them were computed.
        spans: what whole blocks or the whole stack did instead, the same.
        cache_bytes: bytes held after the last call of the step.
        seconds: that its calls took on the host, without what follows.
        compile_seconds: that they waited for code.
    """

    step: int
    calls: Counter[str]
    sites: Counter[str]
    spans: Counter[str]
    cache_bytes: int
    seconds: float
    compile_seconds: float

    @property
    def kinds(self) -> str:
        """Its calls in words: "full", "2 reuse"."""
        return ", ".join(f"{count} {kind}" if count > 1 else kind for kind, count in self.calls.items())


def _kind_of(planned: StepPlan) -> str:
    """Kind of a call that does what was planned; of a gated step, of one that recalls."""
    return planned.kind if planned.full is None else RECALLED


@dataclass(frozen=True)
class ModelSummary:
    """What one denoiser did in the last generation of this session.

    Attributes:
        name: class of the model.
        plan: for the schedule, from the step at which the generation began.
        report: what happened.
        weight_bytes: of its parameters.
        on_host: it runs on a CPU, so that the time of a call is that of its work.
        records: its steps are recorded as CUDA graphs.
        keeps: what is compiled is kept for the next process.
    """

    name: str
    plan: Plan
    report: RunReport
    weight_bytes: int
    on_host: bool = True
    records: bool = False
    keeps: bool = True

    @property
    def steps(self) -> tuple[StepSummary, ...]:
        """Every step that was run, in order."""
        by_step: dict[int, list[CallReport]] = {}
        for call in self.report.calls:
            by_step.setdefault(call.step or 0, []).append(call)
        return tuple(self._step(step, calls) for step, calls in sorted(by_step.items()))

    def _step(self, number: int, calls: Sequence[CallReport]) -> StepSummary:
        planned = self.plan.steps[number - self.plan.schedule.before]
        sites = {site for block in self.plan.block_sites for site in block}
        symbols = [site.action.symbol for site in planned.sites]
        is_planned = any(call.kind == _kind_of(planned) for call in calls)
        did = [symbols[i] if is_planned else "F" for i in sorted(sites)]
        spans = [s for i, s in enumerate(symbols) if i not in sites and s not in "F-"] if is_planned else []
        return StepSummary(
            step=number,
            calls=Counter(call.kind for call in calls),
            sites=Counter(did),
            spans=Counter(spans),
            cache_bytes=calls[-1].cache_bytes,
            seconds=sum(call.seconds for call in calls),
            compile_seconds=sum(call.compile_seconds for call in calls),
        )

    @property
    def seconds(self) -> float:
        """That all calls took, without compiling."""
        return sum(call.seconds for call in self.report.calls)

    @property
    def compile_seconds(self) -> float:
        """That calls of this generation waited for code."""
        return sum(call.compile_seconds for call in self.report.calls)

    def head(self) -> Iterator[str]:
        """The run in figures."""
        plan, report = self.plan, self.report
        kinds = ", ".join(f"{count} {kind}" for kind, count in report.kinds.items())
        yield f"{report.kinds.total()} calls: {kinds}"
        yield f"planned: {plan.flop_speedup:.2f}x fewer operations, predicted {plan.prediction(' faster')}"
        waited = f", and {self.compile_seconds:.2f} s of capturing and compiling" if self.compile_seconds else ""
        host = "" if self.on_host else " on the host (the device works on while it goes ahead)"
        yield f"{self.seconds:.2f} s in the model{host}{waited}"
        at_most = f"cache {size_text(report.peak_cache_bytes)} at most, {size_text(report.cache_bytes)} now"
        hoisted = f"; outside of the steps {size_text(report.hoisted_bytes)}" if report.hoisted_bytes else ""
        graphs = f"; CUDA graphs {size_text(report.graph_bytes)}" if report.graph_bytes else ""
        yield at_most + hoisted + graphs
        if report.fetched:
            yield report.fetched

    def events(self) -> Iterator[str]:
        """What a run without surprises has not: where it began, what was computed for want of stored values, notes."""
        report = self.report
        if report.began:
            yield f"began at step {report.began}"
        by_reason: dict[str, list[int]] = {}
        for step in report.cold_starts:
            by_reason.setdefault(report.cold_reasons.get(step, ""), []).append(step)
        for why, steps in by_reason.items():
            yield f"cold start at step{'s'[: len(set(steps)) - 1]} {ranges_text(steps)}: {why}"
        if report.outside:
            yield f"{report.outside} calls belonged to no step of the schedule and computed everything"
        if report.kinds[UNCACHED]:
            yield f"{report.kinds[UNCACHED]} calls came before their code was compiled and ran uncached"
        if report.gate:
            yield report.gate
        yield from self.plan.notes()

    def suggestions(self) -> Iterator[str]:
        """What could be done about it; nothing where nothing is wrong."""
        report, plan = self.report, self.plan
        caches = any(step.kind != "full" for step in plan.steps)
        if none := plan.no_gain() if caches else "":
            yield none
        if report.unapplied:
            yield f"policy {report.unapplied} was never applied: see why above, or ask dicompile.plan_of(model)"
        if any("cannot be told" in why for why in report.cold_reasons.values()):
            yield 'give every window or guidance half a name: with dicompile.cache_context("left"): model(...)'
        if report.outside:
            yield "samples of one batch at different timesteps cannot be cached: sample them one after the other"
        if self.compile_seconds > self.seconds:
            yield (
                "most of the time went into compiling: dicompile.prepare(model) does it ahead and with all cores, "
                'warmup="background" while sampling goes on uncached'
                + ("" if self.keeps else "; DICOMPILE_CACHE_DIR is off, so that the next process compiles anew")
            )
        if self.report.peak_cache_bytes > self.weight_bytes and plan.cache_bytes:
            yield (
                f'the cache is larger than the weights ({size_text(self.weight_bytes)}): cache_dtype="float8_e4m3fn" '
                'takes fewer bits, max_cache_bytes="2GiB" sets a limit, cache_device="cpu" uses host memory'
            )
        yield from self._slow()

    def _slow(self) -> Iterator[str]:
        """Kinds of step that take longer than their plan says, where times say so."""
        whole = self._median("full")
        kinds = [_kind_of(step) for step in self.plan.steps]
        for kind in dict.fromkeys(kind for kind in kinds if kind != "full"):
            found = self._median(kind)
            shares = [1 / self.plan.speedup_of(i) for i, each in enumerate(kinds) if each == kind]
            expected = statistics.mean(shares)
            if not (whole and found) or found < SLOWER * expected * whole:
                continue
            fix = (
                "times of other work on this machine count, too: dicompile compare measures in turns"
                if self.on_host or self.records
                else 'launching kernels may take longer than running them: compile_mode="reduce-overhead"'
            )
            yield f"a {kind} call takes {found / whole:.0%} of a full one, where {expected:.0%} is planned; {fix}"

    def _median(self, kind: str) -> float:
        """Seconds of a call of a kind that compiled nothing; 0 where too few are known."""
        found = [call.seconds for call in self.report.calls if call.kind == kind and not call.compile_seconds]
        return statistics.median(found) if len(found) >= FEW else 0.0

    def columns(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Headings and cells of the table of steps; what no step does has no column."""
        steps = self.steps
        used = [symbol for symbol in DONE if any(step.sites[symbol] for step in steps)]
        spans = [symbol for symbol in DONE if any(step.spans[symbol] for step in steps)]
        compiles = any(map(_seconds, (step.compile_seconds for step in steps)))
        head = (
            "step", "calls", *(DONE[symbol] for symbol in used), *(f"spans\n{DONE[symbol]}" for symbol in spans),
            "held", *(["compile\ns"] if compiles else []), "run\nms",
        )  # fmt: skip
        rows = [
            (
                f"{step.step}", step.kinds, *(_count(step.sites[symbol]) for symbol in used),
                *(_count(step.spans[symbol]) for symbol in spans),
                size_text(step.cache_bytes) if step.cache_bytes else "",
                *([_seconds(step.compile_seconds)] if compiles else []),
                f"{1000 * step.seconds:.1f}",
            )
            for step in steps
        ]  # fmt: skip
        return head, rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text.assemble((self.name, "bold"), ", policy ", (self.plan.policy, "bold"))
        for line in self.head():
            yield Padding(Text(line), (0, 0, 0, 2), expand=False)
        head, rows = self.columns()
        grid = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1, 0, 0))
        for name in head:
            is_words = name == "calls"
            grid.add_column(name, justify="left" if is_words else "right", overflow="fold", no_wrap=not is_words)
        for row in rows:
            grid.add_row(*map(Text, row))
        yield Text()
        yield grid
        for label, style, lines in (("note", "yellow", self.events()), ("suggestion", "green", self.suggestions())):
            for line in lines:
                yield Text.assemble((f"{label}: ", style), line)

    def html(self) -> str:
        """The same as HTML, with a drawing of the plan."""
        head, rows = self.columns()
        facts = "".join(f"<p>{escape(line)}</p>" for line in self.head())
        notes = "".join(f"<p>note: {escape(line)}</p>" for line in self.events())
        advice = "".join(f"<p>suggestion: {escape(line)}</p>" for line in self.suggestions())
        title = f"<h2>{escape(self.name)}, policy {escape(self.plan.policy)}</h2>"
        return f"{title}{facts}{table(head, rows, numbers=len(head) - 2)}{notes}{advice}{plan_html(self.plan)}"


@dataclass(frozen=True)
class Summary:
    """What the last generation of this session did; printed, or shown by a notebook.

    Attributes:
        models: one entry for every denoiser that ran.
    """

    models: tuple[ModelSummary, ...] = field(default=())

    def __rich__(self) -> Group:
        return Group(*self.models)

    def _repr_html_(self) -> str:
        """The summary in a notebook."""
        return fragment(*(model.html() for model in self.models))

    def __str__(self) -> str:
        """Plain text, as wide as the terminal."""
        return plain_text(self)


def _seconds(seconds: float) -> str:
    """Seconds to the hundredth; nothing where that rounds to none."""
    return f"{seconds:.2f}" if round(seconds, 2) else ""


def _count(number: int) -> str:
    return f"{number}" if number else ""
