"""``dicompile compare MODEL``: policies beside each other on pictures, with a report that opens in any browser."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
import yaml
from rich.console import Console

from dicompile.cli.extras import needed_for
from dicompile.errors import DicompileError
from dicompile.plan import Policy
from dicompile.policies import get_policy
from dicompile.progress import progress

if TYPE_CHECKING:
    from dicompile.compare import Subject

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def compare_command(  # noqa: PLR0913, PLR0917 - options
    model: Annotated[str, typer.Argument(help="'demo', or a folder that a diffusers pipeline was saved to.")],
    policy: Annotated[list[str], typer.Option("--policy", "-p", help="Name or file; may be repeated.")],
    steps: Annotated[int, typer.Option(min=2, help="Denoising steps.")] = 50,
    prompt: Annotated[list[str] | None, typer.Option(help="For a pipeline; may be repeated.")] = None,
    call: Annotated[list[str] | None, typer.Option(help="name=value for the pipeline's call; may be repeated.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed generations of each, which take turns.")] = 3,
    samples: Annotated[int, typer.Option(min=2, help="Pictures of the demo.")] = 8,
    fewer_steps: Annotated[bool, typer.Option(help="Also fewer steps without a cache, at equal compute.")] = True,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    device: Annotated[str, typer.Option(help="Where a pipeline runs.")] = "cpu",
    dtype: Annotated[str, typer.Option(help=f"Of a pipeline: {', '.join(DTYPES)}.")] = "float32",
    out: Annotated[Path, typer.Option(help="Folder for index.html and results.json.")] = Path("report"),
) -> None:
    """Time, memory and likeness of policies, and of fewer steps, on one model: a table and an HTML report."""
    with needed_for("comparing", "compare"):
        from dicompile.compare import compare, write_report
    policies = contestants(policy)
    given = {"prompt": list(prompt)} if prompt else {}
    subject = _subject(model, steps, {**given, **_values(call or [])}, samples, seed, device, dtype)
    console = Console()
    with progress("loading") as update:
        found = compare(
            subject,
            policies,
            rounds=rounds,
            fewer_steps=fewer_steps,
            tick=lambda text: update(description=text),
        )
    console.print(found.table())
    for name, reason in found.refused:
        console.print(f"{name} cannot run this model: {reason}", markup=False)
    console.print(f"report: {write_report(found, out)}", markup=False)


def contestants(spelled: Sequence[str]) -> dict[str, Policy]:
    """Policies by what they are called: by their names, and where two share one, by what the user wrote.

    Raises:
        DicompileError: one was asked for twice.
    """
    twice = [name for name, count in Counter(spelled).items() if count > 1]
    if twice:
        raise DicompileError(
            f"{', '.join(twice)} would compete with itself",
            where="--policy",
            why="it was given twice",
            fix="give each policy once; --rounds repeats the measurement",
        )
    chosen = {name: get_policy(name) for name in spelled}
    names = Counter(policy.name for policy in chosen.values())
    return {policy.name if names[policy.name] == 1 else name: policy for name, policy in chosen.items()}


def _subject(
    model: str, steps: int, call: Mapping[str, Any], samples: int, seed: int, device: str, dtype: str
) -> Subject:
    from dicompile.compare import PipelineSubject

    if model == "demo":
        from dicompile.demo.subject import demo_subject

        return demo_subject(samples, steps, seed)
    if dtype not in DTYPES:
        raise DicompileError(f"there is no dtype {dtype!r}", where="--dtype", fix=f"use one of: {', '.join(DTYPES)}")
    if not (Path(model) / "model_index.json").is_file():
        raise DicompileError(
            f"there is no pipeline {model!r}",
            where="MODEL",
            why="it is neither 'demo' nor a folder with a model_index.json",
            fix="give the folder that pipe.save_pretrained wrote, or compare in Python: dicompile.compare.compare(...)",
        )
    import diffusers

    pipeline = diffusers.DiffusionPipeline.from_pretrained(model, local_files_only=True, torch_dtype=DTYPES[dtype])
    pipeline.set_progress_bar_config(disable=True)
    return PipelineSubject(pipeline.to(device), call, steps, seed)


def _values(call: list[str]) -> dict[str, Any]:
    """Arguments from ``name=value``; values are YAML: numbers, true, [lists], text."""
    parts = [argument.partition("=") for argument in call]
    wrong = next((argument for argument, (name, sign, _) in zip(call, parts, strict=True) if not (name and sign)), None)
    if wrong is not None:
        raise DicompileError(f"{wrong!r} is no name=value", where="--call", fix="--call guidance_scale=4.5")
    return {name: yaml.safe_load(value) for name, _, value in parts}
