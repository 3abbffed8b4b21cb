"""Compiled code that serves many sizes: the first ones by code for just these, all others by one with symbols.

A segment is made for the sizes of one capture, so its graph is full of numbers: in the shapes of what comes in, and in
``view``, ``expand`` or ``slice``. Two segments that differ in nothing else are one *form* with other numbers. From the
numbers that were seen, those that vary become symbols, or sums and products of symbols::

    %3: f32[2,1024,96] = aten.view.default(%2, [2, 1024, 96])       numbers (2, 1024, 96, ...)
    %3: f32[2,256,96] = aten.view.default(%2, [2, 256, 96])         numbers (2, 256, 96, ...)
    %3: f32[2,s0,96] = aten.view.default(%2, [2, %s0, 96])          one for both

Nothing about it is a guess in the end. Code with symbols serves a segment if its numbers, put in for the symbols, give
every number of that segment, and if everything holds that was taken for granted while it was compiled (the guards of
torch's ``ShapeEnv``). Otherwise that segment gets code of its own.
"""

from __future__ import annotations

import itertools
import logging
import math
import operator
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from dicompile.compat import lazy_graph_module
from dicompile.latest import Latest
from dicompile.lower.artifact import Bound
from dicompile.nodes import results_of
from dicompile.text import first_line, layout_text

log = logging.getLogger("dicompile")

Code = Callable[..., Sequence[Any]]
Compile = Callable[[fx.GraphModule, Sequence[Any], FakeTensorMode], Code]
Numbers = tuple[int, ...]

MOST_FORMS = 1024
MOST_SYMBOLIC = 4
"""Codes with symbols of one form; where these do not suffice, the form depends on its sizes."""
_SAMPLES = 4
_HOLE = "#"
_RANGES = "aten::arange"
"""Operators whose sizes come as numbers of any kind."""


@dataclass(frozen=True)
class Form:
    """A graph without its sizes, and the sizes.

    Attributes:
        key: equal for graphs that differ in sizes only.
        numbers: the sizes: of inputs and their strides, and in the arguments of calls, in order.
        dims: positions of those that are a size of an input.
    """

    key: Hashable
    numbers: Numbers
    dims: tuple[int, ...]

    @classmethod
    def of(cls, graph: fx.Graph, fixed: Collection[fx.Node] = ()) -> Form:
        """The form of a graph with ``meta["val"]``; the sizes of its `fixed` inputs are part of it."""
        numbers: list[int] = []
        dims: list[int] = []
        place = {node: i for i, node in enumerate(graph.nodes)}
        lines: list[Hashable] = []

        def hole(number: int) -> str:
            numbers.append(number)
            return _HOLE

        for node in graph.nodes:
            value = node.meta.get("val")
            if node in fixed:
                lines.append(layout_text(value))
            elif node.op == "placeholder" and isinstance(value, Tensor):
                dims += range(len(numbers), len(numbers) + value.ndim)
                sizes = [_number(size, hole) for size in (*value.shape, *value.stride())]
                lines.append((type(value).__name__, value.dtype, value.device, tuple(sizes)))
            elif node.op == "placeholder":
                lines.append(type(value).__name__)
            elif node.op == "output":
                lines.append(tuple(place.get(result, result) for result in results_of(graph)))
            else:
                spelled = tuple(
                    (name, _spelled(part, hole if is_size else None, place)) for name, part, is_size in _arguments(node)
                )
                lines.append((node.target, spelled))
        return cls(tuple(lines), tuple(numbers), tuple(dims))


def _number(value: Any, hole: Callable[[int], str]) -> str:
    return hole(value) if isinstance(value, int) else "symbol"


def _arguments(node: fx.Node) -> Iterator[tuple[str, Any, bool]]:
    """Name and value of every argument of a call, and whether it is a size."""
    if not isinstance(node.target, OpOverload):
        is_arithmetic = node.target in (operator.add, operator.mul)
        yield from ((str(i), part, is_arithmetic) for i, part in enumerate(node.args))
        yield from ((name, part, False) for name, part in sorted(node.kwargs.items()))
        return
    types = {argument.name: argument.real_type for argument in node.target._schema.arguments}
    is_range = node.target.name().startswith(_RANGES)
    for name, part in [*zip(types, node.args, strict=False), *sorted(node.kwargs.items())]:
        yield name, part, _is_size(types[name]) or (is_range and types[name].kind() == "NumberType")


