"""Run the hand-written kernels by Triton's interpreter, and print as JSON how far they are off.

Scores are compared with float64, selections with a sort.

Whether Triton interprets is decided when its modules are imported, so this is a program:
``TRITON_INTERPRET=1 python -m tests.runtime.interpreted``.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _convert_float

from dicompile.ops import scores
from dicompile.runtime.kernels import attention_scores, select_tokens
from dicompile.runtime.kernels.attention_scores import Tiles, tiles_for
from tests.ops.test_attention_scores import attention_map, entropy, operands

Shape = tuple[int, int, int, int, int]
SHAPES: tuple[Shape, ...] = ((2, 2, 16, 32, 16), (2, 3, 21, 37, 24), (1, 2, 1, 40, 8), (1, 1, 33, 1, 20))
"""b, h, n, m, d: whole tiles, and none of them whole."""
FEW: Shape = (2, 2, 21, 37, 24)
"""Of what is special otherwise: two of everything."""


class Case(NamedTuple):
    """One attention whose scores are made.

    Attributes:
        name: what is special about it.
        query: [b, h, n, d].
        key: [b, h', m, d].
        options: arguments of the operators.
    """

    name: str
    query: Tensor
    key: Tensor
    options: dict[str, Any] = {}  # noqa: RUF012 - never written to


def cases() -> Iterator[Case]:
    for shape in SHAPES:
        yield Case(f"{shape}", *operands(*shape))
    for dtype in (torch.bfloat16, torch.float16):
        yield Case(f"{dtype}", *operands(*SHAPES[1], dtype))
    query, key = operands(*FEW)
    lse = (query.double() @ key.double().mT * 24**-0.5).logsumexp(-1).float()
    yield Case("log-sum-exp of attention", query, key, {"lse": lse.mT.contiguous().mT})
    yield Case("scale", query, key, {"scale": 0.7})
    yield Case("heads first in memory", query.contiguous(), key.contiguous())
    yield Case("rows apart in memory", query.mT.contiguous().mT, key.mT.contiguous().mT)
    yield Case("rows that begin anywhere", query[..., 1:], key[..., 1:])
    yield Case("keys for groups of heads", *operands(1, 4, 21, 37, 24, groups=2))
    yield Case("causal", query, key, {"is_causal": True})
    seen = torch.rand(2, 1, 21, 37) < 0.6
    seen[:, :, 3] = False
    yield Case("mask, and a query that sees nothing", query, key, {"mask": seen})
    yield Case("mask per key", query, key, {"mask": seen[:, :, :1]})
    yield Case("bias per head", query, key, {"mask": torch.randn(2, 2, 21, 37)})
    yield Case("bias of -inf in half precision", query, key, {"mask": torch.where(seen, 0.0, -torch.inf).bfloat16()})


def distance(case: Case) -> float:
    """The largest error of all scores, relative to the largest score."""
    query, key, options = case.query, case.key, case.options
    rows = attention_map(query, key, **{name: value for name, value in options.items() if name != "lse"})
    pairs = [
        (attention_scores.attention_received(query, key, **options), rows.sum(1)),
        (attention_scores.attention_entropy(query, key, **options), entropy(rows)),
    ]
    if not options:
        pairs.append((attention_scores.attention_entropy(query, key, shared=True), entropy(rows / 2)))
    return max(float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1)) for found, wanted in pairs)


def small_tiles(width: int, dtype: torch.dtype) -> Tiles:
    """Tiles of which there are several in a small matrix."""
    return tiles_for(width, dtype)._replace(kept=32, passed=16)


def dot(self: Any, a: Any, b: Any, d: Any, *_: object) -> Any:
    """Products of bfloat16 as well, of which the interpreter multiplies the bits (triton 3.7.1)."""
    left, right = (
        _convert_float(x.data, tl.bfloat16, tl.float32, None).view(np.float32) if x.dtype == tl.bfloat16 else x.data
        for x in (a, b)
    )
    return TensorHandle(np.matmul(left, right, dtype=d.data.dtype) + d.data, d.dtype.scalar)


class Selected(NamedTuple):
    """Tokens among which some are chosen.

    Attributes:
        name: what is special about them.
        score: [b, n].
        count: how many are chosen.
        age_weight: unitless; 0 for no stamps.
        grid: where tokens lie.
        cell: edge of the cells of which the best token gets the bonus, or 0.
    """

    name: str
    score: Tensor
    count: int
    age_weight: float = 0.0
    grid: tuple[int, ...] = ()
    cell: int = 0


def selections() -> Iterator[Selected]:
    score = torch.randn(2, 150)
    for count in (1, 37, 150):
        yield Selected(f"{count} of 150", score, count)
    yield Selected("one tile", torch.randn(3, select_tokens.TILE), 20, 0.3)
    yield Selected("equal ones", score.round(), 40, 0.5)
    yield Selected("no numbers", score.where(score < 1, torch.nan).where(score > -1, -torch.inf), 60)
    yield Selected("apart in memory", torch.randn(150, 2).T, 50, 0.3)
    yield Selected("grid", score, 50, 0.3, (10, 15), 2)
    yield Selected("grid, equal ones", score.round(), 50, 0.5, (15, 10), 3)
    yield Selected("film, cut off", score.round(), 50, 0.0, (5, 6, 5), 2)


def differences(case: Selected) -> int:
    """Numbers that are not those of a sort, as `dicompile.passes.refresh_tokens` writes it out elsewhere."""
    clock, bonus = 4, 0.6
    stamp = torch.randint(clock, case.score.shape, dtype=torch.int32) if case.age_weight else None
    ranked = case.score if stamp is None else case.score + case.age_weight * (clock - stamp)
    ranked = scores.with_grid_bonus(ranked, case.grid, case.cell, bonus) if case.cell else ranked
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    chosen, places, stamped = torch.ops.dicompile.select_tokens_cuda_triton(
        case.score, stamp, case.count, clock, case.age_weight, list(case.grid), case.cell, bonus
    )
    pairs = [(chosen, order[:, : case.count]), (places, order.argsort(-1))]
    if stamp is not None:
        pairs.append((stamped, torch.where(places < case.count, clock + 1, stamp)))
    return sum(int((found != wanted).sum()) for found, wanted in pairs)


def main() -> None:
    torch.manual_seed(0)
    warnings.simplefilter("ignore")  # of numpy, about logarithms of nothing, which is meant
    with patch.object(InterpreterBuilder, "create_dot", dot):
        whole = {"the tiles themselves": distance(Case("", *operands(1, 1, 70, 140, 24)))}
        with patch.object(attention_scores, "tiles_for", small_tiles):
            found = {case.name: distance(case) for case in cases()}
    selected = {case.name: differences(case) for case in selections()}
    json.dump({"scores": found | whole, "selections": selected}, sys.stdout)


if __name__ == "__main__":
    main()
