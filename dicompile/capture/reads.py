"""What a forward reads of its module and beyond while it is run, written down as facts.

Dynamo knows what it read; Python does not. So while a module is run to capture it, every look-up of an attribute of a
module, and of the objects that it holds (processors, configurations), goes through a function that notes it, and a
profiling function notes which code ran, from which follows which globals it read. All of it only in the thread that
captures, and only until the capture is done. What Python itself calls in between (callbacks of the garbage collector,
finalizers) is no part of the forward.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import gc
import pickle
import random
import sys
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any
from unittest import mock

from torch import Tensor, nn

from dicompile.capture.captured import Changes, holds_tensor, is_equal_to
from dicompile.capture.guards import (
    ENVIRONMENT,
    FIXED,
    PARTS,
    PLAIN,
    By,
    Cell,
    Content,
    Fact,
    Path,
    Variable,
    Walk,
    find_place,
)
from dicompile.capture.homes import Homes
from dicompile.capture.names import OWN, Namespaces, imported, instructions_of, is_of_others, is_of_torch
from dicompile.config import READING_ENVIRONMENT
from dicompile.errors import CannotCapture
from dicompile.parked import seen_as
from dicompile.tensor_parallel import HOOKS

_CACHED = functools._lru_cache_wrapper
_ACCESS = frozenset(
    method.__code__
    for method in (
        nn.Module.__getattr__, nn.Module.__setattr__, nn.Module.__delattr__, nn.Module.register_buffer,
        nn.Module.register_parameter, nn.Module.add_module,
    )
)  # fmt: skip
"""How modules find, and check, one attribute in their dictionaries."""
_FINALIZERS = frozenset({weakref.finalize.__call__.__code__})
_MOST = 4096
"""Entries of a container that are compared; a larger one is refused."""
_LARGEST = 1 << 20
"""Bytes of an array that are compared."""


class Reads:
    """Notes what is read below a module.

    Args:
        module: the module.
        own: its parameters and buffers. One that the forward puts another in the place of before it reads that is no
            input of it.

    Attributes:
        facts: everything that was read, as it was then.
        tensors: tensors that were read, by their paths.
        modules: paths of the modules that were read.
    """

    def __init__(self, module: nn.Module, own: Mapping[Path, Tensor]) -> None:
        self.tensors: dict[Path, Tensor] = {}
        self._own = own
        self._looked_up: set[Path] = set()  # one by one; whoever lists all buffers does not compute with them
        self.modules: list[Path] = [Path()]
        self.facts: dict[Path, Fact] = {}
        self._module, self._homes = module, Homes(module)
        self._path_of: dict[int, Path] = {id(module): Path()}
        self._alive: list[object] = [module]  # ids are those of living objects
        self._changes: dict[int, Changes] = {}
        self._patched: list[type] = []
        self._codes: set[types.CodeType] = set()
        self._namespaces = Namespaces()
        self._namespaces.add(Path().via(By.TYPE), type(module))
        self._called: set[tuple[object, ...]] = set()
        self._functions: dict[types.CodeType, list[types.FunctionType]] = {}
        self._thread = threading.get_ident()
        self._is_busy = False
        self._was_busy = False
        self._stands_for: dict[int, Any] = {}
        self._finalizer: types.FrameType | None = None
        self._sources: dict[int, tuple[Path, Any, bytes]] = {}

    def drawn(self) -> list[str]:
        """Sources of random numbers, other than torch's, that were drawn from."""
        return [str(path) for path, source, state in self._sources.values() if pickle.dumps(source) != state]

    def kept(self) -> list[str]:
        """Where the forward put tensors that were not there."""
        for changes in self._changes.values():
            changes.put_back_equals()
        found = (change for changes in self._changes.values() for change in changes.found())
        return [text for text, value in found if holds_tensor(value)]

    def replaced(self) -> list[str]:
        """Tensors that were read and are others now; one of the same memory is put back (``self.f = self.f.to()``)."""
        walk, replaced = Walk(self._module), []
        for path in self._looked_up & self.tensors.keys():
            tensor, now = self.tensors[path], walk.find(path)
            if now is not tensor and not (is_equal_to(now, tensor) and walk.put(path, tensor)):
                replaced.append(str(path))
        return replaced

    @contextlib.contextmanager
    def uncached(self) -> Iterator[None]:
        """While open, functions under ``lru_cache`` compute: a tensor out of such a cache lies nowhere else."""
        classes = {cls for module in self._module.modules() for cls in type(module).__mro__}
        homes = {sys.modules.get(cls.__module__) for cls in classes}
        with contextlib.ExitStack() as stack:
            for holder in (*classes, *homes):
                if holder is None or getattr(holder, "__module__", holder.__name__).startswith(("torch", "builtins")):
                    continue
                for name, value in list(vars(holder).items()):
                    if isinstance(value, _CACHED):
                        self._stands_for[id(value.__wrapped__)] = value
                        stack.enter_context(mock.patch.object(holder, name, value.__wrapped__))
            yield

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """While open, this thread's reads are noted."""
        profile = sys.getprofile()
        self._functions = _closures()
        self._patch(nn.Module)
        fallback = nn.Module.__getattr__
        nn.Module.__getattr__ = self._fallback(fallback)  # type: ignore[method-assign]
        gc.callbacks.append(self._end_collection)  # first: a collection that ended unseen would leave us busy for good
        gc.callbacks.insert(0, self._begin_collection)
        sys.setprofile(self._profile)
        try:
            yield
            self._note_mentioned()
        finally:
            sys.setprofile(profile)
            gc.callbacks.remove(self._begin_collection)
            gc.callbacks.remove(self._end_collection)
            nn.Module.__getattr__ = fallback  # type: ignore[method-assign]
            for cls in self._patched:
                del cls.__getattribute__
            self._functions = {}

    def _patch(self, cls: type) -> None:
        if "__getattribute__" in vars(cls):
            return
        original: Callable[[Any, str], Any] = cls.__getattribute__  # type: ignore[assignment]

        def look_up(obj: Any, name: str) -> Any:
            is_ours = threading.get_ident() == self._thread and not self._is_busy
            try:
                value = original(obj, name)
            except AttributeError:
                if is_ours:
                    self._note_not_found(obj, name)
                raise
            if is_ours and sys._getframe(1).f_code not in _ACCESS:
                self._note_attribute(obj, name, value)
            return value

        cls.__getattribute__ = look_up  # type: ignore[method-assign,assignment]
        self._patched.append(cls)

    def _fallback(self, original: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
        """``nn.Module.__getattr__``: where parameters, buffers and children are found."""

        def look_up(obj: Any, name: str) -> Any:
            is_other = threading.get_ident() != self._thread or self._is_busy
            if is_other or sys._getframe(1).f_code in _ACCESS:
                return original(obj, name)
            self._is_busy = True
            try:
                value = original(obj, name)
            except AttributeError:
                self._note_absent(obj, name)
                raise
            finally:
                self._is_busy = False
            self._note_attribute(obj, name, value)
            return value

        return look_up

    def _note_attribute(self, obj: Any, name: str, value: Any) -> None:
        parent = self._path_of.get(id(obj))
        if parent is None or (name.startswith("__") and name not in ("__dict__",)):
            return
        self._is_busy = True
        try:
            if name == "__dict__":
                self._note_all(parent, value)
            elif name in PARTS:
                self._note_parts(parent, name, value)
            else:
                self._note_found(parent.attribute(name), obj, name, value)
        finally:
            self._is_busy = False

    def _note_found(self, path: Path, obj: Any, name: str, value: Any) -> None:
        place = find_place(obj, name)
        if place is None and isinstance(getattr(type(obj), name, None), property):
            return  # what it reads is noted
        self._watch(path.parent, obj)
        lies_there = value if place is None else place[0][place[1]]
        lies_there = self._stands_for.get(id(lies_there), lies_there)
        if lies_there is not value:  # a method of any kind
            self.facts[path] = Fact.of(path, lies_there)
            return
        self._note(path, value)
        if self._own.get(path, value) is value:
            self._looked_up.add(path)
        if place is None and path in self.facts:  # it may be made at every look-up
            self.facts[path] = Fact.of(path, value)

    def _note_not_found(self, obj: Any, name: str) -> None:
        """What is in no dictionary of an object: the class may still answer, where a module looks further by itself."""
        self._is_busy = True
        is_asked = not isinstance(obj, nn.Module) or type(obj).__getattr__ is not nn.Module.__getattr__
        if is_asked and find_place(obj, name) is None:
            self._note_absent(obj, name)
        self._is_busy = False

    def _note_absent(self, obj: Any, name: str) -> None:
        parent = self._path_of.get(id(obj))
        if parent is not None and not (name.startswith("__") and name.endswith("__")):
            path = parent.attribute(name)
            self.facts.setdefault(path, Fact(path, "absent"))

    def _note_all(self, parent: Path, own: Mapping[str, Any]) -> None:
        """All attributes of an object, of which somebody took the dictionary."""
        path = parent.via(By.DICT)
        self.facts.setdefault(path, Fact.of(path, own))
        for name, value in list(own.items()):
            if name in PARTS:
                self._note_parts(parent, name, value)
            else:
                self._note(parent.attribute(name), value)

    def _note_parts(self, parent: Path, name: str, parts: Any) -> None:
        """Children, parameters and buffers that are asked for all together, or hooks."""
        if name in ("_parameters", "_buffers", "_modules"):
            path = parent.attribute(name)
            self.facts.setdefault(path, Fact.of(path, parts))
            for key, part in parts.items():
                if part is not None:
                    self._note(parent.attribute(key), part)
        elif name in HOOKS:
            for number, hook in enumerate(hook for hook in parts.values() if seen_as(hook) is not None):
                self._note(parent.attribute(name).hook(number), hook)

    def _watch(self, path: Path, obj: Any) -> None:
        """Remember what lies in an object: its attributes, or else its entries."""
        own = getattr(obj, "__dict__", None)
        holder = own if isinstance(own, dict) else obj
        if id(holder) not in self._changes:
            self._changes[id(holder)] = Changes(str(path), holder)

    def _note(self, path: Path, value: Any, depth: int = 0) -> None:
        if path in self.facts or path in self.tensors:
            return
        if isinstance(value, Tensor):
            if self._own.get(path, value) is value:
                self.tensors[path] = value
            return
        value = self._stands_for.get(id(value), value)
        if isinstance(value, types.FunctionType) and value.__code__.co_filename.startswith(OWN):
            return  # it stands for another one while the module is run
        if not isinstance(value, (*PLAIN, *FIXED)) and self._path_of.get(id(value), path) != path:
            self.facts[path] = Fact(path, "same", self._path_of[id(value)])  # what is read of it is noted there
            return
        self.facts[path] = Fact.of(path, value)
        self._note_source(path, value)
        if isinstance(value, (*FIXED, types.MethodType)):
            self._note_fixed(path, value, depth)
        elif value is sys.modules:  # every import adds to it; libraries ask it which frameworks are there (einops)
            self.facts[path] = Fact(path, "fixed", value)
        elif not isinstance(value, PLAIN):
            self._note_inside(path, value, depth)

    def _note_fixed(self, path: Path, value: Any, depth: int) -> None:
        """What a method is bound to, what functions have as attributes, and what classes change."""
        if isinstance(value, types.MethodType):
            self._note(path.attribute("__self__"), value.__self__, depth + 1)
        elif isinstance(value, type) and not is_of_torch(value):
            self._watch(path, value)
            self._namespaces.add(path, value)
        elif isinstance(value, types.FunctionType) and not is_of_others(value.__code__.co_filename):
            for name, item in list(vars(value).items()):
                self._note(path.attribute(name), item, depth + 1)

    def _note_source(self, path: Path, value: Any) -> None:
        """Remember the state of what random numbers are drawn from, if a value is that, or a function of it."""
        source = getattr(value, "__self__", None) if isinstance(value, types.BuiltinFunctionType) else value
        is_source = isinstance(source, random.Random) or type(source).__module__.startswith("numpy.random")
        if is_source and id(source) not in self._sources:
            self._sources[id(source)] = path, source, pickle.dumps(source)

    def _note_inside(self, path: Path, value: Any, depth: int) -> None:
        self._alive.append(value)
        self._path_of.setdefault(id(value), path)
        self._namespaces.add(path.via(By.TYPE), type(value))
        if isinstance(value, nn.Module):
            self.modules.append(path)
        elif isinstance(value, (Mapping, list, tuple, set, frozenset, deque)):
            self._note_container(path, value, depth)
        else:
            self._note_object(path, value, depth)

    def _note_container(self, path: Path, value: Any, depth: int) -> None:
        if len(value) > _MOST or depth > 6:
            raise CannotCapture(
                f"{path} is too large to be compared at every call",
                where="capture",
                why=f"{len(value)} entries, or nested too deep",
                fix="keep numbers in a tensor that is registered as a buffer",
            )
        if isinstance(value, (dict, list, set, deque)):
            self._changes.setdefault(id(value), Changes(str(path), value))
        if isinstance(value, (Mapping, list, tuple, deque)):
            for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
                self._note(path.item(key), item, depth + 1)
        if hasattr(value, "__dict__"):
            self._patch_class_of(value)

    def _note_object(self, path: Path, value: Any, depth: int) -> None:
        if isinstance(value, weakref.ref):
            self.facts[path] = Fact(path, "fixed", value)
            self._note(_inside(path, "referent", value), value(), depth + 1)
            return
        if isinstance(value, functools.partial):
            for name in ("func", "args", "keywords"):
                self._note(path.attribute(name), getattr(value, name), depth + 1)
            return
        own = getattr(value, "__dict__", None)
        self._watch(path, value)
        if self._patch_class_of(value):
            return
        is_foreign = type(value).__module__.startswith(("torch", "functools"))
        holds_tensors = own is not None and any(isinstance(item, Tensor) for item in own.values())  # masks of blocks
        if own is None or depth > 6 or (is_foreign and not holds_tensors):
            self.facts[path] = Fact(path, "fixed", value)  # what it holds cannot be seen, but for memory
            with contextlib.suppress(TypeError, ValueError):
                self._note_memory(path, memoryview(value))
            return
        self.facts[path.via(By.DICT)] = Fact.of(path.via(By.DICT), own)
        for name, item in list(own.items()):  # its class is not ours to watch, so all of it is compared
            self._note(path.attribute(name), item, depth + 1)

    def _note_memory(self, path: Path, memory: memoryview) -> None:
        """Values of an array of another library, or of Python."""
        if memory.nbytes > _LARGEST:
            raise CannotCapture(
                f"{path} is too large to be compared at every call",
                where="capture",
                why=f"{memory.nbytes} bytes of values, which Python may read",
                fix="keep numbers in a tensor that is registered as a buffer",
            )
        self._note(_inside(path, "values", memory.tobytes), memory.tobytes())

    def _patch_class_of(self, value: Any) -> bool:
        """Note reads of objects of this class, if it can be done: one written in Python, outside of torch."""
        cls = type(value)
        is_python = bool(cls.__flags__ & (1 << 9)) and not cls.__module__.startswith("torch")
        if not is_python or "__getattribute__" in vars(cls):
            return is_python and cls in self._patched
        try:
            self._patch(cls)
        except TypeError:
            return False
        return True

    def _begin_collection(self, phase: str, _: Any) -> None:
        if phase == "start" and threading.get_ident() == self._thread:
            self._was_busy, self._is_busy = self._is_busy, True

    def _end_collection(self, phase: str, _: Any) -> None:
        if phase == "stop" and threading.get_ident() == self._thread:
            self._is_busy = self._was_busy

    def _profile(self, frame: types.FrameType, event: str, called: Any) -> None:
        if frame is self._finalizer and event == "return":
            self._finalizer, self._is_busy = None, False
        elif event == "call" and not self._is_busy:
            if frame.f_code.co_name == "__del__" or frame.f_code in _FINALIZERS:
                self._finalizer, self._is_busy = frame, True
            elif frame.f_code in READING_ENVIRONMENT:
                self._note_environment(frame)
            else:
                self._note_code(frame)
        elif event == "c_call" and not self._is_busy:
            holder = getattr(called, "__self__", None)
            if isinstance(holder, ContextVar) and not is_of_others(frame.f_code.co_filename):
                self._note_variable(holder)
            elif id(holder) in self._path_of and called.__name__ in ("__reduce_ex__", "__reduce__"):  # a copy of it
                self._note_attribute(holder, "__dict__", getattr(holder, "__dict__", {}))

    def _note_environment(self, frame: types.FrameType | None) -> None:
        """What environment variables hold, if it is not for torch or for Python itself that one is looked up."""
        while frame is not None and frame.f_globals.get("__name__") in ("os", "collections.abc", "_collections_abc"):
            frame = frame.f_back
        if frame is not None and not is_of_others(frame.f_code.co_filename):
            self._is_busy = True
            self._note(ENVIRONMENT, Walk(self._module).value(ENVIRONMENT))
            self._is_busy = False

    def _note_variable(self, variable: ContextVar[Any]) -> None:
        """What lies in a context variable, of which a method was called."""
        found = Variable(variable)
        self._note(found.path, found.contents())

    def _note_code(self, frame: types.FrameType) -> None:
        code = frame.f_code
        has_no_file = code.co_filename.startswith("<") and not code.co_filename.startswith("<frozen ")
        if not has_no_file and is_of_others(code.co_filename):
            return
        home = self._homes.find(frame.f_globals)
        if has_no_file and home is None:  # it was generated, and not typed into the session that classes are of
            _check_is_of_a_module(code, frame.f_globals)
            return
        is_busy, self._is_busy = self._is_busy, True
        try:
            if code not in self._codes:
                self._codes.add(code)
                names = frame.f_globals
                module = names.get("__name__", "")
                if home is None and module in sys.modules and vars(sys.modules[module]) is names:
                    home = Path(module)
                instructions = instructions_of(code)
                if home is not None:
                    self._note_names(instructions, home, names)
                for other in (module, *imported(instructions, names.get("__package__"))):
                    self._namespaces.add(Path(other), sys.modules.get(other))
            free = {name: frame.f_locals[name] for name in code.co_freevars if name in frame.f_locals}
            free.pop("__class__", None)
            called = (code, *map(id, free.values()))
            if free and called not in self._called:
                self._called.add(called)
                self._note_cells(code, free)
        finally:
            self._is_busy = is_busy

    def _note_names(self, instructions: Sequence[dis.Instruction], root: Path, names: dict[str, Any]) -> None:
        if any(instruction.opname == "STORE_GLOBAL" for instruction in instructions):
            self._changes.setdefault(id(names), Changes(str(root), names))
        for number, instruction in enumerate(instructions):
            if instruction.opname not in ("LOAD_GLOBAL", "LOAD_NAME") or instruction.argval not in names:
                continue
            name = instruction.argval
            path, value = root.item(name) if root.links else root.attribute(name), names[name]
            for following in instructions[number + 1 :]:
                self._note(path, value)
                is_namespace = isinstance(value, (types.ModuleType, type))
                if following.opname not in ("LOAD_ATTR", "LOAD_METHOD") or not is_namespace:
                    break
                place = find_place(value, following.argval)
                if place is None:
                    break
                path, value = path.attribute(following.argval), place[0][place[1]]

    def _note_mentioned(self) -> None:
        self._is_busy = True
        for path, value in self._namespaces.mentioned(self._codes):
            self._note(path, value)
        self._is_busy = False

    def _note_cells(self, code: types.CodeType, values: Mapping[str, Any]) -> None:
        """Variables of enclosing functions, of a function that is called with these."""
        for function in self._functions.get(code, ()):  # what the forward itself made is not there
            cells = _cells(function)
            held = {name: cell.cell_contents for name, cell in cells.items()}
            if held.keys() == values.keys() and all(held[name] is value for name, value in values.items()):
                for name, cell in cells.items():
                    path = Path(function.__module__, ((By.CELL, Cell(function.__qualname__, name, cell)),))
                    self._watch(path, cell)
                    self._note(path, values[name])
                return


def _inside(path: Path, name: str, contents: Callable[[], Any]) -> Path:
    """The path to what an object that is no Python holds."""
    return Path(path.root, (*path.links, (By.CELL, Content(name, contents))))


def _check_is_of_a_module(code: types.CodeType, names: dict[str, Any]) -> None:
    """Check that what has no file is no function with names that nobody can find.

    Raises:
        CannotCapture: it says that it is of a module, and is not.
    """
    called = names.get("__name__", "")
    if not called or called.startswith("namedtuple_") or vars(sys.modules.get(called, sys)) is names:
        return
    raise CannotCapture(
        f"{code.co_name} is a function of no module",
        where=f"capture, {code.co_filename}",
        why=f"it says that it is of {called}, whose names are others, so that what it reads cannot be found again",
        fix="define it in a Python module that is imported",
    )


def _closures() -> dict[types.CodeType, list[types.FunctionType]]:
    """Functions that there are, and that read variables of others around them, by their code."""
    found: dict[types.CodeType, list[types.FunctionType]] = {}
    for function in gc.get_objects():
        if type(function) is types.FunctionType and function.__closure__:
            found.setdefault(function.__code__, []).append(function)
    return found


def _cells(function: types.FunctionType) -> dict[str, types.CellType]:
    """Variables of enclosing functions that are not empty still."""
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    return {name: cell for name, cell in cells.items() if name != "__class__" and cell != types.CellType()}
