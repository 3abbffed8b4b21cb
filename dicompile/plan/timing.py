"""Times that a machine took for steps: what plans are timed by in the place of a roofline.

Of the kinds of step that `auto` chooses from the median is known. The time of any other step follows from a line
through those, ``seconds + operations * a + bytes * b``, of which nothing is negative and relative errors are least.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dicompile import outside
from dicompile.errors import DicompileError, InvalidTiming
from dicompile.html import fragment
from dicompile.html import table as html_table
from dicompile.plan.action import Action, What
from dicompile.plan.frozen import Frozen
from dicompile.plan.plan import Plan, StepPlan
from dicompile.plan.yaml_json import YamlJson
from dicompile.store import written_whole
from dicompile.text import operations_text, plain_text, size_text

Level = Literal["site", "stack"]
"""What is recalled: single branches, which are gated anew, or what the whole stack adds."""

Count = Annotated[int, Field(ge=0, lt=2**63)]

VERSION = 2
READABLE = (1, VERSION)
"""Formats that can be read; in the first one times were of one denoiser."""
MOST_STORED = 3
"""Values of one branch that a forecast takes: what the best published ones take, too."""
FULL = "full"
"""Kind of a step that computes everything, whether it stores anything or not."""
HEADINGS = ("kind of step", "operations", "read and written", "calls", "median", "middle half", "of a full step")


def kind_name(level: Level, stored: int) -> str:
    """Kind of a step that recalls every branch, or the stack, from so many stored values."""
    return f"{level}-{stored}"


def kind_of(plan: Plan, step: StepPlan) -> str:
    """Kind of a step of a plan, as it is measured; empty for all others."""
    leaves = {i for block in plan.block_sites for i in block}
    sites = [step.sites[i].action for i in sorted(leaves)]
    stack = [step.sites[i].action for i in plan.stack]
    around = [site.action for i, site in enumerate(step.sites) if i not in leaves]
    if all(action.is_full for action in (*sites, *around)):
        return FULL
    if all(action.is_full for action in around) and (stored := _recalled(sites, What.CORE)):
        return kind_name("site", stored)
    if all(action.is_skip for action in sites) and (stored := _recalled(stack, What.UPDATE)):
        return kind_name("stack", stored)
    return ""


def _recalled(actions: Iterable[Action], what: What) -> int:
    """How many stored values each takes in the place of a fresh one; 0 where they do not all do the same."""
    counts = {
        len(action.weights) - 1 if not action.computes and action.what is what and action.low is None else 0
        for action in actions
    }
    return counts.pop() if len(counts) == 1 else 0


class Conditions(NamedTuple):
    """What times depend on, beside the model.

    Attributes:
        latent: shape of what is denoised; of a model of which that is not known, of its first input.
        dtype: of the same.
        device: what runs the model.
        code: what made the code, and how it stores.
    """

    latent: tuple[int, ...]
    dtype: str
    device: str
    code: str


class TimingFacts(Frozen):
    """What was timed; see `Conditions` for the rest.

    Attributes:
        model: class of the denoiser.
        sites: labels of its sites, "3.mlp", in order.
        spans: labels of the spans of the stack; may be none.
    """

    model: str
    sites: tuple[str, ...]
    spans: tuple[str, ...]
    latent: tuple[int, ...]
    dtype: str
    device: str
    code: str


class TimedKind(Frozen):
    """Calls of one kind of step.

    Attributes:
        name: "full", or "site-2", "stack-3": what is recalled, from how many stored values.
        flops: operations of a step.
        bytes: its memory traffic, nothing fused.
        seconds: of every call.
    """

    name: str
    flops: Count
    bytes: Count
    seconds: Annotated[tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...], Field(min_length=1)]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def middle(self) -> tuple[float, float]:
        """Seconds between which the middle half of the calls lies."""
        low, high = np.quantile(self.seconds, (0.25, 0.75))
        return float(low), float(high)

    @property
    def label(self) -> str:
        """The kind in words."""
        if self.name == FULL:
            return "everything computed"
        level, _, stored = self.name.partition("-")
        what = "branches" if level == "site" else "stack"
        return f"{what} reused" if stored == "1" else f"{what} forecast from {stored}"


class _Timed(Frozen):
    """What is known of one denoiser."""

    facts: TimingFacts
    kinds: tuple[TimedKind, ...]

    def timing(self) -> Timing:
        """The times, if those of full steps are among them."""
        names = [kind.name for kind in self.kinds]
        if FULL not in names or len(set(names)) < len(names):
            raise ValueError(f"kinds of step {', '.join(names)}")
        return Timing(self.facts, self.kinds)


class _File(YamlJson):
    """What a file holds: the times of one denoiser, or of several by component."""

    facts: TimingFacts | None = None
    kinds: tuple[TimedKind, ...] = ()
    denoisers: dict[str, _Timed] = Field(default_factory=dict)
    version: int = VERSION


@dataclass(frozen=True, slots=True)
class Line:
    """Time of steps that were not measured.

    Attributes:
        seconds: of a step that does nothing.
        per_flop: seconds of an operation.
        per_byte: seconds of a byte that is read or written.
        deviation: by how much it is wrong at most about the kinds that were measured, relative to them.
    """

    seconds: float
    per_flop: float
    per_byte: float
    deviation: float

    @classmethod
    def through(cls, kinds: Sequence[TimedKind]) -> Line:
        """The line with the least squares of relative errors, without negative terms."""
        measured = np.array([kind.median for kind in kinds])
        terms = np.array([[1.0, kind.flops, kind.bytes] for kind in kinds]) / measured[:, None]
        scale = np.maximum(np.abs(terms).max(axis=0), np.finfo(np.float64).tiny)
        found: list[tuple[float, list[float]]] = []
        for used in itertools.chain.from_iterable(itertools.combinations(range(3), n) for n in (1, 2, 3)):
            chosen = list(used)
            values = np.zeros(3)
            values[chosen] = np.linalg.lstsq(terms[:, chosen] / scale[chosen], np.ones(len(kinds)), rcond=None)[0]
            if (values >= 0).all():
                wrong = terms @ (values / scale) - 1
                found.append((float(wrong @ wrong), [*(values / scale).tolist(), float(np.abs(wrong).max())]))
        return cls(*min(found)[1])

    def at(self, flops: float, size: float) -> float:
        """Seconds of a step."""
        return self.seconds + self.per_flop * flops + self.per_byte * size

    def __str__(self) -> str:
        return (
            f"{1000 * self.seconds:.3g} ms + {1e12 * self.per_flop:.3g} ms per GFLOP "
            f"+ {1e3 * 2**30 * self.per_byte:.3g} ms per GiB"
        )


class Timing:
    """Times of steps of one model, for one size, on one machine.

    Args:
        facts: what was timed; None before anything was.
        kinds: of step, "full" among them.
        denoisers: of a pipeline with several, in the place of both: the times of each, by component.

    Example:
        >>> with dicompile.measure(pipe) as timing:
        ...     pipe(prompt, num_inference_steps=50)
        >>> print(timing)
        >>> pipe = dicompile.optimize(pipe, "auto", recording=recording, timing=timing, speedup=3)
    """

    def __init__(
        self,
        facts: TimingFacts | None = None,
        kinds: Sequence[TimedKind] = (),
        denoisers: Mapping[str, Timing] = MappingProxyType({}),
    ) -> None:
        self._facts, self.kinds, self.denoisers = facts, tuple(kinds), dict(denoisers)

    def of(self, component: str) -> Timing:
        """The times of one denoiser of a pipeline.

        Raises:
            InvalidTiming: others were timed.
        """
        if not self.denoisers:
            return self
        if component not in self.denoisers:
            raise InvalidTiming(
                f"times are of {' and '.join(self.denoisers)}, and not of {component or 'a model by itself'}",
                where="Timing",
                fix=f"optimize the pipeline that was timed, or give timing.of({next(iter(self.denoisers))!r})",
            )
        return self.denoisers[component]

    @property
    def facts(self) -> TimingFacts:
        """What was timed.

        Raises:
            InvalidTiming: nothing was, or several denoisers were.
        """
        if self.denoisers:
            return self.of("").facts
        if self._facts is None:
            raise InvalidTiming("nothing was timed", where="Timing", fix="sample inside of the with, and use it after")
        return self._facts

    @property
    def clock(self) -> str:
        """What times of plans follow from, in words."""
        if self.denoisers:
            return "; ".join(dict.fromkeys(timing.clock for timing in self.denoisers.values()))
        return f"time measured on {self.facts.device}, {self.facts.dtype}, {self.facts.code}"

    @property
    def line(self) -> Line:
        """What the time of steps follows from that were not measured."""
        return Line.through(self.kinds)

    def take(self, other: Timing) -> None:
        """Become what was timed."""
        self._facts, self.kinds, self.denoisers = other._facts, other.kinds, other.denoisers

    def seconds(self, kind: str) -> float:
        """Median of a kind of step.

        Raises:
            InvalidTiming: it was not measured.
        """
        found = next((each for each in self.kinds if each.name == kind), None)
        if found is None:
            raise InvalidTiming(
                f"no step of kind {kind!r} was timed",
                where=self.facts.model,
                why=f"there are {', '.join(each.name for each in self.kinds)}",
                fix="measure again: with dicompile.measure(pipe) as timing: ...",
            )
        return found.median

    def on(self, plan: Plan) -> Plan:
        """A plan with these times in the place of the roofline's.

        Raises:
            InvalidTiming: it is of a model with other branches.
        """
        leaves = sum(map(len, plan.block_sites))
        if plan.labels[:leaves] != self.facts.sites:
            raise InvalidTiming(
                f"times are of {self.facts.model} with {len(self.facts.sites)} branches, "
                f"the plan is for {leaves}, or for other kinds of them",
                where="timing",
                fix="measure this model",
            )
        line, known = self.line, {kind.name: kind.median for kind in self.kinds}
        unit = known[FULL] * len(plan.steps) / plan.baseline_time if plan.baseline_time else 0.0

        def timed(step: StepPlan) -> StepPlan:
            seconds = known.get(kind_of(plan, step)) or line.at(step.flops, step.bytes)
            check = step.check[0], step.check[1] * unit  # the same share of a full step as by the roofline
            return replace(step, time=seconds, check=check, full=None if step.full is None else timed(step.full))

        steps = tuple(map(timed, plan.steps))
        return replace(plan, steps=steps, baseline_time=known[FULL] * len(steps), clock=self.clock)

    def check_model(self, model: str, where: str = "dicompile.optimize") -> None:
        """Raise if another class of model was timed.

        Raises:
            InvalidTiming: one was.
        """
        if model != self.facts.model:
            raise InvalidTiming(
                f"times are of {self.facts.model}, the model is {model}", where=where, fix="measure this model"
            )

    def check(self, **conditions: object) -> None:
        """Raise if times were taken with another shape, dtype, device or code.

        Args:
            conditions: some of `Conditions`, by name.

        Raises:
            InvalidTiming: they were.
        """
        for name, theirs in conditions.items():
            mine = getattr(self.facts, name)
            if mine != theirs:
                raise InvalidTiming(
                    f"times are of {name} {_shown(mine)}, the call is of {_shown(theirs)}",
                    where=self.facts.model,
                    why="steps take another time there",
                    fix="measure what is run: with dicompile.measure(pipe) as timing: ...; or leave out timing",
                )

    def save(self, path: str | Path) -> None:
        """Write a JSON file.

        Raises:
            InvalidTiming: nothing was timed.
        """
        several = {name: _Timed(facts=each.facts, kinds=each.kinds) for name, each in self.denoisers.items()}
        made = _File(denoisers=several) if several else _File(facts=self.facts, kinds=self.kinds)
        text = made.to_json()
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with written_whole(Path(path), for_all=True) as file:
            file.write(f"{text}\n".encode())

    @classmethod
    def load(cls, path: str | Path) -> Timing:
        """Read what `save` wrote.

        Raises:
            InvalidTiming: it is missing, damaged, or something else.
        """
        try:
            read = _File.from_json(outside.read_text(Path(path), InvalidTiming), str(path))
            if read.version not in READABLE or (read.facts is None) != bool(read.denoisers):
                raise ValueError(f"format {read.version}, of {', '.join(read.denoisers) or 'nothing'}")
            several = {name: each.timing() for name, each in read.denoisers.items()}
            one = None if read.facts is None else _Timed(facts=read.facts, kinds=read.kinds).timing()
        except ValueError as error:
            told = (error.what, error.why) if isinstance(error, DicompileError) else (str(error),)
            raise InvalidTiming(
                f"{Path(path).name} holds no times of steps",
                where=str(path),
                why=": ".join(filter(None, told)),
                fix="make it: with dicompile.measure(pipe) as timing: ...; timing.save(file)",
            ) from None
        return cls(denoisers=several) if one is None else one

    def _cells(self) -> list[tuple[str, ...]]:
        whole = self.seconds(FULL)
        return [
            (
                kind.label,
                operations_text(kind.flops),
                size_text(kind.bytes),
                str(len(kind.seconds)),
                f"{1000 * kind.median:.2f} ms",
                " to ".join(f"{1000 * value:.2f}" for value in kind.middle),
                f"{kind.median / whole:.1%}",
            )
            for kind in self.kinds
        ]

    @property
    def _lines(self) -> tuple[str, str]:
        title = f"{self.facts.model}, latent {_shown(self.facts.latent)}: {self.clock}"
        return title, f"other steps: {self.line}, within {self.line.deviation:.0%} of these"

    def __rich__(self) -> RenderableType:
        if self.denoisers:
            return Group(*(Group(Text(name, style="bold"), timing) for name, timing in self.denoisers.items()))
        title, others = self._lines
        table = Table(box=SIMPLE_HEAD)
        for number, heading in enumerate(HEADINGS):
            table.add_column(heading, justify="right" if number else "left")
        for cells in self._cells():
            table.add_row(*cells)
        return Group(Text(title), table, Text(others))

    def _repr_html_(self) -> str:
        """The times in a notebook."""
        if self.denoisers:
            return "".join(f"<h4>{escape(name)}</h4>{each._repr_html_()}" for name, each in self.denoisers.items())
        title, others = self._lines
        rows = html_table(HEADINGS, self._cells(), numbers=len(HEADINGS) - 1)
        return fragment(f"<p>{escape(title)}</p>", rows, f"<p>{escape(others)}</p>")

    def __str__(self) -> str:
        return plain_text(self, width=120)


def _shown(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)
