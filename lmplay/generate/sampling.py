"""Prompts to text: whole characters as soon as they are certain, and where a row stops."""

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from lmplay.errors import UserError
from lmplay.model.decoding import Choose, generate


@dataclass
class Sample:
    """One row: what it was asked, and what it has written so far."""

    prompt: str
    text: str = ""
    tokens: list[int] = field(default_factory=list)  # of the answer, the end marker left out
    stop_reason: str | None = None  # "end" marker, "stop" string (not in text), "length"


def write(
    model: nn.Module,
    tokenizer,
    samples: Sequence[Sample],
    num_tokens: int,
    choose: Choose,
    max_len: int,
    *,
    stops: Sequence[str] = (),
    **options,
) -> Iterator[tuple[int, str]]:
    """Let the model go on from each sample's prompt, as a document that begins with it.

    The model reads the end marker, behind which every document begins, and then the prompt.

    Args:
        tokenizer: an lmplay.data.tokenizers.Tokenizer.
        samples: filled while this runs.
        stops: a row ends where its text comes to hold one of these; it is left out of the text.
        options: as of `generate`, and so are the others.
    Yields:
        A row's index and its next piece of text, as soon as it is certain: whole characters, and
        nothing that may yet turn out to begin a stop string.
    """
    writers = [_Writer(sample, tokenizer, num_tokens, stops) for sample in samples]
    prompt_ids = [[tokenizer.end, *tokenizer.encode(sample.prompt)] for sample in samples]
    steps = generate(
        model,
        prompt_ids,
        num_tokens,
        choose,
        max_len,
        tokenizer.end,
        is_last=lambda row, token: writers[row].add(token),
        **options,
    )
    for new in steps:
        for row, token in enumerate(new):
            if token is not None and writers[row].piece:
                yield row, writers[row].piece


class _Writer:
    """Turns the tokens of one row into text, and finds where it stops."""

    def __init__(self, sample: Sample, tokenizer, num_tokens: int, stops: Sequence[str]):
        if "" in stops:
            raise UserError("a stop string is empty", hint="leave --stop out to stop at none")
        self.sample = sample
        self.tokenizer = tokenizer
        self.num_tokens = num_tokens
        self.stops = stops
        self.piece = ""  # what the last token made certain
        self.held = ""  # what may yet begin a stop string
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> bool:
        """Take a token into the sample; True where the row ends with it."""
        sample = self.sample
        if token == self.tokenizer.end:
            sample.stop_reason = "end"
            data = b""
        else:
            sample.tokens.append(token)
            data = self.tokenizer.token_bytes(token)
            if len(sample.tokens) == self.num_tokens:
                sample.stop_reason = "length"
        text = self.held + self.decoder.decode(data, final=sample.stop_reason is not None)
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            sample.stop_reason = "stop"
        size = min(found, default=len(text))
        if sample.stop_reason is None:
            size -= _overlap(text, self.stops)
        self.piece, self.held = text[:size], text[size:]
        sample.text += self.piece
        return sample.stop_reason is not None


def _overlap(text: str, stops: Sequence[str]) -> int:
    """The length of the longest end of `text` with which a stop string may begin."""
    longest = max(map(len, stops), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-size:]) for stop in stops):
            return size
    return 0
