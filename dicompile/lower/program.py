"""Programs: what one step executes, as a straight line of calls on numbered registers.

A step is cut into prologue, blocks and epilogue. Adjacent blocks that only reuse become segments of at most eight
blocks, of few lengths, so that a run of reused blocks is few fused kernels and compile time does not grow with depth.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from dicompile.analysis import ModelStructure, Site, SiteId, SiteKind, Span
from dicompile.capture import Capture
from dicompile.lower.pieces import Piece, Pieces
from dicompile.lower.variants import Variant, VariantCache
from dicompile.nodes import results_of
from dicompile.passes import (
    DOWN,
    UP,
    Chosen,
    Labels,
    LocalStep,
    Noise,
    Partner,
    Predicted,
    ReuseClock,
    SlotRef,
    TokenCount,
    Value,
    Weights,
    parameters_of,
    with_adapters,
)
from dicompile.plan import COMPUTE, SiteStep, Slot, SlotKind, StepPlan, attention_owner


@dataclass(frozen=True, slots=True)
class IntRef:
    """An int that differs between the steps that share a program: token count or reuse clock of a site."""

    register: int
    site: SiteId
    is_count: bool


@dataclass(frozen=True, slots=True)
class NoiseRead:
    """Random scores for a site: float32, [batch, tokens]."""

    register: int
    site: SiteId
    shape: tuple[int, int]
    share_guidance: bool


@dataclass(frozen=True, slots=True)
class PredictedRead:
    """Predicted importance of the tokens in one block: float32, [batch, tokens]."""

    register: int
    block: int


@dataclass(frozen=True, slots=True)
class WeightsRead:
    """Weights of a site's action: float32, [k]."""

    register: int
    site: SiteId


@dataclass(frozen=True, slots=True)
class Constant:
    """An output of the model that is no tensor."""

    value: Any


@dataclass(frozen=True, slots=True)
class Call:
    """One compiled segment on registers.

    Attributes:
        name: variant and where it stands, for reports.
        function: the compiled segment.
        inputs: registers of its arguments.
        outputs: registers of its results.
        frees: registers that nobody reads afterwards.
    """

    name: str
    function: Callable[..., Sequence[Any]] = field(repr=False)
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    frees: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Program:
    """Everything one step executes; one that is built twice is another program.

    Registers below the number of model inputs hold those; the others start empty.

    Attributes:
        calls: in order.
        registers: number of registers.
        reads: slots to load before the first call.
        writes: slots to store after the last call.
        ints: ints to load, taken from the step's plan.
        noise: random scores to load.
        predicted: predicted scores to load.
        weights: weights to load, taken from the step's plan.
        chosen: register of the tokens that a site refreshed.
        results: register of every output of the model; constants as they are.
        shared_results: registers among the results that may share memory with a slot: the caller gets copies of them.
        shared_writes: registers that are stored, and may share memory with an input of the model.
        invariants: values that are computed outside of the steps, by name, and their registers.
        partners: registers of what a guidance partner has returned at this step.
        adapters: LoRA weights to load, by name, and their registers.
    """

    calls: tuple[Call, ...]
    registers: int
    reads: tuple[tuple[Slot, int], ...]
    writes: tuple[tuple[Slot, int], ...]
    ints: tuple[IntRef, ...]
    noise: tuple[NoiseRead, ...]
    predicted: tuple[PredictedRead, ...]
    weights: tuple[WeightsRead, ...]
    chosen: tuple[tuple[SiteId, int], ...]
    results: tuple[int | Constant, ...]
    shared_results: frozenset[int] = frozenset()
    shared_writes: frozenset[int] = frozenset()
    invariants: tuple[tuple[str, int], ...] = ()
    partners: tuple[int, ...] = ()
    adapters: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        loads = [f"%{register} = slot {slot}" for slot, register in self.reads]
        loads += [f"%{register} = invariant {name}" for name, register in self.invariants]
        loads += [f"%{register} = adapter {name}" for name, register in self.adapters]
        calls = [
            f"{', '.join(f'%{r}' for r in call.outputs)} = {call.name}({', '.join(f'%{r}' for r in call.inputs)})"
            for call in self.calls
        ]
        stores = [f"slot {slot} = %{register}" for slot, register in self.writes]
        return "\n".join([*loads, *calls, *stores, f"return {self.results}"])


