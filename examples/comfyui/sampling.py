"""One patched model: what ComfyUI's wrappers do before, around and after the calls of its diffusion model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

import dicompile
from dicompile.errors import CallOutsideSchedule, NotYetRun, UnsupportedModel

from .options import OPTIONS, ReadOptions

log = logging.getLogger("dicompile")

SAME = 1e-4
"""Relative distance between a sigma of the schedule and the same sigma as a sampler works it out."""


class Sigmas:
    """A sampler's sigmas, with the attributes of a diffusers scheduler: dicompile follows it, and its position.

    Attributes:
        config: empty; schedulers have one.
        timesteps: what the model is told at each sigma but the last; [steps], on the CPU.
        num_inference_steps: how many.
        step_index: at which of them the sampler stands.
    """

    def __init__(self) -> None:
        self.config: dict[str, Any] = {}
        self._sigmas: Tensor | None = None
        self._values: list[float] = []
        self.timesteps: Tensor | None = None
        self.num_inference_steps: int | None = None
        self.step_index: int | None = None

    def begin(self) -> None:
        """A sampler starts."""
        self.__init__()  # type: ignore[misc]

    def follow(self, sigmas: Tensor, sigma: float, timestep: Callable[[Tensor], Tensor]) -> None:
        """The model is about to be called.

        Args:
            sigmas: of the whole run; at the last one the model is not called; [steps + 1].
            sigma: of the call.
            timestep: what the model is told at a sigma.

        Raises:
            CallOutsideSchedule: the sampler calls the model between two sigmas.
        """
        if sigmas is not self._sigmas:
            self._sigmas = sigmas
            self.timesteps = timestep(sigmas[:-1]).float().cpu()
            self._values = sigmas[:-1].tolist()
            self.num_inference_steps = len(self._values)
        distances = [abs(value - sigma) for value in self._values]
        self.step_index = min(range(len(distances)), key=distances.__getitem__)
        if distances[self.step_index] > SAME * sigma:
            raise CallOutsideSchedule(
                f"the sampler called the model at sigma {sigma:g}, which is not one of its {len(distances)}",
                where="ComfyUI, sample_sigmas",
                why="a policy plans one call for each sigma, and this sampler makes others between them",
                fix="choose a sampler that makes one, such as euler, dpmpp_2m or res_multistep; or policy none",
            )


class Denoiser(nn.Module):
    """A diffusion model with the names that ComfyUI calls its arguments by, and with options of its own to write to.

    Args:
        module: the diffusion model.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor | None = None,
        transformer_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """What the model returns; `x` is [b, c, ...], `timestep` [b], `context` [b, n, d]."""
        options = dict(transformer_options or {})
        return self.module(x, timestep, context=context, transformer_options=options, **kwargs)


class InPlace(nn.Module):
    """Stands where ComfyUI has the diffusion model, with its attributes, and calls the optimized one.

    Args:
        module: the diffusion model.
        optimized: `Denoiser` of it, optimized.
    """

    def __init__(self, module: nn.Module, optimized: nn.Module) -> None:
        super().__init__()
        self.__dict__["_module"], self.__dict__["_optimized"] = module, optimized  # no children: nothing is twice
        self.__dict__["_read"] = ReadOptions(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As of the diffusion model."""
        given = kwargs.pop(OPTIONS, None) or {}
        return self._optimized(*args, **kwargs, transformer_options=self._read.of(args, kwargs, given))


@dataclass
class Run:
    """What happens between the beginning and the end of a sampler.

    Attributes:
        calls: of the model.
        batches: in which conditions came, by their identities.
    """

    calls: int = 0
    batches: set[tuple[str, ...]] = field(default_factory=set)


class Sampling:
    """Wrappers around the sampling of one patched model and of its clones, and what is known of its last run.

    Args:
        module: the diffusion model.
        policy: of dicompile.
        options: of `dicompile.optimize`.

    Attributes:
        report: of the last run; empty before the first one.
    """

    def __init__(self, module: nn.Module, policy: str, **options: Any) -> None:
        self._module = module
        self._sigmas = Sigmas()
        self._caches = bool(dicompile.get_policy(policy).rules)  # what only compiles needs no steps
        schedule = self._sigmas if self._caches else None
        self._optimized = dicompile.optimize(
            Denoiser(module), policy, schedule=schedule, latent="x", timestep="timestep", **options
        )
        self._in_place = InPlace(module, self._optimized)
        self._run: Run | None = None
        self.report = ""

    def outer_sample(self, executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around a whole run: what it remembers ends with it, however it ends."""
        around, sigmas = self._run, dict(vars(self._sigmas))  # of a run in the middle of which this one is made
        with dicompile.session(self._optimized):
            self._run = Run()
            self._sigmas.begin()
            try:
                return executor(*args, **kwargs)
            finally:
                dicompile.free(self._optimized)
                self.report = self._reported(self._run)
                self._run = around
                vars(self._sigmas).update(sigmas)

    def apply_model(
        self,
        executor: Any,
        x: Tensor,
        t: Tensor,
        c_concat: Tensor | None = None,
        c_crossattn: Tensor | None = None,
        control: Any = None,
        transformer_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Around each call of the model: it is the optimized one meanwhile.

        Raises:
            UnsupportedModel: it is another model than the node was given.
            CallOutsideSchedule: see `Sigmas.follow`.
        """
        options = transformer_options or {}
        arguments = (x, t, c_concat, c_crossattn, control, options)
        model = executor.class_obj
        sigmas = options.get("sample_sigmas")
        if self._run is None or sigmas is None:
            log.warning("the model is called outside of a sampler: this call is not cached, and not compiled")
            return executor(*arguments, **kwargs)
        self._check(model)
        if self._caches:
            self._sigmas.follow(sigmas, float(t.flatten()[0]), model.model_sampling.timestep)
        batch = tuple(map(str, options.get("uuids", ())))
        self._run.calls += 1
        self._run.batches.add(batch)
        model.diffusion_model = self._in_place
        try:
            with dicompile.cache_context(", ".join(batch)):
                return executor(*arguments, **kwargs)
        finally:
            model.diffusion_model = self._module

    def _check(self, model: Any) -> None:
        if model.diffusion_model is not self._module:
            raise UnsupportedModel(
                f"the diffusion model of {type(model).__name__} is not the one that dicompile was given",
                where="ComfyUI, apply_model",
                why="a node after dicompile put another one in its place, or the model runs on several devices",
                fix="put dicompile after the other nodes, and sample on one device",
            )

    def _reported(self, run: Run) -> str:
        if not run.calls:
            return "0 calls: a node after dicompile has taken its place, or the run ended before the first one"
        if not self._caches:
            return f"{run.calls} calls, compiled; nothing is cached"
        try:
            report = str(dicompile.report(self._optimized))
        except NotYetRun:  # the first call failed
            return "1 call, which failed"
        return f"{report}; {REGROUPED}" if _are_regrouped(run.batches) else report


REGROUPED = "conditions came in other batches in between, as memory allowed: each way of batching remembers for itself"


def _are_regrouped(batches: set[tuple[str, ...]]) -> bool:
    """True if a condition came in more than one batch."""
    together: Sequence[str] = [condition for batch in batches for condition in set(batch)]
    return len(set(together)) < len(together)
