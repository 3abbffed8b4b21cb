"""Well-known models: as large as published, with inputs that fit, and structures that are found on fake tensors."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dicompile.analysis import ModelStructure, analyse
from dicompile.capture import capture_model
from dicompile.errors import DicompileError
from dicompile.zoo import MODELS, Published, get_model
from dicompile.zoo.published import CONFIGS

JOINT = ["joint-attention", "joint-attention", "mlp", "mlp"]
DECODER = ["cross-attention", "mlp", "self-attention"]
SITES = {
    "dit-xl-2": ["mlp", "self-attention"],
    "flux.1-dev": [*JOINT, "parallel"],
    "flux.2-dev": [*JOINT, "parallel"],
    "chroma1-hd": [*JOINT, *["mlp"] * 5, "parallel"],  # five layers of its approximator, too
    "hunyuanvideo": [*JOINT, *["mlp"] * 2, "parallel", *["self-attention"] * 2],  # two refiners of the text
    "z-image-turbo": [*["mlp"] * 5, *["self-attention"] * 5],  # two refiners of the picture, two of the text
    **dict.fromkeys(("qwen-image", "cogvideox-2b", "cogvideox-5b", "sd3-medium", "sd3.5-large"), JOINT),
}
"""Kinds of the sites of a copy with one block of every list; a decoder's if nothing else is said."""

ONLY_ONE = {"sd3-medium", "sd3.5-large", "qwen-image", "cogvideox-2b", "cogvideox-5b"}
"""Models whose last block leaves the text alone: of these, two blocks are made."""

every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


def reduced(model: Published) -> ModelStructure:
    """The structure of a copy with one block of every kind, or two."""
    config: dict[str, Any] = {
        key: 2 if model.name in ONLY_ONE else 1
        for key in ("num_layers", "num_single_layers", "n_layers")
        if key in model.config()
    }
    size = replace(model.size, config=config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        module, inputs = model.build(size), model.call(size)
        if model.is_lazy:
            module(**inputs)
        return analyse(capture_model(module, inputs))


@every_model
@pytest.mark.sampled
def test_it_is_as_large_as_published_and_says_where_its_config_is_from(model: Published) -> None:
    with torch.device("meta"):
        module = model.build(model.size)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    if model.name == "dit-xl-2":  # diffusers gives every block embeddings of timestep and class of its own
        parameters -= sum(p.numel() for n, p in module.named_parameters() if ".emb." in n)
        parameters += 1152 * 1001 + 256 * 1152 + 1152 * 1152 + 2 * 1152
    assert parameters / 1e9 == pytest.approx(model.billions, rel=0.005)
    repository, _, file = model.source.partition(", ")
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", repository)
    assert file.startswith("transformer/config.json")


@every_model
def test_every_key_of_its_config_means_something_to_the_class(model: Published) -> None:
    config = model.config()
    kind = getattr(diffusers, config.pop("_class_name"))
    assert set(config) <= set(inspect.signature(kind.__init__).parameters)


def test_every_file_belongs_to_a_model() -> None:
    assert {path.stem for path in CONFIGS.glob("*.json")} == set(MODELS)


@every_model
@pytest.mark.sampled
def test_what_makes_it_up_is_found(model: Published) -> None:
    structure = reduced(model)
    block = structure.sites[:4] if model.name in ONLY_ONE else structure.sites
    assert sorted(site.kind.value for site in block) == SITES.get(model.name, DECODER)
    tokens = model.tokens(model.size)
    assert max(site.tokens.count for site in structure.sites) in (tokens, tokens + model.size.text)
    assert structure.flops > 1e9


def test_a_size_in_pixels_is_one_of_tokens() -> None:
    flux, wan = MODELS["flux.1-dev"], MODELS["wan2.1-1.3b"]
    assert flux.tokens(flux.size) == flux.tokens(flux.sized((1024, 1024))) == 4096
    assert flux.tokens(flux.sized((512, 768))) == 1536
    assert flux.sized(text=77).text == 77
    assert wan.sized(frames=17).latent == (5, 60, 104)
    assert wan.describe(wan.size) == "81 frames of 480x832 pixels, 32760 tokens, 512 of text"
    assert MODELS["ltx-video"].tokens(MODELS["ltx-video"].size) == 21 * 16 * 22


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("flux.1-dev", {"picture": (1000, 1024)}, r"edge of 1000 pixels(.|\n)*16 x 16(.|\n)*992"),
        ("sana-1.6b", {"picture": (1024, 1040)}, r"edge of 1040 pixels(.|\n)*32 x 32(.|\n)*1024"),
        ("wan2.1-14b", {"frames": 80}, r"cannot make 80 frames(.|\n)*77 frames"),
        ("flux.1-dev", {"frames": 5}, "makes pictures, not films"),
    ],
)
def test_a_size_that_is_no_whole_number_of_tokens_is_refused(name: str, size: dict, message: str) -> None:
    with pytest.raises(DicompileError, match=message):
        MODELS[name].sized(**size)


def test_names_are_forgiving_and_mistakes_get_a_proposal() -> None:
    assert get_model("FLUX.1_dev") is MODELS["flux.1-dev"]
    with pytest.raises(DicompileError, match=r"is called 'wan2.1-13b'(.|\n)*did you mean wan2.1-1.3b"):
        get_model("wan2.1-13b")
    with pytest.raises(DicompileError, match=r"use one of: dit-xl-2, "):
        get_model("qqqq")
