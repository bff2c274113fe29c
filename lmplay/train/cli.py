"""lmp-trainer: train, list, describe and check experiments."""

import json
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.syntax import Syntax
from typer import Option

from lmplay import catalog
from lmplay.catalog import Entry
from lmplay.console import (
    Device,
    Version,
    note,
    out,
    precision_option,
    print_json,
    run_app,
    show,
    table,
)
from lmplay.errors import UserError, nearest
from lmplay.plan import Plan, has_key, plan_paths, plan_schema, read_plan
from lmplay.train.files import existing

app = typer.Typer(
    pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)


def _experiment_names() -> list[str]:
    return ["list", *catalog.entries()]


def _plan_names() -> list[str]:
    return ["list", "schema", *plan_paths()]


def _whole_tokens(tokens: float | None) -> int | None:
    if tokens is not None and not 1 <= tokens < 2**53:
        raise UserError(f"--tokens {tokens:g}: no budget", hint="1 or more, such as 2e6")
    return None if tokens is None else round(tokens)


@app.command()
def main(
    exp: Annotated[
        str | None,
        Option(
            help="Experiment: a name, a variant, or a .py file; 'list' shows them all. "
            "Without it, gpt2ish.",
            metavar="NAME|FILE",
            autocompletion=_experiment_names,
        ),
    ] = None,
    plan: Annotated[
        str | None,
        Option(
            help="Training plan: a name or a .json file; 'list' shows them all, 'schema' prints "
            "the JSON Schema. Without it, default, which downloads; quick needs no download.",
            metavar="NAME|FILE",
            autocompletion=_plan_names,
        ),
    ] = None,
    describe: Annotated[
        bool,
        Option(
            "--describe", metavar="", help="Show the experiment (or the plan) instead of training."
        ),
    ] = False,
    check: Annotated[
        bool,
        Option(
            "--check", metavar="", help="Prove what can be proved of the experiment in seconds."
        ),
    ] = False,
    data: Annotated[
        list[str] | None,
        Option(
            help="Your own text instead of the plan's datasets: a text, JSONL, Parquet or Arrow "
            "file, or a folder of them; may be repeated.",
            metavar="PATH",
        ),
    ] = None,
    device: Device = "auto",
    amp: Annotated[
        bool, Option("--amp", metavar="", help="Mixed precision: bf16 where it works, else fp16.")
    ] = False,
    precision: Annotated[str | None, precision_option("what the plan says")] = None,
    mini_batch_size: Annotated[
        str,
        Option(
            help="Rows that go through the model at once, or 'auto'; results stay equal.",
            metavar="N",
        ),
    ] = "auto",
    compile: Annotated[
        bool,
        Option("--compile", metavar="", help="Compile the model; the first step then takes long."),
    ] = False,
    seed: Annotated[
        int, Option(help="Fixes weights, data order and dropout.", min=0, metavar="N")
    ] = 0,
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
        str,
        Option(
            help="auto goes on where the run stopped; none starts anew and keeps the old run "
            "aside.",
            metavar="auto|none",
            autocompletion=lambda: ["auto", "none"],
        ),
    ] = "auto",
    out_dir: Annotated[
        Path, Option(help="Folder that runs are written to.", metavar="PATH")
    ] = Path("runs"),
    as_json: Annotated[
        bool, Option("--json", metavar="", help="Print the result as one JSON document.")
    ] = False,
    version: Version = None,
) -> None:
    """Train one experiment on one plan; the same command again goes on where it stopped.

    Example: lmp-trainer --exp value_norm --plan quick
    """
    if exp == "list":
        return _list_experiments(as_json)
    if plan == "list":
        return _list_plans(as_json)
    if plan == "schema":
        return print_json(plan_schema())
    entry = catalog.resolve(exp or "gpt2ish")
    changes = dict(_parsed(text) for text in set_ or [])
    if tokens is not None:
        changes["tokens"] = tokens
    of_plan = {key: value for key, value in changes.items() if has_key(key)}
    of_config = {key: value for key, value in changes.items() if key not in of_plan}
    _know_config_keys(entry, of_config)
    resolved = read_plan(plan or "default", of_plan, data)
    _know_config_values(entry, resolved, of_config)
    if describe:
        return _describe(
            entry if exp or not plan else None, resolved, of_config, bool(plan), as_json
        )
    if check:
        return _check(entry, as_json)
    for dataset in resolved.datasets.values():
        for path in dataset.files or []:
            existing(path)
    _train(
        entry, resolved, changes, of_config, seed, device, _precision(amp, precision),
        _mini_batch_size(mini_batch_size), compile, _resume(resume), out_dir, as_json,
    )  # fmt: skip


