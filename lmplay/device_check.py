"""What can be proved of an experiment on a device: that it computes there what it should.

Kernels were wrong before, without an error. On MPS, torch's attention let positions see later
tokens in bf16 and fp16 (pytorch/pytorch#195910), misread q, k and v that are not contiguous
(#181133), and read beyond a cache whose length is no multiple of 32 (#169222).
"""

import copy
import functools
import platform
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from lmplay.errors import UserError
from lmplay.experiment import Experiment
from lmplay.generate.cache import Cache
from lmplay.objective import Objective
from lmplay.proving import (
    Bench,
    Exempt,
    Proof,
    Refuted,
    has_cache,
    prove,
    remembered,
)

# B rows, T positions, C model width

LEAK = 0.02  # of a position's size; with kernels that are right, nothing moves at all
CLOSE = 0.02  # of a position, a loss, the whole gradient, beyond what rounding accounts for ...
CLOSE_MATRIX = 0.2  # ... of one matrix's gradient, in which more cancels out ...
ROUNDINGS = 4  # ... which is taken so many times
MOST_ROUNDING = 0.2  # where it alone moves as much, nothing can be told
MOST_PARAMETERS = 1e9  # for the CPU to compute the same
SOME = 128  # tokens of what is computed on both
USUAL = 0.1  # of the usual size of a gradient, added to each: what is smaller is mostly rounding
ALL, LOSS = "the whole gradient", "the loss"
_LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}


def refuse_wrong(device: torch.device, precision: str, experiment: Experiment, config) -> None:
    """Raise a UserError where a proof fails on this device; the CPU is for lmplay's own tests."""
    if device.type == "cpu":
        return
    for proof in checked_on(device, precision, experiment, config):
        if proof.passed is False:
            raise UserError(
                f"{device.type} computes {experiment.name} wrongly in {precision}: {proof.name}: "
                f"{proof.detail}",
                hint="--precision fp32, --device cpu, or another version of torch",
            )


def checked_on(device: torch.device, precision: str, experiment: Experiment, config) -> list[Proof]:
    """The proofs of `check_on`, from memory where all this has passed them here before."""
    is_cuda = device.type == "cuda"
    machine = torch.cuda.get_device_name(device) if is_cuda else platform.platform()
    own = Path(__file__).read_text(encoding="utf-8")
    of = [experiment.source, config, machine, device.type, precision, own]
    return remembered(of, lambda: check_on(device, precision, experiment, config))


def check_on(device: torch.device, precision: str, experiment: Experiment, config) -> list[Proof]:
    """Every proof at the size of `config`, on a device as it trains there, against the CPU in fp32.

    What only zeros hide is opened: parameters that are all zero get small numbers. How far rounding
    may move a model is measured with every weight, and what each layer gives, rounded to bf16.

    Args:
        precision: fp32, bf16 or fp16.
        config: what `Experiment.config` made.
    """
    return prove(_PROOFS, _Place(experiment, config, device, precision))


class _Place(Bench):
    """The same model three times: exact and rough on the CPU, and there, on the device."""

    def __init__(self, experiment: Experiment, config, device: torch.device, precision: str):
        super().__init__(experiment, config)
        self.device = device
        self.low = _LOW.get(precision)

    @functools.cached_property
    def exact(self) -> nn.Module:
        model = self.model()
        with torch.no_grad():
            for weight in model.parameters():
                if not weight.any():
                    weight.normal_(std=0.02)
        return model

    @functools.cached_property
    def rough(self) -> nn.Module:
        model = copy.deepcopy(self.exact)
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_(weight.bfloat16())
        for module in model.modules():
            if not any(module.children()):
                module.register_forward_hook(_rounded)
        return model

    @functools.cached_property
    def there(self) -> nn.Module:
        return copy.deepcopy(self.exact).to(self.device)

    def autocast(self, model: nn.Module) -> AbstractContextManager:
        if self.low is None or model is not self.there:
            return nullcontext()
        return torch.autocast(self.device.type, self.low)

    def states(self, model: nn.Module, tokens_BT: Tensor, cache: Cache | None = None) -> Tensor:
        """What `hidden`, or else the model, gives for these tokens: on the CPU, in fp32."""
        torch.manual_seed(1)  # a model that draws numbers draws the same ones each time
        read = model.hidden if hasattr(model, "hidden") else model
        options = {} if cache is None else {"cache": cache}
        with self.autocast(model):
            x_BTC = read(tokens_BT.to(next(model.parameters()).device), **options)
        return x_BTC.detach().float().cpu()

    def gradients(self, model: nn.Module, tokens_BT: Tensor) -> dict[str, Tensor]:
        """Of the sum of what training minimises; and that sum. On the CPU, in fp32."""
        torch.manual_seed(1)
        tokens_BT = tokens_BT.to(next(model.parameters()).device)
        objective = Objective(model.train())
        with self.autocast(model):
            found = objective(tokens_BT, tokens_BT.roll(-1, 1)).objective
        found.backward()
        made = {
            f"the gradient of {name}": weight.grad.float().cpu()
            for name, weight in model.named_parameters()
            if weight.grad is not None
        }
        model.zero_grad(set_to_none=True)
        return {LOSS: found.detach().float().cpu(), **made}

    def refuse_what_the_cpu_cannot(self) -> None:
        num = sum(p.numel() for p in self.exact.parameters())
        if num > MOST_PARAMETERS:
            raise Exempt(f"{num:,} parameters are too many to compute the same on the CPU")


def _rounded(module: nn.Module, given, made):
    is_rounded = isinstance(made, Tensor) and made.is_floating_point()
    return made.bfloat16().float() if is_rounded else made