@dataclass(frozen=True, eq=False)
class Verification:
    """What computes a span of which a step has recalled the sites, on the registers that the step has left.

    Attributes:
        program: reads no slot and stores nothing; loads nothing from outside of the steps either.
        recalled: register of the stream behind the span, as the step has made it.
        computed: register in which the program leaves it.
    """

    program: Program
    recalled: int
    computed: int


@dataclass(frozen=True, eq=False)
class GatedProgram:
    """A step at which a gate decides: what runs before, then one of two programs on the same registers.

    Attributes:
        before: reads no slot; loads what either way needs from outside of the steps.
        recalled: what runs where the probe has drifted little.
        full: what runs otherwise.
        watched: slots of the probe, and of a trace if there is one, and the registers in which `before` leaves their
            values.
        verification: what tells, after recalling, how far off that was; None where nothing does.
    """

    before: Program
    recalled: Program
    full: Program
    watched: tuple[tuple[Slot, int], ...]
    verification: Verification | None = None

    def __str__(self) -> str:
        condition = " and ".join(f"{slot} ~ %{register}" for slot, register in self.watched) or "a partner was here"
        recalled, check = [str(self.recalled)], self.verification
        if check is not None:
            condition = "the last forecast was near enough"
            recalled += [str(check.program), f"compare %{check.recalled} with %{check.computed}"]
        return "\n".join((str(self.before), f"if {condition}:", *recalled, "else:", str(self.full)))


NO_RANKS: Mapping[str, int] = MappingProxyType({})
"""No layer has LoRA weights."""


