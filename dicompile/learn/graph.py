"""A frozen model as two differentiable graphs: one records what its branches return, one blends it back in.

The graphs are the captured model rewritten by the very passes that make the cached steps, so whatever can be cached can
be learned::

    record   every site's value leaves the graph as well
    blend    value = weights[0] * fresh + weights[1] * stored, weights an input

Both run operator by operator under autograd; gradients reach the weights, LoRA weights if there are any, and nothing
else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from dicompile.analysis import ModelStructure, Site, SiteKind, analyse
from dicompile.capture import Arguments, Capture, Role, ambient, capture_by_dynamo, known_capture, normalised, values_of
from dicompile.compat import function_of
from dicompile.compiler import ONE_AT_A_TIME
from dicompile.config import DebugFolder, Settings
from dicompile.errors import InvalidTrainingData, NoSitesFound
from dicompile.lower import NO_RANKS
from dicompile.nodes import results_of
from dicompile.offload import check_whole
from dicompile.passes import (
    PASSES,
    InputRef,
    LocalStep,
    OutputRef,
    SlotRef,
    Value,
    Weights,
    adaptable,
    outline_until,
    parameters_of,
    rewrite,
    with_adapters,
)
from dicompile.plan import SlotKind, What

Inputs = Mapping[str, Any]
"""Keyword arguments of the model's forward."""
NO_ADAPTERS: Mapping[str, Tensor] = MappingProxyType({})
"""No layer has LoRA weights."""


@dataclass(frozen=True)
class LearnableModel:
    """A model whose branches can be recorded and blended, for the shapes it was captured with.

    Attributes:
        name: class of the model.
        capture: of the model.
        structure: of the model.
        sites: what is recorded and blended, in execution order: branches, or what whole blocks add.
        device: where the model is.
        adaptable: fake weights, [d, c], of the linear layers beside which `blend` takes LoRA weights, by their names.

    Example:
        >>> model = learnable(dit, inputs)
        >>> _, stored = model.record(inputs)
        >>> output = model.blend(inputs, stored, [torch.stack([beta, 1 - beta]) for beta in scores])
    """

    name: str
    capture: Capture = field(repr=False)
    structure: ModelStructure
    sites: tuple[Site, ...]
    device: torch.device
    adaptable: Mapping[str, Tensor] = field(repr=False)
    _plain: _Graph = field(repr=False)
    _record: _Graph = field(repr=False)
    _blend: _Graph = field(repr=False)

    @torch.no_grad()
    def predict(self, inputs: Inputs) -> Tensor:
        """Result of the model as it is, without gradients."""
        return self._plain(inputs, {})[Value(0)]

    @torch.no_grad()
    def record(self, inputs: Inputs) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Result of the model, and the value of every site, without gradients."""
        results = self._record(inputs, {})
        return results[Value(0)], tuple(results[_slot(i)] for i in range(len(self.sites)))

    def blend(
        self,
        inputs: Inputs,
        stored: Sequence[Tensor],
        weights: Sequence[Tensor],
        adapters: Mapping[str, Tensor] = NO_ADAPTERS,
    ) -> Tensor:
        """Result of the model with stored values mixed in.

        Args:
            inputs: keyword arguments of its forward.
            stored: per site a value as `record` returned it.
            weights: per site float32 [2], of the fresh and of the stored value; per token [2, b, n, 1].
            adapters: LoRA weights by the names of `dicompile.passes.with_adapters`, in the dtype of their layers.

        Returns:
            The result, through which gradients reach the weights and the LoRA weights.
        """
        given: dict[InputRef, Tensor] = {_slot(i): value for i, value in enumerate(stored)}
        # Tensors of more than one number would promote a bfloat16 stream to float32.
        given |= {Weights(i): pair.to(stored[i].dtype) if pair.ndim > 1 else pair for i, pair in enumerate(weights)}
        return self._blend(inputs, given, adapters)[Value(0)]


def learnable(
    module: nn.Module,
    inputs: Inputs,
    *,
    level: Literal["site", "block", "stack"] = "site",
    what: What = What.CORE,
    per_token: bool = False,
    result: Literal["output", "stream"] = "output",
    lora: tuple[int, int] = (0, 0),
    compiled: bool = False,
) -> LearnableModel:
    """Make a model learnable.

    Args:
        module: in eval mode; it is not changed, and its parameters are read at every call.
        inputs: keyword arguments of its forward, of the shapes to train with. Whatever is no tensor becomes part of the
            graph.
        level: record and blend "site" by site, or what every "block" adds, or the whole "stack".
        what: value of a site; of a block `What.UPDATE`.
        per_token: every token has weights of its own.
        result: what `predict`, `record` and `blend` return: the model's output, or the stream after its last block.
        lora: number of the last blocks whose linear layers get LoRA weights in `blend`, and the rank of these.
        compiled: run the graphs through `torch.compile`.

    Raises:
        CannotCapture: the model does not fit into one graph.
        UnsupportedModel: its weights are brought part by part.
        NoSitesFound: there is nothing to blend.
    """
    check_whole(module, "training")
    capture = _captured(module, Arguments.of((), inputs))
    structure = analyse(capture)
    sites = structure.sites if level == "site" else _spans(structure, SiteKind(level))
    if not sites:
        raise NoSitesFound(
            f"{type(module).__name__} has no {level} to learn for",
            where="learnable",
            why=f"{len(structure.sites)} branches were found, {len(structure.spans)} spans",
            fix="see what `dicompile inspect` finds",
        )

    wanted = _output(capture) if result == "output" else _last_add(structure)
    adapted, rank = lora
    beside = adaptable(capture, structure, structure.blocks[len(structure.blocks) - adapted :])

    def graph(step: LocalStep, name: str, ranks: Mapping[str, int] = NO_RANKS) -> _Graph:
        return _rewritten(capture, structure, sites, step, wanted, name, ranks).bound_to(module, compiled=compiled)

    return LearnableModel(
        name=type(module).__name__,
        capture=capture,
        structure=structure,
        sites=sites,
        device=next(value.device for value in tree_leaves(dict(inputs)) if isinstance(value, Tensor)),
        _plain=graph(LocalStep(), "plain"),
        _record=graph(LocalStep(what=what, writes=(SlotKind.VALUE,)), "record"),
        adaptable=beside,
        _blend=graph(
            LocalStep((1.0, 1.0), variable=True, per_token=per_token, what=what), "blend", dict.fromkeys(beside, rank)
        ),
    )


class LearnableModels:
    """A module made learnable for every kind of call that comes: for prompts of other lengths, say.

    A graph is made when a kind of call first comes.

    Args:
        module: as `learnable` takes it.
        inputs: of the first call.
        one_kind: refuse calls that differ from the first one in more than the values of their tensors.
        **options: of `learnable`.

    Attributes:
        first: the model for calls like `inputs`.
    """

    def __init__(self, module: nn.Module, inputs: Inputs, *, one_kind: bool = False, **options: Any) -> None:
        self._module, self._one_kind, self._options = module, one_kind, options
        self._found: dict[tuple[object, ...], LearnableModel] = {}
        self.first = self.of(inputs)

    def of(self, inputs: Inputs) -> LearnableModel:
        """The model for a call.

        Raises:
            InvalidTrainingData: it goes another way through the model than the first one, or is of another kind and
                must not be.
        """
        key = Arguments.of((), inputs).key
        if key not in self._found:
            if self._found and self._one_kind:
                raise self._unlike("shapes, or arguments that are no tensors, are others")
            made = learnable(self._module, inputs, **self._options)
            if self._found and [site.label for site in made.sites] != [site.label for site in self.first.sites]:
                raise self._unlike(f"it has {len(made.sites)} sites, or of other kinds")
            self._found[key] = made
        return self._found[key]

    def _unlike(self, why: str) -> InvalidTrainingData:
        return InvalidTrainingData(
            f"a call of {type(self._module).__name__} is not like the first one",
            where="dicompile.learn",
            why=why,
            fix="record runs of one setting; for a predictor also of one size, and with the timestep as a tensor",
        )


def _captured(module: nn.Module, arguments: Arguments) -> Capture:
    """The graph of a model, whatever values its inputs have."""
    with ONE_AT_A_TIME:
        known, _ = known_capture(module, arguments, (arguments.key, ambient()), Settings.from_environment().store)
        if not known.captured.is_run:
            return known.capture
        captured = capture_by_dynamo(module, arguments)  # raises: it depends on values, which differ between samples
        return normalised(module, captured, values_of(module, captured, arguments))


@dataclass(frozen=True)
class _Rewritten:
    """One rewritten graph with what its inputs and outputs are; inputs of the model by name."""

    graph_module: fx.GraphModule
    inputs: tuple[InputRef, ...]
    outputs: tuple[OutputRef, ...]
    names: tuple[str, ...]
    parameters: frozenset[str]
    constants: Mapping[str, Tensor]

    def bound_to(self, module: nn.Module, *, compiled: bool) -> _Graph:
        """Ready to run with the parameters of a module."""
        function = torch.compile(self.graph_module, dynamic=False) if compiled else function_of(self.graph_module)
        return _Graph(self, function, module)


@dataclass(frozen=True)
class _Graph:
    """A rewritten graph that takes the model's inputs by name and its own by reference."""

    rewritten: _Rewritten
    function: Callable[..., Sequence[Tensor]]
    module: nn.Module

    def __call__(
        self, inputs: Inputs, given: Mapping[InputRef, Tensor], adapters: Mapping[str, Tensor] = NO_ADAPTERS
    ) -> dict[OutputRef, Tensor]:
        made = self.rewritten
        arguments = [
            self._value(made.names[ref.index], inputs, adapters) if isinstance(ref, Value) else given[ref]
            for ref in made.inputs
        ]
        with torch._C._DisableAutocast():  # its casts are part of the graph
            return dict(zip(made.outputs, self.function(*arguments), strict=True))

    def _value(self, name: str, inputs: Inputs, adapters: Mapping[str, Tensor]) -> Any:
        if name in adapters:
            return adapters[name]
        if name in self.rewritten.constants:
            return self.rewritten.constants[name]
        if name in self.rewritten.parameters:
            return _look_up(self.module, name).detach()
        return _look_up(inputs, name)


