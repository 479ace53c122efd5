"""Write docs/proofs.md from the record of what Coq has checked, and from proofs/: `python docs/generate_proofs.py`."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

from opdtheory.rendering.markdown import literal
from opdtheory.theorems.proofs import Proof, ProvedStatement, proofs
from opdtheory.verification.markdown import as_sentence, axioms_in_words

ROOT = Path(__file__).resolve().parents[1]
PAGE = Path(__file__).parent / "proofs.md"
sys.path.insert(0, str(ROOT / "proofs"))

from sources import Source, ordered, read  # noqa: E402

_INTRODUCTION = """# Machine-checked proofs

[Coq](https://coq.inria.fr), a proof assistant, checks proofs down to the rules of logic. It accepts a proof only if
every step follows, so what has to be read is the statement alone. For the theorems {listed} it checks, with the library
[Coquelicot](https://gitlab.inria.fr/coquelicot/coquelicot) for derivatives and integrals, that

- each statement holds, for every finite vocabulary and in exact real numbers;
- each false twin, a near neighbour of a statement, does not hold;
- no proof rests on an axiom that is not named here.

**What is not machine-checked:** the Python code, which [other checks](theory/index.md) compare with the formulas;
float64, in which it rounds; the theorems that have no section here; and whether a statement in Coq means what the words
above it say, which is why this page shows both.

## How to check them

```sh
make proofs
```

It compiles all files of `proofs/`, asks Coq for the axioms behind each theorem, and compares the answers with the
record that the library carries. It needs `coqc`, but no environment of Python, and installs nothing. On Debian or
Ubuntu, `apt-get install coq libcoq-coquelicot` installs Coq; elsewhere, `opam install coq.8.16.1 coq-coquelicot` does.

`python3 proofs/check.py --signs` goes further: it changes every sign of the statements and of the definitions that they
rest on, one at a time, and Coq must refuse each change. What is proved would otherwise say less than it seems to.
`--recheck` lets `coqchk`, Coq's second checker, read the compiled files again, and those of the libraries.
"""

_AXIOMS = {
    "sig_not_dec": "of every statement it can be decided whether it is contradictory.",
    "sig_forall_dec": "where a property can be decided for each natural number, it can be decided whether all have it,"
    " and if not, there is a number without it.",
    "functional_extensionality_dep": "two functions with the same values are the same function.",
}

_NOTATION = """## How to read the Coq

- `n` is the size of the vocabulary, any natural number. The tokens are `0`, ..., `n - 1`.
- `nat -> R` is a function from tokens to real numbers, such as a distribution: `p a` is the probability of the token
  `a`. Only its first `n` values matter. `R -> R` is a function of a real number, such as the generator f.
- `forall` is “for every”, `exists` “there is”; `A -> B` between statements is “if A, then B”, and several in a row are
  the hypotheses before the conclusion; `/\\` is “and”, `\\/` is “or”, `~` is “not”; `fun a => e` is the function that
  takes `a` to `e`; `let x := e in` names `e`.
- `(a < n)%nat` compares natural numbers; without `%nat` numbers are real.
- `1 # 2` is the fraction 1/2, of type `Q`; `[x; y]` is a list, and `x :: l` the list `l` with `x` in front.
- `Σ a < n, e` is the sum of `e` over the tokens `a`.
- `is_derive g x l` says that the function `g` has the derivative `l` at `x`: it includes that there is one.
  `Derive g x` is the derivative where there is one, and `ex_derive g x` says that there is. `RInt g a b` is the
  integral of `g` from `a` to `b`.
- `student n p θ` says that near `θ` the `p t` are distributions of which every entry is positive and has a derivative;
  `locally θ` is “near `θ`”.
- `log` is defined as the integral of 1/t from 1 on, because Coq's own `ln` rests on the law of excluded middle.
  `proofs/Logarithm.v` proves that it is the inverse of `exp`.
"""


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.name}")


def page() -> str:
    """The page in Markdown."""
    sources, found = read(ROOT / "proofs"), proofs()
    used = _used(sources)
    listed = ", ".join(f"[{number}](#{number.lower()})" for number in found)
    parts = [
        _INTRODUCTION.format(listed=listed),
        _axioms(found),
        _NOTATION,
        "## Shared definitions\n\nWhat the statements are made of.\n",
        *(_definitions(sources[name], used) for name in ordered(sources) if not sources[name].is_theorem),
        *(_theorem(each, sources[number], used) for number, each in found.items()),
    ]
    return "\n".join(filter(None, parts))


def _axioms(found: Mapping[str, Proof]) -> str:
    used = dict.fromkeys(axiom for each in found.values() for axiom in each.axioms)
    items = "\n".join(f"- `{name}`: {_AXIOMS[name]}" for name in used)
    return f"## The axioms\n\n{axioms_in_words(tuple(used))} In words:\n\n{items}\n"


def _used(sources: Mapping[str, Source]) -> set[str]:
    """The names that stand in a statement or a twin, or in what one of these names."""
    waiting = [each.sentence.code for source in sources.values() for each in source.statements]
    defined = {name: sentence.code for source in sources.values() for name, sentence in source.definitions}
    found = set[str]()
    while waiting:
        names = set(re.findall(r"[\w']+", waiting.pop())) & set(defined) - found
        found |= names
        waiting += [defined[name] for name in names]
    return found


def _definitions(source: Source, used: set[str]) -> str:
    code = "\n\n".join(source.original(sentence) for name, sentence in source.definitions if name in used)
    return f"From `{source.path}`:\n\n{_fenced(code)}" if code else ""


def _theorem(proved: Proof, source: Source, used: set[str]) -> str:
    number = proved.number.lower()
    parts = [
        f"## {proved.number}\n",
        f"[{literal(as_sentence(proved.title)[:-1])}](theory/{number}.md), from `{proved.file}`. Coq {proved.coq} last"
        f" checked it on {proved.checked}. The digest of it and of the files that it requires is `{proved.digest}`.\n",
        _definitions(source, used),
        *map(_statement, proved.statements),
        f"Not among them: {literal(proved.left_out)}.\n" if proved.left_out else "",
        *(_statement(twin, ", a false twin") for twin in proved.twins),
    ]
    return "\n".join(filter(None, parts))


def _statement(proved: ProvedStatement, what: str = "") -> str:
    return f"**`{proved.name}`{what}.** {literal(as_sentence(proved.words))}\n\n{_fenced(proved.text)}"


def _fenced(code: str) -> str:
    return f"```coq\n{code}\n```\n"


if __name__ == "__main__":
    main()
