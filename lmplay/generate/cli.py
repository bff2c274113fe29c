"""lmp-generator: read what a trained run writes."""

import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from lmplay.console import (
    Device,
    Version,
    Weights,
    harmless,
    note,
    precision_option,
    print_json,
    run_app,
)
from lmplay.data.local_files import encoding_of
from lmplay.errors import UserError
from lmplay.run.folder import RUNS, resolve_run

if TYPE_CHECKING:
    import torch

    from lmplay.generate.sampling import Sample
    from lmplay.run.trained import Trained

app = typer.Typer(
    pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)

_ROWS = 32  # samples that are written at once
_SEPARATOR = "---"
_HELP = "/help shows this, Ctrl-C stops the text, Ctrl-D ends; anything else is a prompt"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the text is written."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    num_samples: int
    stop: list[str]
    device: str
    precision: str
    compile: bool


def _refuse_nonsense(settings: Settings) -> None:
    """What sampling would refuse, told before torch is loaded and the prompt is shown."""
    if not 0 <= settings.temperature < float("inf"):
        hint = "0 is greedy, 1 is the model's own spread"
        raise UserError(f"--temperature {settings.temperature} is not a number from 0 up", hint)
    if settings.top_k < 0:
        raise UserError(f"--top-k {settings.top_k} is below 0", hint="0 draws from all tokens")
    if not 0 < settings.top_p <= 1:
        raise UserError(f"--top-p {settings.top_p} is not in (0, 1]", "1 draws from all tokens")
    if not 0 < settings.repetition_penalty < float("inf"):
        problem = f"--repetition-penalty {settings.repetition_penalty} is not a number above 0"
        raise UserError(problem, hint="1 is none")
    if "" in settings.stop:
        raise UserError("a --stop string is empty", hint="leave --stop out to stop at none")


