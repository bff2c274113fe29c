"""Reads runs, decides which may be compared, and pairs them with their baselines."""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import csv

from lmplay.errors import UserError, nearest
from lmplay.plan import FEW_HELD_OUT
from lmplay.run.facts import Facts
from lmplay.run.folder import RunFolder
from lmplay.run.records import damaged, whole_lines
from lmplay.stats.curve import Curve

X_COLUMNS = {"tokens": "tokens", "steps": "step", "seconds": "seconds", "flops": "tokens"}
DEFAULT_BASELINE = "gpt2ish"

Columns = dict[str, np.ndarray]  # of a CSV file, float64, equally long
Row = dict[str, float]

_MOST = 1e30  # what no run of ours writes; one that is not finite is a gap, as in a failed run


@dataclass(frozen=True)
class RecordedRun:
    """A run's folder as it was when it was read."""

    path: Path
    facts: Facts

    @property
    def label(self) -> str:
        """The experiment, with what was changed for this run: "ue16x,lr=0.001"."""
        return self.facts.label

    @property
    def plan(self) -> str:
        return self.facts.plan_name

    @property
    def seed(self) -> int:
        return self.facts.seed

    @property
    def budget(self) -> int:
        """Tokens that the run is to be trained on."""
        return self.facts.num_tokens

    @property
    def finished(self) -> bool:
        return self.facts.status == "finished"

    @property
    def failed(self) -> bool:
        return self.facts.status in ("failed", "leaked")

    @cached_property
    def final(self) -> Row | None:
        """The validation at the end of a finished run; None where its loss is not there."""
        last = _last(self.validation)
        if not self.finished or last is None or last["step"] < self.facts.num_steps:
            return None
        return last if np.isfinite(last["loss"]) else None

    @cached_property
    def train(self) -> Columns:
        """A value for each step; only the columns that are drawn or counted."""
        columns = ["step", "tokens", "loss", "accuracy", "memory", "seconds"]
        return _read_csv(RunFolder(self.path).train_csv, columns)

    @cached_property
    def validation(self) -> Columns:
        columns = ["step", "tokens", "loss", "loss_error", "bits_per_byte", "accuracy", "seconds"]
        return _read_csv(RunFolder(self.path).validation_csv, columns)

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        lasts = [_last(columns) for columns in (self.train, self.validation)]
        return max((int(last["tokens"]) for last in lasts if last), default=0)


@dataclass(frozen=True)
class Pair:
    """A run and the run that it is held against.

    `obstacle` says in words why the two cannot be subtracted, or why there is no baseline; a run
    without one may be.
    """

    run: RecordedRun
    baseline: RecordedRun | None
    obstacle: str = ""

    @property
    def is_baseline(self) -> bool:
        return self.baseline is self.run

    @property
    def comparable(self) -> bool:
        return self.baseline is not None and not self.is_baseline and not self.obstacle


def read_run(folder: RunFolder) -> RecordedRun:
    """The run in this folder; its curves are read when they are first asked for.

    Raises:
        UserError: run.json is missing or damaged.
    """
    return RecordedRun(folder.path, folder.read())


def pair_runs(
    runs: list[RecordedRun], baseline: str | RecordedRun | None, like_for_like: bool = False
) -> list[Pair]:
    """Each run with its baseline: same plan, same seed.

    Args:
        baseline: a label, looked for on each plan; or one run, against which every run of its
            seed is held, whatever the plan; or None: gpt2ish if the plan has it, else gpt2ish with
            changes, else the label of the plan's longest run.
        like_for_like: hold each run against the baseline's experiment with the run's own changes:
            "ue,lr=0.001" against "gpt2ish,lr=0.001".
    Raises:
        UserError: no run has this label, or one run is to be the baseline of other changes too.
    """
    if like_for_like and isinstance(baseline, RecordedRun):
        hint = "--baseline NAME without its changes, such as gpt2ish"
        raise UserError("--like-for-like needs an experiment as baseline, not one run", hint=hint)
    labels = {run.label for run in runs} | {unsized(run) for run in runs}
    labels |= {_experiment(run.label) for run in runs if like_for_like}
    if isinstance(baseline, str) and baseline not in labels:
        names = sorted(labels)
        hint = nearest(baseline, names) + f"--baseline takes a run's folder or {_some(names)}"
        raise UserError(f"no run of {baseline!r} to hold the others against", hint=hint)
    return [_pair(run, runs, baseline, like_for_like) for run in runs]


