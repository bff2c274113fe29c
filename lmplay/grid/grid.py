"""Many runs on one plan, shared with whoever else works on the same folder, and their verdicts."""

from contextlib import suppress
from dataclasses import dataclass, field, replace

from lmplay.catalog.entries import Entry
from lmplay.errors import BAD_INPUT, LOCKED, NO_DATA, UserError
from lmplay.grid.budget import sized
from lmplay.grid.subprocesses import SignalForwarder, run_in_subprocess
from lmplay.model.experiment import load_experiment
from lmplay.run.folder import RunFolder
from lmplay.stats.compare import pair_runs, read_run
from lmplay.stats.judge import judge
from lmplay.train.display import GridDisplay
from lmplay.train.session import (
    Request,
    finished,
    refuse_unknown_names,
    refuse_unproven,
    run_experiment,
)

WAIT_SECONDS = 2.0  # between two looks at runs that others hold


class Bench:
    """Experiments on one plan in one league, trained when their verdicts are asked for.

    Args:
        request: of any of them; the entry and the seed are replaced.
        root: the experiment whose budget the league gives to all.
    """

    def __init__(self, request: Request, root: Entry, budget: str):
        self.request, self.root, self.budget = request, root, budget
        self.failures: dict[str, str] = {}  # by the run's folder
        self.display = GridDisplay(f"{request.plan.name}")

    def __enter__(self):
        self.display.__enter__()
        return self

    def __exit__(self, *error):
        self.display.__exit__(*error)

    def verdicts(self, entries: list[Entry], seeds: range, baseline: Entry) -> list[dict]:
        """Train what is missing, and give the verdict row of each entry, in their order.

        Raises:
            UserError: an experiment fails the check, or none of its runs could begin.
        """
        root = replace(self.request, entry=self.root)
        of_first = []
        for entry in entries:
            experiment = load_experiment(entry)
            refuse_unproven(experiment)
            refuse_unknown_names(self.request, experiment)
            request = replace(self.request, entry=entry, seed=seeds[0])
            of_first.append(sized(request, root, self.budget, self.display))
        requests = [replace(first, seed=seed) for seed in seeds for first in of_first]
        self.display.expect([(request.label, request.seed) for request in requests])
        grid = run_grid(requests, self.display)
        self.failures |= grid.failures
        begun = [request.folder for request in requests if request.folder.run_json.is_file()]
        label = next(r.label for r in of_first if r.entry.name == baseline.name)
        rows = judge(pair_runs([read_run(folder) for folder in begun], label))
        by_label = {row["experiment"]: row for row in rows}
        for request in of_first:
            if request.label not in by_label:
                why = grid.failures.get(str(request.folder.path), "")
                raise UserError(f"no run of {request.label} could begin: {why}")
        return [by_label[request.label] for request in of_first]


@dataclass
class Grid:
    """What became of each request."""

    results: dict[str, dict] = field(default_factory=dict)  # by the run's folder
    failures: dict[str, str] = field(default_factory=dict)  # by the run's folder: why


def run_grid(requests: list[Request], display: GridDisplay) -> Grid:
    """Train every request that is not finished yet, in order; a failed one is noted and left.

    Runs that another process holds are passed over and waited for at the end, so that several
    grids on one folder, on one machine or many, share the work.

    Raises:
        UserError: a run could not begin, for lack of data or by what was asked for.
        Stopped: a signal came; the run under way was saved.
    """
    grid, waiting = Grid(), []
    for request in requests:
        display.begin(request.label, request.seed)
        if result := finished(request, display):
            grid.results[str(request.folder.path)] = result
            display.end("done", result)
        else:
            waiting.append(request)
    was_held = set()
    with SignalForwarder() as forwarder:
        while waiting:
            held = []
            for request in waiting:
                display.begin(request.label, request.seed)
                path = str(request.folder.path)
                if path in was_held and _status(request.folder) == "failed":
                    grid.failures[path] = request.folder.read()["exit_reason"]
                    display.end("failed", why=grid.failures[path])
                    continue
                try:
                    grid.results[path] = run_in_subprocess(
                        run_experiment, request, display, forwarder
                    )
                    display.end("done", grid.results[path])
                except UserError as error:
                    if error.code in (BAD_INPUT, NO_DATA) and not request.folder.run_json.exists():
                        raise  # what was asked for cannot be had
                    if error.code == LOCKED:
                        held.append(request)
                        was_held.add(path)
                        display.end("held")
                        continue
                    grid.failures[path] = error.problem
                    _mark_as_failed(request.folder, error.problem)
                    display.end("failed", why=error.problem)
            if held and len(held) == len(waiting):  # others train all that is left
                forwarder.wait(WAIT_SECONDS)
            waiting = held
    return grid


def _mark_as_failed(folder: RunFolder, problem: str) -> None:
    """A process that was killed could not say so itself."""
    if _status(folder) == "running":
        with suppress(UserError, OSError):
            folder.write(folder.read() | {"status": "failed", "exit_reason": problem})


def _status(folder: RunFolder) -> str | None:
    with suppress(UserError):
        return folder.read().get("status")
    return None
