"""Calculator calls, in demonstrations and while sampling."""

from __future__ import annotations

import random
import re

import pytest
import torch

from opdtheory.training.tasks import Calculator, Example, Tools


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
