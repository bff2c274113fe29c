"""How fast training is, against the trainers that people would otherwise use, at equal work.

    python benchmarks/train.py

trains GPT-2 (the experiment gpt2, which is transformers' GPT2LMHeadModel weight for weight) on the
same tokens with every side: the same shapes, no dropout, AdamW in torch's fused kernel, gradients
clipped, one micro-batch a step. Sides are processes of their own that take steps in turn, so a
machine that slows down slows all of them, and each one's peak of memory is its own. On a CPU the
first step of each turn is not timed.

* lmplay: the trainer as `lmp-trainer` runs it, data, curves and display included.
* loop: transformers' model in a plain loop under autocast.
* trainer: transformers' model in its own Trainer.
* nanogpt: the model of a checkout of nanoGPT in a loop like its train.py's, given --nanogpt.

A name with +compile is the same side compiled by torch.
"""

import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
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
from rich.console import Console
from sizes import SIZES, Precisions, Size, Sizes, transformers_gpt2
from typer import Option

from lmplay.catalog.entries import resolve
from lmplay.console import Device, note, print_json, run_app, show, table
from lmplay.data.shard_format import map_shard, token_dtype, write_shard
from lmplay.machine import dtype_of, matmul_rate, num_cores, resolve_device
from lmplay.memory import peak_memory, reset_peak_memory
from lmplay.model.counts import count
from lmplay.model.experiment import load_experiment
from lmplay.plan import Plan
from lmplay.train.curves import CADENCE
from lmplay.train.display import Display

# B rows, T positions

SIDES = ("lmplay", "loop", "trainer")
COMPILED = tuple(f"{side}+compile" for side in SIDES)
LR, BETAS, DECAY, CLIP = 3e-4, (0.9, 0.95), 0.1, 1.0
ROWS_OF_DATA = 512
SHARD = "tokens.bin"
WANTED = {"bf16": 1.35, "fp32": 1.1, "memory": 0.6}  # of a peer not compiled, base and small

app = typer.Typer(pretty_exceptions_enable=False)


def lmplay(turns: Turns, settings: dict) -> None:
    """The trainer, whose display waits for its turn after each step."""
    from lmplay.run.request import Request
    from lmplay.train.session import run_experiment

    size, device = Size(**settings["size"]), settings["device"]
    optimizer = {
        "name": "AdamW",
        "lr": LR,
        "weight_decay": DECAY,
        "options": {"betas": list(BETAS)},
    }
    often = {"every_tokens": 2**52}
    plan = Plan.model_validate(
        {
            "name": "bench",
            "tokenizer": str(Path(settings["folder"], "tokenizer.json")),
            "sequence_length": size.max_len,
            "batch_size": size.rows,
            "model": {
                "num_blocks": size.num_blocks,
                "width": size.width,
                "num_heads": size.num_heads,
                "embed_dropout": 0.0,
                "ff_dropout": 0.0,
            },
            "datasets": {"tokens": {"shards": [settings["shard"]]}},
            "stages": [{"datasets": ["tokens"]}],
            "tokens": 2**40,
            "optimizer": optimizer,
            "clip": CLIP,
            "validation": {"tokens": size.max_len, **often},
            "checkpoints": often,
        }
    )

    class TurnByTurn(Display):
        def start(self, *arguments, **named) -> None:
            super().start(*arguments, **named)
            turns.wait()

        def row(self, kind: str, row: dict) -> None:
            super().row(kind, row)
            if kind == "train":
                _after_step(turns, settings, row["step"], memory=row["memory"], loss=row["loss"])

    request = Request(
        resolve(settings["exp"]),
        plan,
        changes={},
        config={},
        device=device,
        precision=settings["precision"],
        mini_batch_size=size.rows,
        compiled=settings["compiled"],
        out_dir=Path(settings["folder"], f"runs-{os.getpid()}"),
    )
    run_experiment(request, TurnByTurn("bench", Console(stderr=True, quiet=True)))


