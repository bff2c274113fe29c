"""What an idea is worth in compute at each size of a ladder, and whether that grows."""

from dataclasses import dataclass

import numpy as np

from lmplay.stats.compare import Pair, RecordedRun, tokens_per_second, unsized
from lmplay.stats.verdict import mean_interval

NATS_PER_BYTE = 0.39  # that no model saves: 1.69 nats for a token of about 4.3 bytes
PINS = (0.5, 1.0, 1.5)  # factors of it, since few sizes do not tell it
EXPONENT = 0.154  # of compute, in the loss above that floor: 0.34 x 0.28 / (0.34 + 0.28)


@dataclass(frozen=True)
class _Rung:
    """An idea and its baseline at one size; arrays over the seeds that all sizes share."""

    size: float
    flops: float  # of the baseline's run
    ours: np.ndarray  # final losses
    theirs: np.ndarray
    speed: float  # our tokens per second over the baseline's


def ladder_rows(pairs: list[Pair]) -> list[dict]:
    """A row for each experiment of each plan that was trained at three sizes or more.

    The baseline's losses L over its compute C give L = E + A C**-alpha, with E pinned at what no
    model saves of the text; an idea's worth at a size is the compute that the baseline would need
    for its loss, over the compute that it had: ((L_baseline - E) / (L_idea - E))**(1 / alpha).

    Returns:
        `plan`, `experiment`, `baseline`, `sizes`: for each `size`, `flops`, `worth`, its
        `interval` and `worth_in_seconds`; `trend`: for E times 0.5, 1 and 1.5 "grows", "shrinks"
        or "cannot tell", by the slope of ln(worth) over ln(C), seed by seed; `alpha`, `floor` (E).
    Source: Hoffmann et al. 2022, arXiv:2203.15556, section 3.3, for the form and the pin of E.
    """
    groups: dict[tuple[str, str], list[Pair]] = {}
    for pair in pairs:
        rate = pair.run.facts.rate
        if pair.comparable and (rate is None or rate.factor == 1):
            groups.setdefault((pair.run.plan, unsized(pair.run)), []).append(pair)
    rows = []
    for (plan, label), those in groups.items():
        rungs = _rungs(those)
        if len(rungs) >= 3 and len(rungs[0].ours) >= 2:
            rows.append({"plan": plan, "experiment": label, **_worth(those, rungs)})
    return rows


def margin_in_nats(margin: float | str | None, pairs: list[Pair]) -> float | None:
    """A margin in nats per token; a share r of the compute is alpha (L - E) ln(1 + r) of them.

    L is the mean of the baseline's final losses, E what no model saves of the text.

    Args:
        margin: nats per token, or a share such as "5%".
        pairs: of one label.
    Source: Hoffmann et al. 2022, arXiv:2203.15556, section 3.3: alpha from the two exponents there.
    """
    if not isinstance(margin, str):
        return margin
    baselines = [p.baseline for p in pairs if p.baseline is not None and p.baseline.final]
    if not baselines:
        return None
    above = float(np.mean([b.final["loss"] for b in baselines])) - _floor(baselines[0])
    nats = EXPONENT * above * np.log1p(float(margin.removesuffix("%")) / 100)
    return float(f"{nats:.2g}") if nats > 0 else None


def _floor(run: RecordedRun) -> float:
    data = run.facts.data
    return NATS_PER_BYTE * data.validation_bytes / data.validation_tokens


def _rungs(pairs: list[Pair]) -> list[_Rung]:
    by_size: dict[float, dict[int, Pair]] = {}
    for pair in pairs:
        if pair.run.final is not None and pair.baseline.final is not None:
            size = float(pair.run.facts.changes.get("size", 1))
            by_size.setdefault(size, {})[pair.run.seed] = pair
    if not by_size:
        return []
    seeds = sorted(set.intersection(*(set(found) for found in by_size.values())))
    rungs = []
    for size, found in sorted(by_size.items()):
        those = [found[seed] for seed in seeds]
        if not those:
            return []
        facts = those[0].baseline.facts
        losses = [[r.final["loss"] for r in (p.run, p.baseline)] for p in those]
        speeds = [[tokens_per_second(r) or np.nan for r in (p.run, p.baseline)] for p in those]
        speed = float(np.median([ours / theirs for ours, theirs in speeds]))
        flops = facts.num_tokens * facts.flops_per_token
        rungs.append(_Rung(size, flops, *np.array(losses).T, speed))
    return rungs


def _worth(pairs: list[Pair], rungs: list[_Rung]) -> dict:
    floor = _floor(pairs[0].baseline)
    trends = {}
    for pin in PINS:
        made = _logs(rungs, floor * pin)
        trends[f"{pin:g}"] = "cannot tell" if made is None else _trend(rungs, made[0])
    made = _logs(rungs, floor)
    if made is None:  # a loss below what is pinned
        return {"baseline": unsized(pairs[0].baseline), "sizes": [], "trend": trends,
                "alpha": None, "floor": floor}  # fmt: skip
    logs_RN, alpha = made
    sizes = []
    for rung, logs_N in zip(rungs, logs_RN, strict=True):
        middle, low, high = (float(np.exp(end)) for end in mean_interval(logs_N))
        seconds = None if np.isnan(rung.speed) else middle * rung.speed
        sizes.append({"size": rung.size, "flops": rung.flops, "worth": middle,
                      "interval": [low, high], "worth_in_seconds": seconds})  # fmt: skip
    return {"baseline": unsized(pairs[0].baseline), "sizes": sizes, "trend": trends,
            "alpha": alpha, "floor": floor}  # fmt: skip


def _logs(rungs: list[_Rung], floor: float) -> tuple[np.ndarray, float] | None:
    """Of the worth, sizes by seeds, and alpha; None where the baseline does not follow the form."""
    above = [np.minimum(rung.ours, rung.theirs).min() for rung in rungs]
    if min(above) <= floor:
        return None
    compute = np.log([rung.flops for rung in rungs])
    left = np.log([rung.theirs.mean() - floor for rung in rungs])
    alpha = -float(np.polyfit(compute, left, 1)[0])
    if not alpha > 0:
        return None
    worth = [np.log((r.theirs - floor) / (r.ours - floor)) / alpha for r in rungs]
    return np.array(worth), alpha


def _trend(rungs: list[_Rung], logs_RN: np.ndarray) -> str:
    slopes_N = np.polyfit(np.log([rung.flops for rung in rungs]), logs_RN, 1)[0]
    _, low, high = mean_interval(slopes_N)
    return "grows" if low > 0 else "shrinks" if high < 0 else "cannot tell"
