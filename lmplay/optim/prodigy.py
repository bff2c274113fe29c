"""Prodigy as the library has it, whose groups of parameters step at rates of their own."""

import pytorch_optimizer
import torch


class Prodigy(pytorch_optimizer.Prodigy):
    """The library's, which finds one rate for all and takes the first group's share of it for all.

    The share of the largest group goes into what is found; the steps of the others are made longer
    or shorter afterwards.
    """

    @torch.no_grad()
    def step(self, closure=None):
        """Take one step."""
        rates = [group["lr"] for group in self.param_groups]
        sizes = [sum(p.numel() for p in group["params"]) for group in self.param_groups]
        common = rates[sizes.index(max(sizes))]
        apart = [
            (rate / common if common else 0.0, [(p, p.clone()) for p in group["params"]])
            for group, rate in zip(self.param_groups, rates, strict=True)
            if rate != common
        ]
        for group in self.param_groups:
            group["lr"] = common
        loss = super().step(closure)
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate
        for share, pairs in apart:
            for p, before in pairs:
                p.copy_(before.lerp(p, share))
        return loss
