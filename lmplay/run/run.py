"""An opened run: its model, wrapped once for accelerate, and how far it has come."""

import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from lmplay.errors import BAD_CHECKPOINT, UserError
from lmplay.model.abilities import set_progress
from lmplay.model.experiment import Experiment
from lmplay.model.freezing import freeze
from lmplay.model.objective import Objective
from lmplay.plan import Plan
from lmplay.run.folder import RunFolder
from lmplay.run.fsdp import apply_fsdp, gather_state, no_sync, scatter_model_state
from lmplay.seeds import stream_seed

AUTO_TOKENS = 8192  # in a micro-batch where memory cannot be probed


@dataclass
class Run:
    """An opened run: all that a step needs, and how far it has come."""

    folder: RunFolder
    plan: Plan
    experiment: Experiment
    seed: int
    config: object
    model: nn.Module
    objective: nn.Module  # the model and its loss, as accelerate gave it back
    accelerator: Accelerator
    mini_batch_size: int  # rows that go through the model at once
    fsdp: bool = False  # every process holds a slice of each parameter
    compiled: bool = False
    may_shrink: bool = False  # halve mini_batch_size where the device's memory does not suffice
    warn: Callable[[str], None] = print  # told, once, of a change that the user should know of
    step: int = 0  # updates done
    tokens: int = 0  # targets trained on
    seconds: float = 0.0  # spent training, not validating
    progress: float = 0.0  # share of the run's tokens, and what the model was told of it

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.accelerator.device

    @property
    def world_size(self) -> int:
        """Processes that share a step."""
        return self.accelerator.num_processes

    def set_progress(self, progress: float) -> None:
        """How far the run is from now on: for its next step, and for what is saved before it."""
        self.progress = progress
        set_progress(self.model, progress)

    def no_sync(self) -> AbstractContextManager:
        """While entered, a backward pass leaves its gradients in this process."""
        if self.fsdp:
            return no_sync(self.objective)
        return self.accelerator.no_sync(self.objective)

    def reshard(self) -> None:
        """Drop whole weights that a forward pass has left here: slices have changed since."""
        if self.fsdp:
            self.objective.reshard()

    def whole_model(self) -> nn.Module:
        """The model itself, or a whole copy on the device; then all processes must take part."""
        if not self.fsdp:
            return self.model
        copy = self.experiment.model(self.config, device="meta")
        copy.load_state_dict(gather_state(self.model.state_dict(keep_vars=True)), assign=True)
        set_progress(copy, self.progress)
        return copy.train(self.model.training)

    def can_go_on(self, error: Exception) -> bool:
        """Whether what failed may be tried again, with a smaller micro-batch or not compiled."""
        if isinstance(error, torch.OutOfMemoryError):
            return self._shrink()
        is_compilers = type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
        return is_compilers and self._uncompile(error)

    def _shrink(self) -> bool:
        """Halve the micro-batch, where that is ours to choose and can be done."""
        if not self.may_shrink or self.mini_batch_size == 1 or self.world_size > 1:
            return False
        self.mini_batch_size //= 2
        return True

    def _uncompile(self, error: Exception) -> bool:
        if not self.compiled:
            return False
        self.compiled = False
        for module in self.objective.modules():
            module._compiled_call_impl = None  # what Module.compile had set
        torch.use_deterministic_algorithms(False)
        why = str(error).strip().splitlines()[0]
        self.warn(f"the model does not compile, so it goes on without: {why}")
        return True


def open_run(
    folder: RunFolder,
    plan: Plan,
    experiment: Experiment,
    seed: int,
    config,
    accelerator: Accelerator,
    mini_batch_size: int,
    compiled: bool = False,
    fsdp: bool = False,
) -> Run:
    """Build the model from its seed, freeze what the plan freezes, and wrap it once for accelerate.

    Args:
        compiled: compile the wrapper, or with `fsdp` each block, in place (names in the state
            stay). On the CPU this turns deterministic algorithms on: without them two equal
            compiled runs differ.
        fsdp: spread the parameters over the processes instead of holding them in each.
    """
    model = experiment.model(config, stream_seed(seed, "weights"), accelerator.device)
    set_progress(model, 0.0)
    freeze(model, plan.freeze)  # before it is wrapped: DDP waits for the gradients it then expects
    drawn = stream_seed(seed, f"dropout/{accelerator.process_index}")
    torch.manual_seed(drawn)
    random.seed(drawn)  # an experiment may draw from it, and a checkpoint holds all generators
    np.random.seed(drawn % 2**32)
    # in evaluation mode accelerate gives it a device and autocast, but no DDP
    objective = accelerator.prepare_model(Objective(model), evaluation_mode=fsdp)
    parts = apply_fsdp(objective, accelerator.device) if fsdp else [objective]
    if compiled and not parts:
        problem = f"--shard: {experiment.name} has no repeated blocks to compile"
        raise UserError(problem, hint="leave out --compile or --shard")
    if compiled:
        torch.use_deterministic_algorithms(accelerator.device.type == "cpu")
        torch._dynamo.config.recompile_limit = 64  # past it the rest would silently run eagerly
        for part in parts:
            part.compile(dynamic=False)  # else the kernels depend on the order of shapes seen
    return Run(
        folder, plan, experiment, seed, config, model, objective, accelerator, mini_batch_size,
        fsdp, compiled,
    )  # fmt: skip


def rows_at_once(plan: Plan, device: torch.device) -> int:
    """Rows in a micro-batch: all of them on CUDA, where a failure halves it; else a safe few."""
    largest = max(rows for _, rows in plan.batch_sizes)
    if device.type == "cuda":
        return largest
    return max(1, min(largest, AUTO_TOKENS // plan.max_len))


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor], source: str) -> None:
    """Copy a state dict into a model; every name must match.

    Raises:
        UserError: names or shapes differ; the first few are listed.
    """
    try:
        model.load_state_dict(scatter_model_state(weights, model), strict=True)
    except RuntimeError as error:
        problems = [line.strip() for line in str(error).splitlines()[1:4]]
        raise UserError(
            f"{source} does not fit the experiment: {' '.join(problems)}", code=BAD_CHECKPOINT
        ) from None
