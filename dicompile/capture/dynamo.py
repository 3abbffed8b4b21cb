"""Capture by Dynamo: a forward becomes one graph without being run.

Dynamo is asked for the graph and for what it read on the way, and never again: nothing that it compiles is installed,
so that no look-up of its own decides at run time, and nothing of it stays behind.
"""

from __future__ import annotations

import contextlib
import dis
import logging
import re
import sys
import threading
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo import source as sources
from torch._dynamo.comptime import comptime
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from dicompile.capture.ambient import HOOKS_OF_ALL, entry_of, function_modes
from dicompile.capture.arguments import Arguments, TakenOut, Watched
from dicompile.capture.captured import Captured, Changes, Unsettled, holds_tensor, packer
from dicompile.capture.guards import (
    ENVIRONMENT,
    PARTS,
    By,
    Fact,
    Guards,
    Path,
    Variable,
    below,
    find_place,
    key_of_hook,
    python_module,
)
from dicompile.capture.homes import Homes
from dicompile.capture.names import Namespaces, is_of_others
from dicompile.capture.numbers import open_numbers
from dicompile.capture.wrapped import open_wrapped, take_apart
from dicompile.compat import (
    CLASSES_ARE_GUARDED,
    CONTEXT_VARIABLES,
    LOGGING_IS_LEFT_OUT,
    METHODS_ARE_GUARDED,
    MODES_ARE_TRACED,
    UNNAMED_SCOPE,
    DynamoCapture,
    dynamo_capture,
    noting_writes,
)
from dicompile.config import READING_ENVIRONMENT
from dicompile.errors import CannotCapture
from dicompile.parked import is_own_method
from dicompile.tensor_parallel import HOOKS
from dicompile.text import first_line

_CONTAINERS = ("DICT_KEYS_MATCH", "SEQUENCE_LENGTH", "DICT_CONTAINS", "DICT_NOT_CONTAINS", "SET_CONTAINS",
               "SET_NOT_CONTAINS", "MAPPING_KEYS_CHECK", "DICT_VERSION")  # fmt: skip
FUSED = "torch.backends.mha"
"""Whether torch may fuse a layer into one operator; off while a module is captured, and no matter afterwards."""
_AMBIENT = frozenset(Path("torch.nn.modules.module").attribute(name) for name in HOOKS_OF_ALL)
"""What is compared at every call as global state."""
_COUNTED = [((By.ATTRIBUTE, name),) for name in HOOKS]
"""Containers whose items `Guards` counts, without those that are uncovered; guards on them came with torch 2.14."""
_NAMED: dict[type, str] = {
    sources.TypeMROSource: "__mro__",
    sources.CodeSource: "__code__",
    sources.ClosureSource: "__closure__",
}
_MATCH_KEYS = dis.opmap["MATCH_KEYS"]
_NO_ATTRIBUTE = re.compile(r"'(\w+)' object has no attribute '(\w+)'")
_WHOLE = ("CONSTANT_MATCH", "EQUALS_MATCH", "ID_MATCH")


def capture_by_dynamo(module: nn.Module, arguments: Arguments) -> Captured:
    """Capture a module without running it; its tensors may be fake or on the meta device.

    Args:
        module: the module.
        arguments: of the call.

    Raises:
        CannotCapture: Dynamo cannot take the forward as one graph.
        Unsettled: the forward changes what it keeps.
    """
    return trace(module, arguments).captured(module, arguments)


