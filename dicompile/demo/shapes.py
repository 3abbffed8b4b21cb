"""Procedural pictures: a textured shape in front of a plain one, on a gradient.

A class is a triple (shape, colour, texture) of what is in front, which has a white outline, so a sample can be wrong in
three ways that a small classifier can tell apart. Everything else (the shape behind, places, sizes, rotations, shades,
the background) varies freely and has to be invented by the sampler. Textures are few pixels wide: what a sampler or
a cache does wrong shows in them first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
TEXTURES = ("plain", "stripes", "fine stripes", "checks", "dots")
NUM_CLASSES = len(SHAPES) * len(COLOURS) * len(TEXTURES)
IMAGE_SIZE = 32

Uniform = Callable[[float, float], Tensor]
"""Draws a number between two bounds for every picture, [b, 1, 1]."""


class Attributes(NamedTuple):
    """What a class label stands for; each field is an index tensor of shape [b]."""

    shape: Tensor
    colour: Tensor
    texture: Tensor


def attributes_of(labels: Tensor) -> Attributes:
    """Split class labels (int, [b], in [0, NUM_CLASSES)) into shape, colour and texture indices."""
    rest, texture = labels // len(TEXTURES), labels % len(TEXTURES)
    return Attributes(rest // len(COLOURS), rest % len(COLOURS), texture)


def name_of(label: int) -> str:
    """Class label in words, for example ``"red ring, fine stripes"``."""
    shape, colour, texture = (int(i) for i in attributes_of(torch.tensor(label)))
    return f"{list(COLOURS)[colour]} {SHAPES[shape]}, {TEXTURES[texture]}"


def draw(labels: Tensor, generator: torch.Generator, size: int = IMAGE_SIZE) -> Tensor:
    """Draw one picture per label.

    Args:
        labels: int, [b].
        generator: source of everything that the label leaves open.
        size: edge in pixels.

    Returns:
        float32 pictures in [-1, 1], [b, 3, size, size].
    """
    front, count = attributes_of(labels), len(labels)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, 1, 1, generator=generator) * (high - low) + low

    def index(length: int) -> Tensor:
        return torch.randint(length, (count,), generator=generator)

    other_colour = (front.colour + 1 + index(len(COLOURS) - 1)) % len(COLOURS)
    back = Attributes(index(len(SHAPES)), other_colour, torch.zeros_like(labels))
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    picture = _background(x, y, uniform)

    x, y = x - uniform(-0.25, 0.25), y - uniform(-0.25, 0.25)
    angle, distance = uniform(0, 2 * math.pi), uniform(0.65, 0.85)
    behind = (x - distance * torch.cos(angle), y - distance * torch.sin(angle))
    picture = _paint(picture, back, *behind, uniform(0.45, 0.60), uniform, outline=0.0)
    picture = _paint(picture, front, x, y, uniform(0.58, 0.70), uniform, outline=0.07)
    return picture * 2 - 1


def _background(x: Tensor, y: Tensor, uniform: Uniform) -> Tensor:
    """A gradient between two greys with a tint; in [0, 1], [b, 3, h, w]."""
    angle, low, high = uniform(0, 2 * math.pi), uniform(0.10, 0.35), uniform(0.35, 0.60)
    slope = (torch.cos(angle) * x + torch.sin(angle) * y) / math.sqrt(2) * 0.5 + 0.5
    grey = low + (high - low) * slope
    tint = torch.stack([uniform(-0.06, 0.06) for _ in range(3)], 1)
    return (grey[:, None] + tint).clamp(0, 1)


def _paint(
    picture: Tensor, what: Attributes, dx: Tensor, dy: Tensor, radius: Tensor, uniform: Uniform, outline: float
) -> Tensor:
    """Paint a shape over pictures in [0, 1], [b, 3, h, w].

    Args:
        picture: to paint on.
        what: shape, colour and texture of each.
        dx: of each pixel from the centre of the shape, half an edge being 1, [b, h, w].
        dy: likewise.
        radius: [b, 1, 1].
        uniform: draws what is open: rotation, shade, and along which axis stripes run.
        outline: width of a white one, half an edge being 1.
    """
    pixel, each = 2 / picture.shape[-1], torch.arange(len(picture))
    turn, shade, lying = uniform(-0.3, 0.3), uniform(0.85, 1.05), uniform(0, 1) < 0.5
    u, v = torch.cos(turn) * dx + torch.sin(turn) * dy, torch.cos(turn) * dy - torch.sin(turn) * dx
    distance = torch.stack(_shapes(u / radius, v / radius), 1)[each, what.shape] * radius
    texture = torch.stack(_textures(torch.where(lying, v, u), torch.where(lying, u, v)), 1)[each, what.texture]

    def covered(signed: Tensor) -> Tensor:
        return (0.5 - signed / pixel).clamp(0, 1)[:, None]

    colour = torch.tensor(list(COLOURS.values()))[what.colour][:, :, None, None] * shade[:, None]
    painted = colour.clamp(0, 1) * (1 - 0.8 * covered(texture))
    inside = covered(distance)
    if outline:
        painted = torch.lerp(torch.ones_like(painted), painted, covered(distance + outline))
    return torch.lerp(picture, painted, inside)


def _shapes(u: Tensor, v: Tensor) -> list[Tensor]:
    """Signed distance to each shape of unit radius, in the order of SHAPES; negative inside."""
    radius = torch.sqrt(u * u + v * v)
    square = torch.maximum(u.abs(), v.abs()) - 0.85
    triangle = torch.maximum(v - 0.75, u.abs() * 0.866 - v * 0.5 - 0.55)
    ring = (radius - 0.64).abs() - 0.34
    bar = torch.minimum(
        torch.maximum(u.abs() - 1.0, v.abs() - 0.43),
        torch.maximum(u.abs() - 0.43, v.abs() - 1.0),
    )
    return [radius - 0.95, square, triangle, ring, bar]


def _textures(u: Tensor, v: Tensor) -> list[Tensor]:
    """Signed distance to the dark parts of each texture, in the order of TEXTURES; half an edge of the picture is 1."""

    def bars(along: Tensor, period: float) -> Tensor:
        return ((along / period - torch.floor(along / period) - 0.5).abs() - 0.25) * period

    first, second = bars(u, 0.375), bars(v, 0.375)
    checks = torch.copysign(torch.minimum(first.abs(), second.abs()), first * second)
    spacing = 0.31
    from_dot = [along - spacing * torch.round(along / spacing) for along in (u, v)]
    dots = torch.hypot(*from_dot) - 0.10
    return [torch.ones_like(u), bars(u, 0.44), bars(u, 0.25), checks, dots]
