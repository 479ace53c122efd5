"""Published distillation losses: what each says it minimises, and what an audit finds.

`python examples/published_losses/gallery.py` prints the table; `--write README.md` puts it between the markers
`<!-- gallery:start -->` and `<!-- gallery:end -->` of that file.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import opdtheory as opd

__all__ = ["END", "ENTRIES", "START", "Entry", "between_markers", "table", "write"]

START, END = "<!-- gallery:start -->", "<!-- gallery:end -->"

_HEADER = ("loss", "package", "says it minimises", "the audit finds", "rollouts that end early")

# Scaled error below which a scale is written as a fraction rather than a decimal.
_FRACTION = 1e-5


@dataclass(frozen=True)
class Entry:
    """One published loss with the claim it is held to.

    Attributes:
        function: name of the adapter.
        label: what to call it in the table.
        package: the distribution it is imported from.
        source: where the published function lives.
        says: the claim, short enough for a table.
        quote: the words of its documentation that the claim rests on.
        objective: the claim as a catalogue name.
        parameters: of that catalogue entry.
        granularity: the claim's second half.
        settings: further arguments of `audit`.
    """

    function: str
    label: str
    package: str
    source: str
    says: str
    quote: str
    objective: str
    parameters: dict[str, float] = field(default_factory=dict)
    granularity: str = "token_local"
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def loss(self) -> Callable[[opd.Rollouts], Any]:
        """The adapter; loading it imports no other package's adapters."""
        return getattr(_adapters(self.package), self.function)

    def audit(self) -> opd.Audit:
        """The audit against the claim."""
        claim = opd.divergence(self.objective, **self.parameters)
        return opd.audit(self.loss, claim, self.granularity, name=self.function, **self.settings)

    def row(self, audit: opd.Audit) -> str:
        """The entry's line of the Markdown table."""
        package = f"{self.package} {version(self.package)}"
        return _line(self.label, package, self.says, found(audit), found_at_variable_lengths(audit))


_GKD = "When beta is `0.0`, the loss is the KL divergence. When beta is `1.0`, the loss is the Inverse KL Divergence."
_DISTILLATION = "When `0.0`, the loss is the forward KL divergence. When `1.0`, the loss is the reverse KL divergence."
_SDPO = "trl.experimental.sdpo.loss_utils.compute_{}_self_distillation_loss"
_SERVER = "trl.experimental.server_distillation.ServerDistillationTrainer."
_ASYNC = "trl.experimental.async_distillation.async_distillation_trainer._jsd_loss_chunk"


def _gkd(function: str, beta: float, says: str, objective: str, parameters: dict[str, float]) -> Entry:
    source = "trl.experimental.gkd.GKDTrainer.generalized_jsd_loss"
    return Entry(function, f"GKD, β = {beta:g}", "trl", source, says, _GKD, objective, parameters)


