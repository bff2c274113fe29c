"""Greedy search: add one idea after another to a stack, as long as the verdict is "better"."""

from collections.abc import Callable, Iterator

Verdicts = Callable[[list[str], range], list[dict]]


def search(
    base: str,
    ideas: list[str],
    seeds: range,
    join: Callable[[str, str], str | None],
    verdicts: Verdicts,
) -> Iterator[dict]:
    """Give each round as it ends: what was tried on top of the best stack, and what was taken.

    A round tries every idea that is left on top of the stack, on `seeds`. The best one that is
    better, by Holm's correction over the round, has to be better again on as many fresh seeds,
    since the winner of many may only be lucky; if it is not, the next best one has its turn. The
    search ends with the round that takes none.

    Args:
        base: the experiment to start from.
        seeds: of the rounds; the fresh ones are the next len(seeds).
        join: the name of an idea on top of a stack, or None where they do not stack.
        verdicts: trains these experiments on these seeds and gives a verdict row for each, in
            order; the first is the baseline of the others.
    """
    fresh = range(seeds.stop, seeds.stop + len(seeds))
    stack, left = base, list(ideas)
    for number in range(1, len(ideas) + 1):
        joined = {idea: join(stack, idea) for idea in left}
        stacks = {idea: name for idea, name in joined.items() if name is not None}
        before, *rows = verdicts([stack, *stacks.values()], seeds)
        candidates = [
            _candidate(idea, name, row)
            for (idea, name), row in zip(stacks.items(), rows, strict=True)
        ]
        candidates += [_conflict(idea) for idea in left if idea not in stacks]
        better = [c for c in candidates if c["verdict"] == "better"]
        accepted = None
        for candidate in sorted(better, key=lambda c: c["difference"]):
            _, again = verdicts([stack, candidate["stack"]], fresh)
            candidate["confirmation"] = again
            candidate["confirmed"] = again["verdict"] == "better"
            if candidate["confirmed"]:
                accepted = candidate
                break
        yield {
            "round": number,
            "stack": stack,
            "mean": before["mean"],
            "accepted": None if accepted is None else accepted["name"],
            "candidates": candidates,
        }
        if accepted is None:
            return
        stack = accepted["stack"]
        left.remove(accepted["name"])


def _candidate(idea: str, stack: str | None, row: dict) -> dict:
    keys = ("mean", "difference", "interval", "p_holm", "verdict", "seeds", "marks")
    return {"name": idea, "stack": stack, "confirmed": None} | {key: row[key] for key in keys}


def _conflict(idea: str) -> dict:
    """An idea that does not stack."""
    row = dict.fromkeys(("mean", "difference", "interval", "p_holm", "seeds"))
    return _candidate(idea, None, row | {"verdict": "conflict", "marks": []})
