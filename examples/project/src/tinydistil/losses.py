"""The loss: policy gradient of the Jensen-Shannon divergence between student and teacher on the student's tokens."""

import math

import torch.nn.functional as F
from torch import Tensor

from opdtheory.testing import opd_loss


def advantage(log_u: Tensor) -> Tensor:
    """What a token is worth at the log-ratio `log u = log q - log p`: log((1 + u) / 2) / 2."""
    return (F.softplus(log_u) - math.log(2)) / 2


@opd_loss(call="f(r.student_logprobs, r.teacher_logprobs, r.mask)")
def distillation_loss(student_logprobs: Tensor, teacher_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Minus advantage times log-probability, a mean over the tokens of the batch; all arguments are `(B, T)`."""
    worth = advantage((teacher_logprobs - student_logprobs).detach())
    return -(worth * student_logprobs * mask).sum() / mask.sum()
