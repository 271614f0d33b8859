"""Costs before and after: of a layer, and of the model on disk and in RAM."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["UNKNOWN", "Cost", "Sizes"]


@dataclass(frozen=True)
class Cost:
    """A cost before and after, in elements, MACs or bytes; None if it is not known."""

    before: int | None
    after: int | None

    @property
    def kept(self) -> float | None:
        """Fraction that is left."""
        if self.before is None or self.after is None or self.before == 0:
            return None
        return self.after / self.before


UNKNOWN = Cost(None, None)


@dataclass(frozen=True)
class Sizes:
    """Bytes of the model, before and after; None for what was not measured.

    Attributes
    ----------
    file, zipped : Cost
        Of the written files, with external data, as they are and after deflate; see
        `graph.io.disk`.
    session : Cost
        Of the constants that a session holds in RAM; see `runtime.footprint`.
    """

    file: Cost = UNKNOWN
    zipped: Cost = UNKNOWN
    session: Cost = UNKNOWN

    def titled(self) -> tuple[tuple[str, Cost], ...]:
        """Each of them with its name for people."""
        return (
            ("file (bytes)", self.file),
            ("file, zipped (bytes)", self.zipped),
            ("constants in RAM, once decoded (bytes)", self.session),
        )
