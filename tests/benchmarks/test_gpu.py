"""The GPU benchmark on a CPU: what it computes, what it says of what it could not, and the page of its record."""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import opdtheory as opd
from benchmarks import gpu
from benchmarks.peers import marks, page, records, subjects, timing
from benchmarks.peers.errors import errors, exact
from benchmarks.peers.subjects import CHUNKED, COMPILED, EAGER, FUSED, LIGER, OURS, PLAN, TRL, inputs_of
from tests.tolerances import ALGEBRA

ROOT = Path(__file__).resolve().parents[2]
STORED = ROOT / "benchmarks" / "records" / "h200.json"
TINY = ["--device", "cpu", "--tokens", "4", "--largest", "6", "--vocabulary", "200", "--hidden", "6", "5"]
TINY += ["--error-rows", "4", "6", "--repeats", "1"]
KINDS = list(PLAN)


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graphs of torch.compile, without the minutes that its code for a CPU takes."""
    monkeypatch.setattr(subjects, "BACKEND", "aot_eager")


def inputs(kind: str, dtype: torch.dtype = torch.float32, near: bool = False) -> subjects.Inputs:
    return inputs_of(kind, 6, 200, 5, dtype, "cpu", near)


def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules with the names and signatures of liger-kernel 0.8.5, which needs Triton."""

    def jsd(log_p: Tensor, log_q: Tensor, labels: None, beta: float, ignored: int) -> Tensor:
        assert labels is None and ignored == -100
        name = {0.0: "forward_kl", 0.5: "jsd", 1.0: "reverse_kl"}[beta]
        return opd.fused_divergence(log_p, log_q, name).mean()

    class Chunked:
        def __init__(self, weight_hard_loss: float, weight_soft_loss: float, beta: float) -> None:
            assert (weight_hard_loss, weight_soft_loss) == (0.0, 1.0)
            self.name = {0.5: "jsd", 1.0: "reverse_kl"}[beta]

        def __call__(self, *tensors: Tensor) -> Tensor:
            *four, labels = tensors
            assert labels.shape == (len(four[0]),) and labels.dtype == torch.long
            return opd.fused_linear_divergence(*four, self.name).mean()

    class Linear:
        def __init__(self, jsd_beta: float) -> None:
            assert jsd_beta == 0.5

        def __call__(self, *tensors: Any) -> Tensor:
            *four, labels = tensors
            assert labels is None
            return opd.fused_linear_divergence(*four, "jsd").mean()

    parts = {
        "liger_kernel": {},
        "liger_kernel.ops": {},
        "liger_kernel.ops.jsd": {"LigerJSDFunction": types.SimpleNamespace(apply=jsd)},
        "liger_kernel.chunked_loss": {"LigerFusedLinearJSDLoss": Chunked},
        "liger_kernel.transformers": {"LigerFusedLinearJSD": Linear},
    }
    for name, members in parts.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)


def without_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("", ".ops", ".ops.jsd", ".chunked_loss", ".transformers"):
        monkeypatch.setitem(sys.modules, f"liger_kernel{name}", None)


