"""The trainer steps."""

import torch
from tinydistil.trainer import DistillationTrainer


def test_a_step_changes_the_student():
    torch.manual_seed(0)
    student, teacher = (torch.nn.Sequential(torch.nn.Embedding(5, 8), torch.nn.Linear(8, 5)) for _ in range(2))
    before = student[1].weight.detach().clone()
    tokens = torch.randint(5, (2, 4))
    labels = tokens.clone()
    labels[:, 0] = -100
    DistillationTrainer(student, teacher, torch.optim.SGD(student.parameters(), lr=0.1)).step(tokens, labels)
    assert not torch.equal(student[1].weight, before)
