"""Texts to recall from: every question has one answer in its text, and a row holds one text."""

import pytest

from lmplay.data import sources as text
from lmplay.data.batches import open_data
from lmplay.data.recall import NUM_ASKED, NUM_PAIRS, TEXT_BYTES, recall_turns
from lmplay.data.sources import documents, expected_bytes, source_fingerprint
from lmplay.plan import Dataset
from lmplay.plan_file import read_plan

RECALL = Dataset(builtin="recall")


@pytest.mark.parametrize("number", [0, 7, 32_767])
def test_every_question_is_answered_by_the_pair_that_it_names(number):
    (first, _), *others = turns = recall_turns(number)
    pairs, colon, asked = first.partition(":")
    values = {pairs[i]: pairs[i + 1] for i in range(0, len(pairs), 2)}
    keys = [asked, *(prompt for prompt, _ in others)]

    assert colon and len(values) == len(set(values.values())) == NUM_PAIRS
    assert len(set(keys)) == NUM_ASKED
    assert [values[key] for key in keys] == [answer for _, answer in turns]


def test_texts_are_the_same_everywhere_and_no_two_alike():
    texts = ["".join(prompt + answer for prompt, answer in recall_turns(n)) for n in range(500)]

    assert len(set(texts)) == 500
    assert {len(t) for t in texts} == {TEXT_BYTES}
    assert texts[3].startswith(
        "jyXAZjGEszlFIspGmCHBdKueFaVboZDlTMvkxICqhNwDMJYortQWqXEdPutYkrRw:rt"
    )


def test_letters_and_what_they_stand_for_have_nothing_to_do_with_one_another():
    firsts = [recall_turns(n)[0] for n in range(2000)]
    same = sum(prompt[-1] == answer for prompt, answer in firsts)
    places = [prompt[: 2 * NUM_PAIRS : 2].index(prompt[-1]) for prompt, _ in firsts]

    assert same < 100  # one in 52 by chance
    assert abs(sum(places) / 2000 - (NUM_PAIRS - 1) / 2) < 1


def test_a_text_is_learned_where_it_answers_and_held_out_by_itself(monkeypatch):
    monkeypatch.setattr(text, "NUM_TEXTS", 400)
    sides = [list(documents(RECALL, split, 0.1)) for split in ("train", "validation")]
    parts = sides[0][0].parts(learn_prompt=False)

    assert sorted(d.row for side in sides for d in side) == list(range(400))
    assert 10 < len(sides[1]) < 90
    assert [is_on for _, is_on in parts] == [False, True] * NUM_ASKED
    assert "".join(part for part, _ in parts) == sides[0][0].text
    assert expected_bytes(RECALL) == 400 * TEXT_BYTES
    assert source_fingerprint(RECALL) != source_fingerprint(Dataset(builtin="python-stdlib"))


def test_a_row_of_the_plan_is_a_text_and_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "NUM_TEXTS", 200)
    monkeypatch.setenv("LMP_DATASETS", str(tmp_path))
    tokenizer, data = open_data(read_plan("recall"), 0, lambda note: None)
    batch = data.rows(0, 5)
    data.close()

    for tokens_T, targets_T in zip(batch.tokens_BT, batch.targets_BT, strict=True):
        scored = targets_T[targets_T >= 0].tolist()
        pairs = tokenizer.decode(tokens_T[1:65].tolist())
        assert len(pairs) == 64 and tokens_T[0] == tokenizer.end
        assert len(scored) == NUM_ASKED + 1 and scored[-1] == tokenizer.end
