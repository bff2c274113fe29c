"""Schedule-Free AdamW as the library has it, whose change of weights for evaluation is exact."""

import pytorch_optimizer
import torch


class ScheduleFreeAdamW(pytorch_optimizer.ScheduleFreeAdamW):
    """The library's: a model holds one set of weights in training and their average in evaluation.

    The weights of training are kept meanwhile, in the state and so in a checkpoint, instead of
    being computed back: that would round them, and a run would depend on when it was looked at.
    """

    @torch.no_grad()
    def eval(self) -> None:
        """Give the parameters their average, unless they have it."""
        for group in self.param_groups:
            if group["train_mode"]:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        self.state[p]["trained"] = p.clone()
        super().eval()

    @torch.no_grad()
    def train(self) -> None:
        """Give the parameters what training left, unless they have it."""
        for group in self.param_groups:
            if not group["train_mode"]:
                for p in group["params"]:
                    if "trained" in self.state[p]:
                        p.copy_(self.state[p].pop("trained"))
                group["train_mode"] = True
