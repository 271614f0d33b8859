"""Run the code of docs/walks, docs/recipes and docs/commands as a reader would; write its output.

    python tools/run_recipes.py            # run all pages
    python tools/run_recipes.py --write    # and bring the printed output in them up to date

A page's blocks run in their order, each in a process of its own, in a folder that holds
`models`, `tools` and nothing else; `python`, `sh` and `make` blocks count, and a `text` block right
after one is what it printed. A line before a block says more of it:

`<!-- needs: torch -->` names modules, commands and files without which it is left out; files are
looked for in the folder of assets (`COBLA_ONNX_ASSETS`, or `shared` beside the repository), and
`minutes` stands for time, which is there with `--minutes` or `COBLA_ONNX_MINUTES=1`.
`<!-- file: NAME -->` is a block that is saved under this name, and not run.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ASSETS = Path(os.environ.get("COBLA_ONNX_ASSETS", ROOT.parent / "shared"))
PAGES = sorted(
    page
    for room in ("walks", "recipes", "commands")
    for page in (ROOT / "docs" / room).glob("*.md")
)
BLOCK = re.compile(
    r"(?:<!-- needs: (?P<needs>[^>]*) -->\n+)?"
    r"(?:<!-- file: (?P<file>[^>]*) -->\n+)?"
    r"^```(?P<language>python|sh|make|json)\n(?P<code>.*?)^```\n"
    r"(?:\n```text\n(?P<output>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A block of code, what it needs, what the page says that it prints; `file` if it is saved."""

    needs: tuple[str, ...]
    language: str
    code: str
    output: str | None
    file: str | None = None


def read_blocks(text: str) -> list[Block]:
    """Return a page's blocks."""
    return [
        Block(
            tuple((match["needs"] or "").replace(",", " ").split()),
            match["language"],
            match["code"],
            match["output"],
            "Makefile" if match["language"] == "make" else match["file"],
        )
        for match in BLOCK.finditer(text)
        if match["language"] != "json" or match["file"]
    ]


def find_asset(name: str) -> Path | None:
    """Find a file among the assets."""
    return next((path for path in sorted(ASSETS.glob(f"*/{name}"))), None)


def missing(block: Block) -> list[str]:
    """Return what a block needs and is not here."""
    return [name for name in block.needs if not _is_there(name)]


def _is_there(name: str) -> bool:
    if name == "minutes":
        return os.environ.get("COBLA_ONNX_MINUTES") == "1"
    if Path(name).suffix:
        return find_asset(name) is not None
    return importlib.util.find_spec(name) is not None or shutil.which(name) is not None


def run_block(block: Block, folder: Path) -> str:
    """Run a block; return what it printed."""
    for name in block.needs:
        if (asset := find_asset(name)) and not (folder / name).exists():
            (folder / name).symlink_to(asset)
    if block.file is not None:
        (folder / block.file).write_text(block.code, encoding="utf-8")
        return ""
    commands = {
        "python": [sys.executable, "-c", block.code],
        "sh": ["bash", "-euo", "pipefail", "-c", block.code],
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        commands[block.language],
        cwd=folder,
        env={**os.environ, "PATH": path, "PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=600,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{block.code}\n{done.stdout}\n{done.stderr}")
    return "".join(f"{line.rstrip()}\n" for line in done.stdout.splitlines())


def run_page(page: Path, folder: Path) -> tuple[list[tuple[Block, str]], list[str]]:
    """Run a page's blocks, except those that need what is not there.

    Returns
    -------
    list of (Block, printed), and what was missing
    """
    for name in ("models", "tools"):
        (folder / name).symlink_to(ROOT / name, target_is_directory=True)
    results: list[tuple[Block, str]] = []
    absent: list[str] = []
    for block in read_blocks(page.read_text(encoding="utf-8")):
        lacking = missing(block)
        absent += lacking
        if not lacking:
            results.append((block, run_block(block, folder)))
    return results, list(dict.fromkeys(absent))


def main() -> None:
    """Run pages; write their output if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", nargs="*", type=Path, default=PAGES)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--minutes", action="store_true", help="also blocks that take minutes")
    options = parser.parse_args()
    if options.minutes:
        os.environ["COBLA_ONNX_MINUTES"] = "1"
    for page in options.pages:
        with tempfile.TemporaryDirectory() as folder:
            results, lacking = run_page(page, Path(folder))
        print(f"{page.name}: {len(results)} blocks", *(f"without {name}" for name in lacking))
        text = page.read_text(encoding="utf-8")
        for block, printed in results:
            if block.output is not None and printed != block.output:
                print(printed)
                text = text.replace(f"```text\n{block.output}```", f"```text\n{printed}```", 1)
        if options.write:
            page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
