"""Whole trainers: what each says it minimises, and what an audit of the trainer itself finds.

`python examples/trainers/gallery.py` audits the trainers that are installed, and says which verdicts are not as
recorded. With `--page` it updates `gallery.json` and `docs/trainers.md`, and keeps the records of what is absent;
`--only TEXT` audits those whose name holds the text. verl has an environment and a page of its own (`verl_engine.py`).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
# As a script, this file cannot import the package that it is part of.
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from examples.trainers.entry import Entry  # noqa: E402
from opdtheory.end_to_end import TrainerAudit, audit_trainer, audit_update  # noqa: E402
from opdtheory.rendering.markdown import markdown_table  # noqa: E402

__all__ = ["PAGE", "RECORD", "entries", "page", "record"]

PAGE, RECORD = ROOT / "docs" / "trainers.md", Path(__file__).with_name("gallery.json")

_INTRODUCTION = """# Trainers

What a loss does in a test says little about what a trainer does with it: it generates, collates, masks, divides and
accumulates too. Here whole trainers are audited: each gets a student and a teacher whose next-token logits are tables,
every outcome of its own sampling is played through, and the gradient that lands in the student's table is compared
with the exact one (`opdtheory.audit_trainer`; `audit_update` for what is no `transformers.Trainer`).

*claim* is what the trainer's documentation or its setting says, summed over tokens and averaged over rollouts, unless a
mean is claimed; it is our reading, and a row that differs is no fault where another reading is meant. *scale* is the
multiple of the claimed gradient that is nearest, *off by* the distance from that multiple, relative to it. Prompts are
of one and two tokens, answers of at most two, with two letters and an end of sequence, batches of two rollouts. Some
samplers and losses work in float32, so that errors of 1e-7 are rounding. Rewards are zero where a KL penalty is
audited, and the reference model, or whatever a trainer loads from the student's path, is the teacher.

`make trainers` checks that every verdict is as recorded; `python examples/trainers/gallery.py --page` writes this page.
verl's engine below its rollout, with its own settings and our plug-in, has [a page of its own](verl.md). TRL's SDPO is
not here, as its prompts hold words that two letters cannot write, nor are trainers that sample from a server.
"""

_HEADER = ("trainer and setting", "package", "claim", "verdict", "scale", "off by", "cosine", "it follows")


def entries() -> tuple[Entry, ...]:
    """The trainers whose packages are installed."""
    from examples.trainers import reference

    found = list(reference.ENTRIES)
    try:
        version = importlib.metadata.version("trl")
        if version == "1.0.0":
            from examples.trainers import trl_first

            return trl_first.ENTRIES
        from examples.trainers import trl_trainers
    except ImportError as error:
        print(f"TRL's trainers are left as recorded: {error}", file=sys.stderr)
    else:
        found += trl_trainers.ENTRIES
    return tuple(found)


def audited(entry: Entry) -> TrainerAudit:
    """The audit of an entry."""
    audit = audit_update if entry.is_update else audit_trainer
    found: TrainerAudit = audit(entry.build, entry.claim, name=entry.name, **entry.settings)
    return found


def record(entry: Entry, audit: TrainerAudit) -> dict[str, Any]:
    """What is kept of an audit: what the page shows."""
    return {
        "name": entry.name,
        "package": f"{entry.package} {importlib.metadata.version(entry.package)}",
        "says": entry.says,
        "claim": f"{audit.claim.label} ({audit.claim.granularity})",
        "reduction": audit.claim.reduction,
        "verdict": audit.verdict,
        "passes": audit.passes,
        "scale": round(audit.scale, 6),
        "error": float(f"{audit.error:.1e}"),
        "cosine": round(audit.cosine, 4),
        "descends": audit.descends,
        "words": list(audit.words),
    }


def page(records: list[dict[str, Any]]) -> str:
    """The page of the records."""
    rows, sentences = [], []
    for each in records:
        claim = each["claim"] + ("" if each["reduction"] == "token_sum" else f", {each['reduction']}")
        verdict = each["verdict"].replace("_", " ")
        if each["verdict"].startswith("exact") and not each["passes"]:
            verdict += ", but not in every setting"
        shown = (f"{each['scale']:.6g}", f"{each['error']:.1e}", f"{each['cosine']:.4f}")
        follows = each["descends"] or "nothing that we can name"
        rows.append((each["name"], each["package"], claim, verdict, *shown, follows))
        sentences.append(f"**{each['name']}.** {each['says'][0].upper()}{each['says'][1:]}. {' '.join(each['words'])}")
    exact = sum(each["verdict"].startswith("exact") for each in records)
    packages = sorted({each["package"] for each in records})
    counted = (
        f"{len(records)} trainers and settings ({', '.join(packages)}); {exact} have the gradient that they claim, "
        "up to a scale."
    )
    return "\n".join([_INTRODUCTION, counted, "", markdown_table(_HEADER, rows), "", "\n\n".join(sentences), ""])


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """How a new record differs from the old one, beyond rounding."""
    found = [name for name in ("claim", "verdict", "passes", "descends", "words") if old.get(name) != new[name]]
    found += [name for name in ("scale", "cosine") if abs(old.get(name, 9.0) - new[name]) > 1e-5]
    return [f"{new['name']}: {name} is {new[name]!r}, recorded {old.get(name)!r}" for name in found]


def main(arguments: list[str] | None = None) -> int:
    """Audit the trainers; return 1 if a verdict differs from the record, unless it is rewritten."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", action="store_true", help="rewrite gallery.json and docs/trainers.md")
    parser.add_argument("--only", default="", help="audit the entries whose name holds this")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # tables are small
    kept = {each["name"]: each for each in json.loads(RECORD.read_text(encoding="utf-8"))} if RECORD.is_file() else {}
    changed: list[str] = []
    for entry in entries():
        if options.only not in entry.name:
            continue
        start = time.perf_counter()
        found = record(entry, audited(entry))
        changed += _differences(kept.get(entry.name, {}), found)
        kept[entry.name] = found
        print(f"{entry.name}: {found['verdict']}, off by {found['error']:.1e}, {time.perf_counter() - start:.1f} s")
    if options.page:
        RECORD.write_text(json.dumps(list(kept.values()), indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(page(list(kept.values())), encoding="utf-8")
        return 0
    print("\n".join(changed) or "every verdict is as recorded")
    return int(bool(changed))


if __name__ == "__main__":
    sys.exit(main())
