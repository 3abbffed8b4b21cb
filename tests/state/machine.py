"""Random sequences of everything that may happen to optimized models, each run compared with a fresh process.

Models, and what was compiled for them, outlive the sequences; what they remember does not: every sequence starts with a
new session of the main thread. A run that is made call by call must at every call give what it gives where nothing ever
happened before, beside it, or to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, ClassVar

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

import dicompile
from dicompile.lower.inductor import compile_segment
from dicompile.passes import Segment
from dicompile.runtime import Session
from tests.state.oracle import oracle
from tests.state.runs import SETUPS, Optimized, Run, Sampling

PLACES = ("thread", "session", "model session")
SWITCH_INTERVAL = 1e-4
"""Seconds between two threads' turns: short, so that one is interrupted wherever it can be."""
CRASHES = (RuntimeError, KeyboardInterrupt, asyncio.CancelledError, torch.OutOfMemoryError)
DONE: Counter[str] = Counter()
"""What all sequences together did."""


def tell() -> None:
    """Tell how far it is; replaced by the test."""


class Faults:
    """A compiler of segments that fail in the middle of a call when they are told to."""

    def __init__(self) -> None:
        self.countdown = 0
        self.error: type[BaseException] = RuntimeError

    def compile_segment(self, segment: Segment, mode: str) -> Callable[..., Any]:
        compiled = compile_segment(segment, mode)

        def run(*arguments: Any) -> Any:
            self.countdown -= 1
            if not self.countdown:
                raise self.error
            return compiled(*arguments)

        return run

    @contextlib.contextmanager
    def planned(self, error: type[BaseException], segments: int) -> Iterator[None]:
        self.error, self.countdown = error, segments
        try:
            yield
        finally:
            self.countdown = 0


FAULTS = Faults()


@contextlib.contextmanager
def foreign_code() -> Iterator[None]:
    """While open, another thread compiles and runs functions of its own, and threads take turns quickly.

    From the first sequence on: hypothesis parses the machine's source before, and not every CPython can parse in two
    threads (python/cpython#106905: ``SystemError: AST constructor recursion depth mismatch``).
    """
    interval, is_over = sys.getswitchinterval(), threading.Event()

    def work() -> None:
        double = torch.compile(lambda x: (x * 2).sin(), backend="eager", fullgraph=True)
        while not is_over.wait(0.01):
            if not DONE["sequences"]:
                continue
            with contextlib.suppress(RuntimeError):  # torch's own check: another thread traces
                double(torch.randn(3 + DONE["foreign calls"] % 5))
                DONE["foreign calls"] += 1

    thread = threading.Thread(target=work)
    sys.setswitchinterval(SWITCH_INTERVAL)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        sys.setswitchinterval(interval)


class Models:
    """Models that were optimized so far, by setup and policy; those of one setup share one module."""

    def __init__(self) -> None:
        self.modules: dict[str, torch.nn.Module] = {}
        self.optimized: dict[tuple[str, str], Optimized] = {}

    def __call__(self, run: Run) -> Optimized:
        key = run.model, run.policy
        if key not in self.optimized:
            if run.model not in self.modules:
                torch.manual_seed(0)
                self.modules[run.model] = SETUPS[run.model].make().model
            self.optimized[key] = Optimized(*key, self.modules[run.model])
        return self.optimized[key]


MODELS = Models()
Key = tuple[str, str, str]
"""Where a run goes on: place, setup, policy."""


going_on = precondition(lambda machine: bool(machine.active))


