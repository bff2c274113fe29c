"""A run's folder: where it lies, what its files are called, who holds it."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from hashlib import sha256
from pathlib import Path

from lmplay.disk import NO_ROOM, make_folder, overwrite_json, write_json
from lmplay.errors import UserError, nearest
from lmplay.run.facts import Facts
from lmplay.run.labels import escaped, value_name
from lmplay.run.lock import hold

RUNS = "runs"

_LONGEST_NAME = 120  # bytes; file systems allow 255, encrypted ones 143
_BEFORE_A_RUN = {  # what is written before run.json says that there is a run
    "lock", "owner.json", "experiment.py", "tokenizer.json", "tokenizer_config.json", "train.csv",
    "validation.csv",
}  # fmt: skip
_CHECKPOINT = re.compile(r"step-(0|[1-9][0-9]*)")


@dataclass(frozen=True)
class RunFolder:
    path: Path

    @property
    def run_json(self) -> Path:
        return self.path / "run.json"

    @property
    def experiment_py(self) -> Path:
        return self.path / "experiment.py"

    @property
    def tokenizer_json(self) -> Path:
        return self.path / "tokenizer.json"

    @property
    def train_csv(self) -> Path:
        return self.path / "train.csv"

    @property
    def validation_csv(self) -> Path:
        return self.path / "validation.csv"

    @property
    def samples_md(self) -> Path:
        return self.path / "samples.md"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def read(self) -> Facts:
        """What run.json says.

        Raises:
            UserError: there is no run.json, or it is damaged or of another program.
        """
        try:
            if self.run_json.exists() and not self.run_json.is_file():  # a pipe, say, never ends
                raise UserError(f"{self.run_json} is no file", hint="take it out of there")
            return Facts.from_json(self.run_json.read_bytes())
        except FileNotFoundError:
            hint = "name the folder that holds run.json"
            raise UserError(f"{self.path} is not a run's folder", hint=hint) from None
        except ValueError as error:
            hint = "the run can no longer be used; move its folder away to train it again"
            raise UserError(f"{self.run_json} is damaged: {error}", hint=hint) from None
        except OSError as error:
            raise UserError(f"{self.run_json} cannot be read: {error}") from None

    def read_source(self) -> str:
        """The experiment's file as it was trained.

        Raises:
            UserError: it is gone or damaged.
        """
        try:
            return self.experiment_py.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            hint = "it is no whole run; lmp-trainer --resume none trains it anew and keeps it aside"
            raise UserError(f"{self.path} lacks its experiment.py", hint=hint) from None

    def write(self, facts: Facts) -> None:
        """Put `facts` into run.json; whoever reads at any moment sees the old one or the new.

        On a disk that is full they take the place of the old ones at once: a run that it has ended
        is not called running.
        """
        make_folder(self.path)
        try:
            write_json(self.run_json, asdict(facts))
        except OSError as error:
            if error.errno not in NO_ROOM or not self.run_json.is_file():
                raise
            overwrite_json(self.run_json, asdict(facts))

    def refuse_deleted(self) -> None:
        """Raise a UserError where a run that is under way is no longer there."""
        if not self.run_json.is_file():
            hint = "the same command begins it anew"
            raise UserError(f"{self.path} was deleted while it was trained", hint=hint)

    def remove_unused(self) -> None:
        """Take the folder away, and those above it that are empty then, if no run ever began in it.

        The caller holds the run.
        """
        with suppress(OSError):
            names = os.listdir(self.path)
            if set(names) <= _BEFORE_A_RUN:
                for name in sorted(names, key="owner.json".__eq__):  # that last: it is the claim
                    os.unlink(self.path / name)
                for folder in (self.path, *self.path.parents[:2]):
                    folder.rmdir()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run as `hold` says, so that no second process trains in it.

        Raises:
            UserError: a live process holds the run (code LOCKED), or the folder cannot be written.
        """
        try:
            str(self.path).encode()
        except UnicodeEncodeError:  # which libraries below cannot open
            problem = f"the name {str(self.path)!a} is no UTF-8"
            raise UserError(problem, hint="choose another place with --out-dir") from None
        with hold(self.path):
            yield


