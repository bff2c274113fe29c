from pathlib import Path

import pytest
import torch

from lmplay.catalog.entry import read_source
from lmplay.model.experiment import load_experiment
from lmplay.proofs.specimen import PROGRESS, Specimen, throughout

GPT2ISH = (Path(__file__).parents[2] / "experiments" / "gpt2ish.py").read_text()
END = GPT2ISH.replace("    num_blocks: int = 6", "    end: int = 0\n    num_blocks: int = 6")
AT = GPT2ISH.replace(
    "    def hidden(",
    "    def at(self, progress):\n        self.progress = progress\n\n    def hidden(",
)
CHANGES = AT.replace("x_BTC = self.dropout(x_BTC)", "x_BTC = self.dropout(x_BTC) + self.progress")


def specimen(source=GPT2ISH):
    return Specimen.tiny(load_experiment(read_source(source, Path("idea.py"))[0]))


def test_a_model_that_knows_the_end_marker_sees_some_among_the_tokens():
    knows = specimen(END)

    assert knows.config.end == 60
    assert 0.05 < (knows.tokens(B=64) == 60).double().mean() < 0.25


def test_a_model_with_at_is_told_the_progress_of_its_specimen():
    seen = []
    throughout(lambda s: seen.append(s.model().progress) or "")(specimen(CHANGES))

    assert tuple(seen) == PROGRESS == (0, 0.5, 1)


@pytest.mark.parametrize("source", [GPT2ISH, AT], ids=["without at", "with an at of no use"])
def test_a_claim_about_a_model_that_stays_the_same_is_proved_once(source):
    seen = []
    throughout(lambda s: seen.append(s) or "")(specimen(source))

    assert len(seen) == 1


def test_randomised_weights_leave_nothing_at_zero_or_alike():
    model = specimen().randomised()

    for name, weight in model.named_parameters():
        assert weight.count_nonzero() == weight.numel(), name
        assert len(torch.unique(weight)) > weight.numel() // 2, name
