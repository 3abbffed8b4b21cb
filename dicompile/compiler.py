"""The whole flow: capture -> analysis -> plan -> passes -> lower -> runtime.

`compile_capture` is all of it for one captured graph; both front ends end here.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dicompile.analysis import ModelStructure, analyse
from dicompile.capture import CAPTURES, MOST_CAPTURES, NO_TIMESTEP, NOTHING_SAID, Capture, Role, Said
from dicompile.config import DebugFolder, Settings
from dicompile.errors import CallOutsideSchedule
from dicompile.lower import (
    INDUCTOR,
    SIZES,
    VARIANTS,
    Backend,
    Hoist,
    Pieces,
    Program,
    ProgramBuilder,
    VariantCache,
    network_predictor,
    table_predictor,
)
from dicompile.plan import (
    UNLIMITED,
    CacheOptions,
    Plan,
    Policy,
    Predictor,
    StepPlan,
    TimestepSchedule,
    check_can_compile,
    check_predictor,
    first_span,
    load_predictor,
    make_plan,
)
from dicompile.runtime import Executor, Owners, SchedulerLink, Signature, Step, Tables

log = logging.getLogger("dicompile")

ONE_AT_A_TIME = threading.RLock()
"""Held while something is captured, rewritten or compiled, and never otherwise.

torch.fx and Dynamo trace with global state; compiled code has none.
"""

PLAIN_TENSORS = (Tensor, nn.Parameter, nn.Buffer)
"""Tensors whose version and place in memory tell whether they have changed."""

MOST_PLANS = 64
"""Plans of one captured model that are kept; a pipeline makes one for every number of steps that it is asked for."""


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
    """

    policy: Policy
    link: SchedulerLink
    backend: Backend = INDUCTOR
    settings: Settings = field(default_factory=Settings.from_environment)
    cache: CacheOptions = UNLIMITED
    said: Said = NOTHING_SAID
    hoist: Hoist | None = None

    @functools.cached_property
    def owners(self) -> Owners:
        """Models that were compiled with these very options, where compiled code is shared between them."""
        return Owners(self.link)

    @functools.cached_property
    def debug(self) -> DebugFolder:
        """Where the text of every stage goes; one folder for all graphs of a model."""
        return DebugFolder(self.settings.debug)


def compile_capture(capture: Capture, arguments: Sequence[Any], options: Options, way: object) -> CompiledFrame:
    """Compile one captured graph for the shapes of `arguments`.

    Args:
        capture: the graph.
        arguments: values of its placeholders but for its constants.
        options: what the user asked for.
        way: what it depends on besides tensors, see `dicompile.runtime.contexts.Call`.

    Raises:
        PolicyDoesNotFit: the model cannot do what the policy asks for.
        CacheTooLarge: the plan needs more memory than it may have.
    """
    if not options.backend.is_eager:
        check_can_compile(options.cache, [value.device for value in arguments if isinstance(value, Tensor)])
    options.debug.write("captured", capture)
    pieces = pieces_of(capture, _hoist(capture, arguments, options))
    structure = pieces.structure
    options.debug.write("structure", structure)
    programs = Programs(pieces, options)
    if options.cache.max_bytes is not None:
        programs.plan(options.link.schedule)  # refuses before anything is compiled, a predictor included
    executor = Executor(
        programs,
        _signature(capture, structure, arguments, way, options),
        seed=options.policy.seed,
        predictor=_predictor(capture, structure, options),
        constants=capture.constants,
        tables=_tables(capture, pieces),
        offload=options.cache.device == "cpu",
        check=options.settings.check,
    )
    return CompiledFrame(structure, programs, executor)


@functools.lru_cache(maxsize=MOST_CAPTURES)
def pieces_of(capture: Capture, hoist: Hoist) -> Pieces:
    """What is known of a captured model whatever the policy: its structure, and the pieces that steps cut it into."""
    return Pieces(capture, _analysed(capture), hoist)


@functools.lru_cache(maxsize=MOST_CAPTURES)
def _analysed(capture: Capture) -> ModelStructure:
    return analyse(capture)


