"""Convert results to plain values and to JSON, with the version of the schema."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any, ClassVar

__all__ = ["Exported"]


class Exported:
    """Base of dataclasses that programs read; they contain neither NaN nor infinity.

    Attributes
    ----------
    schema_version : int
        Raised when a key changes its meaning.
    """

    schema_version: ClassVar[int] = 1

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain dicts and lists."""
        fields: Any = self
        found: dict[str, Any] = json.loads(json.dumps(asdict(fields), allow_nan=False))
        return {"schema_version": self.schema_version, **found}

    def to_json(self) -> str:
        """Return the result as indented JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)
