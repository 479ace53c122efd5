"""Every task: splits that share no problem, exact verifiers, demonstrations that they accept."""

from __future__ import annotations

import random

import pytest
import torch

from opdtheory.errors import BudgetExceededError, InvalidArgumentError
from opdtheory.training.models.samples import Samples
from opdtheory.training.tasks import Addition, Modular, Tools, split_of
from tests.training.tasks.written import each_task, truth, written


@each_task
def test_splits_share_no_problem_whatever_the_seeds(subject):
    count = 40 if subject.name in ("modular-3", "tools-2") else 120
    train = {e.problem for seed in range(4) for e in subject.examples("train", count, seed)}
    test = {e.problem for seed in range(4) for e in subject.examples("test", count, seed)}
    assert not train & test and len(train) > 2 * count
    assert all(split_of(subject.name, problem) == "train" for problem in train)
    assert all(split_of(subject.name, problem) == "test" for problem in test)


def test_one_problem_has_one_split_however_it_is_posed():
    subject = Addition(2)
    drawn = [subject.draw(random.Random(seed)) for seed in range(4000)]
    prompts: dict[str, set[str]] = {}
    for example in drawn:
        prompts.setdefault(example.problem, set()).add(example.prompt)
    swapped = [both for both in prompts.values() if len(both) == 2]
    assert len(swapped) > 100
    for one, other in (sorted(both) for both in swapped):
        assert one[:-1].split("+") == other[:-1].split("+")[::-1]
    # The twin that hashes the prompt would put some of these on both sides.
    assert any(len({split_of(subject.name, prompt) for prompt in both}) == 2 for both in swapped)


def test_the_test_split_is_an_eighth():
    share = sum(split_of("arithmetic", str(number)) == "test" for number in range(20_000)) / 20_000
    assert abs(share - 0.125) < 0.01


@each_task
def test_examples_are_different_and_reproducible(subject):
    one, same, other = (subject.examples("train", 60, seed) for seed in (7, 7, 8))
    assert one == same and one != other
    assert len({example.problem for example in one}) == 60


def test_a_split_that_is_used_up_is_refused():
    with pytest.raises(BudgetExceededError, match="a test set of the task arithmetic-2 needs 5,000, over"):
        Addition(2).examples("test", 5000, 0)


@each_task
def test_answers_and_demonstrations_are_right(subject):
    for number, example in enumerate(subject.examples("train", 80, 3)):
        assert example.answer == truth(example), example
        for seed in (number, number + 1000):
            response = written(subject, example, seed)
            assert subject.verify(example, response), (example, response)
            assert len(subject.vocabulary.encode(response)) < subject.max_response
        assert len(subject.vocabulary.encode(example.prompt)) <= subject.max_prompt


@each_task
def test_wrong_answers_are_refused(subject):
    examples = subject.examples("test", 40, 1)
    for example, other in zip(examples, examples[1:], strict=False):
        response = written(subject, example)
        digit = response[-1]
        wrong = [
            response[:-1] + str((int(digit) + 1) % 10),
            response + "0",
            response + "=" + example.answer,
            response[:-1],
            response.replace("=", ""),
            response + " ",
            "",
            "=",
            "=-" + example.answer.lstrip("-") if not example.answer.startswith("-") else "=" + example.answer[1:],
        ]
        accepted = [text for text in wrong if subject.verify(example, text)]
        assert not accepted, (example, accepted)
        if other.answer != example.answer:
            assert not subject.verify(other, response)


@each_task
def test_demonstrations_leave_a_choice(subject):
    """Where a problem can be worked out in several ways, all of them are shown."""
    seen = [
        len({written(subject, example, seed) for seed in range(30)}) for example in subject.examples("train", 20, 2)
    ]
    assert sum(number > 1 for number in seen) > 10


def test_a_response_that_was_cut_off_is_not_right():
    subject = Addition(2)
    example = subject.examples("train", 1, 0)[0]
    tokens = torch.tensor([subject.vocabulary.encode("=" + example.answer) + [0]])
    ones = torch.ones(tokens.shape)
    for ended in (True, False):
        marks = ones if ended else torch.tensor([[1.0] * (tokens.shape[1] - 1) + [0.0]])
        samples = Samples(tokens, ones, tokens, marks, marks, ones, torch.tensor([ended]))
        assert subject.correct([example], samples) == [ended]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Addition(1), r"digits: must be an integer in \[2, 8\], got 1"),
        (lambda: Tools(5), r"terms: must be an integer in \[2, 4\], got 5"),
        (lambda: Modular(11), r"variables: must be an integer in \[2, 10\], got 11"),
        (lambda: Addition().examples("validation", 1, 0), "split: must be 'train' or 'test', got 'validation'"),
        (lambda: Addition().examples("test", -1, 0), "count: must be at least 0, got -1"),
    ],
)
@pytest.mark.bad_input
def test_what_is_no_task_is_refused(call, message):
    with pytest.raises(InvalidArgumentError, match=message):
        call()
