"""``dicompile inspect MODEL``: what is cacheable, what each policy would do and save; nothing is compiled."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dicompile.analysis import Block, ModelStructure, Pace, Site, analyse
from dicompile.capture import capture_model
from dicompile.cli.models import load
from dicompile.errors import CacheTooLarge, PolicyDoesNotFit
from dicompile.plan import DTYPES, CacheOptions, Plan, TimestepSchedule, make_plan
from dicompile.policies import POLICIES, get_policy, required_options

Refusal = PolicyDoesNotFit | CacheTooLarge


def inspect(  # noqa: PLR0913, PLR0917 - options
    model: Annotated[str, typer.Argument(help="'demo', a folder saved by diffusers, or module:factory.")],
    policy: Annotated[
        list[str] | None, typer.Option("--policy", "-p", help="Policy name or file; may be repeated. Default: all.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 50,
    batch: Annotated[int, typer.Option(min=1, help="Rows of the batch; guidance counts twice.")] = 2,
    size: Annotated[int | None, typer.Option(help="Edge of the latent; from the model's config by default.")] = None,
    grid: Annotated[bool, typer.Option(help="Print what every site does at every step.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    max_cache_bytes: Annotated[
        str | None, typer.Option(help="Budget of the cache for one guidance context: '2GiB', '500MB'.")
    ] = None,
    over_budget: Annotated[str, typer.Option(help="'refuse' or 'degrade' a plan that needs more.")] = "refuse",
    cache_dtype: Annotated[str | None, typer.Option(help=f"Store values as {', '.join(DTYPES)}.")] = None,
    cache_device: Annotated[str | None, typer.Option(help="'cpu' keeps the cache in host memory.")] = None,
) -> None:
    """Show blocks, sites and costs of a model, and what each policy would do to it."""
    cache = CacheOptions.of(max_cache_bytes, over_budget, cache_dtype, cache_device, where="dicompile inspect")
    loaded = load(model, batch, size)
    with loaded.fake_mode:
        structure = analyse(capture_model(loaded.module, loaded.inputs))
    schedule = TimestepSchedule.of(steps)
    plans: dict[str, Plan] = {}
    refused: dict[str, Refusal] = {}
    trained = [name for name in POLICIES if required_options(name)]
    for name in policy or [name for name in POLICIES if name not in trained]:
        try:
            plans[name] = make_plan(structure, get_policy(name), schedule, cache)
        except (PolicyDoesNotFit, CacheTooLarge) as error:
            refused[name] = error
    if as_json:
        typer.echo(json.dumps(as_data(loaded.name, structure, plans, refused), indent=2))
        return
    console = Console()
    console.print(f"[bold]{loaded.name}[/bold], one call with batch {batch}: {operations(structure.flops)}")
    roles = (f"{item.name} ({item.role.value})" for item in structure.inputs if item.role.is_given)
    console.print("inputs: " + ", ".join(roles))
    console.print("outside of the steps: " + (invariant_text(structure) or "nothing"), highlight=False)
    console.print(site_table(structure))
    console.print(plan_table(plans, refused, steps))
    if not policy:
        console.print(f"left out, as they need a file that was trained for the model: {', '.join(trained)}")
    if grid:
        for plan in plans.values():
            console.print(plan_text(plan), highlight=False)


def site_table(structure: ModelStructure) -> Table:
    """One row per site; runs of equal blocks are one entry."""
    table = Table("block", "site", "stream", "shape", "work", "share", "refresh single tokens?", title="sites")
    for blocks in equal_runs(structure):
        first, last = blocks[0], blocks[-1]
        label = f"{first.id}" if first is last else f"{first.id}-{last.id}"
        path = first.path if first is last else f"{first.path} .. {last.path.rpartition('.')[2]}"
        for i, site in enumerate(structure.sites_of(first)):
            flops = sum(structure.sites_of(block)[i].flops for block in blocks)
            table.add_row(
                f"{label} {path}",
                site.kind.value,
                str(site.stream),
                "x".join(str(size) for size in site.shape),
                operations(flops),
                f"{flops / structure.flops:.1%}",
                str(site.tokens),
            )
            label = path = ""
        table.add_section()
    rest = structure.flops - sum(site.flops for site in structure.sites)
    share = f"{rest / structure.flops:.1%}"
    table.add_row("outside", "embeddings, modulation, head", "", "", operations(rest), share, "")
    return table


def invariant_text(structure: ModelStructure) -> str:
    """What does not depend on the latent, and is computed once for many steps."""
    counts = {pace: list(structure.invariants.values()).count(pace) for pace in Pace}
    return "; ".join(
        f"{count} values, {structure.invariant_flops[pace] / structure.flops:.2%} of the work, {pace.value}"
        for pace, count in counts.items()
        if count
    )


def operations(count: float) -> str:
    """Floating-point operations with a fitting unit."""
    unit, name = next(((u, n) for u, n in ((1e12, "TFLOP"), (1e9, "GFLOP")) if count >= u), (1e6, "MFLOP"))
    return f"{count / unit:.2f} {name}"


def equal_runs(structure: ModelStructure) -> list[list[Block]]:
    """Adjacent blocks of one list whose sites are alike."""

    def likeness(block: Block) -> tuple[object, ...]:
        sites = tuple((s.kind, s.stream, s.shape, s.tokens.wise) for s in structure.sites_of(block))
        return block.path.rpartition(".")[0], sites

    runs: list[list[Block]] = []
    for block in structure.blocks:
        if runs and likeness(runs[-1][-1]) == likeness(block):
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs


def plan_table(plans: dict[str, Plan], refused: dict[str, Refusal], steps: int) -> Table:
    """One row per policy."""
    table = Table(
        "policy", "steps by kind", "work", "fewer FLOPs", "predicted speedup", "cache", title=f"{steps} steps"
    )
    for plan in plans.values():
        kinds = [step.kind for step in plan.steps]
        table.add_row(
            plan.policy,
            ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)),
            operations(plan.flops),
            f"{plan.flop_speedup:.2f}x",
            f"{plan.predicted_speedup:.2f}x",
            f"{plan.cache_bytes / 2**20:.1f} MiB",
        )
    for name, error in refused.items():
        reason = error.what if isinstance(error, CacheTooLarge) else error.why
        table.add_row(name, f"[yellow]does not fit:[/yellow] {reason}", "", "", "", "")
    return table


def plan_text(plan: Plan) -> str:
    """The plan's grid with equal consecutive steps folded."""
    lines = plan.grid().splitlines()
    cells = [line.split(maxsplit=1)[1] for line in lines]
    folded: list[str] = []
    start = 0
    for i in range(1, len(lines) + 1):
        if i == len(lines) or cells[i] != cells[start]:
            label = f"{start}" if i - start == 1 else f"{start}-{i - 1}"
            folded.append(f"{label:>7}  {cells[start]}")
            start = i
    legend = "F computed, t some tokens, . reused, f forecast, - skipped; a letter per site, blocks apart, stack last"
    return "\n".join(["", plan.summary(), *plan.notes(), f"   step  kind, share of a full step, {legend}", *folded])


