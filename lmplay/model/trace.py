"""One row through a model that has shapes but no numbers: what each product costs and reads.

The row runs on the meta device. What follows from constants and token ids alone, as masks do, is
computed beside it on the CPU, so that the keys that a mask leaves are known.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import flex_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

aten = torch.ops.aten

LOW = -1e4  # a score this low, or added to one, has no share after the softmax
MOST_NUMBERS = 2**28  # in a tensor that is computed beside the row

# the two operands of a product, by position
_PRODUCTS = {
    aten.mm: (0, 1),
    aten.bmm: (0, 1),
    aten.mv: (0, 1),
    aten.dot: (0, 1),
    aten.addmm: (1, 2),
    aten.addmv: (1, 2),
    aten.baddbmm: (1, 2),
    aten.addbmm: (1, 2),
    aten._grouped_mm: (0, 1),
}
_LOOKUPS = {aten.embedding, aten._embedding_bag, aten.index_select, aten.index, aten.gather}
# these give back numbers of what they are given, be they fewer or more
_ALIASES = {
    *(aten.slice, aten.select, aten.expand, aten.cat, aten.stack, aten.split, aten.unbind),
    *(aten.split_with_sizes, aten.repeat, aten.constant_pad_nd, aten.unfold, aten.as_strided),
}
# the numbers of these stand elsewhere than those they were given
_MOVES = {
    *(aten.gather, aten.index, aten.index_select, aten.sort, aten.topk, aten.cumsum, aten.scatter),
    *(aten.scatter_add, aten.index_put, aten.roll, aten.flip, aten.embedding, aten.cat, aten.stack),
    *(aten.constant_pad_nd, aten.unfold, aten.as_strided, aten.repeat, aten.take_along_dim),
}
# views whose masks are the same views of masks
_TURNS = {
    *(aten.t, aten.transpose, aten.permute, aten.unsqueeze, aten.squeeze, aten.slice, aten.select),
}
_LIKE = {
    *(aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like, aten.rand_like),
    *(aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty, aten.new_empty_strided),
}


@dataclass(eq=False)
class Product:
    """One matrix product of the row."""

    flops: int  # as if every number of both operands counted
    weights: frozenset[int]  # ids of the parameters whose numbers one operand has; none in scores
    kept: int = 1  # of `pairs` pairs of a position and a key, those that a mask leaves
    pairs: int = 1

    @property
    def counted(self) -> float:
        """FLOPs with the keys really attended."""
        return self.flops * self.kept / self.pairs

    def keep(self, kept: Tensor) -> None:
        """Count only what this mask leaves."""
        self.kept, self.pairs = int(kept.sum()), kept.numel()


@dataclass(frozen=True, eq=False)
class _Fact:
    """What is known of a tensor of the row."""

    is_read: bool = True  # it depends on the tokens
    value: Tensor | None = None  # its numbers, on the CPU
    weights: frozenset[int] = frozenset()  # parameters whose numbers it has, perhaps scaled
    products: frozenset[Product] = frozenset()  # products whose numbers it has, perhaps scaled
    kept: Tensor | None = None  # True where it is neither very low nor a zero put there


_READ, _FIXED = _Fact(), _Fact(is_read=False)


class Trace(TorchDispatchMode):
    """While entered, watches what a model does with its parameters; `products` has the costs.

    Args:
        model: on the meta device, or on the CPU where its forward pass needs numbers.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.products: list[Product] = []
        self.looked_up: set[int] = set()  # ids of parameters, as in the next three
        self.multiplied: set[int] = set()
        self.convolved: set[int] = set()
        self.makes_logits: set[int] = set()
        self._facts = WeakTensorKeyDictionary()
        self._spoilt: dict[int, Tensor] = {}  # values that were written to with unknown numbers
        self._masks: dict[tuple, tuple] = {}  # what constants leave of sums and of products
        self._fused = _FusedAttention(self)
        for parameter in model.parameters():
            self._facts[parameter] = _Fact(is_read=False, weights=frozenset([id(parameter)]))
        for buffer in model.buffers():
            self._facts[buffer] = _FIXED

    def __enter__(self):
        super().__enter__()
        self._fused.__enter__()
        self._patched = _meta_is_a_device(self)
        self._patched.__enter__()
        return self

    def __exit__(self, *error):
        self._patched.__exit__(*error)
        self._fused.__exit__(*error)
        super().__exit__(*error)

    def tokens(self, ids_BT: Tensor, device: torch.device | str) -> Tensor:
        """Token ids as the model gets them."""
        tokens_BT = torch.empty_like(ids_BT, device=device)
        if tokens_BT.device.type == "cpu":
            tokens_BT.copy_(ids_BT)
        self._facts[tokens_BT] = _Fact(value=ids_BT)
        return tokens_BT

    def note_logits(self, logits_BTV: Tensor) -> None:
        """Say that these are logits: the products that they come from belong to the head."""
        for product in self._fact(logits_BTV).products:
            self.makes_logits |= product.weights

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = func._overloadpacket
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        facts = [self._fact(t) for t in given]
        made, value = self._run(func, packet, args, kwargs, given, facts)
        is_like = packet in _LIKE
        is_read = any(fact.is_read for fact in facts) and not is_like
        product = self._product(func, packet, args, kwargs, made)
        is_plain = product is None and not is_like and packet not in _MOVES
        kept = self._kept(packet, args, kwargs, given, facts) if is_plain else None
        is_row = packet in _LOOKUPS and self._looks_up(packet, args)
        values = tree_leaves(value) if value is not None else []
        for index, tensor in enumerate(tree_leaves(made)):
            if not isinstance(tensor, Tensor):
                continue
            passed = [] if is_row or is_like else self._passed(packet, tensor, given, facts)
            fact = _Fact(
                is_read=is_read,
                value=values[index] if values else None,
                weights=frozenset().union(*(f.weights for f in passed))
                if not is_read or all(f.weights for f in passed)
                else frozenset(),
                products=frozenset().union(*(f.products for f in passed)),
                kept=kept if kept is not None and _fits(kept, tensor.shape) else None,
            )
            if product:
                both = [facts[i] for i in _places(packet, args, given)]
                is_whole = not is_read and all(f.weights for f in both)
                weights = frozenset().union(*(f.weights for f in both)) if is_whole else frozenset()
                fact = _Fact(is_read, fact.value, weights, frozenset([product]))
            self._facts[tensor] = fact
        return made

    def _fact(self, tensor: Tensor) -> _Fact:
        fact = self._facts.get(tensor)
        if fact is None:
            is_number = tensor.dim() == 0 and tensor.device.type == "cpu"
            return _Fact(is_read=False, value=tensor) if is_number else _READ
        if fact.value is not None and fact.value.untyped_storage().data_ptr() in self._spoilt:
            return _Fact(fact.is_read, None, fact.weights, fact.products, fact.kept)
        return fact

    def _run(self, func, packet, args, kwargs, given, facts):
        """What the row's own tensors become, and the numbers where they are known."""
        if packet is aten._unique2:  # as if all were distinct: an upper bound
            tokens = args[0]
            made = tokens.flatten(), tokens.clone(), tokens.new_empty(tokens.numel())
            numbers = torch.arange(tokens.numel())
            return made, (numbers, numbers.view(tokens.shape), torch.ones_like(numbers))
        is_random = torch.Tag.nondeterministic_seeded in func.tags
        is_known = all(fact.value is not None for fact in facts) or packet in _LIKE
        is_known = is_known and not is_random
        if func is aten._local_scalar_dense.default and is_known:
            return facts[0].value.item(), None
        if not is_known:
            if func._schema.is_mutable and given:
                self._spoil(given[0])
            return func(*args, **kwargs), None
        try:
            made = func(*args, **kwargs)
        except (RuntimeError, NotImplementedError):  # its shape depends on numbers
            value = self._compute(func, packet, args, kwargs)
            return tree_map(lambda t: torch.empty_like(t, device=given[0].device), value), value
        outputs = [t for t in tree_leaves(made) if isinstance(t, Tensor)]
        if sum(t.numel() for t in outputs) > MOST_NUMBERS:
            return made, None
        return made, self._compute(func, packet, args, kwargs)

    def _compute(self, func, packet, args, kwargs):
        def known(value):
            if isinstance(value, Tensor):
                return value if packet in _LIKE else self._fact(value).value
            return torch.device("cpu") if isinstance(value, torch.device) else value

        args, kwargs = tree_map(known, (tuple(args), kwargs))
        if packet in _LIKE:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        return func(*args, **kwargs)

    def _spoil(self, tensor: Tensor) -> None:
        value = self._fact(tensor).value
        if value is not None:
            self._spoilt[value.untyped_storage().data_ptr()] = value

    def _passed(self, packet, made: Tensor, given, facts) -> list[_Fact]:
        """The facts of what `made` has the numbers of, one by one."""
        if packet in _ALIASES:
            return facts
        if packet in _LOOKUPS:
            return facts[:1]
        size = made.numel()
        return [fact for t, fact in zip(given, facts, strict=True) if t.numel() == size]

    def _product(self, func, packet, args, kwargs, made) -> Product | None:
        if packet is aten.convolution:
            self.convolved |= self._fact(args[1]).weights
            operands = [args[0], args[1]]
        elif packet in _PRODUCTS:
            operands = [args[i] for i in _PRODUCTS[packet]]
        else:
            return None
        facts = [self._fact(t) for t in operands]
        if packet is not aten.convolution:
            self.multiplied |= frozenset().union(*(f.weights for f in facts))
        product = Product(
            _flops(packet, args, kwargs, made, operands),
            frozenset().union(*(f.weights for f in facts)),
        )
        self.products.append(product)
        if not product.weights:
            for fact in facts:
                self._attend(product, fact)
        return product

    def _attend(self, product: Product, shares: _Fact) -> None:
        """A product with attention's shares: it and the scores count what the mask leaves."""
        kept = shares.kept
        if kept is None and not shares.is_read and shares.value is not None:
            kept = shares.value != 0
        if kept is None:
            return
        product.keep(kept)
        for scores in shares.products:
            if not scores.weights:
                scores.keep(kept)

    def _kept(self, packet, args, kwargs, given, facts) -> Tensor | None:
        """What is left of scores after an operation."""
        if packet in (aten.where,):
            return self._chosen(args)
        if packet in (aten.masked_fill, aten.masked_fill_):
            mask, kept = self._fact(args[1]).value, self._left(args[0])
            if mask is None or not _drops(self._number(args[2])):
                return kept
            return ~mask if kept is None else _both(kept, ~mask)
        if packet in (aten.tril, aten.triu):
            kept = self._left(args[0])
            whole = torch.ones(args[0].shape[-2:], dtype=torch.bool) if kept is None else kept
            return getattr(torch, packet.__name__)(whole.expand(*whole.shape), *args[1:])
        kept = None
        is_sum = packet in (aten.add, aten.add_, aten.sub)
        is_multiple = packet in (aten.mul, aten.mul_, aten.div)
        for tensor, fact in zip(given, facts, strict=True):
            own = fact.kept
            if own is None and fact.value is not None and len(given) > 1:
                if is_sum:
                    own = self._mask(fact, packet.__name__)
                elif is_multiple:
                    own = self._mask(fact, "product")
            elif own is not None:
                own = _viewed(packet, args, kwargs, tensor, own)
            if own is not None:
                kept = own if kept is None else _both(kept, own)
        return kept

    def _mask(self, fact: _Fact, of: str) -> Tensor | None:
        """What a constant leaves of what it is added to, or multiplied with; None for all."""
        if (id(fact), of) not in self._masks:
            value = fact.value
            left = value != 0 if of == "product" else (-value if of == "sub" else value) > LOW
            self._masks[id(fact), of] = fact, None if left.all() else left
        return self._masks[id(fact), of][1]

    def _chosen(self, args) -> Tensor | None:
        """What `where` leaves: of each side, unless that side is a very low number or zero."""
        condition = self._fact(args[0]).value
        if condition is None or len(args) < 3:
            return None
        sides = []
        for side in args[1:3]:
            number = self._number(side)
            left = self._left(side) if isinstance(side, Tensor) else None
            sides.append(torch.tensor(not _drops(number)) if left is None else left)
        if all(side.numel() == 1 and side for side in sides):
            return None
        try:
            return torch.where(condition, *sides)
        except RuntimeError:
            return None

    def _left(self, tensor: Tensor) -> Tensor | None:
        fact = self._fact(tensor)
        if fact.kept is None and fact.value is not None and fact.value.numel() > 1:
            return fact.value > LOW if fact.value.is_floating_point() else None
        return fact.kept

    def _number(self, value) -> float | None:
        """A single number that is known; None for anything else."""
        if isinstance(value, Tensor):
            value = self._fact(value).value
            return value.item() if value is not None and value.numel() == 1 else None
        return value

    def _looks_up(self, packet, args) -> bool:
        """True where rows that are vectors are read from a parameter, which is noted."""
        table, fact = args[0], self._fact(args[0])
        if packet is aten.index:
            width = table.dim() - sum(index is not None for index in args[1])
        else:
            width = 1 if packet in (aten.embedding, aten._embedding_bag) else table.dim() - 1
        if fact.is_read or not fact.weights or width > 1:
            return False  # a row that is a matrix is one expert of several
        self.looked_up |= fact.weights
        return True

    def attend_fused(self, q_BHTD, k_BHSD, v_BHSD, mask: Tensor | None, is_causal: bool) -> Tensor:
        """Note one call of scaled-dot-product attention; what it gives back, without numbers."""
        T, S = q_BHTD.shape[-2], k_BHSD.shape[-2]
        widths = q_BHTD.shape[-1] + v_BHSD.shape[-1]
        product = Product(2 * q_BHTD.shape[:-1].numel() * S * widths, frozenset())
        self.products.append(product)
        if mask is not None:
            fact = self._fact(mask)
            kept = fact.kept
            if fact.value is not None:
                kept = fact.value if fact.value.dtype == torch.bool else fact.value > LOW
            if kept is None:  # a mask without known numbers hides at least what comes later
                kept = torch.ones(T, S, dtype=torch.bool).tril(S - T)
            product.keep(kept.expand(*kept.shape[:-2], T, S))
        elif is_causal:
            product.kept, product.pairs = sum(min(t + 1, S) for t in range(T)), T * S
        made = q_BHTD.new_empty(*q_BHTD.shape[:-1], v_BHSD.shape[-1])
        self._facts[made] = _READ
        return made

    def attend_flex(
        self, q_BHTD, k_BHSD, v_BHSD, score_mod=None, block_mask=None, *_, **__
    ) -> Tensor:
        """Note one call of `flex_attention`, whose mask is a function of two positions."""
        mask = None
        if block_mask is not None:
            zero = torch.zeros((), dtype=torch.int64, device=q_BHTD.device)
            queries = torch.arange(q_BHTD.shape[-2], device=q_BHTD.device)[:, None]
            keys = torch.arange(k_BHSD.shape[-2], device=q_BHTD.device)[None, :]
            mask = block_mask.mask_mod(zero, zero, queries, keys)
        return self.attend_fused(q_BHTD, k_BHSD, v_BHSD, mask, is_causal=False)


