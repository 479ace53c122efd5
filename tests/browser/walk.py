"""Pages in headless Chromium, at two widths and in two colour schemes, with the network off."""

from __future__ import annotations

import asyncio
import contextlib
import fnmatch
import functools
import http.server
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.browser.chromium import executable
from tests.browser.findings import Finding, Findings, Setting
from tests.browser.links import Links

if TYPE_CHECKING:
    from playwright.async_api import Browser, Page

__all__ = ["SCHEMES", "WIDTHS", "Target", "targets_of", "walk"]

WIDTHS, SCHEMES, HEIGHT = (1400, 400), ("light", "dark"), 900
# Names of other machines lead nowhere, whether or not there is a network.
_FLAGS = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--disable-gpu"]
_HARMLESS = ("data:", "blob:", "about:")

_FOLDER = Path(__file__).parent / "checks"
_PARTS = ("common", "boxes", "words", "contrast", "links")
_CHECKS = "".join((_FOLDER / f"{part}.js").read_text(encoding="utf-8") for part in _PARTS)
_JUDGED = ("Page", "Edges", "Clipped", "Scrolling", "Overlaps", "Words", "Contrast", "Scheme")
_LAYOUT = f"() => {{ {_CHECKS} {' '.join(f'check{part}();' for part in _JUDGED)} return found; }}"
_SOURCE = (
    f"(isReport) => {{ {_CHECKS} checkFormulas(isReport); return {{ found, links: links(), ids: identifiers() }}; }}"
)
# Folded parts are judged as well, and nothing is measured halfway through a transition.
_PREPARE = """async () => {
  const sheet = new CSSStyleSheet();
  sheet.replaceSync("*, *::before, *::after { transition: none !important; animation: none !important; }");
  document.adoptedStyleSheets = [...document.adoptedStyleSheets, sheet];
  for (const each of document.querySelectorAll("details")) each.open = true;
  await document.fonts.ready;
}"""
_SETTLE = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 20))))"
_TABS = "() => Math.max(1, ...[...document.querySelectorAll('.tabbed-set')].map((x) => x.children.length && " + (
    "x.querySelectorAll(':scope > input').length))"
)
_CHOOSE = """(k) => {
  for (const set of document.querySelectorAll(".tabbed-set")) set.querySelectorAll(":scope > input")[k]?.click();
}"""


@dataclass(frozen=True)
class Target:
    """A page to open: its name in the report, its file, and the root of its site (None for a single file)."""

    name: str
    path: Path
    root: Path | None = None


def targets_of(root: Path, only: str = "*") -> list[Target]:
    """The pages of a built site whose path fits the pattern, in order."""
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.html"))
    return [Target(name, root / name, root) for name in names if fits(name, only)]


def fits(name: str, only: str) -> bool:
    """Whether a name fits a pattern, which may leave out `/index.html`."""
    return any(fnmatch.fnmatch(name, only + end) for end in ("", "/index.html", ".html"))


def walk(
    targets: Sequence[Target],
    *,
    widths: Sequence[int] = WIDTHS,
    schemes: Sequence[str] = SCHEMES,
    screenshots: Path | None = None,
    parallel: int = 2,
) -> Findings:
    """Open every target in every setting and return what was found.

    Args:
        targets: all of one site, or single files.
        widths: of the viewport, in pixels.
        schemes: colour schemes.
        screenshots: folder for a picture of each page in each setting, or None.
        parallel: number of pages open at a time.
    """
    settings = [(width, scheme) for width in widths for scheme in schemes]
    return asyncio.run(_walked(targets, settings, screenshots, parallel))


async def _walked(
    targets: Sequence[Target], settings: Sequence[tuple[int, str]], screenshots: Path | None, parallel: int
) -> Findings:
    found = Findings()
    found.pages = [target.name for target in targets]
    with served({target.root for target in targets if target.root is not None}) as servers:
        async with launched() as browser:
            waiting = list(reversed(targets))

            async def work() -> None:
                # One tab for many pages: they share a process and a cache.
                context = await browser.new_context(service_workers="block")
                # Else the site would remember the scheme of the first visit.
                await context.add_init_script("try { localStorage.clear(); } catch {}")
                page = await context.new_page()
                while waiting:
                    await _Visit(waiting.pop(), servers, found).all(page, settings, screenshots)
                    await page.goto("about:blank")
                await context.close()

            await asyncio.gather(*(work() for _ in range(min(parallel, len(targets)))))
    return found


@contextlib.asynccontextmanager
async def launched() -> AsyncIterator[Browser]:
    """A browser without a window."""
    from playwright.async_api import async_playwright

    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=executable(), args=_FLAGS)
        try:
            yield browser
        finally:
            await browser.close()


