"""A module in which some of those below it are others, for a trace that does not look into them.

The module itself is not changed: another thread may be running it. So what stands in for it is a shallow copy. Some
libraries put hooks around a forward by giving the module a function of its own, which calls the forward of the module
that it was given to (context parallelism of diffusers); the copy gets one that calls its own.
"""

from __future__ import annotations

import copy
import functools
import operator
import types
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn


def stand_in_for(module: nn.Module, others: Mapping[int, nn.Module]) -> nn.Module:
    """A shallow copy of a module in which some of those below it are others.

    Args:
        module: is not changed.
        others: what goes in the place of a module, by its id.
    """
    if id(module) in others:
        return others[id(module)]
    children = {name: child and stand_in_for(child, others) for name, child in module._modules.items()}
    if all(map(operator.is_, children.values(), module._modules.values())):
        return module
    made = shallow(module)
    vars(made)["_modules"] = children
    if "forward" in vars(made):
        vars(made)["forward"] = _bound_to(made, module, vars(module)["forward"])
    return made


def shallow(module: nn.Module) -> nn.Module:
    """A shallow copy of a module, whatever its class thinks of copies."""
    made = type(module).__new__(type(module))
    vars(made).update(vars(module))
    return made


def _bound_to(made: nn.Module, module: nn.Module, value: Any) -> Any:
    """What a callable would be if it had been made for another module; itself if it refers to no module.

    Args:
        made: the other module.
        module: in whose place it goes.
        value: the module, a method of it, a partial call, or a function around such or around an object that has them.
    """
    other: Callable[[Any], Any] = functools.partial(_bound_to, made, module)
    if value is module:
        return made
    if isinstance(value, types.MethodType):
        return types.MethodType(value.__func__, other(value.__self__)) if value.__self__ is module else value
    if isinstance(value, functools.partial):
        args, kwargs = map(other, value.args), {name: other(part) for name, part in value.keywords.items()}
        return functools.partial(other(value.func), *args, **kwargs)
    if not isinstance(value, types.FunctionType):
        return value
    before = [cell for cell in value.__closure__ or () if _is_filled(cell)]
    after = [_with_attributes(other, cell.cell_contents) for cell in before]
    if all(cell.cell_contents is part for cell, part in zip(before, after, strict=True)):
        return value
    cells = {id(cell): types.CellType(part) for cell, part in zip(before, after, strict=True)}
    closure = tuple(cells.get(id(cell), cell) for cell in value.__closure__ or ())
    function = types.FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, closure)
    function.__kwdefaults__ = value.__kwdefaults__
    return function


def _with_attributes(other: Callable[[Any], Any], value: Any) -> Any:
    """What a function closes over; of a plain object that has callables, a copy with those of the other module."""
    if callable(value) or isinstance(value, nn.Module) or not isinstance(getattr(value, "__dict__", None), dict):
        return other(value)
    changed = {name: other(part) for name, part in vars(value).items() if callable(part)}
    if all(vars(value)[name] is part for name, part in changed.items()):
        return value
    made = copy.copy(value)
    vars(made).update(changed)
    return made


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