@dataclass
class Traced:
    """What Dynamo makes of a forward.

    Attributes:
        graph: torch-level graph.
        guards: what Python read.
        own: tensors of the module that it read, by the guards' paths.
        inputs: values of the graph's placeholders.
        result: what the module returned.
        results: what the graph returned, as they lie in it.
        kept: where Python put tensors that were not there, or are of the graph; it is as it was before.
        taken_out: what the forward takes out of lists and dictionaries of its caller.
        writes: whether Python wrote to an object that was there before.
        codes: Python code that was traced.
    """

    graph: fx.GraphModule
    guards: Guards
    own: list[Tensor]
    inputs: list[Any]
    result: Any
    results: list[Tensor]
    kept: tuple[str, ...]
    taken_out: tuple[TakenOut, ...]
    writes: bool
    codes: frozenset[types.CodeType]

    def captured(self, module: nn.Module, arguments: Arguments) -> Captured:
        """The same as a capture.

        Args:
            module: what was traced.
            arguments: of the call.

        Raises:
            CannotCapture: it computes with a tensor of somebody else.
            Unsettled: the forward changes what it keeps.
        """
        _check_settled(module, self.guards, self.kept)
        tensors = [*self.own, *arguments.tensors]
        place = {id(tensor): i for i, tensor in reversed(list(enumerate(tensors)))}
        pack = packer(self.result, self.results, tensors)
        unknown = [value for value in self.inputs if id(value) not in place]
        if unknown or pack is None:
            raise CannotCapture(
                f"{type(module).__name__} computes with a {type(unknown[0] if unknown else self.result).__name__} that "
                "is neither its own nor given",
                where="capture",
                why="whether it is the same at the next call cannot be told",
                fix="make it a buffer, or pass it",
            )
        order = tuple(place[id(value)] for value in self.inputs)
        names = [*((p.name, True) for p in self.guards.tensors), *((name, False) for name in arguments.names(module))]
        return Captured(
            graph=self.graph,
            names=tuple(names[i] for i in order),
            order=order,
            constants=(),
            guards=self.guards,
            pack=pack,
            reads={},
            taken_out=self.taken_out,
            codes=self.codes,
        )


def trace(module: nn.Module, arguments: Arguments, stand_in: nn.Module | None = None) -> Traced:
    """Let Dynamo trace a forward.

    Args:
        module: the module, of which facts are read.
        arguments: of the call.
        stand_in: what is traced in its place: the same but for members with a forward that is not looked into.

    Raises:
        CannotCapture: Dynamo cannot take the forward as one graph.
    """
    homes = Homes(module)
    absent = next((name for name in homes.foreign if name not in sys.modules), None)
    if absent is not None:
        raise CannotCapture(
            f"{type(module).__name__} is of a module that is not there",
            where="capture",
            why=f"its functions say that they are of {absent}, and Dynamo looks there for what they read",
            fix="define its classes in a Python module that can be imported",
        )
    if not MODES_ARE_TRACED and any(function_modes()):
        raise CannotCapture(
            f"{type(module).__name__} is called within a torch function mode",
            where="capture",
            why=f"Dynamo of torch {torch.__version__} does not see what the mode does",
            fix="call it outside of the mode, or install torch 2.13 or later",
        )
    numbers = dict(zip(arguments.numbers, arguments.tensors[len(arguments.given) :], strict=True))
    args, kwargs = arguments.filled(arguments.given)  # lists and dictionaries of our own: the caller's stay as they are
    watched = Watched(args, kwargs)
    writes: list[tuple[Any, Any]] = []
    traced = _traced(entry_of(module), arguments.numbers, noting_writes(writes))
    with _clean_dynamo(capture_scalar_outputs=bool(numbers)), _errors_of(module):
        made = dynamo_capture(traced, (stand_in or module, args, kwargs, numbers))
    if numbers and made.decided:
        raise CannotCapture(
            f"{type(module).__name__} reads a number that differs at every step in Python",
            where="capture",
            why=f"its graph holds for {made.decided[0]} only",
            fix="pass a tensor",
        )
    open_numbers(made.graph)
    _refuse_reads(module, made.graph)
    read = _Read(module, made, homes)
    results = [torch.empty((), device="meta") for _ in range(made.results)]
    own, wrapped = take_apart({path: read.value(path) for path in read.tensors})
    guards = Guards.of(module, {**read.facts, **wrapped}, list(own), read.modules)
    changes = [Changes(path, container) for path, container in read.containers.items()]
    changes += [Changes(path, holder) for path, holder in read.written(writes)]
    (inputs, result), kept = _run(module, made, results, changes)
    taken_out = watched.taken_out(type(module).__name__)
    inputs = open_wrapped(made.graph, inputs, {id(read.value(path)) for path in read.tensors})
    own_tensors = list(own.values())
    return Traced(made.graph, guards, own_tensors, inputs, result, results, kept, taken_out, bool(writes), made.codes)


