"""Arms of a comparison: which of their runs are looked at, when, and what that tells."""

from dataclasses import dataclass

import numpy as np

from lmplay.run.design import Design
from lmplay.stats.compare import Pair, RecordedRun, why_not_comparable
from lmplay.stats.ladder import margin_in_nats
from lmplay.stats.looks import level_of, spent_at
from lmplay.stats.rates import Lowest, lowest
from lmplay.stats.verdict import ALPHA, Paired, holm, holm_levels, is_equal_within, paired

BETTER, WORSE, CANNOT_TELL, NOT_CONFIRMED = "better", "worse", "cannot tell", "not confirmed"

_KEPT = 2 * 0.1  # two-sided p below which a screen lets an idea go on to fresh seeds


@dataclass
class Look:
    """The runs that a look, or a screen, has seen, and what they say."""

    pairs: list[Pair]  # that count, one for each seed
    left_out: list[str]  # why others do not
    ours: np.ndarray  # final losses, or the lowest ones over rates
    theirs: np.ndarray  # of the baseline; empty for the baseline itself
    lowest: list[Lowest]  # over rates, where there are several
    level: float = ALPHA
    test: Paired | None = None  # None with fewer than two pairs
    p: float = np.nan  # that of the test, dearer by the planned looks

    @property
    def differences(self) -> np.ndarray:
        return self.ours[: len(self.theirs)] - self.theirs


@dataclass
class Arm:
    """One label of a plan, and what is known of it so far."""

    pairs: list[Pair]  # all of them
    design: Design | None  # the newest of its runs; None where they declare none
    current: list[Pair]  # those of that design
    stages: list[list[Pair]]  # of them, those of the screen and of each look that is complete
    rates: list[float]  # more than one where the verdict is on the lowest loss
    margin: float | None = None  # nats per token within which a difference counts as none
    look: Look | None = None  # the last one
    look_number: int = -1  # its place among the stages
    word: str | None = None  # its verdict
    p_holm: float = np.nan
    holm_level: float = np.nan  # that `p` is held to

    @property
    def is_baseline(self) -> bool:
        return any(pair.is_baseline for pair in self.pairs)

    @property
    def is_pending(self) -> bool:
        """Whether a declared look is still to come."""
        is_over = self.is_baseline or self.word is not None or self.design is None
        return not is_over and len(self.stages) < len(self.design.stages)

    @property
    def is_screened(self) -> bool:
        """Whether the last look is no test, but decides who goes on."""
        return bool(self.design and self.design.screen and self.look_number == 0)

    @property
    def looks(self) -> tuple[int, ...]:
        """Numbers of seeds at each planned look."""
        return tuple(self.design.looks) if self.design else (1,)


class Companions:
    """The runs of each experiment at several rates."""

    def __init__(self, runs: list[RecordedRun]):
        self._runs: dict[tuple[str, str, int], dict[float, RecordedRun]] = {}
        for run in runs:
            rate = run.facts.rate
            of, factor = (run.label, 1.0) if rate is None else (rate.of, rate.factor)
            self._runs.setdefault((run.plan, of, run.seed), {})[factor] = run

    def at(self, run: RecordedRun, rates: list[float]) -> list[RecordedRun | None]:
        """A run and its companions at these factors of its rate; None where there is none."""
        found = self._runs.get((run.plan, run.label, run.seed), {})
        return [run if rate == 1 else found.get(rate) for rate in rates]


def is_companion(run: RecordedRun) -> bool:
    """Whether a run only serves to find the lowest loss of another one."""
    design, rate = run.facts.design, run.facts.rate
    return bool(design and len(design.rates) > 1 and rate and rate.factor != 1)


def judged_arms(
    members: list[list[Pair]], companions: Companions, margin: float | str | None
) -> list[Arm]:
    """The arms of one plan after every complete look, taken in the order of the looks.

    Args:
        members: the pairs of each label.
        margin: within which a difference counts as none, nats per token or a share of the compute
            ("5%"); without it, the plan's.
    """
    arms = [_arm(pairs, companions) for pairs in members]
    for arm in arms:
        plans = arm.pairs[0].run.facts.plan.get("margin")
        arm.margin = margin_in_nats(plans if margin is None else margin, arm.pairs)
    rivals = [arm for arm in arms if not arm.is_baseline]
    if rivals and all(len(arm.rates) > 1 for arm in rivals):
        for arm in arms:  # the baseline has the rates of the others
            arm.rates = rivals[0].rates
    for number in range(max((len(arm.stages) for arm in arms), default=0)):
        for arm in arms:
            if arm.word is None and number < len(arm.stages):
                take_look(arm, number, seen(arm, arm.stages[number], companions))
        decide(arms)
    for arm in arms:
        arm.look = arm.look or seen(arm, arm.current, companions)
    return arms


