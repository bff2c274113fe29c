"""One update of the weights: unscale, clip, mask what is not finite, step."""

import torch
from torch import Tensor

from lmplay.model.abilities import has_after_step
from lmplay.optim.joint import JointOptimizer
from lmplay.run.fsdp import gather_state
from lmplay.run.run import Run

MOST_OVERFLOWS = 20  # in a row: by then the scaler has divided its scale of 65,536 by a million


class Update:
    """The optimizer's step, which a loss or gradient that is not finite turns off for good.

    From the first such step on no weight and no moment changes, and with torch's fused optimizers
    the device decides that alone: the host learns of it when it next reads `healthy`. Optimizers
    without a fused kernel make the host wait for the flag at every step. Under fp16 a gradient that
    overflows is ordinary: that step alone changes nothing, and the scaler lowers its scale;
    MOST_OVERFLOWS in a row are as bad as one elsewhere.

    Args:
        run: whose gradients are used; they are already averaged over its processes, but where an
            optimizer wants each process's own: then none are.
        optimizer: over the parameters of the run's model.
        clip: largest norm of the whole gradient; None for no limit.
    """

    def __init__(self, run: Run, optimizer: JointOptimizer, clip: float | None):
        self.run = run
        self.optimizer = optimizer
        self.scaler = run.accelerator.scaler
        self.clip = float("inf") if clip is None else clip
        self.healthy = torch.ones((), dtype=torch.bool, device=run.device)
        self.overflows = torch.zeros((), dtype=torch.int32, device=run.device)  # in a row
        self.taken = self.healthy  # whether the latest step changed anything
        self.local = optimizer.local_parameters

    def __call__(self, objective: Tensor, factor: float) -> Tensor:
        """Take one step and clear the gradients.

        Args:
            objective: this process's sum over the step, for its finiteness.
            factor: the schedule's, of every rate.
        Returns:
            The gradient's norm before clipping, a scalar on the device.
        """
        if self.run.world_size > 1:
            objective = self.run.accelerator.reduce(objective)
        self.optimizer.set_factor(factor)
        self.optimizer.set_progress(self.run.progress)
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        parameters = [p for p in self.run.model.parameters() if p.grad is not None]
        if self.local and self.run.world_size > 1:
            average_gradients([p for p in parameters if p not in self.local])
        norm = gather_state(torch.nn.utils.clip_grad_norm_(parameters, self.clip))
        if self.local and self.run.world_size > 1:
            norm = self.run.accelerator.reduce(norm, "mean")  # one is not finite: so is this
        most = 1 if self.scaler is None else MOST_OVERFLOWS
        self.overflows = torch.where(torch.isfinite(norm), 0, self.overflows + 1)
        self.healthy = self.healthy & torch.isfinite(objective) & (self.overflows < most)
        self.taken = self.healthy & (self.overflows == 0)
        self.optimizer.step_if(self.taken)
        if self.scaler is not None:
            self.scaler.update()
        if has_after_step(self.run.model) and self.taken:  # for these models alone the host waits
            self._after_step()
        self.run.model.zero_grad(set_to_none=True)
        return norm

    @torch.no_grad()
    def _after_step(self) -> None:
        frozen = [(p, p.clone()) for p in self.run.model.parameters() if not p.requires_grad]
        self.run.model.after_step()
        for parameter, value in frozen:
            parameter.copy_(value)

    def state(self) -> dict:
        """The scaler's numbers, for a checkpoint."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state(self, state: dict) -> None:
        """Take up the scaler's numbers from a checkpoint."""
        if self.scaler is not None and state:
            self.scaler.load_state_dict(state)


def average_gradients(parameters: list[Tensor]) -> None:
    """Give every process the mean of all processes' gradients; all must take part."""
    for p in parameters:
        torch.distributed.all_reduce(p.grad)
        p.grad /= torch.distributed.get_world_size()
