"""A whole run with any diffusers scheduler, for models that come without a pipeline: what there is to record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dicompile.api import optimize
from dicompile.errors import CannotCapture
from dicompile.learn.calibrate import calibrate
from dicompile.learn.latents import LATENTS, Data
from dicompile.learn.measure import measure
from dicompile.learn.probe import probe
from dicompile.learn.recording import Recording
from dicompile.names import sounds_like_latent, sounds_like_time
from dicompile.plan import Timing
from dicompile.progress import tracked


@dataclass(frozen=True)
class Runs:
    """Runs from noise, with conditioning that is drawn.

    Attributes:
        inputs: example keyword arguments of the model's forward, without guidance.
        scheduler: of diffusers; its timesteps are set at every run.
        data: draws conditioning, and latents, of which the shape alone matters here.
        null: conditioning of the unconditional half, by argument name.
        steps: evaluations of the model.
        guidance: classifier-free guidance, both halves in one batch, conditional first; 1 is none.
        seed: of everything that is drawn.
    """

    inputs: Mapping[str, Any]
    scheduler: Any
    data: Data
    null: Mapping[str, float | Tensor]
    steps: int
    guidance: float = 1.0
    seed: int = 0

    def record(self, module: nn.Module, count: int, *, progress: bool = True) -> Recording:
        """Record some runs of a module that is not optimized; it stays as it is.

        Args:
            module: in eval mode.
            count: of runs.
            progress: show a bar.
        """
        fast = optimize(module, "none", schedule=self.scheduler, backend="eager")
        with calibrate(fast) as recording:
            for run in tracked(range(count), "recording", count, shown=progress):
                self.sample(fast, run)
        return recording

    def probe(self, module: nn.Module, recording: Recording, probes: int, *, progress: bool = True) -> None:
        """Find out in the first run what becomes of errors, for a recording of the same module.

        Args:
            module: in eval mode.
            recording: gets what is found.
            probes: steps that are wrong, each in a run of its own.
            progress: show a bar.
        """
        fast = optimize(module, "none", schedule=self.scheduler, backend="eager")
        probe(fast, lambda: self.sample(fast, 0), recording, probes=probes, progress=progress)

    def measure(self, module: nn.Module, count: int, *, backend: str = "inductor", progress: bool = True) -> Timing:
        """Time steps in some runs of a module that is not optimized; it stays as it is.

        Args:
            module: in eval mode.
            count: of runs.
            backend: "inductor" or "eager".
            progress: show a bar.
        """
        fast = optimize(module, "none", schedule=self.scheduler, backend=backend)
        with measure(fast) as timing:
            for run in tracked(range(count), "measuring", count, shown=progress):
                self.sample(fast, run)
        return timing

    @torch.no_grad()
    def sample(self, model: nn.Module, run: int) -> Tensor:
        """Latents at the end of a run.

        Args:
            model: is called with keyword arguments.
            run: its number; each has noise and conditioning of its own.

        Raises:
            CannotCapture: no argument is called after a latent, or none after a timestep.
        """
        generator = torch.Generator().manual_seed(self.seed + run)
        drawn = dict(self.data(generator))
        like: Tensor = drawn.pop(LATENTS)
        device, doubled = next(model.parameters()).device, self.guidance != 1.0
        name, time = self._named("latent", sounds_like_latent), self._named("timestep", sounds_like_time)
        given = {key: value for key, value in {**self.inputs, **drawn}.items() if key not in (name, time)}
        if doubled:
            given = {k: _both_halves(v, self.null.get(k)) if isinstance(v, Tensor) else v for k, v in given.items()}
        given = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in given.items()}
        self.scheduler.set_timesteps(self.steps, device=device)
        latent = torch.randn(like.shape, generator=generator).to(device)
        latent = latent * getattr(self.scheduler, "init_noise_sigma", 1.0)
        for timestep in self.scheduler.timesteps:
            seen = torch.cat([latent, latent]) if doubled else latent
            if hasattr(self.scheduler, "scale_model_input"):  # flow-matching ones take it as it is
                seen = self.scheduler.scale_model_input(seen, timestep)
            output = model(**given, **{name: seen, time: timestep.expand(len(seen))})
            output = output if isinstance(output, Tensor) else output[0]
            if doubled:
                cond, uncond = output.chunk(2)
                output = uncond + self.guidance * (cond - uncond)
            output = output[:, : latent.shape[1]]  # learned variances are of no use here
            latent = self.scheduler.step(output, timestep, latent, return_dict=False)[0]
        return latent

    def _named(self, what: str, sounds: Any) -> str:
        found = [name for name in self.inputs if sounds(name)]
        if not found:
            raise CannotCapture(
                f"no argument is called after a {what}",
                where=f"arguments {', '.join(self.inputs)}",
                fix="sample by yourself inside of `with dicompile.calibrate(model)`",
            )
        return found[0]


def _both_halves(value: Tensor, null: float | Tensor | None) -> Tensor:
    """Conditioning of both guidance halves; what has no null is the same for both."""
    if not value.ndim:
        return value
    if null is None:
        return torch.cat([value, value])
    return torch.cat([value, torch.as_tensor(null, dtype=value.dtype).expand_as(value)])
