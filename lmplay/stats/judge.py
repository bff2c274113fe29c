"""Turns pairs of runs into verdicts: one row for each experiment of each plan."""

from math import ceil
from statistics import fmean, median

import numpy as np

from lmplay.run.folder import RunFolder
from lmplay.stats.arms import (
    BETTER,
    CANNOT_TELL,
    WORSE,
    Arm,
    Companions,
    Look,
    is_companion,
    judged_arms,
    unproven,
    with_seeds,
)
from lmplay.stats.compare import (
    Pair,
    RecordedRun,
    nature_marks,
    pair_runs,
    read_run,
    tokens_per_second,
)
from lmplay.stats.looks import level_of
from lmplay.stats.verdict import ALPHA, crossing, mean_interval, seeds_needed

UNDECLARED = "its looks were not declared: right only if nobody looked before"

_FEW, _MANY = 5, 1000  # seeds that are proposed where nothing is known, and at most
_MACHINE = ("device_name", "threads", "world_size", "compiled")
_UNEQUAL = 0.05  # a league of seconds in which the seconds differ by a larger share is marked
_NO_SETTINGS = ("name", "description", "datasets", "tokens", "checkpoints", "margin")  # of a plan


def verdicts_of(
    folders: list[RunFolder], baseline: str | None = None, margin: float | str | None = None
) -> list[dict]:
    """The verdict rows of the runs in these folders; `judge` says what a row holds.

    Args:
        baseline: a label; without it, as `pair_runs` chooses.
        margin: as in `judge`.
    """
    return judge(pair_runs([read_run(folder) for folder in folders], baseline), margin)


def judge(pairs: list[Pair], margin: float | str | None = None) -> list[dict]:
    """The verdict rows of these runs: one for each plan and label.

    `mean`, `sd`, `bits_per_byte` and `accuracy` are of the last validation of the runs that count:
    finished ones, with a finished baseline of the same seed, that the last complete look of their
    design is at (of the baseline: all finished ones). `difference`, `difference_sd`, `correlation`,
    `interval` and `p` are of the paired differences of that loss, the last two at the level of the
    look; `p_holm` is corrected for all labels of the plan. What a look has told stays told. Where
    a design has several rates, losses are the lowest over them, and `sensitivity` is what a wrong
    rate costs. `next` is what makes a valid further look, as options of lmp-trainer. `marks` are
    the sentences that a reader of the numbers has to know. A number that is not there is None.

    Args:
        margin: within which a difference counts as none, nats per token or a share of the compute
            ("5%"); without it, the plan's.
    Returns:
        For each plan the baseline, then the others, the best difference first, then what cannot be
        compared. Where a plan has several baselines, each stands above its own.
    """
    companions = Companions([pair.run for pair in pairs])
    plans: dict[str, dict[str, list[Pair]]] = {}
    for pair in pairs:
        if not is_companion(pair.run):
            plans.setdefault(pair.run.plan, {}).setdefault(pair.run.label, []).append(pair)
    rows = []
    for members in plans.values():
        arms = judged_arms(list(members.values()), companions, margin)
        rows += sorted((_row(arm) for arm in arms), key=_rank)
    return rows


def _rank(row: dict) -> tuple:
    is_baseline = row["experiment"] == row["baseline"]
    if not is_baseline and row["difference"] is None:
        return (True, "", False, 0.0, row["experiment"])
    return (False, row["baseline"], not is_baseline, row["difference"] or 0.0, row["experiment"])


