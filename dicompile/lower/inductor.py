"""One segment -> one callable, by Inductor or as it is.

Inductor keeps what it made in its own on-disk caches (FX graph cache), so a second process starts warm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._inductor import standalone_compile

from dicompile.errors import InvalidSetting
from dicompile.passes import Segment

MODES = ("inductor", "eager")
Compiled = Callable[..., Sequence[Any]]


def check_mode(mode: str) -> None:
    """Raise if `mode` is not one of `MODES`.

    Raises:
        InvalidSetting: it is not.
    """
    if mode not in MODES:
        raise InvalidSetting(f"mode {mode!r} does not exist", where="dicompile", fix=f"use one of: {', '.join(MODES)}")


def compile_segment(segment: Segment, mode: str) -> Compiled:
    """Compile a rewritten segment.

    Args:
        segment: what to compile; symbolic ints among its inputs stay symbolic.
        mode: "inductor", or "eager" to run the rewritten graph operator by operator.
    """
    if mode == "eager":
        return segment.graph_module
    examples = [node.meta["val"] for node in segment.graph.nodes if node.op == "placeholder"]
    context = torch._guards.TracingContext(segment.fake_mode)
    with torch.no_grad(), torch._guards.tracing(context):
        compiled: Compiled = standalone_compile(segment.graph_module, examples, dynamic_shapes="from_tracing_context")
    return compiled