def _rewritten(
    capture: Capture,
    structure: ModelStructure,
    sites: Sequence[Site],
    step: LocalStep,
    returned: str,
    name: str,
    ranks: Mapping[str, int],
) -> _Rewritten:
    """The whole model as one segment, every site of which does the same; with LoRA weights of some ranks."""
    whole, live = outline_until(capture, structure, returned, sites)
    whole = with_adapters(whole, parameters_of(capture), ranks)
    settings = Settings.from_environment()
    segment, _ = rewrite(
        whole.segment,
        [step] * len(sites),
        frozenset({live}),
        PASSES,
        settings=settings,
        debug=DebugFolder(settings.debug),
        name=f"learn-{name}",
    )
    label = {
        node.name: item.name
        for node, item in zip(capture.graph.find_nodes(op="placeholder"), capture.inputs, strict=True)
    }
    return _Rewritten(
        graph_module=segment.graph_module,
        inputs=tuple(segment.inputs),
        outputs=tuple(Value(0) if isinstance(ref, Value) else ref for ref in segment.outputs),
        names=tuple(label.get(name, name) for name in whole.inputs),
        parameters=frozenset(item.name for item in capture.inputs if item.role is Role.PARAMETER),
        constants={
            item.name: value for item, value in zip(capture.inputs[::-1], capture.constants[::-1], strict=False)
        },
    )


def _output(capture: Capture) -> str:
    """Name of the first tensor that the model returns."""
    return next(result.name for result in results_of(capture.graph) if isinstance(result, fx.Node))


def _last_add(structure: ModelStructure) -> str:
    """Name of the stream after the last block."""
    return next(span.add for span in structure.spans if span.kind is SiteKind.STACK and span.is_last)


def _spans(structure: ModelStructure, kind: SiteKind) -> tuple[Site, ...]:
    return tuple(span for span in structure.spans if span.kind is kind)


def _slot(position: int) -> SlotRef:
    return SlotRef(position, SlotKind.VALUE)


def _look_up(root: Any, path: str) -> Any:
    """Follow a dotted path through mappings, attributes and lists."""
    for part in path.split("."):
        if isinstance(root, Mapping):
            root = root[part]
        else:
            root = getattr(root, part) if hasattr(root, part) else root[int(part)]
    return root
