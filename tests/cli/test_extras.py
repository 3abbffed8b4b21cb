"""What is not installed is named, with what to do about it; other failures of an import stay what they are."""

from __future__ import annotations

import pytest

from dicompile.cli.extras import needed_for
from dicompile.errors import DicompileError


def test_a_missing_package_is_named_as_pip_knows_it() -> None:
    with pytest.raises(DicompileError) as caught, needed_for("comparing", "compare"):
        raise ModuleNotFoundError("No module named 'skimage.metrics'", name="skimage.metrics")
    assert "comparing needs scikit-image, which is not installed" in str(caught.value)
    assert "pip install 'dicompile[compare]'" in str(caught.value)


def test_a_fault_of_ours_is_not_taken_for_a_missing_package() -> None:
    with pytest.raises(ModuleNotFoundError, match="of_ours"), needed_for("comparing", "compare"):
        raise ModuleNotFoundError("No module named 'of_ours'", name="of_ours")
