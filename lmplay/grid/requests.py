"""What was asked for as a flat list of requests, each of which is one run."""

from dataclasses import replace

from lmplay.catalog.entry import Entry
from lmplay.data.tokenizers import vocabulary_of
from lmplay.errors import UserError
from lmplay.grid.budget import sized
from lmplay.model.counts import count
from lmplay.model.experiment import load_experiment
from lmplay.model.scale import scale
from lmplay.optim.scaling import rates_times, scaled
from lmplay.plan import Plan, changed_plan, differences
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
    sizes: tuple[float, ...] = (1.0,),
    others: tuple[Request, ...] = (),
) -> list[Request]:
    """A request for every seed, size, optimizer, experiment and rate: all of one seed, then the
    next seed.

    Args:
        template: of any of them; entry, seed, design and rate are replaced.
        root: the experiment whose budget the league gives to all.
        budget: the league: "tokens", "seconds" or "flops".
        sizes: factors of the plan's size; see `at_size`.
        others: templates with other optimizers; the league's budget is the first template's.
    Raises:
        UserError: an experiment fails the check, or the plan has no size.
    """
    for entry in entries:
        experiment = load_experiment(entry)
        refuse_unproven(experiment, template.config)
        refuse_unknown_names(template, experiment)
    of_first = []
    for size in sizes:
        of_root = at_size(replace(template, entry=root), size)
        for each in (template, *others):
            of_size = at_size(replace(each, entry=root), size)
            if size != 1:
                display.note(f"size={size:g}: {differences(each.plan, of_size.plan)}")
            for entry in entries:
                request = replace(of_size, entry=entry, seed=design.first_seed, design=design)
                if len(sizes) > 1:
                    request = with_base(request, template.plan)
                request = sized(request, of_root, budget, display)
                of_first += [_at_rate(request, factor) for factor in design.rates]
    return [replace(first, seed=seed) for seed in design.seeds for first in of_first]


def arm_of(request: Request) -> str:
    """The label that the request's verdict has: that of the run at the plan's own rate."""
    return request.label if request.rate is None else request.rate.of


def at_size(request: Request, factor: float) -> Request:
    """The request on a rung of a ladder of sizes; 1 is the plan's own.

    Heads and blocks are times the factor, rounded, at least one, and as wide as before; tokens stay
    in proportion to the matrices of this experiment; rates, decay and batch go by the plan's
    `scaling`.

    Raises:
        UserError: the plan does not say a width, heads, blocks and tokens, or its rules do not hold
            for its optimizer.
    """
    if factor == 1:
        return request
    plan = request.plan
    names = ("width", "num_heads", "num_blocks")
    if plan.tokens is None or not all(isinstance(plan.model.get(name), int) for name in names):
        raise UserError(
            f"--sizes: plan {plan.name} does not say {', '.join(names)} and tokens",
            hint="add them under model in the plan; quick has them",
        )
    heads, blocks = (max(1, round(plan.model[name] * factor)) for name in names[1:])
    width = plan.model["width"] // plan.model["num_heads"] * heads
    sizes = {"width": width, "num_heads": heads, "num_blocks": blocks}
    changed = {f"model.{name}": value for name, value in sizes.items()}
    larger = replace(request, plan=changed_plan(plan, changed))
    longer = _matrices(larger) / _matrices(request)
    changed = {"tokens": round(plan.tokens * longer)}
    changed |= scaled(plan, width / plan.model["width"], longer)
    rung = changed_plan(larger.plan, changed)
    return replace(request, plan=rung, changes=request.changes | {"size": factor})


def with_base(request: Request, plan: Plan) -> Request:
    """The request whose model, if it has multipliers, knows the size that rates were found at."""
    own = {"base_width": "width", "base_blocks": "num_blocks"}
    base = {key: plan.model[name] for key, name in own.items() if key in request.entry.fields}
    return replace(request, config=request.config | base)


def declare(requests: list[Request], baselines: set[str]) -> None:
    """See to it that the runs that are there declare the design for which they are wanted.

    Args:
        baselines: labels whose runs serve any design.
    Raises:
        UserError: a run was trained for another design.
    """
    for request in requests:
        if not request.folder.run_json.is_file():
            continue
        facts = request.folder.read()
        declared = facts.design if facts.design and facts.design.spends else None
        design, rate = declared or request.design, facts.rate or request.rate
        is_other = design != request.design and request.design.spends
        if is_other and arm_of(request) not in baselines:
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
    changed = rates_times(request.plan.optimizer, factor)
    plan = changed_plan(request.plan, changed)
    return replace(request, plan=plan, rate=rate, changes=request.changes | changed)


def _matrices(request: Request) -> int:
    """Parameters that every position is multiplied with."""
    experiment, plan = load_experiment(request.entry), request.plan
    config = scale(experiment, plan, *vocabulary_of(plan.tokenizer), request.config).config
    return count(experiment, config).matmul
