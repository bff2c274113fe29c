"""lmp-trainer over many runs: they are trained, then judged; the two meet here alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from lmplay.catalog import entries as catalog
from lmplay.catalog.entry import Entry
from lmplay.console import note, print_json
from lmplay.errors import NUMERIC, UserError
from lmplay.stats.table import print_verdicts
from lmplay.train.listing import print_path

if TYPE_CHECKING:
    from lmplay.grid.grid_display import GridDisplay
    from lmplay.run.request import Request


def train_all(
    template: "Request",
    entries: list[Entry],
    baseline: Entry,
    seeds: range,
    budget: str,
    as_json: bool,
) -> None:
    """Train every experiment over the seeds, and print the verdicts.

    Args:
        template: of all runs; entry and seed are replaced.
        budget: the league, sized to what the baseline takes.
    """
    failures: dict[str, str] = {}
    with _grid_display(template) as display:
        rows = _verdicts(template, entries, baseline, seeds, (baseline, budget), failures, display)
    if as_json:
        print_json({"schema_version": 1, "verdicts": rows, "failures": failures})
    else:
        print_verdicts(rows)
        note(f"plot it: lmp-plotstats {template.folder.path.parent.parent}")
    _exit_by(failures)


def search_greedily(
    template: "Request", ideas: list[Entry], seeds: range, budget: str, as_json: bool
) -> None:
    """Stack one idea after another on the template's experiment, and print the path."""
    from lmplay.catalog.merge import Conflict
    from lmplay.grid.search import search

    base, failures = template.entry, {}

    def join(stack: str, idea: str) -> str | None:
        name = idea if _adds_nothing(catalog.resolve(stack)) else f"{stack}+{idea}"
        try:
            return catalog.resolve(name).name
        except Conflict as conflict:
            note(f"{name} does not stack: {conflict.problem}")
            return None

    with _grid_display(template) as display:

        def verdicts(names: list[str], seeds: range) -> list[dict]:
            entries = [catalog.resolve(name) for name in names]
            league = base, budget
            return _verdicts(template, entries, entries[0], seeds, league, failures, display)

        rounds = list(search(base.name, [idea.name for idea in ideas], seeds, join, verdicts))
    taken = [idea.name for idea in ideas if idea.name in {r["accepted"] for r in rounds}]
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
    seeds: range,
    league: tuple[Entry, str],
    failures: dict[str, str],
    display: "GridDisplay",
) -> list[dict]:
    """Train what is missing, and give the verdict row of each entry, in their order."""
    from lmplay.grid.grid import run_grid
    from lmplay.grid.requests import expand
    from lmplay.stats.compare import pair_runs, read_run
    from lmplay.stats.judge import judge

    requests = expand(template, entries, seeds, *league, display)
    failures |= run_grid(requests, display)
    begun = [request.folder for request in requests if request.folder.run_json.is_file()]
    label = next(each.label for each in requests if each.entry.name == baseline.name)
    rows = judge(pair_runs([read_run(folder) for folder in begun], label))
    by_label = {row["experiment"]: row for row in rows}
    for request in requests:
        if request.label not in by_label:
            why = failures.get(str(request.folder.path), "")
            raise UserError(f"no run of {request.label} could begin: {why}")
    return [by_label[label] for label in dict.fromkeys(each.label for each in requests)]


def _adds_nothing(entry: Entry) -> bool:
    return entry.parent is None and not entry.variant


def _exit_by(failures: dict[str, str]) -> None:
    for path, why in failures.items():
        note(f"failed: {path}: {why}")
    if failures:
        raise typer.Exit(NUMERIC)
