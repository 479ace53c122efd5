"""What the proof files say: statements and their words, definitions, requirements, what is refused, and digests.

Nothing here needs Coq.
"""

from __future__ import annotations

import functools
import graphlib
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Problem", "Sentence", "Source", "Statement", "affected", "closure", "digest", "ordered", "problems", "read"]

_LEXED = re.compile(r'\(\*|\*\)|"')
_END = re.compile(r"(?<!\.)\.(?=\s|\Z)|\.\.\.(?=\s|\Z)")
_NUMBER = re.compile(r"T(\d+)([a-z]?)")
_DEFINITION = re.compile(r"(?:Definition|Fixpoint|Record|Inductive)\s+([\w']+)")
_STATEMENT = re.compile(r"Definition\s+([\w']+)\s*:\s*Prop\s*:=")
_THEOREM = re.compile(r"Theorem\s+([\w']+)_(holds|is_false)\s*:\s*(~?)\s*([\w']+)\s*")
_REQUIRES = re.compile(r"From\s+OPD\s+Require\s+(?:(?:Import|Export)\s+)?([\w\s']+)")
_TITLE = re.compile(r"(T\d+[a-z]?), (.+?) \((docs/theory/\w+\.md)\)[.:;]")
_LEFT_OUT = re.compile(r"Not here: (.+?)\.\Z")
_TWIN = "A false twin: "
_COMMENT, _HEADING = "(**", "(** *"

# `Print Assumptions` would show most of these too; here they are found with file and line.
_REFUSED = re.compile(
    r"(?<![\w'])(Admitted|Admit|admit|give_up|Axioms?|Parameters?|Conjectures?|Variables?|Hypothes[ei]s|Context|Primitive"
    r"|Declare\s+(?:Module|Instance|ML\s+Module)|bypass_check|(?:Guard|Positivity|Universe)\s+Checking"
    r"|Load|Redirect|Add\s+(?:Rec\s+)?(?:LoadPath|ML\s+Path))(?![\w'])"
)


class Problem(Exception):
    """What is wrong with the proofs, in lines that name file and line."""


@dataclass(frozen=True)
class Sentence:
    """A sentence of Coq: where it stands, and its text without comments and strings."""

    start: int
    end: int
    code: str


@dataclass(frozen=True)
class Statement:
    """A statement of a theorem, or a false twin of one.

    Attributes:
        name: such as `T1_softmax`.
        words: the comment above it.
        text: its definition in Coq.
        is_twin: whether it is to be refuted.
        sentence: where it stands.
    """

    name: str
    words: str
    text: str
    is_twin: bool
    sentence: Sentence

    @property
    def theorem(self) -> str:
        """The name of the theorem that proves or refutes it."""
        return self.name + ("_is_false" if self.is_twin else "_holds")