class Machine(RuleBasedStateMachine):
    """One sequence of events."""

    runs: ClassVar[Sequence[Run]] = ()

    def __init__(self) -> None:
        super().__init__()
        DONE["sequences"] += 1
        self.stack = contextlib.ExitStack()
        self.stack.enter_context(dicompile.session())
        self.active: dict[Key, Sampling] = {}
        self.sessions: dict[Key, Session] = {}

    def teardown(self) -> None:
        if DONE["sequences"] % 25 == 0:
            tell()
        self.active.clear()
        self.stack.close()

    # What may happen. Numbers that choose something are taken modulo what there is to choose from.

    @rule(number=st.integers(0, 99), place=st.sampled_from(PLACES), calls=st.integers(0, 14))
    def begin(self, number: int, place: str, calls: int) -> None:
        """A run starts; the one that was going on there is left."""
        run = self.runs[number % len(self.runs)]
        self._make_way(run)
        key = (place, run.model, run.policy)
        self.active[key] = Sampling(run, MODELS(run))
        self._advance(key, calls)

    @going_on
    @rule(number=st.integers(0, 99), calls=st.integers(1, 14))
    def go_on(self, number: int, calls: int) -> None:
        """A run that was begun goes on."""
        self._advance(self._choose(number), calls)

    @going_on
    @rule(number=st.integers(0, 99))
    def finish(self, number: int) -> None:
        """A run goes on to its end."""
        self._advance(self._choose(number), 99)

    @going_on
    @rule(number=st.integers(0, 99), calls=st.integers(0, 3))
    def begin_again(self, number: int, calls: int) -> None:
        """A run is left and begun anew: the same, with another prompt, or with other noise."""
        key = self._choose(number)
        old = self.active[key].run
        alike = [r for r in self.runs if (r.model, r.policy) == (old.model, old.policy)]
        run = alike[number % len(alike)]
        self._make_way(run)
        self.active[key] = Sampling(run, MODELS(run))
        self._advance(key, calls)

    @going_on
    @rule(number=st.integers(0, 99), error=st.sampled_from(CRASHES), segments=st.integers(1, 9))
    def crash(self, number: int, error: type[BaseException], segments: int) -> None:
        """Something is raised in the middle of a call, or of a later one; the run ends there."""
        key = self._choose(number)
        sampling = self.active.pop(key)
        with self._place(key), FAULTS.planned(error, segments), contextlib.suppress(error):
            sampling.finish()
            return  # fewer segments were left
        DONE["crashes"] += 1

    @going_on
    @rule(number=st.integers(0, 99))
    def call_wrongly(self, number: int) -> None:
        """The model is called at a timestep off the schedule; the run ends there."""
        key = self._choose(number)
        sampling = self.active.pop(key)
        sampling.times[:] = [time + 0.5 for time in sampling.times]
        with self._place(key), contextlib.suppress(dicompile.DicompileError):
            sampling.finish()

    @going_on
    @rule(number=st.integers(0, 99))
    def free(self, number: int) -> None:
        """What a run that was left has stored is released by hand."""
        key = self._choose(number)
        if not self.active[key].setup.bare:
            with self._place(key):
                dicompile.free(self.active.pop(key).optimized.model)

    @rule(numbers=st.lists(st.integers(0, 99), min_size=1, max_size=3))
    def sample_in_threads(self, numbers: list[int]) -> None:
        """Whole runs in threads at once, some of them the same, while those of this thread wait."""
        # What torch.compile made raises while another thread traces anything (torch's own check, per process).
        fixed = [run for run in self.runs if not (SETUPS[run.model].live or SETUPS[run.model].bare)]
        runs = [fixed[n % len(fixed)] for n in numbers]
        together = threading.Barrier(len(runs))

        def work(run: Run) -> list[str]:
            together.wait(timeout=600)
            return Sampling(run, MODELS(run)).finish()

        for run in runs:
            MODELS(run)
        with ThreadPoolExecutor(len(runs)) as pool:
            for run, digests in zip(runs, pool.map(work, runs), strict=True):
                assert digests == oracle()(run), run
                DONE["calls"] += len(digests)
                DONE["runs in threads"] += 1

    @rule(numbers=st.tuples(st.integers(0, 99), st.integers(0, 99)), calls=st.integers(1, 8))
    def cancel_a_task(self, numbers: tuple[int, int], calls: int) -> None:
        """Two tasks take turns; one is cancelled, the other ends, and then a third one."""
        first, second = (self._fixed(n) for n in numbers)

        async def sample(run: Run) -> list[str]:
            with dicompile.session():
                sampling = Sampling(run, MODELS(run))
                while not sampling.is_finished:
                    sampling.call()
                    await asyncio.sleep(0)
                return sampling.digests

        async def main() -> None:
            left, kept = asyncio.create_task(sample(first)), asyncio.create_task(sample(second))
            for _ in range(calls):
                await asyncio.sleep(0)
            left.cancel()
            assert await kept == oracle()(second), second
            assert await sample(first) == oracle()(first), first

        asyncio.run(main())
        DONE["cancelled tasks"] += 1

    @rule(number=st.integers(0, 99))
    def optimize_again(self, number: int) -> None:
        """A plain model (the cheapest to capture) is restored, and optimized for a policy again: now and then."""
        if DONE["optimized again"] * 8 > DONE["sequences"]:
            return
        policies = sorted({run.policy for run in self.runs if run.model == "plain_dit"})
        run = Run("plain_dit", policies[number % len(policies)], 0)
        self.active = {key: s for key, s in self.active.items() if key[1:] != (run.model, run.policy)}
        assert dicompile.restore(MODELS(run).model) is MODELS.modules[run.model]
        MODELS.optimized[run.model, run.policy] = Optimized(run.model, run.policy, MODELS.modules[run.model])
        DONE["optimized again"] += 1

    @going_on
    @rule(number=st.integers(0, 99))
    def switch_off_and_on(self, number: int) -> None:
        """The original module runs for a while, elsewhere: runs that are going on do not notice."""
        sampling = self.active[self._choose(number)]
        model = sampling.optimized.model
        if sampling.setup.bare:
            return
        with dicompile.session():
            dicompile.disable(model)
            run = sampling.run
            digests = [Sampling(run, sampling.optimized).first_digest()] if not sampling.setup.live else []
            dicompile.enable(model)
        with dicompile.session():
            assert digests in ([], oracle()(run)[:1])
        DONE["switched off and on"] += 1

    # How.

    def _choose(self, number: int) -> Key:
        keys = sorted(self.active)
        return keys[number % len(keys)]

    def _fixed(self, number: int) -> Run:
        """A run that follows no scheduler, which could serve one run only."""
        runs = [run for run in self.runs if not SETUPS[run.model].live]
        return runs[number % len(runs)]

    def _make_way(self, run: Run) -> None:
        """A scheduler serves one run at a time."""
        if SETUPS[run.model].live:
            self.active = {key: s for key, s in self.active.items() if key[1:] != (run.model, run.policy)}

    @contextlib.contextmanager
    def _place(self, key: Key) -> Iterator[None]:
        if key[0] == "thread":
            yield
            return
        optimized = MODELS.optimized[key[1:]]
        model = optimized.model if key[0] == "model session" and not optimized.setup.bare else None
        with dicompile.session(self.sessions.get(key) or model) as opened:
            self.sessions[key] = opened
            yield

    def _advance(self, key: Key, calls: int) -> None:
        sampling = self.active[key]
        expected = oracle()(sampling.run)
        with self._place(key):
            for _ in range(min(calls, sampling.total - len(sampling.digests))):
                sampling.call()
                done = len(sampling.digests)
                assert sampling.digests[-1] == expected[done - 1], f"call {done - 1} of {sampling.run}"
                DONE["calls"] += 1
        if sampling.is_finished:
            DONE["runs"] += 1
            del self.active[key]


