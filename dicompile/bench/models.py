"""Published models, built from the config.json that diffusers saved, with random weights, and their conditioning."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dicompile.errors import DicompileError

CONFIGS = Path(__file__).parent / "configs"

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Size:
    """How large a model is built and what it is given.

    Attributes:
        latent: frames, height and width of the latent, or height and width; a token is 2 x 2 of one frame.
        text: tokens of the prompt.
        config: what differs from the published config.
    """

    latent: tuple[int, ...]
    text: int = 0
    config: Config = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens of the latent."""
        return math.prod(self.latent) // 4


@dataclass(frozen=True)
class Subject:
    """A published model.

    Attributes:
        name: on the command line, and of its config.
        title: as its authors call it.
        layout: of its latent, in diffusers' letters; "packed" if tokens are rows already.
        batch: rows of a call; two where guidance is computed in one call.
        full: as published.
        reduced: for a CPU.
        conditioning: config and size -> keyword arguments of its forward, without latent and timestep.
        time_scale: what the model is given for one of 1000 timesteps.
        distilled: True if guidance is an input, so that no row of the batch is unconditional.
    """

    name: str
    title: str
    layout: str
    batch: int
    full: Size
    reduced: Size
    conditioning: Callable[[Config, Size, int], dict[str, Any]]
    time_scale: float = 1
    distilled: bool = False
    quick: Config = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        """The published config."""
        config: dict[str, Any] = json.loads((CONFIGS / f"{self.name}.json").read_text(encoding="utf-8"))
        return config

    def size(self, name: str) -> Size:
        """Size by its name: "full", "reduced", or "quick", the reduced one with two blocks."""
        if name == "quick":
            few = tuple(min(length, 8) for length in self.reduced.latent)
            return Size(few, self.reduced.text and 8, {**self.reduced.config, **self.quick})
        return self.full if name == "full" else self.reduced

    def build(self, size: Size, device: str, dtype: torch.dtype) -> nn.Module:
        """The model with random weights, in eval mode.

        Raises:
            DicompileError: diffusers is not installed.
        """
        diffusers = _diffusers()
        config = {**self.config, **size.config}
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # a model of 12 billion weights would not fit in float32
        try:
            with torch.device(device):
                module: nn.Module = getattr(diffusers, config["_class_name"]).from_config(config)
        finally:
            torch.set_default_dtype(before)
        kept = getattr(module, "_keep_in_fp32_modules", None) or ()
        for name, parameter in module.named_parameters():  # as from_pretrained leaves them
            if set(kept) & set(name.split(".")):
                parameter.data = parameter.data.float()
        return module.eval().requires_grad_(False)

    def inputs(self, size: Size) -> dict[str, Any]:
        """Conditioning, float32 on the CPU."""
        return self.conditioning({**self.config, **size.config}, size, self.batch)

    def latents(self, size: Size) -> Tensor:
        """One drawn latent, float32 on the CPU, in the model's layout."""
        channels = {**self.config, **size.config}["in_channels"]
        if self.layout == "packed":
            return torch.randn(self.batch, size.tokens, channels)
        letters = dict(zip("FHW"[-len(size.latent) :], size.latent, strict=True))
        return torch.randn([{"B": self.batch, "C": channels, **letters}[letter] for letter in self.layout])

    def timesteps(self, steps: int) -> tuple[float, ...]:
        """Evenly spaced, from noise to picture, of 1000; see `time_scale`."""
        return tuple(round(999 - i * 999 / steps) for i in range(steps))

    def describe(self, size: Size) -> str:
        """What was built: "12 of 28 blocks, width 384 of 1152, 256 of 256 tokens, batch 2"."""
        published, built = self.config, {**self.config, **size.config}
        counts = [
            ("{} blocks", _blocks(built), _blocks(published)),
            ("width {}", _width(built), _width(published)),
            ("{} tokens", size.tokens, self.full.tokens),
        ]
        parts = [text.format(a if a == b else f"{a} of {b}") for text, a, b in counts]
        if self.full.text:
            parts.append(f"{size.text} of text")
        return ", ".join([*parts, f"batch {self.batch}"])


def _blocks(config: Config) -> int:
    return int(config["num_layers"]) + int(config.get("num_single_layers", 0))


def _width(config: Config) -> int:
    return int(config["num_attention_heads"]) * int(config["attention_head_dim"])


def _diffusers() -> Any:
    try:
        import diffusers
    except ModuleNotFoundError:
        raise DicompileError(
            "the benchmark needs diffusers, which is not installed",
            where="dicompile bench",
            why="its models are those of diffusers; the compiler itself does without it",
            fix="pip install 'dicompile[bench]'",
        ) from None
    diffusers.utils.logging.set_verbosity_error()  # its caches warn that they are experimental
    return diffusers


