r"""The divergence of next-token distributions from hidden states and output layers, without the logits of a batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from opdtheory.divergences import Divergence
from opdtheory.divergences import divergence as as_divergence
from opdtheory.errors import InvalidArgumentError
from opdtheory.kernels import arguments
from opdtheory.kernels.attached import graph_is_kept, last, outside_graphs
from opdtheory.kernels.distributions import default_rows
from opdtheory.kernels.heads import HeadForm, check_bias, head_form
from opdtheory.kernels.layers import Layer, Sums, Tensors, check_lora
from opdtheory.kernels.products import Halves, autocast_dtype, chunk_rows, wide_dtype
from opdtheory.kernels.sweep import Evaluator, any_left, can_split, sweep, sweep_once

__all__ = ["fused_linear_divergence"]


@outside_graphs
def fused_linear_divergence(
    student_hidden: Float[Tensor, "*batch D"],
    student_head: Float[Tensor, "V D"],
    teacher_hidden: Float[Tensor, "*batch E"],
    teacher_head: Float[Tensor, "V E"],
    divergence: str | Divergence,
    mask: Shaped[Tensor, "*batch"] | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    *,
    student_bias: Float[Tensor, " V"] | None = None,
    teacher_bias: Float[Tensor, " V"] | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    entropy: Float[Tensor, "*batch"] | None = None,
    student_lora: tuple[Float[Tensor, "r D"], Float[Tensor, "V r"], float] | None = None,
    teacher_lora: tuple[Float[Tensor, "k E"], Float[Tensor, "V k"], float] | None = None,
) -> Float[Tensor, "*batch"]:
    r"""`fused_divergence` of the logits $z = W h$, of which only a chunk of positions is held at a time.

    $$\ell_n = m_n D_f(q_n \| p_n), \qquad
    \frac{\partial \ell}{\partial h_n} = W^\top g_n, \quad
    \frac{\partial \ell}{\partial W} = \sum_n g_n h_n^\top, \quad
    g_n = -\frac{m_n}{\tau}\, p_n (w_f(u_n) - E_{p_n} w_f)$$

    In nats, to be minimised; the teacher is detached. The forward pass computes the gradients in the hidden states and
    the head together with the values, and holds these gradients and two chunks of logits of at most 268 MB together,
    671 MB on a GPU (unless `chunk_size` says otherwise, or one position has more), half as much again with a soft-cap,
    and a few buffers; the backward pass copies the gradients if the graph is kept (`retain_graph`). They assume that
    the upstream gradient is the same at all positions of non-zero weight, as for a sum or a mean; for others the
    backward pass repeats the work. What does not require a gradient costs none: a frozen head is only multiplied.

    Hidden states and heads enter in their own dtype (under autocast, that of autocast). Logits, $g$ and sums are
    float32 where that is bfloat16 or float16, with up to 4 million entries of a head in float32 at a time, so that a
    gradient is rounded once, at the end, and one of float16 after a loss scale from upstream; with a float64 head
    everything is float64. First derivatives only; no `torch.vmap`.

    With `student_lora` and `teacher_lora`, $z = W h + \gamma B (A h)$, as in an adapter of PEFT without dropout;
    $W + \gamma B A$ is never made. $A$ and $B$ are held in the dtype of the logits, and the student's get gradients.

    Args:
        student_hidden: $h$, with any leading shape.
        student_head: $W$, the weight of `torch.nn.Linear(D, V, bias=False)`, of the same dtype.
        teacher_hidden: the teacher's hidden states, of the same leading shape, maybe of another width.
        teacher_head: the teacher's output layer.
        divergence: an object or a catalogue name.
        mask: a weight for each position; where it is zero, nothing is computed.
        temperature: $\tau$, which divides both logits.
        chunk_size: the number of positions at a time (default: 220 of 151,936 words in float32).
        student_bias: $b$ of a head with a bias, $z = W h + b$; it gets its gradient.
        teacher_bias: the teacher's, detached.
        student_scale: $s$, which multiplies $W h + b$.
        teacher_scale: the teacher's.
        student_softcap: $c$ of soft-capped logits, $z = c \tanh(s (W h + b) / c)$.
        teacher_softcap: the teacher's.
        entropy: overwritten with the student's entropy in nats at each position, zero where the mask is.
        student_lora: $(A, B, \gamma)$, the weights `lora_A` and `lora_B` and the scaling of an adapter on the head, of
            the hidden states' dtype or float32.
        teacher_lora: the teacher's, detached.

    Returns:
        $\ell$, float64 if a head is, else float32.

    Raises:
        InvalidArgumentError: a shape, dtype or number does not fit, or a logit is NaN or +inf.

    References: T1 and T12 of the theory.

    Example:
        >>> import torch
        >>> hidden = torch.tensor([[1.0, 2.0]], requires_grad=True)
        >>> head, teacher_head = torch.eye(3, 2), torch.ones(3, 2)
        >>> loss = fused_linear_divergence(hidden, head, torch.ones(1, 2), teacher_head, "reverse_kl")
        >>> loss.sum().backward()
        >>> hidden.grad
        tensor([[-0.1408,  0.2826]])
    """
    _check(student_hidden, student_head, "student")
    _check(teacher_hidden, teacher_head, "teacher")
    batch = tuple(student_hidden.shape[:-1])
    if tuple(teacher_hidden.shape[:-1]) != batch:
        found = tuple(teacher_hidden.shape)
        raise InvalidArgumentError("teacher_hidden", f"must have shape {(*batch, 'E')} for the student's, got {found}")
    if teacher_head.shape[0] != student_head.shape[0]:
        raise InvalidArgumentError(
            "teacher_head",
            f"must have the {student_head.shape[0]} rows of the student's vocabulary, got {teacher_head.shape[0]}",
        )
    arguments.check_device("teacher_hidden", teacher_hidden, "the student's", student_hidden.device)
    check_bias("student", student_bias, student_head)
    check_bias("teacher", teacher_bias, teacher_head)
    *ours, our_scaling = check_lora("student", student_lora, student_hidden, student_head)
    *theirs, their_scaling = check_lora("teacher", teacher_lora, teacher_hidden, teacher_head)
    forms = (head_form("student", student_scale, student_softcap), head_form("teacher", teacher_scale, teacher_softcap))
    if entropy is not None:
        arguments.check_matching("entropy", entropy, "the batch", student_hidden[..., 0])
    _, weights = arguments.shared(student_hidden, mask, temperature, chunk_size, student_head, teacher_head)
    arguments.check_weights(weights)
    student = Tensors(student_hidden, student_head, student_bias, *ours)
    teacher = Tensors(teacher_hidden, teacher_head, teacher_bias, *theirs).detached()
    recorded = torch.is_grad_enabled()
    wanted = tuple(recorded and each is not None and each.requires_grad for each in student)
    scalings = (our_scaling, their_scaling)
    cast = autocast_dtype(student_head.device.type)
    job = _Job(as_divergence(divergence), float(temperature), chunk_size, cast, wanted, forms, scalings)
    values: Tensor = _Linear.apply(job, weights, entropy, *student, *teacher)
    return values


class _Job(NamedTuple):
    """The arguments of a call other than tensors, and the dtype of autocast, which may be off in a backward pass."""

    divergence: Divergence
    temperature: float
    chunk_size: int | None
    cast: torch.dtype | None
    wanted: tuple[bool, ...]
    forms: tuple[HeadForm, HeadForm]
    scalings: tuple[float, float]


_COUNT = len(Tensors._fields)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, job: _Job, weights: Tensor | None, entropy: Tensor | None, *tensors: Tensor | None) -> Tensor:
        student, teacher = Tensors(*tensors[:_COUNT]), Tensors(*tensors[_COUNT:])  # type: ignore[arg-type]
        values, found = _work(student, teacher, weights, job, entropy)
        ctx.save_for_backward(weights, *tensors, *found)
        ctx.job = job
        return values.to(arguments.sum_dtype(student.head, teacher.head))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        weights, *saved = ctx.saved_tensors
        student, teacher, found = Tensors(*saved[:_COUNT]), Tensors(*saved[_COUNT : 2 * _COUNT]), saved[2 * _COUNT :]
        with torch.no_grad():
            factors = upstream if weights is None else upstream[weights != 0]
            first = factors.flatten()[0] if factors.numel() else factors.new_ones(())
            if bool((factors != first).any()):
                weights = upstream if weights is None else upstream * weights
                found = _work(student, teacher, weights, ctx.job)[1]
            elif graph_is_kept():
                # What is handed out may be overwritten, and another backward pass may follow.
                found = [each if each is None else each * first for each in found]
            elif bool(first != 1):
                found = [each if each is None else each.mul_(first) for each in found]
            found = [
                None if each is None or tensor is None else each.to(tensor.dtype)
                for each, tensor in zip(found, student, strict=True)
            ]
        sources = [each for each in (upstream, *student) if each is not None]
        slopes = [None if each is None else last("fused_linear_divergence", each, *sources) for each in found]
        return None, None, None, *slopes, *[None] * _COUNT


def _work(
    student: Tensors, teacher: Tensors, weights: Tensor | None, job: _Job, entropy: Tensor | None = None
) -> tuple[Tensor, list[Tensor | None]]:
    """Values `(...)`, and the gradients of their weighted sum in the student's tensors, where wanted."""
    evaluator = Evaluator.of(job.divergence, arguments.sum_dtype(student.head, teacher.head), 1.0 / job.temperature)
    with torch.autocast(student.hidden.device.type, enabled=False):
        run = _Run(student, teacher, weights, job, entropy is not None)
        count = student.hidden[..., 0].numel()
        looked = (
            torch.arange(count, device=student.hidden.device) if weights is None else weights.flatten().nonzero()[:, 0]
        )
        left = run.over(looked, evaluator)
        if len(left):
            run.over(left, evaluator.exact())
        if entropy is not None:
            entropy.copy_(run.entropies.view(entropy.shape))
        return run.values.view(student.hidden.shape[:-1]), list(run.sums.rounded())


