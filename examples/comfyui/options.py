"""Which of its ``transformer_options`` does a model read?

ComfyUI hands every model one dictionary with all that anybody may ask for: the sampler's sigmas, identities of the
conditions that are made anew for every run, functions of other nodes. Code compiled for one such dictionary would hold
for no other call. What a model never looks up cannot matter to it, so it is run once with a dictionary that notes what
is looked up, for every kind of call, and gets only that from then on.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from dicompile.errors import UnsupportedModel

OPTIONS = "transformer_options"
_ALL = object()
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)

Read = dict[Any, "Read"]
"""Keys that were looked up, each with those of the dictionary under it; `_ALL` among them for every key."""


class Noted(dict[Any, Any]):
    """A dictionary, and all that lie in it, of which it is noted what is looked up; what the model writes is its own.

    Args:
        given: the dictionary.
        read: where it is noted.
    """

    def __init__(self, given: Mapping[Any, Any], read: Read) -> None:
        super().__init__(given)
        self._read = read
        self._own: set[Any] = set()

    def _noted(self, key: Any) -> None:
        if key in self._own:
            return
        below = self._read.setdefault(key, {})
        value = super().get(key)
        if type(value) is dict:
            self[key] = Noted(value, below)

    def _whole(self) -> None:
        self._read[_ALL] = {}

    def __getitem__(self, key: Any) -> Any:
        self._noted(key)
        return super().__getitem__(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._own.add(key)
        super().__setitem__(key, value)

    def __contains__(self, key: Any) -> bool:
        self._noted(key)
        return super().__contains__(key)

    def __iter__(self) -> Any:
        self._whole()
        return super().__iter__()

    def __len__(self) -> int:
        self._whole()
        return super().__len__()

    def get(self, key: Any, default: Any = None) -> Any:
        """As of a dictionary."""
        self._noted(key)
        return super().get(key, default)

    def setdefault(self, key: Any, default: Any = None) -> Any:
        """As of a dictionary."""
        if key not in self:
            self[key] = default
        return self[key]

    def pop(self, key: Any, *default: Any) -> Any:
        """As of a dictionary."""
        self._noted(key)
        self._own.add(key)
        return super().pop(key, *default)

    def copy(self) -> Noted:
        """A copy whose reads are noted, too."""
        made = Noted({}, self._read)
        dict.update(made, super().items())
        made._own |= self._own
        return made

    def keys(self) -> Any:
        """As of a dictionary."""
        self._whole()
        return super().keys()

    def values(self) -> Any:
        """As of a dictionary."""
        self._whole()
        return super().values()

    def items(self) -> Any:
        """As of a dictionary."""
        self._whole()
        return super().items()


class ReadOptions:
    """What a model reads of its options.

    Args:
        module: the model; it is run once for every kind of call.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._read: Read = {}
        self._kinds: set[Hashable] = set()

    def of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the options that a call depends on.

        Args:
            args: positional arguments of the model.
            kwargs: keyword arguments but for the options.
            given: the options.

        Raises:
            UnsupportedModel: one of them is neither a tensor nor a number, a text or a flag.
        """
        kept = _kept(given, self._read)
        if _kind(args, kwargs, kept) not in self._kinds:
            args_, kwargs_ = pytree.tree_map(_copy, (args, dict(kwargs)))
            with torch.no_grad():
                self._module(*args_, **kwargs_, **{OPTIONS: Noted(given, self._read)})
            kept = _kept(given, self._read)
            _check(self._module, kept)
            self._kinds.add(_kind(args, kwargs, kept))
        return kept


def _kept(given: Mapping[Any, Any], read: Read) -> dict[Any, Any]:
    if _ALL in read:
        return dict(given)
    return {k: _kept(v, read[k]) if type(v) is dict else v for k, v in given.items() if k in read}


def _check(module: nn.Module, kept: Mapping[Any, Any]) -> None:
    leaves, _ = pytree.tree_flatten_with_path(kept)
    for path, leaf in leaves:
        if not isinstance(leaf, (torch.Tensor, *_PLAIN)):
            raise UnsupportedModel(
                f"{type(module).__name__} reads {OPTIONS}{pytree.keystr(path)}, which is a {type(leaf).__name__}",
                where="ComfyUI, diffusion_model",
                why="another node lets Python of its own run inside the model; what that keeps from call to call "
                "compiled code cannot follow",
                fix="leave out that node, or dicompile, for this model",
            )


def _kind(*arguments: Any) -> Hashable:
    """Equal for calls in which a model takes the same way, and reads the same."""
    leaves, spec = pytree.tree_flatten(arguments)
    return str(spec), tuple(_described(leaf) for leaf in leaves)


def _described(leaf: Any) -> Hashable:
    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    return (type(leaf), leaf) if isinstance(leaf, _PLAIN) else id(leaf)


def _copy(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf
