"""Sample pictures from the bundled model with classifier-free guidance: the loop of any diffusers DiT, spelled out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from dicompile.demo import shapes
from dicompile.errors import DicompileError

MODEL_FOLDER = Path(__file__).parent / "assets" / "shapes_dit"
GUIDANCE = 2.0
"""Of classifier-free guidance, unitless: the bundled model is sampled with it, and learned files were made for it."""


def load_model(folder: Path = MODEL_FOLDER) -> DiTTransformer2DModel:
    """Load the bundled diffusion transformer, in float32 and eval mode.

    Raises:
        DicompileError: the folder is not there.
    """
    _require(folder)
    return DiTTransformer2DModel.from_pretrained(folder, local_files_only=True).float().eval().requires_grad_(False)


def load_scheduler(folder: Path = MODEL_FOLDER) -> FlowMatchEulerDiscreteScheduler:
    """Load the sampler that the bundled model was trained for.

    Raises:
        DicompileError: the folder is not there.
    """
    _require(folder)
    return FlowMatchEulerDiscreteScheduler.from_pretrained(folder, local_files_only=True)


@torch.no_grad()
def sample(
    model: nn.Module,
    scheduler: Any,
    labels: Tensor,
    steps: int,
    guidance: float = GUIDANCE,
    seed: int = 0,
    progress: Callable[[], object] | None = None,
    stop_after: int | None = None,
) -> Tensor:
    """Sample one picture per label; each step is one call of the model on the batch [cond, uncond].

    Args:
        model: predicts the velocity; called like ``DiTTransformer2DModel``.
        scheduler: of diffusers; its timesteps are set here.
        labels: int, [b], each in [0, shapes.NUM_CLASSES).
        steps: number of model calls.
        guidance: 1 follows the label without amplification, unitless.
        seed: of the initial noise, drawn on the CPU so that every device starts alike.
        progress: called after every step.
        stop_after: number of steps after which to give up, for warming up.

    Returns:
        Pictures in about [-1, 1], dtype of the initial noise (float32), on the device of ``labels``, [b, 3, 32, 32].
    """
    device, count = labels.device, len(labels)
    scheduler.set_timesteps(steps, device=device)
    noise = torch.randn(count, 3, shapes.IMAGE_SIZE, shapes.IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))
    latents: Tensor = noise.to(device) * getattr(scheduler, "init_noise_sigma", 1.0)
    both_labels = torch.cat([labels, torch.full_like(labels, shapes.NUM_CLASSES)])
    for timestep in scheduler.timesteps[:stop_after]:
        both = torch.cat([latents, latents])
        if hasattr(scheduler, "scale_model_input"):  # flow-matching ones take it as it is
            both = scheduler.scale_model_input(both, timestep)
        t_batch = timestep.expand(2 * count)
        predicted = model(both, timestep=t_batch, class_labels=both_labels, return_dict=False)[0]
        cond, uncond = predicted.chunk(2)
        latents = scheduler.step(uncond + guidance * (cond - uncond), timestep, latents, return_dict=False)[0]
        if progress is not None:
            progress()
    return latents


def balanced_labels(count: int) -> Tensor:
    """The first ``count`` class labels (int64, [count]) of a fixed order in which every attribute soon occurs.

    The first 12 show every shape, colour and texture, 30 every pair of shape and colour, 150 every class once.
    """
    index = torch.arange(count)
    round_of_five, round_of_thirty = index // len(shapes.SHAPES), index // 30
    shape, colour = index % len(shapes.SHAPES), index % len(shapes.COLOURS)
    texture = (round_of_five + round_of_thirty + 2 * shape) % len(shapes.TEXTURES)
    return (shape * len(shapes.COLOURS) + colour) * len(shapes.TEXTURES) + texture


def _require(folder: Path) -> None:
    if not folder.is_dir():
        raise DicompileError(
            "the demo model is missing",
            where=str(folder),
            why="its weights are packaged files, and this copy of dicompile lacks them",
            fix=f"reinstall dicompile, or run: python examples/train_demo_model.py --out {folder}",
        )
