"""Gather masks from other ranks as bytes.

Inductor promotes what a collective gathers with the numbers beside it, the number of ranks, and makes 64-bit integers
of a mask so; no kernel can take these for one (torch 2.13: ``InductorError: AssertionError`` on a CPU). Of bytes it
makes nothing else. Ulysses gathers the mask of a padded prompt, in Qwen-Image.

Before::

    %1: b8[2,1,1,11] = _c10d_functional.all_gather_into_tensor.default(mask, 2, 0)
    %2: b8[2,1,1,11] = _c10d_functional.wait_tensor.default(%1)

After::

    %0: u8[1,1,1,11] = aten._to_copy.default(mask, dtype=torch.uint8)
    %1: u8[2,1,1,11] = _c10d_functional.all_gather_into_tensor.default(%0, 2, 0)
    %2: u8[2,1,1,11] = _c10d_functional.wait_tensor.default(%1)
    %3: b8[2,1,1,11] = aten._to_copy.default(%2, dtype=torch.bool)

Whatever else is gathered is left alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dicompile.nodes import node_argument, tensor_of
from dicompile.ops.collectives import find_gathered
from dicompile.passes.base import PassReport, Segment
from dicompile.passes.edit import Editor

aten = torch.ops.aten


@dataclass(frozen=True)
class GatherMasks:
    """Replace the gathering of booleans by that of bytes."""

    name: ClassVar[str] = "gather-masks"
    exact: ClassVar[bool] = True

    def run(self, segment: Segment) -> PassReport:
        """Rewrite every such exchange, with the node that waits for it."""
        editor, changed = Editor(segment), []
        for gather, wait in find_gathered(segment.graph):
            if tensor_of(gather).dtype is torch.bool:
                with editor.before(wait):
                    sent = editor.call(aten._to_copy.default, node_argument(gather, 0), dtype=torch.uint8)
                    came = editor.call(wait.target, editor.call(gather.target, sent, *gather.args[1:]))
                    wait.replace_all_uses_with(editor.call(aten._to_copy.default, came, dtype=torch.bool))
                changed.append(gather.name)
        return PassReport(tuple(changed))
