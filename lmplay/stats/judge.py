"""Turns pairs of runs into verdicts: one row for each experiment of each plan."""

from dataclasses import dataclass
from statistics import fmean, median, stdev

import numpy as np

from lmplay.run.folder import RunFolder
from lmplay.stats.compare import (
    Pair,
    RecordedRun,
    nature_marks,
    tokens_per_second,
    why_not_comparable,
)
from lmplay.stats.verdict import (
    ALPHA,
    crossing,
    holm,
    holm_levels,
    mean_interval,
    paired,
    seeds_needed,
)

_MACHINE = ("device_name", "threads", "world_size", "compiled")
_UNEQUAL = 0.05  # a league of seconds in which the seconds differ by a larger share is marked
_NO_SETTINGS = ("name", "description", "datasets", "tokens", "checkpoints")  # keys of a plan


@dataclass
class _Standing:
    """The row of one label, and what the verdict needs besides."""

    row: dict
    differences: np.ndarray  # of the final loss to the baseline's, seed by seed
    unproven: set[str]  # verdicts that only hold for the seeds that survived


def judge(pairs: list[Pair]) -> list[dict]:
    """The verdict rows of these runs: one for each plan and label.

    `mean`, `sd`, `bits_per_byte` and `accuracy` are of the last validation of the runs that count:
    finished ones, with a finished baseline of the same seed (of the baseline: all finished ones).
    `difference`, `interval` and `p` are of the paired differences of that loss; `p_holm` is
    corrected for all labels of the plan. `marks` are the sentences that a reader of the numbers
    has to know. A number that is not there is None.

    Returns:
        For each plan the baseline, then the others, the best difference first, then what cannot be
        compared. Where a plan has several baselines, each stands above its own.
    """
    plans: dict[str, dict[str, list[Pair]]] = {}
    for pair in pairs:
        plans.setdefault(pair.run.plan, {}).setdefault(pair.run.label, []).append(pair)
    return [row for members in plans.values() for row in _judge_plan(members)]


def _judge_plan(members: dict[str, list[Pair]]) -> list[dict]:
    standings = [_standing(pairs) for pairs in members.values()]
    p = np.array([np.nan if s.row["p"] is None else s.row["p"] for s in standings])
    for standing, p_holm, level in zip(standings, holm(p), holm_levels(p), strict=True):
        if not np.isnan(p_holm):
            _decide(standing, float(p_holm), float(level))
    return sorted((standing.row for standing in standings), key=_rank)


def _decide(standing: _Standing, p_holm: float, level: float) -> None:
    row = standing.row
    row["p_holm"] = p_holm
    if p_holm >= ALPHA:
        if row["difference"]:
            effect = abs(row["difference"]) / float(np.std(standing.differences, ddof=1))
            needed = seeds_needed(effect, level)
            row["further_seeds"] = None if needed is None else needed - row["seeds"]
        return
    word = "better" if row["difference"] < 0 else "worse"
    if word in standing.unproven:
        row["marks"].append(f"{word} only where both survived: no verdict")
    else:
        row["verdict"] = word


def _rank(row: dict) -> tuple:
    is_baseline = row["experiment"] == row["baseline"]
    if not is_baseline and row["difference"] is None:
        return (True, "", False, 0.0, row["experiment"])
    return (False, row["baseline"], not is_baseline, row["difference"] or 0.0, row["experiment"])


def _standing(pairs: list[Pair]) -> _Standing:
    runs = [pair.run for pair in pairs]
    is_baseline = any(pair.is_baseline for pair in pairs)
    counted, left_out = _counted(pairs, is_baseline)
    finals = [pair.run.final for pair in counted]
    losses = [final["loss"] for final in finals]
    theirs = [] if is_baseline else [pair.baseline.final["loss"] for pair in counted]
    differences = np.array(losses[: len(theirs)]) - np.array(theirs)
    test = paired(differences) if len(differences) > 1 else None
    ratios, ratio_marks = ({}, []) if is_baseline else _ratios(counted)
    parameters = runs[0].facts.parameters
    failures = sum(run.failed for run in runs)
    row = {
        "plan": runs[0].plan,
        "experiment": runs[0].label,
        "baseline": _name_of_baseline(pairs),
        "seeds": len(counted),
        "mean": fmean(losses) if losses else None,
        "sd": stdev(losses) if len(losses) > 1 else None,
        "bits_per_byte": _mean(finals, "bits_per_byte"),
        "accuracy": _mean(finals, "accuracy"),
        "difference": float(differences.mean()) if len(differences) else None,
        "interval": None if test is None else [test.low, test.high],
        "p": None if test is None else test.p,
        "p_holm": None,
        "verdict": "cannot tell" if len(differences) else None,
        "further_seeds": None,
        "tokens_ratio": ratios.get("tokens"),
        "seconds_ratio": ratios.get("seconds"),
        "tokens_per_second": _median([tokens_per_second(run) for run in runs]),
        "memory": _most([run.train["memory"] for run in runs]),
        **{key: parameters.get(key) for key in ("trained", "matmul", "lookup", "folded")},
        "failures": failures,
        "unfinished": sum(not run.finished and not run.failed for run in runs),
        "runs": [str(run.path) for run in runs],
        "marks": [
            *_failed(failures, len(runs)),
            *left_out,
            *(["one seed: no evidence"] if len(differences) == 1 else []),
            *_edits(counted),
            *ratio_marks,
            *_unequal_seconds(counted),
            *_nature(runs),
        ],
    }
    return _Standing(row, differences, _unproven(pairs))


