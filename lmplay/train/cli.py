"""lmp-trainer: train one experiment or many, list, describe and check them."""

import os
import signal
import sys
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from typer import Option

from lmplay.catalog import entries as catalog
from lmplay.catalog.entry import Entry
from lmplay.console import (
    Device,
    Margin,
    Version,
    err,
    in_panels,
    leave,
    note,
    out,
    precision_option,
    print_json,
    run_app,
)
from lmplay.disk import make_folder, write_text
from lmplay.errors import UserError
from lmplay.fault_points import reach
from lmplay.run.design import design_of
from lmplay.run.folder import RUNS
from lmplay.run.records import averages_told
from lmplay.train.find_lr_cli import print_rates
from lmplay.train.grid_cli import search_greedily, train_all
from lmplay.train.listing import (
    describe,
    list_experiments,
    list_optimizers,
    list_plans,
    print_check,
)

if TYPE_CHECKING:
    from lmplay.run.request import Request

app = typer.Typer(
    pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)


def _experiment_names() -> list[str]:
    known = catalog.entries()
    families = {catalog.family_of(entry, known) for entry in known.values()} - {None}
    return ["list", *(f"list:{family}" for family in sorted(families)), *known]


def _plan_names() -> list[str]:
    from lmplay.plan_file import plan_paths

    return ["list", "schema", *plan_paths()]


