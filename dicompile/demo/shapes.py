"""Procedural pictures: one coloured shape at one place on a grey gradient.

A class is a triple (shape, colour, place), so a sample can be wrong in three ways that a small classifier can tell
apart. Everything else (size, rotation, offset, shade, background) varies freely and has to be invented by the sampler.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "ring", "cross")
COLOURS = {
    "red": (0.90, 0.18, 0.18),
    "green": (0.20, 0.75, 0.25),
    "blue": (0.22, 0.35, 0.95),
    "yellow": (0.95, 0.85, 0.20),
    "magenta": (0.88, 0.25, 0.85),
    "cyan": (0.20, 0.85, 0.88),
}
PLACES = {
    "centre": (0.0, 0.0),
    "top left": (-0.45, -0.45),
    "top right": (0.45, -0.45),
    "bottom left": (-0.45, 0.45),
    "bottom right": (0.45, 0.45),
}
NUM_CLASSES = len(SHAPES) * len(COLOURS) * len(PLACES)
IMAGE_SIZE = 32


class Attributes(NamedTuple):
    """What a class label stands for; each field is an index tensor of shape [b]."""

    shape: Tensor
    colour: Tensor
    place: Tensor


def attributes_of(labels: Tensor) -> Attributes:
    """Split class labels (int, [b], in [0, NUM_CLASSES)) into shape, colour and place indices."""
    rest, place = labels // len(PLACES), labels % len(PLACES)
    return Attributes(rest // len(COLOURS), rest % len(COLOURS), place)


def name_of(label: int) -> str:
    """Class label in words, for example ``"red ring, top left"``."""
    shape, colour, place = (int(i) for i in attributes_of(torch.tensor(label)))
    return f"{list(COLOURS)[colour]} {SHAPES[shape]}, {list(PLACES)[place]}"


def draw(labels: Tensor, generator: torch.Generator, size: int = IMAGE_SIZE) -> Tensor:
    """Draw one picture per label.

    Args:
        labels: int, [b].
        generator: source of everything that the label leaves open.
        size: edge in pixels.

    Returns:
        float32 pictures in [-1, 1], [b, 3, size, size].
    """
    attributes, count = attributes_of(labels), len(labels)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, 1, 1, generator=generator) * (high - low) + low

    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")

    angle, low, high = uniform(0, 2 * math.pi), uniform(0.02, 0.30), uniform(0.25, 0.55)
    slope = (torch.cos(angle) * x + torch.sin(angle) * y) / math.sqrt(2) * 0.5 + 0.5
    background = (low + (high - low) * slope)[:, None].expand(-1, 3, -1, -1)

    centre = torch.tensor(list(PLACES.values()))[attributes.place]
    turn, radius = uniform(-0.3, 0.3), uniform(0.32, 0.46)
    dx = x - centre[:, 0, None, None] - uniform(-0.08, 0.08)
    dy = y - centre[:, 1, None, None] - uniform(-0.08, 0.08)
    u = (torch.cos(turn) * dx + torch.sin(turn) * dy) / radius
    v = (-torch.sin(turn) * dx + torch.cos(turn) * dy) / radius
    distances = torch.stack(_signed_distances(u, v), 1)
    distance = distances[torch.arange(count), attributes.shape] * radius

    pixel = 2 / size
    inside = (0.5 - distance / pixel).clamp(0, 1)[:, None]
    rim = (0.5 - (distance + 0.06) / pixel).clamp(0, 1)[:, None]
    colour = torch.tensor(list(COLOURS.values()))[attributes.colour][:, :, None, None] * uniform(0.85, 1.05)[:, None]
    painted = colour * (0.55 + 0.45 * rim)
    return (background * (1 - inside) + painted.clamp(0, 1) * inside) * 2 - 1


def _signed_distances(u: Tensor, v: Tensor) -> list[Tensor]:
    """Signed distance to each shape of unit radius, in the order of SHAPES; negative inside."""
    radius = torch.sqrt(u * u + v * v)
    square = torch.maximum(u.abs(), v.abs()) - 0.85
    triangle = torch.maximum(v - 0.6, u.abs() * 0.866 - v * 0.5 - 0.5)
    ring = (radius - 0.68).abs() - 0.30
    bar = torch.minimum(
        torch.maximum(u.abs() - 1.0, v.abs() - 0.32),
        torch.maximum(u.abs() - 0.32, v.abs() - 1.0),
    )
    return [radius - 0.95, square, triangle, ring, bar]
