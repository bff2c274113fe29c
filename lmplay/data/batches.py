"""The rows of training by number, a pure function of plan and seed, and those of validation."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache as cache_calls
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from lmplay.data import shard_cache as cache
from lmplay.data.bpe import BPE_BYTES
from lmplay.data.order import Mixture, Rows
from lmplay.data.preparation import (
    Note,
    Progress,
    note_download,
    note_shared_text,
    prepare,
)
from lmplay.data.rendering import columns_of
from lmplay.data.shards import Shards
from lmplay.data.sources import (
    content_of,
    documents,
    held_out_fraction,
    is_fraction_known,
    source_fingerprint,
)
from lmplay.data.tokenizers import Tokenizer, open_tokenizer
from lmplay.errors import UserError
from lmplay.model.objective import IGNORE
from lmplay.plan import FEW_HELD_OUT, Plan, Stage

# B rows, T positions

_EXAMPLE_TOKENS = 64  # of a prompt, and of what follows it
_WELL_FILLED = 0.9  # of the places in all rows
_FEW_LEARNED = 0.1  # of the tokens of a budget: hardly what was asked for


@dataclass
class Batch:
    """Rows of tokens with the token after each as its target.

    Attributes:
        tokens_BT: int64.
        targets_BT: int64, IGNORE where nothing is scored.
        num_targets: scored targets of the whole batch, also in a part of it.
    """

    tokens_BT: Tensor
    targets_BT: Tensor
    num_targets: int

    def cut(self, length: int) -> "Batch":
        """The same tokens in rows of this length, which divides that of the rows."""
        tokens_BT, targets_BT = (t.reshape(-1, length) for t in (self.tokens_BT, self.targets_BT))
        return Batch(tokens_BT, targets_BT, self.num_targets)

    def split(self, size: int) -> list["Batch"]:
        """Parts of `size` rows; the last one may have fewer."""
        parts = zip(self.tokens_BT.split(size), self.targets_BT.split(size), strict=True)
        return [Batch(tokens_BT, targets_BT, self.num_targets) for tokens_BT, targets_BT in parts]

    def of_rank(self, rank: int, world_size: int, size: int) -> list["Batch"]:
        """A process's rows (every `world_size`-th) in parts of `size`.

        Every process has the same number of rows: those that are missing have no target.
        """
        tokens_BT, targets_BT = self.tokens_BT, self.targets_BT
        missing = -len(tokens_BT) % world_size
        if missing:
            filler_BT = tokens_BT[:1].expand(missing, -1)
            tokens_BT = torch.cat([tokens_BT, filler_BT])
            targets_BT = torch.cat([targets_BT, torch.full_like(filler_BT, IGNORE)])
        mine = slice(rank, None, world_size)
        return Batch(tokens_BT[mine], targets_BT[mine], self.num_targets).split(size)


class Data:
    """The training and validation text of a plan as tokens, prepared where it is not yet.

    Training follows the stages row by row. A row is drawn from the datasets of its stage as
    `Mixture` says, and each dataset gives its rows in order, one epoch after another, each epoch
    permuted anew; a later stage goes on where an earlier one left the dataset. Stages follow one
    another without a gap, so a batch may hold rows of two, and every row is there once. With a
    budget the last stage never ends; without one, rows past the end have no target.

    Attributes:
        num_rows: of all stages; None where a budget of tokens decides.
        validation_tokens: targets scored, in all datasets' held-out text together.
        validation_bytes: of UTF-8 in the text of these targets.
        is_lossless: whether the tokenizer gives the held-out text back, so that bits per byte say
            what they seem to.
        trained_on: the share of the held-out text that is also in the training text, in the
            dataset where that is most; 0 where it is no more than usual.
        fingerprint: of the training text and how its stages mix it.
        validation_fingerprint: of the held-out tokens.
    """

    def __init__(
        self,
        plan: Plan,
        tokenizer: Tokenizer,
        seed: int,
        on_progress: Progress = lambda *numbers: None,
        note: Note = lambda text: None,
    ):
        self._plan, self._seed, self._end = plan, seed, tokenizer.end
        note = cache_calls(note)  # each sentence once
        share = max(1, plan.validation.tokens // len(plan.datasets))
        validation = plan.validation.model_copy(update={"tokens": share})
        self._held_out: dict[str, Shards] = {}
        self._training: dict[str, Shards] = {}
        self._rows: dict[str, Rows] = {}
        try:
            from_hub_first = sorted(plan.datasets, key=lambda name: plan.datasets[name].hub is None)
            for name in from_hub_first:  # what cannot be reached is told before long work
                dataset = plan.datasets[name]
                self._held_out[name], self._training[name] = prepare(
                    dataset, name, tokenizer, validation, on_progress, note
                )
            note_shared_text(plan.datasets, self._held_out, validation, note)
            self._held_out = {name: self._held_out[name] for name in plan.datasets}
            self._training = {name: self._training[name] for name in plan.datasets}
            for name, shards in self._training.items():
                if shards.num_tokens is not None and shards.num_tokens <= plan.max_len:
                    raise UserError(
                        f"{name} has {shards.num_tokens - 1:,} tokens to train on, fewer than the "
                        f"{plan.max_len:,} of a row",
                        hint="give it more text, or the plan shorter rows: --set sequence_length=N",
                    )
                if (filled := _share_filled(shards, plan.max_len)) < _WELL_FILLED:
                    note(
                        f"{name}: only {filled:.0%} of the places in its rows hold text, for it "
                        "ends early in the last; a budget of tokens counts them all"
                    )
                if (learned := _share_learned(shards)) < 0.5:
                    note(
                        f"{name}: {learned:.1%} of its tokens are learned, those of the answers; "
                        "a budget of tokens counts the prompts too"
                    )
            _refuse_few_learned(plan, map(_share_learned, self._training.values()))
            self._stages = [_Stage(stage, self._known) for stage in plan.stages]
            self.num_rows: int | None = None
            if plan.tokens is None:
                self.num_rows = sum(stage.rows(self._wait) for stage in self._stages)
        except BaseException:
            self.close()
            raise
        held_out = self._held_out.values()
        self.is_lossless = all(shards.is_lossless() for shards in held_out)
        self.trained_on = max(shards.trained_on for shards in held_out)
        self.validation_bytes = sum(shards.text_bytes() for shards in held_out)
        self.validation_tokens = sum(
            int(shards.window(1, _all(shards))[1].sum()) for shards in held_out
        )
        if self.validation_tokens < min(FEW_HELD_OUT, plan.validation.tokens):
            note(
                f"only {self.validation_tokens:,} tokens are held out: the validation loss says "
                "little; hold out more with --set validation.fraction=F, or --validation-data"
            )
        self.validation_fingerprint = cache.fingerprint(
            [shards.content_fingerprint() for shards in held_out]
        )
        self.fingerprint = cache.fingerprint(
            [[name, shards.fingerprint] for name, shards in self._training.items()],
            [stage.model_dump() for stage in plan.stages],
        )

    def rows(self, first: int, count: int, length: int | None = None) -> Batch:
        """`count` rows of training from number `first` on; waits where a source still streams.

        Args:
            length: tokens in a row of the batch: the plan's longest rows are cut in equal parts.
        Raises:
            UserError: preparing the source failed, or a shard is damaged.
        """
        windows = []
        for number in range(first, first + count):
            place = self._place(number)
            windows.append(None if place is None else self._window(*place))
        batch = self._batch(windows)
        return batch if length is None else batch.cut(length)

    def validation_batches(self, size: int) -> Iterator[Batch]:
        """The held-out text in batches of `size` rows, every target once; the last has fewer."""
        T = self._plan.max_len
        windows = []
        for shards in self._held_out.values():
            for start in range(0, _all(shards) - 1, T):
                windows.append(shards.window(start, T + 1))
                if len(windows) == size:
                    yield self._batch(windows)
                    windows = []
        if windows:
            yield self._batch(windows)

    def examples(self, num_rows: int) -> list[tuple[str, list[int], list[int]]]:
        """Name, prompt and truth, as tokens, of each dataset of the stage that was trained last.

        Args:
            num_rows: how many were trained on.
        """
        stage = self._stage_of(max(0, num_rows - 1))
        return [(name, *self._example(self._held_out[name])) for name in stage.names]

    def _example(self, shards: Shards) -> tuple[list[int], list[int]]:
        """The beginning of the held-out text and what follows.

        Of a document with a prompt of its own, that; else the text is cut in the middle. Both are
        cut to the sides' nearest 64 tokens, or half a row.
        """
        most = max(1, min(_EXAMPLE_TOKENS, self._plan.max_len // 2))
        tokens, learned = shards.window(1, min(_all(shards), 1 << 16))
        ends = np.append(np.flatnonzero(tokens == self._end), len(tokens))
        begins = np.append(0, ends[:-1] + 1)
        index = int(np.argmax(ends - begins >= 2))  # the first that has something to cut
        tokens = tokens[begins[index] : ends[index]]
        learned = learned[begins[index] : ends[index]]
        has_prompt = len(tokens) > 1 and not learned[0] and learned.any()
        at = int(learned.argmax()) if has_prompt else min(most, len(tokens) // 2)
        prompt = tokens[max(0, at - most) : at].tolist()
        return prompt or [self._end], tokens[at : at + most].tolist()

    def close(self) -> None:
        """Stop preparations in the background; what they finished stays in the cache."""
        for shards in [*self._training.values(), *self._held_out.values()]:
            shards.close()

    def _known(self, name: str) -> Rows:
        ends, complete = self._training[name].known()
        rows = self._rows.get(name)
        if rows is None or (len(rows.ends), rows.complete) != (len(ends), complete):
            rows = self._rows[name] = Rows(ends, complete, self._plan.max_len)
        return rows

    def _wait(self, name: str) -> None:
        """Return when more of a growing dataset is known."""
        self._training[name].wait(len(self._known(name).ends))

    def _place(self, number: int) -> tuple[str, int] | None:
        """The dataset of a row of the whole training, and its place among all it ever gives."""
        before: Counter[str] = Counter()
        for stage in self._stages:
            endless = self._plan.tokens is not None and stage is self._stages[-1]
            if endless or stage.holds(number, self._wait):
                index, drawn = stage.mixture.at(number)
                name = stage.names[index]
                return name, before[name] + drawn
            length = stage.rows(self._wait)
            for index, name in enumerate(stage.names):
                before[name] += stage.mixture.drawn(length, index)
            number -= length
        return None

    def _stage_of(self, number: int) -> "_Stage":
        """The stage of a row of the whole training; the last one's for what is beyond."""
        for stage in self._stages[:-1]:
            if stage.holds(number, self._wait):
                return stage
            number -= stage.rows(self._wait)
        return self._stages[-1]

    def _window(self, name: str, drawn: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of a dataset's row, and which are learned, with the first one's context."""
        rows = self._known(name)
        while not rows.complete and drawn >= rows.num_known:
            self._wait(name)
            rows = self._known(name)
        epoch, position = divmod(drawn, rows.num_known) if rows.complete else (0, drawn)
        T = self._plan.max_len
        row = rows.row(position, self._seed, name, epoch)
        return self._training[name].window(row * T, T + 1)

    def _batch(self, windows: list[tuple[np.ndarray, np.ndarray] | None]) -> Batch:
        B, T = len(windows), self._plan.max_len
        tokens_BT = np.full((B, T), self._end, np.int64)
        targets_BT = np.full((B, T), IGNORE, np.int64)
        for b, window in enumerate(windows):
            if window is not None:
                ids, learned = window
                tokens_BT[b, : len(ids) - 1] = ids[:-1]
                targets_BT[b, : len(ids) - 1] = np.where(learned[1:], ids[1:], IGNORE)
        num_targets = int((targets_BT != IGNORE).sum())
        return Batch(torch.from_numpy(tokens_BT), torch.from_numpy(targets_BT), num_targets)


def open_data(
    plan: Plan,
    seed: int,
    note: Note,
    on_progress: Progress = lambda *numbers: None,
    file: Path | None = None,
) -> tuple[Tokenizer, Data]:
    """The plan's tokenizer, trained where it is a new bpe:N, and its data, prepared.

    Args:
        file: the tokenizer.json of a run, which wins over what the plan names.
    Raises:
        UserError: the tokenizer or a source is missing or damaged; code NO_DATA where it cannot
            be reached.
    """
    note = cache_calls(note)
    if file is None and plan.tokenizer.startswith("bpe:"):
        file = _bpe_file(plan, note)
    tokenizer = open_tokenizer(plan.tokenizer, file=file)
    return tokenizer, Data(plan, tokenizer, seed, on_progress, note)


def text_of(plan: Plan) -> str:
    """A fingerprint of the text that a plan names, equal wherever that lies."""
    return cache.fingerprint({name: content_of(d) for name, d in plan.datasets.items()})


class _Stage:
    """A stage of the plan, whose length may depend on sources that still grow."""

    def __init__(self, stage: Stage, known: Callable[[str], Rows]):
        self.names = stage.datasets
        self.mixture = Mixture(stage.mixing, len(stage.datasets))
        self._epochs, self._known = Fraction(str(stage.epochs)), known

    def holds(self, number: int, wait: Callable[[str], None]) -> bool:
        """Whether the stage has a row of this number; waits until it can tell."""
        while True:
            length, final = self._length()
            if number < length or final:
                return number < length
            wait(self._growing())

    def rows(self, wait: Callable[[str], None]) -> int:
        """The number of its rows; waits until it is known."""
        while True:
            length, final = self._length()
            if final:
                return length
            wait(self._growing())

    def _length(self) -> tuple[int, bool]:
        known = [self._known(name) for name in self.names]
        length, final = self.mixture.epoch(
            [rows.num_known for rows in known], [rows.complete for rows in known]
        )
        return math.ceil(self._epochs * length), final

    def _growing(self) -> str:
        """The dataset to wait for: the one that knows the fewest rows."""
        growing = [name for name in self.names if not self._known(name).complete]
        return min(growing, key=lambda name: self._known(name).num_known)


def _bpe_file(plan: Plan, note: Note) -> Path:
    """The tokenizer.json of the plan's bpe:N in the cache, trained now where there is none."""
    for name, dataset in plan.datasets.items():
        if dataset.shards is None and not is_fraction_known(dataset, plan.validation.fraction):
            note_download(dataset, name, note)
    sources = [
        (dataset, held_out_fraction(dataset, plan.validation.fraction))
        for dataset in plan.datasets.values()
        if dataset.shards is None
    ]
    if not sources:
        raise UserError(
            f"{plan.tokenizer} is trained on text, and this plan has only shards of tokens",
            hint="give the plan the tokenizer that the shards were made with, such as gpt2",
        )
    about = [
        (source_fingerprint(dataset), columns_of(dataset), fraction)
        for dataset, fraction in sources
    ]
    mark = cache.fingerprint("bpe", plan.tokenizer, BPE_BYTES, about)
    name = f"{plan.tokenizer.replace(':', '-')}-{mark[:12]}"
    path = cache.cache_root() / "tokenizers" / f"{name}.json"

    def texts() -> Iterator[str]:
        for dataset, fraction in sources:
            left = BPE_BYTES // len(sources)
            for document in documents(dataset, "train", fraction):
                yield document.text
                left -= document.num_bytes
                if left <= 0:
                    break

    cache.make_folder(path.parent)
    with FileLock(path.with_suffix(".lock")):
        if not path.is_file():
            note(f"training the tokenizer {plan.tokenizer} on the plan's text")
            open_tokenizer(plan.tokenizer, texts=texts, note=note).save(path)
    return path


def _refuse_few_learned(plan: Plan, shares: Iterable[float]) -> None:
    """Raise a UserError where hardly any token of a budget would be trained on."""
    most = max(shares)
    if plan.tokens is not None and most < _FEW_LEARNED:
        first = next(iter(plan.datasets))
        raise UserError(
            f"of the {plan.tokens:,} tokens asked for about {most * plan.tokens:,.0f} would be "
            "trained on, those of the answers",
            hint="--set tokens=null trains for the plan's epochs instead; "
            f"--set datasets.{first}.learn_prompt=true learns the prompts too",
        )


def _share_filled(shards: Shards, length: int) -> float:
    """Of the places in an epoch's rows; 1 where the text still grows."""
    if shards.num_tokens is None:
        return 1.0
    num_targets = shards.num_tokens - 1
    return num_targets / (math.ceil(num_targets / length) * length)


def _share_learned(shards: Shards) -> float:
    """Of the tokens at the start of a text; 1 where there is none yet."""
    if shards.num_tokens is None:
        return 1.0
    return float(shards.window(0, min(shards.num_tokens, 1 << 16))[1].mean())


def _all(shards: Shards) -> int:
    assert shards.num_tokens is not None
    return shards.num_tokens