def _train(
    entry, plan, changes, config, seed, device, precision, mini_batch_size, compiled, resume,
    out_dir, as_json,
):  # fmt: skip
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # until training has begun
    note(f"{entry.name} on {plan.name}: loading torch")
    from lmplay.runner import leave_processes
    from lmplay.train.display import Display
    from lmplay.train.loop import Stopped
    from lmplay.train.session import Request, run_experiment

    request = Request(
        entry, plan, changes, config, seed, device, precision, mini_batch_size, compiled, resume,
        out_dir,
    )  # fmt: skip
    try:
        with Display(f"{entry.name} on {plan.name}, seed {seed}") as display:
            result = run_experiment(request, display)
    except Stopped as stop:
        note(f"{stop}; saved. The same command goes on from here.")
        raise typer.Exit(stop.code) from None
    finally:
        leave_processes()
    if as_json:
        return print_json(result)
    row = result["validation"]
    out.print(f"{result['run']}: {result['status']} at {row['tokens']:,} tokens")
    out.print(
        f"validation loss {row['loss']:.4f} nats per token, "
        f"{row['bits_per_byte']:.4f} bits per byte"
    )
    note(f"read it: lmp-generator {result['run']}    plot it: lmp-plotstats")


def _check(entry: Entry, as_json: bool) -> None:
    note(f"checking {entry.name}: loading torch")
    from lmplay.check import check
    from lmplay.experiment import load_experiment

    proofs = check(load_experiment(entry))
    failed = [proof for proof in proofs if proof.passed is False]
    if as_json:
        rows = [{"name": p.name, "passed": p.passed, "detail": p.detail} for p in proofs]
        print_json({"schema_version": 1, "experiment": entry.name, "proofs": rows})
    else:
        words = {True: "[green]passed[/green]", False: "[red]failed[/red]", None: "exempt"}
        rows = [[words[p.passed], p.name, p.detail.replace("[", r"\[")] for p in proofs]
        show(table(f"{entry.name}", ["", "proof", "what was found"], rows))
    if failed:
        raise UserError(f"{entry.name} fails {len(failed)} of {len(proofs)} proofs")


def _describe(
    entry: Entry | None, plan: Plan, config: dict, show_plan: bool, as_json: bool
) -> None:
    if entry is None:
        whole = plan.model_dump()
        return print_json({"schema_version": 1, "plan": whole} if as_json else whole)
    diff = catalog.diff(entry)
    if not as_json:
        out.print(entry.docstring, markup=False)
        out.print(f"\n{entry.name}: {entry.path}")
        if entry.variant:
            out.print("with " + ", ".join(f"{k}={v!r}" for k, v in entry.variant.items()))
        if diff:
            out.print(Syntax(diff, "diff", background_color="default"))
        sys.stdout.flush()  # this much needs no torch
    from dataclasses import asdict

    from lmplay.experiment import count, load_experiment, scale
    from lmplay.generate.sampling import uses_cache
    from lmplay.tokens import vocab_size_of

    experiment = load_experiment(entry)
    made = scale(experiment, plan, vocab_size_of(plan.tokenizer), config)
    counts = asdict(count(experiment, made.config))
    flops_per_token = counts.pop("flops_per_token")
    is_cached = uses_cache(experiment.model(experiment.config(**experiment.tiny)).eval())
    if as_json:
        return print_json(
            {
                "schema_version": 1,
                "experiment": entry.name,
                "file": str(entry.path),
                "docstring": entry.docstring,
                "parent": entry.parent,
                "variant": entry.variant,
                "diff": diff,
                "plan": plan.model_dump() if show_plan else plan.name,
                "config": asdict(made.config),
                "scale_differs": made.differs,
                "parameters": counts,
                "flops_per_token": flops_per_token,
                "uses_cache": is_cached,
            }
        )
    values = ", ".join(f"{key}={value!r}" for key, value in asdict(made.config).items())
    out.print(f"\nConfig on plan {plan.name}: {values}", markup=False)
    rows = [[name, f"{value:,}"] for name, value in counts.items()]
    rows.append(["FLOPs per token", f"{flops_per_token:,.0f}"])
    show(table("\nParameters", ["", " "], rows, right={" "}))
    if not is_cached:
        out.print("It ignores the cache: generating runs on the whole text again for each token.")
    if show_plan:
        print_json(plan.model_dump())


