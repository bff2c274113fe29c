"""What is asked for: one experiment on one plan with one seed, and how to train it."""

from dataclasses import dataclass
from pathlib import Path

from lmplay.catalog.entries import canonical_name
from lmplay.catalog.entry import Entry
from lmplay.machine import resolve_device, resolve_precision
from lmplay.plan import Plan
from lmplay.run.design import Design, Rate
from lmplay.run.facts import League
from lmplay.run.folder import RUNS, RunFolder, run_path
from lmplay.run.labels import label_of


@dataclass(frozen=True)
class InitialModel:
    """A trained model that a run begins as, as far as their parameters have the same names."""

    path: Path  # of a run, or of a folder with config.json and safetensors
    step: int | None  # of the run: None is its last; always None for a folder
    name: str  # what a label calls it: gpt2ish~1a2b3c4d, where the digits change with the weights


@dataclass(frozen=True)
class Request:
    """One run: what it is, which its label and its folder say, and how it is to be trained."""

    entry: Entry
    plan: Plan
    changes: dict[str, object]  # what differs from the plan and the experiment: the run's label
    config: dict[str, object]  # of these, the values of Config
    seed: int = 0
    device: str = "auto"
    precision: str | None = None  # None: the plan's
    mini_batch_size: int | None = None  # None: automatic
    compiled: bool | None = False  # None: where that is repaid
    resume: bool = True
    out_dir: Path = Path(RUNS)
    budget: League | None = None  # that the plan's tokens were sized for
    initial: InitialModel | None = None  # the weights that it begins with
    fsdp: bool = False  # over the processes
    design: Design | None = None  # of the comparison that the run is for
    rate: Rate | None = None  # its place among runs at several learning rates

    @property
    def all_changes(self) -> dict[str, object]:
        """The changes, the weights to begin with, and a precision that the plan's is not here."""
        changes = self.changes
        if self.initial is not None:
            changes = changes | {"initial_model": self.initial.name}
        if self.precision is None:
            return changes
        device = resolve_device(self.device)
        precision = resolve_precision(self.precision, device)
        if precision == resolve_precision(self.plan.precision, device):
            return changes
        return changes | {"precision": precision}

    @property
    def label(self) -> str:
        """What tables call the run: "ue16x,lr=0.001"."""
        return label_of(canonical_name(self.entry), self.all_changes)

    @property
    def folder(self) -> RunFolder:
        name, plan = canonical_name(self.entry), self.plan.name
        return RunFolder(run_path(self.out_dir, plan, name, self.all_changes, self.seed))
