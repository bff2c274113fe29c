"""Whatever happened to a run's files: nothing damaged is used, nothing of theirs is executed."""

import errno
import json
import os
import random
import shutil
from pathlib import Path

import pytest

from lmplay.run.checkpoint import newest_checkpoint

FILES = ["model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"]
EVERY_FILE = [*FILES, "manifest.json"]
CUT = "term@step.part:26"  # in step 9; checkpoints of steps 6 and 8 are there


@pytest.fixture
def cut_run(bench):
    bench.plan()
    bench.train("whole")
    bench.train("cut", fault=CUT, code=143)
    return bench


def copied(bench, out: str):
    """A copy of the run that was cut; its checkpoints' folder."""
    shutil.copytree(bench.path / "cut", bench.path / out)
    shutil.copy(bench.path / "cut.rows", bench.path / f"{out}.rows")
    return bench.folder(out)


def test_a_flipped_bit_anywhere_in_a_checkpoint_is_found(cut_run, trials, figure):
    draw, found = random.Random(0), 0
    num = trials(40, 200)
    folder = copied(cut_run, "flipped")
    for _ in range(num):
        shutil.rmtree(folder.checkpoints)
        shutil.copytree(cut_run.folder("cut").checkpoints, folder.checkpoints)
        path = folder.checkpoints / "step-8" / draw.choice(EVERY_FILE)
        content = bytearray(path.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        notes = []

        checkpoint = newest_checkpoint(folder, notes.append)
        found += checkpoint.step == 6 and len(notes) == 1 and path.name in notes[0]

    assert found == num
    figure("bit_flip", f"{found} of {num} flips detected (100 %)", trials=num, found=found)


def test_a_file_that_was_cut_short_is_named_and_the_run_goes_on(cut_run, trials, figure):
    bench = cut_run
    lengths = {"0": lambda n: 0, "half": lambda n: n // 2, "minus one": lambda n: n - 1}
    cases = [(name, length) for name in EVERY_FILE for length in lengths]
    cases = trials(cases[1::8], cases)
    for name, length in cases:
        out = f"cut-{name}-{length}"
        path = copied(bench, out).checkpoints / "step-8" / name
        os.truncate(path, lengths[length](path.stat().st_size))

        said = bench.train(out).said()
        assert "step-8" in said and name in said and "going on at step 6" in said
        shutil.rmtree(next(bench.folder(out).checkpoints.glob(".corrupt-*")))
        bench.assert_same(out)

    figure("truncate_any_file", f"{len(cases)} of {len(cases)} recovered")


PLACES = ["save.folder:2", "save.open:8", "save.write:8", "save.fsync:9", "save.rename:2"]


def test_a_disk_that_is_full_or_fails_costs_no_checkpoint(bench, trials, figure):
    bench.plan()
    bench.train("whole")
    everywhere = [f"save.write:{n}" for n in range(1, 40, 3)]
    everywhere += [*PLACES, "save.whole:1", "save.published:2", "save.verify:2"]
    places = trials(PLACES[2:3], everywhere)
    cases = [(error, place) for place in places for error in trials(["enospc"], ["enospc", "eio"])]
    for error, place in cases:
        out = f"{error}-{place}"
        trial = bench.train(out, fault=f"{error}@{place}", code=5)
        number = getattr(errno, error.upper())
        assert os.strerror(number) in trial.said() and "bytes are needed" in trial.said()
        assert "Traceback" not in trial.said()
        assert bench.folder(out).read().status == "failed"
        bench.train(out)
        bench.assert_same(out)

    figure("disk_full", f"{len(cases)} cases, 0 checkpoints lost, exit code 5 each time")


def test_rows_that_cannot_be_written_end_the_run_in_words(bench, figure):
    bench.plan()
    bench.train("whole")
    trial = bench.train("cut", fault="enospc@row.write:6", code=1)
    assert "Traceback" not in trial.said() and "make room" in trial.said()
    assert "train.csv: No space left on device" in trial.said()
    bench.train("cut")
    bench.assert_same("cut")


FULL = """
from lmplay import disk

def taken():
    raise OSError(28, "No space left on device")

real_save = loop.save
def save(run, *more):
    if run.step:
        disk.reach = lambda place: taken()
        sys.modules["lmplay.run.checkpoint"].reach = lambda place: taken()
    return real_save(run, *more)
loop.save = save
"""


def test_a_disk_that_another_process_fills_leaves_no_run_that_is_called_running(bench):
    bench.plan()
    trial = bench.train("cut", setup=FULL, code=5)  # from then on nothing new can be written

    assert "No space left" in trial.said() and "Traceback" not in trial.said()
    facts = bench.folder("cut").read()
    assert facts.status == "failed" and "cannot save step 3" in facts.exit_reason


VALUES = [
    *(None, True, -1, 0, 1e308, 2**70, "", "../../../etc/passwd", "$(touch canary)", [], {}),
    *("__import__('os').system('touch canary')", "\x00\x1b[2J", {"$tensor": "x"}, [[[]]], "nan"),
]


def mutated(value, draw):
    """The same JSON with one place in it changed."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice([*value])
        if draw.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: mutated(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.8:
        at = draw.randrange(len(value))
        return [*value[:at], mutated(value[at], draw), *value[at + 1 :]]
    return draw.choice(VALUES)


def damage(path, draw) -> str:
    """Do to one file of a run what disks, editors and strangers do; says what."""
    files = [p for p in sorted(path.rglob("*")) if p.is_file() and p.suffix != ".py"]
    victim = draw.choice([*files, *[p for p in files if p.name == "run.json"] * 4])
    content = victim.read_bytes()
    kinds = ["cut", "flip", "zeros", "gone", "folder", "pickle", "link"]
    kind = draw.choice(["json"] * 6 + kinds if victim.suffix == ".json" else kinds)
    if kind == "json":
        victim.write_text(json.dumps(mutated(json.loads(content), draw)))
    elif kind == "cut":
        victim.write_bytes(content[: draw.randrange(len(content) + 1)])
    elif kind == "flip":
        at = draw.randrange(max(1, len(content)))
        victim.write_bytes(content[:at] + bytes([draw.randrange(256)]) + content[at + 1 :])
    elif kind == "zeros":
        victim.write_bytes(bytes(len(content)))
    else:
        victim.unlink()
        if kind == "folder":
            victim.mkdir()
        elif kind == "pickle":
            victim.write_bytes(b"cposix\nsystem\n(S'touch canary'\ntR.")
        elif kind == "link":
            victim.symlink_to("/dev/zero")
    return f"{kind} {victim.name}"


SAFE = "import resource\nresource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))"


def test_a_damaged_run_is_refused_or_used_but_never_ends_in_a_traceback(cut_run, trials, figure):
    bench, draw, codes, wrong = cut_run, random.Random(1), {}, []
    num = trials(8, 500)
    for number in range(num):
        out = f"damaged-{number}"
        folder = copied(bench, out)
        what = damage(folder.path, draw)
        name = draw.choice(["train", "train", "generate", "stats", "export"])
        if name == "train":
            trial = bench.start(out, setup=SAFE)
        else:
            more = {"generate": ["hello", "--max-tokens", 3], "export": [f"to-{out}"]}
            trial = bench.command(name, folder.path, *more.get(name, []), out=out, setup=SAFE)
        code = trial.wait()
        codes[code] = codes.get(code, 0) + 1
        if code not in (0, 1, 2, 3, 4, 5, 6) or "Traceback" in trial.said():
            wrong.append(f"{what}, {name}: {code}\n{trial.said()[-1500:]}")
        shutil.rmtree(bench.path / out)

    assert not wrong, f"{len(wrong)} of {num}\n" + "\n".join(wrong[:8])
    assert not list(bench.path.rglob("canary")) and Path("/dev/zero").is_char_device()
    text = f"{num} damaged runs: 0 tracebacks, 0 payloads executed"
    figure("damaged_run_folders", text, trials=num, codes=codes)