def _rows(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        problem = f"--mini-batch-size {text}: not a number of rows"
        raise UserError(problem, hint="1 or more, or auto")
    return int(text)


def _whole_tokens(tokens: float | None) -> int | None:
    if tokens is not None and not 1 <= tokens < 2**53:
        raise UserError(f"--tokens {tokens:g}: no budget", hint="1 or more, such as 2e6")
    return None if tokens is None else round(tokens)


def _factors(option: str, text: str | None) -> list[float]:
    """What --rates or --sizes lists; 1 alone where it is not given."""
    if text is None:
        return [1.0]
    hint = "three factors or more, with the plan's own 1 among them, such as 0.5,1,2"
    try:
        factors = sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise UserError(f"{option} {text}: no factors", hint=hint) from None
    if len(factors) < 3 or 1 not in factors or not 0 < factors[0] <= factors[-1] < float("inf"):
        raise UserError(f"{option} {text}: no curve goes through these", hint=hint)
    return factors


@app.command()
@in_panels(
    Instead_of_training="is_described check find_lr role write",
    The_run="data validation_data optimizer set_ tokens seed initial_model resume out_dir",
    The_machine="device amp precision gpus shard mini_batch_size compile",
    Many_runs_and_their_verdicts="seeds rates sizes margin baseline budget greedy",
)
def main(
    exp: Annotated[
        str | None,
        Option(
            help="Experiment: a name, a variant, a .py file, or a stack such as value_norm+ue; "
            "several with commas; 'list' shows them all, 'list:attention' those of one family. "
            "Without it, gpt2ish.",
            metavar="NAME|FILE",
            autocompletion=_experiment_names,
        ),
    ] = None,
    plan: Annotated[
        str | None,
        Option(
            help="Training plan: a name or a .json file; 'list' shows them all, 'schema' prints "
            "the JSON Schema. Without it, default, which downloads; quick, which does not, with "
            "--describe or --check.",
            metavar="NAME|FILE",
            autocompletion=_plan_names,
        ),
    ] = None,
    is_described: Annotated[
        bool,
        Option(
            "--describe", metavar="", help="Show the experiment (or the plan) instead of training."
        ),
    ] = False,
    check: Annotated[
        bool,
        Option(
            "--check",
            metavar="",
            help="Prove what can be proved of the experiment in seconds, at tiny size and at the "
            "plan's (without --plan, quick's); on a GPU also that it computes it rightly.",
        ),
    ] = False,
    write: Annotated[
        Path | None,
        Option(
            help="Write a stack as one experiment file instead of training, with conflict markers "
            "where its ideas collide.",
            metavar="FILE",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        Option(
            help="Your own text instead of the plan's datasets: a text, JSONL, Parquet or Arrow "
            "file, or a folder of them; may be repeated.",
            metavar="PATH",
        ),
    ] = None,
    validation_data: Annotated[
        list[str] | None,
        Option(
            help="Text to hold out, instead of a share of --data; may be repeated.",
            metavar="PATH",
        ),
    ] = None,
    device: Device = "auto",
    amp: Annotated[
        bool,
        Option(
            "--amp",
            metavar="",
            help="The fastest precision that the device has in hardware, as --precision amp.",
        ),
    ] = False,
    precision: Annotated[str | None, precision_option("what the plan says")] = None,
    optimizer: Annotated[
        str | None,
        Option(
            help="Train with another optimizer than the plan's, such as muon, at its own defaults, "
            "or with each of several and hold the others against the first; 'list' shows them all.",
            metavar="NAMES",
        ),
    ] = None,
    find_lr: Annotated[
        bool,
        Option(
            "--find-lr",
            metavar="",
            help="Train for a minute while the rate rises, instead of training; shows where that "
            "learns and where it diverges, and proposes a rate.",
        ),
    ] = False,
    role: Annotated[
        str | None,
        Option(
            help="With --find-lr, the rate of these parameters alone: matrix, table, head, conv, "
            "vector, or a role that the experiment names.",
            metavar="NAME",
        ),
    ] = None,
    gpus: Annotated[
        int | None,
        Option(
            help="GPUs of this machine to share each step, one process for each. Several machines "
            "need torchrun.",
            min=1,
            metavar="N",
        ),
    ] = None,
    shard: Annotated[
        bool,
        Option(
            "--shard",
            metavar="",
            help="With several processes, give each a slice of every weight, gradient and moment "
            "(FSDP2) instead of them all; results stay equal.",
        ),
    ] = False,
    mini_batch_size: Annotated[
        str,
        Option(
            help="Rows that go through the model at once, or 'auto'; results stay equal.",
            metavar="N",
            callback=_rows,
        ),
    ] = "auto",
    compile: Annotated[
        bool | None,
        Option(
            "--compile/--no-compile",
            metavar="",
            help="Compile the model; the first step then takes long. Without either, on CUDA in "
            "mixed precision where the run is long enough to repay it.",
        ),
    ] = None,
    seed: Annotated[
        int,
        Option(help="Fixes weights, data order and dropout.", min=0, max=2**63 - 1, metavar="N"),
    ] = 0,
    seeds: Annotated[
        str | None,
        Option(
            help="Train every experiment with these seeds, from --seed on, and give the verdicts. "
            "5 is one look; 3..12 looks at 3, 5, 8 and 12 seeds and stops when it can tell; 3+8 "
            "screens on 3 and confirms on 8 fresh ones.",
            metavar="N|N..M|N+M",
        ),
    ] = None,
    rates: Annotated[
        str | None,
        Option(
            help="Factors of the plan's learning rate, 1 among them, such as 0.5,1,2: every "
            "experiment is trained at each, and compared by its lowest loss.",
            metavar="F,F,F",
        ),
    ] = None,
    sizes: Annotated[
        str | None,
        Option(
            help="Factors of the plan's size, 1 among them, such as 0.5,1,2: a ladder on which "
            "heads, blocks and tokens grow together, and what an idea is worth in compute.",
            metavar="F,F,F",
        ),
    ] = None,
    margin: Margin = None,
    baseline: Annotated[
        str | None,
        Option(
            help="Experiment that the others are held against. Without it, gpt2ish if it is among "
            "them, else the first.",
            metavar="NAME",
            autocompletion=_experiment_names,
        ),
    ] = None,
    budget: Annotated[
        Literal["tokens", "seconds", "flops"],
        Option(
            help="What every experiment gets as much of as the baseline: tokens, seconds of "
            "training here, or training FLOPs.",
            metavar="tokens|seconds|flops",
        ),
    ] = "tokens",
    greedy: Annotated[
        str | None,
        Option(
            help="Ideas, with commas, to stack on --exp one by one, as long as the verdict over "
            "--seeds is better; every round has fresh seeds.",
            metavar="NAMES",
        ),
    ] = None,
    initial_model: Annotated[
        str | None,
        Option(
            help="Begin with the weights of a trained run, unfolded where the experiment can, or "
            "of a native Hugging Face folder.",
            metavar="RUN|FOLDER",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        Option(
            "--set",
            help="Change one value, such as width=512 (Config) or optimizer.lr=1e-3 "
            "(plan); may be repeated.",
            metavar="KEY=VALUE",
        ),
    ] = None,
    tokens: Annotated[
        float | None,
        Option(
            help="Budget in tokens, rounded up to whole steps; 2e6 is fine.",
            metavar="N",
            callback=_whole_tokens,
        ),
    ] = None,
    resume: Annotated[
        Literal["auto", "none"],
        Option(
            help="auto goes on where the run stopped; none starts anew and keeps the old run "
            "aside.",
            metavar="auto|none",
        ),
    ] = "auto",
    out_dir: Annotated[
        Path, Option(help="Folder that runs are written to.", metavar="PATH")
    ] = Path(RUNS),
    as_json: Annotated[
        bool, Option("--json", metavar="", help="Print the result as one JSON document.")
    ] = False,
    version: Version = None,
) -> None:
    """Train an experiment on a plan, or many over seeds; the same command goes on where it stopped.

    Example: lmp-trainer --exp gpt2ish,value_norm --seeds 3..12 --plan quick
    """
    if exp is not None and exp.partition(":")[0] == "list":
        return list_experiments(exp.partition(":")[2], as_json)
    if plan == "list":
        return list_plans(as_json)
    if optimizer == "list":
        return list_optimizers(as_json)
    from lmplay.data.local_files import existing
    from lmplay.plan_file import plan_schema, read_plan  # here, not at the top: pydantic
    from lmplay.run.changes import read_changes, refuse_unfit

    if plan == "schema":
        return print_json(plan_schema())
    names = ("gpt2ish" if exp is None else exp).split(",")
    precision = _precision(amp, precision)
    if write is not None:
        return _write(_one(names, "--write"), write)
    entries = [catalog.resolve(name) for name in names]
    ideas = [] if greedy is None else [catalog.resolve(name) for name in greedy.split(",")]
    changes, by_optimizer = read_changes(set_ or [], tokens), [{}]
    changes_by_optimizer = [changes]
    plan_name = ("quick" if check or is_described else "default") if plan is None else plan
    if optimizer is not None:
        from lmplay.optim.known import replaced

        own = read_plan(plan_name, {}, data).optimizer
        by_optimizer = [{"optimizer": replaced(own, name)} for name in optimizer.split(",")]
        changes_by_optimizer = [
            changes.of_optimizer(each["optimizer"]["name"]) for each in by_optimizer
        ]
    config = changes.of_config
    plans = [
        read_plan(plan_name, changes.of_plan | of_plan, data, validation_data)
        for of_plan in by_optimizer
    ]
    if margin is not None:
        plans = [each.model_copy(update={"margin": margin}) for each in plans]
    resolved = plans[0]
    optimizers = [each.optimizer.name for each in plans]
    if len(set(optimizers)) < len(optimizers):
        raise UserError("--optimizer names one twice", hint="more runs of one: --seeds N")
    rungs = tuple(_factors("--sizes", sizes))
    is_grid = len(entries) + len(plans) > 2 or any(
        option is not None for option in (seeds, rates, sizes, greedy)
    )
    design = design_of(seeds or "1", seed, _factors("--rates", rates)) if is_grid else None
    own_baseline = names[0] if len(plans) > 1 and len(names) == 1 else None
    rival = _baseline(entries, baseline or own_baseline) if is_grid or budget != "tokens" else None
    for entry in [*entries, *ideas, *([rival] if rival else [])]:
        refuse_unfit(entry, resolved, config)
    if is_described:
        _one(names, "--describe")
        _one(optimizers, "--describe", "optimizer")
        return describe(
            entries[0] if exp is not None or plan is None else None,
            resolved,
            config,
            plan is not None,
            as_json,
        )
    if check:
        _one(names, "--check")
        _one(optimizers, "--check", "optimizer")
        return print_check(entries[0], resolved, config, device, precision, as_json)
    if find_lr:
        _one(names, "--find-lr")
        if is_grid or budget != "tokens" or gpus is not None or shard:
            raise UserError("--find-lr is for one run in one process", hint="leave the rest out")
    elif role is not None:
        raise UserError(f"--role {role} says whose rate --find-lr finds", hint="add --find-lr")
    for dataset in resolved.datasets.values():
        for path in [*(dataset.files or []), *(dataset.validation_files or [])]:
            existing(path)
    if ideas:
        _one(optimizers, "--greedy", "optimizer")
    if ideas and len(rungs) > 1:
        raise UserError("--greedy and --sizes are two questions", hint="ask one after the other")
    if ideas and design.looks[-1] < 2:
        raise UserError("one seed is never better: the search would end at once", hint="--seeds 5")
    if is_grid:
        _refuse_for_many(resume == "auto", gpus is not None or shard)
    if gpus is not None and "WORLD_SIZE" not in os.environ:
        raise typer.Exit(_launch(gpus, device))
    if gpus is not None:
        _refuse_other_count(gpus)
    if not _is_first():
        err.quiet = True  # the first process speaks
    what = greedy or ", ".join(entry.name for entry in entries)
    signal.signal(signal.SIGTERM, leave)  # until training has begun
    reach("import")
    note(f"{what} on {resolved.name}: loading torch")
    from dataclasses import replace

    from lmplay.run.request import Request
    from lmplay.train.initial_model import find_initial

    if budget == "seconds":
        compile = bool(compile)  # what is timed is what is trained
    request = Request(
        entry=entries[0],
        plan=resolved,
        changes=changes_by_optimizer[0].values,
        config=config,
        seed=seed,
        device=device,
        precision=precision,
        mini_batch_size=mini_batch_size,
        compiled=compile,
        resume=resume == "auto",
        out_dir=out_dir,
        initial=None if initial_model is None else find_initial(initial_model, out_dir),
        fsdp=shard,
        design=design,
    )
    if find_lr:
        print_rates(request, role, as_json)
    elif ideas:
        search_greedily(request, ideas, budget, as_json)
    elif is_grid:
        if rival.name not in [entry.name for entry in entries]:
            entries.insert(0, rival)
        others = tuple(
            replace(request, plan=plan, changes=its.values)
            for its, plan in zip(changes_by_optimizer[1:], plans[1:], strict=True)
        )
        train_all(request, entries, rival, budget, rungs, others, as_json)
    else:
        _train(request, rival, budget, as_json)


def _one(names: list[str], option: str, what: str = "experiment") -> str:
    if len(names) > 1:
        raise UserError(f"{option} takes one {what}, not {len(names)}", hint="name one")
    return names[0]


def _write(name: str, path: Path) -> None:
    """The file of a stack, also of one with conflicts, which the exit code then says."""
    from lmplay.catalog.merge import Conflict

    if path.exists():
        raise UserError(f"{path} is there already", hint="choose another name")
    if path.suffix != ".py":
        raise UserError(f"--write {path}: an experiment is a .py file", hint=f"--write {path}.py")
    conflict = None
    try:
        source = catalog.resolve(name).source
    except Conflict as found:
        conflict, source = found, found.merged
    try:
        make_folder(path.parent)
        write_text(path, source)
    except OSError as error:
        hint = "choose another place, or make room"
        raise UserError(f"cannot write {path}: {error.strerror}", hint) from None
    if conflict:
        hint = f"settle the places between <<<<<<< and >>>>>>> in {path}"
        raise UserError(conflict.problem, hint=hint)
    note(f"wrote {path}; lmp-trainer --exp {quote(str(path))} --check proves it")


def _baseline(entries: list[Entry], name: str | None) -> Entry:
    if name is not None:
        return catalog.resolve(name)
    by_name = {catalog.canonical_name(entry): entry for entry in entries}
    if len(by_name) < len(entries):
        raise UserError("--exp names one experiment twice", hint="more runs of one: --seeds N")
    if len(entries) == 1:
        return catalog.resolve("gpt2ish")
    return by_name.get("gpt2ish", entries[0])


def _launch(gpus: int, device: str) -> int:
    """This very command in a process for each GPU; its exit code."""
    from lmplay.grid.launch import launch, refuse_missing_gpus

    refuse_missing_gpus(gpus, device)
    return launch([sys.executable, *sys.orig_argv[1:]], gpus)


def _refuse_other_count(gpus: int) -> None:
    """Raise a UserError unless this is one of `gpus` processes of this machine."""
    here = os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])
    if here != str(gpus):
        problem = f"--gpus {gpus}: the launcher started {here} processes on this machine"
        raise UserError(problem, hint="without --gpus, the launcher's own number holds")


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _refuse_for_many(resumes: bool, is_shared: bool) -> None:
    if not resumes:
        hint = "--out-dir gives them a place of their own"
        raise UserError("--resume none is for one run, not for many", hint=hint)
    if is_shared or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "many runs are not trained by one group of processes",
            hint="start the command once for each device (CUDA_VISIBLE_DEVICES=0, 1, ...) on one "
            "--out-dir: they share the runs",
        )


