"""What lmp-trainer prints besides training: lists, descriptions, proofs, the path of a search."""

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from lmplay.catalog import entries as catalog
from lmplay.catalog.entry import Entry, section
from lmplay.console import note, out, print_json, show, table
from lmplay.errors import UserError
from lmplay.roots import bundled_root

if TYPE_CHECKING:
    from lmplay.optim.rules import Group
    from lmplay.plan import Plan


def print_check(
    entry: Entry, plan: "Plan", config: dict, device: str, precision: str | None, as_json: bool
) -> None:
    note(f"checking {entry.name}: loading torch")
    from dataclasses import asdict

    from lmplay.data.tokenizers import vocabulary_of
    from lmplay.machine import resolve_device, resolve_precision
    from lmplay.model.experiment import load_experiment
    from lmplay.model.scale import scale
    from lmplay.proofs.at_size import check_at_size
    from lmplay.proofs.device import check_on
    from lmplay.proofs.proof import most_telling, names_the_fault
    from lmplay.proofs.tiny import check
    from lmplay.train.leak_watch import kept_rows

    experiment, where = load_experiment(entry), resolve_device(device)
    used = resolve_precision(precision or plan.precision, where)
    made = scale(experiment, plan, *vocabulary_of(plan.tokenizer), config)
    proofs = check(experiment, config)
    if not names_the_fault(most_telling(proofs)):
        proofs += check_at_size(experiment, made.config, used, where, kept_rows(plan))
    if where.type != "cpu":
        note(f"checking {entry.name} on {where} in {used}")
        for proof in check_on(where, used, experiment, made.config):
            proofs.append(proof.at(f"{where} in {used}"))
    failed = [proof for proof in proofs if proof.passed is False]
    if as_json:
        rows = [asdict(proof) for proof in proofs]
        print_json({"schema_version": 1, "experiment": entry.name, "proofs": rows})
    else:
        words = {True: "[green]passed[/green]", False: "[red]failed[/red]", None: "exempt"}
        rows = [[words[p.passed], p.name, p.where, p.detail.replace("[", r"\[")] for p in proofs]
        show(table(f"{entry.name}", ["", "proof", "at", "what was found"], rows))
    if failed:
        raise UserError(f"{entry.name} fails {len(failed)} of {len(proofs)} proofs")