class _FusedAttention(TorchFunctionMode):
    """Hands scaled-dot-product attention, which has no kernel on the meta device, to a trace."""

    def __init__(self, trace: Trace):
        super().__init__()
        self.trace = trace

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        q, k, v = (given[name] for name in names[:3])
        return self.trace.attend_fused(
            q, k, v, given.get("attn_mask"), given.get("is_causal", False)
        )


@contextmanager
def _meta_is_a_device(trace: Trace) -> Iterator[None]:
    """While entered, what refuses the meta device takes it: autocast, which then does nothing, and
    flex_attention, under whatever name an experiment has imported it."""
    autocast, flex = torch.autocast, flex_attention.flex_attention
    experiments = [m for name, m in sys.modules.items() if name.startswith("lmplay_experiment_")]
    users = [
        (module, name)
        for module in [*experiments, flex_attention]
        for name, value in vars(module).items()
        if value is flex
    ]
    torch.autocast = lambda device, *args, **kwargs: (
        nullcontext() if device == "meta" else autocast(device, *args, **kwargs)
    )
    for module, name in users:
        setattr(module, name, trace.attend_flex)
    try:
        yield
    finally:
        torch.autocast = autocast
        for module, name in users:
            setattr(module, name, flex)


def _places(packet, args, given) -> list[int]:
    """Where the operands of a product are among the tensors that it was given."""
    places = (0, 1) if packet is aten.convolution else _PRODUCTS[packet]
    return [next(i for i, t in enumerate(given) if t is args[place]) for place in places]


