"""The models that are measured, the same for every side."""

from dataclasses import dataclass
from typing import Annotated

from torch import nn
from typer import Option

from lmplay.model.experiment import Experiment


@dataclass(frozen=True)
class Size:
    num_blocks: int
    width: int
    num_heads: int
    max_len: int
    rows: int  # of a micro-batch
    vocab_size: int = 50257

    @property
    def tokens(self) -> int:
        """In a micro-batch."""
        return self.rows * self.max_len

    def config(self, experiment: Experiment):
        """Of an experiment, without dropout."""
        wanted = {name: value for name, value in vars(self).items() if name != "rows"}
        none = {name: 0.0 for name in experiment.fields if name.endswith("_dropout")}
        return experiment.config(**wanted, **none)


SIZES = {
    "base": Size(6, 768, 12, 1024, 4),
    "small": Size(4, 256, 4, 256, 16),
    "tiny": Size(2, 32, 2, 64, 4, vocab_size=512),
    "124m": Size(12, 768, 12, 1024, 32),
}

Sizes = Annotated[
    str, Option("--sizes", help=f"Of {', '.join(SIZES)}; several with commas.", metavar="NAMES")
]
Precisions = Annotated[str, Option("--precisions", help="Of fp32, bf16.", metavar="NAMES")]


def transformers_gpt2(size: Size) -> nn.Module:
    """transformers' GPT2LMHeadModel without dropout, its own settings otherwise."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=size.vocab_size,
        n_positions=size.max_len,
        n_embd=size.width,
        n_layer=size.num_blocks,
        n_head=size.num_heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=size.vocab_size - 1,
        eos_token_id=size.vocab_size - 1,
    )
    config.loss_type = "ForCausalLM"  # what it is without a word, but then it warns
    return GPT2LMHeadModel(config)
