"""The whole flow: capture -> analysis -> plan -> passes -> lower -> runtime.

`compile_capture` is all of it for one captured graph; both front ends end here.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from dicompile.analysis import ModelStructure, Trunk, analyse
from dicompile.capture import CAPTURES, MOST_CAPTURES, NO_TIMESTEP, NOTHING_SAID, Capture, Role, Said
from dicompile.config import DebugFolder, Settings
from dicompile.device import device_name
from dicompile.errors import CallOutsideSchedule, DicompileError
from dicompile.garbage import uncollected
from dicompile.lazy import is_lazy
from dicompile.lower import (
    INDUCTOR,
    NO_RANKS,
    PLAIN_TENSORS,
    SIZES,
    VARIANTS,
    Backend,
    Code,
    GatedProgram,
    Hoist,
    Pieces,
    Program,
    ProgramBuilder,
    Request,
    VariantCache,
    ask_workers,
    check_can_record,
    count_workers,
    lora_weights,
    network_predictor,
    note_sizes,
    requests_of,
    table_predictor,
)
from dicompile.nodes import results_of
from dicompile.ops.attention_kernels import check_fits
from dicompile.parallel import check_ranks, check_same_plan, kind_of_ranks
from dicompile.passes import UP
from dicompile.plan import (
    UNLIMITED,
    CacheOptions,
    Conditions,
    Level,
    Plan,
    Policy,
    Predictor,
    StepPlan,
    TimestepSchedule,
    Timing,
    check_can_compile,
    check_gate,
    check_predictor,
    first_span,
    load_predictor,
    make_plan,
    reusing_plan,
)
from dicompile.policies import NoCache
from dicompile.progress import progress as bar
from dicompile.runtime import (
    Executor,
    GatedStep,
    Graphs,
    Observer,
    Owners,
    SchedulerLink,
    Signature,
    Step,
    Tables,
    recorder_of,
)
from dicompile.same import Same

log = logging.getLogger("dicompile")

ONE_AT_A_TIME = threading.RLock()
"""Held while something is captured, rewritten or compiled, and never otherwise.