@contextlib.contextmanager
def served(roots: set[Path]) -> Iterator[dict[Path, str]]:
    """Serve folders on this machine alone; gives the address of each, without the last slash."""
    with contextlib.ExitStack() as stack:
        addresses = {}
        for root in roots:
            handler = functools.partial(_Silent, directory=str(root))
            server = stack.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
            addresses[root] = f"http://127.0.0.1:{server.server_port}"
        yield addresses


class _Silent(http.server.SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        """As ever, but the icon that a browser asks for unasked may be missing."""
        if self.path == "/favicon.ico" and not Path(self.translate_path(self.path)).is_file():
            self.send_response(http.HTTPStatus.NO_CONTENT)
            self.end_headers()
        else:
            super().do_GET()

    def log_message(self, *_: Any) -> None:
        """Say nothing; what fails is found in the browser."""


class _Visit:
    """One target in all settings; the messages and the requests of the tab are its faults meanwhile."""

    def __init__(self, target: Target, servers: dict[Path, str], found: Findings) -> None:
        self.target, self.found = target, found
        self.server = None if target.root is None else servers[target.root]
        if self.server is None:
            self.address = target.path.resolve().as_uri()
        else:
            self.address = f"{self.server}/{target.name.removesuffix('index.html')}"
        self.setting = Setting(0, "")

    def fault(self, kind: str, text: str, detail: str = "", where: str = "") -> None:
        text = text if self.server is None else text.replace(self.server, "")
        self.found.add(Finding(self.target.name, kind, where, text[:200], detail), self.setting)

    @contextlib.contextmanager
    def listening(self, page: Page) -> Iterator[None]:
        """Record errors, and requests that fail or leave the site."""
        home = "file:" if self.server is None else self.server + "/"

        def leaves(url: str) -> bool:
            return not url.startswith((home, *_HARMLESS))

        def answered(response: Any) -> None:
            if response.status >= 400 and not (self.target.path.name == "404.html" and response.url == self.address):
                self.fault("request", response.url, f"status {response.status}")

        def failed(request: Any) -> None:
            if not leaves(request.url) and "ERR_ABORTED" not in str(request.failure):
                self.fault("request", request.url, str(request.failure))

        handlers: dict[Any, Any] = {
            "request": lambda r: self.fault("request", r.url, "leaves the site") if leaves(r.url) else None,
            "requestfailed": failed,
            "response": answered,
            "console": lambda m: self.fault("console error", m.text) if m.type == "error" else None,
            "pageerror": lambda error: self.fault("console error", str(error)),
        }
        for event, handler in handlers.items():
            page.on(event, handler)
        try:
            yield
        finally:
            for event, handler in handlers.items():
                page.remove_listener(event, handler)

    async def all(self, page: Page, settings: Sequence[tuple[int, str]], screenshots: Path | None) -> None:
        """Load the page in every setting, judge it, and take the pictures; without scripts one load a width will do."""
        with self.listening(page):
            loaded, scripted = 0, True
            for width, scheme in settings:
                self.setting = Setting(width, scheme)
                await page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
                first, fresh = loaded == 0, width != loaded or scripted
                if fresh:
                    await page.set_viewport_size({"width": width, "height": HEIGHT})
                    await page.goto(self.address, wait_until="load")
                    scripted = await page.evaluate("document.scripts.length > 0")
                    loaded = width
                await page.evaluate(_SETTLE)
                if screenshots is not None:
                    await page.screenshot(path=screenshots / self.picture(), full_page=True, animations="disabled")
                if fresh:
                    await page.evaluate(_PREPARE)
                    await page.evaluate(_SETTLE)
                if first:
                    await self.read(page)
                await self.judge(page)

    def picture(self) -> str:
        name = self.target.name.removesuffix(".html").removesuffix("/index").replace("/", "_")
        return f"{name}_{self.setting.width}_{self.setting.scheme}.png"

    async def read(self, page: Page) -> None:
        """Formulas and links, which no setting changes."""
        source = await page.evaluate(_SOURCE, self.target.root is None)
        for each in source["found"]:
            self.fault(**each)
        links = Links(self.target.path, self.target.root, self.server, set(source["ids"]))
        for link in source["links"]:
            why = links.fault(link)
            if why:
                self.fault("dead link", link["value"] or link["text"], why, link["where"])
        self.found.external |= links.external

    async def judge(self, page: Page) -> None:
        """What depends on the setting, with every choice of tabs."""
        for k in range(await page.evaluate(_TABS)):
            if k:
                await page.evaluate(_CHOOSE, k)
                await page.evaluate(_SETTLE)
            for each in await page.evaluate(_LAYOUT):
                self.fault(**each)
