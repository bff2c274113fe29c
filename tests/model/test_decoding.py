import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lmplay.errors import NUMERIC, UserError
from lmplay.model.decoding import generate, greedy_text, kept_length, uses_cache
from lmplay.model.sampler import GREEDY, Sampler

EXPERIMENTS = sorted(
    path
    for path in (Path(__file__).parents[2] / "experiments").glob("*.py")
    if not path.name.startswith("_")
)
EVERY_EXPERIMENT = pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)


class Counter(nn.Module):
    """Says that each token is followed by the next number; `calls` are the lengths it was given."""

    def __init__(self, vocab_size):
        super().__init__()
        self.table = nn.Parameter(torch.eye(vocab_size).roll(1, dims=1))
        self.calls = []

    def forward(self, tokens_BT):
        self.calls.append(tokens_BT.shape[1])
        return self.table[tokens_BT]


def tiny(path, **values):
    """The experiment's model at its TINY size, with noise on all parameters: none stays zero.

    In double precision, where rounding does not grow into what looks like a mistake.
    """
    name = f"decoding_test_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    model = module.Model(module.Config(**{**module.TINY, **values}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model.double().eval()


def random_prompt(length, seed, vocab_size=61):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (length,), generator=generator).tolist()


@torch.no_grad()
def by_full_forward(model, prompt, num_tokens, max_len):
    """Greedy text and its logits by the plainest code: the whole context at each step."""
    context, new, logits = prompt[-max_len:], [], []
    for _ in range(num_tokens):
        if len(context) > max_len:
            context = context[-kept_length(max_len) :]
        logits.append(model(torch.tensor([context]))[0, -1])
        new.append(logits[-1].argmax().item())
        context = [*context, new[-1]]
    return new, torch.stack(logits)


def texts(*args, **kwargs):
    steps = list(generate(*args, **kwargs))
    return [[s[row] for s in steps if s[row] is not None] for row in range(len(args[1]))]


@EVERY_EXPERIMENT
@pytest.mark.every_experiment
@pytest.mark.parametrize("lengths", [[5], [7, 7, 7], [1, 4, 16], [40, 3, 16]], ids=str)
def test_greedy_text_with_the_cache_is_that_of_the_full_forward(path, lengths):
    model = tiny(path)
    if hasattr(model, "generate"):
        pytest.skip("it writes by itself")
    max_len = model.config.max_len
    prompts = [random_prompt(length, seed) for seed, length in enumerate(lengths)]
    logits = [[] for _ in prompts]

    def choose(logits_BV, rows):
        for row, logits_V in zip(rows, logits_BV, strict=True):
            logits[row].append(logits_V)
        return GREEDY(logits_BV, rows)

    written = texts(model, prompts, 40, choose, max_len)

    spread = []
    for row, prompt in enumerate(prompts):
        expected, expected_TV = by_full_forward(model, prompt, 40, max_len)
        assert written[row] == expected
        # what some do in fp32, whatever the weights are, rounds otherwise for one position
        tolerance = (
            1e-4 if "torch.float32" in path.read_text() or ".float()" in path.read_text() else 1e-7
        )
        logits_TV = torch.stack(logits[row])
        torch.testing.assert_close(logits_TV, expected_TV, atol=tolerance, rtol=tolerance)
        spread.append(expected_TV.std(dim=0).max())
    assert max(spread) > 0.1  # else the comparison says nothing; one alone may repeat one token


def test_the_baseline_reads_each_position_once():
    path = next(p for p in EXPERIMENTS if p.stem == "gpt2ish")
    model, read = tiny(path), []
    model.token_table.register_forward_hook(lambda _, args, __: read.append(args[0].shape[1]))

    texts(model, [random_prompt(5, 0)], 8, GREEDY, 16)

    assert read == [5, 1, 1, 1, 1, 1, 1, 1]


def test_only_the_last_position_goes_through_the_head():
    model, seen = tiny(next(p for p in EXPERIMENTS if p.stem == "gpt2ish")), []
    model.head.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))

    texts(model, [random_prompt(9, 0)], 3, GREEDY, 16)

    assert seen == [1, 1, 1]