class ProgramBuilder:
    """Builds programs for one captured model.

    Args:
        pieces: of the model.
        variants: where compiled segments come from.
        cache_dtype: dtype that values are stored in where they are wider, or None.
        ranks: of LoRA weights, by the parameters beside which they stand at steps that are adapted.
    """

    def __init__(
        self,
        pieces: Pieces,
        variants: VariantCache,
        cache_dtype: torch.dtype | None = None,
        ranks: Mapping[str, int] = NO_RANKS,
    ) -> None:
        self.pieces, self.variants, self.cache_dtype, self._ranks = pieces, variants, cache_dtype, ranks
        self._invariants = frozenset(pieces.invariants.paces)
        self.capture, self.structure = pieces.capture, pieces.structure
        self._keeping: dict[SiteId, dict[SiteStep, None]] = {}
        self._programs: dict[object, Program] = {}
        self._gated: dict[object, GatedProgram] = {}

    def expect(self, steps: Iterable[StepPlan]) -> None:
        """Note what steps will keep of what they compute.

        Then those that keep less have the same code, whichever are made first: the values cost nothing, where they are
        computed anyway.
        """
        for step in steps:
            for way in filter(None, (step, step.full)):
                for site, planned in zip(self.structure.everything, way.sites, strict=True):
                    if planned.action.is_full and planned.writes and not site.kind.is_span:
                        self._keeping.setdefault(site.id, {})[planned] = None

    def program(self, step: StepPlan) -> Program:
        """The program of a step; steps of equal signature share it."""
        if step.signature not in self._programs:
            self._programs[step.signature] = self._build(step)
        return self._programs[step.signature]

    def try_out(self, step: StepPlan) -> None:
        """Make the variants of a step, but compile none."""
        with self.variants.trial():
            if step.full is not None:
                self._choose_around_gate(step, self._choose_verification(step)[1])
            elif step.signature not in self._programs:
                self._choose_variants(step, self._pieces_of(step), self._wanted())

    def gated(self, step: StepPlan) -> GatedProgram:
        """The programs of a step at which a gate decides; steps of equal signatures share them."""
        assert step.full is not None
        key = (step.signature, step.full.signature, step.verified)
        if key not in self._gated:
            if step.verified is None:
                self._gated[key] = self._build_gated(step, step.full)
            else:
                end = self.structure.everything[step.verified].add
                self._gated[key] = self._build_verified(step, step.full, end)
        return self._gated[key]

    def _build(self, step: StepPlan) -> Program:
        chosen = self._choose_variants(step, self._pieces_of(step), self._wanted())
        assembly = _Assembly(self.capture, step, self._invariants)
        assembly.add_all(chosen)
        assembly.store_watched(self.structure)
        return assembly.finish(self._results())

    def _pieces_of(self, step: StepPlan) -> list[Piece]:
        """Pieces that a step runs, with LoRA weights if it is adapted."""
        pieces = self.pieces.of_step(step)
        return [self._adapted(piece) for piece in pieces] if step.is_adapted else pieces

    def _adapted(self, piece: Piece) -> Piece:
        made = with_adapters(piece.outline, self._parameters, self._ranks)
        beside = tuple((i, self._ranks.get(self._parameters.get(name, ""), 0)) for i, name in enumerate(made.inputs))
        ranks = tuple((i, rank) for i, rank in beside if rank)
        if made is piece.outline:
            return piece
        return replace(piece, name=f"{piece.name}+lora", key=(piece.key, ranks), outline=made)

    @functools.cached_property
    def _parameters(self) -> dict[str, str]:
        return parameters_of(self.capture)

    def _build_gated(self, step: StepPlan, full: StepPlan) -> GatedProgram:
        (watched, first), *rest = self._choose_around_gate(step)
        before = _Assembly(self.capture, watched, self._invariants)
        before.add_all(first)
        if self.structure.probe is not None:
            before.store_at_hand(self.structure.probe)
        ways, count = [], before.count
        for planned, (way, variants) in zip((step, full), rest, strict=True):
            assembly = before.fork(way, count)
            assembly.writes |= _already_written(planned, before.writes)
            assembly.add_all(variants)
            assembly.store_watched(self.structure)
            ways.append(assembly.finish(self._results()))
            count = assembly.count
        done = before.finish_before(ways, count)
        if self.structure.probe is not None:  # or else nothing runs before the gate decides, and each way loads its own
            ways = [replace(way, invariants=()) for way in ways]
        recalled, computed = (replace(way, registers=count) for way in ways)
        values = (Slot.of(span.id, SlotKind.VALUE) for span in (self.structure.probe, self.structure.trace) if span)
        left = tuple((slot, before.writes[slot]) for slot in values)
        return GatedProgram(done, recalled, computed, left)

    def _build_verified(self, step: StepPlan, full: StepPlan, end: str) -> GatedProgram:
        """Nothing runs before such a gate decides; what compares runs after recalling, on what that has left.

        Args:
            step: what it does where it recalls.
            full: what it does otherwise.
            end: the stream that is compared.
        """
        checking, needed = self._choose_verification(step)
        _, (_, recalling), (_, computing) = self._choose_around_gate(step, needed)
        nothing = _Assembly(self.capture, step, self._invariants)
        recalled = nothing.fork(step, nothing.count)
        recalled.add_all(recalling)
        check = recalled.fork(_plain(self.structure), recalled.count)
        check.add_all(checking)
        computed = nothing.fork(full, check.count)
        computed.add_all(computing)
        left = {recalled.values[end], *(register for call in check.calls for register in call.inputs)}
        first = replace(
            recalled.finish(self._results(), left),
            registers=computed.count,
            invariants=tuple(check.invariants.items()),
        )
        compared = check.values[end]
        program = replace(check.finish((), {compared}), registers=computed.count, invariants=())
        return GatedProgram(
            before=nothing.finish_before((), computed.count),
            recalled=first,
            full=computed.finish(self._results()),
            watched=(),
            verification=Verification(program, recalled.values[end], compared),
        )

    def _choose_around_gate(
        self, step: StepPlan, also: frozenset[str] = frozenset()
    ) -> list[tuple[StepPlan, list[tuple[Piece, Variant]]]]:
        """Variants that a gated step runs before its gate decides, where it recalls, and where it does not.

        Args:
            step: the step.
            also: values that are needed where it recalls.
        """
        before, *ways = self.pieces.around_gate(step)
        chosen, needed = [], set[str]()
        for way, more in zip(ways, (also, frozenset[str]()), strict=True):
            own = self._wanted() | more
            chosen.append((way.step, self._choose_variants(way.step, way.pieces, own)))
            needed |= own
        return [(before.step, self._choose_variants(before.step, before.pieces, needed)), *chosen]

    def _choose_verification(self, step: StepPlan) -> tuple[list[tuple[Piece, Variant]], frozenset[str]]:
        """Variants that compute what a step verifies, and the values that enter them and come out; none for nothing."""
        if step.verified is None:
            return [], frozenset()
        span, plain = self.structure.everything[step.verified], _plain(self.structure)
        pieces = [piece for piece in self.pieces.of_step(plain) if piece.block == span.block]
        needed = {span.add}
        return self._choose_variants(plain, pieces, needed), frozenset(needed)

    def _wanted(self) -> set[str]:
        return {node.name for node in self._results() if isinstance(node, fx.Node)}

    def _choose_variants(
        self, step: StepPlan, pieces: Sequence[Piece], needed: set[str]
    ) -> list[tuple[Piece, Variant]]:
        """Walk backwards with the values that are still needed, so that every variant computes no more than that.

        Args:
            step: what its sites do.
            pieces: in order.
            needed: values that are needed after them; then also those that are before.
        """
        result = []
        for piece in reversed(pieces):
            live = frozenset(i for i, name in enumerate(piece.outline.outputs) if name in needed)
            steps = self._local_steps(piece, step)
            variant = self.variants.get(piece.key, piece.name, piece.outline.segment, steps, live)
            if variant.outputs:
                result.append((piece, variant))
                needed.update(piece.outline.inputs[ref.index] for ref in variant.inputs if isinstance(ref, Value))
        return result[::-1]

    def _local_steps(self, piece: Piece, step: StepPlan) -> tuple[LocalStep, ...]:
        """What the sites of a piece do, and what they keep at whatever steps run the same code."""
        positions = {int(site.id): i for i, site in enumerate(piece.sites)}

        def local(site: Site, planned: SiteStep) -> LocalStep:
            is_stored_whole = site.kind.is_watched or site.kind is SiteKind.MODEL
            attention = attention_owner(self.structure, site)
            return LocalStep.of(planned, positions, attention, None if is_stored_whole else self.cache_dtype)

        found = []
        for site in piece.sites:
            made = local(site, step.sites[site.id])
            keeping = (local(site, planned) for planned in self._keeping.get(site.id, ()))
            found.append(next((other for other in keeping if other.serves(made)), made))
        return tuple(found)

    def _results(self) -> list[Any]:
        return results_of(self.capture.graph)


def _plain(structure: ModelStructure) -> StepPlan:
    """A step that computes everything and stores nothing."""
    return StepPlan("full", (SiteStep(COMPUTE),) * len(structure.everything), frozenset())


def _already_written(planned: StepPlan, writes: Mapping[Slot, int]) -> dict[Slot, int]:
    """What a step stores of values that were made before its gate has decided; an anchor is the value of its probe."""
    return {
        slot: register
        for made, register in writes.items()
        for slot in planned.sites[made.site].writes
        if slot == made or slot.kind is SlotKind.ANCHOR
    }


class _Assembly:
    """Numbers registers while calls are added."""

    def __init__(self, capture: Capture, step: StepPlan, invariants: frozenset[str]) -> None:
        self.step = step
        placeholders = [node.name for node in capture.graph.nodes if node.op == "placeholder"]
        self.values = {name: i for i, name in enumerate(placeholders)}
        self.inputs = self.count = len(placeholders)
        self.slots: dict[Slot, int] = {}
        self.reads: list[tuple[Slot, int]] = []
        self.writes: dict[Slot, int] = {}
        self.ints: list[IntRef] = []
        self.noise: list[NoiseRead] = []
        self.predicted: list[PredictedRead] = []
        self.weights: list[WeightsRead] = []
        self.partners: list[int] = []
        self.chosen: list[tuple[SiteId, int]] = []
        self.calls: list[Call] = []
        self.before = 0
        self.memory: dict[int, object] = {i: ("input", i) for i in range(self.inputs)}
        self.of_invariants = invariants
        self.invariants: dict[str, int] = {}
        self.adapters: dict[str, int] = {}

    def fork(self, step: StepPlan, count: int) -> _Assembly:
        """What goes on from here another way, with new registers from a number on."""
        other = copy.copy(self)
        other.step, other.count, other.before = step, count, self.before + len(self.calls)
        other.values, other.memory, other.invariants = {**self.values}, {**self.memory}, {**self.invariants}
        other.adapters = {}
        other.slots, other.reads, other.writes, other.calls, other.chosen = {}, [], {}, [], []
        other.ints, other.noise, other.predicted, other.weights, other.partners = [], [], [], [], []
        return other

    def finish_before(self, ways: Sequence[Program], count: int) -> Program:
        """What runs before one of several ways, which keeps all that any of them reads.

        Args:
            ways: that go on from here.
            count: registers of all of them.
        """
        read = {r for way in ways for call in way.calls for r in call.inputs}
        read |= {r for way in ways for r in (*way.results, *(register for _, register in way.writes))
                 if isinstance(r, int)}  # fmt: skip
        invariants = dict.fromkeys(item for way in ways for item in way.invariants)
        done = self.finish(())
        kept = {*read, *self.writes.values(), *range(self.inputs)}
        calls = _with_frees(self.calls, kept)
        return replace(done, calls=calls, registers=count, writes=(), invariants=tuple(invariants))

    def add_all(self, chosen: Iterable[tuple[Piece, Variant]]) -> None:
        for piece, variant in chosen:
            self.add(piece, variant)

    def add(self, piece: Piece, variant: Variant) -> None:
        inputs = tuple(self._input(piece, variant, i) for i in range(len(variant.inputs)))
        places = variant.function.passes_on
        if places is not None and all(isinstance(ref, Value) for ref in variant.outputs):
            made = (piece.outline.outputs[ref.index] for ref in variant.outputs if isinstance(ref, Value))
            self.values |= zip(made, (inputs[place] for place in places), strict=True)
            return
        outputs = tuple(self._output(piece, ref) for ref in variant.outputs)
        call = self.before + len(self.calls)
        self.calls.append(Call(f"{piece.name}:{variant.name}", variant.function, inputs, outputs))
        for register, memory in zip(outputs, variant.memory, strict=True):
            self.memory[register] = self.memory.get(inputs[memory]) if isinstance(memory, int) else (call, memory)

    def store_at_hand(self, probe: Span) -> None:
        """Store a probe that is an input of the model, or made outside of the steps."""
        if probe.is_given or probe.core in self.of_invariants:
            self.writes |= dict.fromkeys(self.step.sites[probe.id].writes, self._value(probe.core))

    def store_watched(self, structure: ModelStructure) -> None:
        """Store what a gate watches and no piece stores: inputs of the model, and anchors."""
        probe, whole = structure.probe, structure.whole
        if probe is not None:
            self.store_at_hand(probe)
            self._store_anchor(probe, self.writes.get(Slot.of(probe.id, SlotKind.VALUE)))
        if whole is not None:
            self._store_anchor(whole, self.values.get(whole.add))

    def _store_anchor(self, span: Span, register: int | None) -> None:
        anchor = Slot.of(span.id, SlotKind.ANCHOR)
        if anchor in self.step.sites[span.id].writes:
            assert register is not None
            self.writes[anchor] = register

    def finish(self, results: Iterable[Any], left: Iterable[int] = ()) -> Program:
        """The program.

        Args:
            results: what the model returns, as nodes and constants.
            left: registers that somebody reads after it.
        """
        registers = tuple(self._value(r.name) if isinstance(r, fx.Node) else Constant(r) for r in results)
        kept = {r for r in registers if isinstance(r, int)} | set(self.writes.values())
        kept |= {register for _, register in self.chosen} | set(range(self.inputs)) | set(left)
        tables = self.invariants.values()
        given = {self.memory[register] for register in (*range(self.inputs), *tables)}
        stored = {self.memory[register] for register in (*self.slots.values(), *self.writes.values(), *tables)}
        return Program(
            calls=_with_frees(self.calls, kept),
            registers=self.count,
            reads=tuple(self.reads),
            writes=tuple(self.writes.items()),
            ints=tuple(self.ints),
            noise=tuple(self.noise),
            predicted=tuple(self.predicted),
            weights=tuple(self.weights),
            invariants=tuple(self.invariants.items()),
            partners=tuple(self.partners),
            adapters=tuple(self.adapters.items()),
            chosen=tuple(self.chosen),
            results=registers,
            shared_results=frozenset(r for r in registers if isinstance(r, int) and self.memory[r] in stored),
            shared_writes=frozenset(r for r in self.writes.values() if self.memory[r] in given),
        )

    def _new(self) -> int:
        self.count += 1
        return self.count - 1

    def _input(self, piece: Piece, variant: Variant, index: int) -> int:
        ref = variant.inputs[index]
        if isinstance(ref, Value):
            return self._value(piece.outline.inputs[ref.index])
        site = piece.sites[ref.position].id
        if isinstance(ref, SlotRef):
            return self._slot(Slot.of(site, ref.kind, ref.age))
        if isinstance(ref, Labels):
            source = self.step.sites[site].source
            assert source is not None
            return self._slot(Slot.of(SiteId(source), SlotKind.CLUSTER))
        register = self._new()
        if isinstance(ref, (TokenCount, ReuseClock)):
            self.ints.append(IntRef(register, site, isinstance(ref, TokenCount)))
        elif isinstance(ref, Noise):
            shape = piece.sites[ref.position].shape[0], piece.sites[ref.position].tokens.count
            self.noise.append(NoiseRead(register, site, shape, ref.share_guidance))
        elif isinstance(ref, Predicted):
            self.predicted.append(PredictedRead(register, int(piece.sites[ref.position].block)))
        elif isinstance(ref, Weights):
            self.weights.append(WeightsRead(register, site))
        elif isinstance(ref, Partner):
            self.partners.append(register)
        return register

    def _value(self, name: str) -> int:
        if name in self.of_invariants and name not in self.values:
            self.invariants[name] = self.values[name] = self._new()
            self.memory[self.values[name]] = ("invariant", name)
        if name.endswith((DOWN, UP)) and name not in self.values:
            self.adapters[name] = self.values[name] = self._new()
            self.memory[self.values[name]] = ("adapter", name)
        return self.values[name]

    def _slot(self, slot: Slot) -> int:
        if slot not in self.slots:
            self.slots[slot] = self._new()
            self.memory[self.slots[slot]] = slot
            self.reads.append((slot, self.slots[slot]))
        return self.slots[slot]

    def _output(self, piece: Piece, ref: object) -> int:
        register = self._new()
        if isinstance(ref, Value):
            self.values[piece.outline.outputs[ref.index]] = register
        elif isinstance(ref, SlotRef):
            slot = Slot.of(piece.sites[ref.position].id, ref.kind, ref.age)
            if not ref.kind.is_scale and all(
                written.kind is not ref.kind for written in self.step.sites[slot.site].writes
            ):
                return register  # a variant of other steps, too: this one does not store it
            self.writes[slot] = register
            if ref.kind is SlotKind.SCORE:
                self.slots[slot] = register
        elif isinstance(ref, Chosen):
            self.chosen.append((piece.sites[ref.position].id, register))
        return register


def _with_frees(calls: Sequence[Call], kept: set[int]) -> tuple[Call, ...]:
    seen = set(kept)
    result = []
    for call in reversed(calls):
        last = {r for r in (*call.inputs, *call.outputs) if r not in seen}
        seen |= last
        result.append(Call(call.name, call.function, call.inputs, call.outputs, tuple(sorted(last))))
    return tuple(result[::-1])
