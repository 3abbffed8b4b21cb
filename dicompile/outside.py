"""Files that somebody else may have written: data alone, of limited size, with one error for whatever is wrong.

Nothing in them is executed. Parsers of YAML, JSON and pickles raise what they like on damaged text, recurse as deep as
it says, and make large values of few bytes (aliases, views of one number); here all of that is `Unreadable`.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from torch import Tensor

from dicompile.errors import DicompileError

MOST_TEXT = 1 << 20
"""Bytes of a text: a table of 250 steps and 250 branches has a third of that."""
MOST_BYTES = 1 << 28
"""Bytes of a file of tensors."""
MOST_VALUES = 1 << 18
"""Values in a text, those behind aliases counted each time."""
DEEPEST = 64
"""How deep lists and mappings lie in each other."""
_MOST_SHOWN = 300


class Unreadable(ValueError):
    """The content of a file is damaged, too large, or something else."""


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML without merge keys, which multiply what they merge."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Refuse ``<<``."""
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise Unreadable("it has a merge key, <<")


def read_text(path: Path, invalid: type[DicompileError]) -> bytes:
    """Content of a text file.

    Args:
        path: the file.
        invalid: what is raised where it is too large, or cannot be read.

    Raises:
        DicompileError: it is.
    """
    try:
        check_size(path, MOST_TEXT)
        return path.read_bytes()
    except (OSError, Unreadable) as error:
        raise invalid(f"{path.name} cannot be read", where=str(path), why=str(error)) from None


def check_size(path: Path | str, most: int = MOST_BYTES) -> None:
    """Check that a file is not too large.

    Raises:
        Unreadable: it is.
        OSError: there is no such file.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"No such file or directory: {path}")
    size = Path(path).stat().st_size
    if size > most:
        raise Unreadable(f"it has {size} bytes, more than {most}")


def from_json(text: str | bytes) -> Any:
    """Plain data of JSON text.

    Raises:
        Unreadable: it is something else, or too large.
    """
    return _parsed(text, json.loads)


def from_yaml(text: str | bytes) -> Any:
    """Plain data of YAML text.

    Raises:
        Unreadable: it is something else, or too large.
    """
    return _parsed(text, _load_yaml)


def _load_yaml(text: str | bytes) -> Any:
    depth = 0
    for event in yaml.parse(text, _Loader):  # the loader recurses, and that of libyaml crashes where it is too deep
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise Unreadable(f"it has lists deeper than {DEEPEST}")
    return yaml.load(text, _Loader)  # derived from the safe loader


def _parsed(text: str | bytes, parse: Callable[[str | bytes], Any]) -> Any:
    if len(text) > MOST_TEXT:
        raise Unreadable(f"it has {len(text)} characters, more than {MOST_TEXT}")
    try:
        data = parse(text)
    except Unreadable:
        raise
    except Exception as error:  # a parser may also recurse too deep, or meet a number that is none
        raise Unreadable(" ".join(str(error).split()) or type(error).__name__) from None
    _check_extent(data)
    return data


def _check_extent(data: object) -> None:
    """Check that data is neither too deep nor too much, as often as its parts are referred to."""
    count, waiting = 0, [(data, 0)]
    while waiting:
        value, depth = waiting.pop()
        count += 1
        if count > MOST_VALUES or depth > DEEPEST:
            raise Unreadable(f"it has more than {MOST_VALUES} values, or lists deeper than {DEEPEST}")
        if isinstance(value, Mapping):
            waiting += ((part, depth + 1) for item in value.items() for part in item)
        elif isinstance(value, (list, tuple, set)):
            waiting += ((part, depth + 1) for part in value)


def read_safetensors(path: Path | str, most: int = MOST_BYTES) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file.

    Args:
        path: the file.
        most: bytes that it may have.

    Raises:
        Unreadable: it is damaged, something else, or too large.
        OSError: it cannot be read.
    """
    check_size(path, most)
    try:
        with safe_open(str(path), framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError:
        raise
    except Exception as error:  # of safetensors, and of torch for dtypes that it does not have
        raise Unreadable(str(error).partition("\n")[0] or type(error).__name__) from None


def read_pickle(path: Path | str, classes: Sequence[Any] = (), most: int = MOST_BYTES) -> Any:
    """What ``torch.save`` wrote: tensors, containers and numbers; nothing in the file is executed.

    Args:
        path: the file.
        classes: that it may also hold; calling them does nothing but make an object.
        most: bytes that it may have.

    Raises:
        Unreadable: it is damaged, hostile, something else, or too large.
        OSError: it cannot be read.
    """
    check_size(path, most)
    size = Path(path).stat().st_size
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as parts:
                if sum(part.file_size for part in parts.infolist()) > size:
                    raise Unreadable("its parts are larger than the file")
        with torch.serialization.safe_globals(list(classes)):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, Unreadable):
        raise
    except Exception as error:  # whatever a damaged or hostile file makes torch raise
        raise Unreadable(_why(str(error))) from None
    return content


def check_tensors(values: Sequence[object], path: Path | str) -> None:
    """Check that values are tensors which are all in a file, and none a view of a few numbers that claims more.

    Raises:
        Unreadable: they are not.
    """
    size = Path(path).stat().st_size
    for value in values:
        if not isinstance(value, Tensor) or value.layout is not torch.strided or value.device.type != "cpu":
            raise Unreadable("it holds something else than plain tensors")
        size -= value.numel() * value.element_size()
        if size < 0:
            raise Unreadable("its tensors are larger than the file")


def shown(value: object) -> str:
    """A value in a message; no more of it than fits into a few lines."""
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _why(complaint: str) -> str:
    """The line of a long message of torch's that names what was refused."""
    lines = [line.strip() for line in complaint.splitlines() if line.strip()] or ["it is empty"]
    return next((line for line in lines if "GLOBAL" in line), lines[0])
