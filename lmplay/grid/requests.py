"""What was asked for as a flat list of requests, each of which is one run."""

from dataclasses import replace

from lmplay.catalog.entry import Entry
from lmplay.errors import UserError
from lmplay.grid.budget import sized
from lmplay.model.experiment import load_experiment
from lmplay.plan import Plan
from lmplay.run.design import Design, Rate
from lmplay.run.request import Request
from lmplay.train.display import Display
from lmplay.train.prepared import refuse_unknown_names, refuse_unproven


def expand(
    template: Request,
    entries: list[Entry],
    design: Design,
    root: Entry,
    budget: str,
    display: Display,
) -> list[Request]:
    """A request for every seed, experiment and rate: all of one seed, then the next seed.

    Args:
        template: of any of them; entry, seed, design and rate are replaced.
        root: the experiment whose budget the league gives to all.
        budget: the league: "tokens", "seconds" or "flops".
    Raises:
        UserError: an experiment fails the check.
    """
    of_first = []
    for entry in entries:
        experiment = load_experiment(entry)
        refuse_unproven(experiment)
        refuse_unknown_names(template, experiment)
        request = replace(template, entry=entry, seed=design.first_seed, design=design)
        request = sized(request, replace(template, entry=root), budget, display)
        of_first += [_at_rate(request, factor) for factor in design.rates]
    return [replace(first, seed=seed) for seed in design.seeds for first in of_first]


def arm_of(request: Request) -> str:
    """The label that the request's verdict has: that of the run at the plan's own rate."""
    return request.label if request.rate is None else request.rate.of


def declare(requests: list[Request], baseline: str) -> None:
    """See to it that the runs that are there declare the design for which they are wanted.

    Args:
        baseline: its label; its runs serve any design.
    Raises:
        UserError: a run was trained for another design.
    """
    for request in requests:
        if not request.folder.run_json.is_file():
            continue
        facts = request.folder.read()
        design, rate = facts.design or request.design, facts.rate or request.rate
        if design != request.design and arm_of(request) != baseline:
            raise _contradiction(request, design)
        if (facts.design, facts.rate) != (design, rate) and facts.status != "running":
            request.folder.write(replace(facts, design=design, rate=rate))


def _contradiction(request: Request, declared: Design) -> UserError:
    seeds = [replace(request, seed=seed) for seed in declared.seeds]
    ended = {each.seed for each in seeds if _has_ended(each)}
    stages = declared.stages[bool(declared.screen) :]
    left = [
        str(look)
        for look, of_look in zip(declared.looks, stages, strict=True)
        if not ended.issuperset(of_look)
    ]
    rest = f"of its looks {' and '.join(left)} are left" if left else "nothing is left of it"
    first, last = declared.seeds[0], declared.seeds[-1]
    goes_on = f"{declared.words} goes on with it; " if left else ""
    fresh = replace(request.design, first_seed=declared.seeds.stop)
    return UserError(
        f"{request.label} was declared as {declared.words}, seeds {first} to {last}, "
        f"not as {request.design.words}: {rest}",
        hint=f"{goes_on}{fresh.words} takes fresh seeds",
    )


def _has_ended(request: Request) -> bool:
    folder = request.folder
    return folder.run_json.is_file() and folder.read().status in ("finished", "failed")


def _at_rate(request: Request, factor: float) -> Request:
    """The request with the plan's learning rate, and those of its roles, times a factor."""
    if request.design.rates == [1.0]:
        return request
    rate = Rate(factor=factor, of=request.label)
    if factor == 1:
        return replace(request, rate=rate)
    raw = request.plan.model_dump()
    optimizer = raw["optimizer"]
    changed = {}
    rules = {"": optimizer, **{f"roles.{k}.": v for k, v in optimizer.get("roles", {}).items()}}
    for inside, rule in rules.items():
        if rule.get("lr") is not None:
            rule["lr"] = float(f"{rule['lr'] * factor:.10g}")
            changed[f"optimizer.{inside}lr"] = rule["lr"]
    plan = Plan.model_validate(raw)
    return replace(request, plan=plan, rate=rate, changes=request.changes | changed)
