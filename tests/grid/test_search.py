"""The greedy search, on effects that are known beforehand."""

import pytest

from lmplay.grid.search import search
from lmplay.run.design import design_of

BETTER = {"a": -0.3, "b": -0.2}


def join(stack, idea):
    if {idea, stack} == {"d", "a"}:
        return None
    return idea if stack == "gpt2ish" else f"{stack}+{idea}"


class KnownEffects:
    """Gives verdicts as if the ideas' effects simply added up; remembers what was asked for."""

    def __init__(self, effects):
        self.effects, self.asked = effects, []

    def loss(self, name):
        return 4.0 + sum(self.effects.get(idea, 0.0) for idea in name.split("+"))

    def __call__(self, names, design):
        self.asked.append((names, design))
        return [self.row(name, names[0]) for name in names]

    def row(self, name, baseline):
        difference = self.loss(name) - self.loss(baseline)
        words = {True: "better", False: "worse" if difference > 0 else "cannot tell"}
        return {
            "mean": self.loss(name),
            "difference": difference,
            "interval": None,
            "p_holm": None,
            "verdict": words[difference < -0.01],
            "seeds": 5,
            "marks": [],
        }


def taken(rounds):
    return [each["accepted"] for each in rounds]


def test_it_takes_the_best_idea_first_and_stops_where_none_is_better():
    rounds = list(search("gpt2ish", ["b", "c", "a"], design_of("5"), join, KnownEffects(BETTER)))

    assert taken(rounds) == ["a", "b", None]
    assert [each["stack"] for each in rounds] == ["gpt2ish", "a", "a+b"]
    assert [each["mean"] for each in rounds] == pytest.approx([4.0, 3.7, 3.5])


def test_it_ends_when_every_idea_is_taken():
    rounds = list(search("gpt2ish", ["a", "b"], design_of("5"), join, KnownEffects(BETTER)))

    assert taken(rounds) == ["a", "b"]


def test_every_round_has_fresh_seeds():
    known = KnownEffects(BETTER)
    list(search("gpt2ish", ["a", "b"], design_of("3+8", 4), join, known))

    assert [names for names, _ in known.asked] == [["gpt2ish", "a", "b"], ["a", "a+b"]]
    assert [design.seeds for _, design in known.asked] == [range(4, 15), range(15, 26)]
    assert all(design.seeds_text == "3+8" for _, design in known.asked)


def test_an_idea_that_does_not_stack_is_named_and_not_trained():
    effects = BETTER | {"d": -0.25}
    known = KnownEffects(effects)
    rounds = list(search("gpt2ish", ["a", "d"], design_of("5"), join, known))

    assert taken(rounds) == ["a", None]
    assert [c["verdict"] for c in rounds[1]["candidates"]] == ["conflict"]
    assert all("+d" not in name for names, _ in known.asked for name in names)


def test_a_stack_that_is_refused_is_named_and_the_search_goes_on():
    known = KnownEffects(BETTER)

    def verdicts(names, design):
        rows = known(names, design)
        return [None if name == "a+b" else row for name, row in zip(names, rows, strict=True)]

    rounds = list(search("gpt2ish", ["a", "b", "c"], design_of("5"), join, verdicts))

    assert taken(rounds) == ["a", None]
    assert [c["verdict"] for c in rounds[1]["candidates"]] == ["refused", "cannot tell"]
