"""How much of the saved work arrives as saved time.

For a DiT (12 blocks, width 384, 2 x 256 tokens) and a PixArt of like size: eager, torch.compile, and dicompile with the
policies none, FORA 3 and ToCa 3, all in one run and interleaved, because shared machines drift. Prints the time of
every kind of step, the speedup over torch.compile, the FLOP speedup, and their ratio ("arrival"); then compile times,
cold and warm::

    python examples/bench.py
    python examples/bench.py --device cuda --dtype bfloat16
    python examples/bench.py --device cuda --dtype bfloat16 --blocks 28 --heads 16 --head-width 72 --edge 64  # DiT-XL/2
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from rich.console import Console
from rich.table import Table
from torch import nn

import dicompile


class Size(NamedTuple):
    """Blocks and heads of a model, the width of a head, and the edge of its latent; a token is 2 x 2 of it."""

    blocks: int = 12
    heads: int = 6
    head_width: int = 64
    edge: int = 32


def dit(size: Size) -> tuple[nn.Module, dict[str, Any]]:
    """Class-conditional DiT and its inputs without latent and timestep."""
    model = DiTTransformer2DModel(
        num_attention_heads=size.heads,
        attention_head_dim=size.head_width,
        in_channels=4,
        num_layers=size.blocks,
        sample_size=size.edge,
        patch_size=2,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    return model, {"class_labels": torch.tensor([1, 1000])}


def pixart(size: Size) -> tuple[nn.Module, dict[str, Any]]:
    """Text-conditional DiT and its inputs without latent and timestep."""
    model = PixArtTransformer2DModel(
        num_attention_heads=size.heads,
        attention_head_dim=size.head_width,
        in_channels=4,
        out_channels=8,
        num_layers=size.blocks,
        cross_attention_dim=size.heads * size.head_width,
        sample_size=size.edge,
        patch_size=2,
        caption_channels=512,
        norm_type="ada_norm_single",
        use_additional_conditions=False,
    )
    nothing = {"resolution": None, "aspect_ratio": None}
    return model, {"encoder_hidden_states": torch.randn(2, 77, 512), "added_cond_kwargs": nothing}


MODELS = {"DiT": (dit, dicompile.ToCa()), "PixArt": (pixart, dicompile.ToCaPixArt())}


@dataclass
class Contestant:
    """One way to run the model, and its times in milliseconds by kind of step."""

    name: str
    model: Any
    kinds: list[str]
    plan: dicompile.Plan | None = None
    by_kind: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    runs: list[float] = field(default_factory=list)

    def median(self) -> float:
        """Milliseconds of a whole run, from the median of every kind of step."""
        return sum(statistics.median(self.by_kind[kind]) for kind in self.kinds)


def contestants(name: str, size: Size, steps: list[int], device: str, dtype: torch.dtype) -> list[Contestant]:
    """Build, compile and warm up everything for one model."""
    build, toca = MODELS[name]
    torch.manual_seed(0)
    model, inputs = build(size)
    model = model.eval().to(device, dtype)
    inputs = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
    inputs = {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    full = ["full"] * len(steps)
    found = [Contestant("eager", model, full), Contestant("torch.compile", torch.compile(model, dynamic=False), full)]
    found += [
        Contestant(f"dicompile {policy.name}", dicompile.optimize(model, policy, schedule=steps), full)
        for policy in (dicompile.NoCache(), dicompile.FORA(3), toca)
    ]
    for contestant in found:
        run(contestant, inputs, steps, device, dtype, record=False)
        if contestant.name.startswith("dicompile"):
            contestant.plan = dicompile.plan_of(contestant.model)
            contestant.kinds = [step.kind for step in contestant.plan.steps]
    for contestant in found:
        contestant.model = (contestant.model, inputs)
    return found


def run(
    contestant: Contestant, inputs: dict[str, Any], steps: list[int], device: str, dtype: torch.dtype, *, record: bool
) -> None:
    """One sampling run; every step is timed by itself."""
    model = contestant.model
    edge = model.config.sample_size
    latent = torch.randn(2, 4, edge, edge, device=device, dtype=dtype)
    synchronise: Callable[[], Any] = torch.cuda.synchronize if device == "cuda" else lambda: None
    for number, timestep in enumerate(steps):
        t = torch.full((2,), timestep, device=device)
        synchronise()
        start = time.perf_counter()
        with torch.no_grad():
            model(latent, timestep=t, return_dict=False, **inputs)
        synchronise()
        if record:
            contestant.by_kind[contestant.kinds[number]].append(1e3 * (time.perf_counter() - start))


def measure(name: str, size: Size, steps: list[int], rounds: int, device: str, dtype: torch.dtype) -> list[Contestant]:
    """Interleaved rounds over all contestants."""
    found = contestants(name, size, steps, device, dtype)
    for _ in range(rounds):
        for contestant in found:
            model, inputs = contestant.model
            shadow = Contestant(contestant.name, model, contestant.kinds, by_kind=contestant.by_kind)
            run(shadow, inputs, steps, device, dtype, record=True)
    return found


def table(name: str, found: list[Contestant]) -> Table:
    """One row per contestant."""
    result = Table(
        "", "ms per kind of step", "ms per run", "vs torch.compile", "fewer FLOPs", "arrival", "cache", title=name
    )
    baseline = found[1].median()
    for contestant in found:
        kinds = ", ".join(f"{kind} {statistics.median(t):.2f}" for kind, t in contestant.by_kind.items())
        speedup = baseline / contestant.median()
        plan = contestant.plan
        result.add_row(
            contestant.name,
            kinds,
            f"{contestant.median():.1f}",
            f"{speedup:.2f}x",
            f"{plan.flop_speedup:.2f}x" if plan else "",
            f"{speedup / plan.flop_speedup:.2f}" if plan else "",
            f"{plan.cache_bytes / 2**20:.2f} MiB" if plan else "",
        )
    return result


def compile_times(name: str, policy: str, blocks: int) -> tuple[float, float]:
    """Seconds from `optimize` to the end of the first run: with empty caches, and in a second process."""
    with tempfile.TemporaryDirectory() as cache:
        folders = {"TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor", "DICOMPILE_CACHE_DIR": f"{cache}/dicompile"}
        environment = {**os.environ, **folders}
        command = [sys.executable, __file__, "--compile-only", name, policy, "--blocks", str(blocks)]
        outputs = [
            subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
            for _ in range(2)
        ]
    cold, warm = (json.loads(output.splitlines()[-1]) for output in outputs)
    return cold, warm


def compile_only(name: str, policy: str, blocks: int) -> None:
    """What the child process of `compile_times` does."""
    build, toca = MODELS[name]
    model, inputs = build(Size(blocks))
    model.eval()
    steps = list(range(980, -1, -20))
    chosen = {"none": dicompile.NoCache(), "fora": dicompile.FORA(3), "toca": toca}
    start = time.perf_counter()
    if policy == "torch.compile":
        run(Contestant("", torch.compile(model), []), inputs, steps[:1], "cpu", torch.float32, record=False)
    else:
        optimized = dicompile.optimize(model, chosen[policy], schedule=steps)
        run(Contestant("", optimized, []), inputs, steps, "cpu", torch.float32, record=False)
    print(json.dumps(time.perf_counter() - start))


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in Size()._asdict().items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--model", choices=MODELS, action="append")
    parser.add_argument("--no-compile-times", action="store_true")
    parser.add_argument("--quick", action="store_true", help="2 blocks, 6 steps, 1 round, no compile times")
    parser.add_argument("--compile-only", nargs=2, metavar=("MODEL", "POLICY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.compile_only:
        compile_only(*arguments.compile_only, arguments.blocks)
        return
    if arguments.quick:
        arguments.blocks, arguments.steps, arguments.rounds, arguments.no_compile_times = 2, 6, 1, True
    console = Console()
    threads = torch.get_num_threads()
    console.print(f"torch {torch.__version__}, {arguments.device}, {arguments.dtype}, {threads} threads")
    steps = [round(999 - i * 999 / arguments.steps) for i in range(arguments.steps)]
    for name in arguments.model or MODELS:
        dtype = getattr(torch, arguments.dtype)
        size = Size(*(getattr(arguments, part) for part in Size._fields))
        console.print(table(name, measure(name, size, steps, arguments.rounds, arguments.device, dtype)))
    if not arguments.no_compile_times:
        times = Table("", "cold s", "warm s", title="from optimize to the end of the first run, DiT")
        for policy, blocks in [("torch.compile", 12), ("none", 12), ("fora", 12), ("toca", 12), ("toca", 28)]:
            cold, warm = compile_times("DiT", policy, blocks)
            times.add_row(f"{policy}, {blocks} blocks", f"{cold:.1f}", f"{warm:.1f}")
        console.print(times)


if __name__ == "__main__":
    main()