class Casts(TorchDispatchMode):
    """Counts the casts of tensors of one shape."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and args[0].shape == self.shape:
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_autocast_casts_a_weight_once_and_not_at_each_step():
    model = tiny(next(p for p in EXPERIMENTS if p.stem == "gpt2ish")).float()
    with torch.autocast("cpu", torch.bfloat16), Casts(model.head.weight.shape) as casts:
        greedy_text(model, [1, 2], 10, 16)

    assert casts.count == 1


def test_a_model_without_a_cache_runs_on_the_whole_text():
    model = Counter(10)

    assert texts(model, [[3, 4], [7]], 5, GREEDY, 8) == [[5, 6, 7, 8, 9], [8, 9, 0, 1, 2]]
    assert model.calls == [1, 2, 3, 4, 5, 6]
    assert not uses_cache(model)


class IgnoresItsCache(Counter):
    def forward(self, tokens_BT, cache=None):
        return super().forward(tokens_BT)


def test_a_model_that_keeps_nothing_in_the_cache_runs_on_the_whole_text():
    model = IgnoresItsCache(10)

    assert texts(model, [[3, 4]], 3, GREEDY, 8) == [[5, 6, 7]]
    assert model.calls == [2, 3, 4]
    assert not uses_cache(model)


@EVERY_EXPERIMENT
@pytest.mark.every_experiment
def test_every_experiment_that_takes_a_cache_uses_it(path):
    assert uses_cache(tiny(path)) is ("cache=None" in path.read_text())


def test_a_full_context_is_told_once():
    notes = []

    texts(Counter(10), [[0]], 40, GREEDY, 8, note=notes.append)

    assert notes == [
        "the context of 8 tokens is full: the text goes on from its last 6, each time it is"
    ]


def test_a_context_of_one_token_is_enough():
    assert texts(Counter(10), [[1, 2], [5]], 3, GREEDY, 1) == [[3, 4, 5], [6, 7, 8]]


def test_a_row_ends_with_the_end_marker_and_others_go_on():
    assert texts(Counter(10), [[1], [6]], 5, GREEDY, 16, end=9) == [[2, 3, 4, 5, 6], [7, 8, 9]]


def test_no_pass_is_made_once_every_row_has_ended():
    model = Counter(10)
    texts(model, [[7], [8]], 100, GREEDY, 200, end=9)

    assert model.calls == [1, 2]


def test_a_row_ends_where_the_caller_says_so():
    written = texts(Counter(10), [[1], [2]], 9, GREEDY, 16, is_last=lambda r, t: (r, t) == (0, 4))

    assert written == [[2, 3, 4], [3, 4, 5, 6, 7, 8, 9, 0, 1]]


def test_generating_leaves_the_mode_as_it_was():
    model = Counter(10).train()
    greedy_text(model, [1], 2, 8)

    assert model.training


def test_logits_that_are_not_finite_are_refused():
    model = Counter(10)
    model.table.data[3, 3] = float("nan")

    with pytest.raises(UserError, match="not finite") as caught:
        greedy_text(model, [3], 2, 8)
    assert caught.value.code == NUMERIC


class WritesByItself(nn.Module):
    """Counts on, drawing each block at once."""

    def __init__(self):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.calls = []

    def generate(self, tokens_BT, num_tokens, choose):
        self.calls.append((*tokens_BT.shape, num_tokens))
        wanted_BT = tokens_BT[:, -1:] + torch.arange(1, num_tokens + 1)
        return choose(nn.functional.one_hot(wanted_BT % 100, 100) * 50.0)


def test_a_model_may_write_by_itself():
    model = WritesByItself()
    prompts = [[1], [2, 3], [30], [40]]

    written = texts(model, prompts, 10, Sampler(seed=0), 8, end=35)

    counted = [[last + i for i in range(1, 11)] for last in (1, 3)]
    assert written == [*counted, [31, 32, 33, 34, 35], [*range(41, 51)]]
    assert max(length + num for _, length, num in model.calls) <= 8


def test_a_penalty_that_cannot_be_used_is_told():
    notes = []
    texts(WritesByItself(), [[1]], 2, GREEDY, 8, repetition_penalty=2.0, note=notes.append)

    assert notes == ["this model writes by itself: the repetition penalty is not used"]


@EVERY_EXPERIMENT
@pytest.mark.every_experiment
def test_a_row_depends_on_its_number_and_not_on_its_neighbours(path):
    model = tiny(path)
    prompts = [random_prompt(length, length) for length in (3, 9, 1, 20)]

    together = texts(model, prompts, 20, Sampler(seed=5), 16)
    alone = [
        texts(model, [prompt], 20, Sampler(seed=5), 16, first_row=row)[0]
        for row, prompt in enumerate(prompts)
    ]

    assert together == alone


def test_seeds_and_rows_have_texts_of_their_own():
    model, prompts = tiny(EXPERIMENTS[0]), [[1]] * 3
    written = [tuple(t) for seed in (0, 1) for t in texts(model, prompts, 12, Sampler(seed), 16)]

    assert len(set(written)) == 6


def test_the_penalty_covers_the_prompt_and_the_answer_but_not_the_end_marker():
    table = torch.tensor([[6.0, 5.0, 4.0, 3.0, 2.5]])

    class Constant(Counter):
        def forward(self, tokens_BT):
            return table.expand(*tokens_BT.shape, -1)

    penalised = texts(Constant(5), [[4, 0], [4]], 4, GREEDY, 9, end=4, repetition_penalty=3.0)

    assert penalised == [[1, 2, 3, 4], [0, 1, 2, 3]]
