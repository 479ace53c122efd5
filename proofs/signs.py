"""Every sign of the statements and of what they rest on, changed one at a time: coqc must refuse each change.

A proof that still goes through says that the sign does not matter, so that the statement says less than it seems to.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from coq import Compiled, Coq
from sources import Sentence, Source, affected, closure

__all__ = ["Change", "Outcome", "changes", "tried"]

_TOKEN = re.compile(r"<->|->|<-|=>|:=|<>|<=|>=|/\\|\\/|\|-|[<>+\-()\[\]{},;:|=]|\b(?:then|else|in|if)\b")
_OPPOSITES = {"+": "-", "<=": ">=", ">=": "<=", "<": ">", ">": "<"}
_RELATIONS = ("<=", ">=", "<", ">")
_OPERAND = re.compile(r"[\w')\]}]\s*\Z")
_NO_OPERAND = re.compile(r"\b(?:then|else|in|return|if|with|match|fun|forall|exists)\s*\Z")
# The bound of a sum, `Σ a < n`, is no sign.
_BOUND = re.compile(r"[ΣΠ]\s*[\w']+\s*(<)")
# A changed file may take so many times as long as the unchanged one, and at least so many seconds.
_TIMES, _LEAST = 20.0, 60.0


@dataclass(frozen=True)
class Change:
    """One sign of one file, changed.

    Attributes:
        source: the file.
        where: the statement or definition.
        sentence: where that stands.
        start: of the text that is replaced.
        end: of it.
        new: what replaces it.
        says: what became what, in words.
    """

    source: Source
    where: str
    sentence: Sentence
    start: int
    end: int
    new: str
    says: str

    @property
    def text(self) -> str:
        """The file with the change."""
        return self.source.text[: self.start] + self.new + self.source.text[self.end :]

    @property
    def label(self) -> str:
        """The place and the change, in one line."""
        line = self.source.line(self.start)
        around = self.source.text.splitlines()[line - 1].strip()
        return f"{self.source.path}:{line}: {self.where}: {self.says} in `{around}`"


@dataclass(frozen=True)
class _Sign:
    """A token of a sentence: where it starts and ends in the file, and the brackets around it."""

    token: str
    start: int
    end: int
    group: tuple[int, ...]


def changes(source: Source) -> Iterator[Change]:
    """All changes of one file: in its statements, not their twins, and in the definitions that they rest on."""
    stated = [(each.name, each.sentence) for each in source.statements if not each.is_twin]
    for where, sentence in sorted([*stated, *source.definitions], key=lambda each: each[1].start):
        yield from _changes_of(source, where, sentence)


def _changes_of(source: Source, where: str, sentence: Sentence) -> Iterator[Change]:
    tokens = list(_tokens(sentence))
    for i, sign in enumerate(tokens):
        if sign.token == "-" and not _is_binary(source.code[sentence.start : sign.start]):
            yield Change(source, where, sentence, sign.start, sign.end, "", "unary - is dropped")
            continue
        new = "+" if sign.token == "-" else _OPPOSITES.get(sign.token)
        if new is not None:
            start, end, text = _replaced(source.text, tokens, i, new)
            yield Change(source, where, sentence, start, end, text, f"{sign.token} becomes {new}")


def _tokens(sentence: Sentence) -> Iterator[_Sign]:
    """The signs of a sentence's body, and what separates them; nothing of natural numbers, `(...)%nat`."""
    body = sentence.code.index(":=") + 2
    skipped = {found.start(1) for found in _BOUND.finditer(sentence.code)}
    for start, end in _naturals(sentence.code):
        skipped |= set(range(start, end))
    group: list[int] = []
    for found in _TOKEN.finditer(sentence.code, body):
        if found[0] in "([{":
            group.append(found.start())
        elif found[0] in ")]}":
            group = group[:-1]
        elif found.start() not in skipped:
            at = sentence.start
            yield _Sign(found[0], at + found.start(), at + found.end(), tuple(group))