torch.fx and Dynamo trace with global state; compiled code has none. A fork waits for it, too: its copy of what is half
done would stay as it is.
"""
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=ONE_AT_A_TIME.acquire, after_in_parent=ONE_AT_A_TIME.release, after_in_child=ONE_AT_A_TIME.release
    )


class Stopwatch(threading.local):
    """Seconds that this thread has spent in what is measured; what is nested counts once.

    Attributes:
        seconds: so far.
    """

    def __init__(self) -> None:
        self.seconds, self._depth, self._start = 0.0, 0, 0.0

    def __enter__(self) -> None:
        if not self._depth:
            self._start = time.perf_counter()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self.seconds += time.perf_counter() - self._start


COMPILING = Stopwatch()
"""What was captured, rewritten and compiled for calls of this thread, waiting for others included."""

MOST_PLANS = 64
"""Plans of one captured model that are kept; a pipeline makes one for every number of steps that it is asked for."""

DONE_HERE = "another process could not compile, so it is done here"


Planner = Callable[[ModelStructure, TimestepSchedule, CacheOptions], Plan]
"""Plans a run of a model in the place of a policy; values are stored as the options say."""


@dataclass(frozen=True)
class Options:
    """What the user asked for.

    Attributes:
        policy: the caching policy.
        link: where the schedule comes from.
        backend: what makes code of it.
        settings: what the environment said.
        cache: how much may be remembered, in which numbers, and where.
        said: which inputs are what.
        hoist: what is computed outside of the steps, if the user said so.
        observer: who is shown what the steps write.
        planner: makes plans in the place of the policy, to record or to measure.
        timing: times of steps, by which plans predict theirs.
    """

    policy: Policy
    link: SchedulerLink
    backend: Backend = INDUCTOR
    settings: Settings = field(default_factory=Settings.from_environment)
    cache: CacheOptions = UNLIMITED
    said: Said = NOTHING_SAID
    hoist: Hoist | None = None
    observer: Observer | None = None
    planner: Planner | None = None
    timing: Timing | None = None

    def __post_init__(self) -> None:
        self.backend.check_cache(self.cache)
        check_gate(
            self.policy,
            records_steps=self.backend.records_steps,
            is_offloaded=self.cache.device == "cpu",
            in_background=self.backend.in_background,
        )

    def check_ranks(self, kind: str) -> None:
        """Check that ranks which need each other take the same steps; see `dicompile.parallel.check_ranks`."""
        check_ranks(
            kind,
            self.policy,
            in_background=self.backend.in_background,
            is_observed=self.planner is not None,
            records_steps=self.backend.records_steps,
        )

    @functools.cached_property
    def owners(self) -> Owners:
        """Models that were compiled with these very options, where compiled code is shared between them."""
        return Owners(self.link)

    @functools.cached_property
    def debug(self) -> DebugFolder:
        """Where the text of every stage goes; one folder for all graphs of a model."""
        return DebugFolder(self.settings.debug)


def compile_capture(
    capture: Capture, arguments: Sequence[Any], options: Options, way: object, resized: Capture | None = None
) -> CompiledFrame:
    """Compile one captured graph for the shapes of `arguments`.

    Args:
        capture: the graph.
        arguments: values of its placeholders but for its constants.
        options: what the user asked for.
        way: what it depends on besides tensors, see `dicompile.runtime.contexts.Call`.
        resized: the graph for other sizes; what differs becomes a symbol at once.

    Raises:
        PolicyDoesNotFit: the model cannot do what the policy asks for.
        InvalidSetting: no attention of it can be computed as the user asked, or its steps cannot be recorded.
        InvalidTiming: its steps were timed with another shape, dtype, device or code.
        CacheTooLarge: the plan needs more memory than it may have.
    """
    if not options.backend.is_eager:
        check_can_compile(options.cache, [value.device for value in arguments if isinstance(value, Tensor)])
    if options.backend.kernel is not None:
        check_fits(capture.graph, options.backend.kernel)
    hoist = _hoist(capture, arguments, options)
    conditions = Conditions(*_denoised(capture, arguments), _code(options, hoist))
    if options.timing is not None:
        options.timing.check(**conditions._asdict())
    options.debug.write("captured", capture)
    kind = kind_of_ranks(capture.graph)
    if kind is not None:
        options.check_ranks(kind)
    pieces = pieces_of(capture, hoist, options.policy.trunk)
    structure = pieces.structure
    options.debug.write("structure", structure)
    records = options.backend.records_steps and options.observer is None
    graphs = _graphs(pieces, arguments) if records else None
    predictor = _predictor(capture, structure, options)
    ranks = predictor.ranks
    rehearsal = None if resized is None else Rehearsal(pieces_of(resized, hoist, options.policy.trunk), options, ranks)
    programs = Programs(pieces, options, predictor.code, rehearsal, ranks)
    if options.cache.max_bytes is not None:
        programs.plan(options.link.planned)  # refuses before anything is compiled, a predictor included
    executor = Executor(
        programs,
        _signature(capture, structure, arguments, way, options),
        seed=options.policy.seed,
        predictor=predictor.predict,
        adapters=predictor.adapters,
        constants=capture.constants,
        tables=_tables(capture, pieces),
        offload=options.cache.device == "cpu",
        check=options.settings.check,
        warmup=Warmup(programs, uncached_step(pieces, options)) if options.backend.in_background else None,
        graphs=graphs,
        observer=options.observer,
        lazy=tuple(i for i, value in enumerate(arguments) if is_lazy(value)),
    )
    return CompiledFrame(structure, programs, executor, conditions)


def uncached_step(pieces: Pieces, options: Options) -> Step:
    """A step that computes everything, operator by operator: nothing is compiled for it."""
    plain = replace(options, policy=NoCache(), backend=Backend("eager"), cache=UNLIMITED)
    step = Programs(pieces, plain).step(TimestepSchedule.of(1), 0)
    assert isinstance(step, Step)
    return step


@functools.lru_cache(maxsize=MOST_CAPTURES)
def pieces_of(capture: Capture, hoist: Hoist, trunk: Trunk) -> Pieces:
    """What is known of a captured model whatever the policy: its structure, and the pieces that steps cut it into."""
    return Pieces(capture, _analysed(capture, trunk), hoist)


@functools.lru_cache(maxsize=MOST_CAPTURES)
def _analysed(capture: Capture, trunk: Trunk) -> ModelStructure:
    return analyse(capture, trunk)


def _hoist(capture: Capture, arguments: Sequence[Any], options: Options) -> Hoist:
    """What is computed outside of the steps: where a run has several, and its inputs tell whether they have changed.

    Where memory is short, nothing is kept that nobody asked for.
    """
    is_run = options.said.timestep != NO_TIMESTEP and capture.input_position(Role.TIMESTEP) is not None
    if not is_run or not (options.link.is_live or options.link.schedule.steps > 1):
        return Hoist.NOTHING
    tensors = [value for value in (*arguments, *capture.constants) if isinstance(value, Tensor)]
    if any(type(value) not in PLAIN_TENSORS or value.layout is not torch.strided for value in tensors):
        return Hoist.NOTHING
    if options.hoist is not None:
        return options.hoist
    if options.backend.is_eager or options.cache.max_bytes is not None or options.cache.device == "cpu":
        return Hoist.NOTHING
    return Hoist.ALL


def _tables(capture: Capture, pieces: Pieces) -> Tables | None:
    if not pieces.invariants.paces:
        return None
    given = frozenset(i for i, item in enumerate(capture.inputs) if item.role.is_given)
    return Tables(pieces.invariants.functions, capture.input_position(Role.TIMESTEP), given)


def _graphs(pieces: Pieces, arguments: Sequence[Any]) -> Callable[[], Graphs]:
    """What makes a place for recorded steps of a model."""
    capture = pieces.capture
    computed = pieces.invariants.left([node for node in results_of(capture.graph) if isinstance(node, fx.Node)])
    device = check_can_record(capture, arguments, computed)
    given = [i for i, item in enumerate(capture.inputs) if item.role.is_given]
    own = [i for i, item in enumerate(capture.inputs) if not item.role.is_given]
    return functools.partial(Graphs, recorder_of(device), given, own)


def reset() -> None:
    """Forget everything that models share in this process: captures, and compiled code that no model uses.

    The cache folder is left as it is (`dicompile cache clear`). Models that are optimized already keep theirs.
    """
    with ONE_AT_A_TIME:
        CAPTURES.clear()
        VARIANTS.clear()
        SIZES.clear()
        pieces_of.cache_clear()
        _analysed.cache_clear()


def _signature(
    capture: Capture, structure: ModelStructure, arguments: Sequence[Any], way: object, options: Options
) -> Signature:
    roles = list(enumerate(capture.inputs))
    shapes = tuple(
        (tuple(value.shape), value.dtype, value.device) if isinstance(value, Tensor) else type(value)
        for (_, item), value in zip(roles, arguments, strict=False)
        if item.role in (Role.LATENT, Role.CONDITIONING)
    )
    sites = tuple((site.name, site.kind, site.shape, site.itemsize) for site in structure.everything)
    return Signature(
        timestep=capture.input_position(Role.TIMESTEP),
        latent=capture.input_position(Role.LATENT),
        conditioning=tuple((item.name, i) for i, item in roles if item.role is Role.CONDITIONING),
        signals=frozenset(item.name for _, item in roles if item.is_signal),
        geometry=Same((shapes, sites)),
        way=way,
        remembers=bool(options.policy.rules) or options.planner is not None,
        counts_calls=options.said.timestep == NO_TIMESTEP or not structure.sites,
    )


def _denoised(capture: Capture, arguments: Sequence[Any]) -> tuple[tuple[int, ...], str, str]:
    """Shape and dtype of the latent, or of the first input where that is not known, and the device it is on."""
    position = capture.input_position(Role.LATENT)
    named = [value for item, value in zip(capture.inputs, arguments, strict=False) if item.role.is_given]
    given = [value for value in (named if position is None else [arguments[position]]) if isinstance(value, Tensor)]
    if not given:
        return (), "", ""
    latent = given[0]
    device, threads = device_name(latent.device), torch.get_num_threads()
    if latent.device.type == "cpu":
        device += f", {threads} {'thread' if threads == 1 else 'threads'}"
    return tuple(latent.shape), str(latent.dtype).removeprefix("torch."), device


def _code(options: Options, hoist: Hoist) -> str:
    """What decides how fast the code of a step is, in words."""
    backend = options.backend
    usual = Hoist.NOTHING if backend.is_eager else Hoist.ALL
    parts = (
        backend.name,
        "CUDA graphs" if backend.records_steps else "",
        "" if backend.attention == "sdpa" else backend.attention,
        *(f"{name}={value}" for name, value in backend.options),
        "" if hoist is usual else f"hoist {hoist.value}",
        f"cache {options.cache}" if str(options.cache) else "",
    )
    return ", ".join(filter(None, parts))


class _Predictor(NamedTuple):
    """What comes with the predictor of a policy.

    Attributes:
        predict: importance, from the model's inputs and the step; None if there is no predictor.
        code: that it needs.
        adapters: LoRA weights of the model's last blocks, by the names of `dicompile.passes.with_adapters`.
    """

    predict: Callable[[Sequence[Any], int], Tensor] | None = None
    code: tuple[Code, ...] = ()
    adapters: Mapping[str, Tensor] = MappingProxyType({})

    @property
    def ranks(self) -> dict[str, int]:
        """Of the LoRA weights, by the parameters beside which they stand."""
        return {name.removesuffix(UP): each.shape[1] for name, each in self.adapters.items() if name.endswith(UP)}


def _predictor(capture: Capture, structure: ModelStructure, options: Options) -> _Predictor:
    """What the policy's predictor is for one captured model; nothing if it has none."""
    given = options.policy.predictor
    if given is None:
        return _Predictor()
    trained = given if isinstance(given, Predictor) else load_predictor(given)
    check_predictor(structure, trained.blocks, trained.tokens, trained.source)
    adapters = lora_weights(capture, structure, trained, options.policy.adapters)
    if trained.facts.kind == "table":
        return _Predictor(table_predictor(trained.importance, first_span(structure).shape[0]), (), adapters)
    predict, code = network_predictor(capture, structure, trained.parameters, options.backend, trained.source)
    return _Predictor(predict, (code,), adapters)


