"""Rows of several requests as one batch, and back."""

from __future__ import annotations

import pytest
import torch

from dicompile.serve.together import joined, parted


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_first_rows_come_first_and_everybody_gets_theirs_back(rows: int) -> None:
    parts = [torch.arange(rows * 3 * 2.0).reshape(rows * 3, 2) + 100 * i for i in range(3)]
    whole = joined(parts, rows)
    expected = [part[row * 3 : row * 3 + 3] for row in range(rows) for part in parts]
    assert torch.equal(whole, torch.cat(expected))
    for part, again in zip(parts, parted(whole, rows, 3), strict=True):
        assert torch.equal(part, again)
        assert again.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()
        assert again.untyped_storage().nbytes() == again.nbytes  # nobody's memory hangs on another's


@pytest.mark.parametrize("rows", [1, 2])
def test_the_order_of_axes_in_memory_stays(rows: int) -> None:
    parts = [torch.randn(rows, 3, 5).transpose(1, 2) for _ in range(2)]
    whole = joined(parts, rows)
    assert whole.stride() == (15, 1, 5)
    assert [part.stride() for part in parted(whole, rows, 2)] == [part.stride() for part in parts]


def test_a_batch_of_one_says_nothing_of_its_order() -> None:
    parts = [torch.randn(5, 3, 1).permute(2, 0, 1) for _ in range(2)]
    assert joined(parts, 1).is_contiguous()


def test_halves_of_a_batch_are_those_of_every_request() -> None:
    parts = [torch.full((4, 1), float(i)) + torch.tensor([[0.0], [0.0], [0.5], [0.5]]) for i in range(2)]
    cond, uncond = joined(parts, 4).chunk(2)
    assert torch.equal(uncond - cond, torch.full((4, 1), 0.5))
