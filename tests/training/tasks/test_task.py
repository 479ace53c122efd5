"""Tasks: exact verifiers, splits that share no problem, demonstrations that the verifier accepts."""

from __future__ import annotations

import random
import re
from fractions import Fraction

import pytest
import torch

from opdtheory.errors import BudgetExceededError, InvalidArgumentError
from opdtheory.training.models.samples import Samples
from opdtheory.training.tasks import TASKS, Addition, Calculator, Example, Modular, Task, Tools, split_of, task

VARIANTS = [Addition(), Addition(2), Tools(), Tools(2), Tools(4), Modular(), Modular(3)]
each_task = pytest.mark.parametrize("subject", VARIANTS, ids=lambda subject: subject.name)


def truth(example: Example) -> str:
    """The answer by another road: Python's own arithmetic."""
    if "?" not in example.prompt:
        text = re.sub(r"\b0+(?=\d)", "", example.prompt[:-1])
        value = str(eval(text))  # noqa: S307
        return value.zfill(len(example.answer)) if "+" in text and example.answer.startswith("0") else value
    body, asked = example.prompt.split("?")
    values: dict[str, Fraction] = {}
    lines = [line for line in body.split(".")]
    for _ in lines:
        for line in lines:
            try:
                values[line[0]] = Fraction(eval(line[1:], {}, values))  # noqa: S307
            except NameError:
                continue
    return str(values[asked] % 10)


def written(subject: Task, example: Example, seed: int = 0) -> str:
    return "".join(text for text, _ in subject.demonstration(example, random.Random(seed)))


# --- splits ----------------------------------------------------------------------------------------------------


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


# --- verifiers -------------------------------------------------------------------------------------------------


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


def test_the_columns_of_a_sum_are_right():
    subject = Addition(4)
    for example in subject.examples("train", 50, 5):
        columns, answer = written(subject, example).split("=")
        parts = {columns[start]: columns[start + 1 : start + 6] for start in range(0, len(columns), 6)}
        assert sorted(parts) == list("abcd")
        for letter, (one, other, carry, tens, units) in parts.items():
            assert int(one) + int(other) + int(carry) == 10 * int(tens) + int(units)
            assert units == answer[::-1]["abcd".index(letter)]


def test_modular_steps_use_only_what_is_known():
    subject = Modular()
    for example in subject.examples("train", 80, 5):
        steps, answer = written(subject, example).split("=")
        parts = [steps[start : start + 5] for start in range(0, len(steps), 5)]
        values = {}
        for name, one, sign, other, value in parts:
            line = next(line for line in example.prompt.split("?")[0].split(".") if line[0] == name)
            digits = [operand if operand.isdigit() else values[operand] for operand in (line[1], line[3])]
            assert sign == line[2]
            assert [one, other] == digits or (sign != "-" and [other, one] == digits)
            assert eval(f"{one}{sign}{other}") % 10 == int(value)  # noqa: S307
            values[name] = value
        assert values[example.prompt[-1]] == answer and len(values) == 5


# --- the environment -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terms", [2, 3, 4])
def test_the_calculator_says_what_demonstrations_show(terms):
    subject = Tools(terms)
    for number, example in enumerate(subject.examples("train", 60, 2)):
        text, calls = example.prompt, 0
        for piece, policy in subject.demonstration(example, random.Random(number)):
            if not policy:
                assert subject.environment.reply(text) == piece
                calls += 1
            text += piece
        assert calls == terms - 1
        # The last call's result is the answer, and no call has another value than Python gives it.
        results = re.findall(r"\[([^]]*)\](-?\d+);", text)
        assert results[-1][1] == example.answer
        assert all(eval(call) == int(result) for call, result in results)  # noqa: S307


@pytest.mark.parametrize(
    ("text", "reply"),
    [
        ("1+2=[3*4]", "12;"),
        ("1+2=[-3--4]", "1;"),
        ("1+2=[3*4]12;[12-20]", "-8;"),
        ("[3*4", None),
        ("3*4]", None),
        ("[1+1]]", None),
        ("[]", "?;"),
        ("[3]", "?;"),
        ("[3*4*5]", "?;"),
        ("[[3*4]", "12;"),
        ("[3/4]", "?;"),
        ("[1234567*1]", "?;"),
    ],
)
def test_the_calculators_grammar(text, reply):
    assert Calculator().reply(text) == reply


def test_several_calls_in_an_episode_are_answered_while_sampling():
    """A scripted policy: the loop inserts each result, and the rest of the script goes on after it."""
    from opdtheory.training.models.transformer import Transformer, TransformerConfig

    subject = Tools()
    example = Example("12+7*35=", "257", "12+7*35")
    script = subject.vocabulary.encode("[7*35]") + [*subject.vocabulary.encode("[245+12]=257"), 0]

    class Script(Transformer):
        said = 0

        def _say(self, logits):
            logits = torch.full_like(logits, -20.0)
            logits[:, script[min(self.said, len(script) - 1)]] = 20.0
            return logits

        def prefill(self, tokens, mask, capacity):
            logits, cache = super().prefill(tokens, mask, capacity)
            self.written = 0
            return self._say(logits), cache

        def decode(self, tokens, cache):
            logits = super().decode(tokens, cache)
            # The environment's tokens are read too, but do not move the script on.
            self.said += int(tokens[0]) == script[self.said]
            return self._say(logits)

    model = Script(TransformerConfig(8, 1, 1, 60), subject.vocabulary)
    samples = model.sample(
        [subject.vocabulary.encode(example.prompt)], max_new_tokens=40, greedy=True, environment=subject.environment
    )
    assert samples.texts(subject.vocabulary) == ["[7*35]245;[245+12]257;=257"]
    own = "".join("1" if mark else "0" for mark in samples.mask[0].tolist())
    assert own == "1" * 6 + "0" * 4 + "1" * 8 + "0" * 4 + "1" * 5
    assert subject.correct([example], samples) == [True]


# --- grading ---------------------------------------------------------------------------------------------------


def test_a_response_that_was_cut_off_is_not_right():
    subject = Addition(2)
    example = subject.examples("train", 1, 0)[0]
    tokens = torch.tensor([subject.vocabulary.encode("=" + example.answer) + [0]])
    ones = torch.ones(tokens.shape)
    for ended in (True, False):
        marks = ones if ended else torch.tensor([[1.0] * (tokens.shape[1] - 1) + [0.0]])
        samples = Samples(tokens, ones, tokens, marks, marks, ones, torch.tensor([ended]))
        assert subject.correct([example], samples) == [ended]


def test_tasks_have_names():
    assert [task(name).name for name in TASKS] == list(TASKS) == ["arithmetic", "tools", "modular"]
    with pytest.raises(InvalidArgumentError, match="task: is 'poetry'; one of arithmetic, tools, modular"):
        task("poetry")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Addition(1), "digits: is 1"),
        (lambda: Tools(5), "terms: is 5"),
        (lambda: Modular(11), "variables: is 11"),
        (lambda: Addition().examples("validation", 1, 0), "split: is 'validation'"),
        (lambda: Addition().examples("test", -1, 0), "count: is -1"),
    ],
)
@pytest.mark.bad_input
def test_what_is_no_task_is_refused(call, message):
    with pytest.raises(InvalidArgumentError, match=message):
        call()
