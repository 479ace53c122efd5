"""Our losses on a GPU beside eager formulas, torch.compile, Liger and TRL, in one run of a few minutes.

`python benchmarks/gpu.py --record FILE --write docs/gpu.md` needs torch with CUDA; a peer that is not
installed, does not fit or raises is named in its row. Each section is stored as soon as it is there, so that a run
that is cut off loses the rest only, and after `--limit` seconds no further subject is begun. `--from FILE` writes the
page of a record that another machine has made, and measures nothing. On a CPU (`--device cpu`, with few tokens and
words) the same code runs, which tries it out.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.measure import write  # noqa: E402
from benchmarks.peers import records  # noqa: E402
from benchmarks.peers.errors import errors  # noqa: E402
from benchmarks.peers.page import TITLES, section, shape  # noqa: E402
from benchmarks.peers.profile import profiled  # noqa: E402
from benchmarks.peers.subjects import PLAN, PRODUCTS, TRANSFERS, inputs_of  # noqa: E402
from benchmarks.peers.timing import Clock, copy_speed, limit, measured, reason, release  # noqa: E402

SCRIPT = "benchmarks/gpu.py"
PARTS = ("logits", "hidden", "payload", "errors", "profile")
# Which kinds of inputs a part times.
KINDS = {"logits": ("logits",), "hidden": ("hidden", "frozen"), "payload": ("top_k", "sampled_tail")}
# Numbers that a copy moves on a GPU, and elsewhere.
COPIED, COPIED_ON_CPU = 2**30, 2**22

Spec = dict[str, Any]


def asked(options: argparse.Namespace) -> list[Spec]:
    """The tables to measure: kind, shape and dtype of each."""
    tokens, words = sorted(options.tokens), options.vocabulary
    both = ("float32", "bfloat16")
    found = [{"kind": "logits", "tokens": n, "words": words, "dtype": dtype} for n in tokens for dtype in both]
    found += [{"kind": "logits", "tokens": options.largest, "words": words, "dtype": "bfloat16"}]
    rows, width = options.hidden
    for kind in KINDS["hidden"]:
        found.append({"kind": kind, "tokens": rows, "width": width, "words": words, "dtype": "bfloat16"})
    for kind in KINDS["payload"]:
        found.append({"kind": kind, "tokens": tokens[-1], "words": words, "dtype": "bfloat16"})
    wanted = {kind for part in options.parts for kind in KINDS.get(part, ())}
    return [each for each in found if each["kind"] in wanted]


class Run:
    """The measurements of one run, added to its record part by part."""

    def __init__(self, options: argparse.Namespace, clock: Clock) -> None:
        self.options, self.clock = options, clock
        self.record = records.new(options.command, asked(options))
        self.record["repeats"] = options.repeats

    def all(self) -> None:
        """Measure, and store after every section."""
        elements = COPIED if torch.device(self.options.device).type == "cuda" else COPIED_ON_CPU
        self.record["copy_gb_s"] = copy_speed(elements, self.options.repeats, self.options.device)
        self.clock.say(f"a copy moves {self.record['copy_gb_s']:,.0f} GB/s")
        for spec in self.record["asked"]:
            self.clock.say(f"{TITLES[spec['kind']]}: {shape(spec)}")
            self.record["tables"].append(spec | self._guarded(spec, self._timed))
            self.store()
        for spec in self._of_errors() if "errors" in self.options.parts else ():
            self.clock.say(f"errors, {'near' if spec['near'] else 'at random'}: {spec['kind']}, {shape(spec)}")
            self.record["errors"].append(spec | self._guarded(spec, self._off))
            self.store()
        for spec in self._of_profiles() if "profile" in self.options.parts else ():
            self.clock.say(f"kernels: {spec['kind']}, {shape(spec)}")
            self.record["profile"].append(spec | self._guarded(spec, self._kernels))
            self.store()

    def _guarded(self, spec: Spec, work: Any) -> Spec:
        """What a section finds, or why each of its rows is missing; what it held and compiled is let go."""
        if self.clock.over:
            return self._failed(spec, self.clock.refusal)
        try:
            found: Spec = work(spec)
        except Exception as error:
            found = self._failed(spec, reason(error))
        release(compiled=True)
        return found

    def _failed(self, spec: Spec, why: str) -> Spec:
        self.clock.say(f"  {why}")
        pairs = [(divergence, by) for divergence, names in PLAN[spec["kind"]].items() for by in names]
        return {"rows": [{"divergence": divergence, "by": by, "failed": why} for divergence, by in pairs]}

    def _inputs(self, spec: Spec) -> Any:
        dtype = getattr(torch, spec["dtype"])
        shape = spec["tokens"], spec["words"], spec.get("width", 0)
        return inputs_of(spec["kind"], *shape, dtype, self.options.device, spec.get("near", False))

    def _timed(self, spec: Spec) -> Spec:
        inputs = self._inputs(spec)
        found: Spec = limit(inputs, self.record["copy_gb_s"], self.options.repeats)
        return found | {"rows": measured(inputs, self.options.repeats, self.clock)}

    def _off(self, spec: Spec) -> Spec:
        return {"rows": errors(self._inputs(spec), self.clock)}

    def _kernels(self, spec: Spec) -> Spec:
        some = ("jsd",) if spec["kind"] in PRODUCTS else ("reverse_kl", "jsd")
        return {"rows": profiled(self._inputs(spec), some, self.clock)}

    def _of_errors(self) -> Iterator[Spec]:
        few, some = self.options.error_rows
        tokens, words, (_, width) = max(self.options.tokens), self.options.vocabulary, self.options.hidden
        for near in (False, True):
            for dtype in ("float32", "bfloat16"):
                yield {"kind": "logits", "tokens": min(few, tokens), "words": words, "dtype": dtype, "near": near}
            rows = min(some, self.options.hidden[0])
            yield {"kind": "hidden", "tokens": rows, "width": width, "words": words, "dtype": "bfloat16", "near": near}
            for kind in KINDS["payload"]:
                yield {"kind": kind, "tokens": min(few, tokens), "words": words, "dtype": "float32", "near": near}

    def _of_profiles(self) -> Iterator[Spec]:
        tokens, words, (rows, width) = max(self.options.tokens), self.options.vocabulary, self.options.hidden
        for dtype in ("float32", "bfloat16"):
            yield {"kind": "logits", "tokens": tokens, "words": words, "dtype": dtype}
        yield {"kind": "hidden", "tokens": rows, "width": width, "words": words, "dtype": "bfloat16"}

    def store(self) -> None:
        """Write the record and the page as they are now."""
        self.record["seconds"] = self.clock.seconds
        if self.options.record:
            records.save(self.record, self.options.record)
        if self.options.write:
            write(self.options.write, SCRIPT, section(self.record))


def command(arguments: list[str]) -> str:
    """The command as a page shows it, without the files of this machine."""
    words, given = [], iter(arguments)
    for word in given:
        if word in ("--record", "--write"):
            next(given, None)
        elif not word.startswith(("--record=", "--write=")):
            words.append(word)
    return " ".join(["python", SCRIPT, *words])


def main(arguments: list[str] | None = None) -> int:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", metavar="NAME", help="where all is computed (%(default)s)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 4_096], metavar="N", help="in both dtypes")
    parser.add_argument("--largest", type=int, default=8_192, metavar="N", help="tokens, in bfloat16 alone")
    parser.add_argument("--vocabulary", type=int, default=151_936, metavar="V")
    parser.add_argument("--hidden", type=int, nargs=2, default=[4_096, 1_024], metavar=("N", "H"), help="hidden states")
    parser.add_argument(
        "--error-rows", type=int, nargs=2, default=[32, 2_048], metavar=("N", "N"), help="of logits, of hidden states"
    )
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="alternated, at least 5 for the page")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--limit", type=float, default=330.0, metavar="SECONDS", help="begin nothing after these")
    parser.add_argument("--record", type=Path, metavar="FILE", help="store the figures as JSON")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables into this page")
    parser.add_argument("--from", type=Path, dest="stored", metavar="FILE", help="measure nothing, take this record")
    options = parser.parse_args(arguments)
    if options.stored:
        record = records.load(options.stored)
        if options.write:
            write(options.write, SCRIPT, section(record))
        print(section(record))
        return 0
    if options.write and options.repeats < 5:
        parser.error("--write needs --repeats of at least 5")
    options.command = command(sys.argv[1:] if arguments is None else arguments)
    clock = Clock(options.limit)
    torch.empty(1, device=options.device)  # a GPU is in use from here on
    run = Run(options, clock)
    run.all()
    run.store()
    clock.say("done")
    print(section(run.record))
    return 0


assert set(PLAN) == {*TRANSFERS, *PRODUCTS} == set(TITLES)

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
