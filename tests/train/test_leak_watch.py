"""A leak that training opens stops the run, whose numbers are then worth nothing."""

from pathlib import Path

import pytest

from lmplay.catalog.entries import resolve
from lmplay.errors import BAD_INPUT, UserError
from lmplay.plan_file import read_plan
from lmplay.run.checkpoint import newest_checkpoint
from lmplay.run.folder import RunFolder
from lmplay.run.request import Request
from lmplay.run.trained import open_trained
from lmplay.stats.compare import read_run
from lmplay.train import leak_watch, prepared
from lmplay.train.leak_watch import Leaked, kept_rows
from lmplay.train.session import run_experiment

GPT2ISH = (Path(__file__).parents[2] / "experiments" / "gpt2ish.py").read_text()
EMBED = "        self.dropout = nn.Dropout(config.embed_dropout)\n"
DROP = "        x_BTC = self.dropout(x_BTC)\n        for"
OPENING = {
    EMBED: f"{EMBED}        self.log_gate = nn.Parameter(torch.tensor(-40.0))\n",
    DROP: "        later_BTC = F.pad(self.token_table(tokens_BT[:, 1:]), (0, 0, 0, 1))\n"
    "        x_BTC = x_BTC + self.log_gate.exp() * later_BTC\n" + DROP,
    "    def hidden(": "    @torch.no_grad()\n    def after_step(self):\n"
    "        self.log_gate += 8\n\n    def hidden(",
}  # shut at first; 1e-7 at step 3 and wide open at step 6


class Silent:
    def note(self, text):
        pass

    preparing = start = row = example = lambda self, *_: None


@pytest.fixture
def request_of_a_leak(place, monkeypatch):
    """A run of 9 steps that is validated each 3; the proofs before it are left out."""
    source = GPT2ISH
    for old, new in OPENING.items():
        assert source.count(old) == 1
        source = source.replace(old, new)
    (place / "experiments").mkdir()
    (place / "experiments" / "opening.py").write_text(source)
    monkeypatch.setattr(prepared, "refuse_unproven", lambda *_: None)
    monkeypatch.setattr(prepared, "refuse_leak_at_size", lambda *_: None)
    return Request(resolve("opening"), read_plan("words"), {}, {}, out_dir=Path("runs"))


@pytest.mark.parametrize(("share", "step"), [(1.0, 6), (0.015, 9)], ids=["each time", "at the end"])
def test_a_leak_that_opens_stops_the_run(request_of_a_leak, monkeypatch, share, step):
    monkeypatch.setattr(leak_watch, "SHARE", share)
    with pytest.raises(Leaked, match=f"opening leaks at step {step}: causal: position ") as caught:
        run_experiment(request_of_a_leak, Silent())
    folder = request_of_a_leak.folder

    assert caught.value.code == BAD_INPUT == 2
    assert folder.read().status == "leaked" and f"step {step}" in folder.read().exit_reason
    assert newest_checkpoint(folder, print).step == step // 4 * 4
    assert read_run(folder).final is None


def test_a_run_that_leaked_does_not_go_on_and_is_not_sampled_without_a_word(
    request_of_a_leak, capsys
):
    with pytest.raises(Leaked):
        run_experiment(request_of_a_leak, Silent())
    with pytest.raises(UserError, match="does not go on: opening leaks at step 9"):
        run_experiment(request_of_a_leak, Silent())
    open_trained(RunFolder(request_of_a_leak.folder.path), None, "cpu", "fp32")

    assert "its numbers are worth nothing: opening leaks" in capsys.readouterr().err


def test_a_check_reads_the_text_that_a_run_has_prepared(place):
    plan = read_plan("words")
    assert kept_rows(plan) is None
    run_experiment(Request(resolve("gpt2ish"), plan, {}, {}, out_dir=Path("runs")), Silent())
    text = bytes(token for token in kept_rows(plan)[0].tolist() if token < 256).decode()

    assert {word for word in text.split()[1:-1]} <= {"one", "two", "three", "four", "five"}
    assert kept_rows(read_plan("words", {"sequence_length": 16})) is None


def test_looking_for_leaks_changes_nothing_of_a_run(place, monkeypatch):
    rows = []
    for share in (0.0, 1.0):
        monkeypatch.setattr(leak_watch, "SHARE", share)
        request = Request(
            resolve("gpt2ish"), read_plan("words"), {}, {}, out_dir=Path(f"runs{share}")
        )
        run_experiment(request, Silent())
        lines = request.folder.train_csv.read_text().splitlines()
        rows.append([line.split(",")[:4] for line in lines])  # step, tokens, loss, objective

    assert rows[0] == rows[1] and len(rows[0]) == 10
