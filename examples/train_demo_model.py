"""Train the bundled demonstration model: a small class-conditional DiT on procedural pictures, by flow matching.

About 70 CPU minutes on one core with AVX512-BF16, minutes on a GPU. The run can be stopped and resumed
(``--checkpoint``); the result is a diffusers folder (config, float16 weights, scheduler) that
``DiTTransformer2DModel.from_pretrained`` loads::

    python examples/train_demo_model.py --bfloat16 --out dicompile/demo/assets/shapes_dit

Reference:
    Liu et al., Flow Straight and Fast, arXiv 2209.03003: the model predicts ``noise - picture`` between the two.
    Esser et al., Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, arXiv 2403.03206, section
    3.1: sigmas whose logits are normal.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from diffusers.models.attention_processor import Attention
from torch import Tensor
from tqdm import tqdm

from dicompile.demo import shapes

LABEL_DROPOUT = 0.1
EMA_DECAY = 0.999


def build_model() -> DiTTransformer2DModel:
    """Eight blocks of width 128 over 64 tokens; label NUM_CLASSES is the null label of classifier-free guidance."""
    return DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        num_layers=8,
        in_channels=3,
        out_channels=3,
        sample_size=shapes.IMAGE_SIZE,
        patch_size=4,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=shapes.NUM_CLASSES,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    )


def initialise(model: DiTTransformer2DModel) -> None:
    """Zero gates and output, as DiT does: every block starts as the identity."""
    for block in model.transformer_blocks:
        torch.nn.init.zeros_(block.norm1.linear.weight)
        torch.nn.init.zeros_(block.norm1.linear.bias)
    torch.nn.init.zeros_(model.proj_out_2.weight)
    torch.nn.init.zeros_(model.proj_out_2.bias)


class FullPrecision:
    """Attention in float32 under autocast, too: what PyTorch does on a CPU in bfloat16 takes twice as long."""

    def __call__(self, attention: Attention, hidden_states: Tensor, **_: None) -> Tensor:
        """Self-attention of tokens, [b, n, d]."""
        projections = (attention.to_q, attention.to_k, attention.to_v)
        heads = [p(hidden_states).float().unflatten(-1, (attention.heads, -1)).transpose(1, 2) for p in projections]
        return attention.to_out[0](F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm-up over 200 steps, constant, linear decay to zero over the last 30 %."""
    return peak * min(1.0, (step + 1) / 200, (steps - step) / (0.3 * steps))


def train(arguments: argparse.Namespace) -> DiTTransformer2DModel:
    """Run (or resume) the training and return the averaged model."""
    device = arguments.device
    torch.manual_seed(arguments.seed)
    data = torch.Generator().manual_seed(arguments.seed)
    model = build_model().to(device)
    initialise(model)
    model.eval()  # the null label is dropped in below, once for all blocks; diffusers would drop it per block
    average = copy.deepcopy(model).requires_grad_(False)
    optimiser = torch.optim.AdamW(model.parameters(), lr=arguments.lr, betas=(0.9, 0.99), fused=True)
    first = 0
    if arguments.checkpoint.exists():
        saved = torch.load(arguments.checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"])
        optimiser.load_state_dict(saved["optimiser"])
        data.set_state(saved["data"])
        first = saved["step"]

    for block in model.transformer_blocks:
        block.attn1.set_processor(FullPrecision())
    compiled = torch.compile(model)
    progress = tqdm(range(first, arguments.steps), initial=first, total=arguments.steps, mininterval=5)
    smooth = None
    for step in progress:
        labels = torch.randint(shapes.NUM_CLASSES, (arguments.batch,), generator=data)
        pictures = shapes.draw(labels, data)
        dropped = torch.rand(arguments.batch, generator=data) < LABEL_DROPOUT
        labels = labels.masked_fill(dropped, shapes.NUM_CLASSES).to(device)
        noise = torch.randn(pictures.shape, generator=data).to(device)
        sigma = torch.sigmoid(torch.randn(arguments.batch, generator=data)).to(device)
        pictures = pictures.to(device)

        noisy = torch.lerp(pictures, noise, sigma[:, None, None, None])
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, arguments.steps, arguments.lr)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=arguments.bfloat16):
            predicted = compiled(noisy, timestep=1000 * sigma, class_labels=labels, return_dict=False)[0]
        loss = F.mse_loss(predicted.float(), noise - pictures)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()

        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        smooth = loss.item() if smooth is None else 0.99 * smooth + 0.01 * loss.item()
        progress.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        if (step + 1) % 500 == 0:
            state = {
                "model": model.state_dict(),
                "average": average.state_dict(),
                "optimiser": optimiser.state_dict(),
                "data": data.get_state(),
                "step": step + 1,
            }
            partial = arguments.checkpoint.with_suffix(".partial")
            torch.save(state, partial)
            partial.replace(arguments.checkpoint)
    return average


def main() -> None:
    """Parse arguments, train, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo_model"))
    parser.add_argument("--checkpoint", type=Path, default=Path("demo_model.ckpt"))
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bfloat16", action="store_true", help="train under autocast")
    arguments = parser.parse_args()
    average = train(arguments)
    average.half().save_pretrained(arguments.out)
    FlowMatchEulerDiscreteScheduler().save_pretrained(arguments.out)
    print(f"saved {sum(p.numel() for p in average.parameters()) / 1e6:.2f} M parameters to {arguments.out}")


if __name__ == "__main__":
    main()
