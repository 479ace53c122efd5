"""`python -m tests.browser`: what every page is free of, and exit status 1 if one is not."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from tests.browser import pages
from tests.browser.chromium import missing
from tests.browser.walk import fits, targets_of, walk

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Walk the pages and print what was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.browser", description=__doc__)
    parser.add_argument("--site", type=Path, metavar="DIR", help="a built site (default: build it)")
    parser.add_argument("--reports", type=Path, metavar="DIR", help="folder of HTML reports (default: make them)")
    parser.add_argument("--verify", type=Path, metavar="FILE", help="page of a verification (default: make it)")
    parser.add_argument("--no-reports", action="store_true", help="walk the site alone")
    parser.add_argument("--no-site", action="store_true", help="walk the reports alone")
    parser.add_argument("--only", default="*", metavar="GLOB", help="pages to walk, such as 'theory/*' or verify")
    parser.add_argument("--screenshots", type=Path, metavar="DIR", help="write pictures of the pages into DIR")
    parser.add_argument("--all", action="store_true", help="print every fault, not five of a kind and page")
    options = parser.parse_args(arguments)
    problem = missing()
    if problem is not None:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    if options.screenshots is not None:
        options.screenshots.mkdir(parents=True, exist_ok=True)
    with pages.scratch() as folder:
        targets = []
        if not options.no_site:
            site = options.site or pages.build_site(folder / "site")
            targets += targets_of(site.resolve(), options.only)
        if not options.no_reports:
            made = pages.reports(options.reports, options.verify, folder, options.only)
            targets += [each for each in made if fits(each.name, options.only)]
        if not targets:
            print(f"error: --only must fit a page, got {options.only!r}", file=sys.stderr)
            return 2
        print(f"walking {len(targets)} pages", file=sys.stderr)
        start = time.perf_counter()
        found = walk(targets, screenshots=options.screenshots)
    print(*found.lines(None if options.all else 5), sep="\n")
    print(
        f"{len(targets)} pages, {len(found.at)} faults, {len(found.external)} links to other sites (not followed), ",
        end="",
    )
    print(f"in {time.perf_counter() - start:.0f} s")
    return int(bool(found.at))


if __name__ == "__main__":
    sys.exit(main())