def _sees_no_later_token(place: _Place) -> str:
    if place.scores_itself:
        raise Exempt("it has its own log_likelihood")
    T = place.config.max_len
    tokens_BT = place.tokens(B=1)
    cuts = sorted({t for t in (1, 2, 3, 5, 9, 33, T // 2, T - 1) if 0 < t < T})
    largest = 0.0
    for cut in cuts:
        others_BT = torch.cat([tokens_BT[:, :cut], place.others(tokens_BT[:, cut:])], dim=1)
        for mode in ("training", "eval"):
            place.there.train(mode == "training")
            with torch.set_grad_enabled(mode == "training"):
                x_BTC = place.states(place.there, torch.cat([tokens_BT, others_BT]))
            far_T = _apart(x_BTC[1, :cut], x_BTC[0, :cut])
            far, t = far_T.max().item(), int(far_T.argmax())
            if not far <= LEAK:
                raise Refuted(
                    f"position {t} moves by {far:.0%} with the tokens from {cut} on, in {mode} mode"
                )
            largest = max(largest, far)
    return f"{len(cuts)} cuts in {T} tokens, both modes: earlier positions move by {largest:.0e}"


def _computes_as_the_cpu(place: _Place) -> str:
    if place.scores_itself:
        raise Exempt("it has its own log_likelihood")
    place.refuse_what_the_cpu_cannot()
    tokens_BT = place.tokens(B=1, T=min(place.config.max_len, SOME))
    exact = place.gradients(place.exact, tokens_BT)
    if not torch.equal(exact[LOSS], _redrawn(place, tokens_BT)):
        raise Exempt("it draws numbers, which every device draws otherwise")
    rough, there = (place.gradients(m, tokens_BT) for m in (place.rough, place.there))
    rounding, off = _off(rough, exact), _off(there, exact)
    if not rounding[ALL] <= MOST_ROUNDING:
        raise Exempt(f"rounding to bf16 alone moves its gradients by {rounding[ALL]:.0%}")
    for name, far in off.items():
        if name not in (ALL, LOSS) and exact[name].dim() < 2:
            continue
        more = CLOSE if name in (ALL, LOSS) else CLOSE_MATRIX
        if not far <= more + ROUNDINGS * rounding[name]:
            raise Refuted(f"{name} is {far:.0%} off; rounding to bf16 makes {rounding[name]:.1%}")
    with torch.no_grad():
        x_BTC, rough_BTC, there_BTC = (
            place.states(m.eval(), tokens_BT) for m in (place.exact, place.rough, place.there)
        )
    far = _close(there_BTC, rough_BTC, x_BTC, "without gradients, position")
    return f"gradients {off[ALL]:.1%} off, states {far:.1%}; rounding makes {rounding[ALL]:.1%}"


def _generates_as_it_reads(place: _Place) -> str:
    if place.scores_itself or not has_cache(place.exact):
        raise Exempt("it takes no cache, so generation reads from the start")
    place.refuse_what_the_cpu_cannot()
    T = min(place.config.max_len, 62)  # nearly two blocks of 32
    tokens_BT, cache, parts, start = place.tokens(B=2, T=T), Cache(), [], 0
    with torch.no_grad():
        x_BTC, rough_BTC = (place.states(m.eval(), tokens_BT) for m in (place.exact, place.rough))
        for end in range(max(1, T - 5), T + 1):
            parts.append(place.states(place.there.eval(), tokens_BT[:, start:end], cache))
            if not cache.used:
                raise Exempt("it keeps nothing in the cache: generation reads from the start")
            cache.advance(end - start)
            start = end
    far = _close(torch.cat(parts, 1), rough_BTC, x_BTC, "with a cache, position")
    return f"a prompt of {max(1, T - 5)} tokens, then one by one: {far:.1%} off"


def _redrawn(place: _Place, tokens_BT: Tensor) -> Tensor:
    torch.manual_seed(2)
    objective = Objective(place.exact.train())
    return objective(tokens_BT, tokens_BT.roll(-1, 1)).objective.detach()


def _close(there_BTC: Tensor, rough_BTC: Tensor, exact_BTC: Tensor, what: str) -> float:
    """How far the position that is off most is; refuted where rounding does not account for it."""
    rounding = _apart(rough_BTC, exact_BTC).max().item()
    if not rounding <= MOST_ROUNDING:
        raise Exempt(f"rounding to bf16 alone moves a position by {rounding:.0%}")
    far_T = _apart(there_BTC, exact_BTC).amax(0)
    far, t = far_T.max().item(), int(far_T.argmax())
    if not far <= CLOSE + ROUNDINGS * rounding:
        raise Refuted(f"{what} {t} is {far:.0%} off; rounding to bf16 makes {rounding:.1%}")
    return far


def _apart(x_TC: Tensor, exact_TC: Tensor) -> Tensor:
    """The distance of each position, against its size; shape without the last dimension."""
    size_T = exact_TC.norm(dim=-1)
    return (x_TC - exact_TC).norm(dim=-1) / size_T.clamp_min(torch.finfo(torch.float32).tiny)


def _off(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """How far off each is, against its size, and all gradients together."""
    sizes = {name: value.norm() for name, value in exact.items()}
    far = {name: (found[name] - value).norm() for name, value in exact.items()}
    names = [name for name in exact if name != LOSS]
    size_of_all = torch.stack([sizes[name] for name in names]).norm()
    usual = USUAL * size_of_all / len(names) ** 0.5
    off = {name: (far[name] / (sizes[name] + usual)).item() for name in names}
    off[LOSS] = (far[LOSS] / sizes[LOSS]).item()
    off[ALL] = (torch.stack([far[name] for name in names]).norm() / size_of_all).item()
    return off


_PROOFS = {
    "causal": _sees_no_later_token,
    "as on the CPU": _computes_as_the_cpu,
    "cache": _generates_as_it_reads,
}
