"""Models that several commands look at are captured once."""

from collections.abc import Iterator
from typing import Any

import pytest

from dicompile.cli.models import Loaded


@pytest.fixture(scope="session", autouse=True)
def captured_once() -> Iterator[None]:
    found: dict[tuple[Any, ...], Any] = {}
    analysis = Loaded.analysis

    def once(loaded: Loaded) -> Any:
        key = loaded.name, loaded.about, loaded.parameters
        if key not in found:
            found[key] = analysis(loaded)
        return found[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loaded, "analysis", once)
        yield
