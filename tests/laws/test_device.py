"""The same numbers on a GPU as on the CPU; skipped where torch sees no GPU.

`make device` runs them anywhere: it installs Triton, and sets `OPDTHEORY_TEST_DEVICE=cpu` and `TRITON_INTERPRET=1`, by
which the programs of the GPU are interpreted on the CPU.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import opdtheory as opd
from opdtheory.divergences import names as catalogue
from opdtheory.errors import InvalidArgumentError
from opdtheory.kernels import sweep
from opdtheory.training.trainer import train
from tests.conftest import CHECKED
from tests.kernels.test_linear import of_a_gpu
from tests.training.runs import CASES, GROUPED, TASK, config, model

DEVICE = os.environ.get("OPDTHEORY_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else None)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.skipif(DEVICE is None, reason="torch sees no GPU"),
    # Loaded with the compiler and with forward mode.
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
    # Interpreted programs are numpy's, which warns of what a GPU does in silence.
    pytest.mark.filterwarnings("ignore:.* encountered in :RuntimeWarning"),
]
compiles = pytest.mark.skipif(CHECKED, reason="OPDTHEORY_TYPECHECK: the compiler cannot trace the checks")

# Sums in another order: the bound of each dtype on a difference, relative to one plus the largest entry.
BOUND = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
NAMES = (
    *(name for name in catalogue() if name not in ("alpha", "skew_jsd", "skew_forward_kl", "skew_reverse_kl")),
    "alpha(alpha=0.3)",
    "alpha(alpha=1.5)",
    "skew_jsd(beta=0.1)",
    "skew_forward_kl(lam=0.1)",
    "skew_reverse_kl(lam=0.1)",
)
SOME = ("reverse_kl", "jsd", "forward_kl", "alpha(alpha=0.3)")


@pytest.fixture(autouse=True)
def programs(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        monkeypatch.setattr(sweep, "has_programs", lambda _: True)


def there(x: Tensor) -> Tensor:
    """A copy on the device, a leaf of its own."""
    return x.detach().to(DEVICE).requires_grad_(x.requires_grad)


def worst(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.detach().cpu().double(), wanted.detach().cpu().double()
    return float((found - wanted).abs().max() / (1 + wanted.abs().max()))


def pair(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


def by_autograd(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss.sum(), leaves)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", ((3, 4, 7), (5, 40_000)), ids=str)
def test_whole_vocabularies(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    student, teacher = pair(*shape, dtype=dtype)
    with torch.no_grad():
        student[0, ..., 0] = teacher[0, ..., 0] = -torch.inf
    mask = torch.linspace(0.5, 1, student[..., 0].numel()).view(student.shape[:-1]).clone()
    mask[-1] = 0.0
    options = {"mask": mask.to(DEVICE), "temperature": 1.3, "chunk_size": 2}
    # A row that is not looked at may hold anything.
    spoilt = there(teacher)
    spoilt[-1] = torch.nan
    moved = there(student)
    found = opd.fused_divergence(moved, spoilt, name, **options)
    (slope,) = by_autograd(found, moved)
    assert found.device.type == slope.device.type == torch.device(DEVICE).type and slope.dtype == dtype
    wide = student.detach().double().requires_grad_()
    wanted = opd.fused_divergence(wide, teacher.double(), name, mask=mask, temperature=1.3)
    (exact,) = by_autograd(wanted, wide)
    # Values are summed in float32 also from narrow logits.
    assert worst(found, wanted) < BOUND[torch.float64 if dtype == torch.float64 else torch.float32]
    assert worst(slope, exact) < BOUND[dtype]
    other = opd.fused_divergence(wide, teacher.double(), name, mask=mask, temperature=1.1)
    assert worst(found, other) > BOUND[torch.float32]


def situations() -> dict[str, tuple[Tensor, Tensor]]:
    """Logits in float32 that try the digits of a program."""
    student, teacher = pair(6, 5000, dtype=torch.float32)
    student, noise = student.detach(), teacher
    lacking, absent = (3 * noise).clone(), student.clone()
    absent[0, 3] = lacking[1, 4] = absent[2, 5] = lacking[2, 5] = -torch.inf
    return {
        "near": (student, student + 1e-2 * noise),
        "apart by a constant": (student, student + noise + 1000.0),
        "far": (8 * student, 8 * noise),
        "without tokens": (absent, lacking),
    }


def errors(name: str, student: Tensor, teacher: Tensor, device: str) -> tuple[float, float, Tensor]:
    """Of values and of the gradients of rows, against float64; with the rows whose values are finite."""
    mask = torch.tensor([1.0, 1.0, 1.0, 0.0, 2.0, 1.0])
    results = []
    for z, t, m in (
        (student.to(device), teacher.to(device), mask.to(device)),
        (student.double(), teacher.double(), mask),
    ):
        z = z.detach().clone().requires_grad_()
        values = opd.fused_divergence(z, t, name, mask=m, temperature=1.3)
        results.append((values.detach().cpu().double(), by_autograd(values, z)[0].cpu().double()))
    (found, slopes), (wanted, exact) = results
    finite = torch.isfinite(wanted)
    assert torch.equal(torch.isfinite(found), finite) and torch.isfinite(slopes).all()
    value = ((found - wanted).abs() / (1 + wanted.abs()))[finite].max()
    return float(value), float(((slopes - exact).norm(dim=-1) / (1e-6 + exact.norm(dim=-1))).max()), finite


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("situation", situations())
def test_digits(name: str, situation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as the forms keep on the CPU, which tests of their own hold to theirs."""
    student, teacher = situations()[situation]
    value, slope, finite = errors(name, student, teacher, DEVICE)
    monkeypatch.setattr(sweep, "has_programs", lambda _: False)
    by_form = errors(name, student, teacher, "cpu")
    assert value < 8 * by_form[0] + 2e-7
    assert slope < 8 * by_form[1] + 1e-6
    assert bool(finite.all()) == (situation != "without tokens" or name in FINITE)


