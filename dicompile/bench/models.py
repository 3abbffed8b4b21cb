"""Published models as the benchmark builds them: at full size, or smaller, with random weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dicompile.errors import DicompileError
from dicompile.zoo import MODELS, Config, Published, Size


@dataclass(frozen=True)
class Subject:
    """A published model, and how small it is made where there is no GPU.

    Attributes:
        name: on the command line.
        model: as published.
        batch: rows of a call.
        reduced: for a CPU.
        quick: what differs from `reduced` where only two blocks are wanted.
    """

    name: str
    model: Published
    batch: int
    reduced: Size
    quick: Config = field(default_factory=dict)

    @property
    def title(self) -> str:
        """As its authors call it."""
        return self.model.title

    @property
    def full(self) -> Size:
        """As published."""
        return self.model.size

    @property
    def time_scale(self) -> float:
        """What the model is given for one of 1000 timesteps."""
        return self.model.time_scale

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
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # a model of 12 billion weights would not fit in float32
        try:
            with torch.device(device):
                module = self.model.build(size)
        finally:
            torch.set_default_dtype(before)
        kept = getattr(module, "_keep_in_fp32_modules", None) or ()
        for name, parameter in module.named_parameters():  # as from_pretrained leaves them
            if set(kept) & set(name.split(".")):
                parameter.data = parameter.data.float()
        return module

    def inputs(self, size: Size) -> dict[str, Any]:
        """Conditioning, float32 on the CPU."""
        return self.model.inputs(size, self.batch)

    def latents(self, size: Size) -> Tensor:
        """One drawn latent, float32 on the CPU, in the model's layout."""
        latents: Tensor = self.model.latents(size, self.batch)
        return latents

    def timesteps(self, steps: int) -> tuple[float, ...]:
        """Evenly spaced, from noise to picture, of 1000; see `time_scale`."""
        return tuple(round(999 - i * 999 / steps) for i in range(steps))

    def describe(self, size: Size) -> str:
        """What was built: "12 of 28 blocks, width 384 of 1152, 256 of 256 tokens, batch 2"."""
        published, built = self.model.config(), self.model.config(size)
        counts = [
            ("{} blocks", _blocks(built), _blocks(published)),
            ("width {}", _width(built), _width(published)),
            ("{} tokens", self.model.tokens(size), self.model.tokens(self.full)),
        ]
        parts = [text.format(a if a == b else f"{a} of {b}") for text, a, b in counts]
        if self.full.text:
            parts.append(f"{size.text} of text")
        return ", ".join([*parts, f"batch {self.batch}"])


def _blocks(config: Config) -> int:
    return int(config["num_layers"]) + int(config.get("num_single_layers", 0))


def _width(config: Config) -> int:
    return int(config["num_attention_heads"]) * int(config["attention_head_dim"])


_WIDTH = {"num_attention_heads": 6, "attention_head_dim": 64}
_FLUX_TEXT = {"joint_attention_dim": 512, "pooled_projection_dim": 256}

SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject(
            "dit", MODELS["dit-xl-2"], 2, Size((32, 32), 0, {**_WIDTH, "num_layers": 12}),
            quick={"num_layers": 2, "num_attention_heads": 1},
        ),
        Subject(
            "pixart", MODELS["pixart-alpha"], 2,
            Size((32, 32), 120, {
                **_WIDTH, "num_layers": 12, "cross_attention_dim": 384, "caption_channels": 512, "sample_size": 32,
            }),
            quick={"num_layers": 2, "num_attention_heads": 1, "cross_attention_dim": 64},
        ),
        Subject(
            "sd3", MODELS["sd3-medium"], 2,
            Size((32, 32), 77, {
                **_WIDTH, "num_layers": 12, "caption_projection_dim": 384, "joint_attention_dim": 512,
                "pooled_projection_dim": 256,
            }),
            quick={"num_layers": 2, "num_attention_heads": 1, "caption_projection_dim": 64},
        ),
        Subject(
            "flux", MODELS["flux.1-dev"], 1,
            Size((32, 32), 77, {
                "num_layers": 4, "num_single_layers": 8, "num_attention_heads": 3, **_FLUX_TEXT,
            }),
            quick={"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1},
        ),
        Subject(
            "wan", MODELS["wan2.1-1.3b"], 2,
            Size((4, 16, 16), 77, {"num_layers": 12, "num_attention_heads": 3, "ffn_dim": 2240, "text_dim": 512}),
            quick={"num_layers": 2, "num_attention_heads": 1, "ffn_dim": 256},
        ),
        Subject(
            "cogvideox", MODELS["cogvideox-2b"], 2,
            Size((4, 16, 16), 77, {
                "num_layers": 12, "num_attention_heads": 6, "text_embed_dim": 512, "max_text_seq_length": 77,
                "sample_frames": 13, "sample_height": 16, "sample_width": 16,
            }),
            quick={"num_layers": 2, "num_attention_heads": 1, "max_text_seq_length": 8},
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
