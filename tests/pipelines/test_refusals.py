"""What a pipeline cannot be asked for, and what is no pipeline."""

from __future__ import annotations

from typing import Any

import pytest
from diffusers import DDIMScheduler
from torch import nn

import dicompile
from dicompile.errors import NotOptimized, NotYetRun, UnsupportedModel
from tests.pipelines import pipes

FORA = dicompile.FORA(interval=2)


def test_an_untouched_pipeline_has_nothing_to_restore_or_tell() -> None:
    pipe = pipes.sd3().pipe
    for ask in (dicompile.restore, dicompile.plan_of, dicompile.structure_of, dicompile.report):
        with pytest.raises(NotOptimized, match="this StableDiffusion3Pipeline was not optimized"):
            ask(pipe)


def test_an_optimized_pipeline_that_has_not_run_has_nothing_to_tell() -> None:
    pipe = pipes.sd3().pipe
    dicompile.optimize(pipe, FORA, mode="eager")
    for ask in (dicompile.plan_of, dicompile.structure_of, dicompile.report):
        with pytest.raises(NotYetRun, match="SD3Transformer2DModel has not run yet"):
            ask(pipe)


class NoDenoiser:
    """Looks like a pipeline; none of its modules takes a timestep."""

    def __init__(self) -> None:
        self.scheduler = DDIMScheduler()
        self.components = {"vae": nn.Linear(2, 2), "scheduler": self.scheduler}


@pytest.mark.parametrize("thing", [NoDenoiser(), object(), "model", None])
def test_what_has_no_denoiser_is_refused(thing: Any) -> None:
    with pytest.raises(UnsupportedModel):
        dicompile.optimize(thing, FORA)
