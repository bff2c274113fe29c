"""Steps of generation through torch.compile: the passes over one position of each row."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch._inductor as inductor
import torch.nn.functional as F
from torch import Tensor, nn

from lmplay.generate.cache import Cache
from lmplay.generate.sampling import last_logits
from lmplay.runner import compiled_so_far, told_of_compiling

# B rows, V vocabulary, H heads, S positions attended to, D head width

_FAR = 0.05  # of the logits' spread; rounding to bf16 moves them by about a hundredth
_KERNEL = F.scaled_dot_product_attention
_OPTIONS = {"freezing": True, "cpp.enable_concat_linear": True}


def can_compile(device: torch.device, precision: str) -> bool:
    """Not in fp32 on a CPU: there it would take twice as long as packed weights do without."""
    return device.type != "cpu" or precision != "fp32"


class CompiledSteps:
    """Reads as `last_logits` does, but passes over one position by a compiled model.

    The first of them, which takes 20 s mostly, runs without, too: where its logits lie elsewhere,
    or compiling fails, or the model keeps nothing or a state, generation goes on without.

    Attributes:
        news: sentences on what came of it; whoever shows them takes them out.
    """

    def __init__(self):
        self.news: list[str] = []
        self._run: Callable[..., Tensor] | None = None
        self._is_judged = False
        self._is_off = False

    def __call__(self, model: nn.Module, tokens_BT: Tensor, cache: Cache | None) -> Tensor:
        """The logits of the token behind each row, shape (B, V)."""
        made_BV = None
        if cache is None:
            self._stop("it keeps nothing of earlier positions")
        elif cache.length and tokens_BT.shape[1] == 1 and not self._is_off:
            made_BV = self._step(model, tokens_BT, cache)
        if made_BV is not None and self._is_judged:
            return made_BV
        logits_BV = last_logits(model, tokens_BT, cache)
        if made_BV is not None:
            self._judge(made_BV, logits_BV)
        return logits_BV

    def _step(self, model: nn.Module, tokens_BT: Tensor, cache: Cache) -> Tensor | None:
        opened = cache.opened()
        if opened is None:
            return self._stop("it keeps a state, or a window of positions")
        if self._run is None:
            torch._dynamo.config.recompile_limit = 4  # past it, more time would be lost than saved
            self._run = torch.compile(last_logits, fullgraph=True)
        try:
            with _attention_by_its_formula(tokens_BT.device), inductor.config.patch(_OPTIONS):
                return self._run(model, tokens_BT, _Pass(cache.length, opened))
        except Exception as error:  # the compiler's, or else it comes again without
            return self._stop((str(error).strip() or repr(error)).splitlines()[0])

    def _judge(self, made_BV: Tensor, logits_BV: Tensor) -> None:
        self._is_judged = True
        far = (made_BV - logits_BV).square().mean().sqrt() / logits_BV.std()
        if far <= _FAR:
            self.news.append(told_of_compiling(compiled_so_far()))
        else:
            self._stop(f"its logits are {far:.0%} of their spread away from those without")

    def _stop(self, why: str) -> None:
        if not self._is_off:
            self.news.append(f"the model is not compiled: {why}")
        self._is_off = True


class _Pass:
    """A cache as a compiler reads it: the number that changes is the shape of a tensor."""

    def __init__(self, length: int, opened: list[tuple[nn.Module, tuple[Tensor, ...]]]):
        self._modules = [module for module, _ in opened]
        self._kept = [tensors for _, tensors in opened]
        some = self._kept[0][0]
        self._end = torch.full((1,), length, device=some.device)
        self._shape = some.new_empty(length + 1, 0)  # a shape of one would be taken for a constant
        self._turn = 0
        torch._dynamo.mark_dynamic(self._shape, 0)
        for kept in itertools.chain(*self._kept):
            if not hasattr(kept, "_dynamo_dynamic_indices"):  # of an earlier pass
                torch._dynamo.mark_dynamic(kept, kept.dim() - 2)

    @property
    def length(self) -> int:
        return self._shape.shape[0] - 1

    def append(self, module: nn.Module, *new: Tensor, keep: int | None = None):
        turn = self._turn
        self._turn += 1
        assert self._modules[turn] is module, "modules append in another order than before"
        for tensor, kept in zip(new, self._kept[turn], strict=True):
            kept.index_copy_(-2, self._end, tensor.to(kept.dtype))
        return tuple(kept.narrow(-2, 0, self._shape.shape[0]) for kept in self._kept[turn])


def _attention(q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, *args, **options) -> Tensor:
    """torch's, but for one position of as many heads by its formula."""
    is_plain = not args and options in ({}, {"is_causal": False})
    if q_BHTD.shape[-2] != 1 or q_BHTD.shape[1] != k_BHSD.shape[1] or not is_plain:
        return _KERNEL(q_BHTD, k_BHSD, v_BHSD, *args, **options)
    scaled_BHTD = q_BHTD.float() * q_BHTD.shape[-1] ** -0.5
    scores_BHS1 = (k_BHSD.float() * scaled_BHTD).sum(-1, keepdim=True)
    y_BHTD = (v_BHSD.float() * scores_BHS1.softmax(-2)).sum(-2, keepdim=True)
    return y_BHTD.to(q_BHTD.dtype)


@contextmanager
def _attention_by_its_formula(device: torch.device) -> Iterator[None]:
    """On a CPU, where a compiler makes it one loop over keys and values in bf16, as they are kept.

    torch's own kernel for one position takes six times as long in bf16 as in fp32.
    """
    try:
        if device.type == "cpu":
            F.scaled_dot_product_attention = _attention
        yield
    finally:
        F.scaled_dot_product_attention = _KERNEL
