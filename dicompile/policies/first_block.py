"""First-block cache and DBCache: the first blocks tell whether the others have to run."""

from __future__ import annotations

from dicompile.plan import Cadence, Forecast, Gate, Policy, Reuse, Rule


def FirstBlockCache(threshold: float = 0.05) -> Policy:
    """Run the first block; while it adds about what it added at the last full step, reuse what the others added.

    Decided while sampling, once a call, with one wait for the device; nothing else is remembered than two tensors for
    each stream.

    Args:
        threshold: relative L1 distance from which a step is full, unitless.

    Reference:
        ParaAttention, 2024
    """
    return _decided(f"first-block-{threshold:g}", Cadence(gate=Gate(threshold=threshold)), (1, 0), 0)


def DBCache(
    first: int = 8,
    last: int = 0,
    threshold: float = 0.08,
    warmup: int = 8,
    longest: int | None = None,
    most: int | None = None,
    order: int = 0,
) -> Policy:
    """Run the first blocks and the last ones; while the first ones add about the same, recall what those between add.

    Args:
        first: blocks that run, and are compared (Fn).
        last: blocks that run at the end of every step (Bn).
        threshold: relative L1 distance from which a step is full, unitless.
        warmup: full steps at the start.
        longest: most steps in a row that recall; None for any number.
        most: most steps of a run that do.
        order: highest derivative of a forecast from what the last full steps stored; 0 reuses.

    Reference:
        cache-dit, 2025
    """
    gate = Gate(threshold=threshold, longest=longest, most=most)
    return _decided(f"dbcache-{first}-{last}-{threshold:g}", Cadence(warmup=warmup, gate=gate), (first, last), order)


def _decided(name: str, cadence: Cadence, outside: tuple[int, int], order: int) -> Policy:
    recall = Forecast(order=order, what="update") if order else Reuse(what="update")
    return Policy(name=name, cadence=cadence, outside=outside, rules=(Rule(sites=("stack",), do=recall),))
