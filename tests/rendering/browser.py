"""What sticks out of a page in a browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

__all__ = ["CHROMIUM", "sticks_out"]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# A window of Chromium is at least 500 wide, a frame within it as narrow as one likes.
_PROBE = """<!doctype html><iframe id="page" style="width:{width}px;height:900px;border:0" srcdoc="{page}"></iframe>
<pre id="found"></pre><script>
document.getElementById("page").onload = () => {{
  const shown = document.getElementById("page").contentDocument, found = [];
  for (const each of shown.querySelectorAll(".scroll, .formula-line"))
    if (each.scrollWidth > each.clientWidth + 1) found.push([each.className, each.textContent.slice(0, 60)]);
  for (const each of shown.querySelectorAll("main *"))
    if (each.getBoundingClientRect().right > {width} + 1 && !each.closest(".scroll, svg, .formula-line"))
      found.push([each.tagName, each.textContent.slice(0, 60)]);
  document.getElementById("found").textContent = JSON.stringify(found);
}}</script>"""


def sticks_out(page: str, width: int, folder: Path) -> list[list[str]]:
    """The boxes that scroll sideways or end right of the page, with all details open; a name and the first words."""
    page = re.sub(r"<meta http-equiv[^>]*>", "", page).replace("<details", "<details open")
    path = folder / "probe.html"
    path.write_text(_PROBE.format(width=width, page=html.escape(page, quote=True)), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command = [str(CHROMIUM), *flags, "--virtual-time-budget=20000", "--window-size=1600,1000", "--dump-dom"]
    done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(html.unescape(done.stdout.partition('<pre id="found">')[2].partition("</pre>")[0]))
