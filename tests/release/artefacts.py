"""The sdist and the wheel: built, and compared with what git tracks."""

from __future__ import annotations

import subprocess
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[2]


def tracked() -> set[str]:
    """The files that git tracks and that are there."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name for name in listed.split("\0") if name and (ROOT / name).is_file()}


def names(artefact: Path) -> set[str]:
    """The files in an artefact, without the folder that an sdist puts around them."""
    if artefact.suffix == ".whl":
        with zipfile.ZipFile(artefact) as wheel:
            return {name for name in wheel.namelist() if not name.endswith("/")}
    with tarfile.open(artefact) as sdist:
        return {member.name.partition("/")[2] for member in sdist.getmembers() if member.isfile()}


def metadata(artefact: Path) -> list[str]:
    """The lines of an artefact's metadata, sorted: the two must say the same."""
    if artefact.suffix == ".whl":
        with zipfile.ZipFile(artefact) as wheel:
            (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
            return sorted(wheel.read(name).decode().splitlines())
    with tarfile.open(artefact) as sdist:
        (member,) = (m for m in sdist.getmembers() if m.name.count("/") == 1 and m.name.endswith("/PKG-INFO"))
        held = sdist.extractfile(member)
        return sorted(held.read().decode().splitlines()) if held else []


def wrong_in_sdist(found: Iterable[str], known: Iterable[str]) -> list[str]:
    """What an sdist lacks of the files that git tracks, and what it holds beside them."""
    there, wanted = set(found), set(known)
    lacks = [f"the sdist lacks {name}" for name in sorted(wanted - there)]
    return lacks + [
        f"the sdist holds {name}, which git does not track" for name in sorted(there - wanted - {"PKG-INFO"})
    ]


def wrong_in_wheel(found: Iterable[str], known: Iterable[str]) -> list[str]:
    """What a wheel lacks of the package, and what it holds beside it and its metadata."""
    there = {name for name in found if ".dist-info/" not in name}
    wanted = {name for name in known if PurePosixPath(name).parts[0] == "opdtheory"}
    lacks = [f"the wheel lacks {name}" for name in sorted(wanted - there)]
    return lacks + [f"the wheel holds {name}, which is no part of the package" for name in sorted(there - wanted)]


def wrong(wheel: Path, sdist: Path) -> list[str]:
    """What is wrong with the two artefacts."""
    known = tracked()
    problems = wrong_in_sdist(names(sdist), known) + wrong_in_wheel(names(wheel), known)
    if metadata(wheel) != metadata(sdist):
        problems.append("the metadata of the wheel and of the sdist differ")
    return problems
