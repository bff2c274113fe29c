"""Counts which pairs of experiments stack: every two ideas on one baseline, merged as text.

Example: python benchmarks/stacks.py --only llama

No benchmark of speed: it says what share merges, what keeps the rest apart (lines that both change,
names that one gives or takes away, text that is no Python, values of TINY), and which
ideas collide most. Ideas on two baselines are not paired: what a baseline rewrote, the other's
ideas change too.
"""

import itertools
from collections import Counter
from typing import Annotated

import typer
from typer import Option

from lmplay.catalog.entries import entries, family_of, line_of, resolve
from lmplay.catalog.partners import baseline_of, collision
from lmplay.console import note, print_json, run_app, show, table

KINDS = ("lines", "names", "syntax", "values")
app = typer.Typer(pretty_exceptions_enable=False)


def collisions(baseline: str, left_out: list[str]) -> dict[tuple[str, str], str]:
    """Every two files of ideas on a baseline, with what keeps them apart; nothing where they stack.

    A file and what was copied from it are no pair.

    Args:
        left_out: families.
    """
    known = entries()
    ideas = {}
    for name, entry in known.items():
        family = family_of(entry, known)
        is_idea = name == entry.file and family is not None and family not in left_out
        if is_idea and baseline_of(entry, known) == baseline:
            ideas[name] = resolve(name)
    lines = {name: [one.path for one in line_of(entry)] for name, entry in ideas.items()}
    return {
        (one, other): collision(ideas[one], ideas[other])
        for one, other in itertools.combinations(ideas, 2)
        if ideas[one].path not in lines[other] and ideas[other].path not in lines[one]
    }


@app.command()
def main(
    only: Annotated[
        str, Option(help="Baselines, several with commas.", metavar="NAMES")
    ] = "llama,gpt2ish",
    without: Annotated[
        str,
        Option(help="Families to leave out: mixing,patches,diffusion are whole architectures."),
    ] = "",
    as_json: Annotated[bool, Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Count which pairs of experiments stack."""
    rows, found = [], {}
    for baseline in only.split(","):
        note(f"merging all pairs on {baseline}")
        pairs = found[baseline] = collisions(baseline, without.split(","))
        kinds = Counter(pairs.values())
        share = f"{kinds[''] / max(len(pairs), 1):.1%}"
        rows.append([baseline, f"{len(pairs):,}", share, *(str(kinds[kind]) for kind in KINDS)])
    if as_json:
        return print_json(
            {b: {"+".join(p): kind for p, kind in f.items()} for b, f in found.items()}
        )
    columns = ["baseline", "pairs", "stack", *KINDS]
    show(table("Pairs", columns, rows, right=columns[1:]))
    often = Counter(
        name for f in found.values() for pair, kind in f.items() if kind for name in pair
    )
    most = [[name, str(count)] for name, count in often.most_common(20)]
    show(table("\nCollide most", ["idea", "pairs"], most, right={"pairs"}))


if __name__ == "__main__":
    run_app(app)