def _naturals(code: str) -> Iterator[tuple[int, int]]:
    """Where `(...)%nat` starts and ends."""
    for found in re.finditer(r"\)\s*%nat\b", code):
        depth, position = 1, found.start()
        while depth and position:
            position -= 1
            depth += {")": 1, "(": -1}.get(code[position], 0)
        yield position, found.start()


def _is_binary(before: str) -> bool:
    """Whether a minus after this text has a left side."""
    return bool(_OPERAND.search(before)) and not _NO_OPERAND.search(before)


def _replaced(text: str, tokens: list[_Sign], i: int, new: str) -> tuple[int, int, str]:
    """What is to be replaced by what; a chain such as 0 < x < y is taken apart, as Coq knows no 0 > x < y."""
    sign = tokens[i]
    if sign.token in _RELATIONS:
        within = [each for each in tokens if each.group == sign.group and each.token not in "+-"]
        place = within.index(sign)
        if place + 1 < len(within) and within[place + 1].token in _RELATIONS:
            after = within[place + 1]
            middle = text[sign.end : after.start]
            return sign.start, after.start, f"{new}{middle}/\\{middle}"
        if place and within[place - 1].token in _RELATIONS:
            before = within[place - 1]
            middle = text[before.end : sign.start]
            return before.end, sign.end, f"{middle}/\\{middle}{new}"
    return sign.start, sign.end, new


@dataclass(frozen=True)
class Outcome:
    """What coqc says about a change.

    Attributes:
        change: the change.
        verdict: `refused`; `no statement`, where what was changed is no Coq any more; `SURVIVES`; or `NO ANSWER`
            within twenty times the seconds of the unchanged file, or a minute.
        by: the first file that is refused.
    """

    change: Change
    verdict: str
    by: str = ""

    @property
    def fails(self) -> bool:
        """Whether the change was not refused."""
        return self.verdict in ("SURVIVES", "NO ANSWER")


def tried(
    coq: Coq,
    compiled: Path,
    sources: Mapping[str, Source],
    seconds: Mapping[str, float],
    some: Iterable[Change],
    workers: int,
    done: Callable[[Outcome], None],
) -> list[Outcome]:
    """Compile each change, and what requires its file until something is refused.

    Args:
        coq: the program.
        compiled: the folder of the compiled files as they are; each change gets a folder in its `signs`.
        sources: the files by name.
        seconds: how long each file takes as it is.
        some: the changes.
        workers: the most processes at a time.
        done: called with each outcome as soon as it is known.
    """
    limits = {name: max(_LEAST, _TIMES * each) for name, each in seconds.items()}
    with ThreadPoolExecutor(workers) as pool:
        running = [
            pool.submit(_try, coq, compiled, compiled / "signs" / str(number), sources, limits, change)
            for number, change in enumerate(some)
        ]
        for each in as_completed(running):
            done(each.result())
    return [each.result() for each in running]


def _try(
    coq: Coq, compiled: Path, folder: Path, sources: Mapping[str, Source], limits: Mapping[str, float], change: Change
) -> Outcome:
    names = affected(sources, change.source.name)
    needed = set().union(*(closure(sources, name) for name in names))
    folder.mkdir(parents=True)
    try:
        for name in needed - set(names):
            shutil.copy(compiled / f"{name}.vo", folder)
        for name in names:
            text = change.text if name == change.source.name else sources[name].text
            (folder / f"{name}.v").write_bytes(text.encode("utf-8"))
            result = coq.compile(folder, name, limits[name])
            if not result.holds:
                return Outcome(change, _verdict(change, name, result), name)
        return Outcome(change, "SURVIVES")
    finally:
        shutil.rmtree(folder)


def _verdict(change: Change, name: str, result: Compiled) -> str:
    if result.holds is None:
        return "NO ANSWER"
    line = re.search(r'File "[^"]*", line (\d+)', result.output)
    if line is None:
        raise RuntimeError(f"coqc stopped at {change.label} without naming a line:\n{result.output}")
    first, last = (change.source.line(place) for place in (change.sentence.start, change.sentence.end))
    return "no statement" if name == change.source.name and first <= int(line[1]) <= last else "refused"