@dataclass(frozen=True)
class CompiledFrame:
    """One compiled graph: what it is, what is planned, what runs."""

    structure: ModelStructure
    programs: Programs
    run: Executor
    conditions: Conditions


class Programs:
    """Plans and steps of one captured model, by schedule; made on demand, and the latest ones kept.

    Args:
        pieces: of the model.
        options: what the user asked for.
        beside: code that every step needs, beside the pieces.
        rehearsal: of steps with other sizes.
        ranks: see `dicompile.lower.ProgramBuilder`.
    """

    def __init__(
        self,
        pieces: Pieces,
        options: Options,
        beside: Sequence[Code] = (),
        rehearsal: Rehearsal | None = None,
        ranks: Mapping[str, int] = NO_RANKS,
    ) -> None:
        self.backend, self._beside, self._rehearsal = options.backend, beside, rehearsal
        self.structure, self.policy = pieces.structure, options.policy
        self._graph = pieces.capture.graph
        self.cache, self.debug = options.cache, options.debug
        self._is_watched, self._planner, self._timing = options.observer is not None, options.planner, options.timing
        self.variants = VariantCache(options.backend, options.settings, options.debug)
        self._builder = ProgramBuilder(pieces, self.variants, options.cache.torch_dtype, ranks)
        self._plans: dict[TimestepSchedule, tuple[Plan, dict[int, Step | GatedStep]]] = {}
        self._others: dict[Hashable, Program] = {}
        self._others_steps: dict[TimestepSchedule, tuple[Plan, dict[int, Step | GatedStep]]] = {}

    def plan(self, schedule: TimestepSchedule) -> Plan:
        """The plan for a schedule."""
        return self._planned(schedule)[0]

    def step(self, schedule: TimestepSchedule, index: int) -> Step | GatedStep:
        """What to run at a step.

        Raises:
            CallOutsideSchedule: the schedule has no such step.
        """
        known = self._plans.get(schedule)
        step = None if known is None else known[1].get(index)
        if step is not None:
            return step
        with COMPILING, ONE_AT_A_TIME:
            plan, steps = self._planned(schedule)
            if not steps:
                check_same_plan(self._graph, plan)
            if index not in steps:
                steps[index] = self._make(plan, index)
            return steps[index]

    def program(self, planned: StepPlan) -> Program:
        """The program of a step that was planned for the same model with other sizes; it has no gate."""
        key = planned.signature
        if key not in self._others:
            with COMPILING, ONE_AT_A_TIME, torch.inference_mode(mode=False), torch.no_grad(), uncollected():
                self._others[key] = self._builder.program(planned)
        return self._others[key]

    def planned_for_others(self, plan: Plan, index: int) -> Step | GatedStep:
        """What to run at a step that was planned for the same model with other sizes; see `StepSource`."""
        known = self._others_steps.get(plan.schedule)
        if known is None or known[0] is not plan:
            latest = list(self._others_steps.items())[1 - MOST_PLANS :]
            known = plan, {}
            self._others_steps = {**dict(latest), plan.schedule: known}
        if index not in known[1]:
            with COMPILING, ONE_AT_A_TIME:
                if not known[1]:
                    self._builder.expect(plan.steps)
                known[1][index] = self._make(plan, index)
        return known[1][index]

    @functools.cached_property
    def trials(self) -> Mapping[str, Step]:
        """What is tried beside every step that is watched: reuse of all sites, or of the stack if there is one."""
        if not self._is_watched:
            return {}
        levels: tuple[Level, ...] = ("site", "stack") if self.structure.stack else ("site",)
        plans = [reusing_plan(self.structure, level) for level in levels]
        with ONE_AT_A_TIME:
            return {plan.policy: self._ready(plan, 1) for plan in plans}

    def codes(self, schedule: TimestepSchedule) -> list[Code]:
        """Everything that the steps of a run need, of which nothing is compiled for being asked for here."""
        with ONE_AT_A_TIME, torch.inference_mode(mode=False), torch.no_grad(), uncollected():
            for index, planned in enumerate(self._planned(schedule)[0].steps):
                self._missing(schedule, index, planned)
            return self._codes()

    def prepare(self, schedule: TimestepSchedule, *, late: bool) -> None:
        """Make every step of a run ahead.

        Args:
            schedule: of the run.
            late: compile what runs need, too, that begin at any later step of it; their plans are not kept.
        """
        for index in range(schedule.steps):
            self.step(schedule, index)
        for first in range(1, schedule.steps) if late else ():
            with ONE_AT_A_TIME:
                rest = schedule.rest(first)
                plan = make_plan(self.structure, self.policy, rest, self.cache)
                self._builder.expect(plan.steps)
                for index, planned in enumerate(plan.steps):
                    compiled = self._program if planned.full is None else self._gated_program
                    compiled(rest, index, planned)

    def _planned(self, schedule: TimestepSchedule) -> tuple[Plan, dict[int, Step | GatedStep]]:
        known = self._plans.get(schedule)
        if known is not None:
            return known
        with ONE_AT_A_TIME:
            if schedule not in self._plans:
                plan = self._new(schedule)
                self._builder.expect(plan.steps)
                self.debug.write("plan", plan)
                for note in plan.notes() if not schedule.before else ():
                    log.warning("policy %s: %s", plan.policy, note)
                latest = list(self._plans.items())[1 - MOST_PLANS :]
                self._plans = {**dict(latest), schedule: (plan, {})}
            return self._plans[schedule]

    def _new(self, schedule: TimestepSchedule) -> Plan:
        if self._planner is not None:
            return self._planner(self.structure, schedule, self.cache)
        plan = make_plan(self.structure, self.policy, schedule, self.cache)
        return plan if self._timing is None else self._timing.on(plan)

    def _make(self, plan: Plan, index: int) -> Step | GatedStep:
        if index >= plan.schedule.steps:
            raise CallOutsideSchedule(
                f"there is no step {index + 1} in a schedule of {plan.schedule.steps} steps",
                where="runtime",
                fix="set the scheduler's timesteps before sampling",
            )
        return self._ready(plan, index) if plan.steps[index].full is None else self._gated(plan, index)

    def _ready(self, plan: Plan, index: int) -> Step:
        planned = plan.steps[index]
        known, start = len(self.variants.variants), time.perf_counter()
        program = self._program(plan.schedule, index, planned)
        if made := len(self.variants.variants) - known:
            what = f"step {plan.schedule.before + index} ({planned.kind}) of policy {plan.policy}"
            log.info("%s: %d new pieces of code in %.1f s", what, made, time.perf_counter() - start)
        self.debug.write(f"step{index}-{planned.kind}", program)
        return Step.of(plan, index, program)

    def _gated(self, plan: Plan, index: int) -> GatedStep:
        programs = self._gated_program(plan.schedule, index, plan.steps[index])
        self.debug.write(f"step{index}-gated", programs)
        return GatedStep.of(plan, index, programs)

    def _codes(self) -> list[Code]:
        return [*self._beside, *(variant.function for variant in self.variants.variants)]

    def _missing(self, schedule: TimestepSchedule, index: int, planned: StepPlan) -> int:
        """Make the variants of a step; how much code waits to be compiled, of which other sizes are noted."""
        self._builder.try_out(planned)
        missing = sum(not code.is_compiled for code in self._codes())
        if missing and self._rehearsal is not None:
            self._rehearsal.note(schedule, index)
        return missing

    def _program(self, schedule: TimestepSchedule, index: int, planned: StepPlan) -> Program:
        with torch.inference_mode(mode=False), torch.no_grad(), uncollected(), self._bar(schedule, index, planned):
            for code in self._beside:
                code.compile()
            return self._builder.program(planned)

    def _gated_program(self, schedule: TimestepSchedule, index: int, planned: StepPlan) -> GatedProgram:
        with torch.inference_mode(mode=False), torch.no_grad(), uncollected(), self._bar(schedule, index, planned):
            return self._builder.gated(planned)

    def _bar(self, schedule: TimestepSchedule, index: int, planned: StepPlan) -> contextlib.AbstractContextManager[Any]:
        """A bar while the code of a step is compiled, if any has to be."""
        missing = 0 if self.backend.is_eager else self._missing(schedule, index, planned)
        pieces = "1 piece" if missing == 1 else f"{missing} pieces"
        return bar(f"compiling {pieces} of code for a {planned.kind} step") if missing else contextlib.nullcontext()


