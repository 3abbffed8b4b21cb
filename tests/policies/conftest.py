"""What tests of policies that decide while sampling ask for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import dicompile


@pytest.fixture
def own_session() -> Iterator[None]:
    """Tests that share a model do not share what it remembers."""
    with dicompile.session():
        yield