def _is_size(kind: Any) -> bool:
    """True for an argument that may be a symbolic int, a list of such, or none."""
    while kind.kind() in ("OptionalType", "ListType"):
        kind = kind.getElementType()
    return bool(kind.kind() == "SymIntType")


def _spelled(part: Any, hole: Callable[[int], str] | None, place: dict[fx.Node, int]) -> Hashable:
    if isinstance(part, fx.Node):
        return f"%{place[part]}"
    if isinstance(part, (list, tuple)):
        return tuple(_spelled(item, hole, place) for item in part)
    if hole is not None and type(part) is int:
        return hole(part)
    return type(part).__name__, repr(part)


@dataclass(frozen=True)
class Term:
    """A size as an expression of symbols: ``factor * s_i * s_j ... + offset``, or a sum of two symbols.

    Attributes:
        factor: see above.
        product: numbers of the symbols that are multiplied.
        offset: see above.
        plus: number of a symbol that is added.
    """

    factor: int = 1
    product: tuple[int, ...] = ()
    offset: int = 0
    plus: int | None = None

    def of(
        self,
        symbols: Sequence[Any],
        multiply: Callable[[Any, Any], Any] = operator.mul,
        add: Callable[[Any, Any], Any] = operator.add,
    ) -> Any:
        """The value for those of the symbols: ints, symbolic ints, or nodes."""
        if not self.product:
            return self.factor
        value = symbols[self.product[0]]
        for i in self.product[1:]:
            value = multiply(value, symbols[i])
        if self.factor != 1:
            value = multiply(value, self.factor)
        if self.plus is not None:
            value = add(value, symbols[self.plus])
        return add(value, self.offset) if self.offset else value


@dataclass(frozen=True)
class Pattern:
    """How the numbers of a form follow from a few symbols.

    Attributes:
        terms: for every number.
        defined: for every symbol, the position of a number that is it.
    """

    terms: tuple[Term, ...]
    defined: tuple[int, ...]

    @classmethod
    def of(cls, samples: Sequence[Numbers], dims: Sequence[int]) -> Pattern:
        """The pattern of some numbers; sizes of inputs are taken for symbols first, the small ones first of all."""
        columns = list(zip(*samples, strict=True))
        symbols: list[tuple[int, ...]] = []
        defined: list[int] = []
        terms: dict[tuple[int, ...], Term] = {}
        of_inputs = sorted(set(dims), key=lambda i: columns[i])
        for i in [*of_inputs, *range(len(columns))]:
            column = columns[i]
            if column not in terms:
                term = Term(column[0]) if len(set(column)) == 1 else _term(column, symbols)
                if term is None:
                    term = Term(product=(len(symbols),))
                    symbols.append(column)
                    defined.append(i)
                terms[column] = term
        return cls(tuple(terms[column] for column in columns), tuple(defined))

    def symbols(self, numbers: Numbers) -> Numbers | None:
        """Values of the symbols that give some numbers; None if none do."""
        values = tuple(numbers[i] for i in self.defined)
        given = zip(self.terms, numbers, strict=True)
        return values if all(term.of(values) == number for term, number in given) else None


def _term(column: tuple[int, ...], symbols: Sequence[tuple[int, ...]]) -> Term | None:
    """A column of numbers as an expression of columns of symbols; None if it is none that is known."""
    for count in (1, 2, 3):
        for chosen in itertools.combinations_with_replacement(range(len(symbols)), count):
            products = [math.prod(symbols[i][row] for i in chosen) for row in range(len(column))]
            factor = column[0] // products[0]
            if factor and all(product * factor == number for product, number in zip(products, column, strict=True)):
                return Term(factor, chosen)
    for first, second in itertools.combinations(range(len(symbols)), 2):
        sums = map(sum, zip(symbols[first], symbols[second], strict=True))
        if tuple(sums) == column:
            return Term(product=(first,), plus=second)
    for i, symbol in enumerate(symbols):
        offsets = {number - value for number, value in zip(column, symbol, strict=True)}
        if len(offsets) == 1:
            return Term(product=(i,), offset=offsets.pop())
    return None


