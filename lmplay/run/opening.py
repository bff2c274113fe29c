"""Opens a run for training and for generating alike: device, precision, model, accelerate."""

import hashlib
import os
import platform
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import patch_environment
from torch import nn

from lmplay.data.tokenizers import Tokenizer, open_tokenizer
from lmplay.errors import BAD_CHECKPOINT, UserError
from lmplay.machine import dtype_of, processor, resolve_device, resolve_precision
from lmplay.model.experiment import Experiment, freeze, load_source
from lmplay.model.objective import Objective
from lmplay.plan import Plan
from lmplay.run.checkpoint import read_checkpoint
from lmplay.run.facts import Facts
from lmplay.run.folder import RunFolder
from lmplay.run.fsdp import no_sync, shard, spread_model, whole

_PACKAGES = ("lmplay", "torch", "accelerate", "datasets", "tokenizers", "tiktoken", "numpy")


def stream_seed(seed: int, purpose: str) -> int:
    """The seed of one stream of randomness (weights, dropout), apart from the others."""
    digest = hashlib.blake2b(f"lmplay/{seed}/{purpose}".encode(), digest_size=7).digest()
    return int.from_bytes(digest)


def make_accelerator(device: torch.device, precision: str) -> Accelerator:
    """accelerate for placement, process group and autocast; accumulation and loss stay ours.

    Raises:
        UserError: ACCELERATE_GRADIENT_ACCUMULATION_STEPS is set, which would scale gradients, or
            the processes that were started did not become one group.
    """
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps != "1":
        raise UserError(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={steps} would scale gradients twice",
            hint="unset it; --mini-batch-size sets the rows that go through the model at once",
        )
    wanted = {} if device.index is None else {"ACCELERATE_TORCH_DEVICE": str(device)}
    # else a second run of this process keeps the first's device and precision
    AcceleratorState._reset_state(reset_partial_state=True)
    with patch_environment(**wanted):
        accelerator = Accelerator(
            cpu=device.type == "cpu", mixed_precision="no" if precision == "fp32" else precision
        )
    started = os.environ.get("WORLD_SIZE", "1")
    if str(accelerator.num_processes) != started:
        raise UserError(
            f"WORLD_SIZE={started} processes were started, but this one is in a group of "
            f"{accelerator.num_processes}",
            hint="start them with lmp-trainer --gpus N, torchrun or accelerate launch",
        )
    return accelerator


