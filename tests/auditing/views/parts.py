"""Reports with every optional part, and texts that a user could have given."""

from __future__ import annotations

import dataclasses
import math

from opdtheory.auditing import Audit
from opdtheory.auditing.checks.numerics import DtypeResult
from opdtheory.auditing.checks.subject import Check
from opdtheory.auditing.effects.dependence import Dependence
from opdtheory.auditing.naming.weight_form import WeightForm
from opdtheory.auditing.records import Identified
from opdtheory.auditing.report import Remedy
from opdtheory.auditing.sampling.bounds import OnPair
from opdtheory.auditing.sampling.montecarlo_result import MonteCarloResult

HOSTILE = "<script>document.title='taken'</script>\"'><img src=x onerror=\"document.title='taken'\">$x^"


SAMPLED = {
    "verdict": "biased",
    "relative_bias": (0.1, float("inf")),
    "least_bias": 0.05,
    "cosine": (-1.0, 1.0),
    "scale": None,
    "by_pair": [OnPair("a", (0.5, 0.6), (0.1, float("inf")), float("inf"), (-1.0, 1.0))],
    "directions": 7,
    "identical": False,
    "hidden": 0.1,
    "unseen": 0.1,
    "batches": 50,
    "rollouts": 1000,
    "separable": False,
    "alpha": 1e-6,
    "confidence": 1.0 - 1e-6,
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


def whole(report: Audit, text: str = "x") -> Audit:
    """The report with every optional part there, and a text of the user's wherever there is one."""
    return dataclasses.replace(
        report,
        name=text,
        form=WeightForm(
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
        dependence=Dependence(
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
            Check(name=text, passed=True, value=1e-17, limit=1e-9, detail=text),
            Check(name="b", passed=False, value=None, limit=None, detail="d"),
            Check(name="c", passed=None, value=None, limit=None, detail=""),
        ],
        numerics=[
            DtypeResult(
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
            Remedy(kind="detach", text=text, verdict="exact", relative_bias=1e-16, verified=True),
            Remedy(kind="scale", text="multiply", verdict="biased", relative_bias=math.nan, verified=False),
        ],
        monte_carlo=MonteCarloResult(**SAMPLED, words=f"{report.summary()} {text}", follows=followed(text)),
    )