@dataclass(frozen=True)
class _Symbolic:
    """Code with symbols, and for which values of them it holds."""

    pattern: Pattern
    code: Code
    names: tuple[Any, ...]
    shapes: ShapeEnv

    def bound(self, numbers: Numbers) -> Code | None:
        """The code for some numbers; None if it does not hold for them."""
        values = self.pattern.symbols(numbers)
        if values is None:
            return None
        known = dict(zip(self.names, values, strict=True))
        for guard in self.shapes.guards:
            # A guard on token counts, which are symbols at any size, says nothing about sizes.
            if guard.expr.free_symbols <= known.keys() and not bool(guard.expr.xreplace(known)):
                return None
        return Bound(self.code, values)


@dataclass
class _Family:
    """What was compiled of one form."""

    fixed: dict[Numbers, Code] = field(default_factory=dict)
    symbolic: list[_Symbolic] = field(default_factory=list)
    samples: list[Numbers] = field(default_factory=list)

    def find(self, numbers: Numbers) -> Code | None:
        """Code that holds for some numbers."""
        if numbers in self.fixed:
            return self.fixed[numbers]
        return next(filter(None, (made.bound(numbers) for made in self.symbolic)), None)

    def note(self, numbers: Numbers) -> None:
        """Note numbers that there are."""
        if numbers not in self.samples:
            self.samples = [*self.samples[1 - _SAMPLES :], numbers]

    def pattern(self, form: Form) -> Pattern | None:
        """A pattern for what was seen, and another form; None where code of its own is better.

        Sizes of 0 and 1 mean something else to many operators, so that they are no values of symbols.
        """
        if len(self.symbolic) == MOST_SYMBOLIC:
            return None
        new = form.numbers
        alike = [
            old for old in self.samples
            if all(a == b or min(a, b) > 1 for a, b in zip(old, new, strict=True))
        ]  # fmt: skip
        return Pattern.of([new, *alike[-_SAMPLES:]], form.dims) if alike else None


class Sizes:
    """Codes of the process by form.

    Args:
        most: number of forms that are kept.
    """

    def __init__(self, most: int = MOST_FORMS) -> None:
        self._families: Latest[_Family] = Latest(most)

    def code(
        self,
        graph_module: fx.GraphModule,
        mode: FakeTensorMode,
        how: Hashable,
        compile_: Compile,
        fixed: Collection[fx.Node] = (),
        *,
        is_static: bool = False,
    ) -> Code:
        """Compiled code for a graph, its sizes included.

        Args:
            graph_module: with ``meta["val"]``.
            mode: of these values.
            how: whatever else decides what is made of a graph.
            compile_: compiles a graph for examples of its inputs, which are of the mode that it is given.
            fixed: inputs whose sizes never vary: the parameters of the model.
            is_static: no size may be a symbol.
        """
        form = Form.of(graph_module.graph, fixed)
        family = self._family(form, how)
        found = family.fixed.get(form.numbers) if is_static else family.find(form.numbers)
        if found is not None:
            return found
        made = None if is_static else self._symbolic(family, form, graph_module, compile_, fixed)
        if made is None:
            inputs = graph_module.graph.find_nodes(op="placeholder")
            made = compile_(graph_module, [node.meta["val"] for node in inputs], mode)
            family.fixed[form.numbers] = made
        family.note(form.numbers)
        return made

    def note(self, graph_module: fx.GraphModule, how: Hashable, fixed: Collection[fx.Node] = ()) -> None:
        """Note the sizes of a graph that is not compiled, so that the first code of its form has symbols."""
        form = Form.of(graph_module.graph, fixed)
        self._family(form, how).note(form.numbers)

    def _family(self, form: Form, how: Hashable) -> _Family:
        return self._families.get((form.key, how)) or self._families.put((form.key, how), _Family())

    def _symbolic(
        self,
        family: _Family,
        form: Form,
        graph_module: fx.GraphModule,
        compile_: Compile,
        fixed: Collection[fx.Node],
    ) -> Code | None:
        pattern = family.pattern(form)
        if pattern is None:
            return None
        try:
            symbolic = _compiled(pattern, form, graph_module, compile_, fixed)
        except Exception as error:  # torch refuses symbols in many ways; code for just these sizes it must take
            log.info("no code for other sizes, too: %s", first_line(error))
            return None
        family.symbolic.append(symbolic)
        return symbolic.bound(form.numbers)

    def copy(self) -> Sizes:
        """The same, to try out what would be compiled next."""
        made = Sizes(self._families.most)
        for key, family in self._families.items():
            made._families.put(key, _Family(dict(family.fixed), list(family.symbolic), list(family.samples)))
        return made

    def clear(self) -> None:
        """Forget all of them."""
        self._families.clear()


