"""Write the report to a file in the format that its extension names."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from cobla_onnx.errors import UsageError
from cobla_onnx.report.model import Report
from cobla_onnx.text import safe_text
from cobla_onnx.wording import either

__all__ = ["report_writer"]

WRITERS: dict[str, Callable[[Report], str]] = {
    ".json": Report.to_json,
    ".html": Report.to_html,
    ".md": Report.to_markdown,
}


def report_writer(path: str | os.PathLike[str]) -> Callable[[Report], str]:
    """Return the function that renders a report for a file of this name.

    Raises
    ------
    UsageError
        If the extension is not known.
    """
    writer = WRITERS.get(Path(path).suffix.lower())
    if writer is None:
        shown = safe_text(os.fspath(path), 200)
        raise UsageError(
            f"{either(python=shown, command=f'--report {shown}')}: its ending does not say in "
            f"which form; give a name that ends in {', '.join(WRITERS)}"
        )
    return writer
