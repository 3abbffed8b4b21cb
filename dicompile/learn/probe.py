"""How far an error of one step has grown, or shrunk, in the last latent: runs in which one step is wrong on purpose.

A sampler goes on from wherever a step leads, and so does the model. What is wrong early decides what is drawn; what is
wrong late is mended, or stays what it was. No recorded run tells which, as nothing went wrong in it.

The step that is wrong goes back a little towards what the model returned at the step before: errors of forecasts lie
along that direction, and those in others have other fates (of early errors in the bundled model the former grow
fourfold, random ones do not grow).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dicompile.errors import InvalidRecording, InvalidSetting
from dicompile.learn.recording import Recording
from dicompile.learn.trace import Growth
from dicompile.learn.watch import followed, output_of, watch
from dicompile.model import ModelCalls
from dicompile.plan import Slot
from dicompile.progress import tracked
from dicompile.runtime import Seen

PROBES = 6
"""Steps that are probed if nothing else is asked for; between them the growth is interpolated."""
FEWEST_STEPS = 3
"""The first step and the last two cannot be probed: one repeats nothing, what the others do is known."""
SIZE = 0.05
"""Error of the model's output at the step that is wrong, relative to it: about that of a good forecast."""
COARSE = 0.2
"""The same where the output has 16 bits, in which a latent is rounded by more than a small error moves it."""
SAME = 0.1
"""How far runs may differ before the step that is wrong, relative to what that one changes."""


def probe(
    model: Any,
    run: Callable[[], object],
    recording: Recording,
    *,
    probes: int = PROBES,
    components: Sequence[str] | None = None,
    backend: str | None = None,
    progress: bool = True,
) -> None:
    """Find out how errors of early and late steps end, so that `auto` knows which steps it can do without.

    A run is made once as it is, and once for every probe; nothing is cached meanwhile, and afterwards the model is as
    it was. What is found is added to the recording: its plans and expected errors follow from it.

    Args:
        model: what was calibrated: a diffusers pipeline, optimized or not; or a module that `optimize` returned.
        run: samples once, the same at every call: with noise of a generator of its own. Several samples in one batch
            tell more.
        recording: of `calibrate`, with the same sampler and number of steps.
        probes: steps that are probed, one in each of as many runs.
        components: of a pipeline that is not optimized: the denoisers that were recorded, if not all of them.
        backend: "eager" or "inductor"; by default that of an optimized model, else "eager".
        progress: show a bar.

    Raises:
        NotOptimized: a module that was not optimized; its wrapper is what has to be called.
        InvalidSetting: no probes, or too few steps for one.
        InvalidRecording: nothing was recorded; or `run` samples with another schedule than the recording is of, not the
            same at every call, or not exactly once.

    Example:
        >>> def run():
        ...     return pipe(prompt, num_inference_steps=50, generator=torch.Generator().manual_seed(0))
        >>> with dicompile.calibrate(pipe) as recording:
        ...     run()
        >>> dicompile.probe(pipe, run, recording)
    """
    if not recording.traces:
        raise InvalidRecording("nothing was recorded", where="dicompile.probe", fix="dicompile.calibrate first")
    prober = Prober(recording.facts.steps, recording.facts.timesteps, probed_steps(recording.facts.steps, probes))
    with followed(model, components, backend or "eager") as found:
        for cached in found.values():
            watch(cached, prober, backend)
        for step in tracked([None, *prober.probed], "probing", 1 + len(prober.probed), shown=progress):
            prober.begin(step)
            run()
            prober.end()
    recording.growth = (*recording.growth, *prober.found)


def probed_steps(steps: int, probes: int) -> tuple[int, ...]:
    """Steps in the middle of as many equal shares of a run; what the last two do is known.

    Raises:
        InvalidSetting: there is none.
    """
    middles = (round((number + 0.5) * (steps - 2) / probes) for number in range(probes))
    found = tuple(dict.fromkeys(step for step in middles if 1 <= step < steps - 2))
    if not found:
        raise InvalidSetting(
            f"{probes} probes of {steps} steps",
            where="dicompile.probe",
            why="the first one and the last two cannot be probed" if probes > 0 else "at least one is needed",
            fix="leave out the probes, or sample in more steps" if probes > 0 else f"probes={PROBES}",
        )
    return found