def describe(
    entry: Entry | None, plan: "Plan", config: dict, show_plan: bool, as_json: bool
) -> None:
    if entry is None:
        whole = plan.model_dump()
        print_json({"schema_version": 1, "plan": whole} if as_json else whole)
        return _note_ramp(plan)
    diff = catalog.diff(entry)
    if not as_json:
        out.print(entry.docstring, markup=False)
        out.print(f"\n{entry.name}: {entry.path}", markup=False)
        if entry.variant:
            values = ", ".join(f"{k}={v!r}" for k, v in entry.variant.items())
            out.print(f"with {values}", markup=False)
        if diff:
            from rich.syntax import Syntax

            out.print(Syntax(diff, "diff", background_color="default"))
        sys.stdout.flush()  # this much needs no torch
    from dataclasses import asdict

    from lmplay.catalog.partners import partners
    from lmplay.data.tokenizers import vocabulary_of
    from lmplay.model.counts import cache_bytes, count
    from lmplay.model.decoding import uses_cache
    from lmplay.model.experiment import load_experiment
    from lmplay.model.freezing import freeze
    from lmplay.model.roles import roles_of
    from lmplay.model.scale import scale
    from lmplay.optim.rules import groups_of

    experiment = load_experiment(entry)
    made = scale(experiment, plan, *vocabulary_of(plan.tokenizer), config)
    counts = asdict(count(experiment, made.config, plan.freeze))
    flops_per_token = counts.pop("flops_per_token")
    model = experiment.model(made.config, device="meta")
    frozen = freeze(model, plan.freeze)
    groups = groups_of(plan.optimizer, model, roles_of(experiment, made.config))
    is_cached = uses_cache(experiment.model(experiment.config(**experiment.tiny)).eval())
    lengths = (max(1, made.config.max_len // 2), made.config.max_len)
    kept = [cache_bytes(experiment, made.config, T) for T in lengths] if is_cached else None
    found = partners(entry)
    stacks = [name for name, kind in found.items() if not kind]
    others = {name: kind for name, kind in found.items() if kind}
    if as_json:
        return print_json(
            {
                "schema_version": 1,
                "experiment": entry.name,
                "file": str(entry.path),
                "docstring": entry.docstring,
                "family": catalog.family_of(entry, catalog.entries()),
                "source": section(entry.docstring, "Source"),
                "parent": entry.parent,
                "variant": entry.variant,
                "diff": diff,
                "plan": plan.model_dump() if show_plan else plan.name,
                "config": asdict(made.config),
                "scale_differs": made.differs,
                "parameters": counts,
                "frozen": frozen,
                "trained_by": [_trainer(group) for group in groups],
                "flops_per_token": flops_per_token,
                "uses_cache": is_cached,
                "cache_bytes": kept and dict(zip(map(str, lengths), kept, strict=True)),
                "stacks_with": stacks,
                "collides_with": others,
            }
        )
    values = ", ".join(f"{key}={value!r}" for key, value in asdict(made.config).items())
    out.print(f"\nConfig on plan {plan.name}: {values}", markup=False)
    rows = [[name, f"{value:,}"] for name, value in counts.items()]
    rows.append(["FLOPs per token", f"{flops_per_token:,.0f}"])
    show(table("\nParameters", ["", " "], rows, right={" "}))
    columns = ["role", "parameters", "optimizer", "rate", "decay"]
    rows = [
        [row["role"], f"{row['parameters']:,}", row["optimizer"], f"{row['lr']:g}",
         f"{row['weight_decay']:g}"]
        for row in map(_trainer, groups)
    ]  # fmt: skip
    show(table("\nTrained by", columns, rows, right={"parameters", "rate", "decay"}))
    if frozen:
        out.print(f"Frozen: {', '.join(frozen)}", markup=False)
    if kept:
        half, whole = (f"{size:,}" for size in kept)
        grows = f"; {half} after {lengths[0]:,}" if half != whole else ", as after half of them"
        out.print(f"Generating keeps {whole} bytes a row after {lengths[1]:,} tokens{grows}.")
    else:
        out.print("It ignores the cache: generating runs on the whole text again for each token.")
    if found:
        out.print(
            f"\nStacks with {len(stacks)} of {len(found)} other ideas on its baseline", end=""
        )
        out.print(f"; not with {', '.join(others)}." if others else ".", markup=False)
    if show_plan:
        print_json(plan.model_dump())
        _note_ramp(plan)


def _note_ramp(plan: "Plan") -> None:
    """The steps from which batch or rows are others, where the plan says how many there are."""
    from lmplay.train.clock import Clock

    if plan.tokens is None or len((clock := Clock(plan)).phases) == 1:
        return
    for phase in clock.phases:
        rows = phase.num_rows * (plan.max_len // phase.row_length)
        note(f"from step {phase.step + 1:,} on: {rows:,} rows of {phase.row_length:,} tokens")
    note(f"{clock.num_steps:,} steps, {clock.num_tokens:,} tokens")


def _trainer(group: "Group") -> dict:
    """Who trains some parameters, at which rate and decay."""
    return {
        "role": group.rule.role,
        "parameters": sum(p.numel() for p in group.params),
        "optimizer": group.rule.known.name,
        "lr": group.lr,
        "weight_decay": group.weight_decay,
        "options": group.rule.options,
    }


def list_experiments(word: str, as_json: bool) -> None:
    """Print the experiments as a tree, those of one family together.

    Args:
        word: a family, or an experiment with what was copied from it; empty for all.
    Raises:
        UserError: it is neither.
    """
    known = catalog.entries(_note_error)
    entries = catalog.listed(word, known) if word else known
    families = {e.file: catalog.family_of(e, known) or "" for e in entries.values()}
    if as_json:
        rows = [
            {
                "name": e.name,
                "summary": e.summary,
                "family": families[e.file] or None,
                "parent": e.parent if e.name == e.file else e.file,
                "variant": e.variant,
                "file": str(e.path),
            }
            for e in entries.values()
        ]
        return print_json({"schema_version": 1, "experiments": rows})
    heads = [entry for name, entry in entries.items() if name == entry.file]
    heads.sort(key=lambda entry: (families[entry.file] or "~", entry.file))  # baselines come last
    home = bundled_root() / "experiments"
    rows: list[list[str]] = []
    shown_names = set()

    def add(entry: Entry, depth: int) -> None:
        if entry.name in shown_names:  # also where two name one another as parents
            return
        shown_names.add(entry.name)
        file = "" if entry.path.parent == home else escape(str(_shown(entry.path)))
        title, family = f"{'  ' * depth}[bold]{entry.name}[/bold]", families[entry.file]
        rows.append([title, escape(family), escape(entry.summary), file])
        for name, values in entry.variants.items():
            shown = ", ".join(f"{key}={value!r}" for key, value in values.items())
            shown = f"[dim]{escape(shown) or 'the same'}[/dim]"
            rows.append([f"{'  ' * depth}  [dim]{name}[/dim]", "", shown, ""])
        for child in heads:
            if child.parent == entry.name:
                add(child, depth + 1)

    for entry in heads:
        if entry.parent not in families:
            add(entry, 0)
    for entry in heads:
        add(entry, 0)
    if not any(row[-1] for row in rows):
        rows = [row[:-1] for row in rows]
    columns = ["name", "family", "what it is", "file"][: len(rows[0])]
    show(table("Experiments", columns, rows, cut="what it is"))
    counts = Counter(family for family in families.values() if family)
    if not word:
        some = ", ".join(f"{family} {count}" for family, count in sorted(counts.items()))
        note(f"--exp list:FAMILY shows one of {some}")
        note("--exp list:NAME shows an experiment and what was copied from it")
    note("--exp NAME --describe shows its diff, --check proves it; your own files in experiments/")
    note("join the list")


def list_optimizers(as_json: bool) -> None:
    from lmplay.optim.known import EXTRA, KNOWN  # here: pydantic

    found = [
        {
            "name": known.name,
            "summary": known.summary,
            "paper": known.paper,
            "bytes_per_parameter": known.state,
            "lr": known.lr,
            "weight_decay": known.weight_decay,
            "options": known.options,
            "roles": "all" if known.takes is None else sorted(known.takes),
            "rest": None if known.takes is None else known.rest,
            "package": known.package,
        }
        for known in KNOWN.values()
    ]  # fmt: skip
    if as_json:
        return print_json({"schema_version": 1, "optimizers": found})
    rows = []
    for row in found:
        roles = row["roles"] if row["rest"] is None else f"{', '.join(row['roles'])}"
        rest = "" if row["rest"] is None else f"; {row['rest']} the rest"
        mark = "*" if row["package"] == "pytorch-optimizer" else ""
        rows.append(
            [f"[bold]{row['name']}[/bold]{mark}", row["summary"], row["paper"],
             row["bytes_per_parameter"], f"{row['lr']:.2g}", f"{row['weight_decay']:g}",
             f"{roles}{rest}"]
        )  # fmt: skip
    columns = ["name", "what it is", "paper", "bytes", "rate", "decay", "trains"]
    show(table("Optimizers", columns, rows, right={"bytes", "rate", "decay"}))
    note("bytes of state for each parameter in fp32; rate and decay where AdamW has 0.001 and 0.1:")
    note(f"--optimizer scales them with the plan's own. * needs {EXTRA}")
    note("any of them: --set optimizer.options.cautious=true, .hyperball=true, .decay=cautious;")
    note("any with momentum: .momentum_warmup=0.1, .momentum_cooldown=0.1")


def list_plans(as_json: bool) -> None:
    from lmplay.plan_file import plan_paths, read_plan  # here: pydantic

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
        [f"[bold]{name}[/bold]", f"{p.tokens:,}" if p.tokens else "epochs", escape(p.description)]
        for name, p in plans.items()
    ]
    show(table("Plans", ["name", "tokens", "what it is"], rows, right={"tokens"}))
    note("--plan NAME --describe prints one; --plan schema the rules")


def print_path(rounds: list[dict]) -> None:
    """What `greedy.search` tried in each round, best first, and the stack that it ended with."""
    rows = []
    for one in rounds:
        tried = sorted(one["candidates"], key=lambda c: (c["difference"] is None, c["difference"]))
        for candidate in tried:
            rows.append([str(one["round"]), one["stack"], *_candidate_cells(candidate, one)])
    columns = ["round", "on", "idea", "difference", "95 % interval", "p (Holm)", "verdict", ""]
    show(table("greedy search: a difference below 0 is better", columns, rows, right=columns[3:6]))
    last = rounds[-1]
    taken = {candidate["name"]: candidate["stack"] for candidate in last["candidates"]}
    out.print(f"best stack: {taken.get(last['accepted'], last['stack'])}", markup=False)


def _candidate_cells(candidate: dict, one: dict) -> list[str]:
    difference, ends, p = (candidate[key] for key in ("difference", "interval", "p_holm"))
    shown = [
        "" if difference is None else f"{difference:+.4f}",
        "" if ends is None else "[{:+.4f}, {:+.4f}]".format(*ends),
        "" if p is None else f"{p:.4f}",
        candidate["verdict"] or "",
        "taken" if candidate["name"] == one["accepted"] else "",
    ]
    return [candidate["name"], *(text.replace("[", r"\[") for text in shown)]


def _note_error(error: UserError) -> None:
    note(f"not listed: {error.problem}")


def _shown(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