class _Run:
    """The values and the sums of gradients of a call."""

    def __init__(self, student: Tensors, teacher: Tensors, weights: Tensor | None, job: _Job, entropies: bool) -> None:
        hidden, head = student.hidden, student.head
        self._job, self._wide = job, wide_dtype(job.cast or head.dtype)
        self._ours, self._theirs = (
            Layer.of(*each, job.cast, self._wide)
            for each in zip((student, teacher), job.forms, job.scalings, strict=True)
        )
        self._weights = None if weights is None else weights.flatten()
        self._rows = job.chunk_size or chunk_rows(len(head), self._wide, head.device)
        self.values = torch.zeros(hidden[..., 0].numel(), dtype=torch.float64, device=hidden.device)
        self.entropies = torch.zeros_like(self.values) if entropies else self.values[:0]
        self.sums = Sums(student, job.wanted, self._wide)

    def over(self, looked: Tensor, evaluator: Evaluator) -> Tensor:
        """Some positions, a chunk at a time; returns those that are left to do, after one wait for the device."""
        if not len(looked):
            return looked
        shape = min(self._rows, len(looked)), len(self._ours.head)
        logits = [torch.empty(*shape, dtype=self._wide, device=looked.device) for _ in range(2)]
        parts = looked.split(self._rows)
        # The gradient takes the place of the logits.
        found = [self._chunk(part, evaluator, *(each[: len(part)] for each in logits)) for part in parts]
        asked = [each for each in found if each is not None]
        if not asked or not any_left(*(state for state, _ in asked)):
            return looked[:0]
        return looked[torch.cat([left for _, left in asked])]

    def _chunk(self, part: Tensor, evaluator: Evaluator, z: Tensor, other: Tensor) -> tuple[Tensor, Tensor] | None:
        ours, form, wanted = self._ours, self._ours.form, any(self._job.wanted)
        ours.logits(part, z)
        self._theirs.logits(part, other)
        if len(self.entropies):
            self.entropies[part] = _entropy(z, self._job.temperature)
        kept = form.keep(z) if wanted else None
        weight = None if self._weights is None else self._weights[part]
        found = torch.empty(len(part), dtype=torch.float64, device=z.device)
        gradient: Tensor | Halves = z
        left = None
        if not evaluator.has_programs(z.device):
            sweep(evaluator, z, other, weight, None, found, z if wanted else None)
        elif wanted and ours.takes_halves() and can_split(z):
            gradient = Halves.of(z)
            high = gradient.rows.unflatten(0, (-1, 2))[:, 0]
            left = sweep_once(evaluator, z, other, weight, found, high, rest=z.shape[1])
        else:
            left = sweep_once(evaluator, z, other, weight, found, z if wanted else None)
        self.values[part] = found
        if wanted:
            if isinstance(gradient, Tensor):
                form.pull_back(gradient, kept)
            self.sums.add(ours, part, gradient, other)
        return left