def default_baseline(runs: list[RecordedRun]) -> str:
    """The label that the runs of one plan are held against when nobody names one."""
    plain = [run for run in runs if run.label == DEFAULT_BASELINE]
    changed = [run for run in runs if run.label.startswith(f"{DEFAULT_BASELINE},")]
    return max(plain or changed or runs, key=lambda run: run.tokens).label


def why_not_comparable(run: RecordedRun, baseline: RecordedRun) -> str:
    """What keeps two runs from being subtracted, or nothing.

    Comparable is: same training data, same validation text, same tokenizer, and budgets that
    differ by less than one step, to which they are rounded: FLOP where one of the two was sized to
    the other's FLOP, else tokens. Nothing here measures the budget of what was sized to seconds.
    """
    reasons = []
    for key, name in {
        "tokenizer": "tokenizer",
        "fingerprint": "training data",
        "validation_fingerprint": "validation text",
    }.items():
        theirs, ours = (getattr(one.facts.data, key) for one in (baseline, run))
        if theirs != ours:
            shown = f" ({ours}, not {theirs})" if key == "tokenizer" else ""
            reasons.append(f"other {name}{shown}")
    reasons += [reason] if (reason := _other_budget(run, baseline)) else []
    return " and ".join(reasons)


def _other_budget(run: RecordedRun, baseline: RecordedRun) -> str:
    limits = [one.facts.plan.get("seconds") for one in (run, baseline)]
    if limits[0] != limits[1]:
        ours, theirs = (f"{limit} seconds" if limit else "none" for limit in limits)
        return f"other time limit ({ours}, not {theirs})"
    leagues = [one.facts.budget for one in (run, baseline)]
    kinds = {league.kind for league in leagues if league}
    if len(kinds) == 2:
        return f"other league ({leagues[0].kind}, not {leagues[1].kind})"
    if kinds == {"seconds"}:
        return ""
    cost = [one.facts.flops_per_token if kinds else 1 for one in (run, baseline)]
    ours, theirs = run.budget * cost[0], baseline.budget * cost[1]
    step = max(run.facts.tokens_per_step * cost[0], baseline.facts.tokens_per_step * cost[1])
    if abs(ours - theirs) < step:
        return ""
    if kinds:
        return f"other budget ({ours:.3g} FLOP, not {theirs:.3g})"
    return f"other budget ({run.budget:,} tokens, not {baseline.budget:,})"


def curve(run: RecordedRun, split: str, metric: str, x: str) -> Curve:
    """What was recorded of a metric.

    Args:
        split: "train" or "validation".
        metric: "loss" (nats per token) or "accuracy" (share of the tokens, 0 to 1).
        x: "tokens", "steps", "seconds" (of training) or "flops" (tokens times FLOPs per token).
    """
    columns = run.train if split == "train" else run.validation
    at = columns[X_COLUMNS[x]]
    if x == "flops":
        at = at * run.facts.flops_per_token
    value = columns[metric]
    before = np.maximum.accumulate(np.concatenate([[-np.inf], at[:-1]])) if len(at) else at
    rises = at > before  # two steps within one tick of the clock: the first of them stands
    if not rises.all():
        at, value = at[rises], value[rises]
    return Curve(at, np.where(np.isfinite(value), value, np.nan))


