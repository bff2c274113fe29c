"""Tokens behind a prompt: the model's passes, and which rows are still being written."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from lmplay.errors import NUMERIC, UserError
from lmplay.model.abilities import has_hidden, takes_cache, writes_itself
from lmplay.model.cache import Cache
from lmplay.model.sampler import GREEDY, penalise

# B rows, T positions, V vocabulary

Choose = Callable[[Tensor, Sequence[int]], Tensor]
Read = Callable[[nn.Module, Tensor, Cache | None], Tensor]


@torch.no_grad()
def uses_cache(model: nn.Module) -> bool:
    """Whether generation runs on one position a step, found by a pass over one token.

    False where the forward has no cache parameter or keeps nothing in it: then each step runs on
    the whole text again. The model must be on a real device; a tiny one will do.
    """
    if not takes_cache(model):
        return False
    cache = Cache()
    tokens_BT = torch.zeros(1, 1, dtype=torch.int64, device=_device_of(model))
    model(tokens_BT, cache=cache)
    return cache.used


def kept_length(max_len: int) -> int:
    """How much of the text is read again when a context of `max_len` tokens is full: 3/4 of it.

    Learned positions cannot slide, so a new context begins with the last part of the text. With a
    quarter of it free again, a token costs three more positions on average.
    """
    return max(1, max_len * 3 // 4)


@torch.no_grad()  # in inference_mode, autocast would cast every weight anew at each step
def generate(
    model: nn.Module,
    prompt_ids: Sequence[Sequence[int]],
    num_tokens: int,
    choose: Choose,
    max_len: int,
    end: int | None = None,
    *,
    is_last: Callable[[int, int], bool] = lambda row, token: False,
    repetition_penalty: float = 1.0,
    first_row: int = 0,
    read: Read | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Iterator[list[int | None]]:
    """Write up to `num_tokens` behind each prompt.

    Autocast is the caller's: entered once around the whole loop, it casts each weight once. Rows
    are never padded: one pass over the length of the shortest prompt, then steps in which a row
    with prompt left takes its own next token. A model that keeps nothing in the cache runs on the
    whole text at each step. One with a method `generate(tokens_BT, num_tokens, choose)` is asked
    for `num_tokens` new tokens of each row instead; that `choose` takes logits alone, rows first.

    Args:
        model: an experiment's; in eval mode while this runs.
        prompt_ids: a row each, of any length from 1; what the context cannot hold is not read.
        num_tokens: new tokens of each row, at most.
        choose: logits_BV and the numbers of their rows to a token each; a Sampler.
        max_len: positions that the model can read. Past it, it goes on from the last
            `kept_length(max_len)` tokens.
        end: the end marker; a row ends with it.
        is_last: asked about each new (row, token); a row ends where it says so.
        repetition_penalty: see `penalise`; over the row's prompt and answer but for the end marker.
        first_row: the number of the first row, where several calls make one set of samples.
        read: takes a model, tokens_BT and a cache or None, and gives logits_BV; `last_logits`.
        note: gets one sentence when the context is full for the first time, and the like.
    Yields:
        At each step, each row's new token (its end marker too), None where it has none.
    Raises:
        UserError: the first logits are not finite, or a value is out of range.
    """
    if not repetition_penalty > 0:
        raise UserError(f"repetition penalty {repetition_penalty} is not above 0", hint="1 is none")
    if max(map(len, prompt_ids)) > max_len:
        note(f"the context holds {max_len} tokens: of the prompt, only the last are read")
    rows = _Rows(prompt_ids, num_tokens, max_len, end, is_last, first_row)
    was_training = model.training
    model.eval()
    try:
        if writes_itself(model):
            if repetition_penalty != 1:
                note("this model writes by itself: the repetition penalty is not used")
            yield from _by_the_model(model, rows, choose)
        else:
            reader = _Reader(model, rows, read or last_logits, note)
            yield from _by_steps(reader, rows, choose, repetition_penalty)
    finally:
        model.train(was_training)


def greedy_text(
    model: nn.Module, prompt_ids: Sequence[int], num_tokens: int, max_len: int
) -> list[int]:
    """The `num_tokens` likeliest tokens behind one prompt, each given those before it."""
    steps = generate(model, [prompt_ids], num_tokens, GREEDY, max_len)
    return [token for (token,) in steps]


class _Rows:
    """The texts, and which of them are still being written."""

    def __init__(self, prompt_ids, num_tokens: int, max_len: int, end, is_last, first: int):
        self.texts = [list(prompt[-max_len:]) for prompt in prompt_ids]
        self.num_left = [num_tokens] * len(self.texts)
        self.max_len = max_len
        self.end = end
        self.is_last = is_last
        self.first = first

    def writing(self) -> list[int]:
        return [row for row, left in enumerate(self.num_left) if left]

    def numbers(self, rows: list[int]) -> list[int]:
        return [self.first + row for row in rows]

    def add(self, rows: list[int], tokens: list[int]) -> list[int | None]:
        """Add a token to each of some rows; what `generate` yields for it."""
        new: list[int | None] = [None] * len(self.texts)
        for row, token in zip(rows, tokens, strict=True):
            self.texts[row].append(token)
            if self.num_left[row]:
                ends = self.is_last(row, token) or token == self.end
                self.num_left[row] = 0 if ends else self.num_left[row] - 1
                new[row] = token
        return new


def _by_steps(reader: "_Reader", rows: _Rows, choose: Choose, penalty: float):
    seen_BV = None
    T = min(map(len, rows.texts))
    while writing := rows.writing():
        logits_BV = reader.logits(T)
        if penalty != 1:
            if seen_BV is None:
                seen_BV = _seen(rows, logits_BV)
            logits_BV = penalise(logits_BV, seen_BV, penalty)
        choosing = [row for row in writing if len(rows.texts[row]) == T]
        if choosing:
            if len(choosing) < len(logits_BV):
                logits_BV = logits_BV[choosing]
            tokens_B = choose(logits_BV, rows.numbers(choosing))
            if seen_BV is not None:
                seen_BV[choosing, tokens_B] = True
            yield rows.add(choosing, tokens_B.tolist())
        T += 1
        for text in rows.texts:
            if len(text) < T:  # it has ended; it is carried along and its logits are not read
                text.append(text[-1])


def _by_the_model(model, rows: _Rows, choose: Choose):
    """As many tokens of a row at a time as the context holds, whatever rows are beside it.

    Rows of one length that have as many left are written together.
    """
    while writing := rows.writing():
        length, num_left = min((len(rows.texts[row]), rows.num_left[row]) for row in writing)
        alike = (length, num_left)
        group = [row for row in writing if (len(rows.texts[row]), rows.num_left[row]) == alike]
        size = length if length < rows.max_len else kept_length(rows.max_len)
        num_tokens = min(num_left, max(1, rows.max_len - size))
        contexts = [rows.texts[row][-size:] for row in group]
        tokens_BT = torch.tensor(contexts, device=_device_of(model))
        numbers = rows.numbers(group)
        new_BT = model.generate(
            tokens_BT, num_tokens, lambda x, numbers=numbers: choose(x, numbers)
        )
        if new_BT.shape != (len(group), num_tokens):
            wanted = (len(group), num_tokens)
            raise UserError(f"Model.generate gave {tuple(new_BT.shape)}, not {wanted} new tokens")
        for tokens_B in new_BT.T.tolist():
            yield rows.add(group, tokens_B)


class _Reader:
    """Gives the logits behind the texts, and reads only what it has not read, if the model can."""

    def __init__(self, model: nn.Module, rows: _Rows, read: Read, note: Callable[[str], None]):
        self.model = model
        self.read = read
        self.texts = rows.texts
        self.max_len = rows.max_len
        self.note = note
        self.device = _device_of(model)
        self.start = 0  # where the context begins in the texts
        longest = max(map(len, rows.texts)) + max(rows.num_left)
        self.capacity = min(rows.max_len, longest) + 1  # one spare, see Cache.opened
        self.cache = Cache(self.capacity) if takes_cache(model) else None

    def logits(self, T: int) -> Tensor:
        """The logits of the token behind the first T of each text, shape (B, V)."""
        if T - self.start > self.max_len:
            self._slide(T)
        first = self.start + (0 if self.cache is None else self.cache.length)
        tokens_BT = torch.tensor([text[first:T] for text in self.texts], device=self.device)
        logits_BV = self.read(self.model, tokens_BT, self.cache)
        if first == self.start and not torch.isfinite(logits_BV.amax(-1)).all():
            hint = "take an earlier checkpoint with --step"
            raise UserError("the model's numbers are not finite", hint=hint, code=NUMERIC)
        if self.cache is not None:
            self.cache.advance(T - first)
            if not self.cache.used:
                self.cache = None
        return logits_BV

    def _slide(self, T: int) -> None:
        num_kept = kept_length(self.max_len)
        if self.start == 0:
            self.note(
                f"the context of {self.max_len} tokens is full: the text goes on from its last "
                f"{num_kept}, each time it is"
            )
        self.start = T - num_kept
        if self.cache is not None:
            self.cache = Cache(self.capacity)


def last_logits(model: nn.Module, tokens_BT: Tensor, cache: Cache | None) -> Tensor:
    """The logits of the token behind each row, shape (B, V), in fp32 at least."""
    options = {} if cache is None else {"cache": cache}
    if has_hidden(model):
        x_BTC = model.hidden(tokens_BT, **options)
        logits_BTV = model.head(x_BTC[:, -1:])
    else:
        logits_BTV = model(tokens_BT, **options)
    logits_BV = logits_BTV[:, -1]
    return logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))


def _seen(rows: _Rows, logits_BV: Tensor) -> Tensor:
    seen_BV = torch.zeros_like(logits_BV, dtype=torch.bool)
    for row, text in enumerate(rows.texts):
        seen_BV[row, text] = True
    if rows.end is not None:
        seen_BV[:, rows.end] = False
    return seen_BV


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
