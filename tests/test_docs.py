"""The documentation: links lead somewhere, the site builds without a warning, recipes run."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools import run_recipes
from tools.run_recipes import PAGES as RECIPES
from tools.run_recipes import Block, missing, read_blocks, run_block, run_page

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"""\]\(([^)\s]+)\)|(?:src|href)="([^"]+)\"""")


def test_links_within_the_repository_lead_somewhere():
    broken = []
    for page in PAGES:
        if "_build" in page.parts:
            continue
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for match in LINK.finditer(re.sub(r"`[^`\n]+`", "", text)):
            target = (match[1] or match[2]).partition("#")[0]
            if target and "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert broken == []


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    for name in ("sphinx", "myst_parser", "furo"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed; pip install '.[docs]'")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    done = subprocess.run(
        [*command, "-d", tmp_path / "doctrees", ROOT / "docs", tmp_path / "html"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    pages = {path.relative_to(tmp_path / "html").as_posix() for path in tmp_path.rglob("*.html")}
    sources = {
        path.relative_to(ROOT / "docs").with_suffix(".html").as_posix()
        for path in (ROOT / "docs").rglob("*.md")
        if "_build" not in path.parts
    }
    assert sources <= pages
    # The parts of README.md arrive: a marker that is gone would include nothing.
    html = tmp_path / "html"
    assert "--mem F" in (html / "commands" / "compress.html").read_text(encoding="utf-8")
    assert "least output error" in (html / "commands" / "compress.html").read_text(encoding="utf-8")
    assert "pip install" in (html / "quickstart.html").read_text(encoding="utf-8")
    assert "cobla_onnx.compress" in (html / "python.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_readme_shows_what_its_command_prints(tmp_path):
    """Lines and layers are the same; figures nearly, for processors and versions differ."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    command = re.search(r"^    pip install \. && (cobla-onnx .*)$", text, re.MULTILINE)
    shown = re.search(r"^```\n(layer .*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert command is not None
    assert shown is not None
    (tmp_path / "models").symlink_to(ROOT / "models", target_is_directory=True)
    printed = run_block(Block((), "sh", command[1], None), tmp_path)
    said, found = shown[1].split(), printed.partition("written:")[0].split()
    assert [word for word in said if "/" in word] == [word for word in found if "/" in word]
    for words in (said, found):
        assert words.count("Conv") == 7
    # Layers may be kept whole on one processor and not on another.
    said, found = (words[words.index("memory:") :] for words in (said, found))
    for label in ("kept", "output", "least"):
        values = [float(words[words.index(label) + 1].rstrip(",")) for words in (said, found)]
        assert values[1] == pytest.approx(values[0], rel=0.1), label


def test_blocks_of_recipes_are_found():
    text = "<!-- needs: torch -->\n\n```python\na\n```\n\n```text\nb\n```\n\n```sh\nc\n```\n"
    assert read_blocks(text) == [
        Block(("torch",), "python", "a\n", "b\n"),
        Block((), "sh", "c\n", None),
    ]
    assert missing(Block(("json", "no-such-command"), "sh", "", None)) == ["no-such-command"]
    found = {page.stem for page in RECIPES if read_blocks(page.read_text(encoding="utf-8"))}
    assert {"quantise", "simplify", "pytorch", "make", "factors", "inspect", "sweep"} <= found
    assert {"detector", "sentences", "unknown", "olive", "optimum"} <= found


def test_blocks_are_saved_and_find_what_they_need(tmp_path, monkeypatch):
    monkeypatch.setattr(run_recipes, "ASSETS", tmp_path / "assets")
    monkeypatch.delenv("COBLA_ONNX_MINUTES", raising=False)
    page, folder = tmp_path / "page.md", tmp_path / "run"
    folder.mkdir()
    page.write_text(
        "<!-- file: a.json -->\n\n```json\n{}\n```\n\n```json\nno block\n```\n\n"
        "<!-- needs: some.txt -->\n\n```sh\ncat a.json some.txt\nls\n```\n\n"
        "<!-- needs: minutes -->\n\n```sh\necho long\n```\n"
    )
    results, lacking = run_page(page, folder)
    assert [printed for _, printed in results] == [""]
    assert lacking == ["some.txt", "minutes"]
    (tmp_path / "assets" / "texts").mkdir(parents=True)
    (tmp_path / "assets" / "texts" / "some.txt").write_text("text\n")
    monkeypatch.setenv("COBLA_ONNX_MINUTES", "1")
    again = tmp_path / "again"
    again.mkdir()
    results, lacking = run_page(page, again)
    assert [printed for _, printed in results] == [
        "",
        "{}\ntext\na.json\nmodels\nsome.txt\ntools\n",
        "long\n",
    ]
    assert lacking == []


def figures(text: str) -> tuple[str, list[float]]:
    """Part a text into its words and its numbers that stand by themselves, or before a unit."""
    numbers = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?=[kMG]?(?:%|\s))")
    return " ".join(numbers.sub("#", text).split()), [float(n) for n in numbers.findall(text)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [page for page in RECIPES if read_blocks(page.read_text(encoding="utf-8"))],
    ids=lambda page: page.stem,
)
def test_recipes_run_and_print_what_they_say(page, tmp_path):
    results, lacking = run_page(page, tmp_path)
    for block, printed in results:
        if block.output is None:
            continue
        said, found = figures(block.output), figures(printed)
        assert said[0] == found[0]
        # Other versions and processors: one image of 100 or 400, a rank, a few kB.
        assert found[1] == pytest.approx(said[1], abs=1.5, rel=0.1)
    if lacking:
        pytest.skip(f"{len(results)} blocks ran; the rest needs {', '.join(lacking)}")
