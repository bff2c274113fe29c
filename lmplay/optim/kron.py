"""PSGD-Kron as the library has it, with random numbers that depend on the step alone."""

import numpy as np
import opt_einsum  # noqa: F401  if it is there torch takes it up, see below
import pytorch_optimizer
import torch


class Kron(pytorch_optimizer.Kron):
    """The library's: momentum whitened by triangular factors, which random probes fit online.

    The probes of a step are the same on every process and after every resume, and what else draws
    random numbers does not notice them. Its products of five factors need opt_einsum: without it
    torch multiplies them from left to right, and two factors make an outer product of gigabytes.
    """

    def step(self, closure=None):
        """Take one step."""
        seed = self.param_groups[0].get("step", 0)
        drawn = np.random.get_state()
        devices = {p.device for group in self.param_groups for p in group["params"] if p.is_cuda}
        with torch.random.fork_rng(devices=list(devices)):
            torch.manual_seed(seed)
            np.random.seed(seed)
            try:
                return super().step(closure)
            finally:
                np.random.set_state(drawn)
