"""Momentum that changes over a run: it rises to its full value at first, and may fall at the end.

Of what has `betas`, momentum is the first of them.
Source: modded-nanogpt's records since 2025, for Muon: from 0.85 to 0.95 over the first 300 steps;
    torch's OneCycleLR, for the first of Adam's betas.
"""

from dataclasses import dataclass, fields

RAMP = ("momentum_start", "momentum_warmup", "momentum_cooldown")  # options, for any momentum


@dataclass(frozen=True, kw_only=True)
class Ramp:
    """Straight lines between a lower momentum at both ends of a run and the full one between.

    Raises:
        ValueError: a value is out of its range.
    """

    full: float
    momentum_start: float = 0.85
    momentum_warmup: float = 0.1  # share of the run's tokens spent rising
    momentum_cooldown: float = 0.0  # share spent falling at the end

    def __post_init__(self):
        shares = self.momentum_warmup, self.momentum_cooldown
        if not 0 <= self.momentum_start <= self.full or min(shares) < 0 or sum(shares) > 1:
            raise ValueError(
                f"momentum from {self.momentum_start:g} to {self.full:g} and back over "
                f"{shares[0]:g} and {shares[1]:g} of the run"
            )

    @property
    def numbers(self) -> list[float]:
        """All of it, as a checkpoint can hold it."""
        return [getattr(self, field.name) for field in fields(self)]


def momentum_at(numbers: list[float], progress: float) -> float:
    """The momentum of a step before which this share of the run's tokens was trained on."""
    full, start, warmup, cooldown = numbers
    missing = max(
        1 - progress / warmup if warmup else 0.0,
        1 - (1 - progress) / cooldown if cooldown else 0.0,
        0.0,
    )
    return full - (full - start) * missing


def full_momentum(group: dict) -> float:
    """What a group of parameters was made with."""
    return group["momentum"] if "momentum" in group else group["betas"][0]


def set_momentum(group: dict, momentum: float) -> None:
    """Let a group of parameters take its next steps with this momentum."""
    if "momentum" in group:
        group["momentum"] = momentum
    else:
        group["betas"] = (momentum, *group["betas"][1:])
