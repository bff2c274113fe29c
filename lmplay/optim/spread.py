"""An optimizer of matrices whose work and state are spread over processes, as in ZeRO's stage 1."""

from torch.distributed.optim import ZeroRedundancyOptimizer


class Spread(ZeroRedundancyOptimizer):
    """Each process takes the steps of some whole weights, and all get what came of them.

    Gradients are averaged before. The state is saved whole, so that any number of processes can go
    on from it.
    Source: Rajbhandari et al. 2019, arXiv:1910.02054, section 5.1.
    """

    def state_dict(self) -> dict:
        """The whole state on the first process, none of it on others; all must take part."""
        self.consolidate_state_dict(to=0)
        if self.rank:
            return {**self.optim.state_dict(), "state": {}}
        whole = super().state_dict()
        self._all_state_dicts = []
        return whole

    def load_state_dict(self, state_dict: dict) -> None:
        """Take up this process's part of a whole state."""
        super().load_state_dict({**state_dict, "state": dict(state_dict["state"])})
        self.state.clear()  # the copies of it that torch made for nothing