def _classes(_: Config, __: Size, batch: int) -> dict[str, Any]:
    return {"class_labels": torch.tensor([1, 1000])[:batch]}


def _caption(config: Config, size: Size, batch: int) -> dict[str, Any]:
    nothing = {"resolution": None, "aspect_ratio": None}
    text = torch.randn(batch, size.text, config["caption_channels"])
    return {"encoder_hidden_states": text, "added_cond_kwargs": nothing}


def _text_and_pooled(config: Config, size: Size, batch: int) -> dict[str, Any]:
    return {
        "encoder_hidden_states": torch.randn(batch, size.text, config["joint_attention_dim"]),
        "pooled_projections": torch.randn(batch, config["pooled_projection_dim"]),
    }


def _flux(config: Config, size: Size, batch: int) -> dict[str, Any]:
    rows, columns = (torch.arange(length // 2) for length in size.latent)
    return {
        **_text_and_pooled(config, size, batch),
        "txt_ids": torch.zeros(size.text, 3),
        "img_ids": torch.cartesian_prod(torch.zeros(1), rows.float(), columns.float()),
        "guidance": torch.full((batch,), 3.5),
    }


def _video(config: Config, size: Size, batch: int) -> dict[str, Any]:
    width = config.get("text_dim") or config["text_embed_dim"]
    return {"encoder_hidden_states": torch.randn(batch, size.text, width)}


_WIDTH = {"num_attention_heads": 6, "attention_head_dim": 64}
_FLUX_TEXT = {"joint_attention_dim": 512, "pooled_projection_dim": 256}

SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject(
            "dit", "DiT-XL/2", "BCHW", 2, Size((32, 32)), Size((32, 32), 0, {**_WIDTH, "num_layers": 12}), _classes,
            quick={"num_layers": 2, "num_attention_heads": 1},
        ),
        Subject(
            "pixart", "PixArt-alpha 512", "BCHW", 2, Size((64, 64), 120),
            Size((32, 32), 120, {
                **_WIDTH, "num_layers": 12, "cross_attention_dim": 384, "caption_channels": 512, "sample_size": 32,
            }),
            _caption, quick={"num_layers": 2, "num_attention_heads": 1, "cross_attention_dim": 64},
        ),
        Subject(
            "sd3", "SD3-medium", "BCHW", 2, Size((128, 128), 333),
            Size((32, 32), 77, {
                **_WIDTH, "num_layers": 12, "caption_projection_dim": 384, "joint_attention_dim": 512,
                "pooled_projection_dim": 256,
            }),
            _text_and_pooled, quick={"num_layers": 2, "num_attention_heads": 1, "caption_projection_dim": 64},
        ),
        Subject(
            "flux", "FLUX.1-dev", "packed", 1, Size((128, 128), 512),
            Size((32, 32), 77, {
                "num_layers": 4, "num_single_layers": 8, "num_attention_heads": 3, **_FLUX_TEXT,
            }),
            _flux, time_scale=1e-3, distilled=True,
            quick={"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1},
        ),
        Subject(
            "wan", "Wan 2.1 T2V 1.3B", "BCFHW", 2, Size((21, 60, 104), 512),
            Size((4, 16, 16), 77, {"num_layers": 12, "num_attention_heads": 3, "ffn_dim": 2240, "text_dim": 512}),
            _video, quick={"num_layers": 2, "num_attention_heads": 1, "ffn_dim": 256},
        ),
        Subject(
            "cogvideox", "CogVideoX-2B", "BFCHW", 2, Size((13, 60, 90), 226),
            Size((4, 16, 16), 77, {
                "num_layers": 12, "num_attention_heads": 6, "text_embed_dim": 512, "max_text_seq_length": 77,
                "sample_frames": 13, "sample_height": 16, "sample_width": 16,
            }),
            _video, quick={"num_layers": 2, "num_attention_heads": 1, "max_text_seq_length": 8},
        ),
    )
}  # fmt: skip


_Entry = TypeVar("_Entry")


def pick(table: Mapping[str, _Entry], names: Sequence[str], what: str, where: str) -> list[_Entry]:
    """Entries of a table by name; all of them for no name.

    Args:
        table: by name.
        names: of the entries.
        what: says of a name what is missing: "there is no model {} to measure".
        where: names are given.

    Raises:
        DicompileError: there is no such entry.
    """
    for name in names:
        if name not in table:
            raise DicompileError(what.format(repr(name)), where=where, fix=f"use some of: {', '.join(table)}")
    return [table[name] for name in names or table]


def get_subjects(names: Sequence[str]) -> list[Subject]:
    """Models by name; see `pick`."""
    return pick(SUBJECTS, names, "there is no model {} to measure", "dicompile bench")
