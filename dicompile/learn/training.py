"""What all trainings share: the step that several processes take together; the loop that resumes, logs and saves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from dicompile.errors import DicompileError
from dicompile.learn.checkpoint import append_line, forget_lines_after, load_checkpoint, save_checkpoint
from dicompile.learn.processes import rank, share, sum_over_processes
from dicompile.learn.trajectory import Trajectory
from dicompile.progress import progress as bar


@dataclass(frozen=True, slots=True)
class Files:
    """Where a training writes.

    Attributes:
        checkpoint: state to resume from, or None.
        log: JSON lines of `Entry`, or None.
        every: iterations between two checkpoints.
    """

    checkpoint: Path | None = None
    log: Path | None = None
    every: int = 200


NOWHERE = Files()
"""A training that leaves no files."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the log; its text is what the bar says.

    Attributes:
        iteration: number, counted from 1.
    """

    iteration: int


class Options(Protocol):
    """How something is trained."""

    @property
    def iterations(self) -> int:
        """Optimiser steps in total."""


class Training(Protocol):
    """A training that can be advanced, saved and continued.

    Attributes:
        name: what the bar calls it.
        invalid: what is raised where a checkpoint is none of this training.
        iteration: how many were run.
    """

    name: ClassVar[str]
    invalid: ClassVar[type[DicompileError]]
    iteration: int

    @property
    def options(self) -> Options:
        """How it is trained."""

    @property
    def key(self) -> str:
        """What a checkpoint has to agree with."""

    def advance(self) -> Entry:
        """One iteration."""

    def state(self) -> dict[str, Any]:
        """Everything that the next iteration depends on."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""


def draw(found: Sequence[Trajectory], count: int, generator: torch.Generator) -> list[Trajectory]:
    """Trajectories, with replacement."""
    return [found[int(i)] for i in torch.randint(len(found), (count,), generator=generator)]


def descend(
    optimiser: torch.optim.Optimizer,
    drawn: Sequence[Trajectory],
    evaluate: Callable[[Trajectory], tuple[Tensor, ...]],
) -> tuple[float, ...]:
    """One step down the mean loss of a batch, of which several processes evaluate a share each.

    Args:
        optimiser: of the parameters.
        drawn: the batch, the same in every process.
        evaluate: scalars of one trajectory, the loss first.

    Returns:
        Their means over the batch.
    """
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    optimiser.zero_grad(set_to_none=True)
    found: list[Tensor] = []
    for trajectory in share(drawn):
        scalars = evaluate(trajectory)
        (scalars[0] / len(drawn)).backward()
        found.append(torch.stack([scalar.detach().float() for scalar in scalars]))
    means = torch.stack(found).sum(0) / len(drawn)
    sum_over_processes([means, *(parameter.grad for parameter in parameters if parameter.grad is not None)])
    optimiser.step()
    return tuple(means.tolist())


def run_to_end(training: Training, files: Files = NOWHERE, *, resume: bool = False, progress: bool = True) -> None:
    """Run a training to its end.

    A resumed run ends with the very numbers of one that was never interrupted. Of several processes the first one
    writes the files; all of them read the checkpoint.

    Args:
        training: what to run.
        files: checkpoint and log.
        resume: continue from the checkpoint if it is there; otherwise checkpoint and log start anew.
        progress: show a bar.

    Raises:
        DicompileError: the checkpoint is damaged or belongs to a training with other options; see `Training.invalid`.
    """
    if resume and files.checkpoint is not None and files.checkpoint.exists():
        _restore(training, files.checkpoint)
    if rank() > 0:
        files, progress = NOWHERE, False
    forget_lines_after(files.log, training.iteration)
    total = training.options.iterations
    with bar(training.name, total, shown=progress) as update:
        update(advance=training.iteration)
        while training.iteration < total:
            entry = training.advance()
            append_line(files.log, asdict(entry))
            if files.checkpoint is not None and (entry.iteration % files.every == 0 or entry.iteration == total):
                save_checkpoint({"key": training.key, **training.state()}, files.checkpoint)
            update(advance=1, description=f"{training.name}: {entry}")


def _restore(training: Training, path: Path) -> None:
    state = load_checkpoint(path, training.invalid)
    if state["key"] != training.key:
        raise training.invalid(
            "the checkpoint belongs to another training",
            where=str(path),
            why=f"it says {state['key']}, this one {training.key}",
            fix="resume with the same options (but for the number of iterations), or remove the file",
        )
    try:
        training.restore(state)
    except Exception as error:  # whatever a state that lacks something, or has another shape, makes torch raise
        raise training.invalid(
            "the checkpoint is damaged",
            where=str(path),
            why=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}",
            fix="remove it and train from the start",
        ) from None
