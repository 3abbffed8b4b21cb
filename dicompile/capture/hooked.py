"""Forwards with hooks of diffusers around them: whether two of them do the same.

Guiders (`diffusers.guiders`) put hooks around blocks before one call of a step and take them off after it, new ones at
every step. A registry makes closures around a hook's methods, so that nothing of the next step's is what was there.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from dicompile.same import is_same_value

_MADE_BY = "diffusers.hooks."
_CHAIN = "fn_ref"
"""What a hook knows of those below it, which are compared where they are called."""


def do_the_same(first: object, second: object) -> bool:
    """True for one and the same function, and for two that registries made of hooks with equal attributes.

    Args:
        first: a function, a method or a partial call.
        second: another one.
    """
    if first is second:
        return True
    if type(first) is not type(second):
        return False
    if isinstance(first, types.MethodType) and isinstance(second, types.MethodType):
        return first.__func__ == second.__func__ and _are_alike(first.__self__, second.__self__)
    if isinstance(first, functools.partial) and isinstance(second, functools.partial):
        ours, theirs = ((call.args, call.keywords) for call in (first, second))
        return do_the_same(first.func, second.func) and _are_equal(ours, theirs)
    if isinstance(first, types.FunctionType) and isinstance(second, types.FunctionType):
        is_made = first.__module__.startswith(_MADE_BY) and first.__code__ is second.__code__
        return is_made and all(map(_hold_the_same, first.__closure__ or (), second.__closure__ or ()))
    return False


def _hold_the_same(first: types.CellType, second: types.CellType) -> bool:
    return _are_alike(first.cell_contents, second.cell_contents)


def _are_alike(first: Any, second: Any) -> bool:
    """True for one object, and for two of a class of diffusers' hooks whose attributes are the same."""
    if first is second:
        return True
    if type(first) is not type(second) or not type(first).__module__.startswith(_MADE_BY):
        return False
    ours, theirs = ({k: v for k, v in vars(each).items() if k != _CHAIN} for each in (first, second))
    return ours.keys() == theirs.keys() and all(_are_equal(ours[key], theirs[key]) for key in ours)


def _are_equal(first: Any, second: Any) -> bool:
    if isinstance(first, (tuple, list)) and type(first) is type(second):
        return len(first) == len(second) and all(map(_are_equal, first, second))
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_are_equal(first[key], second[key]) for key in first)
    if isinstance(first, (bool, int, float, str, type(None))):
        return is_same_value(first, second)
    return do_the_same(first, second) or _are_alike(first, second)
