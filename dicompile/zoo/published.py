"""A published model: a config file with its source, and what its pipeline calls the model with."""

from __future__ import annotations

import functools
import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dicompile.errors import DicompileError

CONFIGS = Path(__file__).parent / "configs"

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Size:
    """How large a model is built and what it is given.

    Attributes:
        latent: frames, height and width of the latent, or height and width.
        text: tokens of the prompt.
        config: what differs from the published config.
    """

    latent: tuple[int, ...]
    text: int = 0
    config: Config = field(default_factory=dict)


@dataclass(frozen=True)
class Published:
    """A published model.

    Attributes:
        name: on the command line, and of its file.
        layout: of its latent, in diffusers' letters; "packed" if tokens are rows already, "list" if samples are a list.
        size: as published.
        conditioning: config, size and rows of the batch -> keyword arguments of its forward, without latent and
            timestep.
        batch: rows of a call by its pipeline; two where guidance is computed in one call.
        patch: edge of a token in the latent.
        pixels: edge in pixels of what one element of the latent stands for.
        frames: frames of the film that one frame of the latent stands for, after the first.
        time_scale: what the model is given for one of 1000 timesteps.
        distilled: True if guidance is an input, so that no row of the batch is unconditional.
        given: names of latent and timestep in its forward.
        is_lazy: True if it makes tables at its first call, so that only later calls can be captured.
    """

    name: str
    layout: str
    size: Size
    conditioning: Callable[[Config, Size, int], dict[str, Any]]
    batch: int = 1
    patch: int = 2
    pixels: int = 8
    frames: int = 4
    time_scale: float = 1
    distilled: bool = False
    given: tuple[str, str] = ("hidden_states", "timestep")
    is_lazy: bool = False

    @functools.cached_property
    def _file(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((CONFIGS / f"{self.name}.json").read_text(encoding="utf-8"))
        return content

    @property
    def title(self) -> str:
        """As its authors call it."""
        return str(self._file["title"])

    @property
    def source(self) -> str:
        """Where the config was published: repository on the Hugging Face hub, and file in it."""
        return str(self._file["source"])

    @property
    def billions(self) -> float:
        """Parameters as published, in billions."""
        return float(self._file["billions"])

    def config(self, size: Size | None = None) -> dict[str, Any]:
        """The published config, with what is different in `size`."""
        return {**self._file["config"], **(size.config if size else {})}

    def build(self, size: Size) -> nn.Module:
        """The model with random weights, in eval mode; where and in which dtype, torch's defaults say.

        Raises:
            DicompileError: diffusers is not installed, or too old to know the class.
        """
        diffusers, config = get_diffusers(), self.config(size)
        kind = getattr(diffusers, config["_class_name"], None)
        if kind is None:
            raise DicompileError(
                f"diffusers {diffusers.__version__} has no class {config['_class_name']}",
                where=self.name,
                fix="pip install -U diffusers",
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # diffusers 0.42 warns of what its own Chroma uses
            module: nn.Module = kind.from_config(config)
        return module.eval().requires_grad_(False)

    def tokens(self, size: Size) -> int:
        """Tokens of the latent."""
        return math.prod((*size.latent[:-2], *(length // self.patch for length in size.latent[-2:])))

    def latents(self, size: Size, batch: int | None = None) -> Any:
        """One drawn latent, float32, in the model's layout."""
        channels, rows = self.config(size)["in_channels"], self.batch if batch is None else batch
        if self.layout == "packed":
            return torch.randn(rows, self.tokens(size), channels)
        if self.layout == "list":
            return [torch.randn(channels, 1, *size.latent) for _ in range(rows)]
        letters = dict(zip("FHW"[-len(size.latent) :], size.latent, strict=True))
        return torch.randn([{"B": rows, "C": channels, **letters}[letter] for letter in self.layout])

    def inputs(self, size: Size, batch: int | None = None) -> dict[str, Any]:
        """Conditioning, float32."""
        return self.conditioning(self.config(size), size, self.batch if batch is None else batch)

    def call(self, size: Size, batch: int | None = None) -> dict[str, Any]:
        """All keyword arguments of one call, as its pipeline makes it at the first step."""
        rows = self.batch if batch is None else batch
        latent, timestep = self.given
        time = torch.full((rows,), 999 * self.time_scale)
        given: dict[str, Any] = {latent: self.latents(size, rows), timestep: time}
        return {**given, **self.inputs(size, rows), "return_dict": False}

    def sized(self, picture: tuple[int, int] | None = None, frames: int | None = None, text: int | None = None) -> Size:
        """The published size, or another one.

        Args:
            picture: height and width in pixels.
            frames: of a film.
            text: tokens of the prompt.

        Raises:
            DicompileError: pixels or frames are no whole number of tokens, or there is no film.
        """
        latent = self.size.latent
        if picture is not None:
            latent = (*latent[:-2], *(self._tokens(length, self.pixels * self.patch) for length in picture))
        if frames is not None:
            if len(latent) < 3:
                raise DicompileError(f"{self.title} makes pictures, not films", where="frames", fix="leave frames out")
            if (frames - 1) % self.frames or frames < 1:
                raise DicompileError(
                    f"{self.title} cannot make {frames} frames",
                    where="frames",
                    why=f"its autoencoder takes one frame and then {self.frames} at once",
                    fix=f"for instance {(frames - 1) // self.frames * self.frames + 1} frames",
                )
            latent = ((frames - 1) // self.frames + 1, *latent[1:])
        return replace(self.size, latent=latent, text=self.size.text if text is None else text)

    def _tokens(self, pixels: int, edge: int) -> int:
        """Elements of the latent for pixels of a picture."""
        if pixels % edge or pixels < edge:
            raise DicompileError(
                f"{self.title} cannot make a picture with an edge of {pixels} pixels",
                where="size",
                why=f"a token is {edge} x {edge} pixels",
                fix=f"for instance {max(round(pixels / edge), 1) * edge} pixels",
            )
        return pixels // self.pixels

    def describe(self, size: Size) -> str:
        """The size in words: "49 frames of 480x720 pixels, 17550 tokens, 226 of text"."""
        height, width = (length * self.pixels for length in size.latent[-2:])
        picture = f"{height}x{width} pixels, {self.tokens(size)} tokens"
        film = f"{(size.latent[0] - 1) * self.frames + 1} frames of " if len(size.latent) == 3 else ""
        return film + picture + (f", {size.text} of text" if size.text else "")


def get_diffusers() -> Any:
    """The diffusers package.

    Raises:
        DicompileError: it is not installed.
    """
    try:
        import diffusers
    except ModuleNotFoundError:
        raise DicompileError(
            "published models need diffusers, which is not installed",
            where="dicompile.zoo",
            why="they are classes of diffusers; the compiler itself does without it",
            fix="pip install 'dicompile[diffusers]'",
        ) from None
    diffusers.utils.logging.set_verbosity_error()  # its caches warn that they are experimental
    return diffusers


def positions(*sizes: int) -> Tensor:
    """Coordinates of a grid, a row for each token."""
    return torch.cartesian_prod(*(torch.arange(size).float() for size in sizes))