def runs_of(model: str, policies: Sequence[str], *changes: dict[str, Any]) -> list[Run]:
    """Runs of a setup that differ from one another by little."""
    steps = SETUPS[model].steps[-1]
    return [replace(Run(model, policy, steps), **change) for policy in policies for change in changes]


GUIDED = [
    {"guidance": "contexts"}, {"guidance": "contexts", "prompt": 1}, {"guidance": "order"},
    {"guidance": "order", "prompt": 1}, {"guidance": "interval"}, {"guidance": "interval", "prompt": 1},
    {"guidance": "joins late"}, {"guidance": "ends early"}, {"guidance": "until 2"},
    {"guidance": "until 3", "prompt": 1},
]  # fmt: skip
WINDOWED = [{"guidance": "windows"}, {"guidance": "windows in turn"}, {"guidance": "windows, guided"}]
NUMBERS = [
    {"time": "float"},
    {"time": "int"},
    {"time": "numpy"},
    {"time": "0-d tensor"},
    {"time": "float", "prompt": 1},
]
NIGHTLY = [
    *runs_of("plain_dit", ("duca", "toca", "fora"), {}, {"prompt": 1}, {"seed": 1}, {"batch": 2}, *GUIDED),
    *runs_of("pixart", ("taylorseer",), {}, {"prompt": 1}, {"size": 1}, {"size": 2}, {"steps": 4}),
    *runs_of("pixart", ("taylorseer",), {"guidance": "contexts"}, {"guidance": "order"}, {"guidance": "interval"}),
    *[  # ToCa for PixArt shares tokens between the halves of one batch
        replace(run, guidance="batched")
        for run in runs_of("pixart", ("toca",), {}, {"prompt": 1}, {"size": 1}, {"size": 2}, {"steps": 4})
    ],
    *runs_of("flux", ("duca",), {}, {"prompt": 1}, {"size": 1}, {"guidance": "contexts"}, {"guidance": "joins late"}),
    *runs_of("flux", ("taylorseer",), {}, {"size": 1}),
    *runs_of("pixart", ("taylorseer",), {"guidance": "joins late"}, {"guidance": "windows"}),
    *runs_of("plain_dit", ("duca", "fora"), *WINDOWED, {"guidance": "windows", "prompt": 1}),
    *runs_of("plain_dit", ("fora",), {"autocast": True}, {"autocast": True, "guidance": "order"}),
    *runs_of("numbers", ("duca", "fora"), *NUMBERS, {"time": "float", "guidance": "order"}),
    *runs_of("run", ("duca", "fora"), {}, {"prompt": 1}, {"batch": 2}, {"guidance": "order"}, *WINDOWED),
    *runs_of("autocast", ("fora",), {}, {"autocast": True}, {"prompt": 1}, {"guidance": "order"}),
    *runs_of("bare", ("duca", "fora"), {}, {"prompt": 1}, {"guidance": "order"}, {"guidance": "joins late"}),
    *runs_of("bare twin", ("duca", "fora"), {}, {"prompt": 1}, {"guidance": "order"}, {"guidance": "windows"}),
]
FAST = [
    *runs_of("plain_dit", ("duca",), {}, {"prompt": 1}, {"batch": 2}, {"guidance": "order"}),
    *runs_of("plain_dit", ("duca",), {"guidance": "until 2"}, {"guidance": "until 3", "prompt": 1}),
    *runs_of("plain_dit", ("toca",), {"guidance": "contexts"}, {"guidance": "joins late"}),
    *runs_of("pixart", ("taylorseer",), {}, {"steps": 4}),
    *runs_of("plain_dit", ("duca",), {"guidance": "windows in turn"}, {"autocast": True}),
    *runs_of("numbers", ("fora",), {"time": "float"}, {"time": "float", "prompt": 1}),
    *runs_of("run", ("fora",), {}, {"guidance": "windows"}),
    *runs_of("bare", ("fora",), {}, {"guidance": "order"}),
    *runs_of("bare twin", ("fora",), {}, {"prompt": 1}),
]


class NightlyMachine(Machine):
    runs = NIGHTLY


class FastMachine(Machine):
    runs = FAST
