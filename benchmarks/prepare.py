"""How fast text becomes tokens, and tokens batches.

    python benchmarks/prepare.py

prepares one JSONL file of text as GPT-2's tokens, each side from the raw file, with no cache left
by an earlier turn. Sides are processes of their own that prepare in turn.

* lmplay: what lmp-trainer does before it trains: held-out text set apart, shards with checksums.
* recipe: `datasets`' map with tiktoken in a process for each core, then one numpy memmap, as
  nanoGPT prepares OpenWebText.

The lmplay side prepares the text four times over and twelve times over too: once a shard is full,
more text must need no more memory. At last the loader gives batches to no model.
"""

import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from measure import Side, Turns, chosen, interleave, median_ratio, report, row, serve
from sizes import SIZES
from train import write_data
from typer import Option

from lmplay.console import note, print_json, run_app, show, table
from lmplay.data.batches import Data
from lmplay.data.preparation import prepare
from lmplay.data.shard_format import token_dtype
from lmplay.data.sources import documents
from lmplay.data.tokenizers import Tokenizer, open_tokenizer
from lmplay.errors import UserError
from lmplay.machine import num_cores
from lmplay.memory import peak_memory
from lmplay.plan import Dataset, Plan, Validation

SIDES = ("lmplay", "recipe")
TIMES = (4, 12)  # the text, for the memory
MODEL_SPEED = 2600  # tokens/s of the small model in training on two CPU cores
WANTED = {"speed": 5, "memory": 0.1, "loader": 0.01}
VALIDATION = Validation(tokens=64_000, every_tokens=1_000_000)
NEVER = {"every_tokens": 2**52}

app = typer.Typer(pretty_exceptions_enable=False)


def lmplay(turns: Turns, settings: dict) -> None:
    """Both splits, as a plan on this file has them prepared."""
    tokenizer = open_tokenizer(settings["tokenizer"])
    dataset = Dataset(files=[settings["text"]])
    while True:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["LMP_DATASETS"] = folder
            turns.wait()
            splits = prepare(dataset, "bench", tokenizer, VALIDATION, lambda *_: None)
            turns.done(
                tokens=sum(shards.num_tokens for shards in splits),
                memory=peak_memory(torch.device("cpu")),
            )


def recipe(turns: Turns, settings: dict) -> None:
    """A map in processes, then the ids of each part into a memmap."""
    import datasets

    datasets.disable_progress_bars()
    encode, end, vocab_size = _plain(open_tokenizer(settings["tokenizer"]))

    def tokenized(record):
        ids = encode(record["text"])
        ids.append(end)
        return {"ids": ids, "length": len(ids)}

    while True:
        with tempfile.TemporaryDirectory() as folder:
            turns.wait()
            raw = datasets.load_dataset(
                "json", data_files=settings["text"], split="train", cache_dir=folder
            )
            made = raw.map(tokenized, remove_columns=raw.column_names, num_proc=settings["threads"])
            total, at = int(np.sum(made["length"], dtype=np.int64)), 0
            file = np.memmap(
                Path(folder, "train.bin"), token_dtype(vocab_size), mode="w+", shape=(total,)
            )
            num_parts = min(1024, len(made))
            for index in range(num_parts):
                part = made.shard(num_parts, index, contiguous=True).with_format("numpy")
                ids = np.concatenate(part["ids"])
                file[at : at + len(ids)] = ids
                at += len(ids)
            file.flush()
            turns.done(tokens=total)
            del raw, made, file


def _plain(tokenizer: Tokenizer):
    """Its library's own function from a text to a list of ids, the end marker and the size."""
    if tokenizer.name == "gpt2":
        import tiktoken

        encoding = tiktoken.get_encoding("gpt2")
        return encoding.encode_ordinary, encoding.eot_token, encoding.n_vocab
    return tokenizer.encode, tokenizer.end, tokenizer.vocab_size