FINITE = {
    name for name in NAMES if max(opd.divergence(name).at_zero, opd.divergence(name).slope_at_infinity) < torch.inf
}


@pytest.mark.parametrize("name", NAMES)
def test_at_the_teacher_there_is_no_gradient(name: str) -> None:
    student = situations()["far"][0]
    z = there(student).requires_grad_()
    (slope,) = by_autograd(opd.fused_divergence(z, there(student), name, temperature=1.3), z)
    assert not slope.any()


@pytest.mark.parametrize("twin", ("parameter", "boundary", "kind"))
def test_a_wrong_program_is_found_out(twin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (INTERPRETED or torch.device(DEVICE).type == "cuda"):
        pytest.skip("no program runs here")
    from opdtheory.kernels.programs import launch

    def wrong(label: str) -> Any:
        program = right(label)
        changes = {"parameter": {"parameter": 0.11}, "boundary": {"at_zero": 0.0}, "kind": {"kind": "jeffreys"}}
        return program._replace(**changes[twin])

    right = launch.program_of
    monkeypatch.setattr(launch, "program_of", wrong)
    value, slope, _ = errors("skew_jsd(beta=0.1)", *situations()["without tokens"], DEVICE)
    assert value > 1e-6 and slope > 1e-5


@pytest.mark.skipif(not INTERPRETED, reason="a GPU compiles what it runs")
def test_programs_compile_for_a_gpu() -> None:
    """An interpreter takes what the compiler does not. Members of a group need their registers: two of 128 threads."""
    script = Path(__file__).parents[2] / "benchmarks" / "programs.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script, "--all"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith("| `")]
    # In two dtypes, all but the JSD, which is a skewed one.
    assert len(rows) == 2 * (len(NAMES) - 1)
    assert all(int(row[3]) <= 256 and int(row[4]) < 4096 and float(row[5]) > 10 for row in rows)
    others = [line for line in done.stdout.splitlines() if line.endswith("spilled")]
    # Of parts: three programs, for the KLs and their sum two; and two for few tokens, all in two dtypes.
    assert len(others) == len(NAMES) + 5 + 2 * (3 * (len(NAMES) - 1) - 3 + 2)
    # Programs of small blocks keep all in registers.
    assert all(" 0 bytes" in line for line in others if "_program" in line)


def test_unusable_rows_are_refused() -> None:
    for value in (torch.nan, torch.inf):
        student, teacher = (there(x) for x in pair(4, 50, dtype=torch.float32))
        teacher[2, 7] = value
        with pytest.raises(InvalidArgumentError, match="teacher_logits"):
            opd.fused_divergence(student, teacher, "jsd")
    with pytest.raises(InvalidArgumentError, match="student_logits"):
        opd.fused_divergence(torch.full_like(student, -torch.inf), there(teacher.detach()).zero_(), "jsd")


@pytest.mark.parametrize("name", SOME)
def test_strides_and_upstream_gradients(name: str) -> None:
    student, teacher = pair(6, 50, 3)
    upstream = torch.linspace(-1, 2, 18, dtype=torch.float64).view(6, 3)
    slopes = []
    for z, t in ((student, teacher), (there(student), there(teacher))):
        values = opd.fused_divergence(z.mT, t.mT, name)
        slopes.append(torch.autograd.grad(values, z, upstream.to(z.device))[0])
    assert worst(slopes[1], slopes[0]) < BOUND[torch.float64]


@pytest.mark.parametrize("name", SOME)
def test_transforms_and_second_derivatives(name: str) -> None:
    student, teacher = pair(3, 5)
    z, t = there(student.detach()), there(teacher)

    def loss(one: Tensor, other: Tensor) -> Tensor:
        return opd.fused_divergence(one, other, name)

    for function in (torch.func.vmap(torch.func.grad(loss)), torch.func.vmap(torch.func.hessian(loss))):
        assert worst(function(z, t), function(student.detach(), teacher)) < BOUND[torch.float64]
    assert torch.autograd.gradgradcheck(lambda x: loss(x, t), (z.clone().requires_grad_(),))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", SOME)
def test_second_derivatives_of_narrow_logits(name: str, dtype: torch.dtype) -> None:
    """The gradient of a program is differentiated once more, with weights, a temperature and strides."""
    student, teacher = pair(4, 3, 60, dtype=dtype)
    vectors = pair(4, 3, 60, dtype=dtype, seed=1)[0].detach()
    mask = torch.tensor([[1.0, 0.0, 2.0]] * 4)
    products = []
    for device, width in ((DEVICE, dtype), ("cpu", torch.float64)):
        z = student.detach().to(device, width).transpose(0, 1).requires_grad_()
        values = opd.fused_divergence(
            z.transpose(0, 1), teacher.to(device, width), name, mask=mask.to(device), temperature=1.3
        )
        (slope,) = torch.autograd.grad(values.sum(), z, create_graph=True)
        (product,) = torch.autograd.grad(slope, z, vectors.to(device, width).transpose(0, 1))
        products.append(product.detach().cpu().double())
    assert float((products[0] - products[1]).norm()) < 2 * BOUND[dtype] * float(products[1].norm())
    assert not products[0][1].any() and products[0][0].any()


@compiles
@pytest.mark.parametrize("name", SOME[:2])
def test_compiled(name: str) -> None:
    student, teacher = pair(3, 50, dtype=torch.float32)
    z, t = there(student), there(teacher)

    def loss(one: Tensor, other: Tensor) -> Tensor:
        return 3 * opd.fused_divergence(2 * one, other, name).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="inductor" if z.is_cuda else "aot_eager")
    assert worst(by_autograd(compiled(z, t), z)[0], by_autograd(loss(student, teacher), student)[0]) < 1e-6


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_factors_from_upstream(dtype: torch.dtype) -> None:
    """In place where the graph is freed, in a copy where it is kept, and in two pieces where strides ask for it."""
    student, teacher = pair(6, 50, 3, dtype=dtype)
    upstream = torch.linspace(-1, 2, 18, dtype=torch.float64).view(6, 3)
    upstream[2] = 1.0
    wide = student.detach().double().requires_grad_()
    exact = torch.autograd.grad(opd.fused_divergence(wide.mT, teacher.double().mT, "jsd"), wide, upstream)[0]
    z = there(student)
    values = opd.fused_divergence(z.mT, there(teacher).mT, "jsd")
    slopes = [
        torch.autograd.grad(values, z, upstream.to(z.device, values.dtype), retain_graph=kept)[0]
        for kept in (True, True, False)
    ]
    assert torch.equal(slopes[0], slopes[1]) and torch.equal(slopes[0], slopes[2])
    assert worst(slopes[0], exact) < BOUND[dtype]
    assert worst(slopes[0], exact / upstream[:, None].clamp(0.5)) > 2 * BOUND[dtype]


def test_one_factor_for_all_positions() -> None:
    """As from a mean, it is one number that every row reads."""
    student, teacher = (there(x) for x in pair(2, 3, 50, dtype=torch.float32))
    values = opd.fused_divergence(student, teacher, "jsd")
    plain = torch.autograd.grad(values, student, torch.ones_like(values), retain_graph=True)[0]
    for kept in (True, False):
        found = torch.autograd.grad(values.mean(), student, retain_graph=kept)[0]
        assert worst(6 * found, plain) < 1e-6 < worst(found, plain)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("words", (700, 40_000))
def test_two_runs_give_the_same_bits(name: str, words: int) -> None:
    student, teacher = (there(x) for x in pair(4, words, dtype=torch.float32))
    runs = [opd.fused_divergence(student, teacher, name) for _ in range(2)]
    assert torch.equal(*runs)
    assert torch.equal(*(by_autograd(values, student)[0] for values in runs))


def test_weights_must_be_finite() -> None:
    student, teacher = (there(x) for x in pair(4, 50, dtype=torch.float32))
    for wrong in (torch.nan, torch.inf):
        mask = torch.tensor([1.0, 0.0, wrong, 1.0], device=student.device)
        with pytest.raises(InvalidArgumentError, match="mask: must be finite"):
            opd.fused_divergence(student, teacher, "jsd", mask=mask)


@pytest.mark.parametrize("words", (50, 9000))
def test_rows_that_a_graph_cannot_do_are_spoilt(words: int) -> None:
    if not (INTERPRETED or torch.device(DEVICE).type == "cuda"):
        pytest.skip("no program runs here")
    from opdtheory.kernels.programs.launch import run_program

    student, teacher = (there(x).detach() for x in pair(4, words, dtype=torch.float32))
    teacher[1, 7] = torch.nan
    teacher[2, 3] = -torch.inf
    values, gradient = torch.zeros(4, device=student.device), torch.zeros_like(student)
    for spoilt in (False, True):
        values.fill_(5.0), gradient.fill_(5.0)
        some, left = run_program(
            opd.divergence("reverse_kl"),
            student,
            teacher,
            1.0,
            None,
            values,
            gradient,
            fill=math.nan if spoilt else None,
        )
        assert bool(some) and left.tolist() == [False, True, True, False]
        untouched = values.isnan() if spoilt else values == 5.0
        assert torch.equal(untouched, left) and torch.equal(gradient.isnan().all(-1), left & spoilt)
        assert torch.equal((gradient == 5.0).all(-1), left & (not spoilt))


@pytest.mark.skipif(DEVICE is None or torch.device(DEVICE).type != "cuda", reason="graphs are of a GPU")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_graph_captures_the_call(dtype: torch.dtype) -> None:
    student, teacher = (there(x) for x in pair(4, 40_000, dtype=dtype))
    weights = torch.full((4,), 0.25, device=student.device)

    def step() -> Tensor:
        loss = opd.fused_divergence(student, teacher, "jsd", mask=weights).sum()
        (student.grad,) = by_autograd(loss, student)
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    with torch.no_grad():
        student += 0.5 * teacher
    graph.replay()
    found, slope = loss.clone(), student.grad.clone()
    assert torch.equal(found, step()) and torch.equal(slope, student.grad)


def test_autocast_and_inference_mode_change_nothing() -> None:
    student, teacher = pair(4, 30, dtype=torch.float32)
    z, t = there(student), there(teacher)
    plain = opd.fused_divergence(z, t, "jsd")
    with torch.autocast(torch.device(DEVICE).type, dtype=torch.bfloat16):
        assert torch.equal(opd.fused_divergence(z, t, "jsd"), plain)
    with torch.inference_mode():
        assert torch.equal(opd.fused_divergence(z, t, "jsd"), plain)


FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled and capped": {"student_scale": 0.7, "student_softcap": 3.0, "teacher_softcap": 4.0},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("near", (None, 0.03))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", SOME)
def test_from_hidden_states(
    name: str, dtype: torch.dtype, near: float | None, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64 on the same rounded inputs, also near the teacher, where distillation ends."""
    if INTERPRETED:
        of_a_gpu(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 5, 16), (90, 16), (4, 5, 8), (90, 8), (90,))
    tensors = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    if near is not None:
        tensors[2:4] = tensors[0] + near * torch.randn(4, 5, 16, generator=generator), tensors[1].clone()
    tensors = [each.to(dtype) for each in tensors]
    mask = torch.ones(4, 5)
    mask[1, 2:] = 0.0
    slopes = []
    for device, width in ((DEVICE, dtype), ("cpu", torch.float64)):
        *moved, bias = (each.to(device, width).requires_grad_(i in (0, 1, 4)) for i, each in enumerate(tensors))
        biases = {"student_bias": bias, "teacher_bias": bias.detach()}
        loss = opd.fused_linear_divergence(*moved, name, mask=mask.to(device), chunk_size=3, **biases, **FORMS[form])
        slopes.append((loss, *by_autograd(loss, moved[0], moved[1], bias)))
    # All that is left of bfloat16 is the last rounding, to the dtype of the input, of at most 2^-8.
    bound = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2**-8}[dtype]
    for found, wanted in zip(*slopes, strict=True):
        gap = (found.detach().cpu().double() - wanted.detach()).norm()
        assert float(gap) <= bound * float(wanted.detach().norm()) + 1e-6 * (dtype != torch.float64)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_positions_that_programs_leave_are_done_once_more(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """An infinite bias makes one token impossible for the teacher: its reverse KL is infinite, and has no gradient."""
    if INTERPRETED:
        of_a_gpu(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    hidden, head, other, other_head = (torch.randn(*s, generator=generator).to(dtype) for s in ((6, 4), (9, 4)) * 2)
    never = torch.zeros(9, dtype=dtype)
    never[3] = -torch.inf
    found = []
    for device, width in ((DEVICE, dtype), ("cpu", torch.float64)):
        moved = [
            each.to(device, width).requires_grad_(i < 2) for i, each in enumerate((hidden, head, other, other_head))
        ]
        for name in ("reverse_kl", "skew_reverse_kl(lam=0.1)"):
            loss = opd.fused_linear_divergence(*moved, name, chunk_size=2, teacher_bias=never.to(device, width))
            found.append((loss.detach().cpu().double(), *(x.cpu().double() for x in by_autograd(loss, *moved[:2]))))
    for mine, theirs in zip(found[:2], found[2:], strict=True):
        assert torch.equal(mine[0].isinf(), theirs[0].isinf())
        for each, wanted in zip(mine[1:], theirs[1:], strict=True):
            assert float((each - wanted).norm()) <= 3e-3 * float(wanted.norm()) + 1e-6
    assert found[0][0].isinf().all() and not found[1][0].isinf().any()
    unusable = hidden.to(DEVICE).clone()
    unusable[2] = torch.nan
    with pytest.raises(InvalidArgumentError, match="1 of"):
        opd.fused_linear_divergence(unusable, *(x.to(DEVICE) for x in (head, other, other_head)), "jsd")


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("name", SOME)
def test_of_a_payload(name: str, dtype: torch.dtype) -> None:
    student, teacher = pair(3, 4, 60, dtype=dtype)
    logprobs, ids = torch.log_softmax(teacher.double(), -1).topk(5)
    slopes = []
    for device, width in ((DEVICE, dtype), ("cpu", torch.float64)):
        z = student.detach().to(device, width).requires_grad_()
        loss = opd.fused_top_k_divergence(z, ids.to(device), logprobs.to(device), name)
        slopes.append((loss, *by_autograd(loss, z)))
    for found, wanted in zip(*slopes, strict=True):
        assert worst(found, wanted) < BOUND[dtype]


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("name", SOME)
def test_over_the_ranks_of_a_group(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """With one GPU a group of one: the collectives of its backend, and no host memory in between."""
    backend = "nccl" if torch.device(DEVICE).type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        student, teacher = pair(3, 4, 60, dtype=dtype)
        z = there(student)
        loss = opd.fused_parallel_divergence(z, there(teacher), name)
        (slope,) = by_autograd(loss, z)
    finally:
        dist.destroy_process_group()
    wide = student.detach().double().requires_grad_()
    wanted = opd.fused_divergence(wide, teacher.double(), name)
    assert worst(loss, wanted) < BOUND[torch.float64 if dtype == torch.float64 else torch.float32]
    assert worst(slope, by_autograd(wanted, wide)[0]) < BOUND[dtype]


def batch(device: str) -> opd.Rollouts:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(9, (6, 4), generator=generator)
    student, teacher, behavior = (torch.randn(6, 4, 9, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = torch.ones(6, 4, dtype=torch.float64)
    mask[1, 2:] = mask[4, 3:] = 0.0
    drawn = torch.log_softmax(behavior, -1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1) * mask
    moved = [x.to(device) for x in (tokens, student, teacher, mask, drawn)]
    moved[1].requires_grad_()
    return opd.Rollouts.from_logits(*moved)


OPTIONS: dict[str, dict[str, Any]] = {
    "return_to_go": {"gamma": 0.9},
    "box_cox": {"alpha": 0.5},
    "power": {"alpha": 0.5},
    "constant_advantage": {"value": 1.0},
    **{name: {"k": 3} for name in opd.estimator_names() if name.startswith("topk")},
}


@pytest.mark.parametrize("name", opd.estimator_names())
def test_estimators(name: str) -> None:
    results = []
    for device in (DEVICE, "cpu"):
        rollouts = batch(device)
        loss = _built(name)(rollouts)
        results.append((loss, *by_autograd(loss, rollouts.student_logits)))
    for found, wanted in zip(*results, strict=True):
        assert worst(found, wanted) < BOUND[torch.float64]


def _built(name: str) -> Any:
    options = OPTIONS.get(name, {})
    try:
        return opd.estimator(name, "jsd", **options)
    except InvalidArgumentError:
        return opd.estimator(name, **options)


def test_rollouts_on_two_devices_are_refused() -> None:
    if torch.device(DEVICE).type == "cpu":
        pytest.skip("there is one device")
    here, other = batch("cpu"), batch(DEVICE)
    with pytest.raises(InvalidArgumentError, match="teacher_logits"):
        opd.Rollouts.from_logits(other.tokens, other.student_logits, here.teacher_logits)


def test_a_loss_that_runs_there_is_audited_here() -> None:
    student, teacher = (opd.TabularPolicy.random(3, 2, eos=0, seed=seed) for seed in (0, 1))
    loss = opd.estimator("opd_plus", "jsd")
    found = opd.expected_gradient(lambda rollouts: loss(rollouts.to(DEVICE)), student, teacher)
    for level, wanted in zip(found, opd.exact_gradient(student, teacher, "jsd"), strict=True):
        assert worst(level, wanted) < BOUND[torch.float64]
    assert opd.audit(lambda rollouts: loss(rollouts.to(DEVICE)), objective="jsd").verdict == "exact"
    assert opd.audit(lambda rollouts: -loss(rollouts.to(DEVICE)), objective="jsd").verdict == "biased"


def test_tables_elsewhere_are_refused() -> None:
    if torch.device(DEVICE).type == "cpu":
        pytest.skip("there is one device")
    level = opd.TabularPolicy.random(3, 1).logits[0]
    with pytest.raises(InvalidArgumentError, match=r"logits\[0\]: must be on the CPU, got cuda"):
        opd.TabularPolicy([level.to(DEVICE)])


def test_the_oracle_of_a_module() -> None:
    results = []
    for device in (DEVICE, "cpu"):
        modules = [model(seed).to(device) for seed in (0, 1)]
        size = TASK.vocabulary.size
        student, teacher = (opd.ModulePolicy(_Logits(module), size, 2, prompt=(1,)) for module in modules)
        results.append(opd.exact_gradient(student, teacher, "jsd", objective="token_return"))
    for found, wanted in zip(*results, strict=True):
        assert found.device.type == torch.device(DEVICE).type
        assert worst(found, wanted) < BOUND[torch.float64]


class _Logits(torch.nn.Module):
    """A language model's logits alone."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.inner.logits(tokens)
        return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.get("estimator", case.get("control"))))
def test_training_takes_the_same_steps(case: dict[str, Any]) -> None:
    """Random numbers are drawn on the CPU, so that a device changes rounding only."""
    states = []
    for device in (DEVICE, "cpu"):
        settings = config(**case, steps=3, device=device)
        states.append(train(settings, student=model(0), teacher=model(1, 24), task=TASK).student.state_dict())
    for name, wanted in states[1].items():
        assert worst(states[0][name], wanted) < 1e-9, name


def test_training_resumes_to_the_same_bits(tmp_path: Path) -> None:
    def trained(out: Path, *observers: Any) -> dict[str, Tensor]:
        settings = config(**GROUPED, device=DEVICE, out=str(out), dtype="float32", checkpoint_every=1)
        models = {"student": model(0).float(), "teacher": model(1, 24).float()}
        return train(settings, **models, task=TASK, observers=observers).student.state_dict()

    def stop(run: Any, step: int) -> dict[str, float]:
        if step == 4:
            raise KeyboardInterrupt
        return {}

    whole = trained(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "parts", stop)
    resumed = trained(tmp_path / "parts")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("name", ("opd", "opd_plus"))
def test_validation(name: str) -> None:
    student, teacher = model(0).to(DEVICE), model(1, 24).to(DEVICE)
    prompts = [TASK.vocabulary.encode("12+34="), TASK.vocabulary.encode("5+6=")]
    assert opd.validate(student, teacher, prompts, name, "jsd", max_new_tokens=6).verdict == "agree"
