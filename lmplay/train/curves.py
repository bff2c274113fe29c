"""The rows of train.csv: sums stay on the device until it is time to look at them."""

import math
import time

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lmplay.errors import NUMERIC, UserError
from lmplay.memory import peak_memory
from lmplay.model.abilities import has_own_objective
from lmplay.model.objective import Sums
from lmplay.run.records import Record
from lmplay.run.run import Run

CADENCE = 10  # steps between two looks at the device; on the CPU every step is looked at


class NotFinite(UserError):
    """The loss or the gradient of a step was NaN or infinite; no weight was changed by it."""

    def __init__(self, step: int, what: str):
        super().__init__(
            f"the {what} of step {step} is not finite; no weight has changed since step {step - 1}",
            hint="a lower learning rate or fp32 may help: --set optimizer.lr=..., --precision fp32",
            code=NUMERIC,
        )
        self.step = step


class Curves:
    """Collects what each step measured and writes it, one look at the device for many steps."""

    def __init__(self, run: Run, record: Record | None):
        self.run = run
        self.record = record  # None on every process but the first
        self.cadence = 1 if run.device.type == "cpu" else CADENCE
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []  # of the step under way
        self._steps: list[dict] = []  # done, not yet looked at
        self._mark = time.perf_counter()

    def add(self, scored: Sums) -> None:
        """Take the sums of one micro-batch."""
        missing = torch.full_like(scored.objective, float("nan"))
        loss = missing if scored.loss is None else scored.loss
        hits = missing if scored.hits is None else scored.hits
        self._parts.append((scored.objective.detach(), loss, hits))

    @property
    def objective(self) -> Tensor:
        """This process's sum of the objective over the step under way."""
        return torch.stack([objective for objective, _, _ in self._parts]).sum()

    def close_step(self, num_targets: int, lr: float, norm: Tensor, healthy: Tensor) -> None:
        """The step is done and counted: keep its numbers on the device.

        Args:
            norm: of the gradient, as `Update` gave it.
            healthy: false once a loss or gradient was not finite.
        """
        sums = torch.stack([value.float() for part in self._parts for value in part])
        row = {"step": self.run.step, "tokens": self.run.tokens, "learning_rate": lr}
        health = torch.stack([norm.float(), healthy.float()])
        self._steps.append({"row": row, "targets": num_targets, "health": health, "sums": sums})
        self._parts = []

    def drop_step(self) -> None:
        """Forget the step under way; it will be taken again."""
        self._parts = []

    def look(self, now: bool = False) -> tuple[float, list[dict]]:
        """Write the rows that are due.

        Returns:
            The run's seconds of training, now with these steps, and the rows that scored something.
        Raises:
            NotFinite: a step's loss or gradient was not finite; the rows before it are written.
        """
        if not self._steps or not (now or len(self._steps) >= self.cadence):
            return self.run.seconds, []
        # steps taken before the parts became smaller have fewer of them: zeros stand for the rest
        sums_SN = pad_sequence([step["sums"] for step in self._steps], batch_first=True)
        if self.run.world_size > 1:
            sums_SN = torch.cat(self.run.accelerator.gather(sums_SN[None]).unbind(), dim=1)
        health_S2 = torch.stack([step["health"] for step in self._steps]).tolist()
        totals_S3 = sums_SN.cpu().double().unflatten(1, (-1, 3)).sum(1)  # fp64 only on the CPU
        seconds = time.perf_counter() - self._mark
        self.restart_clock()
        speed = sum(step["targets"] for step in self._steps) / max(seconds, 1e-9)
        total, rows = self.run.seconds, []
        for step, totals, (norm, healthy) in zip(
            self._steps, totals_S3.tolist(), health_S2, strict=True
        ):
            if not healthy:
                what = "gradient" if math.isfinite(totals[0]) else "loss"
                raise NotFinite(step["row"]["step"], what)
            total += seconds / len(self._steps)
            row = self._row(step, totals, norm, speed, total)
            if self.record is not None:
                self.record.write(row)
            if step["targets"]:
                rows.append(row)
        self._steps = []
        return total, rows

    def restart_clock(self) -> None:
        """Leave out the time since the last look: it went into validation or saving."""
        self._mark = time.perf_counter()

    def _row(self, step: dict, totals: list, norm: float, speed: float, seconds: float) -> dict:
        objective, loss, hits = (_mean(total, step["targets"]) for total in totals)
        return {
            **step["row"],
            "loss": loss,
            "objective": objective if has_own_objective(self.run.model) else None,
            "accuracy": hits,
            "grad_norm": norm,
            "tokens_per_second": speed,
            "memory": peak_memory(self.run.device),
            "seconds": seconds,
        }


def _mean(total: float, num_targets: int) -> float | None:
    """None where nothing was scored or measured."""
    return total / num_targets if num_targets and not math.isnan(total) else None
