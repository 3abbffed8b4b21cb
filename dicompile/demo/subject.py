"""The bundled model as something to compare policies on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dicompile.compare import ModuleSubject
from dicompile.demo import metrics, shapes
from dicompile.demo.classifier import judge, load_classifier, true_features
from dicompile.demo.sample import GUIDANCE, balanced_labels, load_model, load_scheduler, sample


def demo_subject(samples: int, steps: int, seed: int = 0, guidance: float = GUIDANCE) -> ModuleSubject:
    """The bundled model with its scheduler, its labels, and the classifier that judges its pictures.

    Args:
        samples: pictures, sampled as one batch.
        steps: denoising steps.
        seed: of the noise.
        guidance: of classifier-free guidance, unitless.
    """
    labels, scheduler, classifier = balanced_labels(samples), load_scheduler(), load_classifier()
    reference = true_features(classifier)

    def loop(module: nn.Module, count: int) -> Tensor:
        return (sample(module, scheduler, labels, count, guidance, seed).clamp(-1, 1) + 1) / 2

    def judged(pictures: Tensor) -> dict[str, str]:
        if len(pictures) < 2 or pictures.isnan().any():
            return {"Fréchet": "-"}
        features = judge(classifier, pictures * 2 - 1).features
        return {"Fréchet": f"{metrics.frechet_distance(features, reference):.2f}"}

    return ModuleSubject(
        name=f"bundled model (shapes), {samples} pictures, {steps} steps, guidance {guidance:g}",
        module=load_model(),
        loop=torch.no_grad()(loop),
        schedule=scheduler,
        steps=steps,
        captions=tuple(shapes.name_of(label) for label in labels.tolist()),
        judged_by=judged,
    )
