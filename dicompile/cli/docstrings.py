"""What docstrings in Google's form say, so that commands explain options and fields in no second set of words."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

_SECTION = re.compile(r"^(Args|Attributes|Reference|Raises|Returns):$")
_ENTRY = re.compile(r"^    (\**\w+): (.*)$")
_ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})")


def summary(thing: Any) -> str:
    """Its first line."""
    return (inspect.getdoc(thing) or "").partition("\n")[0]


def description(thing: Any) -> str:
    """What comes before the first section, a paragraph a line."""
    paragraphs = "\n".join(_sections(thing).get("", [])).strip().split("\n\n")
    return "\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def reference(thing: Any) -> str:
    """Where it was published, as one line; empty if it says nothing."""
    return " ".join(" ".join(_sections(thing).get("Reference", [])).split())


def citation(thing: Any) -> str:
    """The arXiv number of that, or as much as there is."""
    match = _ARXIV.search(reference(thing))
    return match[0] if match else reference(thing)


def entries(thing: Any, section: str = "Attributes") -> dict[str, str]:
    """What a section says of every name in it, a line each."""
    found: dict[str, str] = {}
    name = ""
    for line in _sections(thing).get(section, []):
        match = _ENTRY.match(line)
        if match:
            name, text = match.groups()
            found[name] = text
        elif name and line.strip():
            found[name] += " " + line.strip()
    return found


def all_entries(cls: type) -> dict[str, str]:
    """Attributes of a class and of those that it inherits from."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        if "__doc__" in vars(base):
            found |= entries(_Doc(vars(base)["__doc__"] or ""))
    return found


class _Doc:
    """Something with a docstring of its own, not an inherited one."""

    def __init__(self, text: str) -> None:
        self.__doc__ = text


def _sections(thing: Callable[..., Any] | _Doc) -> dict[str, list[str]]:
    """Lines of a docstring by section; those before the first one under an empty name."""
    sections: dict[str, list[str]] = {"": []}
    current = ""
    for line in (inspect.getdoc(thing) or "").splitlines():
        match = _SECTION.match(line)
        if match:
            current = match[1]
            sections[current] = []
        else:
            sections[current].append(line)
    return sections
