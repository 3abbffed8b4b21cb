"""Turn the bundled demonstration model into a flow-matching one: the same DiT, fine-tuned for a few minutes.

The result is a diffusers folder with a ``FlowMatchEulerDiscreteScheduler``, which is how recent models sample::

    python examples/train_flow_model.py --out flow_model

Reference:
    Liu et al., Flow Straight and Fast, arXiv 2209.03003: the model predicts ``noise - picture`` between the two.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from tqdm import tqdm
from train_demo_model import LABEL_DROPOUT, learning_rate

from dicompile.demo import shapes
from dicompile.demo.sample import load_model

EMA_DECAY = 0.995


def train(steps: int, batch: int, peak: float, seed: int) -> DiTTransformer2DModel:
    """Fine-tune the bundled model and return the averaged weights.

    Args:
        steps: of the optimiser.
        batch: pictures per step.
        peak: highest learning rate.
        seed: of everything that is drawn.
    """
    torch.manual_seed(seed)
    data = torch.Generator().manual_seed(seed)
    model = load_model().requires_grad_(True)
    average = copy.deepcopy(model).requires_grad_(False)
    optimiser = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=0.01)
    progress = tqdm(range(steps), mininterval=5)
    smooth = None
    for step in progress:
        labels = torch.randint(shapes.NUM_CLASSES, (batch,), generator=data)
        pictures = shapes.draw(labels, data)
        labels = labels.masked_fill(torch.rand(batch, generator=data) < LABEL_DROPOUT, shapes.NUM_CLASSES)
        noise = torch.randn(pictures.shape, generator=data)
        sigma = torch.sigmoid(torch.randn(batch, generator=data))
        noisy = torch.lerp(pictures, noise, sigma[:, None, None, None])
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        predicted = model(noisy, timestep=1000 * sigma, class_labels=labels, return_dict=False)[0]
        loss = F.mse_loss(predicted, noise - pictures)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        smooth = loss.item() if smooth is None else 0.99 * smooth + 0.01 * loss.item()
        progress.set_postfix(loss=f"{smooth:.4f}", refresh=False)
    return average


def save(out: Path, steps: int, batch: int = 16, peak: float = 5e-4, seed: int = 0) -> None:
    """Train, and save model and scheduler to a folder; arguments as `train` takes them."""
    train(steps, batch, peak, seed).save_pretrained(out)
    FlowMatchEulerDiscreteScheduler().save_pretrained(out)
    print(f"saved to {out}")


def main() -> None:
    """Parse arguments, train, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("flow_model"))
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    save(arguments.out, arguments.steps, arguments.batch, arguments.lr, arguments.seed)


if __name__ == "__main__":
    main()
