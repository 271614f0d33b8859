"""Run the code of docs/recipes and docs/commands as a reader would; write what it printed there.

    python tools/run_recipes.py            # run all pages
    python tools/run_recipes.py --write    # and bring the printed output in them up to date

A page's blocks run in their order, each in a process of its own, in a folder that holds
`models` and nothing else; `python`, `sh` and `make` blocks count, and a `text` block right
after one is what it printed. `<!-- needs: torch -->` before a block names the modules or
commands without which it is left out.
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
PAGES = sorted(
    [*(ROOT / "docs" / "recipes").glob("*.md"), *(ROOT / "docs" / "commands").glob("*.md")]
)
BLOCK = re.compile(
    r"(?:<!-- needs: (?P<needs>[^>]*) -->\n+)?"
    r"^```(?P<language>python|sh|make)\n(?P<code>.*?)^```\n"
    r"(?:\n```text\n(?P<output>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A block of code, what it needs, and what the page says that it prints."""

    needs: tuple[str, ...]
    language: str
    code: str
    output: str | None


def read_blocks(text: str) -> list[Block]:
    """Return a page's blocks."""
    return [
        Block(
            tuple((match["needs"] or "").replace(",", " ").split()),
            match["language"],
            match["code"],
            match["output"],
        )
        for match in BLOCK.finditer(text)
    ]


def missing(block: Block) -> list[str]:
    """Return what a block needs and is not here."""
    return [
        name
        for name in block.needs
        if importlib.util.find_spec(name) is None and shutil.which(name) is None
    ]


def run_block(block: Block, folder: Path) -> str:
    """Run a block; return what it printed."""
    if block.language == "make":
        (folder / "Makefile").write_text(block.code)
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
    (folder / "models").symlink_to(ROOT / "models", target_is_directory=True)
    results: list[tuple[Block, str]] = []
    absent: list[str] = []
    for block in read_blocks(page.read_text(encoding="utf-8")):
        lacking = missing(block)
        absent += lacking
        if not lacking:
            results.append((block, run_block(block, folder)))
    return results, absent


def main() -> None:
    """Run pages; write their output if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", nargs="*", type=Path, default=PAGES)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
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