def write_text(path: Path, data: Path | None, limit: int) -> int:
    """The records of `data`, else of Python's standard library, as JSONL; gives back the bytes."""
    dataset = Dataset(builtin="python-stdlib") if data is None else Dataset(files=[str(data)])
    num_bytes = 0
    with path.open("w", encoding="utf-8") as file:
        for document in documents(dataset, "train", 0.0):
            file.write(json.dumps({"text": document.text}) + "\n")
            num_bytes += document.num_bytes
            if num_bytes >= limit:
                break
    return num_bytes


def choose_tokenizer(folder: Path, text: Path) -> str:
    """gpt2, or a small one trained on the text where GPT-2's vocabulary cannot be had."""
    try:
        open_tokenizer("gpt2")
    except UserError as error:
        note(f"{error.problem}: both sides take a BPE of 4,096 tokens trained on the text")
        dataset = Dataset(files=[str(text)])
        texts = (document.text for document in documents(dataset, "train", 0.0))
        open_tokenizer("bpe:4096", texts=lambda: texts).save(folder / "tokenizer.json")
        return str(folder / "tokenizer.json")
    return "gpt2"


def measure(data: Path | None, limit: int, sides: list[str], seconds: float, common: dict) -> dict:
    """All sides on the text in turn, then the memory of ours on it and on more of it."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.jsonl")
        num_bytes = write_text(text, data, limit)
        common = common | {"text": str(text), "tokenizer": choose_tokenizer(Path(folder), text)}
        running: list[Side] = []
        try:
            for side in sides:
                running.append(Side(__file__, side, common, side))
            measured = interleave(running, seconds)
        finally:
            for side in running:
                side.close()
        memory = [_memory(common, text, times) for times in TIMES]
    found = [
        {
            "side": side,
            "bytes_per_second": num_bytes
            / statistics.median(turn["seconds"] for turn in turns[1:]),
            "tokens": turns[-1]["tokens"],
            "rounds": len(turns) - 1,
        }
        for side, turns in measured.items()
    ]
    made = {
        "bytes": num_bytes,
        "tokenizer": Path(common["tokenizer"]).name,
        "sides": found,
        "memory": memory,
    }
    if set(SIDES) <= set(sides):
        times = [[turn["seconds"] for turn in measured[side][1:]] for side in SIDES]
        middle, least, most = median_ratio(*times)
        made |= {"ratio": middle, "ratio_range": [least, most]}
    return made


def _memory(common: dict, text: Path, times: int) -> int:
    """The peak of a process that prepares the text so many times over."""
    more = text.with_name("more.jsonl")
    with more.open("wb") as file:
        for _ in range(times):
            with text.open("rb") as once:
                shutil.copyfileobj(once, file)
    side = Side(__file__, "lmplay", common | {"text": str(more)}, "lmplay")
    try:
        return side.turn()["memory"]
    finally:
        side.close()


def measure_loader(num_batches: int) -> dict:
    """Batches of the small model, one after another."""
    size = SIZES["small"]
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder), size)
        plan = Plan.model_validate(
            {
                "name": "bench",
                "tokenizer": str(Path(folder, "tokenizer.json")),
                "sequence_length": size.max_len,
                "batch_size": size.rows,
                "datasets": {"tokens": {"shards": [str(Path(folder, "*.bin"))]}},
                "stages": [{"datasets": ["tokens"]}],
                "tokens": 2**40,
                "optimizer": {"name": "AdamW", "lr": 1e-3},
                "validation": {"tokens": size.max_len, **NEVER},
                "checkpoints": NEVER,
            }
        )
        os.environ["LMP_DATASETS"] = folder
        data = Data(plan, open_tokenizer(plan.tokenizer), seed=0)
        times = []
        for step in range(num_batches + 1):
            began = time.perf_counter()
            data.rows(step * size.rows, size.rows)
            times.append(time.perf_counter() - began)
        data.close()
    seconds = statistics.median(times[1:])
    return {
        "tokens": size.tokens,
        "batch_seconds": seconds,
        "tokens_per_second": size.tokens / seconds,
    }


def rows_of(case: dict, loader: dict) -> list[dict]:
    """The lines of the common table."""
    speeds = {side["side"]: side["bytes_per_second"] / 1e6 for side in case["sides"]}
    what = f"prepare {case['bytes'] / 1e6:.0f} MB with {case['tokenizer']}"
    first, second = case["memory"]
    more = (TIMES[1] - TIMES[0]) * case["bytes"]
    rows = [
        row(
            f"{what}: lmplay / recipe",
            "MB/s",
            speeds["lmplay"],
            speeds.get("recipe"),
            case.get("ratio"),
            WANTED["speed"],
            case.get("ratio_range"),
        ),
        row(f"{what}, {TIMES[0]} times: peak memory", "bytes", first),
        row(
            f"prepare {TIMES[0]} and {TIMES[1]} times as much: more memory / more text",
            "bytes",
            second - first,
            more,
            (second - first) / more,
            WANTED["memory"],
        ),
    ]
    step = loader["tokens"] / MODEL_SPEED
    share = loader["batch_seconds"] / step
    rows += [
        row("loader without a model, small", "tokens/s", loader["tokens_per_second"]),
        row(
            f"loader, small: a batch / a step at {MODEL_SPEED:,} tokens/s",
            "s",
            loader["batch_seconds"],
            step,
            share,
            WANTED["loader"],
        ),
    ]
    return rows


@app.command()
def main(
    data: Annotated[
        Path | None,
        Option(help="Text, JSONL, Parquet; without it, Python's standard library.", metavar="PATH"),
    ] = None,
    megabytes: Annotated[float, Option(help="Of text, at most.")] = 40,
    sides: Annotated[str, Option(help=f"Of {', '.join(SIDES)}.", metavar="NAMES")] = ",".join(
        SIDES
    ),
    seconds: Annotated[float, Option(help="Of timed work; two rounds at least.")] = 20,
    batches: Annotated[int, Option(help="That the loader gives.", min=1)] = 500,
    threads: Annotated[int | None, Option(help="Of every side; without it, one a core.")] = None,
    as_json: Annotated[bool, Option("--json", metavar="", help="Print one JSON document.")] = False,
) -> None:
    """Measure preparing text against datasets' map and a memmap.

    Example: python benchmarks/prepare.py --data novels.jsonl
    """
    wanted = chosen("--sides", sides, SIDES)
    if "lmplay" not in wanted:
        raise UserError(f"--sides {sides}: lmplay is measured in any case", "add it")
    common = {"threads": threads or num_cores()}
    note(f"measuring {', '.join(wanted)}")
    case = measure(data, int(megabytes * 1e6), wanted, seconds, common)
    loader = measure_loader(batches)
    rows = rows_of(case, loader)
    if as_json:
        cases = [case, {"loader": loader}]
        print_json(report("prepare", torch.device("cpu"), common["threads"], cases, rows))
    else:
        print_case(case, loader)


def print_case(case: dict, loader: dict) -> None:
    """One row for each side, the fastest first; then what else was measured."""
    rows = [
        [side["side"], f"{side['bytes_per_second'] / 1e6:,.1f}", f"{side['tokens']:,}"]
        for side in sorted(case["sides"], key=lambda side: -side["bytes_per_second"])
    ]
    title = f"{case['bytes'] / 1e6:.1f} MB with {case['tokenizer']}"
    show(table(title, ["side", "MB/s", "tokens"], rows, right=["MB/s", "tokens"]))
    if "ratio" in case:
        least, most = case["ratio_range"]
        note(f"lmplay is {case['ratio']:.2f}x the recipe ({least:.2f} to {most:.2f})")
    first, second = (peak / 2**20 for peak in case["memory"])
    note(
        f"peak of memory: with {TIMES[0]} times the text {first:.0f} MiB, "
        f"with {TIMES[1]} times {second:.0f} MiB"
    )
    note(
        f"loader: {loader['batch_seconds'] * 1e3:.2f} ms a batch of {loader['tokens']:,}, "
        f"{loader['tokens_per_second'] / 1e6:.1f} M tokens/s"
    )


if __name__ == "__main__" and not serve({"lmplay": lmplay, "recipe": recipe}):
    run_app(app)