def _traced(entry: str, numbers: Sequence[str], at_the_end: Callable[[Any], None]) -> Callable[..., Any]:
    """What Dynamo traces: a function with globals of its own, in which it may leave what it likes."""
    function = _call_with_numbers if numbers else _call
    given = {"__builtins__": __builtins__, "comptime": comptime, "at_the_end": at_the_end, "entry": entry}
    return types.FunctionType(function.__code__, given, "call")


def _call(self: Any, args: Any, kwargs: Any, numbers: Any) -> Any:  # Dynamo names modules by this name
    result = getattr(self, entry)(*args, **kwargs)  # type: ignore[name-defined] # noqa: F821
    comptime(at_the_end)  # type: ignore[name-defined] # noqa: F821
    return result


def _call_with_numbers(self: Any, args: Any, kwargs: Any, numbers: Any) -> Any:
    values = {name: number.item() for name, number in numbers.items()}
    result = getattr(self, entry)(*args, **{**kwargs, **values})  # type: ignore[name-defined] # noqa: F821
    comptime(at_the_end)  # type: ignore[name-defined] # noqa: F821
    return result


@contextlib.contextmanager
def _clean_dynamo(*, capture_scalar_outputs: bool) -> Iterator[None]:
    """Settings of ours for one capture: fixed sizes, numbers of tensors as symbols, hooks looked at, no fake mode."""
    settings: Any = {
        "assume_static_by_default": True, "automatic_dynamic_shapes": False, "error_on_recompile": False,
        "capture_scalar_outputs": capture_scalar_outputs, "skip_nnmodule_hook_guards": False,
    }  # fmt: skip
    if LOGGING_IS_LEFT_OUT:
        settings["ignore_logging_functions"] = _logging_methods()
    with unset_fake_temporarily(), torch.no_grad(), torch._dynamo.config.patch(**settings):
        yield


def _logging_methods() -> set[Any]:
    """Methods of loggers, libraries' own ones among them (``warning_once``): what a forward logs is no computation."""
    return {method for name, method in vars(logging.Logger).items() if name.startswith(("debug", "info", "warning"))}


@contextlib.contextmanager
def _errors_of(module: nn.Module) -> Iterator[None]:
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as error:
        raise CannotCapture(
            f"{type(module).__name__} does not fit into one graph",
            where="capture",
            why=first_line(error),
            fix="move data-dependent Python out of its forward",
        ) from error


def _refuse_reads(module: nn.Module, graph: fx.GraphModule) -> None:
    """Refuse a graph in which Python reads values: what it does with them is not in it."""
    for node in graph.graph.nodes:
        if free_unbacked_symbols(node.meta.get("example_value")):
            name = getattr(node.target, "__name__", node.target)
            raise CannotCapture(
                f"{type(module).__name__} does not fit into one graph",
                where="capture",
                why=f"{name}() gives a number, or a size, that depends on values",
                fix="move data-dependent Python out of its forward",
            )


def _run(
    module: nn.Module, made: DynamoCapture, results: Sequence[Tensor], changes: Sequence[Changes]
) -> tuple[tuple[list[Any], Any], tuple[str, ...]]:
    """Run what Python does around a graph, with stand-ins for results of the graph, and let nobody keep one of these.

    Returns:
        The graph's inputs, and what the module returned; and where tensors were put.

    Raises:
        CannotCapture: Python looks into a result of the graph.
    """
    try:
        ran = made.run(results)
    except Exception as error:
        for change in changes:
            change.undo()
        raise CannotCapture(
            f"{type(module).__name__} reads what it computes in Python",
            where="capture",
            why=first_line(error),
            fix="move data-dependent Python out of its forward",
        ) from error
    kept = dict.fromkeys(text for change in changes for text, value in change.found() if holds_tensor(value))
    if kept:
        for change in changes:
            change.undo()
    return ran, tuple(kept)