def _flops(packet, args, kwargs, made, operands) -> int:
    if packet in flop_registry:
        return flop_registry[packet](*args, **kwargs, out_val=made)
    if packet is aten._grouped_mm:
        return 2 * made.numel() * operands[0].shape[-1]
    return 2 * operands[0].numel()  # a vector is one of the operands


def _drops(number: float | None) -> bool:
    return number is not None and (number <= LOW or number == 0)


def _both(one: Tensor, other: Tensor) -> Tensor:
    try:
        return one & other
    except RuntimeError:  # they belong to different shapes: the stricter one is nearer
        return min(one, other, key=lambda kept: kept.float().mean().item())


def _fits(kept: Tensor, shape: torch.Size) -> bool:
    sizes = zip(reversed(kept.shape), reversed(shape), strict=False)
    return kept.dim() <= len(shape) and all(mine in (1, size) for mine, size in sizes)


def _viewed(packet, args, kwargs, tensor: Tensor, kept: Tensor) -> Tensor | None:
    """A mask after the operation that its tensor went through."""
    if packet in _TURNS:
        return packet(kept.expand(tensor.shape), *args[1:], **kwargs)
    if packet in (aten.sum, aten.mean, aten.amax, aten.max, aten.logsumexp):
        return None
    if packet in (aten.view, aten._unsafe_view, aten.reshape):
        shape = torch.Size(args[1])
        if -1 not in shape and shape[-2:] == tensor.shape[-2:] and kept.dim() <= 2:
            return kept
        return kept.expand(tensor.shape).reshape(args[1])
    return kept
