"""Captures as bytes, and back: what another process captured holds for a module of this one, or is not used.

What is written down is the functional graph, and everything that it depends on: the facts of its guards, with texts of
all functions and classes that they name, and texts of the Python modules whose code was traced. Whoever reads it walks
the same paths from the module at hand and compares the texts of what lies there now; out of what was found come guards
like any others. A capture of which one thing cannot be written down exactly stays in its process: one made by running
the model, one with hooks, with tensors of a class of its own, or with operators that torch's version does not settle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from dicompile.capture.arguments import Like, TakenOut
from dicompile.capture.captured import Captured, Pack
from dicompile.capture.guards import By, Fact, Guards, Path, Walk, code_of, keys_of, meta_of
from dicompile.capture.normalise import Capture
from dicompile.capture.plain import from_plain, graph_from_plain, graph_to_plain, to_plain
from dicompile.capture.roles import Input, Role
from dicompile.capture.sources import Sources
from dicompile.compat import tracer_settings
from dicompile.ops.registry import is_of_torch_or_ours, registered
from dicompile.store import Unwritable, device_text, key_of, packed, spelled, unpacked

_TENSORS = (Tensor, nn.Parameter)


def stored_under(key: tuple[object, ...]) -> str:
    """Under which key other processes find a capture.

    Args:
        key: class, what was said, arguments, state; see `dicompile.capture.shared.Captures`.

    Raises:
        Unwritable: it means something in this process only.
    """
    _check(not registered(), "what was said of operators")
    _check(not torch._C._len_torch_function_stack(), "a torch function mode")
    _check(not (torch.distributed.is_available() and torch.distributed.is_initialized()), "ranks")
    parts = list(_parts(key))
    _check(all(part.kind in _TENSORS for part in parts if isinstance(part, Like)), "a tensor of a class of its own")
    _check(not any(isinstance(part, str) and "TreeSpec(" in part for part in parts), "an object among the arguments")
    devices = {part.device for part in parts if isinstance(part, Like)}
    return key_of(key, tracer_settings(), frozenset(map(device_text, devices)))


def _parts(key: object) -> Any:
    yield key
    if isinstance(key, tuple) and not isinstance(key, Like):
        for part in key:
            yield from _parts(part)


def to_bytes(module: nn.Module, captured: Captured, capture: Capture) -> bytes:
    """A capture as bytes.

    Args:
        module: what was captured.
        captured: with its guards.
        capture: its functional graph.

    Raises:
        Unwritable: something about it cannot be written down.
    """
    guards, sources, walk = captured.guards, Sources(), Walk(module)
    _check(bool(captured.codes) and not captured.reads, "a model that was run")
    _check(not any(map(any, guards.hooks)), "hooks")
    _check(not any(guards.called), "a class of modules that are called in a way of their own")
    _check(all(meta[0] in _TENSORS for meta in guards.metas), "a tensor of a class of its own")
    for node in captured.graph.graph.nodes:
        _check(_is_of_torch(node), f"{node.target}")
    modules = sources.modules_of(captured.codes)
    head = {
        "class": sources.kind(type(module)),
        "modules": {name: sources.module(name) for name in modules},
        "facts": [_fact_to(fact, walk, sources) for fact in guards.facts],
        "tensors": [[_path_to(path), spelled(meta)] for path, meta in zip(guards.tensors, guards.metas, strict=True)],
        "same": guards.same,
        "ran": list(map(_path_to, guards.modules)),
        "names": captured.names,
        "order": captured.order,
        "pack": _pack_to(captured.pack, sources),
        "taken": [[to_plain(item.path), to_plain(item.kept)] for item in captured.taken_out],
        "graph": graph_to_plain(capture.graph),
        "inputs": [[item.name, item.role.name, item.is_signal] for item in capture.inputs],
    }
    constants = {
        f"{owner}{i}": tensor.contiguous() for owner, tensors in (("own", captured.constants), ("", capture.constants))
        for i, tensor in enumerate(tensors)
    }  # fmt: skip
    head["devices"] = {name: str(tensor.device) for name, tensor in constants.items()}
    return packed(head, {"constants": safetensors.torch.save(constants)})


def from_bytes(content: bytes, module: nn.Module) -> tuple[Captured, Capture] | None:
    """The reverse, for another module; None if it does not hold for that one.

    Args:
        content: of somebody who may say what this model does.
        module: the module.
    """
    head, parts = unpacked(content)
    try:
        guards = _guards_of(head, module)
        constants = safetensors.torch.load(parts["constants"])
        constants = {name: tensor.to(head["devices"][name]) for name, tensor in constants.items()}
        own = tuple(constants[f"own{i}"] for i in range(len(constants)) if f"own{i}" in constants)
        mode = FakeTensorMode(shape_env=ShapeEnv())
        capture = Capture(
            graph_module=graph_from_plain(head["graph"], mode),
            inputs=tuple(Input(name, Role[role], is_signal) for name, role, is_signal in head["inputs"]),
            fake_mode=mode,
            constants=tuple(constants[f"{i}"] for i in range(len(constants) - len(own))),
        )
        captured = Captured(
            graph=capture.graph_module,
            names=tuple((name, is_own) for name, is_own in head["names"]),
            order=tuple(head["order"]),
            constants=own,
            guards=guards,
            pack=_pack_of(head["pack"]),
            reads={},
            taken_out=tuple(TakenOut(from_plain(path), from_plain(kept)) for path, kept in head["taken"]),
        )
    except (_Differs, Unwritable, LookupError, AttributeError, TypeError, ValueError, RuntimeError):
        return None
    return captured, capture


class _Differs(Exception):
    """Something is not as it was."""


def _check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Unwritable(otherwise)


def _is_of_torch(node: fx.Node) -> bool:
    """True for what only torch's version decides: no function of somebody's that Dynamo did not look into."""
    if node.op in ("placeholder", "output", "call_method"):
        return True
    if node.op != "call_function":
        return False
    if isinstance(node.target, OpOverload):
        return is_of_torch_or_ours(node.target)
    home = getattr(node.target, "__module__", None) or type(getattr(node.target, "__self__", None)).__module__
    return home.split(".")[0] in ("torch", "_operator", "math", "builtins")


def _fact_to(fact: Fact, walk: Walk, sources: Sources) -> list[Any]:
    _check(fact.kind != "wrapped", "a tensor of a class of its own")
    if fact.kind == "absent":
        return [_path_to(fact.path), fact.kind]
    if fact.kind == "same":
        return [_path_to(fact.path), fact.kind, _path_to(fact.expected)]
    text = _text_of(fact.kind, walk.value(fact.path), sources)
    return [_path_to(fact.path), fact.kind, text]


def _text_of(kind: str, value: Any, sources: Sources) -> str:
    if kind in ("value", "fixed"):
        return sources.fixed(value)
    text = sources.kind(type(value))
    return f"{text} {spelled(keys_of(value))}" if kind == "container" else text


def _guards_of(head: Mapping[str, Any], module: nn.Module) -> Guards:
    walk, sources = Walk(module), Sources()
    _require(sources.kind(type(module)) == head["class"])
    for name, text in head["modules"].items():
        _require(sources.module(name) == text)
    facts = tuple(_fact_of(item, walk, sources) for item in head["facts"])
    tensors = tuple(_path_of(path) for path, _ in head["tensors"])
    metas = [meta_of(walk.value(path)) for path in tensors]
    _require([spelled(meta) for meta in metas] == [text for _, text in head["tensors"]])
    modules = tuple(map(_path_of, head["ran"]))
    guards = Guards(
        facts=facts,
        tensors=tensors,
        metas=tuple(metas),
        same=tuple((i, j) for i, j in head["same"]),
        modules=modules,
        hooks=tuple((0, 0) for _ in modules),
        called=tuple(() for _ in modules),
    )
    _require(not isinstance(guards.pin(module), str))
    return guards


def _fact_of(item: Sequence[Any], walk: Walk, sources: Sources) -> Fact:
    path, kind = _path_of(item[0]), item[1]
    if kind == "absent":
        return Fact(path, kind)
    if kind == "same":
        return Fact(path, kind, _path_of(item[2]))
    value = walk.value(path)
    _require(_text_of(kind, value, sources) == item[2])
    if kind == "container":
        return Fact(path, kind, (type(value), keys_of(value)))
    return Fact(path, kind, type(value) if kind == "object" else value, code_of(value))


def _require(holds: bool) -> None:
    if not holds:
        raise _Differs


def _path_to(path: Path) -> list[Any]:
    _check(all(by is not By.CELL for by, _ in path.links), f"{path}")
    return [path.root, *([by.name, to_plain(key)] for by, key in path.links)]


def _path_of(item: Sequence[Any]) -> Path:
    return Path(item[0], tuple((By[by], from_plain(key)) for by, key in item[1:]))


def _pack_to(pack: Pack, sources: Sources) -> list[Any]:
    places = [[is_given, to_plain(value)] for is_given, value in pack.places]
    try:
        text = pytree.treespec_dumps(pack.spec)
    except (NotImplementedError, TypeError) as error:
        raise Unwritable(str(error)) from error
    return [places, text, pack.is_tuple, _kinds_in(pack.spec, sources)]


def _pack_of(item: Sequence[Any]) -> Pack:
    places, text, is_tuple, kinds = item
    spec = pytree.treespec_loads(text)
    _require(_kinds_in(spec, Sources()) == kinds)
    return Pack(tuple((is_given, from_plain(value)) for is_given, value in places), spec, is_tuple)


def _kinds_in(spec: pytree.TreeSpec, sources: Sources) -> list[str]:
    own = [] if spec.type is None else [sources.kind(spec.type)]
    return [*own, *(text for child in spec.children() for text in _kinds_in(child, sources))]