def _list_experiments(as_json: bool) -> None:
    entries = catalog.entries(_note_error)
    if as_json:
        rows = [
            {
                "name": e.name,
                "summary": e.summary,
                "parent": e.parent if e.name == e.file else e.file,
                "variant": e.variant,
                "file": str(e.path),
            }
            for e in entries.values()
        ]
        return print_json({"schema_version": 1, "experiments": rows})
    heads = {name: entry for name, entry in entries.items() if name == entry.file}
    rows: list[list[str]] = []

    def add(entry: Entry, depth: int) -> None:
        rows.append(
            [f"{'  ' * depth}[bold]{entry.name}[/bold]", entry.summary, str(_shown(entry.path))]
        )
        for name, values in entry.variants.items():
            shown = ", ".join(f"{key}={value!r}" for key, value in values.items())
            rows.append(
                [f"{'  ' * depth}  [dim]{name}[/dim]", f"[dim]{shown or 'the same'}[/dim]", ""]
            )
        for child in heads.values():
            if child.parent == entry.name:
                add(child, depth + 1)

    for entry in heads.values():
        if entry.parent not in heads:
            add(entry, 0)
    show(table("Experiments", ["name", "what it is", "file"], rows))
    note("--exp NAME --describe shows its diff, --check proves it; your own files in experiments/")
    note("join the list")


def _list_plans(as_json: bool) -> None:
    plans = {}
    for name in plan_paths():
        try:
            plans[name] = read_plan(name)
        except UserError as error:
            _note_error(error)
    if as_json:
        rows = [
            {"name": name, "description": p.description, "tokens": p.tokens}
            for name, p in plans.items()
        ]
        return print_json({"schema_version": 1, "plans": rows})
    rows = [
        [f"[bold]{name}[/bold]", f"{p.tokens:,}" if p.tokens else "epochs", p.description]
        for name, p in plans.items()
    ]
    show(table("Plans", ["name", "tokens", "what it is"], rows, right={"tokens"}))
    note("--plan NAME --describe prints one; --plan schema the rules")


def _note_error(error: UserError) -> None:
    note(f"not listed: {error.problem}")


def _shown(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _parsed(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"--set {text}: no key=value", hint="such as --set optimizer.lr=1e-3")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _know_config_keys(entry: Entry, changes: dict[str, object]) -> None:
    for key in changes:
        if key not in entry.fields:
            known = [*entry.fields, *Plan.model_fields, "optimizer.lr", "schedule.name"]
            hint = nearest(key, known) + f"{entry.name} has {', '.join(entry.fields)}"
            raise UserError(f"--set {key}: neither in Config nor in the plan", hint=hint)


def _know_config_values(entry: Entry, plan: Plan, changes: dict[str, object]) -> None:
    """Refuse what Config would take and the model could not use."""
    if "vocab_size" in changes:
        raise UserError(
            "--set vocab_size: it is always the tokenizer's own",
            hint="change the tokenizer, such as --set tokenizer=bpe:8192",
        )
    for key, value in (plan.model | changes).items():
        if not _is_of(value, entry.fields.get(key, "")):
            where = f"--set {key}" if key in changes else f"plan {plan.name}: model.{key}"
            problem = f"{where} should be {entry.fields[key]}, not {json.dumps(value)}"
            raise UserError(problem, hint="--describe shows the fields")
    if changes.get("max_len", plan.sequence_length) < plan.sequence_length:
        raise UserError(
            f"--set max_len={changes['max_len']}: the plan's rows have {plan.sequence_length} "
            "tokens",
            hint="--set sequence_length=N changes both",
        )


def _is_of(value: object, annotation: str) -> bool:
    """Whether a JSON value is of this type; true where the annotation is none of JSON's."""
    known = {"int": int, "float": (int, float), "bool": bool, "str": str, "None": type(None)}
    words = annotation.split(" | ")
    if not set(words) <= known.keys():
        return True
    if isinstance(value, bool):
        return "bool" in words
    return any(isinstance(value, known[word]) for word in words)


def _precision(amp: bool, precision: str | None) -> str | None:
    if amp and precision not in (None, "amp"):
        raise UserError(f"--amp and --precision {precision} are two answers", hint="give one")
    return "amp" if amp else precision


def _mini_batch_size(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdigit() or int(text) < 1:
        raise UserError(
            f"--mini-batch-size {text}: not a number of rows", hint="1 or more, or auto"
        )
    return int(text)


def _resume(text: str) -> bool:
    if text not in ("auto", "none"):
        hint = "auto goes on where the run stopped, none starts anew"
        raise UserError(f"--resume {text}: no such choice", hint=hint)
    return text == "auto"


def run() -> None:
    """The console script."""
    run_app(app)
