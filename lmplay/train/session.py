"""One run from a request to its result: prepare, check, open or resume, train, close."""

import dataclasses
import json
import sys
from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from lmplay.catalog.entries import canonical_name
from lmplay.data.batches import Data, open_data
from lmplay.data.tokenizers import Tokenizer, vocab_size_of
from lmplay.disk import make_folder, write_text
from lmplay.errors import UserError
from lmplay.machine import matmul_rate, resolve_device, resolve_precision
from lmplay.memory import keep_memory
from lmplay.model.abilities import scores_itself
from lmplay.model.counts import count
from lmplay.model.decoding import greedy_text
from lmplay.model.experiment import (
    Experiment,
    Scale,
    freeze,
    load_experiment,
    load_source,
    scale,
)
from lmplay.optim.registry import make_optimizer, refuse_sharding, refuse_wrong_updates
from lmplay.plan import Plan
from lmplay.proofs import device as device_check
from lmplay.proofs import tiny as check
from lmplay.run.accelerator import make_accelerator
from lmplay.run.checkpoint import newest_checkpoint, restore_rng, unchanged_rng
from lmplay.run.compiler import compiled_so_far
from lmplay.run.facts import DataFacts, Facts
from lmplay.run.folder import RunFolder
from lmplay.run.fsdp import spread_optimizer
from lmplay.run.provenance import machine_facts
from lmplay.run.records import TRAIN_COLUMNS, VALIDATION_COLUMNS, Record, read_rows
from lmplay.run.request import Request
from lmplay.run.run import Run, load_weights, open_run
from lmplay.seeds import stream_seed
from lmplay.train.clock import Clock
from lmplay.train.compilation import is_repaid
from lmplay.train.curves import Curves, NotFinite
from lmplay.train.display import Display
from lmplay.train.fault import first_bad_place
from lmplay.train.initial_model import begin_from, told
from lmplay.train.loop import Session, train
from lmplay.train.saving import scattered_rng
from lmplay.train.signals import Signals, Stopped
from lmplay.train.update import Update

AUTO_TOKENS = 8192  # in a micro-batch where memory cannot be probed


def run_experiment(request: Request, display: Display) -> dict:
    """Train what was asked for, or go on where it stopped.

    Returns:
        What `--json` prints: the run's folder, status, step and last validation.
    Raises:
        UserError: bad input, a failed check, data or a run that cannot be used, a numeric failure.
        Stopped: a signal came, and the run was saved.
    """
    device = resolve_device(request.device)
    precision = resolve_precision(request.precision or request.plan.precision, device)
    folder = request.folder
    if request.resume and folder.run_json.is_file():  # on another device too, or with another plan
        precision = resolve_precision(folder.read().precision, device)
    accelerator = make_accelerator(device, precision)
    if request.sharded:
        _refuse_sharding(request, precision, accelerator.num_processes)
    if not request.resume and accelerator.is_main_process:
        _set_aside(folder, display)
    accelerator.wait_for_everyone()
    with ExitStack() as stack:
        if accelerator.is_main_process:
            stack.enter_context(folder.lock())
        facts = folder.read() if folder.run_json.is_file() else None
        if result := finished(request, display):
            display.note(f"{folder.path} is finished; --resume none trains it again")
            return result
        plan, experiment = _own_copies(request, facts, folder, display)
        if facts is None:
            refuse_unproven(experiment)
            refuse_unknown_names(request, experiment)
        tokenizer, data = open_data(plan, request.seed, display.note, display.preparing)
        stack.callback(data.close)
        clock = Clock(plan, data.num_rows)
        if accelerator.is_main_process and not folder.tokenizer_json.exists():
            tokenizer.save(folder.tokenizer_json)
        if facts is None:
            made = _scale(request, plan, experiment, tokenizer.vocab_size, display)
        else:
            made = Scale(experiment.config(**facts.config), facts.scale_differs)
            torch.set_num_threads(facts.threads)
        keep_memory()
        with accelerator.local_main_process_first():  # which remembers it for the others
            where = accelerator.device
            device_check.refuse_wrong(where, precision, experiment, made.config, display.note)
        refuse_wrong_updates(plan.optimizer, accelerator.device)
        run = open_run(
            folder,
            plan,
            experiment,
            request.seed,
            made.config,
            accelerator,
            request.mini_batch_size
            or (facts.mini_batch_size if facts else None)
            or rows_at_once(plan, device),
            _compiles(request, facts, experiment, made.config, clock, accelerator, precision),
            request.sharded,
        )
        run.may_shrink = request.mini_batch_size is None
        now = _facts(request, run, data, clock, tokenizer, made, precision)
        now = _continued(now, facts, display)
        session = _open_session(run, data, clock, stack, display)
        if request.initial and session.saved < 0:
            beginner = replace(run, model=run.whole_model())
            began = begin_from(request.initial, beginner, tokenizer)
            now = replace(now, initial_model=began)
            load_weights(run.model, beginner.model.state_dict(), str(request.initial.path))
            display.note(told(began))
        return _train(session, now, tokenizer, display)


