"""Where the links of a page lead: to a file and to a place in it, without the network."""

from __future__ import annotations

import functools
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

__all__ = ["Links", "names_in"]

_HOST = re.compile(r"^([\w-]+\.)+[A-Za-z]{2,}$|^localhost$|^\d+\.\d+\.\d+\.\d+$")
_ELSEWHERE = ("http", "https")
_NOWHERE = ("mailto", "tel", "data", "blob")


class Links:
    """The links of one page.

    Args:
        path: the page's file.
        root: folder of its site, or None for a single file.
        server: the address that the site is served at.
        names: the names of places that the page has in the browser.
    """

    def __init__(self, path: Path, root: Path | None, server: str | None, names: set[str]) -> None:
        self.path, self.root, self.server, self.names = path.resolve(), root, server, names
        self.external: set[str] = set()

    def fault(self, link: dict[str, Any]) -> str | None:
        """What is wrong with a link or a resource, or None."""
        if link["url"] is None:
            return "is no address"
        url = urlsplit(link["url"])
        if url.scheme in _NOWHERE:
            return None
        file = self.file_of(link["url"])
        if file is not None:
            return self.local_fault(file, unquote(url.fragment))
        if url.scheme not in _ELSEWHERE:
            return f"must be a link to a page, got the scheme {url.scheme}"
        if link["kind"] == "resource":
            return "a resource from another machine"
        self.external.add(link["url"])
        host = url.hostname or ""
        return None if _HOST.match(host) and not re.search(r"[\s…<>]", link["value"]) else "is not well-formed"

    def file_of(self, address: str) -> Path | None:
        """The file or folder of an address on this machine, which need not exist; None for one elsewhere."""
        url = urlsplit(address)
        if url.scheme == "file":
            return Path(url2pathname(url.path))
        if self.server is None or self.root is None or f"{url.scheme}://{url.netloc}" != self.server:
            return None
        return self.root / unquote(url.path).lstrip("/")

    def local_fault(self, file: Path, fragment: str) -> str | None:
        """Whether a file of this machine is there and has the place that is named."""
        if file.is_dir():
            if self.root is None:
                return "leads to a folder"
            file = file / "index.html"
        if not file.is_file():
            return "there is no such file"
        if fragment in ("", "top") or fragment.startswith(":~:") or file.suffix != ".html":
            return None
        names = names_in(file.resolve())
        if file.resolve() == self.path:
            names = names | self.names
        return None if fragment in names else f"there is no place #{fragment}"


@functools.cache
def names_in(path: Path) -> frozenset[str]:
    """The places of an HTML file that a fragment can name."""
    reader = _Names()
    reader.feed(path.read_text(encoding="utf-8"))
    return frozenset(reader.names)


class _Names(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for key, value in attrs:
            if value and (key == "id" or (key == "name" and tag == "a")):
                self.names.add(value)
