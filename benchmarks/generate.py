"""How fast text is generated, against transformers' `generate` with its static cache.

    python benchmarks/generate.py

writes 200 new tokens behind prompts of 32, always the likeliest token, with one GPT-2 (the
experiment gpt2, which is transformers' GPT2LMHeadModel weight for weight). Sides are processes of
their own that write in turn, so a machine that slows down slows all of them.

* lmplay: what lmp-generator does: on a CPU from packed weights, else in bf16 under autocast.
* lmplay+compile: what it does with --compile, which a CPU has in bf16 alone.
* static, dynamic: transformers' `generate` with that cache; in bf16 its weights are bf16.

At batch 1 a step reads every weight once and computes little, so its limit is the memory. The bytes
of the weights times the steps per second are printed: the bandwidth that was reached.
"""

import statistics
from collections.abc import Callable
from contextlib import nullcontext
from typing import Annotated

import torch
import typer
from measure import (
    PRECISIONS,
    Side,
    Turns,
    chosen,
    has_peer,
    interleave,
    median_ratio,
    report,
    row,
    serve,
    synchronize,
    without_peer,
)
from sizes import SIZES, Size, transformers_gpt2
from typer import Option

from lmplay.catalog.entries import resolve
from lmplay.console import Device, note, print_json, run_app, show, table
from lmplay.errors import UserError
from lmplay.generate.compiled_steps import CompiledSteps, can_compile
from lmplay.machine import dtype_of, num_cores, resolve_device
from lmplay.memory import keep_memory
from lmplay.model.experiment import load_experiment

# B rows, T positions

OURS = ("lmplay", "lmplay+compile")
SIDES = (*OURS, "static", "dynamic")
PROMPT = 32
WAKING = 8  # tokens that each turn begins with, not timed
WANTED = {
    ("base", 8, "fp32", "lmplay"): 1.25,
    ("base", 8, "bf16", "lmplay+compile"): 3.0,
    ("base", 1, "bf16", "lmplay"): 1.8,
}

app = typer.Typer(pretty_exceptions_enable=False)


def lmplay(turns: Turns, settings: dict) -> None:
    """The harness's own loop, on weights that lmp-generator has made ready."""
    from lmplay.generate.packing import pack
    from lmplay.model.decoding import generate
    from lmplay.model.sampler import GREEDY

    keep_memory()
    size, device = Size(**settings["size"]), torch.device(settings["device"])
    experiment = load_experiment(resolve(settings["exp"]))
    model = experiment.model(size.config(experiment), seed=0, device=device).eval()
    prompts = _prompts(settings).tolist()
    read = CompiledSteps() if settings["compile"] else None
    is_packed = not read and pack(model, settings["precision"], settings["batch"])
    is_low = settings["precision"] != "fp32" and not is_packed

    def write(num_tokens: int) -> None:
        steps = generate(model, prompts, num_tokens, GREEDY, size.max_len, read=read)
        assert sum(1 for _ in steps) == num_tokens
        synchronize(device)
        while read and read.news:
            note(read.news.pop(0))

    with torch.autocast(device.type, torch.bfloat16) if is_low else nullcontext():
        _turns(turns, settings, write)


def transformers(turns: Turns, settings: dict) -> None:
    """transformers' own loop."""
    size, device = Size(**settings["size"]), torch.device(settings["device"])
    model = transformers_gpt2(size).eval().to(device, dtype_of(settings["precision"]))
    prompt_BT = _prompts(settings).to(device)

    def write(num_tokens: int) -> None:
        made_BT = model.generate(
            prompt_BT,
            attention_mask=torch.ones_like(prompt_BT),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
            cache_implementation=settings["cache"],
        )
        assert made_BT.shape[1] == PROMPT + num_tokens
        synchronize(device)

    _turns(turns, settings, write)


def _turns(turns: Turns, settings: dict, write: Callable[[int], None]) -> None:
    while True:
        turns.wait()
        write(WAKING)
        turns.restart()
        write(settings["num_tokens"])
        turns.done()


def _prompts(settings: dict) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    shape = settings["batch"], PROMPT
    return torch.randint(settings["size"]["vocab_size"], shape, generator=draw)


