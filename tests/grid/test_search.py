"""The greedy search, on effects that are known beforehand."""

import pytest

from lmplay.grid.search import search

BETTER = {"a": -0.3, "b": -0.2}


def join(stack, idea):
    if {idea, stack} == {"d", "a"}:
        return None
    return idea if stack == "gpt2ish" else f"{stack}+{idea}"


class Bench:
    """Gives verdicts as if the ideas' effects simply added up; remembers what was asked for."""

    def __init__(self, effects, lucky=()):
        self.effects, self.lucky, self.asked = effects, lucky, []

    def loss(self, name):
        return 4.0 + sum(self.effects.get(idea, 0.0) for idea in name.split("+"))

    def __call__(self, names, seeds):
        self.asked.append((names, seeds))
        return [self.row(name, names[0], seeds) for name in names]

    def row(self, name, baseline, seeds):
        difference = self.loss(name) - self.loss(baseline)
        if name in self.lucky and seeds.start == 0:
            difference = -1.0
        words = {True: "better", False: "worse" if difference > 0 else "cannot tell"}
        return {
            "mean": self.loss(name),
            "difference": difference,
            "interval": None,
            "p_holm": None,
            "verdict": words[difference < -0.01],
            "seeds": len(seeds),
            "marks": [],
        }


def taken(rounds):
    return [each["accepted"] for each in rounds]


def test_it_takes_the_best_idea_first_and_stops_where_none_is_better():
    rounds = list(search("gpt2ish", ["b", "c", "a"], range(5), join, Bench(BETTER)))

    assert taken(rounds) == ["a", "b", None]
    assert [each["stack"] for each in rounds] == ["gpt2ish", "a", "a+b"]
    assert [each["mean"] for each in rounds] == pytest.approx([4.0, 3.7, 3.5])


def test_it_ends_when_every_idea_is_taken():
    rounds = list(search("gpt2ish", ["a", "b"], range(5), join, Bench(BETTER)))

    assert taken(rounds) == ["a", "b"]


def test_a_winner_has_to_win_again_on_as_many_fresh_seeds():
    bench = Bench(BETTER)
    list(search("gpt2ish", ["a"], range(3, 8), join, bench))

    assert bench.asked == [(["gpt2ish", "a"], range(3, 8)), (["gpt2ish", "a"], range(8, 13))]


def test_a_lucky_winner_is_left_and_the_next_best_idea_has_its_turn():
    rounds = list(search("gpt2ish", ["c", "b"], range(5), join, Bench(BETTER, lucky=["c"])))
    first = {candidate["name"]: candidate for candidate in rounds[0]["candidates"]}

    assert taken(rounds)[0] == "b"
    assert first["c"]["verdict"] == "better" and first["c"]["confirmed"] is False
    assert first["b"]["confirmed"] is True


def test_an_idea_that_does_not_stack_is_named_and_not_trained():
    effects = BETTER | {"d": -0.25}
    bench = Bench(effects)
    rounds = list(search("gpt2ish", ["a", "d"], range(5), join, bench))

    assert taken(rounds) == ["a", None]
    assert [c["verdict"] for c in rounds[1]["candidates"]] == ["conflict"]
    assert all("+d" not in name for names, _ in bench.asked for name in names)