def seen(arm: Arm, pairs: list[Pair], companions: Companions) -> Look:
    """What these of an arm's pairs say, without a test."""
    counted, left_out = _counted(pairs, arm.is_baseline)
    if len(arm.rates) == 1:
        ours = [pair.run.final["loss"] for pair in counted]
        theirs = [pair.baseline.final["loss"] for pair in counted if not arm.is_baseline]
        return Look(counted, left_out, np.array(ours), np.array(theirs), [])
    whole, lacking, ours, theirs = [], [], [], []
    for pair in counted:
        both = [
            _lowest(companions.at(run, arm.rates), arm.rates) for run in (pair.run, pair.baseline)
        ]
        if None in both:
            lacking.append(pair)
            continue
        whole.append(pair)
        ours.append(both[0])
        theirs += [] if arm.is_baseline else [both[1]]
    if lacking:
        shown = ", ".join(f"{rate:g}" for rate in arm.rates)
        why = f"not compared: not both have a run at each of the rates {shown}"
        left_out.append(with_seeds(why, lacking, len(pairs)))
    losses = [np.array([one.loss for one in those]) for those in (ours, theirs)]
    return Look(whole, left_out, *losses, lowest=ours)


def unproven(pairs: list[Pair]) -> set[str]:
    """What no verdict may say, since seeds are missing on which one side failed."""
    words = set()
    for pair in pairs:
        baseline_failed = pair.baseline is not None and pair.baseline.failed
        other_ruler = pair.baseline is not None and pair.obstacle
        if pair.run.failed and not baseline_failed and not other_ruler:
            words.add(BETTER)
        if pair.run.finished and baseline_failed and not other_ruler:
            words.add(WORSE)
    return words


def with_seeds(reason: str, pairs: list[Pair], num_runs: int) -> str:
    """The reason, and the seeds that it concerns where it does not concern all runs."""
    if len(pairs) == num_runs and reason.startswith("not compared") and "seed" not in reason:
        return reason
    seeds = sorted({pair.run.seed for pair in pairs})
    shown = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    return f"{reason} ({shown})" if ":" in reason else f"{reason}: {shown}"


def _arm(pairs: list[Pair], companions: Companions) -> Arm:
    """The newest design that has come to a look decides, or the newest one."""
    plain = Arm(pairs, None, pairs, [pairs], [1.0])
    if plain.is_baseline:
        return plain
    by_design: dict[str, list[Pair]] = {}
    for pair in pairs:
        design = pair.run.facts.design
        by_design.setdefault(design.words if design else "", []).append(pair)
    by_design.pop("", None)
    if not by_design:
        return plain
    arms = []
    for those in by_design.values():
        design = those[0].run.facts.design
        ended = {pair.run.seed for pair in those if _has_ended(pair, design, companions)}
        complete = []
        for seeds in design.stages:
            if not ended.issuperset(seeds):
                break
            complete.append([pair for pair in those if pair.run.seed in seeds])
        arms.append(Arm(pairs, design, those, complete, design.rates))
    return max(arms, key=lambda arm: (bool(arm.stages), arm.design.first_seed))


def _has_ended(pair: Pair, design: Design, companions: Companions) -> bool:
    """Whether no further number of this pair can come, or none that could be compared."""
    if pair.obstacle or pair.baseline is None:
        return True
    runs = [*companions.at(pair.run, design.rates), *companions.at(pair.baseline, design.rates)]
    return all(run is None or run.finished or run.failed for run in runs)


def take_look(arm: Arm, number: int, look: Look) -> None:
    """Test what a look has seen, at the level that its place among the stages leaves it."""
    arm.look, arm.look_number = look, number
    if len(look.differences) < 2:
        return
    looks = (1,) if arm.is_screened else arm.looks
    look.level = level_of(looks)
    look.test = paired(look.differences, look.level)
    look.p = spent_at(looks, look.test.p)


def decide(arms: list[Arm]) -> None:
    """Give a word to every arm that there is one for, Holm's corrections over them all."""
    for arm in arms:
        if arm.is_screened and arm.look.test is not None and arm.look.p >= _KEPT:
            arm.word = NOT_CONFIRMED
    p = np.array([_p_for_holm(arm) for arm in arms])
    for arm, p_holm, level in zip(arms, holm(p), holm_levels(p), strict=True):
        if arm.look is None or arm.look.test is None or arm.is_screened or np.isnan(p_holm):
            continue
        arm.p_holm, arm.holm_level = float(p_holm), float(level)
        arm.word = arm.word or _word(arm)


def _p_for_holm(arm: Arm) -> float:
    """NaN for what is not tested, 1 for what will be."""
    if arm.is_baseline or arm.word == NOT_CONFIRMED:
        return np.nan
    if arm.look is None or arm.is_screened:
        return 1.0 if arm.is_pending else np.nan
    return arm.look.p


def _word(arm: Arm) -> str | None:
    """Equal, better or worse, or None."""
    doubts = unproven(arm.stages[arm.look_number])
    level = level_of(arm.looks, 2 * ALPHA)
    margin, differences = arm.margin, arm.look.differences
    if margin and not doubts and is_equal_within(margin, differences, level):
        return f"equal within {margin:g}"
    if arm.p_holm >= ALPHA:
        return None
    word = BETTER if arm.look.test.mean < 0 else WORSE
    return None if word in doubts else word


def _lowest(runs: list[RecordedRun | None], rates: list[float]) -> Lowest | None:
    """None where a run is missing or has not ended; the first validation is before training."""
    if not all(run is not None and (run.failed or run.final is not None) for run in runs):
        return None
    starts = [run.validation["loss"][0] for run in runs if len(run.validation["loss"])]
    losses = [np.inf if run.failed else run.final["loss"] for run in runs]
    return lowest(rates, losses, max(starts)) if starts else None


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
    return counted, [with_seeds(why, those, len(pairs)) for why, those in reasons.items()]


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
