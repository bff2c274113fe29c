"""A board in Markdown: what each experiment reached, and how to repeat it."""

import re
import shlex
from pathlib import Path

from lmplay.disk import write_bytes
from lmplay.errors import UserError
from lmplay.run.facts import DataFacts, Facts
from lmplay.stats.table import by_plan, markdown, plain

START, END = "<!-- lmplay board -->", "<!-- /lmplay board -->"

COLUMNS = (
    "experiment", "verdict", "next", "difference", "95 % interval", "p (Holm)", "seeds", "loss",
    "sd of diff", "pairs r", "sensitivity",
    "bits/byte", "tokens x", "seconds x", "tokens/s", "memory", "trained", "matmul", "look-up",
    "folded", "notes",
)  # fmt: skip
_VERSIONS = {"lmplay": "lmplay", "torch": "torch", "python": "Python"}


def write_board(path: Path, rows: list[dict], facts: dict[str, Facts]) -> None:
    """Write the board of these rows between its two markers; the rest of the file stays.

    A file that is not there is made. It is replaced in one step, and the same runs give the same
    bytes.

    Args:
        rows: the verdict rows of `judge`.
        facts: run.json of each run that a row names.
    Raises:
        UserError: the file has no markers, or cannot be read or written.
    """
    before, after = split_board(path)
    parts = [_of_plan(plan, of_plan, facts) for plan, of_plan in by_plan(rows).items()]
    text = "\n".join(["", *parts, ""])
    # a command line may hold bytes that are no text
    data = before + text.encode("utf-8", errors="backslashreplace") + after
    try:
        write_bytes(path, data)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def split_board(path: Path) -> tuple[bytes, bytes]:
    """What stands before and after a board, up to the end of its first and from its second marker.

    Raises:
        UserError: as in `write_board`.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        data = f"# Board\n\n{START}\n{END}\n".encode()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    starts, ends = (
        [*re.finditer(rb"^%b[ \t]*(?:\r?\n|\Z)" % marker.encode(), data, re.MULTILINE)]
        for marker in (START, END)
    )
    if len(starts) != 1 or len(ends) != 1 or ends[0].start() < starts[0].end():
        hint = f"put these two lines where the board is to go, once: {START} and {END}"
        raise UserError(f"{path} has no place for a board", hint=hint)
    return data[: starts[0].end()], data[ends[0].start() :]


def _of_plan(plan: str, rows: list[dict], facts: dict[str, Facts]) -> str:
    baselines = sorted({row["baseline"] for row in rows if row["baseline"] is not None})
    against = f", differences to {', '.join(map(plain, baselines))}" if baselines else ""
    what = f"Validation loss in nats per token{against}; below 0 is better."
    repeats: dict[str, list[str]] = {}  # what is repeated in the same way stands there once
    for row in rows:
        how = _repeat([facts[path] for path in row["runs"]])
        repeats.setdefault(how, []).append(plain(row["experiment"]))
    return "\n".join(
        [
            f"## Plan {plain(plan)}\n",
            f"{what}\n",
            markdown(rows, COLUMNS),
            "### How to repeat\n",
            *[f"**{', '.join(names)}**\n\n{how}" for how, names in repeats.items()],
        ]
    )


def _repeat(facts: list[Facts]) -> str:
    """What decides the numbers of one experiment's runs, and below it the exact commands."""
    told, commands = how_to_repeat(facts)
    lines = [f"- {name}: {plain(value)}" for name, value in told.items()]
    longest = max([len(ticks) for line in commands for ticks in re.findall("`+", line)], default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join([*lines, "", f"{fence}sh", *commands, fence, ""])


def how_to_repeat(facts: list[Facts]) -> tuple[dict[str, str], list[str]]:
    """What decides the numbers of these runs of one experiment, and the commands that made them."""
    told = {
        "seeds": ", ".join(str(seed) for seed in sorted({run.seed for run in facts})),
        "declared": _each([run.design.words if run.design else "nothing" for run in facts]),
        "commit": _each([run.git_commit for run in facts]),
        "versions": _each([_versions(run.versions) for run in facts]),
        "data": _each([_data(run.data) for run in facts]),
        "machine": _each([_machine(run) for run in facts]),
    }
    return told, list(dict.fromkeys(_command(run.command) for run in facts if run.command))


def _command(argv: list[str]) -> str:
    """The command line with the script's name in place of its path."""
    script = Path(argv[0])
    if script.name != "__main__.py" or "lmplay" not in script.parts:
        return shlex.join([script.name, *argv[1:]])
    package = script.parent.parts  # python -m lmplay.train
    module = package[len(package) - 1 - package[::-1].index("lmplay") :]
    return shlex.join(["python", "-m", ".".join(module), *argv[1:]])


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {versions.get(key)}" for key, name in _VERSIONS.items())


def _data(data: DataFacts) -> str:
    names = {"fingerprint": "", "validation_fingerprint": "validation ", "tokenizer": "tokenizer "}
    return ", ".join(f"{name}{getattr(data, key)}" for key, name in names.items())


def _machine(run: Facts) -> str:
    return f"{run.device_name}, threads {run.threads}"


def _each(values: list[str | None]) -> str:
    """Every value once: the seeds of one experiment may differ."""
    return "; ".join(dict.fromkeys("unknown" if value is None else value for value in values))
