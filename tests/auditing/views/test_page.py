"""The page of an audit, its JSON schema and its text in a terminal."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import jsonschema
import pytest
import torch

import opdtheory as opd
from opdtheory.auditing import VERDICTS, Audit
from opdtheory.auditing.records import Identified
from opdtheory.auditing.sampling.montecarlo_result import MonteCarloResult
from opdtheory.auditing.views import render_audit, write_audit
from opdtheory.auditing.views.figures import curves, figures
from opdtheory.auditing.views.schema import AUDIT_SCHEMA, schema_text
from opdtheory.auditing.views.terminal import print_audit
from opdtheory.objective import Objective

ROOT = Path(__file__).resolve().parents[3]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "<script>document.title='taken'</script>\"'><img src=x onerror=\"document.title='taken'\">$x^"


SAMPLED = {
    "verdict": "biased",
    "relative_bias": (0.1, float("inf")),
    "cosine": (-1.0, 1.0),
    "scale": None,
    "directions": 7,
    "identical": False,
    "hidden": 0.1,
    "batches": 50,
    "rollouts": 1000,
    "separable": False,
    "confidence": 0.99,
    "margin": 0.05,
    "seed": 0,
    "seconds": 1.0,
}


def followed(text: str) -> Identified:
    return Identified(
        objective=text,
        granularity="token_local",
        parameters={text: 0.5},
        scale=1.0,
        error=1e-3,
        evidence=text,
        fitted=text,
        fitted_range=(0.4, 0.6),
    )


def k3(r):
    return r.token_sum(r.log_u.expm1() - r.log_u)


def record(**fields):
    """A frozen dataclass of these values, as the optional parts of an audit are."""
    return dataclasses.make_dataclass("Part", fields, frozen=True)(**fields)


def whole(report: Audit, text: str = "x") -> Audit:
    """The report with every optional part there, and a text of the user's wherever there is one."""
    return dataclasses.replace(
        report,
        name=text,
        form=record(
            kind="combination",
            label=text,
            terms={text: 1.5, "forward_kl": -1.0},
            expr="log(u) - u**2 + u**(1/2)",
            latex=text,
            error=1e-16,
            generator="-u*log(u) + 2*u - 2",
            generator_latex=None,
            genuine=False,
            fixed_points=["1"],
            slope_at_teacher=-1.0,
            attracts=False,
            limits={"0": float("-inf"), "inf": float("inf")},
            growth=text,
            second_moment=text,
            generator_values=[0.0, float("inf")],
            stop_gradient_of=text,
        ),
        dependence=record(
            ratio_only=False,
            position=[1.0, 0.5, 0.25],
            position_label=text,
            batch=True,
            other_tokens=False,
            sampling_policy=False,
            top_k=2,
            student_and_teacher=text,
            words=[text],
        ),
        checks=[
            record(name=text, passed=True, value=1e-17, limit=1e-9, detail=text),
            record(name="b", passed=False, value=None, limit=None, detail="d"),
            record(name="c", passed=None, value=None, limit=None, detail=""),
        ],
        numerics=[
            record(
                dtype="bfloat16",
                regime="adversarial",
                overflow=[11.0, 88.0],
                lost_gradient=None,
                sign_changed=None,
                worst_error=float("inf"),
                words=text,
            )
        ],
        remedies=[
            record(kind="detach", text=text, verdict="exact", relative_bias=1e-16, verified=True),
            record(kind="scale", text="multiply", verdict="biased", relative_bias=None, verified=False),
        ],
        monte_carlo=MonteCarloResult(**SAMPLED, words=f"{report.summary()} {text}", follows=followed(text)),
    )


@pytest.fixture(scope="module")
def report() -> Audit:
    return opd.audit(k3, "reverse_kl")


@pytest.fixture(scope="module")
def reports(report: Audit) -> list[Audit]:
    """One of every verdict that a full run gives, and one of a coupled loss, whose grid is coarse."""
    return [
        report,
        opd.audit(k3, "forward_kl"),
        opd.audit(lambda r: r.token_mean(r.log_u.square()), "reverse_kl"),
        opd.audit(lambda r: r.token_sum(-r.log_u), "reverse_kl"),
        opd.audit(opd.estimator("opd", "forward_kl"), "forward_kl"),
        opd.audit(lambda r: (r.log_u.sum(-1).square() / 2).mean(), "reverse_kl", batch_size=2),
    ]


