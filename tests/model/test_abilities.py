import ast
from pathlib import Path

import pytest
from torch import nn

import lmplay
from lmplay.model import abilities

PACKAGE = Path(lmplay.__file__).parent
NAMES = {
    *("hidden", "head", "log_likelihood", "generate", "loss_terms", "training_loss", "at"),
    *("after_step", "parameter_groups", "fold", "unfold", "likelihood_draws"),
}
FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if p.name != "abilities.py"]


class Plain(nn.Module):
    def forward(self, tokens_BT):
        return tokens_BT


class Cached(nn.Module):
    def forward(self, tokens_BT, cache=None):
        return tokens_BT


class Hidden(Cached):
    def hidden(self, tokens_BT):
        return tokens_BT


def test_a_plain_model_has_no_ability():
    questions = [
        *(abilities.has_hidden, abilities.takes_cache, abilities.scores_itself),
        *(abilities.writes_itself, abilities.has_own_objective, abilities.follows_progress),
        *(abilities.has_after_step, abilities.has_groups, abilities.folds, abilities.any_folds),
    ]

    assert not any(question(Plain()) or question(Plain) for question in questions[:-1])
    assert not abilities.any_folds(Plain())


def test_a_cache_is_taken_where_tokens_are_read():
    assert abilities.takes_cache(Cached()) and abilities.takes_cache(Cached)
    assert not abilities.takes_cache(Hidden())


def test_terms_and_a_loss_of_its_own_are_both_another_objective():
    terms = type("Terms", (Plain,), {"loss_terms": lambda self, tokens_BT, targets_BT: []})
    own = type("Own", (Plain,), {"training_loss": lambda self, tokens_BT, targets_BT: tokens_BT})

    assert abilities.has_own_objective(terms()) and abilities.has_own_objective(own())
    assert abilities.has_terms(terms()) and not abilities.trains_by_itself(terms())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_other_file_asks_what_a_model_can_do(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    asked = {
        argument.value
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id in ("hasattr", "getattr")
        for argument in call.args[1:2]
        if isinstance(argument, ast.Constant)
    }

    assert not asked & NAMES


def test_a_body_that_is_only_a_docstring_does_nothing_after_a_step():
    class Waiting(Plain):
        def after_step(self) -> None:
            """Ideas insert lines here."""

    class Counting(Plain):
        def after_step(self) -> None:
            """Counts."""
            self.num_steps += 1

    class Answering(Plain):
        def after_step(self):
            """Answers."""
            return 5

    found = [abilities.has_after_step(model) for model in (Waiting, Waiting(), Counting, Answering)]

    assert found == [False, False, True, True]