ENTRIES: tuple[Entry, ...] = (
    _gkd("gkd_jsd_0", 0, "forward KL", "forward_kl", {}),
    _gkd("gkd_jsd_0_1", 0.1, "JSD(0.1)", "skew_jsd", {"beta": 0.1}),
    _gkd("gkd_jsd_0_5", 0.5, "JSD(0.5)", "skew_jsd", {"beta": 0.5}),
    _gkd("gkd_jsd_0_9", 0.9, "JSD(0.9)", "skew_jsd", {"beta": 0.9}),
    _gkd("gkd_jsd_1", 1, "reverse KL", "reverse_kl", {}),
    Entry(
        "distillation_chunked_1",
        "DistillationTrainer, β = 1",
        "trl",
        "trl.trainer.distillation_trainer._chunked_divergence_loss",
        "reverse KL",
        _DISTILLATION,
        "reverse_kl",
    ),
    Entry(
        "sdpo_sampled_token",
        "SDPO, SDFT: sampled token",
        "trl",
        _SDPO.format("sampled_token"),
        "reverse KL",
        "token-level (reverse-KL) distillation on sampled `completion_ids`",
        "reverse_kl",
    ),
    Entry(
        "sdpo_full_logits",
        "SDPO, SDFT: full logits, α = 1",
        "trl",
        _SDPO.format("full_logit"),
        "reverse KL",
        "Compute full-vocabulary self-distillation loss between student and teacher logits.",
        "reverse_kl",
    ),
    Entry(
        "sdpo_top_2",
        "SDPO, SDFT: top 2 of 4, α = 1",
        "trl",
        _SDPO.format("topk"),
        "reverse KL within the top k",
        "Drop the tail and renormalize the top-k to sum to 1: divergence over the top-k conditional only.",
        "reverse_kl",
    ),
    Entry(
        "sdpo_top_2_tail",
        "the same with a tail bucket",
        "trl",
        _SDPO.format("topk"),
        "about reverse KL",
        "Lump the tail into one bucket so the divergence approximates the full-vocab divergence.",
        "reverse_kl",
    ),
    Entry(
        "iw_opd",
        "IW-OPD, γ = 0.5",
        "trl",
        "trl.experimental.iw_opd.IWOPDTrainer._compute_iw_opd_loss",
        "reverse KL, early tokens first",
        "reweights the sampled-token distillation signal by accumulated teacher-student prefix discrepancy",
        "reverse_kl",
    ),
    Entry(
        "server_top_1_tail",
        "ServerDistillation, β = 1 (default)",
        "trl",
        _SERVER + "_compute_sparse_top_1_divergence_loss",
        "reverse KL on the top 1",
        "Compute exact generalized JSD/KL on top-1 support for the mixed beta>0 path.",
        "reverse_kl",
    ),
    Entry(
        "server_top_1",
        "the same, `loss_add_tail=False`",
        "trl",
        _SERVER + "_compute_sparse_top_1_divergence_loss",
        "reverse KL on the top 1",
        "Compute exact generalized JSD/KL on top-1 support for the mixed beta>0 path.",
        "reverse_kl",
    ),
    Entry(
        "server_jsd_tail",
        "ServerDistillation, β = 0.5",
        "trl",
        _SERVER + "_compute_sparse_top_1_divergence_loss",
        "JSD(0.5) on the top 1",
        "Compute exact generalized JSD/KL on top-1 support for the mixed beta>0 path.",
        "skew_jsd",
        {"beta": 0.5},
    ),
    Entry(
        "server_forward_top_2_tail",
        "ServerDistillation, β = 0, top 2 of 4",
        "trl",
        _SERVER + "_compute_server_forward_kl_loss",
        "sparse forward KL",
        "Compute sparse forward KL from server-provided teacher top-k logprobs (beta==0 path).",
        "forward_kl",
    ),
    Entry(
        "async_forward_all",
        "AsyncDistillation, β = 0, every token",
        "trl",
        _ASYNC,
        "forward KL",
        "`0.0` is forward KL (mean-seeking), `1.0` is reverse KL (mode-seeking)",
        "forward_kl",
    ),
    Entry(
        "async_sampled_tail",
        "AsyncDistillation, β = 1",
        "trl",
        _ASYNC,
        "reverse KL",
        "`0.0` is forward KL (mean-seeking), `1.0` is reverse KL (mode-seeking)",
        "reverse_kl",
    ),
    Entry(
        "gold_hybrid_0_5",
        "GOLD hybrid, β = 0.5, 3 of 4 tokens shared",
        "trl",
        "trl.experimental.gold.gold_trainer.ULDLoss._compute_hybrid_uld_loss",
        "JSD on shared tokens, L1 on the rest",
        "a hybrid loss that combines ULD loss and JSD loss",
        "skew_jsd",
        {"beta": 0.5},
    ),
    Entry(
        "gold_hybrid_1",
        "GOLD hybrid, β = 1, 3 of 4 tokens shared",
        "trl",
        "trl.experimental.gold.gold_trainer.ULDLoss._compute_hybrid_uld_loss",
        "reverse KL on shared tokens, L1 on the rest",
        _GKD,
        "reverse_kl",
    ),
    Entry(
        "grpo_kl",
        "GRPO's KL penalty",
        "trl",
        "trl.GRPOTrainer._compute_loss",
        "reverse KL",
        "the KL gradient becomes the unbiased reverse-KL gradient",
        "reverse_kl",
    ),
    Entry(
        "grpo_kl_uncorrected",
        "the same, `use_bias_correction_kl=False`",
        "trl",
        "trl.GRPOTrainer._compute_loss",
        "KL to the reference",
        "Compute the KL divergence between the model and the reference model",
        "reverse_kl",
    ),
    Entry(
        "k3_reverse",
        "k3 estimate, reverse",
        "torchrl",
        "torchrl.objectives.llm.k3_kl_token_estimate",
        "reverse KL",
        "it estimates KL(sampling distribution || target distribution)",
        "reverse_kl",
    ),
    Entry(
        "distillation_reverse",
        "DistillationLoss, reverse",
        "torchrl",
        "torchrl.objectives.llm.DistillationLoss",
        "reverse KL; a note says forward",
        "minimizes KL(student || teacher) [...] the expected gradient of both directions matches the gradient of the "
        "forward (mass-covering) KL",
        "reverse_kl",
    ),
    Entry(
        "distillation_forward",
        "DistillationLoss, forward, on student rollouts",
        "torchrl",
        "torchrl.objectives.llm.DistillationLoss",
        "forward KL, on teacher rollouts",
        "minimizes KL(teacher || student). Here the scored tokens must be sampled from the teacher",
        "forward_kl",
    ),
    Entry(
        "grpo_kl_to_ref",
        "GRPOLoss, KL to the reference",
        "torchrl",
        "torchrl.objectives.llm.GRPOLoss._kl_to_ref",
        "KL to the reference",
        "coefficient for the KL divergence to the reference policy",
        "reverse_kl",
    ),
)


