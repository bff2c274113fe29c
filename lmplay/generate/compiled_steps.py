"""Steps of generation through torch.compile: the passes over one position of each row."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmplay.model.cache import Cache
from lmplay.model.decoding import last_logits
from lmplay.run.compiler import compiled_so_far

# B rows, T positions, V vocabulary, H heads, S positions attended to, D head width

_FAR = 0.05  # of the numbers' spread; rounding to bf16 moves them by about a hundredth
_MANY = 4  # graphs; past them, more time is lost than saved


def can_compile(device: torch.device, precision: str) -> bool:
    """Not in fp32 on a CPU: there it would take twice as long as packed weights do without."""
    return device.type != "cpu" or precision != "fp32"


class CompiledSteps:
    """Reads as `last_logits` does, but passes over one position by a compiled model.

    A graph, which mostly takes 20 s, serves a number of rows. The first pass through one is made
    without, too: where that gives or keeps other numbers, or compiling fails, or the model keeps
    nothing or a state, generation goes on without. The model is not to be trained or loaded into
    any more: its weights become part of the graph.

    Attributes:
        news: sentences on what came of it; whoever shows them takes them out.
    """

    def __init__(self):
        self.news: list[str] = []
        self._run: Callable[..., Tensor] | None = None
        self._num_judged = -1  # graphs of this process when the last one was compared
        self._is_off = False

    def __call__(self, model: nn.Module, tokens_BT: Tensor, cache: Cache | None) -> Tensor:
        """The logits of the token behind each row, shape (B, V)."""
        if cache is None:
            self._stop("it keeps nothing of earlier positions")
        elif cache.length and tokens_BT.shape[1] == 1 and not self._is_off:
            return self._step(model, tokens_BT, cache)
        return last_logits(model, tokens_BT, cache)

    def _step(self, model: nn.Module, tokens_BT: Tensor, cache: Cache) -> Tensor:
        made_BV, opened = None, cache.opened()
        if opened is None:
            self._stop("it keeps a state, or not all positions")
        else:
            this = _Pass(cache.length, opened)
            made_BV = self._compiled(model, tokens_BT, this)
        if made_BV is None:
            return last_logits(model, tokens_BT, cache)
        num_graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        if num_graphs == self._num_judged:
            cache.fill()
            return made_BV
        made = [made_BV, *this.written()]
        logits_BV = last_logits(model, tokens_BT, cache)
        self._judge(made, [logits_BV, *this.written()])
        self._num_judged = num_graphs
        return logits_BV

    def _compiled(self, model: nn.Module, tokens_BT: Tensor, this: "_Pass") -> Tensor | None:
        if self._run is None:
            self._run = torch.compile(last_logits, fullgraph=True)
        try:
            with _settings(tokens_BT.device):
                logits_BV = self._run(model, tokens_BT, this)
            this.must_be_whole()
            return logits_BV
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            return self._stop(f"it takes more than {_MANY} graphs")
        except Exception as error:  # the compiler's, or else it comes again without
            return self._stop((str(error).strip() or repr(error)).splitlines()[0])

    def _judge(self, made: list[Tensor], plain: list[Tensor]) -> None:
        far = max(_how_far(x, y) for x, y in zip(made, plain, strict=True))
        if far <= _FAR:
            self.news.append(str(compiled_so_far()))
        else:
            self._stop(f"its numbers are {far:.0%} of their spread away from those without")

    def _stop(self, why: str) -> None:
        if not self._is_off:
            self.news.append(f"the model is not compiled, leave --compile out: {why}")
        self._is_off = True


def _how_far(made: Tensor, plain: Tensor) -> float:
    if torch.equal(made, plain):  # all the same, they have no spread
        return 0.0
    far = (made.float() - plain.float()).norm() / (plain.float() - plain.float().mean()).norm()
    return float("inf") if far.isnan() else far.item()


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
        if self._modules[turn] is not module or keep is not None:
            raise RuntimeError("its steps keep something else than its first pass")
        for tensor, kept in zip(new, self._kept[turn], strict=True):
            kept.index_copy_(-2, self._end, tensor.to(kept.dtype))
        return tuple(kept.narrow(-2, 0, self._shape.shape[0]) for kept in self._kept[turn])

    def must_be_whole(self) -> None:
        if self._turn != len(self._modules):
            raise RuntimeError("its steps keep less than its first pass")

    def written(self) -> list[Tensor]:
        """What this pass has kept, copied."""
        return [kept[..., self.length, :].clone() for kept in itertools.chain(*self._kept)]


def _attention(query: Tensor, key: Tensor, value: Tensor, *args, **options) -> Tensor:
    """torch's, but for one position of as many heads by its formula."""
    is_plain = not args and options in ({}, {"is_causal": False})
    if query.shape[-2] != 1 or query.shape[1] != key.shape[1] or not is_plain:
        return _KERNEL(query, key, value, *args, **options)
    q_BHTD, k_BHSD, v_BHSD = query.float(), key.float(), value.float()
    scores_BHS1 = (k_BHSD * (q_BHTD * query.shape[-1] ** -0.5)).sum(-1, keepdim=True)
    y_BHTD = (v_BHSD * scores_BHS1.softmax(-2)).sum(-2, keepdim=True)
    return y_BHTD.to(query.dtype)


_KERNEL = F.scaled_dot_product_attention


@contextmanager
def _settings(device: torch.device) -> Iterator[None]:
    """How to compile. On a CPU, attention by its formula becomes one loop over keys and values in
    bf16, as they are kept; torch's own kernel takes six times as long for them as for fp32."""
    compiler = {"freezing": True, "cpp.enable_concat_linear": True}
    before = F.scaled_dot_product_attention
    try:
        if device.type == "cpu":
            F.scaled_dot_product_attention = _attention
        with (
            torch._inductor.config.patch(compiler),
            torch._dynamo.config.patch(recompile_limit=_MANY),
        ):
            yield
    finally:
        F.scaled_dot_product_attention = before
