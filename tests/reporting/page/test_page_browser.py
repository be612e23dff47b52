"""The page in a real browser, where Chromium is installed."""

from __future__ import annotations

import html
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")

# A page in a frame as wide as a phone; its width, and that of what does not fit, go into the title.
FRAME = """<!DOCTYPE html><meta charset="utf-8"><title>nothing</title>
<iframe width="390" height="800" style="border: 0" srcdoc="{}"></iframe>
<script>
const frame = document.querySelector("iframe");
frame.addEventListener("load", () => {{
  const root = frame.contentDocument.documentElement;
  document.title = root.clientWidth + " of " + root.scrollWidth;
}});
</script>"""


def chromium(folder: Path, *arguments: str) -> str:
    """Standard output of a headless browser that reaches no network."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={folder / 'profile'}", "--host-resolver-rules=MAP * 0.0.0.0"]
    environment = os.environ | {"HOME": str(folder)}
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def widths(text: str, tmp_path: Path) -> tuple[int, int]:
    """Width of the page on a phone, and of what it holds."""
    file = tmp_path / "frame.html"
    file.write_text(FRAME.format(html.escape(text)), encoding="utf-8")
    found = re.search(
        r"<title>(\d+) of (\d+)</title>", chromium(tmp_path, "--dump-dom", file.as_uri())
    )
    assert found is not None
    return int(found[1]), int(found[2])


def test_page_fits_a_phone(folder: Path, tmp_path: Path):
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert widths(text, tmp_path) == (390, 390)
    wide = text.replace("<main>", '<main><div style="width: 500px">x</div>', 1)
    assert widths(wide, tmp_path)[1] > 390


def test_page_opens_from_disk_and_prints(folder: Path, tmp_path: Path):
    page = (folder / "report.html").as_uri()
    assert "Limits</h2>" in chromium(tmp_path, "--dump-dom", page)
    chromium(tmp_path, f"--print-to-pdf={tmp_path / 'page.pdf'}", "--no-pdf-header-footer", page)
    pdf = (tmp_path / "page.pdf").read_bytes()
    assert pdf.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) > 2