def _row(arm: Arm) -> dict:
    look, test = arm.look, arm.look.test
    runs, counted = [pair.run for pair in arm.pairs], look.pairs
    finals = [pair.run.final for pair in counted if len(arm.rates) == 1]
    differences, has_rates = look.differences, len(arm.rates) > 1
    ratios, ratio_marks = ({}, []) if arm.is_baseline or has_rates else _ratios(counted)
    parameters = runs[0].facts.parameters
    failures = sum(pair.run.failed for pair in arm.current)
    row = {
        "plan": runs[0].plan,
        "experiment": runs[0].label,
        "baseline": _name_of_baseline(arm.pairs),
        "seeds": len(counted),
        "mean": fmean(look.ours) if len(counted) else None,
        "sd": _sd(look.ours),
        "bits_per_byte": _mean(finals, "bits_per_byte"),
        "accuracy": _mean(finals, "accuracy"),
        "difference": float(differences.mean()) if len(differences) else None,
        "difference_sd": _sd(differences),
        "correlation": _correlation(look),
        "interval": None if test is None else [test.low, test.high],
        "p": None if test is None else look.p,
        "p_holm": None if np.isnan(arm.p_holm) else arm.p_holm,
        "verdict": arm.word or (CANNOT_TELL if len(differences) else None),
        "margin": arm.margin,
        "look": _place(arm),
        "next": _next(arm),
        "is_pending": arm.is_pending and bool(len(differences)),
        "rates": arm.rates if has_rates else None,
        "sensitivity": fmean(one.sensitivity for one in look.lowest) if look.lowest else None,
        "tokens_ratio": ratios.get("tokens"),
        "seconds_ratio": ratios.get("seconds"),
        "tokens_per_second": _median([tokens_per_second(run) for run in runs]),
        "memory": _most([run.train["memory"] for run in runs]),
        **{key: parameters.get(key) for key in ("trained", "matmul", "lookup", "folded")},
        "failures": failures,
        "unfinished": sum(not run.finished and not run.failed for run in runs),
        "runs": [str(run.path) for run in runs],
        "marks": [
            *_failed(failures, len(arm.current)),
            *look.left_out,
            *(["one seed: no evidence"] if len(differences) == 1 else []),
            *_word_marks(arm),
            *_design_marks(arm),
            *_rate_marks(arm),
            *_edits(counted),
            *ratio_marks,
            *_unequal_seconds(counted),
            *nature_marks(runs),
        ],
    }
    return row


def _name_of_baseline(pairs: list[Pair]) -> str | None:
    """The label; of a baseline on another plan, with that plan."""
    for pair in pairs:
        if pair.baseline is not None:
            same_plan = pair.baseline.plan == pair.run.plan
            return (
                pair.baseline.label if same_plan else f"{pair.baseline.plan}/{pair.baseline.label}"
            )
    return None


def _failed(failures: int, num_runs: int) -> list[str]:
    if not failures:
        return []
    return [f"{failures} of {num_runs} runs failed" if num_runs > 1 else "its run failed"]


def _word_marks(arm: Arm) -> list[str]:
    """What a verdict leaves out, or says besides."""
    look, margin, marks = arm.look, arm.margin, []
    if look.test is None:
        return marks
    tested = arm.stages[arm.look_number]
    sign = BETTER if look.test.mean < 0 else WORSE
    if arm.word is None and arm.p_holm < ALPHA and sign in unproven(tested):
        marks.append(f"{sign} only where both survived: no verdict")
    if margin is not None and arm.word in (BETTER, WORSE):
        ends = mean_interval(look.differences, level_of(arm.looks, 2 * ALPHA))[1:]
        if min(map(abs, ends)) > margin and ends[0] * ends[1] > 0:
            marks.append(f"{arm.word} by more than {margin:g}")
    if margin is not None and arm.word not in (None, BETTER, WORSE) and arm.p_holm < ALPHA:
        marks.append(f"{sign}, by less than {margin:g}")
    return marks


def _design_marks(arm: Arm) -> list[str]:
    """What was looked at before, or is yet to be looked at."""
    if arm.is_baseline:
        return []
    if arm.design is None:
        return [UNDECLARED] if arm.look.test is not None else []
    marks = []
    earlier = [pair for pair in arm.pairs if pair not in arm.current]
    looked = [pair for pair in earlier if pair.run.facts.design is not None]
    loose = [pair for pair in earlier if pair.run.facts.design is None]
    if looked:
        marks.append(with_seeds("looked at before, left out", looked, 0))
    if loose:
        marks.append(with_seeds("declared by no design, left out", loose, 0))
    if not arm.stages:
        screen, first = arm.design.screen, arm.design.looks[0]
        marks.append(f"its {'screen' if screen else 'first look'} is at {screen or first} seeds")
    elif arm.is_screened and arm.word is None:
        marks.append("kept by the screen")
    return marks


