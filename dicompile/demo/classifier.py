"""The judge of the demo: a small convolutional network that tells what is in front: its shape, colour and texture.

It answers two questions about samples: do they show what the label asked for (three heads), and are they distributed
like procedural pictures (the penultimate features, for a Frechet distance). ``examples/train_demo_classifier.py``
trains it.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dicompile.demo import shapes
from dicompile.errors import DicompileError

CLASSIFIER_FILE = Path(__file__).parent / "assets" / "classifier.safetensors"
FEATURES = 32
TRUE_PICTURES_PER_CLASS, TRUE_SEED = 20, 1


class Prediction(NamedTuple):
    """What the classifier says about a batch of pictures; all float32."""

    shape: Tensor
    """Logits, [b, 5], in the order of ``shapes.SHAPES``."""
    colour: Tensor
    """Logits, [b, 6], in the order of ``shapes.COLOURS``."""
    texture: Tensor
    """Logits, [b, 5], in the order of ``shapes.TEXTURES``."""
    features: Tensor
    """Penultimate features, [b, 32], of zero mean and unit variance in each picture; every logit is linear in them."""

    @property
    def attributes(self) -> shapes.Attributes:
        """The most likely shape, colour and texture indices, each [b]."""
        return shapes.Attributes(self.shape.argmax(-1), self.colour.argmax(-1), self.texture.argmax(-1))


class Classifier(nn.Module):
    """Four convolutions from 32x32 down to 4x4, a linear layer to 32 features, three linear heads; 109 k parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *_convolution(3, 24, stride=1),
            *_convolution(24, 48, stride=2),
            *_convolution(48, 64, stride=2),
            *_convolution(64, 64, stride=2),
            nn.Flatten(),
            nn.Linear(64 * (shapes.IMAGE_SIZE // 8) ** 2, FEATURES),
            nn.LayerNorm(FEATURES, elementwise_affine=False),  # gives Frechet distances a scale
        )
        self.shape = nn.Linear(FEATURES, len(shapes.SHAPES))
        self.colour = nn.Linear(FEATURES, len(shapes.COLOURS))
        self.texture = nn.Linear(FEATURES, len(shapes.TEXTURES))

    def forward(self, pictures: Tensor) -> Prediction:
        """Judge ``pictures`` (float32 in [-1, 1], [b, 3, 32, 32])."""
        features = self.trunk(pictures)
        return Prediction(self.shape(features), self.colour(features), self.texture(features), features)


def load_classifier(path: Path = CLASSIFIER_FILE) -> Classifier:
    """Load the bundled classifier, in float32 and ready to judge.

    Raises:
        DicompileError: the file is not there.
    """
    if not path.exists():
        raise DicompileError(
            "the demo classifier is missing",
            where=str(path),
            why="its weights are a packaged file, and this copy of dicompile lacks it",
            fix=f"reinstall dicompile, or run: python examples/train_demo_classifier.py --out {path}",
        )
    classifier = Classifier()
    classifier.load_state_dict({name: weight.float() for name, weight in load_file(path).items()})
    return classifier.eval().requires_grad_(False)


@torch.no_grad()
def judge(classifier: Classifier, pictures: Tensor, batch: int = 500) -> Prediction:
    """Run the classifier over any number of pictures (float32 in [-1, 1], [n, 3, 32, 32]), ``batch`` at a time."""
    parts = [classifier(part) for part in pictures.split(batch)]
    return Prediction(*(torch.cat(field) for field in zip(*parts, strict=True)))


def true_features(classifier: Classifier) -> Tensor:
    """Features of procedural pictures, 20 of every class, [3000, 32]: how those of samples should be distributed."""
    labels = torch.arange(shapes.NUM_CLASSES).repeat(TRUE_PICTURES_PER_CLASS)
    return judge(classifier, shapes.draw(labels, torch.Generator().manual_seed(TRUE_SEED))).features


def _convolution(inputs: int, outputs: int, stride: int) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
        nn.GroupNorm(8, outputs),
        nn.GELU(),
    )
