"""lmp-trainer over many runs: they are trained, then judged; the two meet here alone."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

import typer

from lmplay.catalog import entries as catalog
from lmplay.catalog.entry import Entry
from lmplay.console import note, print_json
from lmplay.errors import NUMERIC, UserError
from lmplay.stats.table import print_ladder, print_verdicts
from lmplay.train.listing import print_path

if TYPE_CHECKING:
    from lmplay.grid.grid_display import GridDisplay
    from lmplay.run.design import Design
    from lmplay.run.request import Request
    from lmplay.stats.compare import Pair


def train_all(
    template: "Request",
    entries: list[Entry],
    baseline: Entry,
    budget: str,
    sizes: tuple[float, ...],
    others: tuple["Request", ...],
    as_json: bool,
) -> None:
    """Train every experiment by the template's design, and print the verdicts.

    Args:
        template: of all runs; entry and seed are replaced.
        others: templates of which each has another optimizer.
        budget: the league, sized to what the baseline takes.
        sizes: factors of the plan's size.
    """
    from lmplay.stats.ladder import ladder_rows

    failures: dict[str, str] = {}
    with _grid_display(template) as display:
        league = baseline, budget
        rows, pairs = _verdicts(
            template, entries, baseline, league, failures, display, sizes, others
        )
    rows = [row for row in rows if row is not None]
    ladder = ladder_rows(pairs)
    if as_json:
        document = {"verdicts": rows, "ladder": ladder, "failures": failures}
        print_json({"schema_version": 1, **document})
    else:
        print_verdicts(rows)
        print_ladder(ladder)
        page = page_of(template)
        note(f"look at it: {page}    plot it: lmp-plotstats {quote(str(page.parent))}")
    _exit_by(failures)


def search_greedily(template: "Request", ideas: list[Entry], budget: str, as_json: bool) -> None:
    """Stack one idea after another on the template's experiment, and print the path."""
    from dataclasses import replace

    from lmplay.grid.search import search

    base, failures = template.entry, {}

    def join(stack: str, idea: str) -> str | None:
        try:
            return catalog.with_one_more(stack, idea).name
        except UserError as error:
            note(f"{idea} does not stack on {stack}: {error.problem}")
            return None

    with _grid_display(template) as display:

        def verdicts(names: list[str], design: "Design") -> list[dict | None]:
            entries = [catalog.resolve(name) for name in names]
            of_round = replace(template, design=design)
            league = base, budget
            return _verdicts(of_round, entries, entries[0], league, failures, display)[0]

        names = [idea.name for idea in ideas]
        rounds = list(search(base.name, names, template.design, join, verdicts))
    taken = [name for name in names if name in {r["accepted"] for r in rounds}]
    if as_json:
        document = {"accepted": taken, "rounds": rounds, "failures": failures}
        print_json({"schema_version": 1, **document})
    else:
        print_path(rounds)
    _exit_by(failures)


@contextmanager
def _grid_display(template: "Request") -> Iterator["GridDisplay"]:
    """Shows the grid; where a signal ends it, the command ends with the signal's code."""
    from lmplay.grid.grid_display import GridDisplay
    from lmplay.train.signals import Stopped

    try:
        with GridDisplay(template.plan.name) as display:
            yield display
    except Stopped as stop:
        note(f"{stop}; saved. The same command goes on from here.")
        raise typer.Exit(stop.code) from None


def _verdicts(
    template: "Request",
    entries: list[Entry],
    baseline: Entry,
    league: tuple[Entry, str],
    failures: dict[str, str],
    display: "GridDisplay",
    sizes: tuple[float, ...] = (1.0,),
    others: tuple["Request", ...] = (),
) -> tuple[list[dict | None], list["Pair"]]:
    """Train what is missing, look by look.

    Returns:
        The verdict row of each entry at each size and by each optimizer, in order, None where no
        run could begin; and what they are made from.
    Raises:
        UserError: no run of the baseline could begin.
    """
    from lmplay.grid.grid import run_grid
    from lmplay.grid.requests import arm_of, declare, expand
    from lmplay.stats.compare import pair_runs, read_run
    from lmplay.stats.judge import judge
    from lmplay.stats.looks import foresight
    from lmplay.stats.page import write_page

    design = template.design
    requests = expand(template, entries, design, *league, display, sizes, others)
    base_optimizer = template.plan.optimizer.name
    of_baseline = [
        arm_of(each)
        for each in requests
        if (each.entry.name, each.plan.optimizer.name) == (baseline.name, base_optimizer)
    ]
    base, baselines = of_baseline[sizes.index(1) * len(design.rates)], set(of_baseline)
    labels = list(dict.fromkeys(map(arm_of, requests)))
    declare(requests, baselines)
    if num_ideas := len(labels) - len(baselines):
        display.note(foresight(design, num_ideas, _known_sd(template)))

    def judged(is_running: bool = True) -> tuple[dict[str, dict], list["Pair"]]:
        begun = [each.folder for each in requests if each.folder.run_json.is_file()]
        pairs = pair_runs([read_run(folder) for folder in begun], base)
        rows = judge(pairs, template.plan.margin)
        write_page(page_of(template), rows, pairs, is_running)
        return {row["experiment"]: row for row in rows}, pairs

    def show() -> None:
        with suppress(UserError):  # nothing to hold the others against has ended yet
            judged()

    open_labels = set(labels)
    for seeds in design.stages:
        now = [each for each in requests if each.seed in seeds and arm_of(each) in open_labels]
        failures |= run_grid(now, display, show)
        rows, pairs = judged(is_running=False)
        if base not in rows:
            why = "; ".join(dict.fromkeys(failures.values()))
            raise UserError(f"no run of {base} could begin: {why}")
        open_labels = {label for label in labels if label in rows and rows[label]["is_pending"]}
        if open_labels or not num_ideas:
            open_labels |= baselines
    return [rows.get(label) for label in labels], pairs


def page_of(template: "Request") -> Path:
    """The page that shows how a grid stands, written anew after each of its runs."""
    return template.folder.path.parent.parent / "board.html"


def _known_sd(template: "Request") -> float | None:
    """Of the paired differences between runs of this plan so far, the median over ideas."""
    from statistics import median

    from lmplay.run.folder import find_runs
    from lmplay.stats.judge import verdicts_of

    try:
        rows = verdicts_of(find_runs([page_of(template).parent]))
    except UserError:  # none yet, or one that cannot be read, which is said where it is needed
        return None
    known = [row["difference_sd"] for row in rows if row["difference_sd"]]
    return median(known) if known else None


def _exit_by(failures: dict[str, str]) -> None:
    for path, why in failures.items():
        note(f"failed: {path}: {why}")
    if failures:
        raise typer.Exit(NUMERIC)