def _rate_marks(arm: Arm) -> list[str]:
    found = arm.look.lowest
    if not found:
        return []
    marks = [f"lowest loss over rates {', '.join(f'{rate:g}' for rate in arm.rates)}"]
    for edge, where in ((-1, "lowest"), (1, "highest")):
        if at := sum(one.edge == edge for one in found):
            marks.append(f"best at the {where} rate on {at} of {len(found)} seeds: try beyond")
    if runs := sum(not one.fitted for one in found):
        marks.append(f"no parabola on {runs} of {len(found)} seeds: the best run counts")
    return marks


def _place(arm: Arm) -> dict | None:
    """Which of its planned looks the row is of."""
    if arm.design is None or arm.look.test is None:
        return None
    screen = 1 if arm.design.screen else 0
    number = arm.look_number + 1 - screen  # 0 is the screen
    return {"number": number, "of": len(arm.design.looks), "level": arm.look.level}


def _next(arm: Arm) -> str | None:
    look, test, margin = arm.look, arm.look.test, arm.margin
    if arm.word is not None or not len(look.differences):
        return None
    if arm.is_pending:
        return arm.design.words
    rates = f" --rates {','.join(f'{rate:g}' for rate in arm.rates)}" if look.lowest else ""
    if test is None and (arm.design is None or not arm.design.spends):
        return f"--seeds {_FEW}{rates}"
    known = [pair.run.seed for pair in arm.pairs]
    fresh = max([max(known) + 1, *([arm.design.seeds.stop] if arm.design else [])])
    if test is None:
        return f"--seed {fresh} --seeds {_FEW}{rates}"
    if not test.mean or arm.p_holm < ALPHA:
        return None
    needed = [seeds_needed(abs(test.mean) / test.sd, arm.holm_level)]
    if margin is not None and abs(test.mean) < margin:
        needed.append(ceil((3 * test.sd / margin) ** 2))
    told = [max(number, 2) for number in needed if number is not None and number <= _MANY]
    return f"--seed {fresh} --seeds {min(told)}{rates}" if told else None


def _sd(values: np.ndarray) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _correlation(look: Look) -> float | None:
    """Of the losses of the two arms over seeds: near 1, pairing helps most."""
    ours, theirs = look.ours, look.theirs
    if len(theirs) < 3 or not np.ptp(ours) or not np.ptp(theirs):
        return None
    return float(np.corrcoef(ours, theirs)[0, 1])


def _ratios(pairs: list[Pair]) -> tuple[dict[str, dict | None], list[str]]:
    """Of the baseline's tokens and seconds, what its final loss took; and what to know of them."""
    marks = []
    elsewhere = {pair.run.seed: keys for pair in pairs if (keys := _other_machine(pair))}
    timed = [pair for pair in pairs if pair.run.seed not in elsewhere]
    if elsewhere:
        keys = ", ".join(sorted(set().union(*elsewhere.values())))
        left_out = [pair for pair in pairs if pair.run.seed in elsewhere]
        marks.append(with_seeds(f"not compared in seconds: other {keys}", left_out, len(pairs)))
    reached = sum(_reached(pair, "tokens") is not None for pair in pairs)
    if 0 < reached < len(pairs):
        marks.append(f"came to its baseline's loss on {reached} of {len(pairs)} seeds")
    return {"tokens": _ratio(pairs, "tokens"), "seconds": _ratio(timed, "seconds")}, marks


def _reached(pair: Pair, column: str) -> float | None:
    columns = pair.run.validation
    return crossing(columns[column], columns["loss"], pair.baseline.final["loss"])


def _ratio(pairs: list[Pair], column: str) -> dict | None:
    needed = [_reached(pair, column) for pair in pairs]
    whole = [pair.run.final[column] for pair in pairs]
    of = [pair.baseline.final[column] for pair in pairs]
    spent = [w if n is None else n for n, w in zip(needed, whole, strict=True)]
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(np.array(spent) / np.array(of))
    if not pairs or not np.isfinite(logs).all():
        return None
    reached = [(pair, n) for pair, n in zip(pairs, needed, strict=True) if n is not None]
    is_upper = any(_is_upper_bound(pair, n, column) for pair, n in reached)
    if is_upper and None in needed:
        return None  # at most for some seeds, at least for others: their mean bounds nothing
    bound = ">=" if None in needed else "<=" if is_upper else ""
    interval = None
    if len(logs) > 1 and None not in needed:
        interval = [float(end) for end in np.exp(mean_interval(logs)[1:])]
    return {"value": float(np.exp(logs.mean())), "interval": interval, "bound": bound}