class Rehearsal:
    """The same model with other sizes, of which nothing is compiled: it tells what in the code of a step is a size.

    Args:
        pieces: of the model with other sizes.
        options: what the user asked for.
        ranks: see `dicompile.lower.ProgramBuilder`.
    """

    def __init__(self, pieces: Pieces, options: Options, ranks: Mapping[str, int] = NO_RANKS) -> None:
        self._structure, self._options = pieces.structure, options
        self._cache = replace(options.cache, max_bytes=None)
        self._variants = VariantCache(options.backend, options.settings, DebugFolder(None))
        self._builder = ProgramBuilder(pieces, self._variants, options.cache.torch_dtype, ranks)
        self._plan = functools.lru_cache(maxsize=MOST_PLANS)(self._planned)
        self._noted: set[Hashable] = set()

    def _planned(self, schedule: TimestepSchedule) -> Plan | None:
        try:
            plan = make_plan(self._structure, self._options.policy, schedule, self._cache)
        except DicompileError as error:
            log.info("sizes become symbols when they vary: with others the policy does not fit: %s", error.what)
            return None
        self._builder.expect(plan.steps)
        return plan

    def note(self, schedule: TimestepSchedule, index: int) -> None:
        """Note the sizes of whatever a step runs."""
        plan = self._plan(schedule)
        if plan is None or plan.steps[index].signature in self._noted:
            return
        self._noted.add(plan.steps[index].signature)
        self._builder.try_out(plan.steps[index])
        for variant in self._variants.variants:
            if variant.function not in self._noted and variant.function.segment is not None:
                self._noted.add(variant.function)
                note_sizes(variant.function.segment, self._options.backend)