def _name_of_baseline(pairs: list[Pair]) -> str | None:
    """The label; of a baseline on another plan, with that plan."""
    for pair in pairs:
        if pair.baseline is not None:
            same_plan = pair.baseline.plan == pair.run.plan
            return (
                pair.baseline.label if same_plan else f"{pair.baseline.plan}/{pair.baseline.label}"
            )
    return None


def _counted(pairs: list[Pair], is_baseline: bool) -> tuple[list[Pair], list[str]]:
    """The pairs whose final losses count, one for each seed, on one ruler; why others do not."""
    reasons: dict[str, list[Pair]] = {}
    by_seed: dict[int, list[Pair]] = {}
    for pair in pairs:
        if reason := _why_it_does_not_count(pair, is_baseline):
            reasons.setdefault(reason, []).append(pair)
        elif not pair.run.failed:
            by_seed.setdefault(pair.run.seed, []).append(pair)
    rulers: list[list[Pair]] = []
    for seed in sorted(by_seed):
        if len(by_seed[seed]) > 1:
            reasons.setdefault("several runs of one seed, left out", []).extend(by_seed[seed])
            continue
        (pair,) = by_seed[seed]
        same = [ruler for ruler in rulers if not why_not_comparable(pair.run, ruler[0].run)]
        if same:
            same[0].append(pair)
        else:
            rulers.append([pair])
    counted = max(rulers, key=len, default=[])
    for ruler in rulers:
        if ruler is not counted:
            why = why_not_comparable(ruler[0].run, counted[0].run)
            reasons.setdefault(f"not mixed with the other seeds: {why}", []).extend(ruler)
    return counted, [_with_seeds(why, those, len(pairs)) for why, those in reasons.items()]


def _why_it_does_not_count(pair: Pair, is_baseline: bool) -> str:
    """Nothing also for a failed run: those are counted."""
    if pair.obstacle:
        return f"not compared: {pair.obstacle}"
    if pair.run.failed:
        return ""
    if not pair.run.finished:
        return "not finished"
    if pair.run.final is None:
        return "no final validation loss"
    if pair.is_baseline:
        return ""
    if is_baseline:
        return "not compared: another run of the baseline"
    if pair.baseline.failed:
        return "the baseline failed"
    if not pair.baseline.finished:
        return "the baseline is not finished"
    return "" if pair.baseline.final is not None else "the baseline has no final validation loss"


def _with_seeds(reason: str, pairs: list[Pair], num_runs: int) -> str:
    if len(pairs) == num_runs and reason.startswith("not compared") and "seed" not in reason:
        return reason
    seeds = sorted({pair.run.seed for pair in pairs})
    shown = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    return f"{reason} ({shown})" if ":" in reason else f"{reason}: {shown}"


def _failed(failures: int, num_runs: int) -> list[str]:
    if not failures:
        return []
    return [f"{failures} of {num_runs} runs failed" if num_runs > 1 else "its run failed"]


def _unproven(pairs: list[Pair]) -> set[str]:
    """What no verdict may say, since seeds are missing on which one side failed."""
    words = set()
    for pair in pairs:
        baseline_failed = pair.baseline is not None and pair.baseline.failed
        other_ruler = pair.baseline is not None and pair.obstacle
        if pair.run.failed and not baseline_failed and not other_ruler:
            words.add("better")
        if pair.run.finished and baseline_failed and not other_ruler:
            words.add("worse")
    return words


def _ratios(pairs: list[Pair]) -> tuple[dict[str, dict | None], list[str]]:
    """Of the baseline's tokens and seconds, what its final loss took; and what to know of them."""
    marks = []
    elsewhere = {pair.run.seed: keys for pair in pairs if (keys := _other_machine(pair))}
    timed = [pair for pair in pairs if pair.run.seed not in elsewhere]
    if elsewhere:
        keys = ", ".join(sorted(set().union(*elsewhere.values())))
        left_out = [pair for pair in pairs if pair.run.seed in elsewhere]
        marks.append(_with_seeds(f"not compared in seconds: other {keys}", left_out, len(pairs)))
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


def _nature(runs: list[RecordedRun]) -> list[str]:
    """What `compare` marks too: another scale, a likelihood of its own."""
    return list(dict.fromkeys(mark for run in runs for mark in nature_marks(run)))


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