@dataclass(frozen=True)
class Source:
    """One file of proofs.

    Attributes:
        name: without its ending, such as `T1` or `Divergence`.
        text: the whole file.
    """

    name: str
    text: str

    @property
    def path(self) -> str:
        """The file as messages name it."""
        return f"proofs/{self.name}.v"

    @property
    def is_theorem(self) -> bool:
        """Whether it holds statements; other files are foundations."""
        return _NUMBER.fullmatch(self.name) is not None

    def line(self, position: int) -> int:
        """The number of the line of a position."""
        return self.text.count("\n", 0, position) + 1

    def problem(self, position: int, what: str) -> str:
        """What is wrong there, in one line."""
        return f"{self.path}:{self.line(position)}: {what}"

    @functools.cached_property
    def _lexed(self) -> tuple[str, list[tuple[int, int]]]:
        """The text with blanks for comments and for what strings hold, and where comments start and end."""
        code, comments, position = list(self.text), list[tuple[int, int]](), 0
        while found := _LEXED.search(self.text, position):
            if found[0] == "*)":
                raise Problem(self.problem(found.start(), "a comment ends that did not start"))
            skip = self._string if found[0] == '"' else self._comment
            position = skip(found.start())
            if found[0] == "(*":
                comments.append((found.start(), position))
            for i in range(found.start(), position):
                code[i] = "\n" if code[i] == "\n" else " "
        return "".join(code), comments

    def _string(self, start: int) -> int:
        end = self.text.find('"', start + 1)
        if end < 0:
            raise Problem(self.problem(start, "a string does not end"))
        return end + 1

    def _comment(self, start: int) -> int:
        """Where a comment ends; comments nest, and a string in one hides what ends it."""
        depth, position = 1, start + 2
        while depth:
            found = _LEXED.search(self.text, position)
            if found is None:
                raise Problem(self.problem(start, "a comment does not end"))
            depth += {"(*": 1, "*)": -1, '"': 0}[found[0]]
            position = self._string(found.start()) if found[0] == '"' else found.end()
        return position

    @property
    def code(self) -> str:
        """The text with blanks in place of comments and strings."""
        return self._lexed[0]

    @functools.cached_property
    def sentences(self) -> tuple[Sentence, ...]:
        """The sentences in order."""
        found, start = [], 0
        for end in _END.finditer(self.code):
            begins = end.end() - len(self.code[start : end.end()].lstrip())
            found.append(Sentence(begins, end.end(), self.code[begins : end.end()]))
            start = end.end()
        return tuple(found)

    @functools.cached_property
    def requires(self) -> tuple[str, ...]:
        """The files of proofs that it names itself."""
        found = [_REQUIRES.match(sentence.code) for sentence in self.sentences]
        return tuple(name for each in found if each for name in each[1].split())

    @functools.cached_property
    def _head(self) -> str:
        """The words of the comment that starts the file."""
        return self._words(self._lexed[1][0]) if self._lexed[1] else ""

    @functools.cached_property
    def left_out(self) -> str:
        """What of the theorem's page is not proved, as the first comment ends; empty if it names nothing."""
        found = _LEFT_OUT.search(self._head)
        return found[1] if found else ""

    @functools.cached_property
    def title(self) -> str:
        """The theorem's name, from the comment that starts the file; empty if there is none of the right form."""
        found = _TITLE.match(self._head)
        return found[2] if found and (found[1], found[3]) == (self.name, f"docs/theory/{self.name.lower()}.md") else ""

    @functools.cached_property
    def statements(self) -> tuple[Statement, ...]:
        """The statements and their twins, in order."""
        found = ((_STATEMENT.match(sentence.code), sentence) for sentence in self.sentences)
        return tuple(self._statement(each[1], sentence) for each, sentence in found if each and self._is_own(each[1]))

    @functools.cached_property
    def definitions(self) -> tuple[tuple[str, Sentence], ...]:
        """What a statement may rest on: of a foundation everything; of a theorem, what precedes its last statement."""
        last = max((each.sentence.start for each in self.statements), default=-1)
        found = ((_DEFINITION.match(sentence.code), sentence) for sentence in self.sentences)
        return tuple(
            (each[1], sentence)
            for each, sentence in found
            if each and not (self.is_theorem and (self._is_own(each[1]) or sentence.start > last))
        )

    def original(self, sentence: Sentence) -> str:
        """The sentence as it is written, with the comment above it."""
        above = self._comment_above(sentence)
        return self.text[above[0] if above else sentence.start : sentence.end]

    def problems(self) -> Iterator[str]:
        """What is wrong with the file by itself."""
        for found in _REFUSED.finditer(self.code):
            yield self.problem(found.start(), f"{' '.join(found[0].split())!r} may not be used in a proof")
        for sentence in self.sentences:
            if re.match(r"(?:From\s+\S+\s+)?Require\b", sentence.code) and "OPD" in sentence.code:
                if not _REQUIRES.match(sentence.code):
                    yield self.problem(sentence.start, "a file of proofs must be required by `From OPD Require`")
        if self.is_theorem:
            yield from self._problems_of_statements()

    def _problems_of_statements(self) -> Iterator[str]:
        if not self.title:
            form = f"(** {self.name}, its name (docs/theory/{self.name.lower()}.md)."
            yield self.problem(0, f"a theorem's file must start with a comment of the form `{form}`")
        for what, twins in (("statement", False), ("false twin", True)):
            if not any(each.is_twin is twins for each in self.statements):
                yield self.problem(0, f"there is no {what}")
        proved = {found[0].rstrip(): found for found in map(_THEOREM.match, self._codes()) if found}
        theorems = {f"{found[1]}_{found[2]}": (found[4], bool(found[3])) for found in proved.values()}
        for each in self.statements:
            where = each.sentence.start
            if not each.words:
                yield self.problem(where, f"{each.name} needs a comment in words right above it, (** ... *)")
            elif self._raw_words(each.sentence).startswith(_TWIN) is not each.is_twin:
                yield self.problem(where, f"{each.name}: a twin, and nothing else, starts with {_TWIN.strip()!r}")
            if theorems.pop(each.theorem, None) != (each.name, each.is_twin):
                claim = f"Theorem {each.theorem} : {'~ ' * each.is_twin}{each.name}."
                yield self.problem(where, f"{each.name} needs its theorem, `{claim}`")
        for name in theorems:
            if self._is_own(name):
                yield self.problem(self.text.index(name), f"{name} is the theorem of no statement")
        stated = {each.name for each in self.statements}
        for sentence in self.sentences:
            found = _DEFINITION.match(sentence.code)
            if found and self._is_own(found[1]) and found[1] not in stated:
                yield self.problem(sentence.start, f"{found[1]} must be a statement, `{found[1]} : Prop :=`")

    def _codes(self) -> list[str]:
        return [sentence.code for sentence in self.sentences]

    def _is_own(self, name: str) -> bool:
        return self.is_theorem and name.startswith(f"{self.name}_")

    def _statement(self, name: str, sentence: Sentence) -> Statement:
        text = self.text[sentence.start : sentence.end]
        is_twin = name.startswith(f"{self.name}_twin_")
        return Statement(name, self._raw_words(sentence).removeprefix(_TWIN), text, is_twin, sentence)

    def _comment_above(self, sentence: Sentence) -> tuple[int, int] | None:
        """The comment in words right above; a heading is none."""
        end = len(self.text[: sentence.start].rstrip())
        above = next((each for each in self._lexed[1] if each[1] == end), None)
        said = self.text[slice(*above)] if above else ""
        return above if said.startswith(_COMMENT) and not said.startswith(_HEADING) else None

    def _raw_words(self, sentence: Sentence) -> str:
        above = self._comment_above(sentence)
        return self._words(above) if above else ""

    def _words(self, comment: tuple[int, int]) -> str:
        said = self.text[slice(*comment)]
        return " ".join(said.removeprefix("(*").removeprefix("*").removesuffix("*)").split())


