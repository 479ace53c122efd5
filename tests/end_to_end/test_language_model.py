"""The exactly known language model is the table that it says it is, however it is asked."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opdtheory.end_to_end import trainer_pair
from opdtheory.end_to_end.language_model import TabularForCausalLM
from opdtheory.end_to_end.prefix_rows import PrefixRows
from opdtheory.errors import InvalidArgumentError
from tests.tolerances import ALGEBRA

PAIR = trainer_pair(prompts=("a", "ba"), horizon=2)
MODEL, END, PAD = PAIR.student, PAIR.tokenizer.eos_token_id, PAIR.tokenizer.pad_token_id
TEXTS = st.lists(st.integers(0, MODEL.config.vocab_size - 1), min_size=1, max_size=4)


def expected(texts: list[list[int]]) -> list[torch.Tensor]:
    """The rows by the base-V numbers of the prefixes."""
    table, rows = MODEL.model.table, MODEL.model.rows
    return [torch.stack([table[rows.row(text[: n + 1])] for n in range(len(text))]) for text in texts]


def padded(texts: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, texts))
    left = [width - len(text) if side == "left" else 0 for text in texts]
    ids = torch.full((len(texts), width), PAD)
    mask = torch.zeros_like(ids)
    for row, (text, at) in enumerate(zip(texts, left, strict=True)):
        ids[row, at : at + len(text)] = torch.tensor(text)
        mask[row, at : at + len(text)] = 1
    return ids, mask


@settings(max_examples=40, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=3), st.sampled_from(["left", "right"]), st.booleans())
def test_padding_is_not_read(texts: list[list[int]], side: str, four: bool) -> None:
    ids, mask = padded(texts, side)
    given_mask = mask
    if four:  # as a trainer that makes its own
        causal = torch.tril(torch.ones(ids.shape[1], ids.shape[1])).bool()
        given_mask = (causal & (mask[:, None, :] > 0))[:, None]
    logits = MODEL(ids, attention_mask=given_mask).logits
    for row, rows in enumerate(expected(texts)):
        assert torch.equal(logits[row][mask[row] > 0], rows)
    added = MODEL(ids, attention_mask=torch.where(given_mask > 0, 0.0, -1e30)).logits if four else logits
    assert torch.equal(added, logits)


@settings(max_examples=30, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=3))
def test_packed_documents_do_not_read_each_other(texts: list[list[int]]) -> None:
    ids = torch.tensor([list(itertools.chain(*texts))])
    positions = torch.tensor([list(itertools.chain(*(range(len(text)) for text in texts)))])
    assert torch.equal(MODEL(ids, position_ids=positions).logits[0], torch.cat(expected(texts)))


@settings(max_examples=20, deadline=None)
@given(TEXTS, st.integers(1, 3))
def test_a_cache_changes_nothing(text: list[int], first: int) -> None:
    ids = torch.tensor([text])
    whole = MODEL(ids).logits
    begun = MODEL(ids[:, :first], use_cache=True)
    parts = [begun.logits]
    for at in range(first, len(text)):
        parts.append(MODEL(ids[:, at : at + 1], past_key_values=begun.past_key_values, use_cache=True).logits)
    assert torch.equal(torch.cat(parts, 1), whole)
    assert torch.equal(MODEL(ids, logits_to_keep=1).logits, whole[:, -1:])


@pytest.mark.parametrize("cached", [True, False])
def test_generated_answers_have_the_probabilities_of_the_policy(cached: bool) -> None:
    count = 4_000
    ids, mask = padded([[2], [3, 2]], "left")
    torch.manual_seed(0)
    out = MODEL.generate(
        ids.repeat(count, 1),
        attention_mask=mask.repeat(count, 1),
        max_new_tokens=2,
        do_sample=True,
        top_k=0,
        use_cache=cached,
    )
    for row, prompt in enumerate(PAIR.prompt_tokens):
        policy = MODEL.policy(prompt, 2)
        first, second = (level.softmax(-1) for level in policy.logits)
        drawn = out[row::2, -2:]
        for one in range(MODEL.config.vocab_size):
            seen = (drawn[:, 0] == one).double().mean()
            assert abs(seen - first[0, one]) < 5 * (first[0, one] / count).sqrt() + 1e-9
            if one not in (END, PAD):
                both = ((drawn[:, 0] == one) & (drawn[:, 1] == 2)).double().mean()
                chance = first[0, one] * second[one, 2]
                assert abs(both - chance) < 5 * (chance / count).sqrt()


def test_gradients_land_in_the_rows_of_the_policy() -> None:
    prompt = PAIR.prompt_tokens[1]
    levels = [torch.randn_like(level) for level in MODEL.policy(prompt, 2).logits]
    placed = MODEL.place(levels, prompt)
    rows = MODEL.model.rows
    assert torch.equal(placed[rows.row(prompt)], levels[0][0])
    assert torch.equal(placed[rows.row([*prompt, 3])], levels[1][3])
    assert abs(float(placed.square().sum()) - sum(float(x.square().sum()) for x in levels)) < ALGEBRA
    assert float(torch.autograd.functional.jacobian(lambda t: t[rows.row(prompt)], MODEL.model.table).abs().sum()) == 4


def test_a_saved_model_is_the_same(tmp_path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    MODEL.save_pretrained(tmp_path)
    PAIR.tokenizer.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert isinstance(again, TabularForCausalLM)
    assert torch.equal(again.model.table, MODEL.model.table)
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert narrow.model.table.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(tmp_path).encode("ab") == [2, 3]


def test_the_chat_template_marks_what_the_assistant_wrote() -> None:
    row = PAIR.dataset[1]
    found = PAIR.tokenizer.apply_chat_template(
        row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert found["input_ids"] == [*PAIR.prompt_tokens[1], *PAIR.answer_tokens[1]]
    assert found["assistant_masks"] == [0, 0, 1, 1]


def test_every_prefix_has_one_row() -> None:
    rows = PrefixRows(3, 2)
    assert rows.count == 1 + 3 + 9 + 1
    assert [rows.row(rows.prefix(n)) for n in range(rows.count - 1)] == list(range(rows.count - 1))
    assert rows.prefix(rows.count - 1) is None
    assert rows.row([0, 1, 2]) == rows.count - 1


@pytest.mark.bad_input
def test_bad_input_is_named() -> None:
    with pytest.raises(InvalidArgumentError, match=r"must have shape \(batch, time\), got \(2, 1, 1\)"):
        MODEL(torch.zeros(2, 1, 1, dtype=torch.long))
    with pytest.raises(InvalidArgumentError, match="attention_mask"):
        MODEL(torch.zeros(1, 2, dtype=torch.long), attention_mask=torch.ones(1, 2, 2))
    with pytest.raises(InvalidArgumentError, match="longest: must be at least"):
        MODEL.policy([2, 2, 2], 9)
    for arguments, message in (
        ({"prompts": ()}, "prompts"),
        ({"prompts": ("c",)}, "letters of 'ab'"),
        ({"answers": ("",)}, "answers"),
        ({"horizon": 0}, "horizon"),
        ({"batch_size": 0}, "batch_size"),
        ({"words": "aa"}, "different ASCII letters"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            trainer_pair(**arguments)
