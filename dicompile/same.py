"""Equality that is asked for at every call, or stricter than Python's."""

from __future__ import annotations


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


def is_same_value(first: object, second: object) -> bool:
    """True for equal values of one type: 1, 1.0 and True are three, and so are 0.0 and -0.0."""
    if first is second:
        return True
    is_equal = type(first) is type(second) and (first == second or (first != first and second != second))  # noqa: PLR0124
    return is_equal and repr(first) == repr(second)