def loop(turns: Turns, settings: dict) -> None:
    """transformers' model in the shortest loop that does the same work."""
    model = _peer(settings).to(settings["device"])
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=BETAS, weight_decay=DECAY, fused=True
    )
    forward = torch.compile(model) if settings["compiled"] else model

    def loss_of(tokens_BT, targets_BT):
        return forward(input_ids=tokens_BT, labels=targets_BT, shift_labels=targets_BT).loss

    _plain_steps(turns, settings, model, optimizer, loss_of)


def nanogpt(turns: Turns, settings: dict) -> None:
    """The model of a checkout of nanoGPT, and its optimizer, in a loop like its train.py's."""
    sys.path.insert(0, settings["nanogpt"])
    from model import GPT, GPTConfig

    size = Size(**settings["size"])
    model = GPT(
        GPTConfig(
            block_size=size.max_len,
            vocab_size=size.vocab_size,
            n_layer=size.num_blocks,
            n_head=size.num_heads,
            n_embd=size.width,
            dropout=0.0,
            bias=True,
        )
    ).to(settings["device"])
    kind = torch.device(settings["device"]).type
    optimizer = model.configure_optimizers(DECAY, LR, BETAS, kind)
    forward = torch.compile(model) if settings["compiled"] else model
    _plain_steps(turns, settings, model, optimizer, lambda x, y: forward(x, y)[1])


