"""lmp-export: a trained model for other programs."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from lmplay.console import Version, Weights, note, print_json, run_app
from lmplay.errors import UserError
from lmplay.run.folder import RUNS, resolve_run

app = typer.Typer(
    pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)


class ExportFormat(StrEnum):
    """What is written."""

    SAFETENSORS = "safetensors"
    HF = "hf"


@app.command()
def main(
    run: Annotated[
        str,
        Argument(
            metavar="RUN",
            help="A run's folder, one of its checkpoints, or plan/experiment/seed-n under --runs.",
        ),
    ],
    out: Annotated[Path, Argument(metavar="OUT", help="The folder to make.")],
    to: Annotated[
        ExportFormat,
        Option(
            help="safetensors: weights and config.json. hf: what transformers opens, with the "
            "tokenizer."
        ),
    ] = ExportFormat.SAFETENSORS,
    fold: Annotated[
        bool,
        Option("--fold/--no-fold", help="Take out the parameters that only training needs."),
    ] = True,
    step: Annotated[
        int | None,
        Option(help="Step of the checkpoint; without it, the newest.", min=0, metavar="N"),
    ] = None,
    weights: Weights = None,
    runs: Annotated[Path, Option(help="Folder of all runs.", metavar="PATH")] = Path(RUNS),
    as_json: Annotated[
        bool, Option("--json", metavar="", help="Print what was written as one JSON document.")
    ] = False,
    version: Version = None,
) -> None:
    """Export the model of a run, in fp32.

    For transformers, gpt2 and llama become its own classes; other experiments bring their code.
    OUT appears whole or not at all.

    Example: lmp-export quick/ue/seed-0 ue-model --to hf
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already", hint="name a folder that is new or empty")
    folder, named_step = resolve_run(run, runs)
    facts = folder.read()
    note(f"{facts.label} on {facts.plan_name}, seed {facts.seed}: loading torch")
    from lmplay.export.export import export

    at_step = named_step if step is None else step
    made = export(folder, at_step, to.value, fold, out, weights)
    if as_json:
        return print_json(made)
    before, after = made["parameters"]["trained"], made["parameters"]["exported"]
    size = f"{after:,} parameters"
    if made["folded"]:
        size = f"folded to {made['folds_to']}, {before:,} parameters to {after:,}"
    elif fold:
        size += ", nothing to fold"
    typer.echo(f"{out}: {facts.label} at step {made['step']}, {size}")
    if to is ExportFormat.HF:
        trust = ", trust_remote_code=True" if made["trust_remote_code"] else ""
        typer.echo(f'AutoModelForCausalLM.from_pretrained("{out}"{trust})  # {made["class"]}')
    return None


def run() -> None:
    """The console script."""
    run_app(app)
