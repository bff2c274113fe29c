"""Runs made by writing their files, and what transformers makes of them."""

import dataclasses
from pathlib import Path

import pytest
import torch

from lmplay.catalog.entries import resolve
from lmplay.catalog.entry import Entry
from lmplay.model.experiment import load_experiment
from lmplay.run.checkpoint import Checkpoint, save_checkpoint
from lmplay.run.folder import RunFolder

MAX_LEN = 24


def write_run(path: Path, entry: Entry, facts, steps=(10,), tokenizer="byte", **values):
    """A run of an experiment at tiny size; no weight is as at the start, so that all of it acts."""
    experiment = load_experiment(entry)
    sizes = {"vocab_size": 257, "max_len": MAX_LEN, **values}
    config = experiment.config(**experiment.tiny | experiment.variant | sizes)
    folder = RunFolder(path)
    folder.write(
        facts(
            label=entry.name,
            file=entry.file,
            plan={"tokenizer": tokenizer},
            config=dataclasses.asdict(config),
        )
    )
    folder.experiment_py.write_text(entry.source)
    for step in steps:
        model = experiment.model(config, seed=step)
        torch.manual_seed(step)
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.1 * torch.randn_like(weight)
        save_checkpoint(
            folder, Checkpoint(step, model.state_dict(), {}, {}, {"progress": 1.0}), keep=9
        )
    return folder


@pytest.fixture
def make_run(tmp_path, make_facts):
    """Writes a run of the experiment that a name or a path means, and gives back its folder."""
    return lambda name, **values: write_run(tmp_path / "run", resolve(name), make_facts, **values)


@pytest.fixture(scope="session")
def transformers(tmp_path_factory):
    """The library; the code that it copies out of exported folders goes to a folder of ours."""
    reason = "the extra `export` is not installed"
    library = pytest.importorskip("transformers", reason=reason)
    from transformers import dynamic_module_utils

    place = str(tmp_path_factory.mktemp("modules"))
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", place)
        patch.syspath_prepend(place)
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield library


@pytest.fixture
def opened(transformers):
    """Opens an exported folder as a user of transformers does."""

    def open_folder(folder: Path, trust: bool = True):
        options = {"trust_remote_code": True} if trust else {}
        return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)

    return open_folder