def _hoist(capture: Capture, arguments: Sequence[Any], options: Options) -> Hoist:
    """What is computed outside of the steps: where a run has several, and its inputs tell whether they have changed.

    Comparing a timestep waits for an accelerator. Where memory is short, nothing is kept that nobody asked for.
    """
    is_run = options.said.timestep != NO_TIMESTEP and capture.input_position(Role.TIMESTEP) is not None
    if not is_run or not (options.link.is_live or options.link.schedule.steps > 1):
        return Hoist.NOTHING
    tensors = [value for value in (*arguments, *capture.constants) if isinstance(value, Tensor)]
    if any(type(value) not in PLAIN_TENSORS for value in tensors):
        return Hoist.NOTHING
    if options.hoist is not None:
        return options.hoist
    if options.backend.is_eager or options.cache.max_bytes is not None or options.cache.device == "cpu":
        return Hoist.NOTHING
    return Hoist.ALL if all(value.device.type == "cpu" for value in tensors) else Hoist.CONDITIONING


def _tables(capture: Capture, pieces: Pieces) -> Tables | None:
    if not pieces.invariants.paces:
        return None
    given = frozenset(i for i, item in enumerate(capture.inputs) if item.role.is_given)
    return Tables(pieces.invariants.functions, capture.input_position(Role.TIMESTEP), given)


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
        remembers=bool(options.policy.rules),
        counts_calls=options.said.timestep == NO_TIMESTEP or not structure.sites,
    )


class Same:
    """A value that is compared at every call: hashed once, and found equal at once where it is the very one.

    Args:
        value: a tuple.
    """

    __slots__ = ("_hash", "_value")

    def __init__(self, value: tuple[object, ...]) -> None:
        self._value, self._hash = value, hash(value)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Same) and self._hash == other._hash and self._value == other._value)


def _predictor(
    capture: Capture, structure: ModelStructure, options: Options
) -> Callable[[Sequence[Any], int], Tensor] | None:
    given = options.policy.predictor
    if given is None:
        return None
    trained = given if isinstance(given, Predictor) else load_predictor(given)
    check_predictor(structure, trained.blocks, trained.tokens, trained.source)
    if trained.facts.kind == "table":
        return table_predictor(trained.importance, first_span(structure).shape[0])
    return network_predictor(capture, structure, trained.parameters, options.backend, trained.source)


@dataclass(frozen=True)
class CompiledFrame:
    """One compiled graph: what it is, what is planned, what runs."""

    structure: ModelStructure
    programs: Programs
    run: Executor


class Programs:
    """Plans and steps of one captured model, by schedule; made on demand, and the latest ones kept."""

    def __init__(self, pieces: Pieces, options: Options) -> None:
        self.structure, self.policy = pieces.structure, options.policy
        self.cache, self.debug = options.cache, options.debug
        self.variants = VariantCache(options.backend, options.settings, options.debug)
        self._builder = ProgramBuilder(pieces, self.variants, options.cache.torch_dtype)
        self._plans: dict[TimestepSchedule, tuple[Plan, dict[int, Step]]] = {}

    def plan(self, schedule: TimestepSchedule) -> Plan:
        """The plan for a schedule."""
        return self._planned(schedule)[0]

    def step(self, schedule: TimestepSchedule, index: int) -> Step:
        """What to run at a step.

        Raises:
            CallOutsideSchedule: the schedule has no such step.
        """
        known = self._plans.get(schedule)
        step = None if known is None else known[1].get(index)
        if step is not None:
            return step
        with ONE_AT_A_TIME:
            plan, steps = self._planned(schedule)
            if index not in steps:
                steps[index] = self._make(plan, index)
            return steps[index]

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
                for planned in make_plan(self.structure, self.policy, schedule.rest(first), self.cache).steps:
                    self._program(planned)

    def _planned(self, schedule: TimestepSchedule) -> tuple[Plan, dict[int, Step]]:
        known = self._plans.get(schedule)
        if known is not None:
            return known
        with ONE_AT_A_TIME:
            if schedule not in self._plans:
                plan = make_plan(self.structure, self.policy, schedule, self.cache)
                self.debug.write("plan", plan)
                for note in plan.notes() if not schedule.before else ():
                    log.warning("policy %s: %s", plan.policy, note)
                latest = list(self._plans.items())[1 - MOST_PLANS :]
                self._plans = {**dict(latest), schedule: (plan, {})}
            return self._plans[schedule]

    def _make(self, plan: Plan, index: int) -> Step:
        if index >= plan.schedule.steps:
            raise CallOutsideSchedule(
                f"there is no step {index + 1} in a schedule of {plan.schedule.steps} steps",
                where="runtime",
                fix="set the scheduler's timesteps before sampling",
            )
        planned = plan.steps[index]
        program = self._program(planned)
        self.debug.write(f"step{index}-{planned.kind}", program)
        return Step.of(plan, index, program)

    def _program(self, planned: StepPlan) -> Program:
        with torch.inference_mode(mode=False), torch.no_grad():
            return self._builder.program(planned)
