"""How the stages of the work tell how far they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

__all__ = ["Progress"]

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with the name of a stage, the steps done and their number.

Behind a colon the name may tell how it stands, such as the loss reached.
"""