@pytest.mark.slow
def test_a_run_on_a_cpu_fills_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    pytest.importorskip("trl")
    stand_ins(monkeypatch)
    record, document = tmp_path / "new" / "record.json", tmp_path / "page.md"
    document.write_text("before\n<!-- begin: benchmarks/gpu.py -->\n<!-- end: benchmarks/gpu.py -->\nafter\n")
    assert gpu.main([*TINY, "--repeats", "5", "--record", str(record), "--write", str(document)]) == 0
    found = records.load(record)
    assert [table["kind"] for table in found["tables"]] == ["logits"] * 3 + [
        "hidden",
        "frozen",
        "top_k",
        "sampled_tail",
    ]
    for table in found["tables"]:
        rows = {(row["divergence"], row["by"]): row for row in table["rows"]}
        assert set(rows) == {(one, by) for one, names in PLAN[table["kind"]].items() for by in names}
        assert table["limit_ms"] > 0 and all(row["ms"] > 0 and "failed" not in row for row in rows.values())
    assert len(found["errors"]) == 10 and len(found["profile"]) == 3
    for table in found["errors"]:
        for row in table["rows"]:
            assert "failed" not in row, row
            bound = 0.1 if table["dtype"] == "bfloat16" else 1e-3
            # TRL computes in the dtype of the logits; products in bfloat16 are not near a teacher's.
            if row["by"] == OURS or (row["by"] != TRL and not table["near"]):
                assert max(row["gradient"].values()) < bound, row
    text = document.read_text(encoding="utf-8")
    told = page.section(found)
    assert text.startswith("before\n") and text.endswith("after\n") and told in text
    assert "not measured again" not in told and "### Not measured" not in told
    said = capsys.readouterr()
    assert told in said.out and "done" in said.err.splitlines()[-1]
    # The same page from the record, by which a machine that cannot write here hands over its figures.
    assert gpu.main(["--from", str(record), "--write", str(document)]) == 0
    assert document.read_text(encoding="utf-8") == text


def test_what_fails_is_named_and_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    without_liger(monkeypatch)

    def failing(*_: Any) -> Any:
        def loss() -> Tensor:
            raise torch.OutOfMemoryError("no room for 40 GB | at all\nand a trace")

        return loss

    monkeypatch.setitem(subjects._MAKERS, TRL, failing)
    rows = {(r["divergence"], r["by"]): r for r in timing.measured(inputs("logits"), 1, timing.Clock())}
    assert rows["jsd", TRL]["failed"] == "OutOfMemoryError: no room for 40 GB | at all"
    assert rows["jsd", LIGER]["failed"].startswith("ModuleNotFoundError: ")
    assert all(rows[one, by]["ms"] > 0 for one in ("jsd", "reverse_kl") for by in (OURS, EAGER, COMPILED))
    off = {(r["divergence"], r["by"]): r for r in errors(inputs("logits"), timing.Clock())}
    assert "failed" in off["jsd", TRL] and off["jsd", OURS]["value"] < 1e-6
    table = {"kind": "logits", "tokens": 6, "words": 200, "dtype": "float32", "rows": list(rows.values())}
    assert "no room for 40 GB \\| at all | – |" in page._table(table, {})


@pytest.mark.slow
def test_inputs_that_do_not_fit_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(gpu, "inputs_of", none)
    assert gpu.main([*TINY, "--parts", "hidden", "errors", "profile", "--record", str(tmp_path / "r.json")]) == 0
    found = records.load(tmp_path / "r.json")
    rows = [row for table in found["tables"] + found["errors"] + found["profile"] for row in table["rows"]]
    assert len(found["tables"]) == 2 and {row["failed"] for row in rows} == {"OutOfMemoryError: no room"}


def test_a_subject_that_fails_later_has_no_time() -> None:
    """At the third call, when it is alternated with the others."""
    calls = []

    def build() -> Any:
        def loss() -> Tensor:
            calls.append(1)
            if len(calls) == 3:
                raise RuntimeError("late")
            return torch.ones((), requires_grad=True).sum()

        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "subjects", lambda _: {("jsd", "late"): build, ("jsd", "next"): lambda: sound})
        sound = lambda: torch.ones((), requires_grad=True).sum()  # noqa: E731
        late, other = timing.measured(inputs("logits"), 2, timing.Clock())
    assert late == {"divergence": "jsd", "by": "late", "failed": "RuntimeError: late"}
    assert other["ms"] > 0


