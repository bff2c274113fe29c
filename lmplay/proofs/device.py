"""What can be proved of an experiment on a device: that it computes there what it should.

Kernels were wrong before, without an error. On MPS, torch's attention let positions see later
tokens in bf16 and fp16 (pytorch/pytorch#195910), misread q, k and v that are not contiguous
(#181133), and read beyond a cache whose length is no multiple of 32 (#169222).
"""

import functools
import gc
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from lmplay.errors import UserError
from lmplay.machine import processor
from lmplay.model.abilities import has_hidden, takes_cache
from lmplay.model.cache import Cache
from lmplay.model.experiment import Experiment
from lmplay.model.objective import Objective
from lmplay.proofs.proof import NO_MEMORY, Exempt, Proof, Refuted, prove
from lmplay.proofs.proof_cache import remembered
from lmplay.proofs.specimen import Specimen

# B rows, T positions, C model width

# where tokens change, and nothing before may move; also in the middle, and at the last token
CUTS = (1, 2, 3, 5, 9, 33, 65, 129, 257)
LEAK = 1e-3  # of a position's size, beyond four times what it differs from itself in another row
CLOSE = 0.02  # of a position, a loss, the whole gradient, beyond what rounding accounts for ...
CLOSE_MATRIX = 0.2  # ... of one matrix's gradient, in which more cancels out ...
ROUNDINGS = 4  # ... which is taken so many times
MOST_ROUNDING = 0.2  # where it alone moves as much, nothing can be told
MOST_PARAMETERS = 4e8  # for the CPU to compute the same
SOME = 128  # tokens of what is computed on both
USUAL = 0.01  # of the usual size of a gradient, added to each: what is smaller is mostly rounding
ALL, LOSS = "the whole gradient", "the loss"
_LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}

Note = Callable[[str], object]


def refuse_wrong(
    device: torch.device,
    precision: str,
    experiment: Experiment,
    config,
    note: Note,
    is_trained: bool = True,
) -> None:
    """Raise a UserError where a proof fails on this device; the CPU is for lmplay's own tests.

    Args:
        note: told what takes long, and what there is not enough memory for.
        is_trained: else gradients may be wrong.
    """
    if device.type == "cpu":
        return
    for proof in checked_on(device, precision, experiment, config, note):
        if proof.detail == NO_MEMORY:
            note(f"not proved on {device}: {proof.name}: {proof.detail}")
        if proof.passed is False and (is_trained or proof.name != "gradients"):
            raise UserError(
                f"{device.type} computes {experiment.name} wrongly in {precision}: {proof.name}: "
                f"{proof.detail}",
                hint="--precision fp32, --device cpu, or another version of torch",
            )


def checked_on(
    device: torch.device, precision: str, experiment: Experiment, config, note: Note
) -> list[Proof]:
    """The proofs of `check_on`, from memory where all this has passed them on such a machine."""

    def found() -> list[Proof]:
        note(f"checking {experiment.name} on {device} in {precision}, once")
        return check_on(device, precision, experiment, config)

    of = [experiment.source, config, machine_of(device), precision]
    return remembered(of, found)


def machine_of(device: torch.device) -> list[str | None]:
    """What kernels there depend on."""
    if device.type == "cuda":
        return [device.type, torch.cuda.get_device_name(device), torch.version.cuda]
    return [device.type, platform.platform(), processor()]


def check_on(device: torch.device, precision: str, experiment: Experiment, config) -> list[Proof]:
    """Every proof at the size of `config`, on a device as it trains there, against the CPU in fp32.

    What only zeros hide is opened: parameters that are all zero get small numbers. How far rounding
    may move a model is measured with every weight, and what each layer gives, rounded to bf16.

    Args:
        precision: fp32, bf16 or fp16.
        config: what `Experiment.config` made.
    """
    proofs = prove(_PROOFS, _Place(experiment, config, device, precision))
    gc.collect()  # a run's peak of memory is its own
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "mps":
        torch.mps.empty_cache()
    return proofs


