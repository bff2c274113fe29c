import pytest
import torch
from hypothesis import given
from hypothesis.strategies import binary, lists, text
from torch import nn

from lmplay.errors import UserError
from lmplay.generate.sampling import Sample, write
from lmplay.model.sampler import GREEDY


class Bytes:
    """A tokenizer of bytes."""

    end = 256

    def encode(self, text):
        return list(text.encode())

    def token_bytes(self, token):
        return bytes([token])


class Scripted(nn.Module):
    """Says `script` after a prompt of `prompt_len` tokens, whatever the prompt is."""

    def __init__(self, script, prompt_len, vocab_size=257):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.script, self.prompt_len, self.vocab_size = script, prompt_len, vocab_size

    def forward(self, tokens_BT):
        token = self.script[tokens_BT.shape[1] - self.prompt_len]
        logits_BTV = torch.zeros(*tokens_BT.shape, self.vocab_size)
        logits_BTV[..., token] = 1
        return logits_BTV


def run_script(data, stops=(), prompt="", **options):
    script = [*data, *[Bytes.end] * 3]
    model = Scripted(script, prompt_len=1 + len(prompt.encode()))
    sample = Sample(prompt)
    num_tokens = options.pop("num_tokens", len(script))
    pieces = [piece for _, piece in write(
        model, Bytes(), [sample], num_tokens, GREEDY, 10**6, stops=stops, **options
    )]  # fmt: skip
    return sample, pieces


@given(data=binary(max_size=30))
def test_streamed_pieces_join_to_the_decoded_text(data):
    sample, pieces = run_script(data)

    assert "".join(pieces) == sample.text == data.decode(errors="replace")
    assert sample.tokens == list(data)
    assert sample.stop_reason == "end"


def test_a_character_is_shown_when_its_last_byte_is_there():
    _, pieces = run_script("aé€😀".encode())

    assert pieces == ["a", "é", "€", "😀"]


short_text = text(alphabet="ab\n€", max_size=20)


@given(said=short_text, stops=lists(text(alphabet="ab\n€", min_size=1, max_size=4), max_size=3))
def test_a_text_ends_before_the_first_stop_string(said, stops):
    sample, pieces = run_script(said.encode(), stops)

    assert "".join(pieces) == sample.text
    assert said.startswith(sample.text)
    assert not any(stop in sample.text for stop in stops)
    if sample.stop_reason == "stop":
        assert any(said[len(sample.text) :].startswith(stop) for stop in stops)
    else:
        assert (sample.stop_reason, sample.text) == ("end", said)


def test_what_only_began_like_a_stop_string_is_not_lost():
    sample, pieces = run_script(b"xabxabc", stops=["abd"], num_tokens=6)

    assert sample.text == "xabxab"
    assert pieces == ["x", "abx", "ab"]
    assert sample.stop_reason == "length"


def test_a_cut_character_is_marked_at_the_end():
    sample, _ = run_script("a€".encode(), num_tokens=3)

    assert sample.text == "a\ufffd"


def test_an_empty_stop_string_is_refused():
    with pytest.raises(UserError, match="empty"):
        run_script(b"a", stops=[""])


def test_the_model_reads_the_end_marker_and_then_the_prompt():
    read = []
    model = Scripted(b"de", prompt_len=4)
    model.register_forward_pre_hook(lambda _, args: read.append(args[0].tolist()))
    sample = Sample("abc")
    list(write(model, Bytes(), [sample], 2, GREEDY, 99))

    assert read == [[[Bytes.end, *b"abc"]], [[Bytes.end, *b"abcd"]]]
    assert sample.text == "de"