def read(folder: Path) -> dict[str, Source]:
    """The files of proofs by name, the theorems in the order of their numbers after the foundations."""
    sources = [Source(path.stem, path.read_bytes().decode("utf-8")) for path in folder.glob("*.v")]
    return {source.name: source for source in sorted(sources, key=_place)}


def _place(source: Source) -> tuple[int, str]:
    found = _NUMBER.fullmatch(source.name)
    return (int(found[1]), found[2]) if found else (0, source.name)


def ordered(sources: Mapping[str, Source]) -> list[str]:
    """The names, each after those that it requires.

    Raises:
        Problem: a required file is missing, or files require each other.
    """
    for source in sources.values():
        for name in source.requires:
            if name not in sources:
                raise Problem(source.problem(source.text.index(name), f"there is no proofs/{name}.v to require"))
    try:
        return list(graphlib.TopologicalSorter({name: each.requires for name, each in sources.items()}).static_order())
    except graphlib.CycleError as error:
        raise Problem(f"proofs: these files require each other: {', '.join(error.args[1])}") from None


def closure(sources: Mapping[str, Source], name: str) -> set[str]:
    """The file and all that it requires, directly or not."""
    found, waiting = set[str](), [name]
    while waiting:
        if (each := waiting.pop()) not in found:
            found.add(each)
            waiting += sources[each].requires
    return found


def affected(sources: Mapping[str, Source], name: str) -> list[str]:
    """The file and all that require it, in an order in which they can be compiled."""
    return [each for each in ordered(sources) if name in closure(sources, each)]


def digest(sources: Mapping[str, Source], name: str) -> str:
    """The SHA-256 of a theorem: of the names and contents of its file and of all that it requires."""
    found = hashlib.sha256()
    for each in sorted(closure(sources, name)):
        content = sources[each].text.encode("utf-8")
        found.update(f"{each}.v {len(content)}\n".encode())
        found.update(content)
    return found.hexdigest()


def problems(sources: Mapping[str, Source]) -> list[str]:
    """What is wrong with the files as they are written; raises `Problem` where one cannot be read."""
    ordered(sources)
    return [what for source in sources.values() for what in source.problems()]
