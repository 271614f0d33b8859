"""Make docs/images/report.png: the HTML report of the demo model, as Chromium shows it.

    pip install ".[images]"
    python tools/report_screenshot.py

needs chromium, chromium-browser or google-chrome on the PATH.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

from cobla_onnx import Budget, compress

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 150_000


def main() -> None:
    """Compress the demo model, take the picture, thin out its colours."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="1000,1590", help="of the window, WIDTH,HEIGHT")
    size = parser.parse_args().size
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        parser.error(f"no browser: none of {', '.join(names)} is on the PATH")
    result = compress(
        ROOT / "models/digits.onnx", Budget(mem=0.3), data=ROOT / "models/digits_calibration.npz"
    )
    target = ROOT / "docs/images/report.png"
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "report.html")
        text = result.report.to_html().replace(f"{ROOT}/", "")
        page.write_text(text, encoding="utf-8")
        subprocess.run(
            [
                browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                "--disable-background-networking", "--disable-component-update",
                "--blink-settings=preferredColorScheme=1", f"--user-data-dir={folder}/profile",
                f"--window-size={size}", f"--screenshot={target}", page.as_uri(),
            ],
            check=True,
            capture_output=True,
            timeout=120,
        )  # fmt: skip
    with Image.open(target) as picture:
        picture.convert("RGB").quantize(96).save(target, optimize=True)
    if target.stat().st_size > LIMIT:
        raise SystemExit(f"{target}: has {target.stat().st_size} bytes, more than {LIMIT}")
    print(f"{target.relative_to(ROOT)}: {target.stat().st_size} bytes")


if __name__ == "__main__":
    main()
