"""``dicompile doctor``: what is installed, which devices there are, and whether a small model compiles."""

from __future__ import annotations

import importlib.util
import math
import os
import platform
import time

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

import dicompile
from dicompile.bench.machine import Machine
from dicompile.config import Settings
from dicompile.text import size_text

EXTRAS = {
    "diffusers": ("diffusers", "transformers", "accelerate"),
    "compare": ("jinja2", "PIL", "skimage"),
    "demo": ("matplotlib", "tqdm"),
    "bench": ("cache_dit",),
    "triton": ("triton",),
    "flash": ("flash_attn",),
    "flip": ("flip_evaluator",),
}
"""Packages that an extra brings, by the names under which they are imported."""
STEPS, WIDTH, TOKENS = 6, 32, 16
CLOSE = 1e-4


def doctor() -> None:
    """Show versions, devices, extras and the cache folder, and compile a small model: whether everything works."""
    console = Console()
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in facts().items():
        table.add_row(name, value)
    console.print(table)
    with console.status("compiling a small model"):
        problem = self_test("cuda" if torch.cuda.is_available() else "cpu")
    if problem:
        console.print(f"[red]does not work:[/red] {problem[0]}")
        console.print(f"  fix: {problem[1]}", markup=False)
        raise typer.Exit(1)
    console.print(
        "[green]works:[/green] a model of two blocks was compiled, its steps were reused, and it agrees with eager mode"
    )


def facts() -> dict[str, str]:
    """What is worth knowing in a report of a fault."""
    store = Settings.from_environment().store
    machine = Machine.of("cuda" if torch.cuda.is_available() else "cpu", "")
    gpus = [
        f"{torch.cuda.get_device_name(i)}, sm_{''.join(map(str, torch.cuda.get_device_capability(i)))}, "
        f"{size_text(torch.cuda.get_device_properties(i).total_memory)}"
        for i in range(torch.cuda.device_count())
    ]
    missing = {extra: [name for name in names if not _is_there(name)] for extra, names in EXTRAS.items()}
    return {
        "versions": ", ".join(f"{name} {version}" for name, version in machine.versions.items()),
        "system": platform.platform(),
        "CPU": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "GPU": "; ".join(gpus) or "none",
        "C++ compiler": _cpp_compiler() or "none, so that nothing compiles for a CPU",
        "extras": ", ".join(extra for extra, names in missing.items() if not names) or "none",
        "missing": "; ".join(f"{extra} ({', '.join(names)})" for extra, names in missing.items() if names) or "none",
        "cache folder": f"{store.folder}, at most {size_text(store.most_bytes)}" if store.folder else "off",
    }


def self_test(device: str) -> tuple[str, str] | None:
    """Compile and run a small model; what is wrong, and what to do about it."""
    torch.manual_seed(0)
    model = _Small().eval().to(device)
    optimized = dicompile.optimize(model, "fora", schedule=STEPS)
    latent, start = torch.randn(1, TOKENS, WIDTH, device=device), time.perf_counter()
    with torch.no_grad():
        for step in range(STEPS):
            timestep = torch.full((1,), 1000.0 * (STEPS - step) / STEPS, device=device)
            try:
                found = optimized(latent, timestep)
            except Exception as error:
                return f"{type(error).__name__}: {str(error).splitlines()[0]}", _advice(device)
            if step == 0 and not torch.allclose(found, model(latent, timestep), atol=CLOSE):
                return "compiled code and eager mode disagree", "report this, with what stands above"
    if not dicompile.report(optimized).kinds["reuse"]:
        return f"no step was reused in {time.perf_counter() - start:.0f} s", "report this, with what stands above"
    return None


def _advice(device: str) -> str:
    if device == "cpu":
        return "install a C++ compiler (Debian: apt-get install g++), or use backend='eager' for debugging"
    return "check that torch.compile works on this GPU, and that triton is the version that torch asks for"


def _cpp_compiler() -> str | None:
    """The compiler that Inductor takes: its setting, else ``CXX``, else what is installed."""
    try:
        return get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError):
        return None


def _is_there(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


class _Small(nn.Module):
    """Two blocks of attention and MLP, modulated by the timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        rates = torch.exp(-math.log(10000) * torch.arange(WIDTH // 2, device=x.device) / (WIDTH // 2))
        angles = timestep[:, None] * rates
        time_embedding = torch.cat([angles.cos(), angles.sin()], -1)
        for block in self.blocks:
            x = block(x, time_embedding)
        result: Tensor = self.head(x)
        return result


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.modulation, self.qkv = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.out, self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor, time_embedding: Tensor) -> Tensor:
        gate, other = self.modulation(time_embedding)[:, None].chunk(2, -1)
        heads = [part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(_normed(x)).chunk(3, -1)]
        attended = nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        x = x + gate * self.out(attended)
        result: Tensor = x + other * self.down(nn.functional.gelu(self.up(_normed(x))))
        return result


def _normed(x: Tensor) -> Tensor:
    return nn.functional.layer_norm(x, (WIDTH,))