def _refuse_sharding(request: Request, precision: str, num_processes: int) -> None:
    refuse_sharding(request.plan.optimizer)
    if num_processes == 1:
        hint = "--gpus N or torchrun starts several"
        raise UserError("--shard needs several processes, and there is one", hint=hint)
    if precision == "fp16":
        raise UserError("--shard and fp16 do not go together", hint="bf16 and fp32 do")


def finished(request: Request, display: Display) -> dict | None:
    """The result of a run that is finished, with a note where its files were edited since.

    Raises:
        UserError: the run was trained on other data.
    """
    folder = request.folder
    facts = folder.read() if folder.run_json.is_file() else None
    if facts is None or facts.status != "finished":
        return None
    _note_edits(request, facts, folder, display)
    return _result(folder, facts)


def _compiles(
    request: Request,
    facts: Facts | None,
    experiment: Experiment,
    config,
    clock: Clock,
    accelerator: Accelerator,
    precision: str,
) -> bool:
    """As asked for; else as the run began; else where it is repaid."""
    if request.compiled is not None:
        return request.compiled
    if facts is not None or request.sharded:
        return facts is not None and facts.compiled

    def flops() -> float:
        tokens = clock.num_tokens / accelerator.num_processes
        return count(experiment, config, request.plan.freeze).flops_per_token * tokens

    is_worth_it = is_repaid(experiment, accelerator.device, precision, flops)
    return broadcast_object_list([is_worth_it])[0]  # as the first process measured it


