"""The role of each parameter: what the forward pass does with it decides, never a name."""

from pathlib import Path

import pytest
from torch import nn

from lmplay.catalog.entries import entries, read_source
from lmplay.errors import UserError
from lmplay.model import counts
from lmplay.model.experiment import load_experiment
from lmplay.model.roles import ROLES, roles_of

MODEL = '''"""One line."""
from dataclasses import dataclass
import torch
import torch.nn.functional as F
from torch import nn

@dataclass(frozen=True)
class Config:
    vocab_size: int = 96
    max_len: int = 8

class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.a = nn.Parameter(torch.randn(96, 6))
        self.b = nn.Parameter(torch.randn({shape}))
        self.c = nn.Parameter(torch.randn(96, 6))
    def forward(self, tokens_BT, cache=None):
        a, b, c = self.a, self.b, self.c
        x = F.embedding(tokens_BT, a)
        {line}
        return x @ c.T
    {method}
'''


def role(line, shape="6, 6", method="", of="b"):
    """The role of parameter `of` in a model with this line in its forward pass."""
    source = MODEL.format(line=line, shape=shape, method=method)
    experiment = load_experiment(read_source(source, Path("idea.py"))[0])
    return roles_of(experiment, experiment.config())[of]


@pytest.mark.parametrize(
    ("line", "shape", "expected"),
    [
        ("x = F.linear(x, b)", "6, 6", "matrix"),
        ("x = x @ b.t().contiguous()", "6, 6", "matrix"),
        ("x = F.linear(x, b.to(torch.bfloat16).float())", "6, 6", "matrix"),
        ("x = F.linear(x, b / b.norm(dim=1, keepdim=True))", "6, 6", "matrix"),
        ("x = F.linear(x, F.normalize(b, dim=-1))", "6, 6", "matrix"),
        ("x = torch.einsum('btc,cd->btd', x, b)", "6, 6", "matrix"),
        ("x = sum(F.linear(x, w) for w in b.chunk(3))", "18, 6", "matrix"),
        ("x = torch.einsum('btc,ecd->bted', x, b).mean(2)", "4, 6, 6", "matrix"),
        ("x = torch.bmm(x.flatten(0, 1)[None].expand(4, -1, -1), b).sum(0)[None]", "4, 6, 6",
         "matrix"),
        ("i = (tokens_BT % 4).flatten(); x = torch.bmm(x.flatten(0, 1)[:, None], b[i])[:, 0][None]",
         "4, 6, 6", "matrix"),
        ("x = x @ (b[:, :2] @ b[:, 2:4].T)", "6, 6", "matrix"),
        ("x = x @ b.view(2, 3, 6).flatten(0, 1)", "6, 6", "matrix"),
        ("w = torch.cat([b, b]); x = F.linear(x, w)[..., :6]", "6, 6", "matrix"),
        ("x = x + b[torch.arange(x.shape[1])]", "8, 6", "table"),
        ("x = x + b.index_select(0, tokens_BT.flatten())[None]", "96, 6", "table"),
        ("x = x + b[tokens_BT % 5, 1]", "5, 2, 6", "table"),
        ("x = F.conv1d(x.mT, b, padding=1, groups=6).mT", "6, 1, 3", "conv"),
        ("x = x * b", "6", "vector"),
        ("x = F.rms_norm(x, (6,), b)", "6", "vector"),
        ("x = x * (x @ b.T)", "1, 6", "vector"),
        ("x = x * b[0]", "2, 6", "vector"),
        ("x = (x + b[: x.shape[1]]) @ c.T @ c", "8, 6", "vector"),
        ("pass", "6, 6", "vector"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_what_forward_does_decides(line, shape, expected):
    assert role(line, shape) == expected


def test_the_tables_of_tokens_and_the_head_are_found():
    assert role("pass", of="a") == "table"
    assert role("pass", of="c") == "head"
    assert role("c = F.normalize(a, dim=-1)", of="a") == "head"


@pytest.mark.parametrize("end", ["x = torch.tanh(x / 3)", "x = x * b.mean() + b[0, 0]"])
def test_what_follows_the_logits_product_does_not_hide_the_head(end):
    source = MODEL.format(line="x = x @ b", shape="6, 6", method="")
    source = source.replace("return x @ c.T", f"x = x @ c.T; {end}; return x")
    experiment = load_experiment(read_source(source, Path("idea.py"))[0])

    assert roles_of(experiment, experiment.config()) == {"a": "table", "b": "matrix", "c": "head"}


def test_a_tie_that_ends_makes_both_heads():
    at = "def at(self, progress): self.tied = progress < 0.4"
    line = "c = a if self.tied else c"

    assert role(line, method=at, of="a") == role(line, method=at, of="c") == "head"


def test_a_head_that_only_training_has_is_found():
    terms = (
        "def loss_terms(self, tokens_BT, targets_BT): "
        "return [{'x': F.embedding(tokens_BT, self.a), 'head': lambda x: x @ self.b.T}]"
    )

    assert role("pass", shape="96, 6", method=terms) == "head"


def test_an_experiment_may_name_a_role():
    groups = "def parameter_groups(self): return [{'params': [self.b], 'role': 'dynamics'}]"

    assert role("x = x @ b", method=groups) == "dynamics"
    assert role("x = x @ b", method=groups, of="c") == "head"


@pytest.mark.parametrize(
    "group", ["{'params': [self.b], 'rate': 1}", "{'params': [self.b]}, {'params': [self.b]}"]
)
def test_groups_that_cannot_be_meant_are_refused(group):
    with pytest.raises(UserError, match="parameter_groups"):
        role("pass", method=f"def parameter_groups(self): return [{group}]")


FILES = [entry for entry in entries(print).values() if entry.name == entry.file]


@pytest.mark.parametrize("entry", FILES, ids=[entry.name for entry in FILES])
@pytest.mark.every_experiment
def test_every_parameter_has_one_role_and_the_plain_ones_are_right(entry, monkeypatch):
    experiment = load_experiment(entry)
    config = experiment.config(**experiment.tiny)
    model = experiment.model(config, device="meta")
    traced = counts._traced
    monkeypatch.setattr(counts, "_traced", lambda *args: args[-1] == "meta" and traced(*args))
    roles = roles_of(experiment, config)  # without numbers
    named = {id(p): name for name, p in model.named_parameters()}

    assert list(roles) == list(named.values()) and set(roles.values()) <= set(ROLES)
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            found = roles[named[id(parameter)]]
            if parameter.dim() < 2 and not isinstance(module, nn.Conv1d):
                assert found == "vector"
            elif type(module) is nn.Embedding and found != "head":
                assert found == "table"
            elif type(module) is nn.Linear and key == "weight" and min(parameter.shape) > 1:
                is_head = module is getattr(model, "head", None)
                assert found in (["head"] if is_head else ["matrix", "head"])  # of a term
