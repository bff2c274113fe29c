"""Leagues: budgets of tokens that give every idea the compute, or the time, of the baseline."""

import json
import math
import statistics
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock

from lmplay.data.batches import Batch, Data, open_data
from lmplay.data.tokenizers import Tokenizer, vocabulary_of
from lmplay.disk import make_folder, write_json
from lmplay.errors import UserError
from lmplay.grid.subprocesses import SignalForwarder, run_in_subprocess
from lmplay.model.counts import flops_per_token
from lmplay.model.experiment import load_experiment
from lmplay.model.scale import scale
from lmplay.plan import Plan
from lmplay.run.facts import League
from lmplay.run.request import Request
from lmplay.train.clock import Clock
from lmplay.train.display import Display
from lmplay.train.loop import Session, advance
from lmplay.train.trial import trial_session

ROUNDS = 9  # of timing, the two experiments taking turns
STEPS = 3  # in a round


def sized(request: Request, baseline: Request, kind: str, display: Display) -> Request:
    """The request with the tokens that cost what the baseline's plan costs.

    Args:
        kind: "tokens" leaves the plan as it is; "flops" divides the baseline's training compute
            (FLOPs per token times tokens) by the request's FLOPs per token; "seconds" does so with
            the time of a step, measured once and kept in budget.json beside the label's runs, so
            that every seed and every machine that shares the folder has the same tokens.
    Raises:
        UserError: the plan has no budget of tokens.
    """
    if kind == "tokens" or request.label == baseline.label:
        return request
    plan = request.plan
    if plan.tokens is None:
        raise UserError(
            f"plan {plan.name} runs whole epochs: no budget to divide", hint="add --tokens N"
        )
    league = League(kind=kind, baseline=baseline.label)
    request = replace(request, changes=request.changes | {"budget": kind}, budget=league)
    if kind == "flops":
        cost = _flops_per_token(request) / _flops_per_token(baseline)
    else:
        cost = _kept_cost(request, baseline, display)
    return replace(
        request,
        plan=plan.model_copy(update={"tokens": _tokens(plan, cost)}),
        budget=replace(league, cost=cost),
    )


def _tokens(plan: Plan, cost: float) -> int:
    """The plan's budget divided by the cost, once it is rounded up, to within half a step."""
    clock = Clock(plan)
    last = clock.at(clock.num_steps - 1).tokens
    return max(1, math.ceil(clock.num_tokens / cost - last / 2))


def relative_seconds(pair: tuple[Request, Request], display: Display) -> float:
    """Seconds of a training step of the first over those of the second, taking turns.

    Both take steps of the plan's sizes, from all over the run, on its first rows; the median over
    rounds of the paired ratios.
    """
    plan = pair[0].plan
    tokenizer, data = open_data(plan, pair[0].seed, display.note, display.preparing)
    try:
        first_rows = _FirstRows(data)
        sessions = [_session(request, first_rows, tokenizer) for request in pair]
        for session in sessions:  # compiles, allocates
            _seconds(session)
        ratios = []
        for _ in range(ROUNDS):
            first, second = (_seconds(session) for session in sessions)
            ratios.append(first / second)
        return statistics.median(ratios)
    finally:
        data.close()


def _kept_cost(request: Request, baseline: Request, display: Display) -> float:
    folder = request.folder.path.parent
    path = folder / "budget.json"
    make_folder(folder)
    with FileLock(folder / "budget.lock"):
        if not path.exists():
            display.note(f"timing the steps of {request.label} against those of {baseline.label}")
            with SignalForwarder() as forwarder:
                cost = run_in_subprocess(relative_seconds, (request, baseline), display, forwarder)
            facts = {"seconds_per_step_over_baselines": cost, "baseline": baseline.label}
            write_json(path, facts)
        return _cost(path, baseline)


def _cost(path: Path, baseline: Request) -> float:
    try:
        facts = json.loads(path.read_bytes())
        cost, label = facts["seconds_per_step_over_baselines"], facts["baseline"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}", hint="delete it to measure again") from None
    if label != baseline.label:
        raise UserError(
            f"{path} was measured against {label}, not {baseline.label}",
            hint="--out-dir gives this league a place of its own",
        )
    return cost


def _flops_per_token(request: Request) -> float:
    experiment, plan = load_experiment(request.entry), request.plan
    config = scale(experiment, plan, *vocabulary_of(plan.tokenizer), request.config).config
    return Clock(plan).mean(partial(flops_per_token, experiment, config))


@dataclass
class _FirstRows:
    """Data whose every row is one of the first, since the last ones may still be streaming."""

    data: Data

    def rows(self, first: int, count: int, length: int) -> Batch:
        return self.data.rows(0, count, length)


def _session(request: Request, data: _FirstRows, tokenizer: Tokenizer) -> Session:
    experiment, plan = load_experiment(request.entry), request.plan
    vocabulary = tokenizer.vocab_size, tokenizer.end
    config = scale(experiment, plan, *vocabulary, request.config).config
    return trial_session(request, experiment, plan, config, data, Clock(plan))


def _seconds(session: Session) -> float:
    """Of STEPS steps spread over the run, to the moment when the device has done them."""
    start = time.perf_counter()
    for number in range(STEPS):
        session.run.step = (2 * number + 1) * session.clock.num_steps // (2 * STEPS)
        session.run.set_progress(session.clock.at(session.run.step).progress)
        advance(session)
    session.curves.look(now=True)
    if session.run.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
