"""The whole flow: capture -> analysis -> plan -> passes -> lower -> runtime.

`compile_frame` is all of it for one graph that Dynamo captured; both front ends end here.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from dicompile.analysis import ModelStructure, analyse
from dicompile.capture import Capture, Role, capture_graph, read_inputs
from dicompile.config import DebugFolder, Settings
from dicompile.errors import CallOutsideSchedule, CannotCapture
from dicompile.lower import (
    Program,
    ProgramBuilder,
    VariantCache,
    compile_plainly,
    network_predictor,
    table_predictor,
)
from dicompile.plan import (
    UNLIMITED,
    CacheOptions,
    Plan,
    Policy,
    StepPlan,
    TimestepSchedule,
    check_can_compile,
    check_predictor,
    cold_step,
    first_span,
    make_plan,
)
from dicompile.policies.predictor import load_predictor
from dicompile.runtime import Executor, SchedulerLink

log = logging.getLogger("dicompile")

ONE_AT_A_TIME = threading.RLock()
"""Held while a graph is captured or rewritten, and while an optimized model runs, any step of which may compile.

torch.fx and Dynamo trace with global state: a second thread that calls a compiled module meanwhile breaks both. Calls
that compile nothing are not safe either: side by side, three threads gave five wrong generations in three minutes.
"""


@dataclass(frozen=True)
class Options:
    """What the user asked for.

    Attributes:
        policy: the caching policy.
        link: where the schedule comes from.
        mode: "inductor" or "eager".
        settings: what the environment said.
        cache: how much may be remembered, in which numbers, and where.
    """

    policy: Policy
    link: SchedulerLink
    mode: str = "inductor"
    settings: Settings = field(default_factory=Settings.from_environment)
    cache: CacheOptions = UNLIMITED

    @functools.cached_property
    def debug(self) -> DebugFolder:
        """Where the text of every stage goes; one folder for all graphs of a model."""
        return DebugFolder(self.settings.debug)


def compile_frame(
    graph: fx.GraphModule, names: Sequence[tuple[str, bool]], arguments: Sequence[Any], options: Options
) -> CompiledFrame:
    """Compile one captured graph for the shapes of `arguments`.

    Raises:
        CannotCapture: the graph writes to its inputs.
        PolicyDoesNotFit: the model cannot do what the policy asks for.
        CacheTooLarge: the plan needs more memory than it may have.
    """
    if options.mode != "eager":
        check_can_compile(options.cache, [value.device for value in arguments if isinstance(value, Tensor)])
    capture = capture_graph(graph, names, arguments)
    options.debug.write("captured", capture)
    structure = analyse(capture)
    options.debug.write("structure", structure)
    programs = Programs(capture, structure, options)
    if options.cache.max_bytes is not None:
        programs.plan(options.link.schedule)  # refuses before anything is compiled, a predictor included
    executor = Executor(
        programs,
        options.link,
        timestep=capture.input_position(Role.TIMESTEP),
        latent=capture.input_position(Role.LATENT),
        seed=options.policy.seed,
        predictor=_predictor(capture, structure, options),
        offload=options.cache.device == "cpu",
        conditioning=[i for i, item in enumerate(capture.inputs) if item.role is Role.CONDITIONING],
    )
    executor.check = options.settings.check
    return CompiledFrame(structure, programs, executor)


def _predictor(
    capture: Capture, structure: ModelStructure, options: Options
) -> Callable[[Sequence[Any], int], Tensor] | None:
    if options.policy.predictor is None:
        return None
    trained = load_predictor(options.policy.predictor)
    check_predictor(structure, trained.blocks, trained.tokens, trained.source)
    if trained.facts.kind == "table":
        return table_predictor(trained.importance, first_span(structure).shape[0])
    return network_predictor(capture, structure, trained.parameters, options.mode, trained.source)


@dataclass(frozen=True)
class CompiledFrame:
    """One compiled graph: what it is, what is planned, what runs."""

    structure: ModelStructure
    programs: Programs
    run: Executor


class Programs:
    """Plans and programs of one captured model, by schedule and step; made on demand and kept."""

    def __init__(self, capture: Capture, structure: ModelStructure, options: Options) -> None:
        self.structure, self.policy, self.cache, self.debug = structure, options.policy, options.cache, options.debug
        self.variants = VariantCache(options.mode, options.settings, options.debug)
        self._builder = ProgramBuilder(capture, structure, self.variants, options.cache.torch_dtype)
        self._plans: dict[TimestepSchedule, Plan] = {}
        self._steps: dict[tuple[TimestepSchedule, int, bool], tuple[StepPlan, Program]] = {}

    def plan(self, schedule: TimestepSchedule) -> Plan:
        """The plan for a schedule."""
        if schedule not in self._plans:
            plan = self._plans[schedule] = make_plan(self.structure, self.policy, schedule, self.cache)
            self.debug.write("plan", plan)
            for note in plan.notes():
                log.warning("policy %s: %s", plan.policy, note)
        return self._plans[schedule]

    def step(self, schedule: TimestepSchedule, index: int) -> tuple[StepPlan, Program]:
        """What to run at a step.

        Raises:
            CallOutsideSchedule: the schedule has no such step.
        """
        return self._kept(schedule, index, cold=False)

    def cold(self, schedule: TimestepSchedule, index: int) -> tuple[StepPlan, Program]:
        """What to run at a step when nothing is remembered."""
        return self._kept(schedule, index, cold=True)

    def _kept(self, schedule: TimestepSchedule, index: int, *, cold: bool) -> tuple[StepPlan, Program]:
        key = (schedule, index, cold)
        if key not in self._steps:
            with ONE_AT_A_TIME:
                self._steps[key] = self._steps.get(key) or self._make(schedule, index, cold=cold)
        return self._steps[key]

    def _make(self, schedule: TimestepSchedule, index: int, *, cold: bool) -> tuple[StepPlan, Program]:
        if index >= schedule.steps:
            raise CallOutsideSchedule(
                f"there is no step {index + 1} in a schedule of {schedule.steps} steps",
                where="runtime",
                fix="set the scheduler's timesteps before sampling",
            )
        plan = self.plan(schedule)
        step = cold_step(self.structure, plan, index) if cold else plan.steps[index]
        program = self._builder.program(step)
        self.debug.write(f"step{index}-{step.kind}", program)
        return step, program


@dataclass
class Specialiser:
    """A Dynamo graph, compiled anew for every set of symbolic sizes and floats it is called with.

    It is what a ``torch.compile`` backend returns. Compiling at the first call instead of inside the backend keeps
    dicompile's errors its own. A graph that cannot be captured is an error, or compiled plainly if `on_refused` is
    there to say so.
    """

    graph: fx.GraphModule
    names: Sequence[tuple[str, bool]]
    options: Options
    on_compiled: Callable[[CompiledFrame], None]
    on_refused: Callable[[CannotCapture], None] | None = None
    frames: dict[tuple[float, ...], Callable[..., Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._read = read_inputs(self.graph.graph)

    def __call__(self, *arguments: Any) -> Any:
        """Run the frame for the shapes of `arguments`."""
        sizes = [value for value in arguments if isinstance(value, int)]
        key = (*sizes, *(arguments[i].item() for i in self._read))
        if key not in self.frames:
            with ONE_AT_A_TIME:
                self.frames[key] = self.frames.get(key) or self._compile(arguments)
        return self.frames[key](*arguments)

    def _compile(self, arguments: Sequence[Any]) -> Callable[..., Any]:
        try:
            frame = compile_frame(self.graph, self.names, arguments, self.options)
        except CannotCapture as refused:
            if self.on_refused is None:
                raise
            self.on_refused(refused)
            return compile_plainly(self.graph, arguments, self.options.mode)
        self.on_compiled(frame)
        return frame.run