class Page(HTMLParser):
    """What a browser makes of a page: its tags, its ids, its text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(key, value or "") for key, value in attrs]
        self.ids += [value or "" for key, value in attrs if key == "id"]

    def handle_data(self, data):
        self.text += data


def test_the_page_says_what_the_report_says(report):
    page = Page(render_audit(report))
    words = " ".join(page.text.split())
    assert report.summary() in words
    for text in ("k3", "other objective", "reverse_kl (token_local)", "forward_kl (token_local)", "+0.808088"):
        assert text in words
    for pair in report.pairs:
        assert pair.label in words
    assert page.tags.count("svg") == 4 and page.tags.count("h1") == 1


def test_every_verdict_has_a_page(reports):
    found = {report.verdict for report in reports}
    assert found == set(VERDICTS) - {"undecided"}
    for report in reports:
        page = Page(render_audit(report))
        assert VERDICTS[report.verdict][1:] in page.text
        coarse = float(report.weight["log_u"][-1]) < 1.0
        assert page.tags.count("svg") == 4 - 2 * coarse
    sampled = MonteCarloResult(**SAMPLED, words="Undecided.", follows=None)
    undecided = dataclasses.replace(reports[0], verdict="undecided", monte_carlo=sampled)
    assert 'class="verdict open"' in render_audit(undecided) and "Monte Carlo" in render_audit(undecided)


def test_the_page_asks_for_nothing_and_runs_nothing(report):
    text = render_audit(whole(report))
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
    for key, value in page.attributes:
        assert not key.startswith("on") and key != "src"
        if key.endswith("href"):
            assert value.startswith("#")
    assert "@import" not in text and "url(#" in text and not re.search(r"url\((?!#)", text)


def test_ids_are_unique_and_found(report):
    text = render_audit(report)
    ids = Page(text).ids
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]*)\)", text)) | set(re.findall(r'href="#([^"]*)"', text)) <= set(ids)


def test_names_are_escaped_wherever_they_stand(report):
    claim = Objective.of(opd.Divergence.from_expr(opd.divergence("jsd").expr, name=HOSTILE))
    scenario = dataclasses.replace(report.scenario)
    # Neither is checked again once it is there.
    object.__setattr__(claim, "granularity", HOSTILE)
    object.__setattr__(scenario, "eos", HOSTILE)
    hostile = dataclasses.replace(
        whole(report, HOSTILE),
        claim=claim,
        scenario=scenario,
        identified=dataclasses.replace(report.identified, objective=HOSTILE, granularity=HOSTILE),
        pairs=[dataclasses.replace(report.pairs[0], label=HOSTILE), *report.pairs[1:]],
    )
    page = Page(render_audit(hostile))
    assert "script" not in page.tags and "img" not in page.tags
    assert page.text.count(HOSTILE) >= 15
    # The check itself sees a name that is not escaped.
    assert "script" in Page(render_audit(hostile).replace("&lt;script&gt;", "<script>", 1)).tags


def test_optional_parts_are_shown(report):
    text = " ".join(Page(render_audit(whole(report, "my words"))).text.split())
    for part in ("What would make it right", "audited: exact", "not verified", "Checks", "fails", "noted"):
        assert part in text
    for part in (
        "−∞ as u → 0, ∞ as u → ∞",
        "bfloat16",
        "11, 88",
        "nowhere",
        "1, 0.5, 0.25",
        "the 2 of the top",
        "Monte Carlo",
    ):
        assert part in text
    bare = {"form": None, "dependence": None, "checks": [], "numerics": [], "remedies": [], "monte_carlo": None}
    plain = Page(render_audit(dataclasses.replace(report, **bare))).text
    assert "What would make it right" not in plain and "Numerics" not in plain


def test_curves_are_the_theory_s():
    """k3 follows the forward KL: weight u, generator u log u in the gauge of zero slope (T4)."""
    found = curves(opd.audit(k3, "forward_kl"))
    torch.testing.assert_close(found.weight, found.log_u.expm1(), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.claimed, found.log_u.expm1())
    s = found.generator_log_u
    expected = s * s.exp() - s.exp() + 1
    # Interpolation between points of the grid, 0.25 apart.
    assert float((found.generator - expected).abs().max()) < 1e-3 * float(expected.max())
    assert float((found.generator - (s.expm1() - s)).abs().max()) > 0.1 * float(expected.max())
    torch.testing.assert_close(found.claimed_generator, expected)


def test_a_generator_of_one_s_own_is_drawn_if_given(report):
    own = opd.Divergence.from_expr(2 * opd.divergence("reverse_kl").expr, name="<mine>")
    found = opd.audit(lambda r: r.token_sum(r.log_u.square()), own)
    assert curves(found).claimed is None and "known by name only" in render_audit(found)
    torch.testing.assert_close(curves(found, own).claimed, 2 * found.weight["log_u"], rtol=1e-12, atol=1e-12)
    assert "known by name only" not in render_audit(found, divergence=own)


def test_no_generator_where_the_weight_is_no_function_of_the_ratio(report):
    apart = dataclasses.replace(report, weight=dataclasses.replace(report.weight, depends_on_ratio_only=False))
    assert curves(apart).generator is None
    assert [figure.title for figure in figures(apart, curves(apart))][:2] == ["Weight on a token", "Bias by pair"]


def test_without_matplotlib_the_page_says_so(report, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = render_audit(report)
    assert "opdtheory[plots]" in text and "<svg" not in text


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
def test_a_browser_shows_the_page_and_runs_no_name(report, tmp_path):
    path = write_audit(whole(report, HOSTILE), tmp_path / "deep" / "audit.html")
    # The twin: the same name, not escaped and no policy against it, does run.
    bad = tmp_path / "bad.html"
    bad.write_text(f"<!doctype html><title>own</title><p>{HOSTILE}</p>", encoding="utf-8")
    assert "<title>taken</title>" in dumped(bad, tmp_path)
    dom = dumped(path, tmp_path)
    page = Page(dom)
    assert "script" not in page.tags and "img" not in page.tags
    assert "<title>taken" not in dom and page.tags.count("svg") == 4
    assert "The loss does not descend reverse_kl" in page.text and HOSTILE in page.text


def dumped(path: Path, folder: Path) -> str:
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    done = subprocess.run([str(CHROMIUM), *options, path.as_uri()], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


# The schema.


def closed(schema):
    """The schema with every object held to the properties that it lists: a key that nobody described is an error."""
    if isinstance(schema, dict):
        found = {key: closed(value) for key, value in schema.items()}
        if "properties" in schema and "additionalProperties" not in schema:
            found["additionalProperties"] = False
        return found
    return [closed(value) for value in schema] if isinstance(schema, list) else schema


def test_reports_obey_the_schema(reports):
    jsonschema.Draft202012Validator.check_schema(AUDIT_SCHEMA)
    validator = jsonschema.Draft202012Validator(closed(AUDIT_SCHEMA))
    for report in [*reports, whole(reports[0])]:
        validator.validate(json.loads(json.dumps(report.to_dict(), allow_nan=False)))


@pytest.mark.parametrize(
    ("module", "name", "part"),
    [
        ("report", "PairResult", AUDIT_SCHEMA["properties"]["pairs"]["items"]),
        ("naming.weight_form", "WeightForm", AUDIT_SCHEMA["properties"]["form"]),
        ("effects.dependence", "Dependence", AUDIT_SCHEMA["properties"]["dependence"]),
        ("checks.subject", "Check", AUDIT_SCHEMA["properties"]["checks"]["items"]),
        ("checks.numerics", "DtypeResult", AUDIT_SCHEMA["properties"]["numerics"]["items"]),
        ("fixes.remedies", "Remedy", AUDIT_SCHEMA["properties"]["remedies"]["items"]),
        ("sampling.montecarlo_result", "MonteCarloResult", AUDIT_SCHEMA["properties"]["monte_carlo"]),
    ],
)
def test_the_schema_describes_every_field(module, name, part):
    found = getattr(importlib.import_module(f"opdtheory.auditing.{module}"), name)
    assert [field.name for field in dataclasses.fields(found)] == list(part["properties"])


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.pop("verdict"),
        lambda r: r.update(verdict="fine"),
        lambda r: r.update(schema_version=0),
        lambda r: r["weight"].pop("log_u"),
        lambda r: r["pairs"][0].update(cosine="1"),
        lambda r: r["settings"].update(batch_size=0),
        lambda r: r["checks"][0].update(passed="yes"),
        lambda r: r["form"].update(kind="guess"),
    ],
)
def test_what_is_no_report_breaks_the_schema(report, change):
    wrong = copy.deepcopy(whole(report).to_dict())
    change(wrong)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, AUDIT_SCHEMA, cls=jsonschema.Draft202012Validator)


def test_the_published_schema_is_this_one():
    published = (ROOT / "docs" / "audit.schema.json").read_text(encoding="utf-8")
    assert published == schema_text(), (
        "regenerate with: python -m opdtheory.auditing.views.schema > docs/audit.schema.json"
    )


# The terminal.


def test_a_terminal_gets_colours_and_tables(report):
    console_module = pytest.importorskip("rich.console")
    console = console_module.Console(force_terminal=True, width=110, record=True, file=open("/dev/null", "w"))
    name = "[red]my[/red] <loss>"
    print_audit(whole(report, name), console)
    coloured = console.export_text(styles=True, clear=False)
    text = console.export_text()
    assert "\x1b[" in coloured
    for part in (
        name,
        "OTHER OBJECTIVE",
        "Pairs",
        "Checks",
        "FAILED",
        "Numerics",
        "What would make it right",
        "weight w(u) = ",
    ):
        assert part in text
    console.file.close()


def test_what_is_no_terminal_gets_plain_text(report, capsys):
    console_module = pytest.importorskip("rich.console")
    print_audit(report)
    print_audit(report, console_module.Console())
    assert capsys.readouterr().out == f"{report}\n{report}\n"