class _Place(Specimen):
    """The same model three times: exact and rough on the CPU, and there, on the device."""

    def __init__(self, experiment: Experiment, config, device: torch.device, precision: str):
        super().__init__(experiment, config)
        self.device = device
        self.low = _LOW.get(precision)

    def opened(self) -> nn.Module:
        """The same each time."""
        model = self.model()
        with torch.no_grad():
            for weight in model.parameters():
                if not weight.any():
                    weight.normal_(std=0.02)
        return model

    @functools.cached_property
    def exact(self) -> nn.Module:
        return self.opened()

    @functools.cached_property
    def rough(self) -> nn.Module:
        model = self.opened()
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_(weight.bfloat16())
        for module in model.modules():
            if not any(module.children()):
                module.register_forward_hook(_rounded)
        return model

    @functools.cached_property
    def there(self) -> nn.Module:
        return self.opened().to(self.device)

    def autocast(self, model: nn.Module) -> AbstractContextManager:
        if self.low is None or model is not self.there:
            return nullcontext()
        return torch.autocast(self.device.type, self.low)

    def states(self, model: nn.Module, tokens_BT: Tensor, cache: Cache | None = None) -> Tensor:
        """What `hidden`, or else the model, gives for these tokens: on the CPU, in fp32."""
        torch.manual_seed(1)  # a model that draws numbers draws the same ones each time
        read = model.hidden if has_hidden(model) else model
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
        made = {LOSS: found.detach().float().cpu()}
        for name, weight in model.named_parameters():
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
            made[f"the gradient of {name}"] = gradient.float().cpu()
            weight.grad = None
        return made

    def refuse_what_cannot_be_compared(self) -> None:
        if self.scores_itself:
            raise Exempt("it has its own log_likelihood")
        shapes = self.experiment.model(self.config, device="meta")
        num = sum(p.numel() for p in shapes.parameters())
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
    cuts = sorted({t for t in (*CUTS, T // 2 + 1, T - 1) if 0 < t < T})
    largest = 0.0
    for cut in cuts:
        others_BT = torch.cat([tokens_BT[:, :cut], place.others(tokens_BT[:, cut:])], dim=1)
        rows_BT = torch.cat([tokens_BT, others_BT, tokens_BT])
        for mode in ("training", "eval"):
            place.there.train(mode == "training")
            with torch.set_grad_enabled(mode == "training"):
                x_BTC = place.states(place.there, rows_BT)[:, :cut]
            far_T, noise_T = (_apart(x_BTC[row], x_BTC[0]) for row in (1, 2))
            far, noise, t = far_T.max().item(), noise_T.max().item(), int(far_T.argmax())
            if not far <= LEAK + ROUNDINGS * noise:
                raise Refuted(
                    f"position {t} moves by {far:.1%} with the tokens from {cut} on, in {mode} "
                    f"mode; by itself it moves by {noise:.1%}"
                )
            largest = max(largest, far)
    return f"{len(cuts)} cuts in {T} tokens, both modes: earlier positions move by {largest:.0e}"


def _learns_as_on_the_cpu(place: _Place) -> str:
    place.refuse_what_cannot_be_compared()
    tokens_BT = place.tokens(B=1, T=min(place.config.max_len, SOME))
    exact = place.gradients(place.exact, tokens_BT)
    if not torch.equal(exact[LOSS], _redrawn(place, tokens_BT)):
        raise Exempt("it draws numbers, which every device draws otherwise")
    rounding = _off(place.gradients(place.rough, tokens_BT), exact)
    if not rounding[ALL] <= MOST_ROUNDING:
        raise Exempt(f"rounding to bf16 alone moves its gradients by {rounding[ALL]:.0%}")
    off = _off(place.gradients(place.there, tokens_BT), exact)
    for name, far in off.items():
        is_whole = name in (ALL, LOSS)
        if not is_whole and exact[name].dim() < 2:
            continue
        if not far <= (CLOSE if is_whole else CLOSE_MATRIX) + ROUNDINGS * rounding[name]:
            raise Refuted(f"{name} is {far:.0%} off; rounding to bf16 makes {rounding[name]:.1%}")
    return f"{off[ALL]:.1%} off; rounding to bf16 makes {rounding[ALL]:.1%}"


def _reads_as_on_the_cpu(place: _Place) -> str:
    place.refuse_what_cannot_be_compared()
    tokens_BT = place.tokens(B=1, T=min(place.config.max_len, SOME))
    with torch.no_grad():
        return _close(place, tokens_BT, place.states(place.there.eval(), tokens_BT))


def _generates_as_it_reads(place: _Place) -> str:
    place.refuse_what_cannot_be_compared()
    if not takes_cache(place.exact):
        raise Exempt("it takes no cache, so generation reads from the start")
    T = min(place.config.max_len, 62)  # nearly two blocks of 32
    tokens_BT, cache, parts, start = place.tokens(B=2, T=T), Cache(), [], 0
    with torch.no_grad():
        for end in range(max(1, T - 5), T + 1):
            parts.append(place.states(place.there.eval(), tokens_BT[:, start:end], cache))
            if not cache.used:
                raise Exempt("it keeps nothing in the cache: generation reads from the start")
            cache.advance(end - start)
            start = end
        found = _close(place, tokens_BT, torch.cat(parts, 1))
    return f"a prompt of {max(1, T - 5)} tokens, then one by one: {found}"


def _redrawn(place: _Place, tokens_BT: Tensor) -> Tensor:
    torch.manual_seed(2)
    objective = Objective(place.exact.train())
    return objective(tokens_BT, tokens_BT.roll(-1, 1)).objective.detach()


def _close(place: _Place, tokens_BT: Tensor, there_BTC: Tensor) -> str:
    """How far the position that is off most is; refuted where rounding does not account for it."""
    exact_BTC, rough_BTC = (
        place.states(model.eval(), tokens_BT) for model in (place.exact, place.rough)
    )
    rounding = _apart(rough_BTC, exact_BTC).max().item()
    if not rounding <= MOST_ROUNDING:
        raise Exempt(f"rounding to bf16 alone moves a position by {rounding:.0%}")
    far_T = _apart(there_BTC, exact_BTC).amax(0)
    far, t = far_T.max().item(), int(far_T.argmax())
    found = f"{far:.1%} off; rounding to bf16 makes {rounding:.1%}"
    if not far <= CLOSE + ROUNDINGS * rounding:
        raise Refuted(f"position {t} is {found}")
    return found


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
    "gradients": _learns_as_on_the_cpu,
    "states": _reads_as_on_the_cpu,
    "cache": _generates_as_it_reads,
}
