import pytest

from lmplay.proofs.proof import Exempt, Proof, Refuted, most_telling, prove, without_followers


def failed(*names):
    return [Proof(name, False, "") for name in names]


def standing(proofs, follows):
    return [p.name for p in without_followers(proofs, follows) if p.passed is False]


@pytest.mark.parametrize(
    ("follows", "left"),
    [
        ({}, ["causal", "any shape"]),
        ({"any shape": ("causal",)}, ["causal"]),
        ({"any shape": ("causal",), "causal": ("rows apart",)}, ["causal"]),
        ({"any shape": ("causal",), "causal": ("any shape",)}, ["causal", "any shape"]),
        ({"any shape": ("rows apart",)}, ["causal", "any shape"]),
    ],
    ids=["no cause", "a cause", "its cause holds", "each the other's", "a cause that holds"],
)
def test_a_proof_that_was_bound_to_fail_accuses_no_more(follows, left):
    assert standing(failed("causal", "any shape"), follows) == left


def test_what_was_bound_to_fail_says_because_of_which():
    shape = without_followers(failed("causal", "any shape"), {"any shape": ("causal",)})[1]

    assert shape == Proof("any shape", None, "means nothing where causal fails")


def test_the_most_telling_proof_names_the_fault():
    assert most_telling(failed("any shape", "learns", "causal", "shift")).name == "causal"
    assert most_telling([Proof("causal", True, ""), Proof("cache", None, "")]) is None


class Nothing:
    experiment = None


def test_claims_are_passed_refuted_or_exempt():
    def refuted(_):
        raise Refuted("no")

    def exempt(_):
        raise Exempt("not here")

    claims = {"a": lambda _: "yes", "b": refuted, "c": exempt}

    assert [(p.passed, p.detail) for p in prove(claims, Nothing())] == [
        (True, "yes"),
        (False, "no"),
        (None, "not here"),
    ]