def _entropy(logits: Tensor, temperature: float) -> Tensor:
    r"""$-\sum_a p_a \log p_a$ of each row, with a few rows in buffers at a time."""
    found = torch.empty(len(logits), dtype=torch.float64, device=logits.device)
    rows = default_rows(logits.shape[-1], logits.device)
    for some, out in zip(logits.split(rows), found.split(rows), strict=True):
        scaled = some / temperature
        total = scaled.logsumexp(-1)
        # A token of probability zero counts nothing.
        out.copy_(total - (scaled - total.unsqueeze(-1)).exp_().mul_(scaled.nan_to_num_(neginf=0.0)).sum(-1))
    return found


def _check(hidden: object, head: object, whose: str) -> None:
    arguments.check_logits(f"{whose}_hidden", hidden)
    arguments.check_logits(f"{whose}_head", head)
    assert isinstance(hidden, Tensor) and isinstance(head, Tensor)
    if head.ndim != 2 or head.shape[0] == 0 or head.shape[1] != hidden.shape[-1]:
        raise InvalidArgumentError(
            f"{whose}_head", f"must have shape (V, {hidden.shape[-1]}) for {whose}_hidden, got {tuple(head.shape)}"
        )
    if head.dtype != hidden.dtype and not torch.is_autocast_enabled(head.device.type):
        raise InvalidArgumentError(
            f"{whose}_head", f"must have dtype {hidden.dtype} like {whose}_hidden, got {head.dtype}"
        )
    arguments.check_device(f"{whose}_head", head, f"{whose}_hidden", hidden.device)
