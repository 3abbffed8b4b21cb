"""What policies are made of: frozen data that hashes, compares, and complains in our words."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from dicompile.errors import InvalidPolicy
from dicompile.outside import shown


class Frozen(BaseModel):
    """Immutable data without unknown options."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise invalid_policy(type(self).__name__, error) from None


class Origin(Frozen):
    """Where a learned table comes from and what it was learned for; it holds for nothing else.

    Attributes:
        file: what messages call it.
        sites: labels of the sites that the rule names, "3.mlp", in order; empty if nobody wrote them down.
        timesteps: of the sampler, in calling order, as its scheduler counts them; empty if nobody wrote them down.
    """

    file: str
    sites: tuple[str, ...] = ()
    timesteps: tuple[float, ...] = ()


def invalid_policy(source: str, error: ValidationError) -> InvalidPolicy:
    """The first complaint of pydantic as one of our errors."""
    first = error.errors(include_url=False)[0]
    told = first.get("ctx", {}).get("error")
    if isinstance(told, InvalidPolicy):  # raised by what is inside, and wrapped by pydantic as any ValueError
        return told
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return InvalidPolicy(f"unknown option {shown(key)}", where=source, fix="remove it, or check its spelling")
    return InvalidPolicy(
        f"option {shown(key)} cannot be {shown(first['input'])}",
        where=source,
        why=first["msg"],
        fix="see the policy's docstring",
    )
