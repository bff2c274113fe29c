"""Many runs, shared with whoever else works on the same folder."""

from collections.abc import Callable
from contextlib import suppress

from lmplay.errors import BAD_INPUT, LOCKED, NO_DATA, UserError
from lmplay.grid.grid_display import GridDisplay
from lmplay.grid.subprocesses import SignalForwarder, run_in_subprocess
from lmplay.run.folder import RunFolder
from lmplay.run.request import Request
from lmplay.train.session import finished, run_experiment

WAIT_SECONDS = 2.0  # between two looks at runs that others hold


def run_grid(
    requests: list[Request], display: GridDisplay, ended: Callable[[], None] = lambda: None
) -> dict[str, str]:
    """Train every request that is not finished yet, in order; a failed one is noted and left.

    Runs that another process holds are passed over and waited for at the end, so that several
    grids on one folder, on one machine or many, share the work.

    Args:
        ended: called after each run that ended here.
    Returns:
        Why runs failed, by their folders.
    Raises:
        UserError: a run could not begin for lack of data, or the first one by what was asked for;
            a later one that is refused, such as an idea that leaks at this size, is a failed one.
        Stopped: a signal came; the run under way was saved.
    """
    failures, waiting, begun = {}, [], False
    display.expect([(request.label, request.seed) for request in requests])
    for request in requests:
        display.begin(request.label, request.seed)
        if result := finished(request, display):
            display.end("done", result)
            begun = True
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
                    failures[path] = request.folder.read().exit_reason
                    display.end("failed", why=failures[path])
                    continue
                try:
                    result = run_in_subprocess(run_experiment, request, display, forwarder)
                    display.end("done", result)
                except UserError as error:
                    if not request.folder.run_json.exists() and (
                        error.code == NO_DATA or (error.code == BAD_INPUT and not begun)
                    ):
                        raise  # what was asked for cannot be had
                    if error.code == LOCKED:
                        held.append(request)
                        was_held.add(path)
                        display.end("held")
                        continue
                    failures[path] = error.problem
                    _mark_as_failed(request.folder, error.problem)
                    display.end("failed", why=error.problem)
                else:
                    ended()
                begun = True
            if held and len(held) == len(waiting):  # others train all that is left
                forwarder.wait(WAIT_SECONDS)
            waiting = held
    return failures


def _mark_as_failed(folder: RunFolder, problem: str) -> None:
    """A process that was killed could not say so itself."""
    if _status(folder) == "running":
        with suppress(UserError, OSError):
            folder.write(folder.read().failed(problem))


def _status(folder: RunFolder) -> str | None:
    with suppress(UserError):
        return folder.read().status
    return None