def leave_processes() -> None:
    """Leave the process group before Python ends: threads that it still runs then abort it."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


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
    sharded: bool = False  # every process holds a slice of each parameter
    compiled: bool = False
    may_shrink: bool = False  # halve mini_batch_size where the device's memory does not suffice
    warn: Callable[[str], None] = print  # told, once, of a change that the user should know of
    step: int = 0  # updates done
    tokens: int = 0  # targets trained on
    seconds: float = 0.0  # spent training, not validating

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.accelerator.device

    @property
    def world_size(self) -> int:
        """Processes that share a step."""
        return self.accelerator.num_processes

    def no_sync(self) -> AbstractContextManager:
        """While entered, a backward pass leaves its gradients in this process."""
        if self.sharded:
            return no_sync(self.objective)
        return self.accelerator.no_sync(self.objective)

    def whole_model(self) -> nn.Module:
        """The model itself, or a whole copy on the device; then all processes must take part."""
        if not self.sharded:
            return self.model
        copy = self.experiment.model(self.config, device="meta")
        copy.load_state_dict(whole(self.model.state_dict(keep_vars=True)), assign=True)
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
    sharded: bool = False,
) -> Run:
    """Build the model from its seed, freeze what the plan freezes, and wrap it once for accelerate.

    Args:
        compiled: compile the wrapper, or each block that is sharded, in place (names in the state
            stay). On the CPU this turns deterministic algorithms on: without them two equal
            compiled runs differ.
        sharded: spread the parameters over the processes instead of holding them in each.
    """
    model = experiment.model(config, stream_seed(seed, "weights"), accelerator.device)
    freeze(model, plan.freeze)  # before it is wrapped: DDP waits for the gradients it then expects
    torch.manual_seed(stream_seed(seed, f"dropout/{accelerator.process_index}"))
    # in evaluation mode accelerate gives it a device and autocast, but no DDP
    objective = accelerator.prepare_model(Objective(model), evaluation_mode=sharded)
    parts = shard(objective, accelerator.device) if sharded else [objective]
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
        sharded, compiled,
    )  # fmt: skip


@dataclass
class Trained:
    """A trained model, ready to generate."""

    experiment: Experiment
    model: nn.Module  # in eval mode
    tokenizer: Tokenizer
    config: object
    device: torch.device
    facts: Facts
    step: int
    autocast: Callable[[], AbstractContextManager]


def open_trained(folder: RunFolder, step: int | None, device: str, precision: str) -> Trained:
    """The model of a run at one of its checkpoints, from the run's own copies.

    Args:
        step: which checkpoint; None is the newest.
        device: as `resolve_device` takes it.
        precision: as `resolve_precision` takes it; weights stay fp32 under autocast.
    Raises:
        UserError: no such checkpoint, or its weights do not fit the run's own source.
    """
    facts = folder.read()
    where = resolve_device(device)
    used = resolve_precision(precision, where)
    path = Path(f"{facts.file}.py")
    if not folder.experiment_py.is_file():
        raise UserError(f"{folder.path} lacks its experiment.py", hint="it is no whole run")
    experiment = load_source(folder.experiment_py.read_text(encoding="utf-8"), path, {})
    config = experiment.config(**facts.config)
    model = experiment.model(config)
    checkpoint = read_checkpoint(folder, step, weights_only=True)
    load_weights(model, checkpoint.model, f"{folder.path} at step {checkpoint.step}")
    file = folder.tokenizer_json if folder.tokenizer_json.is_file() else None
    tokenizer = open_tokenizer(facts.plan["tokenizer"], file=file)
    is_mixed = used != "fp32"
    autocast = partial(torch.autocast, where.type, dtype_of(used)) if is_mixed else nullcontext
    return Trained(
        experiment,
        model.to(where).eval(),
        tokenizer,
        config,
        where,
        facts,
        checkpoint.step,
        autocast,
    )


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor], source: str) -> None:
    """Copy a state dict into a model; every name must match.

    Raises:
        UserError: names or shapes differ; the first few are listed.
    """
    try:
        model.load_state_dict(spread_model(weights, model), strict=True)
    except RuntimeError as error:
        problems = [line.strip() for line in str(error).splitlines()[1:4]]
        raise UserError(
            f"{source} does not fit the experiment: {' '.join(problems)}", code=BAD_CHECKPOINT
        ) from None


def compiled_so_far() -> dict:
    """Graphs made in this process, breaks between them, and seconds of compiling them."""
    from torch._dynamo import utils as dynamo  # here, not at the top: it takes a second to load

    seconds = dynamo.compile_times("csv", aggregate=True)
    spent = dict(zip(*seconds, strict=True)).get("_compile.compile_inner", "0")
    return {
        "graphs": dynamo.counters["stats"]["unique_graphs"],
        "breaks": sum(dynamo.counters["graph_break"].values()),
        "seconds": float(spent),
    }


def told_of_compiling(made: dict) -> str:
    """One line on what `compiled_so_far` says."""
    graphs, breaks = (
        f"{made[what] or 'no'} {what.removesuffix('s') if made[what] < 2 else what}"
        for what in ("graphs", "breaks")
    )
    return f"compiled: {graphs}, {breaks}, in {made['seconds']:.0f} s"


def machine_facts(device: torch.device) -> dict[str, object]:
    """What run.json says of the machine, the versions and the commit."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "device": str(device),
        "device_name": name,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in _PACKAGES},
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    """The commit of the working directory, with a + where files differ; None outside git."""
    git = ["git", "-C", str(Path.cwd())]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5
        )
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")
