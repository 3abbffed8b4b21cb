"""The bundled classifier: small, and right about pictures that it has never seen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dicompile.demo import metrics, shapes
from dicompile.demo.classifier import CLASSIFIER_FILE, FEATURES, Classifier, judge, load_classifier
from dicompile.errors import DicompileError

SEED = 77_003


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return load_classifier()


@pytest.fixture(scope="module")
def labels() -> torch.Tensor:
    return torch.arange(shapes.NUM_CLASSES).repeat(4)


@pytest.fixture(scope="module")
def pictures(labels: torch.Tensor) -> torch.Tensor:
    return shapes.draw(labels, torch.Generator().manual_seed(SEED))


def test_the_bundled_file_is_small_float16_and_says_where_it_comes_from() -> None:
    assert CLASSIFIER_FILE.stat().st_size < 300_000
    with safe_open(CLASSIFIER_FILE, "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118 - no mapping
        assert file.metadata()["trained_by"] == "examples/train_demo_classifier.py"


def test_fresh_pictures_are_recognised(classifier: Classifier, pictures: torch.Tensor, labels: torch.Tensor) -> None:
    found = metrics.accuracy(judge(classifier, pictures).attributes, labels)
    assert min(found.every, found.shape, found.colour, found.texture) > 0.98, str(found)


def test_slightly_noisy_pictures_are_recognised(
    classifier: Classifier, pictures: torch.Tensor, labels: torch.Tensor
) -> None:
    noise = 0.1 * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(SEED))
    assert metrics.accuracy(judge(classifier, pictures + noise).attributes, labels).every > 0.98


def test_prediction_has_the_documented_shapes(classifier: Classifier, pictures: torch.Tensor) -> None:
    found = classifier(pictures[:3])
    assert [tuple(field.shape) for field in found] == [(3, 5), (3, 6), (3, 5), (3, FEATURES)]
    assert {field.dtype for field in found} == {torch.float32}


def test_judging_in_parts_changes_nothing(classifier: Classifier, pictures: torch.Tensor) -> None:
    whole, parts = judge(classifier, pictures[:20], batch=20), judge(classifier, pictures[:20], batch=7)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)  # convolutions round by batch size


def test_features_tell_pictures_from_noise_and_missing_classes(
    classifier: Classifier, pictures: torch.Tensor, labels: torch.Tensor
) -> None:
    """The Frechet distance grows with what goes wrong: other pictures < one shape only < pure noise."""
    generator = torch.Generator().manual_seed(SEED + 1)
    reference = judge(classifier, shapes.draw(labels, generator)).features
    circles = labels[shapes.attributes_of(labels).shape == 0].repeat(len(shapes.SHAPES))
    noise = torch.randn(pictures.shape, generator=generator).clamp(-1, 1)
    same, fewer, none = (
        metrics.frechet_distance(judge(classifier, batch).features, reference)
        for batch in (pictures, shapes.draw(circles, generator), noise)
    )
    assert same * 10 < fewer < none


def test_a_missing_file_says_how_to_get_it(tmp_path: Path) -> None:
    path = tmp_path / "absent.safetensors"
    with pytest.raises(DicompileError) as caught:
        load_classifier(path)
    assert str(caught.value) == (
        "the demo classifier is missing\n"
        f"  where: {path}\n"
        "  why:   its weights are a packaged file, and this copy of dicompile lacks it\n"
        f"  fix:   reinstall dicompile, or run: python examples/train_demo_classifier.py --out {path}"
    )