@app.command()
def main(
    run: Annotated[
        str | None,
        Argument(
            metavar="RUN",
            help="A run's folder, one of its checkpoints, or plan/experiment/seed-n under --runs. "
            "Without it, the run that started last.",
        ),
    ] = None,
    text: Annotated[
        str | None,
        Argument(metavar="PROMPT", help="Text to go on from; '' starts a new document."),
    ] = None,
    prompt: Annotated[
        str | None, Option(help="The prompt, where no run is named before it.", metavar="TEXT")
    ] = None,
    prompt_file: Annotated[
        Path | None,
        Option(help="File with the prompt; a newline at its end is dropped.", metavar="PATH"),
    ] = None,
    max_tokens: Annotated[int, Option(help="New tokens, at most.", min=1, metavar="N")] = 200,
    temperature: Annotated[
        float,
        Option(
            help="Divides the logits: 1 is the model's own spread, 0 is greedy.",
            metavar="X",
        ),
    ] = 0.8,
    top_k: Annotated[
        int,
        Option(help="Draw from this many likeliest tokens; 0 draws from all.", metavar="N"),
    ] = 0,
    top_p: Annotated[
        float,
        Option(
            help="Draw from the likeliest tokens that hold this share of the probability.",
            metavar="X",
        ),
    ] = 1.0,
    repetition_penalty: Annotated[
        float,
        Option(
            help="Makes tokens of the text so far less likely; 1 is none.",
            metavar="X",
        ),
    ] = 1.0,
    greedy: Annotated[
        bool, Option("--greedy", metavar="", help="Always the likeliest token, as --temperature 0.")
    ] = False,
    num_samples: Annotated[
        int, Option(help="Texts to write from the prompt.", min=1, metavar="N")
    ] = 1,
    seed: Annotated[int, Option(help="Fixes the texts.", min=0, max=2**63 - 1, metavar="N")] = 0,
    stop: Annotated[
        list[str] | None,
        Option(
            help="A text ends before this string; may be repeated. A newline is $'\\n'.",
            metavar="TEXT",
        ),
    ] = None,
    step: Annotated[
        int | None,
        Option(help="Step of the checkpoint; without it, the newest.", min=0, metavar="N"),
    ] = None,
    weights: Weights = None,
    device: Device = "auto",
    precision: Annotated[
        str | None, precision_option("what the run was trained in, or amp where that is slow")
    ] = None,
    compile: Annotated[
        bool,
        Option(
            "--compile",
            metavar="",
            help="Compile the steps, which takes 20 s mostly; on a CPU in bf16 alone.",
        ),
    ] = False,
    runs: Annotated[Path, Option(help="Folder of all runs.", metavar="PATH")] = Path(RUNS),
    as_json: Annotated[
        bool, Option("--json", metavar="", help="Print settings and texts as one JSON document.")
    ] = False,
    version: Version = None,
) -> None:
    """Write text with a trained run: prompt and continuation on stdout.

    The prompt is PROMPT, --prompt, --prompt-file, or else stdin; a terminal asks for prompts.
    When the model's context is full, the text goes on from its last 3/4.

    Example: lmp-generator --prompt "def main(" --max-tokens 100 --num-samples 3
    """
    sys.stdout.reconfigure(errors="replace")  # a model may write what stdout cannot encode
    settings = Settings(
        max_tokens=max_tokens,
        temperature=0.0 if greedy else temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        num_samples=num_samples,
        stop=[_as_trained(text) for text in stop or []],
        device=device,
        precision=precision or "",
        compile=compile,
    )
    _refuse_nonsense(settings)
    asked = _prompt(text, prompt, prompt_file)
    if asked is None and as_json:
        raise UserError("--json needs a prompt", hint="such as --prompt TEXT")
    folder, named_step = _resolve(run, runs)
    facts = folder.read()
    note(f"{facts.label} on {facts.plan_name}, seed {facts.seed}: loading torch")
    import torch

    from lmplay.generate.compiled_steps import CompiledSteps, can_compile
    from lmplay.generate.packing import pack
    from lmplay.machine import resolve_device, resolve_precision, slowness
    from lmplay.memory import keep_memory
    from lmplay.model.abilities import writes_itself
    from lmplay.model.sampler import Sampler
    from lmplay.proofs.device import refuse_wrong
    from lmplay.run.trained import open_trained

    place = resolve_device(device)
    used = resolve_precision(precision or _fast(facts.precision, place), place)
    settings = replace(settings, device=str(place), precision=used)
    if slow := slowness(used, place):
        note(slow)
    if compile and not can_compile(place, settings.precision):
        problem = f"--compile: on the CPU, {settings.precision} is faster without"
        raise UserError(problem, hint="add --precision bf16, or leave out --compile")
    choose = Sampler(seed, settings.temperature, top_k, top_p)
    keep_memory()
    at_step = named_step if step is None else step
    trained = open_trained(folder, at_step, settings.device, settings.precision, weights)
    asked_of = trained.device, settings.precision, trained.experiment, trained.config
    refuse_wrong(*asked_of, note, is_trained=False)
    torch.manual_seed(seed)  # for a model that writes by itself
    read = CompiledSteps() if compile and not writes_itself(trained.model) else None
    if read:
        note("--compile: behind the first token comes a pause of 20 s, for a long graph of minutes")
    elif compile:
        note("--compile: this model writes by itself, and is not compiled")
    if not read and pack(trained.model, settings.precision, min(num_samples, _ROWS)):
        trained = replace(trained, autocast=nullcontext)
    note(f"{folder.path}, step {trained.step}, {settings.device}, {settings.precision}")
    with trained.autocast():  # once: it casts each weight the first time
        if asked is None:
            return _talk(trained, settings, choose, read)
        samples = _write(trained, settings, choose, read, asked, show=not as_json)
    if as_json:
        print_json(
            {
                "schema_version": 1,
                "run": str(folder.path),
                "step": trained.step,
                "weights": weights,
                "seed": seed,
                "settings": asdict(settings),
                "samples": [asdict(sample) for sample in samples],
            }
        )
    return None


def _fast(precision: str, device: "torch.device") -> str:
    """What a run was trained in, or amp where this device is slow at it or lacks it."""
    from lmplay.machine import slowness

    is_missing = precision == "fp16" and device.type == "cpu"
    return "amp" if is_missing or slowness(precision, device) else precision