def found(audit: opd.Audit) -> str:
    """The verdict at fixed length, in a few words."""
    if audit.verdict == "zero":
        return "**zero gradient**"
    if audit.descends is None or audit.identified is None:
        wrong_way = " (the wrong way)" if audit.cosine < 0 else ""
        return f"no catalogue objective; cosine down to {audit.cosine:.3f}{wrong_way}"
    what = _objective(audit.identified["objective"], audit.identified["parameters"])
    times = _times(audit.identified["scale"], max(audit.tolerance, _FRACTION))
    return f"{what}{times}" if audit.faithful else f"**{what}**{times}"


def found_at_variable_lengths(audit: opd.Audit) -> str:
    """Whether that holds when rollouts may end early."""
    if audit.variable_lengths is None:
        return "–"
    if audit.variable_lengths["verdict"] in ("exact", "exact_up_to_scale"):
        return "the same"
    return f"off by up to {100 * audit.variable_lengths['relative_bias']:.0f}%"


def table(rows: Iterable[str]) -> str:
    """The Markdown table of the entries' lines."""
    return "\n".join([_line(*_HEADER), _line(*("---" for _ in _HEADER)), *rows])


def between_markers(text: str) -> str:
    """What stands between the two markers.

    Raises:
        ValueError: unless each marker occurs once, the start before the end.
    """
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ValueError(f"the file must hold the lines {START} and {END} once each, in this order")
    return text.split(START)[1].split(END)[0].strip()


def write(path: Path, content: str) -> None:
    """Replace what stands between the markers of a file.

    Raises:
        ValueError: as `between_markers`.
    """
    text = path.read_text(encoding="utf-8")
    between_markers(text)
    before, after = text.split(START)[0], text.split(END)[1]
    path.write_text(f"{before}{START}\n{content}\n{END}{after}", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Audit every entry and print the table, or write it into a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table between the markers of this file")
    path = parser.parse_args(arguments).write
    rows = []
    for entry in ENTRIES:
        audit = entry.audit()
        rows.append(entry.row(audit))
        print(f"{entry.function}: {audit.verdict} ({audit.seconds:.1f} s)", file=sys.stderr)
    if path is None:
        print(table(rows))
    else:
        write(path, table(rows))
    return 0


@cache
def _adapters(package: str) -> ModuleType:
    # By path, so that this file serves as a script and as a module alike.
    path = Path(__file__).with_name(f"{package}_losses.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _objective(name: str, parameters: dict[str, float]) -> str:
    names = {"forward_kl": "forward KL", "reverse_kl": "reverse KL", "skew_jsd": "JSD", "neyman_chi2": "χ²(p‖q)"}
    values = ", ".join(f"{value:g}" for value in parameters.values())
    return names.get(name, name) + (f"({values})" if values else "")


def _times(scale: float, tolerance: float) -> str:
    fraction = Fraction(scale).limit_denominator(12)
    if abs(float(fraction) - scale) > tolerance:
        return f" × {scale:.3g}"
    return "" if fraction == 1 else f" × {fraction}"


if __name__ == "__main__":
    sys.exit(main())