def final_rows(pairs: list[Pair]) -> list[dict]:
    """What the table says of each run, in the order given; a number that is not there is None.

    `loss`, `bits_per_byte` and `accuracy` are those of the last validation, after
    `validated_tokens`; `difference` is loss minus the baseline's, between finished runs only.
    `marks` are the sentences that a reader of the numbers has to know.
    """
    differences = [_final_difference(pair) for pair in pairs]
    seeds = Counter(
        (pair.run.plan, pair.run.label)
        for pair, value in zip(pairs, differences, strict=True)
        if value is not None
    )
    return [
        _final_row(pair, value, seeds[pair.run.plan, pair.run.label])
        for pair, value in zip(pairs, differences, strict=True)
    ]


def _final_row(pair: Pair, difference: float | None, num_seeds: int) -> dict:
    run = pair.run
    last = _last(run.validation)
    return {
        "run": str(run.path),
        "plan": run.plan,
        "experiment": run.label,
        "seed": run.seed,
        "status": run.facts.status,
        "tokens": run.tokens,
        "validated_tokens": None if last is None else int(last["tokens"]),
        "loss": _number(last, "loss"),
        "bits_per_byte": _number(last, "bits_per_byte"),
        "accuracy": _number(last, "accuracy"),
        "difference": difference,
        "baseline": None if pair.baseline is None else str(pair.baseline.path),
        "tokens_per_second": tokens_per_second(run),
        **{key: run.facts.parameters[key] for key in ("trained", "matmul", "lookup")},
        "marks": _marks(pair, difference, num_seeds),
    }


def _marks(pair: Pair, difference: float | None, num_seeds: int) -> list[str]:
    run = pair.run
    marks = []
    if pair.is_baseline:
        marks.append("baseline")
    if difference is not None and num_seeds < 2:
        marks.append("one seed: no evidence")
    if pair.obstacle:
        marks.append(f"not compared: {pair.obstacle}")
    marks += _state_marks(run)
    if pair.comparable and run.finished and not pair.baseline.finished:
        marks.append("not compared: the baseline is not finished")
    return marks + nature_marks([run])


def nature_marks(runs: list[RecordedRun]) -> list[str]:
    """What a reader has to know of runs' size, text and likelihood, whatever their state."""
    marks = [
        f"scale differs: {key}={ours}, the plan's is {theirs}"
        for run in runs
        for key, (theirs, ours) in run.facts.scale_differs.items()
    ]
    for run in runs:
        data, asked = run.facts.data, run.facts.plan.get("validation", {}).get("tokens", 0)
        if data.trained_on:
            marks.append(f"{data.trained_on:.0%} of the held-out text is also trained on")
        if data.validation_tokens < min(FEW_HELD_OUT, asked):
            marks.append(f"only {data.validation_tokens:,} tokens are held out: says little")
        last = _last(run.validation)
        if _number(last, "loss") is not None and _number(last, "bits_per_byte") is None:
            marks.append("no bits per byte: its tokenizer loses text")
    bounds = [run for run in runs if run.facts.bound]
    if bounds:
        marks.append("own log_likelihood: exact or a bound, see its docstring")
    errors = [_number(_last(run.validation), "loss_error") for run in bounds]
    if there := [error for error in errors if error is not None]:
        marks[-1] += f"; its draws leave each loss a standard error of {max(there):.1g} at most"
    return list(dict.fromkeys(marks))


def _state_marks(run: RecordedRun) -> list[str]:
    last = _last(run.validation)
    if run.finished and last is None:
        return ["never validated"]
    if run.finished:
        short = last["step"] < run.facts.num_steps
        return [f"validated at {int(last['tokens']):,} tokens"] if short else []
    state = run.facts.status if run.failed else "not finished"
    at = "never validated" if last is None else f"validated at {int(last['tokens']):,} tokens"
    return [f"{state}: {at}"]


def _final_difference(pair: Pair) -> float | None:
    if not pair.comparable or pair.run.final is None or pair.baseline.final is None:
        return None
    return pair.run.final["loss"] - pair.baseline.final["loss"]


