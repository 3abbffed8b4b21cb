"""Requests of several users at once, each in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from dicompile.serve import Batcher
from tests import models
from tests.models import Sample


def at_once(*jobs: Callable[[], Any]) -> list[Any]:
    """What functions return, or the errors that they raise, each in a thread."""
    found: list[Any] = [None] * len(jobs)

    def run(number: int, job: Callable[[], Any]) -> None:
        try:
            found[number] = job()
        except Exception as error:  # the test looks at it
            found[number] = error

    threads = [threading.Thread(target=run, args=item) for item in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return found


def served(
    batcher: Batcher, sample: Sample, requests: Sequence[tuple[Any, int, int]], ahead: int = 1
) -> list[list[Tensor]]:
    """Outputs of every step of requests that are open together: policy, number of steps, seed of each.

    Each is so many steps ahead of the one after it.
    """
    opened: list[tuple[tuple[Any, int, int], Any, list[Tensor]]] = []
    with batcher.turns.patient(0.0):
        for policy, steps, seed in requests:
            for (_, length, other), request, outputs in opened:
                outputs += [_step(request, sample, length, other, len(outputs) + i) for i in range(ahead)]
            request = batcher.request(policy, schedule=models.timesteps(steps))
            opened.append(((policy, steps, seed), request, []))

    def finish(steps: int, seed: int, request: Any, outputs: list[Tensor]) -> list[Tensor]:
        with request:
            outputs += [_step(request, sample, steps, seed, i) for i in range(len(outputs), steps)]
        return outputs

    jobs = [
        lambda steps=steps, seed=seed, request=request, outputs=outputs: finish(steps, seed, request, outputs)
        for (_, steps, seed), request, outputs in opened
    ]
    return at_once(*jobs)


def alone(sample: Sample, policy: Any, steps: int, seed: int) -> list[Tensor]:
    """Outputs of every step of a model that serves nobody else."""
    return models.run(models.optimized(sample, policy, steps), sample.inputs, models.timesteps(steps), seed)


def _step(request: Any, sample: Sample, steps: int, seed: int, step: int) -> Tensor:
    return models.call(request.model, sample.inputs, models.timesteps(steps)[step], seed * 1000 + step)