def trainer(turns: Turns, settings: dict) -> None:
    """transformers' model in its Trainer."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class TurnByTurn(TrainerCallback):
        def __init__(self):
            self.step = 0

        def on_train_begin(self, *_, **__):
            reset_peak_memory(torch.device(settings["device"]))
            turns.wait()

        def on_step_end(self, *_, **__):
            self.step += 1
            device = torch.device(settings["device"])
            _after_step(turns, settings, self.step, memory=peak_memory(device), loss=None)

    class Dataset(torch.utils.data.Dataset):
        def __init__(self):
            self.rows = list(_rows(settings))

        def __len__(self):
            return 2**40

        def __getitem__(self, index):
            tokens_T, targets_T = self.rows[index % len(self.rows)]
            return {"input_ids": tokens_T, "labels": targets_T, "shift_labels": targets_T}

    arguments = TrainingArguments(
        output_dir=settings["folder"],
        max_steps=2**30,
        per_device_train_batch_size=Size(**settings["size"]).rows,
        train_sampling_strategy="sequential",
        learning_rate=LR,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        weight_decay=DECAY,
        max_grad_norm=CLIP,
        optim="adamw_torch_fused",
        bf16=settings["precision"] == "bf16",
        torch_compile=settings["compiled"],
        use_cpu=settings["device"] == "cpu",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    Trainer(
        _peer(settings),
        arguments,
        train_dataset=Dataset(),
        callbacks=[TurnByTurn()],
    ).train()


def _peer(settings: dict) -> torch.nn.Module:
    model = transformers_gpt2(Size(**settings["size"])).train()
    model.config.use_cache = False
    return model


def _rows(settings: dict):
    """Each row of the shard as tokens_T and targets_T."""
    T = settings["size"]["max_len"]
    tokens = map_shard(Path(settings["shard"]))
    for start in range(0, len(tokens) - T, T):
        window = torch.from_numpy(tokens[start : start + T + 1].astype(np.int64))
        yield window[:-1], window[1:]


def _plain_steps(turns: Turns, settings: dict, model, optimizer, loss_of) -> None:
    device = torch.device(settings["device"])
    rows, B, step = list(_rows(settings)), settings["size"]["rows"], 0
    low = settings["precision"] != "fp32"
    reset_peak_memory(device)  # as the trainer does when training begins
    turns.wait()
    while True:
        part = [rows[(step * B + row) % len(rows)] for row in range(B)]
        tokens_BT, targets_BT = (torch.stack(side).to(device) for side in zip(*part, strict=True))
        with torch.autocast(device.type, dtype_of(settings["precision"]), enabled=low):
            loss = loss_of(tokens_BT, targets_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        _after_step(turns, settings, step, memory=peak_memory(device), loss=loss.detach())


def _after_step(turns: Turns, settings: dict, step: int, memory: int, loss) -> None:
    """A turn is `waking` steps that are not timed and `steps` that are."""
    waking, steps = settings["waking"], settings["steps"]
    number = step % (waking + steps)
    if number == waking % (waking + steps) and waking:
        turns.restart()
    if number == 0:
        synchronize(torch.device(settings["device"]))
        turns.done(memory=memory, loss=loss if loss is None else float(loss))
        turns.wait()


def write_data(folder: Path, size: Size) -> None:
    """A shard of random tokens, and a tokenizer that has as many."""
    draw = np.random.default_rng(0)
    with (folder / SHARD).open("wb") as file:
        ids = draw.integers(0, size.vocab_size, ROWS_OF_DATA * size.max_len + 1)
        write_shard(file, ids.astype(token_dtype(size.vocab_size)))
    import tokenizers

    words = {f"w{i}": i for i in range(size.vocab_size - 1)}
    end = "<|endoftext|>"
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    made.add_special_tokens([end])
    made.save(str(folder / "tokenizer.json"))


def side_settings(size: Size, folder: Path, common: dict, side: str) -> dict:
    """What a side of this benchmark is told; the folder holds what `write_data` wrote."""
    return common | {
        "size": vars(size),
        "compiled": side.endswith("+compile"),
        "folder": str(folder),
        "shard": str(folder / SHARD),
    }


def measure(name: str, precision: str, sides: list[str], seconds: float, common: dict) -> dict:
    """One size in one precision: all sides, in turn."""
    size, device = SIZES[name], torch.device(common["device"])
    experiment = load_experiment(resolve(common["exp"]))
    flops = count(experiment, size.config(experiment)).flops_per_token
    steps = 1 if device.type == "cpu" else CADENCE  # until the trainer looks at the device
    waking = 1 if device.type == "cpu" else 0
    common = common | {"precision": precision, "steps": steps, "waking": waking}
    peak = matmul_rate(device, precision)
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder), size)
        running = []
        try:
            for side in sides:
                kind = side.removesuffix("+compile")
                settings = side_settings(size, Path(folder), common, side)
                running.append(Side(__file__, kind, settings, side))
            is_compiled = any(side.endswith("+compile") for side in sides)
            warm_up = 2 - waking if is_compiled else 1 - waking  # it may compile twice
            measured = interleave(running, seconds, warm_up)
        finally:
            for side in running:
                side.close()
    peak = max(peak, matmul_rate(device, precision))
    return _case(name, precision, measured, warm_up, steps * size.tokens, flops, peak)


def _speed(side: dict) -> float:
    return side["tokens_per_second"]


def _case(name, precision, measured, warm_up, tokens, flops, peak) -> dict:
    found = []
    for side, turns in measured.items():
        first, timed = turns[0], turns[warm_up:]
        speed = tokens / statistics.median(turn["seconds"] for turn in timed)
        found.append(
            {
                "side": side,
                "tokens_per_second": speed,
                "mfu": speed * flops / peak,
                "memory": timed[-1]["memory"],
                "first_seconds": first.get("waking_seconds", first["seconds"]),
                "first_loss": first["loss"],
                "rounds": len(timed),
            }
        )
    made = {
        "size": name,
        "precision": precision,
        "flops_per_token": flops,
        "matmul_flops": peak,
        "sides": found,
    }
    ours = [one for one in found if one["side"].startswith("lmplay")]
    peers = [one for one in found if not one["side"].startswith("lmplay")]
    if not ours:
        return made
    mine = max(ours, key=_speed)
    made |= {"ours": mine["side"], "rivals": []}
    for is_compiled in (False, True):
        group = [one for one in peers if one["side"].endswith("+compile") is is_compiled]
        if not group:
            continue
        best = max(group, key=_speed)
        times = [
            [turn["seconds"] for turn in measured[one["side"]][warm_up:]] for one in (mine, best)
        ]
        middle, least, most = median_ratio(*times)
        rival = {"side": best["side"], "ratio": middle, "ratio_range": [least, most]}
        made["rivals"].append(rival | {"memory_ratio": mine["memory"] / best["memory"]})
    return made


@app.command()
def main(
    sizes: Sizes = "small,base",
    precisions: Precisions = "bf16,fp32",
    sides: Annotated[
        str,
        Option(help=f"Of {', '.join((*SIDES, *COMPILED))}.", metavar="NAMES"),
    ] = ",".join(SIDES),
    nanogpt: Annotated[
        Path | None, Option(help="A checkout of nanoGPT, to run it too.", metavar="PATH")
    ] = None,
    seconds: Annotated[
        float, Option(help="Of timed steps at each size and precision; two rounds at least.")
    ] = 60,
    exp: Annotated[
        str, Option(help="Another experiment in the place of gpt2; peers stay GPT-2.")
    ] = "gpt2",
    device: Device = "auto",
    threads: Annotated[int | None, Option(help="Of every side; without it, one a core.")] = None,
    as_json: Annotated[bool, Option("--json", metavar="", help="Print one JSON document.")] = False,
) -> None:
    """Measure training against transformers' GPT2LMHeadModel.

    Example: python benchmarks/train.py --sizes small --precisions bf16
    """
    wanted = chosen("--sides", sides, [*SIDES, *COMPILED])
    if nanogpt is not None:
        wanted += ["nanogpt", "nanogpt+compile"]
    if not has_peer():
        without_peer(note)
        wanted = [side for side in wanted if not side.startswith(("loop", "trainer"))]
    where = resolve_device(device)
    common = {
        "device": str(where),
        "threads": threads or num_cores(),
        "exp": exp,
        "nanogpt": str(nanogpt),
    }
    torch.set_num_threads(common["threads"])
    cases = []
    for name in chosen("--sizes", sizes, SIZES):
        for precision in chosen("--precisions", precisions, PRECISIONS):
            note(f"measuring {name} in {precision}: {', '.join(wanted)}")
            cases.append(measure(name, precision, wanted, seconds, common))
            if not as_json:
                print_case(cases[-1])
    if as_json:
        rows = [line for case in cases for line in rows_of(case)]
        print_json(report("train", where, common["threads"], cases, rows))


def rows_of(case: dict) -> list[dict]:
    """Speed, peak of memory and use of the machine of one case, for the common table."""
    by_name = {side["side"]: side for side in case["sides"]}
    mine = by_name[case.get("ours", case["sides"][0]["side"])]
    what = f"train {case['size']} {case['precision']}: {mine['side']}"
    rows = [row(f"{what}: share of the matmul peak", "", mine["mfu"])]
    for rival in reversed(case.get("rivals", [])):
        peer = by_name[rival["side"]]
        is_held = case["size"] in ("base", "small") and not peer["side"].endswith("+compile")
        wanted = WANTED if is_held else {}
        speeds = mine["tokens_per_second"], peer["tokens_per_second"]
        memory = mine["memory"], peer["memory"]
        both = f"{what} / {peer['side']}"
        of_speed = wanted.get(case["precision"]), rival["ratio_range"]
        rows = [
            row(both, "tokens/s", *speeds, rival["ratio"], *of_speed),
            row(f"{both}: memory", "bytes", *memory, rival["memory_ratio"], wanted.get("memory")),
            *rows,
        ]
    if len(rows) == 1:
        rows.insert(0, row(what, "tokens/s", mine["tokens_per_second"]))
    return rows


def print_case(case: dict) -> None:
    """One row for each side, the fastest first."""
    columns = ["side", "tokens/s", "of peak", "memory (GiB)", "first step (s)"]
    rows = [
        [
            side["side"],
            f"{side['tokens_per_second']:,.0f}",
            f"{side['mfu']:.0%}",
            f"{side['memory'] / 2**30:.2f}",
            f"{side['first_seconds']:.1f}",
        ]
        for side in sorted(case["sides"], key=lambda side: -side["tokens_per_second"])
    ]
    title = f"{case['size']} in {case['precision']}, peak {case['matmul_flops'] / 1e9:,.0f} GFLOP/s"
    show(table(title, columns, rows, right=columns[1:]))
    for rival in case.get("rivals", []):
        least, most = rival["ratio_range"]
        note(
            f"{case['ours']} is {rival['ratio']:.2f}x {rival['side']} ({least:.2f} to {most:.2f} "
            f"in {case['sides'][0]['rounds']} rounds) in {rival['memory_ratio']:.2f}x its memory"
        )


if __name__ == "__main__" and not serve(
    {"lmplay": lmplay, "loop": loop, "trainer": trainer, "nanogpt": nanogpt}
):
    run_app(app)
