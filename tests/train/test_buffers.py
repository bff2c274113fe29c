"""A buffer that a forward pass changes is what the whole batch made of it, once for each step."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lmplay.catalog.entries import resolve
from lmplay.plan_file import read_plan
from lmplay.run.checkpoint import newest_checkpoint
from lmplay.run.folder import RunFolder
from lmplay.run.request import Request
from lmplay.train import loop, prepared
from lmplay.train.buffers import Buffers
from lmplay.train.display import Display
from lmplay.train.session import run_experiment
from lmplay.train.signals import Stopped


class Counting(nn.Module):
    """Counts the tokens that it reads, each by itself and all of them."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("counts", torch.zeros(4, dtype=torch.int64))
        self.register_buffer("total", torch.zeros(()))
        self.register_buffer("met", torch.zeros(4, dtype=torch.bool))

    def forward(self, tokens_N):
        self.counts += tokens_N.bincount(minlength=4)
        self.total = self.total + len(tokens_N)  # in another tensor, as is allowed
        self.met |= tokens_N.bincount(minlength=4) > 0
        return self.linear(nn.functional.one_hot(tokens_N, 4).float()).sum()


def buffers_of(model, world_size=1):
    return Buffers(SimpleNamespace(model=model, world_size=world_size))


def test_a_step_that_was_not_taken_leaves_them_as_they_were():
    model = Counting()
    model(torch.tensor([0, 1]))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for undo in (Buffers.restore, lambda kept: kept.keep_where(torch.tensor(False))):
        kept = buffers_of(model)
        model(torch.tensor([1, 3]))
        assert not torch.equal(model.counts, before["counts"])
        undo(kept)

        assert_close(dict(model.named_buffers()), before, rtol=0, atol=0)


def test_a_step_that_was_taken_changes_them():
    model = Counting()
    kept = buffers_of(model)
    model(torch.tensor([1, 3]))
    kept.add_up()
    kept.keep_where(torch.tensor(True))

    assert model.counts.tolist() == [0, 1, 0, 1] and model.total == 2


PROCESS = """
import pathlib, sys, torch
from torch import distributed as dist
sys.path.insert(0, {here!r})
from test_buffers import Counting, buffers_of

rank, folder = int(sys.argv[1]), pathlib.Path({folder!r})
store = dist.FileStore(str(folder / "store"), 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
model = Counting()
wrapped = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
for step in range(2):
    kept = buffers_of(model, world_size=2)
    tokens_N = torch.arange(6) % 4
    with wrapped.no_sync():
        wrapped(tokens_N[rank:4:2]).backward()
    wrapped(tokens_N[4 + rank:]).backward()
    kept.add_up()
torch.save(dict(model.named_buffers()), folder / f"{{rank}}.pt")
dist.destroy_process_group()
"""


def test_two_processes_have_what_one_would_have(tmp_path):
    code = PROCESS.format(here=str(Path(__file__).parent), folder=str(tmp_path))
    processes = [subprocess.Popen([sys.executable, "-c", code, str(rank)]) for rank in range(2)]
    codes = [process.wait() for process in processes]
    alone = Counting()
    for _ in range(2):
        for tokens_N in (torch.arange(4), torch.arange(4, 6) % 4, torch.tensor([1])):
            alone(tokens_N)

    assert codes == [0, 0]
    for rank in range(2):
        assert_close(torch.load(tmp_path / f"{rank}.pt"), dict(alone.named_buffers()))


@pytest.fixture
def counter(place, monkeypatch):
    """An experiment that counts the tokens it was trained on, and the steps that were taken."""
    (place / "experiments").mkdir()
    source = resolve("gpt2ish").source.replace("VARIANTS = {", "UNUSED = {")
    head, body = source.split("\n    def hidden(")
    made = '        self.register_buffer("seen", torch.zeros(2, dtype=torch.int64))\n'
    after = "\n    def after_step(self):\n        self.seen[1] += 1\n"
    first, rest = body.split("\n", 1)
    counted = "        if self.training:\n            self.seen[0] += tokens_BT.numel()\n"
    source = f"{head.rstrip()}\n{made}{after}\n    def hidden({first}\n{counted}{rest}"
    (place / "experiments" / "mine.py").write_text(source)
    monkeypatch.setattr(prepared, "refuse_unproven", lambda *_: None)


def train(out_dir):
    request = Request(resolve("mine"), read_plan("words", {}), {}, {}, device="cpu",
                      mini_batch_size=2, out_dir=Path(out_dir))  # fmt: skip
    with Display("") as display:
        return RunFolder(Path(run_experiment(request, display)["run"]))


def test_a_dropped_step_leaves_no_trace_in_a_run(counter, monkeypatch):
    real = loop.score

    def score(run, part):
        scored = real(run, part)
        if run.step == 5 and not stopped:
            stopped.append(True)
            sessions[-1].signals.code = 130  # between two parts
        return scored

    def take_step(session, *rest):
        sessions.append(session)
        return real_step(session, *rest)

    sessions, stopped, real_step = [], [], loop.take_step
    monkeypatch.setattr(loop, "score", score)
    monkeypatch.setattr(loop, "take_step", take_step)
    with pytest.raises(Stopped):
        train("runs")
    kept = newest_checkpoint(RunFolder(Path("runs/words/mine/seed-0")), print)
    done = newest_checkpoint(train("runs"), print)

    assert kept.step == 5 and kept.model["seen"].tolist() == [5 * 160, 5]
    assert done.step == 9 and done.model["seen"].tolist() == [9 * 160, 9]


@pytest.mark.slow
def test_two_processes_count_as_one_in_a_run(counter):
    args = ["-m", "lmplay.train", "--exp", "mine", "--plan", "words", "--set", "batch_size=4"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for out, start in (("one", []), ("two", launch)):
        command = [sys.executable, *start, *args, "--device", "cpu", "--out-dir", out]
        subprocess.run(command, check=True, timeout=400)
    made = [
        newest_checkpoint(RunFolder(next(Path(out).rglob("run.json")).parent), print)
        for out in ("one", "two")
    ]

    assert [checkpoint.step for checkpoint in made] == [12, 12]
    assert [checkpoint.model["seen"].tolist() for checkpoint in made] == [[12 * 128, 12]] * 2
