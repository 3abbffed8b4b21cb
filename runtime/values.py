"""What a program reads that no call computes and no slot holds: numbers, weights, noise, tables, importance."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from dicompile.runtime.gate import Drift
from dicompile.runtime.invariants import Doubt, Kept
from dicompile.runtime.steps import Step
from dicompile.runtime.work import Work


def load_values(work: Work, step: Step, drift: Drift | None) -> None:
    """Fill the registers of everything but tables.

    Args:
        work: the call.
        step: what it does.
        drift: what its context, or one sample of it, remembers of its gate.
    """
    code, registers = work.code, work.registers
    program, sites, number = step.program, step.planned.sites, work.place.step
    full = drift.full if drift is not None and step.is_recall else ()
    for item in program.ints:
        site = sites[item.site]
        registers[item.register] = site.action.tokens.count if item.is_count and site.action.tokens else site.clock
    latent = code.signature.tensor(work.inputs, code.signature.latent)
    device = torch.device("cpu") if latent is None else latent.device
    for noise in program.noise:
        seed = code.seed, number, int(noise.site)
        registers[noise.register] = drawn(noise.shape, seed, device, is_shared=noise.share_guidance)
    for weights in program.weights:
        if sites[weights.site].action.is_aligned:
            assert drift is not None
            registers[weights.register] = drift.weights
        else:
            registers[weights.register] = _on_device(step.weights(weights.site, number, full), device)
    for name, register in program.adapters:
        registers[register] = code.adapters[name]
    if program.predicted:
        assert code.predictor is not None
        importance = code.predictor(work.inputs, number)
        for predicted in program.predicted:
            registers[predicted.register] = importance[..., predicted.block].contiguous()


def load_tables(
    work: Work, reads: Sequence[tuple[str, int]], *, is_again: bool = False, may_doubt: bool = False
) -> Doubt | None:
    """Load values that are computed outside of the steps; see `Tables.load`.

    Args:
        work: the call.
        reads: their names, and the registers for them.
        is_again: the timestep was not the one that was foretold.
        may_doubt: it may be another one, since the step can be run again.
    """
    if not reads:
        if work.supply is not None:
            work.supply.agree(())
        return None
    code, state = work.code, work.state
    assert code.tables is not None
    kept = state.tables.setdefault(code, Kept())
    schedule, number = work.owner.link.schedule, work.place.step
    doubt = code.tables.load(
        reads, work.registers, kept, schedule, number, supply=work.supply, is_again=is_again, may_doubt=may_doubt
    )
    state.report.hoist(sum(each.bytes for each in state.tables.values()))
    return doubt


def drawn(shape: tuple[int, int], seed: tuple[int, int, int], device: torch.device, *, is_shared: bool) -> torch.Tensor:
    """Uniform random numbers.

    Args:
        shape: [b, n].
        seed: of the policy; number of the step, and of the site.
        device: of the numbers.
        is_shared: both guidance halves of the batch get the same.
    """
    generator = torch.Generator(device).manual_seed(hash(seed) & 0x7FFFFFFF)
    batch, tokens = shape
    numbers = torch.rand(batch // 2 if is_shared else batch, tokens, generator=generator, device=device)
    return torch.cat([numbers, numbers]) if is_shared else numbers


@functools.lru_cache(maxsize=1024)
def _on_device(weights: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Weights as a tensor, copied to the device once: every later generation finds them there."""
    with torch.inference_mode(mode=False):
        return torch.tensor(weights, dtype=torch.float32, device=device)
