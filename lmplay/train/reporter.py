"""What a run says of itself while it trains: run.json, samples.md and the display."""

from dataclasses import replace

from torch import nn

from lmplay.disk import naming
from lmplay.fault_points import reach
from lmplay.machine import matmul_rate
from lmplay.memory import reset_peak_memory
from lmplay.model.decoding import greedy_text
from lmplay.run.compiler import compiled_so_far
from lmplay.run.facts import Facts
from lmplay.run.folder import RunFolder
from lmplay.run.rng import unchanged_rng
from lmplay.run.run import Run
from lmplay.train.display import Display
from lmplay.train.prepared import Prepared


class Reporter:
    """Keeps what is known of a run up to date. The first process writes; all must call.

    Attributes:
        facts: what run.json says now.
    """

    def __init__(self, run: Run, prepared: Prepared, facts: Facts, display: Display):
        self.run, self.prepared, self.facts, self.display = run, prepared, facts, display
        self._is_main = run.accelerator.is_main_process

    def begin(self) -> None:
        """Training begins: measure what the device could do at most, and memory from now on."""
        facts, run = self.facts, self.run
        matmul_flops = run.world_size * matmul_rate(run.device, facts.precision)
        reset_peak_memory(run.device)
        self.write(replace(facts, matmul_flops=matmul_flops).running())
        fastest = matmul_flops / facts.flops_per_token
        self.display.start(self.prepared.clock, run.step, fastest)

    def write(self, facts: Facts) -> None:
        """Put these facts into run.json, with what training itself has changed meanwhile."""
        run, changed = self.run, {*facts.changed_midway}
        if run.step and facts.compiled and not run.compiled:
            changed.add("compiled")
        self.facts = replace(
            facts,
            mini_batch_size=run.mini_batch_size,
            compiled=run.compiled,
            changed_midway=sorted(changed),
        )
        if self._is_main:
            run.folder.write(self.facts)

    def warn(self, text: str) -> None:
        """The run has changed in a way that the user should know of."""
        self.display.note(text)
        self.write(self.facts)

    def show(self, kind: str, row: dict) -> None:
        """A row of `Display.row`; with that of a validation, what the model says by then."""
        if kind == "train" and self.run.compiled:
            self._show_compilation()
        model = self.run.whole_model() if kind == "validation" else None
        if self._is_main:
            self.display.row(kind, row)
            if model is not None:
                self.run.folder.refuse_deleted()
                self._show_samples(model, row["step"])

    def _show_compilation(self) -> None:
        made = compiled_so_far()
        if made != self.facts.compilation:
            self.facts = replace(self.facts, compilation=made)
            if self._is_main:
                self.display.note(str(made))

    def _show_samples(self, model: nn.Module, step: int) -> None:
        run, decode = self.run, self.prepared.tokenizer.decode
        num_rows = self.prepared.clock.at(step).first_row
        for name, prompt, truth in self.prepared.data.examples(num_rows):
            reach("sample")
            with run.accelerator.autocast(), unchanged_rng():
                said = greedy_text(model, prompt, len(truth), run.config.max_len)
            texts = [decode(ids) for ids in (prompt, truth, said)]
            self.display.example(*texts)
            _write_sample(run.folder, f"step {step:,}, {name}", *texts)


def _write_sample(folder: RunFolder, title: str, prompt: str, truth: str, said: str) -> None:
    parts = [f"## {title}"]
    for name, text in (("prompt", prompt), ("truth", truth), ("the model", said)):
        parts.append(f"**{name}**\n\n" + "\n".join(f"    {line}" for line in text.splitlines()))
    path = folder.samples_md
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write("\n\n".join(parts) + "\n\n")