def compile_ahead(wanted: Sequence[tuple[Programs, TimestepSchedule]], *, late: bool, progress: bool) -> None:
    """Make every step of some runs; their distinct variants are compiled by all cores, if there are several.

    Args:
        wanted: programs and schedules of the runs.
        late: see `Programs.prepare`.
        progress: show a bar.
    """
    requests: list[Request] = []
    for programs, schedule in wanted:
        with programs.backend.in_effect():
            requests += requests_of(programs.codes(schedule), programs.backend)
    futures = ask_workers(requests) if count_workers() > 1 and len(requests) > 1 else []
    steps = sum(schedule.steps for _, schedule in wanted)
    with bar("compiling", len(futures) + steps, shown=progress) as update:
        for future in as_completed(futures):
            if future.exception() is not None:
                log.warning("%s: %s", DONE_HERE, str(future.exception()).splitlines()[-1])
            update(advance=1, description=f"compiling {len(futures)} pieces of code")
        for programs, schedule in wanted:
            for index in range(schedule.steps):
                programs.step(schedule, index)
                update(advance=1, description=f"step {schedule.before + index} of policy {programs.policy.name}")
            programs.prepare(schedule, late=late)
    for request in requests:
        request.note()


class Warmup:
    """Code that other processes make while generations run uncached.

    Args:
        programs: whose code it is.
        uncached: what runs meanwhile.
    """

    def __init__(self, programs: Programs, uncached: Step) -> None:
        self.uncached = uncached
        self._programs = programs
        self._asked: dict[TimestepSchedule, list[Future[None]]] = {}
        self._ready: frozenset[TimestepSchedule] = frozenset()
        self._process = os.getpid()

    def is_ready(self, schedule: TimestepSchedule) -> bool:
        """True if every step of a run is compiled; asks for the code otherwise.

        Raises:
            PolicyDoesNotFit, CacheTooLarge: the model cannot do what the policy asks for.
            Exception: something that was asked for could not be compiled; whoever calls next asks for it again.
        """
        if schedule in self._ready and not self._asked:
            return True
        with ONE_AT_A_TIME:
            if self._process != os.getpid():  # nobody answers a fork
                self._asked, self._process = {}, os.getpid()
            if schedule not in self._ready and schedule not in self._asked:
                self._asked[schedule] = self._ask(schedule)
            for asked, futures in list(self._asked.items()):
                if all(future.done() for future in futures):
                    del self._asked[asked]
                    self._load(asked, futures)
            return schedule in self._ready

    def _load(self, schedule: TimestepSchedule, futures: Sequence[Future[None]]) -> None:
        """Make the steps of a run of what was compiled; what could not be is compiled here."""
        for failed in filter(None, (future.exception() for future in futures)):
            log.warning("%s: %s", DONE_HERE, str(failed).splitlines()[-1])
        self._programs.prepare(schedule, late=False)
        self._ready = frozenset([*self._ready, schedule])

    def _ask(self, schedule: TimestepSchedule) -> list[Future[None]]:
        with self._programs.backend.in_effect():
            futures = ask_workers(requests_of(self._programs.codes(schedule), self._programs.backend))
        if futures:
            log.warning(
                "compiling in the background; generations of policy %s that begin before it is done run uncached",
                self._programs.policy.name,
            )
        return futures