class Prober:
    """Watches the same run again and again, and makes one step wrong in each but the first.

    Args:
        steps: of the run.
        timesteps: of the run, as far as they are known.
        probed: the steps that are wrong, one after the other.

    Attributes:
        calls: the denoiser that is watched; one of them, where there are several.
        found: what came of every step that was wrong.
    """

    calls: ModelCalls

    def __init__(self, steps: int, timesteps: Sequence[float], probed: Sequence[int]) -> None:
        self.probed, self.found = tuple(probed), list[Growth]()
        self._steps, self._timesteps = steps, tuple(timesteps)
        self._kept = {*probed, *(step + 1 for step in probed), steps - 1}
        self._reference: dict[tuple[str, int], Tensor] = {}
        self.begin(None)

    def begin(self, wrong: int | None) -> None:
        """A run begins, in which this step will be wrong, or none."""
        self._wrong = wrong
        self._latents: dict[tuple[str, int], Tensor] = {}
        self._outputs: dict[str, tuple[int, Tensor]] = {}

    def saw(self, call: Seen, slot: Slot, value: Tensor) -> None:
        """What branches compute is of no interest."""

    def ended(
        self, call: Seen, results: Sequence[Any], tried: Callable[[], Mapping[str, Sequence[Any]]]
    ) -> Sequence[Any] | None:
        """Keep the latent of the call, and make the model's output wrong if it is time."""
        self._check_schedule(call)
        output = output_of(results)
        number, before = self._outputs.get(call.context, (-1, output))
        if call.step <= number:
            raise _not_once("it samples more than once")
        self._outputs[call.context] = call.step, output
        if call.step in self._kept and call.latent is not None:
            self._latents[call.context, call.step] = call.latent.detach().float().cpu().clone()
        if call.step != self._wrong:
            return None
        wrong = nudged(output, before)
        return [wrong if result is output else result for result in results]

    def end(self) -> None:
        """A run has come to its end.

        Raises:
            InvalidRecording: it did not go through all steps; or it is another one than the first.
        """
        contexts = [context for context, step in self._latents if step == self._steps - 1]
        if not contexts:
            raise _not_once("none of its calls was at the last step, with a latent that is known")
        if self._wrong is None:
            self._reference = self._latents
            return
        ratios = torch.cat([self._grown(context, self._wrong) for context in contexts])
        ratios = ratios[ratios.isfinite() & (ratios > 0)]
        if not len(ratios):
            raise InvalidRecording(
                f"what the model returns at step {self._wrong + 1} changes nothing",
                where="dicompile.probe",
                fix="leave out the probes",
            )
        self.found.append(Growth(self._wrong, math.exp(ratios.double().log().mean())))

    def _grown(self, context: str, step: int) -> Tensor:
        """How far the error of every sample has grown from the step that made it to the last one."""
        far = {at: self._apart(context, at) for at in (step, step + 1, self._steps - 1)}
        if (far[step] > SAME * far[step + 1]).any():
            raise _not_once(
                f"its latents at step {step + 1}, before anything is changed, are not those of its first call"
            )
        return far[self._steps - 1] / far[step + 1]

    def _apart(self, context: str, step: int) -> Tensor:
        """How far every sample is from where it was at this step of the first run."""
        now, then = (latents.get((context, step)) for latents in (self._latents, self._reference))
        if now is None or then is None or now.shape != then.shape:
            raise _not_once("what it calls is not what it has called at first")
        apart: Tensor = (now - then).reshape(len(now), -1).norm(dim=1)
        return apart

    def _check_schedule(self, call: Seen) -> None:
        if call.schedule.steps == self._steps and call.schedule.timesteps == self._timesteps:
            return
        raise InvalidRecording(
            f"the run has {call.schedule.steps} steps, the recording {self._steps}"
            if call.schedule.steps != self._steps else "the run has other timesteps than the recording",
            where="dicompile.probe",
            fix="sample as you did in dicompile.calibrate",
        )  # fmt: skip


def nudged(output: Tensor, before: Tensor) -> Tensor:
    """An output that is wrong by `SIZE` or `COARSE`, towards what it was at the step before; each sample by itself."""
    towards = (before.float() - output.float()).reshape(len(output), -1)
    size = output.float().reshape(len(output), -1).norm(dim=1, keepdim=True)
    share = COARSE if output.element_size() < torch.float32.itemsize else SIZE
    scale = share * size / towards.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    wrong: Tensor = output.float() + (scale * towards).reshape(output.shape)
    return wrong.to(output.dtype)


def _not_once(why: str) -> InvalidRecording:
    return InvalidRecording(
        "`run` has to sample once, and the same at every call",
        where="dicompile.probe",
        why=why,
        fix="lambda: pipe(prompt, generator=torch.Generator().manual_seed(0))",
    )
