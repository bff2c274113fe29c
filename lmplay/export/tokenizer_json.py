"""A run's tokenizer as the tokenizer.json and tokenizer_config.json of Hugging Face."""

import re
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Fast

from lmplay.data.tokenizers import END, Tokenizer, byte_of_character
from lmplay.disk import write_json


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_len: int) -> None:
    """Write both files.

    The ids of a text are the same, but for the text of a special token, which is that token. As
    in training and in lmp-generator, the end marker stands before a text; where special tokens
    are not wanted, it does not.
    """
    path = folder / "tokenizer.json"
    tokenizer.save(path)  # writes nothing where a name is enough
    end = tokenizer.token_bytes(tokenizer.end).decode()
    if path.is_file():
        fast = Fast.from_file(str(path))
    else:
        fast = _of_bytes() if tokenizer.name == "byte" else _of_tiktoken(tokenizer.name)
    fast.no_truncation()
    fast.no_padding()
    fast.add_special_tokens([AddedToken(end, special=True, normalized=False)])
    fast.post_processor = processors.TemplateProcessing(
        single=[end, "$A"], pair=[end, "$A", "$B"], special_tokens=[(end, tokenizer.end)]
    )
    fast.save(str(path))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "pad_token": end,
        "padding_side": "left",
        "model_max_length": max_len,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", config)


def _of_bytes() -> Fast:
    return _byte_level(models.BPE(byte_of_character() | {END: 256}, []), None)


def _of_tiktoken(name: str) -> Fast:
    """The same merges in the same order: of all pairs of tokens, the one with the lowest result."""
    import tiktoken

    return of_encoding(tiktoken.get_encoding(name))


def of_encoding(encoding) -> Fast:
    """The byte-level BPE that gives the ids of an encoding of tiktoken."""
    letters = {byte: letter for letter, byte in byte_of_character().items()}
    ranks = encoding._mergeable_ranks

    def word(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    vocab = {word(token): rank for token, rank in ranks.items()} | encoding._special_tokens
    merges = []
    for token in sorted(ranks, key=ranks.get):
        pairs = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = [(a, b) for a, b in pairs if a in ranks and b in ranks]
        known.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(word(a), word(b)) for a, b in known]
    fast = _byte_level(models.BPE(vocab, merges, ignore_merges=True), encoding._pat_str)
    special = [AddedToken(t, special=True, normalized=False) for t in encoding._special_tokens]
    fast.add_special_tokens(special)
    return fast


def _byte_level(model: models.BPE, pattern: str | None) -> Fast:
    fast = Fast(model)
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if pattern is not None:
        words = pre_tokenizers.Split(Regex(_for_oniguruma(pattern)), behavior="isolated")
        fast.pre_tokenizer = pre_tokenizers.Sequence([words, fast.pre_tokenizer])
    fast.decoder = decoders.ByteLevel()
    return fast


def _for_oniguruma(pattern: str) -> str:
    """tiktoken's pattern, where `{1,3}+` would repeat what is counted and `$` end a line.

    Possessive quantifiers only save time here: what follows each of them never matches what it
    would have to give back.
    """
    return re.sub(r"([+*?]|[0-9]\})\+", r"\1", pattern).replace(r"\s+$", r"\s+\z")