def test_after_the_granted_time_nothing_is_begun(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    assert gpu.main([*TINY, "--limit", "0", "--record", str(record)]) == 0
    found = records.load(record)
    rows = [row for table in found["tables"] + found["errors"] + found["profile"] for row in table["rows"]]
    assert rows and all(row["failed"] == "not run: the 0 s that were granted are over" for row in rows)
    assert all(mark.state == marks.UNKNOWN for mark in marks.marks(found, page.shape))
    assert page.section(found)
    assert found["command"] == " ".join(["python benchmarks/gpu.py", *TINY, "--limit 0"])
    assert gpu.command(["--record=a", "--write", "b", "--tokens", "3"]) == "python benchmarks/gpu.py --tokens 3"


def test_what_is_cut_off_loses_the_rest_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def measured(given: subjects.Inputs, *_: Any) -> list[dict[str, Any]]:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(given)
        return [{"divergence": "jsd", "by": OURS, "ms": 1.0, "mb": None}]

    monkeypatch.setattr(gpu, "measured", measured)
    record = tmp_path / "record.json"
    with pytest.raises(KeyboardInterrupt):
        gpu.main([*TINY, "--record", str(record)])
    found = records.load(record)
    assert len(found["tables"]) == 2 and len(found["asked"]) == 7
    told = page.section(found).split("### Not measured")[1]
    assert "- From hidden states, 6 tokens x 5 states x 200 words, bfloat16: `jsd` by ours, " in told


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("near", (False, True), ids=("random", "near"))
def test_the_reference_is_the_losses_of_the_library_in_float64(kind: str, near: bool) -> None:
    given = inputs(kind, near=near)
    wide = {name: x.detach().double() if x.is_floating_point() else x for name, x in given.tensors.items()}
    leaves = [wide[name].requires_grad_() for name in given.leaves]
    for divergence in PLAN[kind]:
        value, gradients = exact(given, divergence)
        loss = subjects._FUSED[kind](*wide.values(), divergence).mean()
        # Near the teacher the textbook loses what the small value is beside its terms.
        assert abs(value - float(loss.detach())) < ALGEBRA
        for name, slope in zip(given.leaves, torch.autograd.grad(loss, leaves), strict=True):
            assert float((gradients[name] - slope).abs().max()) < ALGEBRA


@pytest.mark.parametrize("kind", KINDS)
def test_rows_at_a_time_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(kind)
    whole, slopes = exact(given, "jsd")
    monkeypatch.setattr("benchmarks.peers.errors._BLOCK", 2 * given.words)
    parts, others = exact(given, "jsd")
    assert abs(whole - parts) < ALGEBRA
    assert all(float((slopes[name] - others[name]).abs().max()) < ALGEBRA for name in given.leaves)


def test_a_wrong_loss_is_far_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other KL divergence, a sum for a mean, and a gradient of the right value that is not the loss's."""

    def twin(change: Any) -> Any:
        return lambda given, divergence: lambda: change(given.tensors["student"], given.tensors["teacher"], divergence)

    other = {"reverse_kl": "forward_kl", "forward_kl": "reverse_kl"}
    twins = {
        "swapped": lambda z, t, d: opd.fused_divergence(z, t, other.get(d, "reverse_kl")).mean(),
        "summed": lambda z, t, d: opd.fused_divergence(z, t, d).sum(),
        "detached": lambda z, t, d: (
            opd.fused_divergence(z, t, d).mean() + (z - z.detach()).square().sum() + z[0, 0] - z[0, 0].detach()
        ),
    }
    for name, change in twins.items():
        monkeypatch.setitem(subjects._MAKERS, OURS, twin(change))
        rows = [row for row in errors(inputs("logits"), timing.Clock()) if row["by"] == OURS]
        assert all(row["gradient"]["student"] > 0.1 for row in rows), name
        assert all((row["value"] > 1e-3) is (name != "detached") for row in rows), name


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_near_only_if_asked(kind: str) -> None:
    values = [exact(inputs(kind, near=near), "jsd")[0] for near in (False, True)]
    if kind != "sampled_tail":  # a surrogate, whose value says nothing
        assert values[1] < 0.05 * values[0]
    assert inputs(kind).leaves == (("student", "head") if kind == "hidden" else ("student",))


def test_limits_are_counted_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = inputs("logits", torch.bfloat16)
    # 6 x 200 numbers of 2 bytes, read twice and written once, at 1 GB/s.
    assert math.isclose(timing.limit(logits, 1.0, 1)["limit_ms"], 3 * 6 * 200 * 2 / 1e6)
    assert math.isclose(timing.limit(inputs("top_k", torch.float32), 1.0, 1)["limit_ms"], 2 * 6 * 200 * 4 / 1e6)
    monkeypatch.setattr(timing, "in_turn", lambda runs, _: dict(zip(runs, (0.1, 0.2, 0.3), strict=True)))
    whole, frozen = (timing.limit(inputs(kind), 1.0, 1) for kind in ("hidden", "frozen"))
    assert math.isclose(whole["limit_ms"], 700.0) and math.isclose(frozen["limit_ms"], 400.0)
    assert math.isclose(whole["tflop_s"], 8 * 6 * 5 * 200 / 0.7 / 1e12)
    assert math.isclose(frozen["tflop_s"], 6 * 6 * 5 * 200 / 0.4 / 1e12)
    table = {"kind": "hidden", "tokens": 6, "words": 200, "width": 5, "dtype": "bfloat16"}
    assert math.isclose(page._rate(table, 700.0), whole["tflop_s"])
    table = {"kind": "logits", "tokens": 6, "words": 200, "dtype": "bfloat16"}
    assert math.isclose(page._rate(table, timing.limit(logits, 123.0, 1)["limit_ms"]), 123.0)


def judged(table: dict[str, Any], errors: tuple[dict[str, Any], ...] = ()) -> dict[str, str]:
    asked = {name: value for name, value in table.items() if name not in ("rows", "limit_ms")}
    record = {"asked": [asked], "tables": [table], "errors": list(errors)}
    return {mark.asked: mark.state for mark in marks.marks(record, page.shape)}


def of_logits(tokens: int, ours: float, compiled: float, limit: float, last: float | None = None) -> dict[str, Any]:
    """Three divergences, of which the last may have a time of its own."""
    rows = []
    for name in marks.DIVERGENCES:
        took = last if last is not None and name == "jsd" else ours
        rows += [{"divergence": name, "by": OURS, "ms": took}, {"divergence": name, "by": COMPILED, "ms": compiled}]
    return {"kind": "logits", "tokens": tokens, "words": 9, "dtype": "float32", "limit_ms": limit, "rows": rows}


def test_marks_from_logits() -> None:
    limit, compiled, few = (
        "at least 60% of the limit",
        "no slower than torch.compile",
        "at most 60% of torch.compile's time",
    )
    assert judged(of_logits(4096, 1.6, 1.7, 1.0)) == {limit: "met", compiled: "met"}
    assert judged(of_logits(4096, 1.7, 1.6, 1.0)) == {limit: "missed", compiled: "missed"}
    assert judged(of_logits(4096, 1.6, 1.7, 1.0, last=1.8)) == {limit: "missed", compiled: "missed"}
    assert judged(of_logits(256, 0.5, 1.0, 0.1)) == {few: "met"}
    assert judged(of_logits(256, 0.7, 1.0, 0.1)) == {few: "missed"}
    assert judged(of_logits(256, 0.5, 1.0, 0.1, last=0.7)) == {few: "missed"}
    some = of_logits(256, 0.5, 1.0, 0.1)
    del some["rows"][0]
    assert judged(some) == {few: "met where measured"}
    some["rows"][-2]["ms"] = 0.7
    assert judged(some) == {few: "missed"}


def test_marks_from_hidden_states() -> None:
    def table(ours: float, chunked: float, mb: float, other_mb: float, limit: float) -> dict[str, Any]:
        rows = [{"divergence": "jsd", "by": OURS, "ms": ours, "mb": mb}]
        rows += [{"divergence": "jsd", "by": CHUNKED, "ms": chunked, "mb": other_mb}]
        given = {"kind": "hidden", "tokens": 9, "words": 9, "width": 2, "dtype": "bfloat16"}
        return given | {"limit_ms": limit, "rows": rows}

    def off(near: bool, *values: float) -> dict[str, Any]:
        row = {"divergence": "jsd", "by": OURS, "value": 0.0, "gradient": dict(enumerate(values))}
        peer = {"divergence": "jsd", "by": FUSED, "value": 9.0, "gradient": {0: 9.0}}
        given = {"kind": "hidden", "tokens": 3, "words": 9, "width": 2, "dtype": "bfloat16"}
        return given | {"near": near, "rows": [row, peer]}

    def states(*given: Any) -> list[str]:
        return list(judged(*given).values())

    good = (off(False, 0.009), off(True, 0.009, 0.008))
    assert states(table(1.0, 1.1, 49, 100, 0.34), good) == ["met"] * 4
    assert states(table(1.1, 1.0, 51, 100, 0.36), good) == ["missed"] * 3 + ["met"]
    assert states(table(1.0, 1.1, 49, 100, 0.33), good)[2] == "missed"
    for bad in (0.011, math.nan):
        assert states(table(1.0, 1.1, 49, 100, 0.34), (good[0], off(True, 0.001, bad)))[3] == "missed"
        assert states(table(1.0, 1.1, 49, 100, 0.34), (off(False, bad, 0.001), good[1]))[3] == "missed"
    assert states(table(1.0, 1.1, 49, 100, 0.34), good[:1])[3] == "met where measured"
    assert states(table(1.0, 1.1, 49, 100, 0.34), ())[3] == "not measured"


def test_the_page_is_that_of_its_record() -> None:
    """If this fails: python benchmarks/gpu.py --from benchmarks/records/h200.json --write docs/gpu.md."""
    record = records.load(STORED)
    text = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    between = text.split("<!-- begin: benchmarks/gpu.py -->")[1].split("<!-- end: benchmarks/gpu.py -->")[0]
    assert between.strip() == page.section(record)
    record["tables"][0]["rows"][0]["ms"] *= 1.1
    assert between.strip() != page.section(record)


def test_a_record_of_other_programs_says_so() -> None:
    stale = "no row below has been measured again"
    record = records.load(STORED)
    assert (stale in page.section(record)) is (record["kernels"] != records.fingerprint())
    assert stale not in page.section(record | {"kernels": records.fingerprint()})
    assert stale in page.section(record | {"kernels": "another"})


def test_every_row_of_the_stored_record_is_there_or_named_as_missing() -> None:
    record = records.load(STORED)
    missing = page.section(record).partition("### Not measured")[2]
    for asked in record["asked"]:
        held = [t for t in record["tables"] if page._place(t) == page._place(asked)]
        rows = {(row["divergence"], row["by"]) for table in held for row in table["rows"]}
        lines = [line for line in missing.splitlines() if line.startswith(f"- {page._place(asked)}: ")]
        for divergence, names in PLAN[asked["kind"]].items():
            for by in names:
                told = any(
                    f"`{divergence}` by" in part and by in part.partition(" by ")[2].rstrip(".").split(", ")
                    for line in lines
                    for part in line.split("; ")
                )
                assert told is not ((divergence, by) in rows), (asked, divergence, by)
    assert len(record["asked"]) == len({json.dumps(each) for each in record["asked"]}) == 9


def test_figures_of_any_size() -> None:
    shown = [page.number(x) for x in (None, 0.0123, 0.123, 1.234, 12.34, 123.4, 12345.6, math.inf)]
    assert shown == ["–", "0.012", "0.12", "1.23", "12.3", "123", "12,346", "inf"]
    assert timing.reason(ValueError("x" * 500)).endswith("...") and len(timing.reason(ValueError("x" * 500))) <= 110
    assert timing.reason(KeyError()) == "KeyError"
