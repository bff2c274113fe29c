"""Texts to recall from: every question has one answer in its text, and a row holds one text."""

import pytest

from lmplay.data import sources as text
from lmplay.data.batches import open_data
from lmplay.data.recall import FEWEST, NUM_PAIRS, TEXT_BYTES, recall_turns
from lmplay.data.sources import documents, expected_bytes, source_fingerprint
from lmplay.plan import Dataset
from lmplay.plan_file import read_plan

RECALL = Dataset(builtin="recall")


def text_of(number: int) -> str:
    return "".join(prompt + answer for prompt, answer in recall_turns(number))


@pytest.mark.parametrize("number", [0, 3, 7, 65_535])
def test_every_letter_named_before_is_a_question_and_has_the_answer_it_had(number):
    values: dict[str, str] = {}
    expected = []
    for letter, value in zip(text_of(number)[1::2], text_of(number)[2::2], strict=True):
        expected += [value] if letter in values else []
        assert values.setdefault(letter, value) == value

    assert [answer for _, answer in recall_turns(number)] == expected
    assert "".join(values).islower() and "".join(values.values()).isupper()
    assert len(set(values.values())) == len(values)


def test_texts_are_the_same_everywhere_and_no_two_alike():
    texts = [text_of(number) for number in range(500)]

    assert len(set(texts)) == 500
    assert {len(t) for t in texts} == {TEXT_BYTES}
    assert texts[3].startswith(":pUpUrIpUpUrIrIrIpUrIrIpUpUrI")


def test_texts_have_few_letters_and_many_and_a_guess_among_their_values_is_one_in_seven():
    num_letters, guesses = [], []
    for number in range(3000):
        named = text_of(number)[1::2]
        num_letters.append(len(set(named)))
        guesses += [1 / len(set(named[:i])) for i in range(NUM_PAIRS) if named[i] in named[:i]]

    assert (min(num_letters), max(num_letters)) == (FEWEST, 26)
    assert sum(num_letters) / 3000 == pytest.approx(13.3, abs=0.4)  # 26 are seldom all drawn
    assert sum(guesses) / len(guesses) == pytest.approx(0.143, abs=0.003)


def test_letters_and_what_they_stand_for_have_nothing_to_do_with_one_another():
    pairs = [text_of(number)[1:3] for number in range(2000)]
    same = sum(pair[0].upper() == pair[1] for pair in pairs)

    assert same < 120  # one in 26 by chance
    assert len({pair[0] for pair in pairs}) == len({pair[1] for pair in pairs}) == 26


def test_a_text_is_learned_where_it_answers_and_held_out_by_itself(monkeypatch):
    monkeypatch.setattr(text, "NUM_TEXTS", 400)
    sides = [list(documents(RECALL, split, 0.1)) for split in ("train", "validation")]
    parts = sides[0][0].parts(learn_prompt=False)

    assert sorted(d.row for side in sides for d in side) == list(range(400))
    assert 10 < len(sides[1]) < 90
    assert [is_on for _, is_on in parts] == [False, True] * (len(parts) // 2)
    assert "".join(part for part, _ in parts) == sides[0][0].text
    assert not any(document.learn_end for side in sides for document in side)
    assert expected_bytes(RECALL) == 400 * TEXT_BYTES
    assert source_fingerprint(RECALL) != source_fingerprint(Dataset(builtin="python-stdlib"))


def test_a_row_of_the_plan_is_a_text_of_which_the_answers_alone_are_scored(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "NUM_TEXTS", 200)
    monkeypatch.setenv("LMP_DATASETS", str(tmp_path))
    tokenizer, data = open_data(read_plan("recall"), 0, lambda note: None)
    batch = data.rows(0, 5)
    data.close()

    for tokens_T, targets_T in zip(batch.tokens_BT, batch.targets_BT, strict=True):
        row = tokenizer.decode(tokens_T[1:].tolist())
        asked = [i for i in range(1, TEXT_BYTES, 2) if row[i] in row[1:i:2]]
        scored_T = targets_T >= 0
        assert tokens_T[0] == tokenizer.end and len(row) == TEXT_BYTES
        assert [i - 1 for i in scored_T.nonzero().flatten().tolist()] == asked
        assert tokenizer.decode(targets_T[scored_T].tolist()) == "".join(row[i + 1] for i in asked)