def run_path(
    out_dir: Path, plan: str, experiment: str, changes: dict[str, object], seed: int
) -> Path:
    """<out_dir>/<plan>/<experiment>[,key=value...]/seed-<n>, the same for the same settings.

    Args:
        out_dir: the folder of all runs, RUNS by default.
        changes: dotted key to value; keys are sorted. 1e-3 and 0.001 are one setting, as are 512
            and 512.0. A list is its items between plus signs; what a file's name cannot hold is
            escaped as in a URL; a name that gets too long ends in a hash.
    """
    parts = [escaped(experiment, "+")]  # a stack's name joins its ideas with a plus
    parts += [f"{escaped(key, '')}={value_name(changes[key])}" for key in sorted(changes)]
    return out_dir / _file_name(escaped(plan, "+")) / _file_name(",".join(parts)) / f"seed-{seed}"


def find_runs(paths: list[Path]) -> list[RunFolder]:
    """Every run in these folders and below them, each once, sorted by path, 2 before 10.

    Raises:
        UserError: one of the paths does not exist or holds no run.
    """
    found: dict[Path, RunFolder] = {}
    for path in paths:
        here = _runs_below(path)
        if not here:
            problem = f"no run in {path}" if path.exists() else f"there is no folder {path}"
            raise UserError(problem, hint="name a run's folder, or one above it, such as runs/")
        for run in here:
            found.setdefault(run.path.resolve(), run)
    return sorted(found.values(), key=lambda run: _natural(run.path))


def resolve_run(text: str | None, out_dir: Path) -> tuple[RunFolder, int | None]:
    """The one run that a user means, and the step if a checkpoint's folder was named.

    Args:
        text: a run's folder, one of its checkpoints, or "plan/experiment/seed-n" under `out_dir`;
            any folder above a single run will do. None is the run that started last.
        out_dir: the folder of all runs.
    Raises:
        UserError: no such run (with the nearest name), or several below that folder.
    """
    if text is None:
        return _newest(out_dir), None
    for path in (Path(text), out_dir / text):
        step = _CHECKPOINT.fullmatch(path.name)
        if step and path.parent.name == "checkpoints" and path.is_dir():
            return RunFolder(path.parent.parent), int(step[1])
        if path.name == "checkpoints" and (path.parent / "run.json").is_file():
            return RunFolder(path.parent), None
        runs = _runs_below(path)
        if len(runs) == 1:
            return runs[0], None
        if runs:
            some = ", ".join(str(run.path) for run in runs[:3])
            raise UserError(f"{path} holds {len(runs)} runs", hint=f"name one, such as {some}")
    names = [run.path.relative_to(out_dir).as_posix() for run in _runs_below(out_dir)]
    hint = nearest(text, names) + "name a run's folder, or plan/experiment/seed-n"
    raise UserError(f"there is no run {text}", hint=hint)


def _file_name(name: str) -> str:
    if name.startswith("."):  # hidden files, and the folder above
        name = "%2E" + name[1:]
    if len(name) > _LONGEST_NAME:
        return name[: _LONGEST_NAME - 13] + "~" + sha256(name.encode()).hexdigest()[:12]
    return name


def _runs_below(path: Path) -> list[RunFolder]:
    """Those in linked folders too, each folder once."""
    found, seen = [], set()
    for folder, below, files in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        if "run.json" in files and real not in seen:
            found.append(RunFolder(Path(folder)))
        if "run.json" in files or real in seen:
            below.clear()
        seen.add(real)
        below[:] = [name for name in below if not name.startswith(".")]
    return sorted(found, key=lambda run: _natural(run.path))


def _natural(path: Path) -> list[tuple]:
    parts = re.split(r"([0-9]+)", str(path))
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def _newest(out_dir: Path) -> RunFolder:
    runs = _runs_below(out_dir)
    if not runs:
        hint = "train one: lmp-trainer --exp gpt2ish --plan quick"
        raise UserError(f"there is no run in {out_dir}", hint=hint)
    return max(runs, key=lambda run: (_started(run), _last_step(run)))


def _started(run: RunFolder) -> float:
    try:
        return datetime.fromisoformat(run.read().started).timestamp()
    except (UserError, ValueError):
        return float("-inf")


def _last_step(run: RunFolder) -> int:
    names = os.listdir(run.checkpoints) if run.checkpoints.is_dir() else []
    return max((int(m[1]) for m in map(_CHECKPOINT.fullmatch, names) if m), default=-1)