def _compiled(
    pattern: Pattern, form: Form, graph_module: fx.GraphModule, compile_: Compile, fixed: Collection[fx.Node]
) -> _Symbolic:
    shapes = ShapeEnv(duck_shape=False)
    mode = FakeTensorMode(shape_env=shapes)
    values = [_symbol(mode, form.numbers[i]) for i in pattern.defined]
    made = _Rewrite(graph_module.graph, pattern, values, mode, fixed).graph_module(graph_module)
    inputs = made.graph.find_nodes(op="placeholder")
    code = compile_(made, [node.meta["val"] for node in inputs], mode)
    return _Symbolic(pattern, code, tuple(value.node.expr for value in values), shapes)


def _symbol(mode: FakeTensorMode, example: int) -> torch.SymInt:
    context: StatelessSymbolicContext[..., Any] = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    made: Any = mode.from_tensor(torch.empty(example, device="meta"), symbolic_context=context).shape[0]
    return made  # type: ignore[no-any-return]


class _Rewrite:
    """A copy of a graph with symbols for the numbers that vary, which are inputs after all others.

    Args:
        graph: the original.
        pattern: of its numbers.
        values: of the symbols.
        mode: of these.
        fixed: inputs whose sizes stay.
    """

    def __init__(
        self,
        graph: fx.Graph,
        pattern: Pattern,
        values: Sequence[torch.SymInt],
        mode: FakeTensorMode,
        fixed: Collection[fx.Node],
    ) -> None:
        self._source, self._values, self._mode, self._fixed = graph, values, mode, fixed
        self._terms = iter(pattern.terms)
        self._graph = fx.Graph()
        self._copies: dict[fx.Node, fx.Node] = {}
        self._sizes: dict[Term, Any] = {}
        self._symbols: list[fx.Node] = []

    def graph_module(self, root: fx.GraphModule) -> fx.GraphModule:
        """The copy."""
        for node in self._source.find_nodes(op="placeholder"):
            self._copies[node] = self._graph.placeholder(node.name)
            self._copies[node].meta["val"] = self._input(node)
        for i, value in enumerate(self._values):
            self._symbols.append(self._graph.placeholder(f"size_{i}"))
            self._symbols[-1].meta["val"] = value
        for node in self._source.nodes:
            if node.op == "output":
                self._graph.output([self._copies[result] for result in results_of(self._source)])
            elif node.op != "placeholder":
                filled = {name: self._filled(part, is_size=is_size) for name, part, is_size in _arguments(node)}
                parts = list(filled.values())
                args, kwargs = tuple(parts[: len(node.args)]), {name: filled[name] for name in node.kwargs}
                self._copies[node] = self._graph.call_function(node.target, args, kwargs)
        return lazy_graph_module(root, self._graph)

    def _input(self, node: fx.Node) -> Any:
        value = node.meta["val"]
        if not isinstance(value, Tensor):
            return _symbol(self._mode, value.node.hint)
        sizes: list[Any] = [*value.shape, *value.stride()]
        if node not in self._fixed:
            sizes = [next(self._terms).of(self._values) for _ in sizes]
        with self._mode:
            return torch.empty_strided(sizes[: value.ndim], sizes[value.ndim :], dtype=value.dtype, device=value.device)

    def _filled(self, part: Any, *, is_size: bool) -> Any:
        if isinstance(part, fx.Node):
            return self._copies[part]
        if isinstance(part, (list, tuple)):
            return type(part)(self._filled(item, is_size=is_size) for item in part)
        return self._size(next(self._terms)) if is_size and type(part) is int else part

    def _size(self, term: Term) -> Any:
        if term not in self._sizes:
            multiply, add = self._calling(operator.mul), self._calling(operator.add)
            self._sizes[term] = term.of(self._symbols, multiply, add)
        return self._sizes[term]

    def _calling(self, target: Callable[[Any, Any], Any]) -> Callable[[Any, Any], fx.Node]:
        return lambda *numbers: self._graph.call_function(target, numbers)
