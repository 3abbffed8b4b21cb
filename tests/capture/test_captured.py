"""How a module's result is made of a graph's results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tests.capture.follow import WAYS, Model, given, optimized

RESULTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tensor": lambda y, x: y,
    "tuple": lambda y, x: (y, y * 2),
    "tuple of one": lambda y, x: (y,),
    "list of one in a tuple": lambda y, x: ([y],),
    "tuple of one in a tuple": lambda y, x: ((y,),),
    "lists of one in a tuple": lambda y, x: ([y], [y * 2]),
    "dictionary in a tuple": lambda y, x: ({"sample": y},),
    "list of one": lambda y, x: [y],
    "samples in a list": lambda y, x: (list(y.unbind(0)),),
    "one twice": lambda y, x: (y, y),
    "other order": lambda y, x: (y * 2, y),
    "what went in": lambda y, x: (y, x),
    "number": lambda y, x: (y, 3),
    "nothing": lambda y, x: (y, None, ()),
    "nested": lambda y, x: {"sample": [y, {"rest": (y * 2, None)}]},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", RESULTS)
@pytest.mark.sampled
def test_a_result_is_packed_as_the_model_packs_it(kind: str, way: str) -> None:
    class Packs(Model):
        def forward(self, x: Tensor, t: Tensor, mask: Tensor) -> Any:
            return RESULTS[kind](super().forward(x, t, mask), x)

    module = Packs(way)
    model = optimized(module)
    for seed in range(2):
        inputs = given(seed)
        with torch.no_grad():
            wanted, found = module(**inputs), model(**inputs)
        assert pytree.tree_structure(found) == pytree.tree_structure(wanted)
        torch.testing.assert_close(found, wanted)
