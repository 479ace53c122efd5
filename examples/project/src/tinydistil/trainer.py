"""The trainer: samples from the student, scores with the teacher, steps."""

import torch
from torch import Tensor

from tinydistil.losses import distillation_loss

IGNORED = -100


def token_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities of the labels, `(B, T)`; whatever is at ignored labels is masked later."""
    tokens = labels.clamp(min=0).unsqueeze(-1)
    return logits.log_softmax(-1).gather(-1, tokens).squeeze(-1)


class DistillationTrainer:
    """Steps a student towards a teacher; both map tokens `(B, T)` to logits `(B, T, V)`."""

    def __init__(self, student: torch.nn.Module, teacher: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.student, self.teacher, self.optimizer = student, teacher, optimizer

    def compute_loss(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of sequences whose labels are -100 on prompts and padding; row n of logits scores token n + 1."""
        labels = labels[:, 1:]
        student = token_logprobs(student_logits[:, :-1], labels)
        teacher = token_logprobs(teacher_logits[:, :-1], labels)
        return distillation_loss(student, teacher, (labels != IGNORED).to(student))

    def step(self, tokens: Tensor, labels: Tensor) -> float:
        """One optimiser step on rollouts of the student; returns the loss."""
        with torch.no_grad():
            teacher_logits = self.teacher(tokens)
        loss = self.compute_loss(self.student(tokens), teacher_logits, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()