def _is_upper_bound(pair: Pair, needed: float, column: str) -> bool:
    """A schedule that is sized to less would have done with less; so might the first point."""
    at = pair.run.validation[column]
    decays = pair.run.facts.plan["schedule"]["name"] != "constant"
    return (decays and needed < at[-1]) or needed == at[0]


def _other_machine(pair: Pair) -> set[str]:
    """What keeps the seconds of the two from being compared."""
    ours, theirs = pair.run.facts, pair.baseline.facts
    changed = {*ours.changed_midway, *theirs.changed_midway}
    return {key for key in _MACHINE if getattr(ours, key) != getattr(theirs, key) or key in changed}


def _unequal_seconds(pairs: list[Pair]) -> list[str]:
    league = pairs[0].run.facts.budget if pairs else None
    if not league or league.kind != "seconds" or pairs[0].is_baseline:
        return []
    ours, theirs = (
        sum(run.final["seconds"] for run in runs)
        for runs in ([pair.run for pair in pairs], [pair.baseline for pair in pairs])
    )
    share = ours / theirs - 1
    if abs(share) <= _UNEQUAL:
        return []
    much = f"{100 * abs(share):.0f} % {'more' if share > 0 else 'fewer'}"
    return [f"took {much} seconds than its baseline"]


def _edits(pairs: list[Pair]) -> list[str]:
    """Settings that differ though the labels do not say so: a plan or a file was edited."""
    marks = []
    among = sorted({key for pair in pairs for key in _between_seeds(pair.run, pairs[0].run)})
    if among:
        marks.append(f"its seeds differ in {', '.join(among)}")
    apart = sorted({key for pair in pairs for key in _unsaid(pair.run, pair.baseline)})
    if apart:
        marks.append(f"differs from its baseline, unsaid in its name, in {', '.join(apart)}")
    return marks


def _between_seeds(run: RecordedRun, other: RecordedRun) -> set[str]:
    ours, theirs = ({**_settings(one), **_flat(one.facts.config)} for one in (run, other))
    source = {"experiment.py"} if _source(run) != _source(other) else set()
    return source | {key for key in ours.keys() | theirs if ours.get(key) != theirs.get(key)}


def _unsaid(run: RecordedRun, baseline: RecordedRun) -> set[str]:
    ours, theirs = _settings(run), _settings(baseline)
    said = [*run.facts.changes, *baseline.facts.changes]
    return {
        key for key in ours.keys() | theirs
        if ours.get(key) != theirs.get(key)
        and not any(key == one or key.startswith(f"{one}.") for one in said)
    }  # fmt: skip


def _settings(run: RecordedRun) -> dict[str, object]:
    """What a run was trained with, by dotted key."""
    plan = {key: value for key, value in run.facts.plan.items() if key not in _NO_SETTINGS}
    return {**_flat(plan), "precision": run.facts.precision}


def _flat(values: dict, before: str = "") -> dict[str, object]:
    flat = {}
    for key, value in values.items():
        inner = (
            _flat(value, f"{before}{key}.") if isinstance(value, dict) else {before + key: value}
        )
        flat.update(inner)
    return flat


def _source(run: RecordedRun) -> bytes:
    path = RunFolder(run.path).experiment_py
    return path.read_bytes() if path.is_file() else b""


def _mean(finals: list, key: str) -> float | None:
    values = [final[key] for final in finals]
    return fmean(values) if values and np.isfinite(values).all() else None


def _median(values: list[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return median(there) if there else None


def _most(columns: list[np.ndarray]) -> int | None:
    values = np.concatenate(columns)
    there = values[np.isfinite(values)]
    return int(there.max()) if len(there) else None
