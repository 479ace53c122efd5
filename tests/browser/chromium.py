"""The browser on this machine, and what to install where there is none."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys

__all__ = ["VARIABLE", "executable", "missing", "no_browser"]

VARIABLE = "OPDTHEORY_CHROMIUM"
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
_PLACES = (
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)
_INSTALL = f"""no Chromium was found. Install one:
  Debian        apt-get install chromium
  Ubuntu        snap install chromium
  Fedora        dnf install chromium
  Arch          pacman -S chromium
  macOS         brew install --cask chromium
or name the executable of Chromium, Chrome or Edge:  {VARIABLE}=/path/to/chrome make browser"""


def executable() -> str | None:
    """The path of the browser that `OPDTHEORY_CHROMIUM` names, or of the first that is found."""
    named = os.environ.get(VARIABLE)
    if named:
        return shutil.which(named)
    return next(filter(None, map(shutil.which, _NAMES)), None) or next(filter(os.path.isfile, _PLACES), None)


def no_browser() -> str | None:
    """What to install where there is no browser, in words; None if there is one."""
    if executable() is not None:
        return None
    named = os.environ.get(VARIABLE)
    return f"{VARIABLE} must name an executable, got {named!r}" if named else _INSTALL


def missing() -> str | None:
    """What has to be installed before pages can be walked, in words; None if nothing is missing."""
    if (problem := no_browser()) is not None:
        return problem
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed: pip install 'opdtheory[browser]'"
    return None


if __name__ == "__main__":
    lacking = no_browser()
    sys.exit(lacking and f"error: {lacking}")