def _prompt(text: str | None, prompt: str | None, file: Path | None) -> str | None:
    """The one prompt that was given; None where a person is to be asked."""
    given = [value for value in (text, prompt, file) if value is not None]
    if len(given) > 1:
        raise UserError(
            f"{len(given)} prompts were given", hint="give one of PROMPT, --prompt, --prompt-file"
        )
    if file is not None:
        try:
            return _decoded(file.read_bytes(), str(file))
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror}") from None
    if given:
        return _as_trained(given[0])
    return None if sys.stdin.isatty() else _decoded(sys.stdin.buffer.read(), "stdin")


def _decoded(data: bytes, name: str) -> str:
    """The text without a byte order mark, its lines ended as those that were trained on."""
    encoding = encoding_of(data)  # PowerShell writes UTF-16
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        kind = encoding.upper().removesuffix("-SIG")
        problem = f"{name} is not {kind} text: {error.reason}, byte {error.start}"
        raise UserError(problem, hint="convert it first: iconv -f latin1 -t utf-8") from None
    if "\0" in text:
        problem = f"{name} holds no text: it is binary, with a NUL byte"
        raise UserError(problem, hint="UTF-16 without a mark: iconv -f utf-16le -t utf-8")
    return _as_trained(text).removesuffix("\n")


def _as_trained(text: str) -> str:
    """The text as a file of it would have been read: no mark, each line ended by a newline."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _resolve(run: str | None, runs: Path):
    try:
        return resolve_run(run, runs)
    except UserError as error:
        hint = error.hint
        if run is not None:
            hint += "; the first argument is a run, a text goes to --prompt"
        raise UserError(error.problem, hint, error.code) from None


def _write(
    trained: "Trained", settings: Settings, choose, read, prompt: str, first_row: int = 0, show=True
) -> list["Sample"]:
    """Write all samples; show each behind its prompt, the first one while it is written."""
    from lmplay.generate.sampling import Sample, write

    samples = [Sample(prompt) for _ in range(settings.num_samples)]
    notes: dict[str, None] = {}  # each said once, and not into the middle of a text
    begin = time.perf_counter()
    if show:
        _print(prompt)
    try:
        for start in range(0, len(samples), _ROWS):
            pieces = write(
                trained.model,
                trained.tokenizer,
                samples[start : start + _ROWS],
                settings.max_tokens,
                choose,
                trained.config.max_len,
                stops=settings.stop,
                repetition_penalty=settings.repetition_penalty,
                first_row=first_row + start,
                read=read,
                note=notes.setdefault,
            )
            for row, piece in pieces:
                if show and start + row == 0:
                    _print(piece)
        if show:
            _print("\n")
            for sample in samples[1:]:
                _print(f"{_SEPARATOR}\n{sample.prompt}{sample.text}\n")
    except BaseException:
        if show:
            _print("\n")
        raise
    finally:
        seconds = time.perf_counter() - begin
        num_tokens = sum(len(sample.tokens) for sample in samples)
        for text in [*notes, *(read.news if read else ())]:
            note(text)
        if read:
            read.news.clear()
        note(f"{num_tokens:,} tokens in {seconds:.1f} s ({num_tokens / seconds:,.0f} tokens/s)")
    return samples


def _talk(trained: "Trained", settings: Settings, choose, read) -> None:
    """Ask for prompts until Ctrl-D; each has rows of its own, so that asking again answers anew."""
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() its line editing
    note(_HELP)
    num_rows = 0
    while True:
        try:
            prompt = _as_trained(input("> "))
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            note(_HELP)
            continue
        if prompt.strip() == "/help":
            note(_HELP)
            continue
        with contextlib.suppress(KeyboardInterrupt):
            _write(trained, settings, choose, read, prompt, num_rows)
        num_rows += settings.num_samples


def _print(text: str) -> None:
    sys.stdout.write(harmless(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def run() -> None:
    """The console script."""
    run_app(app)