def _last(columns: Columns) -> Row | None:
    if not len(columns["step"]):
        return None
    return {name: float(values[-1]) for name, values in columns.items()}


def _number(row: Row | None, key: str) -> float | None:
    return None if row is None or not np.isfinite(row[key]) else row[key]


def tokens_per_second(run: RecordedRun) -> float | None:
    """Of training alone, over all steps so far; None before the first one."""
    last = _last(run.train)
    if last is None or not last["seconds"] > 0:
        return None
    return last["tokens"] / last["seconds"]


def _pair(
    run: RecordedRun,
    runs: list[RecordedRun],
    baseline: str | RecordedRun | None,
    like_for_like: bool,
) -> Pair:
    if isinstance(baseline, RecordedRun):
        if run is not baseline and run.seed != baseline.seed:
            return Pair(run, None, f"the baseline has seed {baseline.seed}")
        label, candidates = baseline.label, [baseline]
    else:
        on_plan = [other for other in runs if other.plan == run.plan]
        label = baseline or default_baseline(on_plan)
        label = _without_size(_with_changes_of(run, label) if like_for_like else label)
        size = run.facts.changes.get("size")
        sized = [other for other in on_plan if other.facts.changes.get("size") == size]
        candidates = [other for other in sized if unsized(other) == label]
        if not candidates:
            return Pair(run, None, f"no {label} on plan {run.plan}")
        if unsized(run) == label:
            return Pair(run, run)
        candidates = [other for other in candidates if other.seed == run.seed]
    if not candidates:
        return Pair(run, None, f"{label} has no run of this seed")
    if len(candidates) > 1:
        return Pair(run, None, f"{label} has several runs of this seed")
    if run is candidates[0]:
        return Pair(run, run)
    return Pair(run, candidates[0], why_not_comparable(run, candidates[0]))


def unsized(run: RecordedRun) -> str:
    """The label without the rung of a ladder of sizes: an idea is held against its own size."""
    return _without_size(run.label) if "size" in run.facts.changes else run.label


def _without_size(label: str) -> str:
    return ",".join(part for part in label.split(",") if not part.startswith("size="))


def _experiment(label: str) -> str:
    return label.partition(",")[0]


def _with_changes_of(run: RecordedRun, label: str) -> str:
    """The label of the baseline's experiment with the run's changes, but for its league."""
    _, *changes = run.label.split(",")
    league = run.facts.budget
    kept = [change for change in changes if not league or change != f"budget={league.kind}"]
    return ",".join([_experiment(label), *kept])


def _some(labels: list[str]) -> str:
    return ", ".join(labels[:8]) + (", ..." if len(labels) > 8 else "")


def _read_csv(path: Path, names: list[str]) -> Columns:
    """These columns, an empty cell as NaN; no rows where there is no file yet."""
    data = whole_lines(path) if path.exists() else b""
    if not data:
        return {name: np.empty(0) for name in names}
    types = dict.fromkeys(names, pa.float64())
    wanted = csv.ConvertOptions(include_columns=names, column_types=types)
    try:
        table = csv.read_csv(pa.BufferReader(data), convert_options=wanted)
    except (pa.ArrowInvalid, KeyError) as error:
        raise damaged(path, error.args[0].splitlines()[0]) from None
    if not table.num_rows:
        return {name: np.empty(0) for name in names}
    (batch,) = table.combine_chunks().to_batches()
    tensor = batch.to_tensor(null_to_nan=True, row_major=False)  # a column.to_numpy() loads pandas
    values_RC = tensor.to_numpy()
    columns = dict(zip(names, values_RC.T, strict=True))
    for name in ("step", "tokens", "seconds"):
        values = columns[name]
        if not np.isfinite(values).all() or values[0] < 0 or (np.diff(values) < 0).any():
            raise damaged(path, f"its {name} are no numbers that rise")
    if (np.isfinite(values_RC) & (np.abs(values_RC) > _MOST)).any():
        raise damaged(path, f"it has a number beyond {_MOST:g}")
    return columns