def as_data(
    name: str, structure: ModelStructure, plans: dict[str, Plan], refused: dict[str, Refusal]
) -> dict[str, Any]:
    """Everything that is printed, as plain data."""
    return {
        "model": name,
        "flops": structure.flops,
        "bytes": structure.bytes,
        "invariants": {name: pace.name.lower() for name, pace in structure.invariants.items()},
        "inputs": {item.name: item.role.value for item in structure.inputs if item.role.is_given},
        "blocks": [{"id": b.id, "path": b.path, "kind": b.kind, "sites": list(b.sites)} for b in structure.blocks],
        "sites": [_site_data(structure.sites, i) for i in range(len(structure.sites))],
        "policies": {
            key: {
                "flops": plan.flops,
                "flop_speedup": plan.flop_speedup,
                "predicted_speedup": plan.predicted_speedup,
                "cache_bytes": plan.cache_bytes,
                "setting_for": plan.meant_for,
                "notes": plan.notes(),
                "dropped": [label for item in plan.dropped for label in item.labels],
                "steps": [
                    {"kind": step.kind, "actions": "".join(site.action.symbol for site in step.sites)}
                    for step in plan.steps
                ],
            }
            for key, plan in plans.items()
        },
        "refused": {key: error.what for key, error in refused.items()},
    }


def _site_data(sites: Sequence[Site], number: int) -> dict[str, Any]:
    data = dataclasses.asdict(sites[number])
    tokens = data.pop("tokens")
    data["kind"] = sites[number].kind.value
    data["tokens"] = {**tokens, "wise": sites[number].tokens.wise.value}
    return data
