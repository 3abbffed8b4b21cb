"""``tensor.data`` while a model is run to capture it.

Weights that are stored in one dtype and compute in another (diffusers' layerwise casting) are put so around every
layer, by assignments of which an operator-level trace knows nothing::

    weight.data = weight.data.to(torch.bfloat16)
    ...
    weight.data = weight.data.to(torch.float8_e4m3fn)

From an assignment on, the graph means the assigned value where it says the tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode
from torch.overrides import TorchFunctionMode

_TAKE, _PUT = Tensor.data.__get__, Tensor.data.__set__  # type: ignore[attr-defined]


class FollowedData(TorchFunctionMode):
    """While active, assignments to ``.data`` are part of the graph that is traced."""

    def __init__(self) -> None:
        self._before: dict[int, tuple[Tensor, Tensor, Any]] = {}

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func == _TAKE:
            return args[0].detach()
        if func == _PUT:
            return self._put(*args)
        return func(*args, **(kwargs or {}))

    def is_changed(self, tensor: Tensor) -> bool:
        """True for a tensor that was left with other values, or another dtype, than it had."""
        return id(tensor) in self._before and not _lies_in(tensor, self._before[id(tensor)][1])

    def undo(self) -> None:
        """Give every tensor back what it had."""
        for tensor, memory, _ in self._before.values():
            tensor.data = memory

    def _put(self, tensor: Tensor, value: Tensor) -> None:
        """Assign; a tensor that gets back what it had is itself again, memory and all."""
        mode = get_proxy_mode()
        known: Any = {} if mode is None else mode.tracer.tensor_tracker
        with disable_proxy_modes_tracing():
            _, memory, itself = self._before.setdefault(id(tensor), (tensor, tensor.data, known.get(tensor)))
            is_back = value.dtype == memory.dtype and value.device == memory.device and torch.equal(value, memory)
            tensor.data = memory if is_back else value
        meant = itself if is_back else known.get(value)
        if meant is not None:
            known[tensor] = meant


def _lies_in(tensor: Tensor, memory: Tensor) -> bool:
    is_alike = (tensor.dtype, tensor.shape, tensor.stride()) == (memory.dtype, memory.shape, memory.stride())
    return is_alike and tensor.data_ptr() == memory.data_ptr()
