"""Variants: a segment specialised to what its sites do, compiled once, shared by all blocks of the same structure."""

from __future__ import annotations

import contextlib
import functools
import logging
import operator
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from dicompile.config import DebugFolder, Settings
from dicompile.latest import Latest
from dicompile.lower.inductor import Backend, Code
from dicompile.lower.stored import Stored, check_can_be_stored
from dicompile.ops.registry import registered
from dicompile.passes import InputRef, LocalStep, OutputRef, PassRun, Segment, passes_for, rewrite
from dicompile.store import Unwritable, device_text, key_of

log = logging.getLogger("dicompile")


@dataclass(frozen=True)
class Variant:
    """A compiled segment.

    Attributes:
        name: segment and what its sites do, for reports.
        function: takes one argument per input, returns one tensor per output.
        inputs: what each argument is.
        outputs: what each result is.
        memory: whose memory each result may lie in: number of an argument, or name of the node that made it.
        rewrite: rewrites the segment; what another process compiled needs it only for whoever looks at it.
    """

    name: str
    function: Code = field(repr=False)
    inputs: tuple[InputRef, ...]
    outputs: tuple[OutputRef, ...]
    memory: tuple[int | str, ...]
    rewrite: Callable[[], tuple[Segment, tuple[PassRun, ...]]] = field(repr=False)

    @property
    def segment(self) -> Segment:
        """The rewritten segment."""
        return self.rewrite()[0]

    @property
    def runs(self) -> tuple[PassRun, ...]:
        """What the passes did."""
        return self.rewrite()[1]


class VariantCache:
    """Rewrites and compiles a segment the first time that anybody in the process asks for it.

    The key is the segment's structure, what its sites do, and which values must leave it. Names, parameters, token
    counts and step numbers are not part of it, so that the number of compilations does not grow with depth or steps,
    and models, policies and front ends share what they have in common. What writes text for debugging shares nothing.
    """

    def __init__(self, backend: Backend, settings: Settings, debug: DebugFolder) -> None:
        self.backend, self.settings, self.debug = backend, settings, debug
        self._variants: dict[tuple[Hashable, tuple[LocalStep, ...], frozenset[int]], Variant] = {}
        self._is_trial = False

    def get(
        self, key: Hashable, name: str, segment: Segment, steps: tuple[LocalStep, ...], live: frozenset[int]
    ) -> Variant:
        """The variant of `segment`; `key` stands for its structure."""
        full_key = (key, steps, live)
        if full_key not in self._variants:
            self._variants[full_key] = self._shared(full_key, f"{name}-{_spelled(steps)}", segment, steps, live)
        variant = self._variants[full_key]
        if not self._is_trial and not variant.function.is_compiled:
            self._compile(full_key, segment, variant)
        return variant

    @contextlib.contextmanager
    def trial(self) -> Iterator[None]:
        """While open, variants are made, but not compiled."""
        self._is_trial = True
        try:
            yield
        finally:
            self._is_trial = False

    def _shared(
        self, key: Hashable, name: str, segment: Segment, steps: tuple[LocalStep, ...], live: frozenset[int]
    ) -> Variant:
        if self.debug.is_open:
            return self._make(name, segment, steps, live)
        return (
            VARIANTS.get((key, self._how()))
            or self._stored(key, name, segment, steps, live)
            or self._make(name, segment, steps, live)
        )

    def _how(self) -> Hashable:
        return self.settings.disabled_passes, registered(), self.backend.settings()

    def _place(self, key: Hashable, segment: Segment) -> str | None:
        """Under which key other processes find a variant; None where it stays in this one."""
        is_kept = self.settings.store.is_open and not self.backend.is_eager and not self.debug.is_open
        return _stored_under(key, self._how(), segment) if is_kept else None

    def _stored(
        self, key: Hashable, name: str, segment: Segment, steps: tuple[LocalStep, ...], live: frozenset[int]
    ) -> Variant | None:
        """The variant that another process left."""
        place = self._place(key, segment)
        for kept in () if place is None else self.settings.store.get("code", place):
            try:
                stored = Stored.of(kept.content)
            except Exception as error:  # whatever torch says about bytes that it wrote itself
                log.warning("compiled code of another process cannot be used: %r", error)
                continue
            kept.used()
            code = Code(None, self.backend, stored.function)
            rewritten = functools.cache(lambda: self._rewrite(name, segment, steps, live))
            variant = Variant(name, code, stored.inputs, stored.outputs, stored.memory, rewritten)
            return VARIANTS.put((key, self._how()), variant)
        return None

    def _compile(self, key: Hashable, segment: Segment, variant: Variant) -> None:
        """Compile a variant, and leave it for everybody else."""
        function = variant.function.compile()
        VARIANTS.put((key, self._how()), variant)
        place = self._place(key, segment)
        if place is not None:
            with contextlib.suppress(Unwritable, OSError):  # somebody may have emptied Inductor's folder
                content = Stored(function, variant.inputs, variant.outputs, variant.memory).to_bytes()
                self.settings.store.put("code", place, content)

    def _make(self, name: str, segment: Segment, steps: tuple[LocalStep, ...], live: frozenset[int]) -> Variant:
        made = self._rewrite(name, segment, steps, live)
        rewritten, _ = made
        self.debug.write(f"{name}-variant", rewritten)
        function = Code(rewritten, self.backend)
        memory = tuple(_memory_of(rewritten.graph, node) for node in rewritten.results)
        return Variant(name, function, tuple(rewritten.inputs), tuple(rewritten.outputs), memory, lambda: made)

    def _rewrite(
        self, name: str, segment: Segment, steps: tuple[LocalStep, ...], live: frozenset[int]
    ) -> tuple[Segment, tuple[PassRun, ...]]:
        passes = passes_for(self.backend.attention)
        return rewrite(segment, steps, live, passes, settings=self.settings, debug=self.debug, name=name)

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Everything that was asked for so far."""
        return tuple({id(variant): variant for variant in self._variants.values()}.values())


MOST_VARIANTS = 1024
VARIANTS: Latest[Variant] = Latest(MOST_VARIANTS)
"""Variants of all models of the process."""


def _stored_under(key: Hashable, how: Hashable, segment: Segment) -> str | None:
    """Under which key other processes find a variant; None where it means something in this one only."""
    try:
        check_can_be_stored(segment)
        devices = {item.device for node in segment.graph.nodes for item in tree_leaves(node.meta.get("val"))
                   if isinstance(item, Tensor)}  # fmt: skip
        return key_of(key, how, frozenset(map(device_text, devices)))
    except Unwritable:
        return None


def _memory_of(graph: fx.Graph, node: fx.Node) -> int | str:
    """Number of the argument, or name of the node, whose memory a node may be a view of."""
    while node.op == "call_function" and _is_view(node.target):
        node = node.all_input_nodes[0]
    return graph.find_nodes(op="placeholder").index(node) if node.op == "placeholder" else node.name


def _is_view(target: Any) -> bool:
    """True if the result of an operator, or of a list of results each, may be its first argument, or a part of it."""
    if target is operator.getitem:
        return True
    schema = getattr(target, "_schema", None)
    return schema is not None and any(argument.alias_info is not None for argument in schema.arguments[:1])


def _spelled(steps: tuple[LocalStep, ...]) -> str:
    def letter(step: LocalStep) -> str:
        if step.refresh is not None:
            return "t"
        if step.only_reuses:
            return "r" if len(step.weights) > 1 else "s"
        return "f" if len(step.weights) == 1 else "b"

    return "".join(letter(step) for step in steps) or "plain"
