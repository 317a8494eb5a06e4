"""Looks at a page in a real Chromium without a screen: what a reader would see, in numbers."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.bounds import BOUND_S

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")

# The window of a headless Chromium is never narrower than 500; a frame in it is as narrow as a phone.
_WRAPPER = """<!doctype html><meta charset="utf-8"><body style="margin:0">
<iframe id="page" width="{width}" height="900" style="border:0" srcdoc="{page}"></iframe><pre id="seen"></pre>
<script>
const frame = document.getElementById("page");
const look = () => {{
  const inside = frame.contentDocument, all = [...inside.querySelectorAll("body *")];
  const style = inside.defaultView.getComputedStyle(inside.body);
  const clipped = (e) => e.closest(".table, pre, svg") !== null;
  document.getElementById("seen").textContent = JSON.stringify({{
    width: inside.documentElement.clientWidth, scrollWidth: inside.documentElement.scrollWidth,
    tooWide: all.filter((e) => !clipped(e) && e.getBoundingClientRect().right > {width} + 1).map((e) => e.tagName),
    background: style.backgroundColor, color: style.color,
    fontSizes: [...new Set(all.filter((e) => e.tagName !== "TITLE" && e.childElementCount === 0 && e.textContent.trim())
      .map((e) => {{
        const own = parseFloat(inside.defaultView.getComputedStyle(e).fontSize), svg = e.closest("svg");
        return svg ? own * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : own;
      }}))],
    headings: all.filter((e) => /^H[1-6]$/.test(e.tagName)).map((e) => e.textContent),
    drawn: all.filter((e) => ["path", "use"].includes(e.tagName)
      && e.getBoundingClientRect().width > 0).length,
    charts: [...inside.querySelectorAll("svg")].map((e) => e.getBoundingClientRect().width),
    fetched: inside.defaultView.performance.getEntriesByType("resource").map((e) => e.name),
    text: inside.body.innerText,
  }});
}};
frame.addEventListener("load", look);
</script>"""


def look_at(page: str, directory: Path, *, width: int, dark: bool) -> dict[str, Any]:
    """Return what Chromium makes of a page at a width, in the light or the dark theme."""
    wrapper = directory / f"wrapper-{width}-{dark}.html"
    wrapper.write_text(_WRAPPER.format(width=width, page=html.escape(page)), encoding="utf-8")
    flags = ["--dump-dom", "--virtual-time-budget=3000", f"--window-size={max(500, width)},900"]
    dom = run_chromium(directory, *flags, wrapper.as_uri(), dark=dark)
    seen = re.search(r'<pre id="seen">(.+?)</pre>', dom, re.DOTALL)
    assert seen, dom[-2000:]
    return dict(json.loads(html.unescape(seen[1])))


def run_chromium(directory: Path, *flags: str, dark: bool) -> str:
    """Run Chromium with a profile of its own; returns what it prints."""
    command = [
        str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--hide-scrollbars", f"--user-data-dir={directory / 'profile'}",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", *flags,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=BOUND_S, check=True).stdout


def contrast(first: str, second: str) -> float:
    """Return the contrast of two ``rgb(…)`` colours by WCAG 2: 1 to 21, of which 4.5 is what text needs."""
    bright, dim = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def _luminance(color: str) -> float:
    shares = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
