"""The procedural pictures: labels that round-trip, drawings that repeat."""

from __future__ import annotations

import pytest
import torch

from dicompile.demo import shapes

ALL_LABELS = torch.arange(shapes.NUM_CLASSES)


def draw(labels: torch.Tensor, seed: int, size: int = shapes.IMAGE_SIZE) -> torch.Tensor:
    return shapes.draw(labels, torch.Generator().manual_seed(seed), size)


def test_attributes_round_trip_to_the_label() -> None:
    shape, colour, texture = shapes.attributes_of(ALL_LABELS)
    assert torch.equal((shape * len(shapes.COLOURS) + colour) * len(shapes.TEXTURES) + texture, ALL_LABELS)


def test_attributes_stay_in_range_and_occur_equally_often() -> None:
    counts = (len(shapes.SHAPES), len(shapes.COLOURS), len(shapes.TEXTURES))
    for index, count in zip(shapes.attributes_of(ALL_LABELS), counts, strict=True):
        assert torch.bincount(index).tolist() == [shapes.NUM_CLASSES // count] * count


def test_names_are_unique() -> None:
    assert shapes.name_of(0) == "red circle, plain"
    assert shapes.name_of(shapes.NUM_CLASSES - 1) == "cyan cross, dots"
    assert len({shapes.name_of(label) for label in ALL_LABELS.tolist()}) == shapes.NUM_CLASSES


@pytest.mark.parametrize("size", [16, shapes.IMAGE_SIZE, 48])
def test_pictures_have_the_documented_shape_and_range(size: int) -> None:
    pictures = draw(ALL_LABELS, seed=0, size=size)
    assert pictures.shape == (shapes.NUM_CLASSES, 3, size, size)
    assert pictures.dtype == torch.float32
    assert pictures.min() >= -1
    assert pictures.max() <= 1


def test_one_seed_draws_the_same_pictures() -> None:
    assert torch.equal(draw(ALL_LABELS, seed=3), draw(ALL_LABELS, seed=3))


def test_another_seed_draws_other_pictures_of_every_class() -> None:
    difference = (draw(ALL_LABELS, seed=3) - draw(ALL_LABELS, seed=4)).abs().amax((1, 2, 3))
    assert difference.min() > 0.1


def test_drawing_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    draw(ALL_LABELS, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def textured(texture: str) -> torch.Tensor:
    """What a texture takes away from the same pictures with a plain shape in front, one for each other attribute."""
    plain = ALL_LABELS[:: len(shapes.TEXTURES)]
    return draw(plain, seed=0) - draw(plain + shapes.TEXTURES.index(texture), seed=0)


@pytest.mark.parametrize("texture", shapes.TEXTURES[1:])
def test_a_texture_is_darker_parts_of_the_shape_in_front_in_its_colour(texture: str) -> None:
    taken = textured(texture)
    assert taken.min() >= 0
    assert 0.03 < (taken.amax(1) > 0.1).float().mean() < 0.3
    colours = torch.tensor(list(shapes.COLOURS.values()))
    similarity = torch.nn.functional.cosine_similarity(taken.sum((2, 3))[:, None], colours[None], dim=-1)
    assert torch.equal(similarity.argmax(-1), shapes.attributes_of(ALL_LABELS).colour[:: len(shapes.TEXTURES)])


def test_fine_stripes_are_finer() -> None:
    """Eight periods in an edge, and between four and five."""

    def fraction_above(cycles: float, texture: str) -> float:
        spectrum = torch.fft.fft2(textured(texture).sum(1)).abs().square()
        frequency = torch.fft.fftfreq(shapes.IMAGE_SIZE, 1 / shapes.IMAGE_SIZE)
        is_above = torch.hypot(frequency[:, None], frequency[None]) > cycles
        return float(spectrum[:, is_above].sum() / spectrum.sum())

    assert fraction_above(6.5, "fine stripes") > 2 * fraction_above(6.5, "stripes")


def test_the_shape_in_front_hides_what_is_behind() -> None:
    """Plain squares: what their colour is decides the middle of the picture, whatever is behind."""
    shape, _, texture = shapes.attributes_of(ALL_LABELS)
    labels = ALL_LABELS[(shape == shapes.SHAPES.index("square")) & (texture == 0)].repeat(20)
    pictures = (draw(labels, seed=0) + 1) / 2
    middle = pictures[:, :, 14:18, 14:18].mean((2, 3))
    colours = torch.tensor(list(shapes.COLOURS.values()))
    found = torch.cdist(middle, colours).argmin(-1)
    assert (found == shapes.attributes_of(labels).colour).float().mean() > 0.95