def _facts(
    request: Request,
    run: Run,
    data: Data,
    clock: Clock,
    tokenizer: Tokenizer,
    made: Scale,
    precision: str,
) -> Facts:
    """What run.json says of a run that begins now."""
    plan, experiment = run.plan, run.experiment
    return Facts(
        experiment=canonical_name(request.entry),
        file=experiment.entry.file,
        stack=[canonical_name(idea) for idea in request.entry.ideas],
        docstring_summary=experiment.summary,
        plan_name=plan.name,
        seed=request.seed,
        changes=request.all_changes,
        label=request.label,
        budget=request.budget,
        plan=plan.model_dump(mode="json"),
        config=dataclasses.asdict(made.config),
        scale_differs=made.differs,
        bound=scores_itself(run.model),
        data=DataFacts(
            fingerprint=data.fingerprint,
            validation_fingerprint=data.validation_fingerprint,
            tokenizer=plan.tokenizer,
            vocab_size=tokenizer.vocab_size,
            validation_tokens=data.validation_tokens,
            validation_bytes=data.validation_bytes,
        ),
        **_sizes(experiment, made.config, plan),
        num_steps=clock.num_steps,
        tokens_per_step=clock.at(0).tokens,
        **machine_facts(run.device),
        precision=precision,
        world_size=run.world_size,
        mini_batch_size=run.mini_batch_size,
        compiled=run.compiled,
        sharded=request.sharded,
        command=sys.argv,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _train(session: Session, now: Facts, tokenizer: Tokenizer, display: Display) -> dict:
    run, folder = session.run, session.run.folder
    is_main = run.accelerator.is_main_process

    def write(facts: Facts) -> None:
        nonlocal now
        changed = {*facts.changed_midway}
        if run.step and facts.compiled and not run.compiled:
            changed.add("compiled")
        now = replace(
            facts,
            mini_batch_size=run.mini_batch_size,
            compiled=run.compiled,
            changed_midway=sorted(changed),
        )
        if is_main:
            folder.write(now)

    def warn(text: str) -> None:
        display.note(text)
        write(now.running())

    def show(kind: str, row: dict) -> None:
        nonlocal now
        if kind == "train" and run.compiled and (made := compiled_so_far()) != now.compilation:
            now = replace(now, compilation=made)
            if is_main:
                display.note(str(made))
        model = run.whole_model() if kind == "validation" else None
        if not is_main:
            return
        display.row(kind, row)
        if kind == "validation":
            num_rows = session.clock.at(row["step"]).first_row
            for name, prompt, truth in session.data.examples(num_rows):
                with run.accelerator.autocast(), unchanged_rng():
                    said = greedy_text(model, prompt, len(truth), run.config.max_len)
                texts = [tokenizer.decode(ids) for ids in (prompt, truth, said)]
                display.example(*texts)
                _write_sample(folder, f"step {row['step']:,}, {name}", *texts)

    session.show, run.warn = show, warn
    matmul_flops = run.world_size * matmul_rate(run.device, now.precision)
    write(replace(now, matmul_flops=matmul_flops).running())
    fastest = now.flops_per_token * now.tokens_per_step / matmul_flops
    display.start(session.clock.num_steps, run.step, fastest)
    try:
        with session.signals:
            train(session)
    except BaseException as error:
        is_numeric = isinstance(error, NotFinite)
        if is_numeric:
            bad = session.clock.at(error.step - 1)
            batch = session.data.rows(bad.first_row, bad.num_rows, bad.row_length)
            if name := first_bad_place(run, batch):
                error.problem += f"; run again, it begins in {name}"
        is_stopped = isinstance(error, Stopped | SystemExit | KeyboardInterrupt)
        reason = getattr(error, "problem", str(error)) or type(error).__name__
        with suppress(OSError):  # a full disk is the error itself
            write(now.stopped(reason) if is_stopped else now.failed(reason, is_numeric))
        raise
    write(now.finished())
    return _result(folder, now)


def refuse_unproven(experiment: Experiment) -> None:
    """Raise a UserError where a proof fails."""
    failed = [proof for proof in check.checked(experiment) if proof.passed is False]
    if failed:
        raise UserError(
            f"{experiment.name} fails the check: {failed[0].name}: {failed[0].detail}",
            hint=f"lmp-trainer --exp {experiment.entry.path} --check shows every proof",
        )


def refuse_unknown_names(request: Request, experiment: Experiment) -> None:
    """Raise a UserError where the plan freezes what the model does not have, or all of it."""
    plan = request.plan
    if plan.freeze:
        vocab_size = vocab_size_of(plan.tokenizer)
        config = scale(experiment, plan, vocab_size, request.config).config
        freeze(experiment.model(config, device="meta"), plan.freeze)


def _own_copies(
    request: Request, facts: Facts | None, folder: RunFolder, display: Display
) -> tuple[Plan, Experiment]:
    """A run that began goes on with its own plan and source; a new one gets its copies."""
    if facts is None:
        experiment = load_experiment(request.entry)
        make_folder(folder.path)
        write_text(folder.experiment_py, experiment.source)
        return request.plan, experiment
    _note_edits(request, facts, folder, display)
    source = folder.experiment_py.read_text(encoding="utf-8")
    experiment = load_source(source, Path(f"{facts.file}.py"), request.entry.variant)
    return Plan.model_validate_json(json.dumps(facts.plan)), experiment


def _note_edits(request: Request, facts: Facts, folder: RunFolder, display: Display) -> None:
    """Say where the run's own copies and the files of today differ; refuse other data."""
    plan = request.plan.model_dump(mode="json")
    if facts.plan["datasets"] != plan["datasets"]:
        mine, theirs = (_sources(p["datasets"]) for p in (plan, facts.plan))
        raise UserError(
            f"{folder.path} was trained on {theirs}, not on {mine}",
            hint="--out-dir gives this run a place of its own; --resume none keeps the old aside",
        )
    edited = []
    if folder.experiment_py.read_text(encoding="utf-8") != request.entry.source:
        edited.append(str(request.entry.path))
    if facts.plan != plan:
        edited.append(f"plan {request.plan.name}")
    if edited:
        display.note(
            f"edited since this run began: {', '.join(edited)}. The run keeps its own copy; "
            "--resume none trains the edited one and keeps this run aside"
        )


def _sources(datasets: dict[str, dict]) -> str:
    kinds = ("hub", "files", "shards", "builtin")
    named = [dataset[kind] for dataset in datasets.values() for kind in kinds if dataset[kind]]
    return ", ".join(" ".join(name) if isinstance(name, list) else name for name in named)


def _scale(request: Request, plan: Plan, experiment: Experiment, vocab_size: int, display) -> Scale:
    made = scale(experiment, plan, vocab_size, request.config)
    for key, (_, value) in made.differs.items():
        if value is None:
            display.note(f"{experiment.name} has no Config value {key!r}: the plan's is not used")
    return made


def _set_aside(folder: RunFolder, display: Display) -> None:
    """Rename an earlier run to a hidden name beside it: nothing that was trained is deleted."""
    if not folder.run_json.is_file():
        return
    with folder.lock():  # not while somebody trains in it
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        old = folder.path.with_name(f".{folder.path.name}-until-{stamp}")
        folder.path.rename(old)
    display.note(f"the earlier run is kept in {old}")


def rows_at_once(plan: Plan, device: torch.device) -> int:
    """Rows in a micro-batch: all of them on CUDA, where a failure halves it; else a safe few."""
    largest = max(rows for _, rows in plan.batch_sizes)
    if device.type == "cuda":
        return largest
    return max(1, min(largest, AUTO_TOKENS // plan.max_len))


def _sizes(experiment: Experiment, config, plan: Plan) -> dict:
    counts = dataclasses.asdict(count(experiment, config, plan.freeze))
    return {"flops_per_token": counts.pop("flops_per_token"), "parameters": counts}


def _continued(now: Facts, facts: Facts | None, display: Display) -> Facts:
    """What run.json says of a run that goes on; says what makes the rest differ bit by bit."""
    if facts is None:
        return now
    if facts.data != now.data:
        mine, theirs = dataclasses.asdict(now.data), dataclasses.asdict(facts.data)
        changed = [key for key, value in mine.items() if theirs[key] != value]
        raise UserError(
            f"the data has changed since this run began: {', '.join(changed)}",
            hint="--resume none starts again with the new data and keeps the old run aside",
        )
    exact = ["device_name", "versions", "threads", "compiled", "mini_batch_size", "world_size"]
    exact += ["sharded"]
    differs = [key for key in exact if getattr(facts, key) != getattr(now, key)]
    if differs:
        display.note(f"not the same bit by bit from here on: other {', '.join(differs)}")
    return replace(
        now,
        started=facts.started,
        failures=facts.failures,
        initial_model=facts.initial_model,
        changed_midway=sorted({*facts.changed_midway, *differs}),
    )


def _open_session(
    run: Run, data: Data, clock: Clock, stack: ExitStack, display: Display
) -> Session:
    """Take up the newest checkpoint, and cut the curves back to it."""
    update = Update(run, make_optimizer(run.plan.optimizer, run.model), run.plan.clip)
    folder, rank = run.folder, run.accelerator.process_index
    with run.accelerator.main_process_first():  # which holds the lock, and sets aside
        checkpoint = newest_checkpoint(folder, display.note)
    if checkpoint is not None:
        load_weights(run.model, checkpoint.model, str(folder.path))
        update.optimizer.load_state_dict(spread_optimizer(checkpoint.optimizer, update.optimizer))
        update.load_state(checkpoint.state["scaler"])
        rng = scattered_rng(run, checkpoint.rng)
        if rng:
            restore_rng(rng)
        else:  # it was saved by fewer processes
            torch.manual_seed(stream_seed(run.seed, f"dropout/{rank}/{checkpoint.step}"))
        run.step = checkpoint.step
        run.tokens = checkpoint.state["tokens"]
        run.seconds = checkpoint.state["seconds"]
        display.note(f"going on at step {run.step:,} of {clock.num_steps:,}")
    saved = -1 if checkpoint is None else run.step
    train_csv = validation_csv = None
    validated = -1
    if run.accelerator.is_main_process:
        train_csv = Record(folder.train_csv, TRAIN_COLUMNS, saved)
        validation_csv = Record(folder.validation_csv, VALIDATION_COLUMNS, saved)
        stack.callback(train_csv.close)
        stack.callback(validation_csv.close)
        rows = read_rows(folder.validation_csv)
        validated = rows[-1]["step"] if rows else -1
    curves = Curves(run, train_csv)
    return Session(
        run, data, clock, update, curves, validation_csv, Signals(), display.row, validated, saved
    )


def _write_sample(folder: RunFolder, title: str, prompt: str, truth: str, said: str) -> None:
    parts = [f"## {title}"]
    for name, text in (("prompt", prompt), ("truth", truth), ("the model", said)):
        parts.append(f"**{name}**\n\n" + "\n".join(f"    {line}" for line in text.splitlines()))
    with folder.samples_md.open("a", encoding="utf-8") as file:
        file.write("\n\n".join(parts) + "\n\n")


def _result(folder: RunFolder, facts: Facts) -> dict:
    rows = read_rows(folder.validation_csv)
    return {
        "schema_version": 1,
        "run": str(folder.path),
        "experiment": facts.experiment,
        "plan": facts.plan_name,
        "seed": facts.seed,
        "status": facts.status,
        "num_steps": facts.num_steps,
        "parameters": facts.parameters,
        "validation": rows[-1] if rows else None,
    }
