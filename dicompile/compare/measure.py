"""Every contestant generates the same pictures, in turns, so that a machine that drifts drifts for all."""

from __future__ import annotations

import contextlib
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

import dicompile
from dicompile.bench.contestants import steps_of_equal_work
from dicompile.bench.machine import Machine
from dicompile.compare.quality import quality_of
from dicompile.compare.results import Call, Comparison, Run
from dicompile.compare.subjects import Subject
from dicompile.device import wait_for
from dicompile.errors import CacheTooLarge, InvalidPolicy, PolicyDoesNotFit
from dicompile.plan import Plan, Policy
from dicompile.policies import NoCache

AS_IT_IS, UNCACHED = "as it is", "no cache"
_FEWER = re.compile(r"\d+ steps")

Tick = Callable[[str], object]
"""Called with what comes next."""


@dataclass
class _Contestant:
    """Something that generates, and what was measured of it."""

    name: str
    target: Any
    steps: int
    is_cached: bool
    first_seconds: float = 0.0
    plan: Plan | None = None
    labels: tuple[str, ...] = ()
    rounds: list[tuple[float, list[tuple[float, int]]]] = field(default_factory=list)
    pictures: Tensor | None = None
    report: str = ""


def compare(
    subject: Subject,
    policies: Mapping[str, Policy],
    *,
    rounds: int = 3,
    fewer_steps: bool = True,
    tick: Tick = lambda text: None,
    command: str = "",
) -> Comparison:
    """Generate with the model as it is, without a cache, with policies, and with fewer steps.

    Args:
        subject: what generates the pictures.
        policies: by what they are called.
        rounds: timed generations of each, when everything is compiled; they take turns.
        fewer_steps: also compare with fewer uncached steps, as many as cost what each policy costs.
        tick: called before everything that takes long, with what it is.
        command: what repeats this, for the report.

    Raises:
        InvalidPolicy: a policy is called like a contestant that is always there.
    """
    _check_names(policies)
    refused: list[tuple[str, str]] = []
    contestants = [_Contestant(AS_IT_IS, subject.copy(), subject.steps, is_cached=False)]
    _warm_up(contestants[0], subject, tick)
    for name, policy in {UNCACHED: NoCache(), **policies}.items():
        target = subject.optimize(subject.copy(), policy)
        contestant = _Contestant(name, target, subject.steps, is_cached=bool(policy.rules))
        try:
            _warm_up(contestant, subject, tick)
        except (PolicyDoesNotFit, CacheTooLarge) as error:
            refused.append((name, error.why or error.what))
            continue
        contestants.append(contestant)
    if fewer_steps:
        contestants += _with_fewer_steps(contestants, subject, tick)
    for number in range(rounds):
        for contestant in contestants:
            tick(f"{contestant.name}, round {number + 1} of {rounds}")
            contestant.pictures, seconds, calls = _timed(contestant, subject)
            contestant.rounds.append((seconds, calls))
    reference = contestants[0].pictures
    assert reference is not None
    runs = [_run_of(contestant, contestants[1], reference, subject) for contestant in contestants]
    by_work = sorted(runs[2:], key=lambda run: -run.flops)
    device = next(subject.modules(contestants[0].target)[0].parameters()).device.type
    machine = Machine.of(device, command or shlex.join(["dicompile", *sys.argv[1:]]))
    return Comparison(subject.name, (*runs[:2], *by_work), tuple(refused), machine, subject.captions)


def _check_names(policies: Iterable[str]) -> None:
    taken = [name for name in policies if name in (AS_IT_IS, UNCACHED) or _FEWER.fullmatch(name)]
    if taken:
        raise InvalidPolicy(
            f"no policy can be called {taken[0]!r} here",
            where="dicompile.compare",
            why="a contestant without a policy has this name",
            fix="give it another one",
        )


def _warm_up(contestant: _Contestant, subject: Subject, tick: Tick) -> None:
    """Compile everything."""
    tick(f"{contestant.name}, compiling")
    start = time.perf_counter()
    subject.warm_up(contestant.target, contestant.steps)
    contestant.first_seconds = time.perf_counter() - start
    if contestant.name != AS_IT_IS:
        contestant.plan = dicompile.plan_of(contestant.target)
        contestant.labels = tuple(site.label for site in dicompile.structure_of(contestant.target).everything)


def _with_fewer_steps(contestants: Sequence[_Contestant], subject: Subject, tick: Tick) -> list[_Contestant]:
    plain = contestants[1]
    assert plain.plan is not None
    speedups = [plain.plan.flops / c.plan.flops for c in contestants[2:] if c.plan is not None]
    found = []
    for count in steps_of_equal_work(subject.steps, speedups):
        contestant = _Contestant(f"{count} steps", plain.target, count, is_cached=False)
        _warm_up(contestant, subject, tick)
        found.append(contestant)
    return found


def _timed(contestant: _Contestant, subject: Subject) -> tuple[Tensor, float, list[tuple[float, int]]]:
    calls: list[tuple[float, int]] = []
    modules = subject.modules(contestant.target)
    device = next(modules[0].parameters()).device

    def held() -> int:
        return 0 if contestant.plan is None else dicompile.report(contestant.target).cache_bytes

    with _watched(modules, calls, held):
        wait_for(device)
        start = time.perf_counter()
        pictures = subject.generate(contestant.target, contestant.steps)
        wait_for(device)
        seconds = time.perf_counter() - start
    if contestant.plan is not None:
        contestant.plan = dicompile.plan_of(contestant.target)
        contestant.report = str(dicompile.report(contestant.target))
    return pictures, seconds, calls


@contextlib.contextmanager
def _watched(modules: Sequence[nn.Module], calls: list[tuple[float, int]], held: Callable[[], int]) -> Iterator[None]:
    """Note the seconds of every call, and what is held after it."""
    starts: list[float] = []

    def before(module: nn.Module, *_: Any) -> None:
        wait_for(next(module.parameters()).device)
        starts.append(time.perf_counter())

    def after(module: nn.Module, *_: Any) -> None:
        wait_for(next(module.parameters()).device)
        calls.append((time.perf_counter() - starts.pop(), held()))

    handles = [m.register_forward_pre_hook(before) for m in modules]
    handles += [m.register_forward_hook(after) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run_of(contestant: _Contestant, plain: _Contestant, reference: Tensor, subject: Subject) -> Run:
    plan = contestant.plan
    assert plain.plan is not None and contestant.pictures is not None
    flops = plan.flops if plan is not None else plain.plan.baseline_flops
    kinds = [step.kind for step in plan.steps] if plan is not None else ["full"] * contestant.steps
    each = [calls for _, calls in contestant.rounds]
    per_step = max(1, round(len(each[0]) / max(len(kinds), 1)))
    calls = tuple(
        Call(
            kind=kinds[min(i // per_step, len(kinds) - 1)],
            seconds=statistics.median(one[i][0] for one in each),
            cache_bytes=each[-1][i][1],
        )
        for i in range(min(map(len, each)))
    )
    return Run(
        name=contestant.name,
        is_cached=contestant.is_cached,
        steps=contestant.steps,
        seconds=tuple(seconds for seconds, _ in contestant.rounds),
        first_seconds=contestant.first_seconds,
        calls=calls,
        flops=flops,
        cache_bytes=plan.cache_bytes if plan is not None and contestant.is_cached else 0,
        plan=plan,
        labels=contestant.labels,
        report=contestant.report,
        pictures=contestant.pictures,
        quality=quality_of(contestant.pictures, reference),
        extras=subject.judge(contestant.pictures),
    )
