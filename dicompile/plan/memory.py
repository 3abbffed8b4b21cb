"""How much a plan may remember, in which numbers, and where.

Bytes count for one guidance context: a sampler that calls the model once for the conditional and once for the
unconditional half holds everything twice. How many contexts there are shows at run time only, after the first of them
has run; one call with both halves in its batch is one context.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import ByteSize, TypeAdapter, ValidationError

from dicompile.analysis import Site, SiteKind
from dicompile.errors import InvalidSetting
from dicompile.plan.action import SlotKind, What

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float8_e4m3fn": torch.float8_e4m3fn}
"""What values can be stored in. A dtype with less range than float32 comes with a scale for every row."""

OVER_BUDGET = ("refuse", "degrade")
DEVICES = ("cpu",)
_FLOAT8_CAPABILITY = (8, 9)
_SIZE = TypeAdapter(ByteSize)


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """Limits of what is remembered; by default there are none.

    Attributes:
        max_bytes: budget of the slots of one guidance context, or None.
        over_budget: what becomes of a plan that needs more: "refuse" raises before anything is compiled, "degrade"
            computes sites at every step until the others fit.
        dtype: values are stored in this, or as they are where they are no wider; None stores all as they are. See
            `DTYPES`. A step uses what it has just computed unrounded; only what later steps read is rounded. Scores
            and counters keep their own dtypes.
        device: "cpu" keeps slots in host memory between the steps that use them; None leaves them where they are made.
    """

    max_bytes: int | None = None
    over_budget: str = "refuse"
    dtype: str | None = None
    device: str | None = None

    @classmethod
    def of(
        cls,
        max_cache_bytes: int | str | None = None,
        over_budget: str = "refuse",
        cache_dtype: str | torch.dtype | None = None,
        cache_device: str | torch.device | None = None,
        *,
        where: str = "dicompile.optimize",
    ) -> CacheOptions:
        """Options as users write them.

        Args:
            max_cache_bytes: bytes, as a number or as text with a unit: "2GiB", "500 MB".
            over_budget: see `CacheOptions`.
            cache_dtype: one of `DTYPES`, by name or as the dtype of torch.
            cache_device: see `CacheOptions`.
            where: what messages name as their place.

        Raises:
            InvalidSetting: a value is not one of those.
        """
        dtype = None if cache_dtype is None else str(cache_dtype).removeprefix("torch.")
        device = None if cache_device is None else str(cache_device)
        _check("over_budget", over_budget, OVER_BUDGET, where)
        if dtype is not None:
            _check("cache_dtype", dtype, DTYPES, where)
        if device is not None:
            _check("cache_device", device, DEVICES, where)
        return cls(None if max_cache_bytes is None else _bytes(max_cache_bytes, where), over_budget, dtype, device)

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype that values are stored in; None for their own."""
        return None if self.dtype is None else DTYPES[self.dtype]

    def narrows(self, itemsize: int) -> bool:
        """True if values with `itemsize` bytes an element are stored in fewer."""
        return self.torch_dtype is not None and self.torch_dtype.itemsize < itemsize

    def scales(self, itemsize: int) -> bool:
        """True if such values are stored with a scale for every row."""
        return self.narrows(itemsize) and needs_scale(self.torch_dtype)

    def for_site(self, site: Site) -> CacheOptions:
        """What holds for a site: what is watched is compared, what a model adds is small, so these stay as they are."""
        return replace(self, dtype=None) if site.kind.is_watched or site.kind is SiteKind.MODEL else self

    def __str__(self) -> str:
        parts = [self.dtype or "", "in host memory" if self.device else ""]
        return ", ".join(part for part in parts if part)


UNLIMITED = CacheOptions()


def needs_scale(dtype: torch.dtype | None) -> bool:
    """True if plain casts to `dtype` could overflow."""
    return dtype is not None and torch.finfo(dtype).max < torch.finfo(torch.bfloat16).max


def check_can_compile(cache: CacheOptions, devices: Iterable[torch.device]) -> None:
    """Raise if the compiler has no 8-bit floats for one of the devices that a model runs on.

    Raises:
        InvalidSetting: it has none.
    """
    if cache.dtype != "float8_e4m3fn":
        return
    for device in sorted({str(device) for device in devices if device.type == "cuda"}):
        capability = torch.cuda.get_device_capability(device)
        if capability < _FLOAT8_CAPABILITY and torch.version.hip is None:
            raise InvalidSetting(
                f"{device} has no 8-bit floats",
                where="cache_dtype",
                why=f"Triton compiles them from compute capability 8.9 on, this is {capability[0]}.{capability[1]}",
                fix="cache_dtype='bfloat16'",
            )


def slot_bytes(site: Site, kind: SlotKind, what: What, cache: CacheOptions, clusters: int = 0) -> int:
    """Bytes of a slot.

    Args:
        site: whose slot.
        kind: of slot.
        what: which value of the site is stored.
        cache: decides the dtype.
        clusters: of its tokens.
    """
    if kind in (SlotKind.STAMP, SlotKind.SCORE):
        return site.shape[0] * site.tokens.count * 4
    if kind is SlotKind.CLUSTER:
        return site.shape[0] * site.tokens.count * 8
    if kind is SlotKind.CENTROID:
        return site.shape[0] * clusters * site.shape[-1] * 4
    shape, itemsize = stored_value(site, kind, what)
    if kind.is_scale:
        return math.prod(shape[:-1]) * 4
    dtype = cache.for_site(site).torch_dtype
    return math.prod(shape) * (itemsize if dtype is None else min(itemsize, dtype.itemsize))


def stored_value(site: Site, kind: SlotKind, what: What) -> tuple[tuple[int, ...], int]:
    """Shape of what a slot (or the scales of one) stores, and its own bytes per element."""
    if kind in (SlotKind.ATTENTION, SlotKind.ATTENTION_SCALE):
        return site.attention_shape, site.attention_itemsize
    return site.shape, (what.is_added and site.update_itemsize) or site.itemsize


def _check(option: str, value: str, allowed: Any, where: str) -> None:
    if value not in allowed:
        raise InvalidSetting(f"{option} cannot be {value!r}", where=where, fix=f"use one of: {', '.join(allowed)}")


def _bytes(given: int | str, where: str) -> int:
    # By itself, pydantic stops where it understands no more, and takes "1,5GiB" for one byte.
    if not isinstance(given, str) or ByteSize.byte_string_re.fullmatch(given.strip()):
        with contextlib.suppress(ValidationError):
            return int(_SIZE.validate_python(given, strict=True))
    raise InvalidSetting(
        f"max_cache_bytes cannot be {given!r}",
        where=where,
        fix="give a number of bytes, or text such as '2GiB' or '500MB'",
    )
