"""The procedural pictures: labels that round-trip, drawings that repeat."""

from __future__ import annotations

import pytest
import torch

from dicompile.demo import shapes

ALL_LABELS = torch.arange(shapes.NUM_CLASSES)


def draw(labels: torch.Tensor, seed: int, size: int = shapes.IMAGE_SIZE) -> torch.Tensor:
    return shapes.draw(labels, torch.Generator().manual_seed(seed), size)


def test_attributes_round_trip_to_the_label() -> None:
    shape, colour, place = shapes.attributes_of(ALL_LABELS)
    assert torch.equal((shape * len(shapes.COLOURS) + colour) * len(shapes.PLACES) + place, ALL_LABELS)


def test_attributes_stay_in_range_and_occur_equally_often() -> None:
    counts = (len(shapes.SHAPES), len(shapes.COLOURS), len(shapes.PLACES))
    for index, count in zip(shapes.attributes_of(ALL_LABELS), counts, strict=True):
        assert torch.bincount(index).tolist() == [shapes.NUM_CLASSES // count] * count


def test_names_are_unique() -> None:
    assert shapes.name_of(0) == "red circle, centre"
    assert shapes.name_of(shapes.NUM_CLASSES - 1) == "cyan cross, bottom right"
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


def test_the_coloured_pixels_are_where_the_label_says() -> None:
    """The background is grey, so colourfulness is the shape; its centre of mass lies near the place."""
    pictures = draw(ALL_LABELS, seed=0)
    colourful = pictures.amax(1) - pictures.amin(1)
    axis = (torch.arange(shapes.IMAGE_SIZE) + 0.5) / shapes.IMAGE_SIZE * 2 - 1
    mass = colourful.sum((1, 2))
    found = torch.stack([(colourful.sum(1) * axis).sum(-1) / mass, (colourful.sum(2) * axis).sum(-1) / mass], -1)
    wanted = torch.tensor(list(shapes.PLACES.values()))[shapes.attributes_of(ALL_LABELS).place]
    assert (found - wanted).abs().max() < 0.2


def test_the_strongest_channels_are_the_colour() -> None:
    pictures = draw(ALL_LABELS, seed=0)
    colourful = pictures.amax(1, keepdim=True) - pictures.amin(1, keepdim=True)
    found = ((pictures + 1) * colourful).sum((2, 3)) / colourful.sum((2, 3))
    colours = torch.tensor(list(shapes.COLOURS.values()))
    similarity = torch.nn.functional.cosine_similarity(found[:, None], colours[None], dim=-1)
    assert torch.equal(similarity.argmax(-1), shapes.attributes_of(ALL_LABELS).colour)