def _check_settled(module: nn.Module, guards: Guards, kept: Sequence[str]) -> None:
    """Check that what Python did around the graph left what it reads as it was, and kept no tensor.

    Raises:
        Unsettled: it did not.
    """
    pins = guards.pin(module)
    changed = [*kept, *([pins] if isinstance(pins, str) else [])]
    if changed:
        raise Unsettled(changed)


class _Read:
    """What Dynamo's guards say was read, as facts about paths.

    Only the places matter: what lies there now is what was read. An argument is no place of ours; it is compared by
    `Arguments.key`.

    Attributes:
        facts: by path.
        tensors: paths of tensors.
        modules: paths of the modules that ran.
        containers: dictionaries and lists on the way, by the text of their path.
    """

    def __init__(self, module: nn.Module, made: DynamoCapture, homes: Homes) -> None:
        self.facts: dict[Path, Fact] = {}
        self.tensors: list[Path] = []
        self.modules: list[Path] = [Path()]
        self.containers: dict[str, Any] = {}
        self._aliases = made.aliases
        self._homes, self._foreign = homes, {path: called for called, path in homes.foreign.items()}
        self._values: dict[Path, Any] = {Path(): module}
        for source, kind, operand in made.guards:
            self._read(source, kind, operand)
        if not METHODS_ARE_GUARDED:
            self._read_methods()
        if not CLASSES_ARE_GUARDED:
            self._read_classes(made.codes)
        self._read_asked(made.codes)
        patterns = any(_MATCH_KEYS in code.co_code[::2] for code in made.codes)  # of which none has a guard, either
        for miss in [*made.misses, *([(KeyError, "")] if patterns else [])]:
            self._read_miss(*miss)
        if READING_ENVIRONMENT & made.codes:  # not all of what is looked up has a guard
            self._follow(ENVIRONMENT)
        self._values[Path("builtins")] = python_module("builtins")

    def value(self, path: Path) -> Any:
        """What lies at a path."""
        return self._values[path]

    def written(self, noted: Sequence[tuple[Any, Any]]) -> list[tuple[str, Any]]:
        """Objects of others than the caller that Python wrote to, with their places as text."""
        found = [(self._path(source), holder) for source, holder in noted if not isinstance(holder, Tensor)]
        return [(str(path), holder) for path, holder in found if path is not None]

    def _read(self, source: Any, kind: str, operand: Any) -> None:
        path = self._path(source)
        if path is None or path.root == FUSED or path in _AMBIENT:
            return
        value = self._follow(path)
        if kind in ("NOT_PRESENT_IN_GENERIC_DICT", "HASATTR"):
            self._read_attribute(path, value, operand)
        elif isinstance(value, Tensor):
            self.facts.pop(path, None)
            if path not in self.tensors:
                self.tensors.append(path)
        elif kind == "DUPLICATE_INPUT" and self._path(operand) is not None:
            self.facts[path] = Fact(path, "same", self._path(operand))
        elif kind in _CONTAINERS:
            if path.links[-1:] not in _COUNTED:
                self.facts[path] = Fact.of(path, value)
        elif kind in _WHOLE:
            self.facts |= {at: Fact.of(at, item) for at, item in below(path, value) if not isinstance(item, Tensor)}

    def _read_attribute(self, path: Path, value: Any, name: str) -> None:
        """A look-up that ended at the class (which holds a method, so that Dynamo takes it for granted), or nowhere."""
        attribute = path.attribute(name)
        place = find_place(value, name)
        if place is None:
            self.facts[attribute] = Fact(attribute, "absent")
        elif not isinstance(found := place[0][place[1]], Tensor):
            self.facts[attribute] = Fact.of(attribute, found)

    def _read_methods(self) -> None:
        """Methods that a module was given, whether they were called or not."""
        for path in self.modules:
            module = self._values[path]
            for name, value in vars(module).items():
                if isinstance(value, types.MethodType) and not is_own_method(module, value):
                    self.facts[path.attribute(name)] = Fact.of(path.attribute(name), value)

    def _read_miss(self, kind: type, said: str) -> None:
        """What code looked for, and did not find.

        Which dictionary or list it was is not said, so all of them have to be as long, and have the keys, as then.
        """
        named = _NO_ATTRIBUTE.search(said) if issubclass(kind, AttributeError) else None
        for path, value in list(self._values.items()):
            if issubclass(kind, LookupError) and isinstance(value, (Mapping, list)):
                self.facts[path] = Fact.of(path, value)
            elif named and type(value).__name__ == named[1] and find_place(value, named[2]) is None:
                self.facts[path.attribute(named[2])] = Fact(path.attribute(named[2]), "absent")

    def _read_asked(self, codes: Collection[types.CodeType]) -> None:
        """What code mentions and a module lacks, where its class was asked instead: ``__getattr__`` comes last."""
        names = sorted({name for code in codes for name in code.co_names if not name.startswith("__")})
        for path in self.modules:
            kind, module = type(self._values[path]), self._values[path]
            asked: Any = kind.__getattr__
            if asked is nn.Module.__getattr__ or getattr(asked, "__code__", None) not in codes:
                continue
            absent = (path.attribute(n) for n in names if not hasattr(kind, n) and find_place(module, n) is None)
            self.facts = {at: Fact(at, "absent") for at in absent} | self.facts

    def _read_classes(self, codes: Collection[types.CodeType]) -> None:
        """What classes of what was read have under a name that code mentions."""
        namespaces = Namespaces()
        for path, value in self._values.items():
            is_class = isinstance(value, type)
            namespaces.add(path if is_class else path.via(By.TYPE), value if is_class else type(value))
        for path, value in namespaces.mentioned(code for code in codes if not is_of_others(code.co_filename)):
            self.facts |= {at: Fact.of(at, item) for at, item in below(path, value) if not isinstance(item, Tensor)}

    def _follow(self, path: Path) -> Any:
        """The value at a path, a fact for every link of it."""
        if path in self._values:
            return self._values[path]
        if not path.links:
            self._values[path] = python_module(path.root)
            return self._values[path]
        parent = self._follow(path.parent)
        by, key = path.links[-1]
        value = self._step(path.parent, parent, by, key)
        if isinstance(value, threading.local) and not CLASSES_ARE_GUARDED:
            raise _unknown(path, "a threading.local, of which this torch reads the class")
        self._values[path] = value
        if isinstance(value, nn.Module) and path not in self.modules and path.root == "self":
            self.modules.append(path)
        is_simple = by in (By.ATTRIBUTE, By.ITEM, By.HOOK, By.CELL) and not isinstance(value, Tensor)
        if is_simple and key not in PARTS:
            fact = Fact.of(path, value)
            # Of a container only the type counts, until a guard is about its keys.
            self.facts[path] = Fact(path, "object", type(value)) if fact.kind == "container" else fact
        return value

    def _step(self, path: Path, parent: Any, by: By, key: Any) -> Any:
        if by is By.DICT:
            return vars(parent)
        if by is By.TYPE:
            return type(parent)
        if by is By.CELL:
            return key.contents()
        if by is By.HOOK:
            by, key = By.ITEM, key_of_hook(parent, key)
        place = (parent, key) if by is By.ITEM else find_place(parent, key)
        own = getattr(parent, "__dict__", None)
        if isinstance(own, dict) and not isinstance(parent, types.ModuleType):
            self.containers[str(path)] = own
        if place is None:
            return _attribute_of(parent, key)
        if isinstance(place[0], (dict, list)) and place[0] is not own and path.root == "self":
            self.containers[str(path) if by is By.ITEM else f"{path} ({key})"] = place[0]
        return place[0][key]

    def _path(self, source: Any) -> Path | None:
        """Where a source of Dynamo's is found; None for arguments, and for what is no object."""
        if isinstance(source, sources.LocalSource):
            return Path() if source.local_name == "self" else None
        if isinstance(source, sources.GlobalSource):
            return self._root(source.global_name)
        if not hasattr(source, "base"):
            return None
        is_item = isinstance(source, (sources.DictGetItemSource, sources.DictSubclassGetItemSource))
        of_class = is_item and isinstance(source.base, sources.TypeDictSource)
        base = self._path(source.base.base if of_class else source.base)
        if base is None:
            return None
        if isinstance(source, CONTEXT_VARIABLES):
            return self._variable(base, source)
        return base.attribute(source.index) if of_class else self._link(base, source)

    def _link(self, base: Path, source: Any) -> Path | None:
        if isinstance(source, (sources.AttrSource, sources.GenericAttrSource)):
            return self._attribute(base, source.member)
        if isinstance(source, sources.ConstDictKeySource):
            if base.links[-1:] not in _COUNTED:
                self.facts[base] = Fact.of(base, self._follow(base))
            return None
        if isinstance(source, (sources.DictGetItemSource, sources.DictSubclassGetItemSource, sources.GetItemSource)):
            return self._item(base, source)
        if isinstance(source, sources.DefaultsSource):
            return base.attribute(source.field).item(source.idx_key)
        if isinstance(source, (sources.TypeSource, *_NAMED)):
            return base.via(By.TYPE) if isinstance(source, sources.TypeSource) else base.attribute(_NAMED[type(source)])
        if isinstance(source, (sources.NNModuleSource, sources.TypeDictSource, sources.SubclassAttrListSource)):
            return base
        raise _unknown(base, f"Dynamo calls it a {type(source).__name__}, which dicompile does not know")

    def _variable(self, base: Path, source: Any) -> Path:
        """What lies in the context variable at a path."""
        return Variable(self._follow(base), (source.default_value,) if source.has_default else ()).path

    def _attribute(self, base: Path, name: str) -> Path:
        if name == "__dict__":
            return base.via(By.DICT)
        if base in self._foreign:
            return self._global(self._foreign[base], base, name)
        if name in ("__func__", "__self__") and isinstance(self._follow(base), types.FunctionType):
            return base if name == "__func__" else base.parent  # a method lies in its class as a function
        return base.attribute(name)

    def _global(self, called: str, home: Path, name: str) -> Path:
        """A name of a namespace that is not that of the module by whose name it goes, which Dynamo takes for it.

        Raises:
            CannotCapture: it is a name of both, for other things.
        """
        names, others = self._follow(home), vars(python_module(called))
        if name in names and name in others and names[name] is not others[name]:
            raise CannotCapture(
                f"whose {name} the forward reads cannot be told",
                where="capture",
                why=f"a class says that it is of {called}, which is another module that has a {name}, too",
                fix="define its classes in a Python module that can be imported",
            )
        return home.item(name) if name in names else Path(called).attribute(name)

    def _item(self, base: Path, source: Any) -> Path:
        index, is_hook = source.index, base.links[-1:] in _COUNTED
        if isinstance(index, sources.ConstDictKeySource):
            if is_hook:
                return base.hook(index.index)
            self.facts[base] = Fact.of(base, self._follow(base))
            index = list(self._follow(base))[index.index]
        if is_hook:
            return base.hook(list(self._follow(base)).index(index))
        return base.item(index) if not getattr(source, "index_is_slice", False) else base

    def _root(self, name: str) -> Path | None:
        if name.startswith("__builtins_dict__"):
            return Path("builtins").via(By.DICT)
        if unnamed := UNNAMED_SCOPE.match(name):
            return self._homes.path_of(int(unnamed[1]))
        if name not in self._aliases:
            return None
        called = self._aliases[name]
        return next((path for path, other in self._foreign.items() if other == called), Path(called))


def _unknown(path: Path, why: str) -> CannotCapture:
    return CannotCapture(
        f"what the forward reads of {path} cannot be told",
        where="capture",
        why=why,
        fix="keep it in an attribute of the module, as a number, a text, a list or a dictionary",
    )


def _attribute_of(parent: Any, name: str) -> Any:
    """An attribute that lies in no dictionary.

    Raises:
        CannotCapture: there is none, though the forward has read it.
    """
    try:
        return getattr(parent, name)
    except AttributeError as error:
        raise CannotCapture(
            f"a function that the forward calls reads {name}, which cannot be found again",
            where="capture",
            why=f"{error}: the function has names of its own, and says that they are of another module",
            fix="define the function in a Python module that is imported",
        ) from error
