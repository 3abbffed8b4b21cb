"""Train the bundled demonstration classifier, which judges what the demo samples.

About three CPU minutes. Training pictures carry light Gaussian noise, so that a sample is not misjudged
for noise that the sampler has left in it::

    python examples/train_demo_classifier.py --out dicompile/demo/assets/classifier.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from dicompile.demo import metrics, shapes
from dicompile.demo.classifier import Classifier, judge, load_classifier

NOISE = 0.15
"""Largest standard deviation of the training noise; pictures span [-1, 1]."""
TEST_SEED = 1_000_003
TEST_PICTURES = 6000


def add_noise(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Add Gaussian noise to ``pictures`` [b, 3, h, w]; the deviation of each picture is uniform in [0, NOISE]."""
    deviation = NOISE * torch.rand(len(pictures), 1, 1, 1, generator=generator)
    return pictures + deviation * torch.randn(pictures.shape, generator=generator)


def train(arguments: argparse.Namespace) -> Classifier:
    """Minimise the sum of the three cross-entropies under a one-cycle learning rate."""
    torch.manual_seed(arguments.seed)
    data = torch.Generator().manual_seed(arguments.seed)
    classifier = Classifier()
    optimiser = torch.optim.AdamW(classifier.parameters(), lr=arguments.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, arguments.lr, total_steps=arguments.steps)
    progress = tqdm(range(arguments.steps), mininterval=5)
    for _ in progress:
        labels = torch.randint(shapes.NUM_CLASSES, (arguments.batch,), generator=data)
        predicted = classifier(add_noise(shapes.draw(labels, data), data))
        wanted = shapes.attributes_of(labels)
        losses = [F.cross_entropy(logits, target) for logits, target in zip(predicted[:3], wanted, strict=True)]
        loss = torch.stack(losses).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    return classifier.eval()


def save(classifier: Classifier, path: Path, metadata: dict[str, str]) -> None:
    """Write the weights in float16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: weight.half().contiguous() for name, weight in classifier.state_dict().items()}, path, metadata)


def test(path: Path, noise: bool) -> metrics.Accuracy:
    """Accuracy of the saved file on pictures that the training never saw, clean or with the training noise."""
    generator = torch.Generator().manual_seed(TEST_SEED)
    labels = torch.arange(shapes.NUM_CLASSES).repeat(TEST_PICTURES // shapes.NUM_CLASSES)
    pictures = shapes.draw(labels, generator)
    if noise:
        pictures = add_noise(pictures, generator)
    return metrics.accuracy(judge(load_classifier(path), pictures).attributes, labels)


def main() -> None:
    """Parse arguments, train, save, test what was saved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("classifier.safetensors"))
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    classifier = train(arguments)
    settings = f"steps={arguments.steps} batch={arguments.batch} lr={arguments.lr} seed={arguments.seed}"
    metadata = {"trained_by": "examples/train_demo_classifier.py", "settings": settings, "torch": torch.__version__}
    save(classifier, arguments.out, metadata)
    clean, noisy = test(arguments.out, noise=False), test(arguments.out, noise=True)
    save(classifier, arguments.out, metadata | {"accuracy_clean": str(clean), "accuracy_noisy": str(noisy)})
    parameters = sum(p.numel() for p in classifier.parameters())
    print(f"saved {parameters} parameters, {arguments.out.stat().st_size / 1e3:.0f} kB, to {arguments.out}")
    print(f"{TEST_PICTURES} fresh pictures, clean: {clean}\n{TEST_PICTURES} fresh pictures, noisy: {noisy}")


if __name__ == "__main__":
    main()
