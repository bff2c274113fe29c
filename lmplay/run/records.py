"""train.csv and validation.csv: one row for each step, written as it happens."""

import os
from pathlib import Path

from lmplay.disk import naming
from lmplay.errors import UserError
from lmplay.fault_points import reach

TRAIN_COLUMNS = (
    "step",
    "tokens",
    "loss",
    "objective",
    "accuracy",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "memory",
    "seconds",
)
VALIDATION_COLUMNS = (
    "step",
    "tokens",
    "loss",
    "loss_error",  # standard error of a loss that is a mean over draws
    "bits_per_byte",
    "accuracy",
    "seconds",
)

Row = dict[str, float | int | None]


_OF_AVERAGE = "loss_of_"


def average_column(name: str) -> str:
    """The column of validation.csv with the loss of an average of the weights, such as ema."""
    return f"{_OF_AVERAGE}{name}"


def averages_told(row: Row) -> str:
    """What a row of validation.csv says of averages, to stand behind its loss: ", ema 4.0213"."""
    names = [column for column in row if column.startswith(_OF_AVERAGE)]
    return "".join(f", {name.removeprefix(_OF_AVERAGE)} {row[name]:.4f}" for name in names)


class Record:
    """A CSV file that only grows while a run trains; each row is on its way once `write` returns.

    A row counts as written when its line has ended: what a killed process left of a last line is
    cut when the file is opened again.
    """

    def __init__(self, path: Path, columns: tuple[str, ...], keep_through: int | None = None):
        """Open for appending; a file that is not there yet gets its header.

        Args:
            columns: the header of a new file. A file that began with other columns keeps those,
                and goes without what it has no column for.
            keep_through: the step that training goes on from. The rows of later steps are cut, so
                that no step comes twice; None keeps them all.
        Raises:
            UserError: the file is no record.
        """
        data = _bytes_of(path) if path.exists() else b""
        header, _, _ = data.partition(b"\n")
        if b"\n" in data:
            self.columns = _columns_of(header, path)
            end = _end_of_rows(data, len(self.columns), keep_through)
        else:  # new, or killed while its header was written
            self.columns = columns
            end = 0
        if end < len(data):
            with open(path, "r+b") as file:
                file.truncate(end)
        self._file = open(path, "a", encoding="ascii", newline="")  # noqa: SIM115
        if end == 0:
            self._file.write(",".join(columns) + "\n")
            self._file.flush()

    def write(self, row: Row) -> None:
        """Append one row and flush it; a float is read back as the very same float.

        A column that `row` lacks, or has None for, stays empty.
        """
        cells = [_cell(row.get(column)) for column in self.columns]
        with naming(self._file.name):
            self._file.write(",".join(cells) + "\n")
            reach("row.write")
            self._file.flush()

    def sync(self) -> None:
        """Wait until every row is on the disk: a checkpoint after them relies on them.

        Raises:
            UserError: the file alone was deleted meanwhile, not the whole run.
        """
        is_deleted = not os.fstat(self._file.fileno()).st_nlink
        if is_deleted and os.path.isdir(os.path.dirname(self._file.name)):
            problem = f"{self._file.name} was deleted while it was written, with all its rows"
            raise UserError(problem, hint="the same command goes on from the newest checkpoint")
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, *failure) -> None:
        self.close()


def read_rows(path: Path) -> list[Row]:
    """Every whole row, an empty cell as None; a line that has not ended yet is left out.

    Raises:
        UserError: the file is no record, or one of its lines is damaged.
    """
    header, *lines = whole_lines(path).split(b"\n")[:-1] or [b""]
    columns = _columns_of(header, path) if header else ()
    rows = []
    for number, line in enumerate(lines, start=2):
        try:
            values = [_value(cell) for cell in line.decode("ascii").split(",")]
            rows.append(dict(zip(columns, values, strict=True)))
        except ValueError:  # UnicodeDecodeError is one
            raise damaged(
                path, f"line {number} is {line[:60].decode(errors='replace')!r}"
            ) from None
    return rows


def whole_lines(path: Path) -> bytes:
    """What the file holds up to its last end of a line."""
    data = _bytes_of(path)
    return data[: data.rfind(b"\n") + 1]


def _bytes_of(path: Path) -> bytes:
    if not path.is_file():  # a device or a pipe may never end
        raise damaged(path, "it is no file")
    return path.read_bytes()


def damaged(path: Path, why: str) -> UserError:
    """The error for a file that somebody, or a power cut, has changed."""
    return UserError(f"{path} is damaged: {why}", hint="mend the file, or leave this run out")


def _columns_of(header: bytes, path: Path) -> tuple[str, ...]:
    columns = tuple(header.decode("ascii", errors="replace").split(","))
    if columns[:2] != ("step", "tokens"):
        raise damaged(path, f"it begins with {header[:40].decode(errors='replace')!r}")
    return columns


def _end_of_rows(data: bytes, num_columns: int, keep_through: int | None) -> int:
    """Bytes up to the end of the last whole row that stays."""
    start = end = data.index(b"\n") + 1
    for line in data[start:].splitlines(keepends=True):
        start += len(line)
        step = _step_of(line, num_columns)
        if step is None:
            continue
        if keep_through is not None and step > keep_through:
            break
        end = start
    return end


def _step_of(line: bytes, num_columns: int) -> float | None:
    """None where the line is torn or damaged."""
    cells = line.split(b",")
    if len(cells) != num_columns or not line.endswith(b"\n"):
        return None
    try:
        return float(cells[0])
    except ValueError:
        return None


def _cell(value: float | int | None) -> str:
    if value is None:
        return ""
    return str(value) if type(value) is int else repr(float(value))


def _value(cell: str) -> float | int | None:
    if not cell:
        return None
    return int(cell) if cell.lstrip("-").isdigit() else float(cell)