def measure(
    name: str, batch: int, precision: str, sides: list[str], seconds: float, common: dict
) -> dict:
    """One batch size in one precision: all sides, in turn."""
    size = SIZES[name]
    common = common | {"size": vars(size), "batch": batch, "precision": precision}
    running: list[Side] = []
    try:
        for side in sides:
            kind = "lmplay" if side.startswith("lmplay") else "transformers"
            own = {"cache": None if side == "dynamic" else side, "compile": "+" in side}
            running.append(Side(__file__, kind, common | own, side))
        measured = interleave(running, seconds)
    finally:
        for side in running:
            side.close()
    experiment = load_experiment(resolve(common["exp"]))
    model = experiment.model(size.config(experiment), device="meta")
    tables = [p for name, p in model.named_parameters() if name == "position_table.weight"]
    numbers = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in tables)
    weights = numbers * dtype_of(precision).itemsize
    found = []
    for side, turns in measured.items():
        seconds = statistics.median(turn["seconds"] for turn in turns[1:])
        steps = common["num_tokens"] / seconds
        found.append(
            {
                "side": side,
                "tokens_per_second": batch * steps,
                "bandwidth": weights * steps,
                "rounds": len(turns) - 1,
            }
        )
    ratios = {
        side: median_ratio(
            *([turn["seconds"] for turn in measured[s][1:]] for s in (side, "static"))
        )
        for side in OURS
        if {side, "static"} <= set(sides)
    }
    return {"size": name, "batch": batch, "precision": precision, "sides": found, "ratios": ratios}


@app.command()
def main(
    size: Annotated[str, Option(help=f"Of {', '.join(SIZES)}.", metavar="NAME")] = "base",
    cases: Annotated[
        str, Option(help="Batch and precision, several with commas.", metavar="CASES")
    ] = "8:fp32,8:bf16,1:fp32,1:bf16",
    sides: Annotated[str, Option(help=f"Of {', '.join(SIDES)}.", metavar="NAMES")] = ",".join(
        SIDES
    ),
    num_tokens: Annotated[int, Option(help="New tokens of each row.", min=1)] = 200,
    seconds: Annotated[float, Option(help="Of timed work in each case; two rounds at least.")] = 20,
    exp: Annotated[str, Option(help="Another experiment in the place of gpt2.")] = "gpt2",
    device: Device = "auto",
    threads: Annotated[int | None, Option(help="Of every side; without it, one a core.")] = None,
    as_json: Annotated[bool, Option("--json", metavar="", help="Print one JSON document.")] = False,
) -> None:
    """Measure generating against transformers.

    Example: python benchmarks/generate.py --cases 1:bf16
    """
    wanted = chosen("--sides", sides, SIDES)
    chosen("--size", size, SIZES)
    if not has_peer():
        without_peer(note)
        wanted = ["lmplay"]
    where = resolve_device(device)
    common = {
        "device": str(where),
        "threads": threads or num_cores(),
        "exp": exp,
        "num_tokens": num_tokens,
    }
    made = []
    for case in cases.split(","):
        batch, _, precision = case.partition(":")
        if not batch.isdecimal() or precision not in PRECISIONS:
            raise UserError(f"--cases: {case!r} is no batch and precision", hint="such as 8:bf16")
        here = [side for side in wanted if "+" not in side or can_compile(where, precision)]
        if not here:
            raise UserError(f"--cases {case}: a CPU compiles bf16 alone", hint="such as 8:bf16")
        note(f"measuring batch {batch} in {precision}: {', '.join(here)}")
        made.append(measure(size, int(batch), precision, here, seconds, common))
        if not as_json:
            print_case(made[-1])
    if as_json:
        rows = [row for case in made for row in rows_of(case)]
        print_json(report("generate", where, common["threads"], made, rows))


def rows_of(case: dict) -> list[dict]:
    """A case for the common table."""
    speeds = {side["side"]: side["tokens_per_second"] for side in case["sides"]}
    what = f"generate {case['size']}, batch {case['batch']} {case['precision']}"
    if not case["ratios"]:
        return [row(f"{what}: {side}", "tokens/s", speed) for side, speed in speeds.items()]
    case_of = case["size"], case["batch"], case["precision"]
    rows = []
    for side, (middle, *spread) in case["ratios"].items():
        wanted = WANTED.get((*case_of, side))
        given = speeds[side], speeds["static"], middle, wanted, spread
        rows.append(row(f"{what}: {side} / static", "tokens/s", *given))
    return rows


def print_case(case: dict) -> None:
    """One row for each side, the fastest first."""
    columns = ["side", "tokens/s", "weights read (GB/s)"]
    rows = [
        [side["side"], f"{side['tokens_per_second']:,.0f}", f"{side['bandwidth'] / 1e9:.1f}"]
        for side in sorted(case["sides"], key=lambda side: -side["tokens_per_second"])
    ]
    title = f"{case['size']}, batch {case['batch']} in {case['precision']}"
    show(table(title, columns, rows, right=columns[1:]))
    for side, (middle, least, most) in case["ratios"].items():
        note(f"{side} is {middle:.2f}x static ({least:.2f} to {most:.2f})")


if __name__ == "__main__" and not serve({"lmplay": lmplay, "transformers": transformers}):
    run_app(app)