def _train(request: "Request", rival: Entry | None, budget: str, as_json: bool) -> None:
    from dataclasses import replace

    from lmplay.grid.budget import sized
    from lmplay.run.accelerator import leave_processes
    from lmplay.train.display import Display
    from lmplay.train.session import run_experiment
    from lmplay.train.signals import Stopped

    name, plan = request.entry.name, request.plan.name
    try:
        console = err if _is_first() else Console(quiet=True, force_terminal=False)
        with Display(f"{name} on {plan}, seed {request.seed}", console) as display:
            if rival is not None:
                request = sized(request, replace(request, entry=rival), budget, display)
            result = run_experiment(request, display)
    except Stopped as stop:
        note(f"{stop}; saved. The same command goes on from here.")
        raise typer.Exit(stop.code) from None
    finally:
        leave_processes()
    if not _is_first():
        return None
    if as_json:
        return print_json(result)
    row = result["validation"]
    if row is None:  # its curve was taken away since
        raise UserError(f"{result['run']} is {result['status']}, but has no row of validation.csv")
    line = f"{result['run']}: {result['status']} at {row['tokens']:,} tokens"
    out.print(line, markup=False)  # a path may hold brackets
    per_byte = row["bits_per_byte"]
    told = "" if per_byte is None else f", {per_byte:.4f} bits per byte"
    out.print(f"validation loss {row['loss']:.4f} nats per token{told}{averages_told(row)}")
    below = "" if request.out_dir == Path(RUNS) else f" {quote(str(request.out_dir))}"
    note(f"read it: lmp-generator {quote(result['run'])}    plot it: lmp-plotstats{below}")


def _precision(amp: bool, precision: str | None) -> str | None:
    if amp and precision not in (None, "amp"):
        raise UserError(f"--amp and --precision {precision} are two answers", hint="give one")
    return "amp" if amp else precision


def run() -> None:
    """The console script."""
    try:
        run_app(app)
    except SystemExit as end:
        if "RANK" in os.environ and isinstance(end.code, int | None):
            # threads that gloo leaves behind now and then abort a Python that ends by itself
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code or 0)
        raise
