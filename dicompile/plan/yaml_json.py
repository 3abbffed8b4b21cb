"""Reading and writing: frozen data goes to and from YAML and JSON."""

from __future__ import annotations

import json
from typing import Any

import yaml
from pydantic import ValidationError
from typing_extensions import Self

from dicompile import outside
from dicompile.errors import InvalidPolicy
from dicompile.plan.frozen import Frozen, invalid_policy


class YamlJson(Frozen):
    """Frozen data that stands alone in a file."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data: what JSON and YAML hold."""
        data: dict[str, Any] = self.model_dump(mode="json")
        return data

    def to_json(self) -> str:
        """JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def to_yaml(self) -> str:
        """YAML text."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @classmethod
    def from_dict(cls, data: Any, source: str = "policy") -> Self:
        """Read plain data.

        Raises:
            InvalidPolicy: a key is unknown or a value is outside its range; the text names it.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise invalid_policy(source, error) from None
        except TypeError as error:  # pydantic calls our constructors with keywords
            raise InvalidPolicy("an option's name is not text", where=source, why=str(error)) from None

    @classmethod
    def from_yaml(cls, text: str | bytes, source: str = "YAML") -> Self:
        """Read YAML text.

        Raises:
            InvalidPolicy: the text is not valid YAML, or see `from_dict`.
        """
        try:
            data = outside.from_yaml(text)
        except outside.Unreadable as error:
            raise InvalidPolicy(
                "this is not valid YAML", where=source, why=str(error), fix="compare policy.to_yaml()"
            ) from None
        return cls.from_dict(data, source)

    @classmethod
    def from_json(cls, text: str | bytes, source: str = "JSON") -> Self:
        """Read JSON text; YAML would read its escapes of characters beyond the basic plane as two.

        Raises:
            InvalidPolicy: the text is not valid JSON, or see `from_dict`.
        """
        try:
            data = outside.from_json(text)
        except outside.Unreadable as error:
            raise InvalidPolicy("this is not valid JSON", where=source, why=str(error)) from None
        return cls.from_dict(data, source)
