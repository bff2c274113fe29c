"""Greedy search: add one idea after another to a stack, as long as the verdict is "better"."""

from collections.abc import Callable, Iterator

from lmplay.run.design import Design

Verdicts = Callable[[list[str], Design], list[dict | None]]


def search(
    base: str,
    ideas: list[str],
    design: Design,
    join: Callable[[str, str], str | None],
    verdicts: Verdicts,
) -> Iterator[dict]:
    """Give each round as it ends: what was tried on top of the best stack, and what was taken.

    A round tries every idea that is left on top of the stack and takes the best of those that are
    better. Every round has seeds of its own, since those on which a stack was chosen flatter it.
    The search ends with the round that takes none.

    Args:
        base: the experiment to start from.
        design: of the first round; later ones have the same on the seeds that follow.
        join: the name of an idea on top of a stack, or None where they do not stack.
        verdicts: trains these experiments by this design and gives a verdict row for each, in
            order, None where it is refused; the first is the baseline of the others.
    """
    stack, left = base, list(ideas)
    for number in range(1, len(ideas) + 1):
        joined = {idea: join(stack, idea) for idea in left}
        stacks = {idea: name for idea, name in joined.items() if name is not None}
        before, *rows = verdicts([stack, *stacks.values()], design)
        candidates = [
            _untried(idea, "refused") if row is None else _candidate(idea, name, row)
            for (idea, name), row in zip(stacks.items(), rows, strict=True)
        ]
        candidates += [_untried(idea, "conflict") for idea in left if idea not in stacks]
        better = [c for c in candidates if c["verdict"] == "better"]
        accepted = min(better, key=lambda c: c["difference"], default=None)
        yield {
            "round": number,
            "stack": stack,
            "mean": before["mean"],
            "accepted": None if accepted is None else accepted["name"],
            "candidates": candidates,
        }
        if accepted is None:
            return
        stack, design = accepted["stack"], design.later()
        left.remove(accepted["name"])


def _candidate(idea: str, stack: str | None, row: dict) -> dict:
    keys = ("mean", "difference", "interval", "p_holm", "verdict", "seeds", "marks")
    return {"name": idea, "stack": stack} | {key: row[key] for key in keys}


def _untried(idea: str, verdict: str) -> dict:
    """An idea that does not stack, or whose stack was refused."""
    row = dict.fromkeys(("mean", "difference", "interval", "p_holm", "seeds"))
    return _candidate(idea, None, row | {"verdict": verdict, "marks": []})
