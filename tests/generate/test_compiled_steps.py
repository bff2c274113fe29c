"""Compiled steps: the same logits, or the reason why there are none."""

import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

from lmplay.catalog.entries import resolve
from lmplay.generate.compiled_steps import CompiledSteps, can_compile
from lmplay.model.cache import Cache
from lmplay.model.decoding import generate, last_logits
from lmplay.model.experiment import load_experiment
from lmplay.model.sampler import GREEDY

COMPILE = torch.compile
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6]]
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="there is no C++ compiler")


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that a compiler is asked for; none of them is compiled."""
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph

    torch._dynamo.reset()
    monkeypatch.setattr(
        torch, "compile", lambda f, **options: COMPILE(f, backend=backend, **options)
    )
    return made


@pytest.fixture
def compiler(monkeypatch):
    """Puts a function in the place of the compiled one."""

    def use(function):
        monkeypatch.setattr(torch, "compile", lambda model, **options: function)

    return use


def model_of(name, max_len=16):
    experiment = load_experiment(resolve(name))
    config = experiment.config(**experiment.tiny | {"max_len": max_len})
    model = experiment.model(config, seed=0)
    with torch.no_grad():
        for weight in model.parameters():  # biases and the last layer of a branch begin at zero
            weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    return model.eval()


def written(model, read=None, prompts=PROMPTS, num_tokens=8, choice=GREEDY):
    """The logits of each step, and the tokens."""
    logits = []

    def choose(logits_BV, rows):
        logits.append(logits_BV.clone())
        return choice(logits_BV, rows)

    steps = generate(model, prompts, num_tokens, choose, model.config.max_len, read=read)
    tokens = list(steps)
    return torch.cat(logits), tokens


def assert_same(one, other, **tolerance):
    assert one[1] == other[1]
    torch.testing.assert_close(one[0], other[0], **tolerance or {"atol": 1e-5, "rtol": 1e-5})


@pytest.mark.parametrize("name", ["gpt2ish", "focus"])
def test_one_graph_serves_every_length_and_prompt(name, graphs):
    read, model = CompiledSteps(), model_of(name, max_len=150)

    for prompts, num_tokens in [(PROMPTS, 140), ([[7], [8]], 5), (PROMPTS, 160)]:
        expected = written(model, None, prompts, num_tokens)
        assert_same(written(model, read, prompts, num_tokens), expected)

    assert len(graphs) == 1
    (said,) = read.news
    assert said.startswith("compiled: ")


def test_one_prompt_of_one_token_is_the_same_graph(graphs):
    read, model = CompiledSteps(), model_of("gpt2ish")

    for prompt in ([7], [7, 8, 9]):
        assert_same(written(model, read, [prompt]), written(model, None, [prompt]))

    assert len(graphs) == 1


def test_another_number_of_rows_is_compared_and_told_for_itself(graphs):
    read, model = CompiledSteps(), model_of("gpt2ish")

    for prompts in (PROMPTS, PROMPTS + PROMPTS[:1], PROMPTS):
        assert_same(written(model, read, prompts), written(model, None, prompts))

    assert len(graphs) == len(read.news) == 2


def test_too_many_graphs_are_too_many(graphs):
    read, model = CompiledSteps(), model_of("gpt2ish")

    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):  # else the third is for all
        for num_rows in range(1, 7):
            prompts = [[3, 1, 4]] * num_rows
            assert_same(written(model, read, prompts), written(model, None, prompts))

    assert len(graphs) == 4
    assert read.news[-1].endswith("leave --compile out: it takes more than 4 graphs")


@needs_compiler
def test_what_the_compiler_made_gives_the_same_logits_in_bf16():
    torch._dynamo.reset()
    read, model = CompiledSteps(), model_of("gpt2ish")

    with torch.autocast("cpu", torch.bfloat16):
        given = [  # rounding may turn a near tie, and then the texts would go apart
            written(model, reader, choice=lambda logits_BV, rows: torch.arange(len(rows)) + 7)
            for reader in (None, read)
        ]
    expected, found = given
    far = (found[0] - expected[0]).square().mean().sqrt() / expected[0].std()
    assert read.news[0].startswith("compiled: ")
    assert 0 < far < 0.02


class Keeper(nn.Module):
    """A model that keeps what `remember` does with the cache."""

    def __init__(self, remember):
        super().__init__()
        self.config = type("Config", (), {"max_len": 16})
        self.table = nn.Embedding(10, 10)
        self.remember = remember

    def forward(self, tokens_BT, cache=None):
        x_BTC = self.table(tokens_BT)
        return x_BTC + self.remember(self, x_BTC, cache)


def window(module, x_BTC, cache):
    (seen_BSC,) = cache.append(module, x_BTC, keep=9)
    return seen_BSC[:, -9:].mean(-2, keepdim=True)


def state(module, x_BTC, cache):
    kept = cache.state(module)
    kept["sum"] = kept.get("sum", 0) + x_BTC.sum(1, keepdim=True)
    return kept["sum"]


def sink(module, x_BTC, cache):
    first_BTC = torch.ones_like(x_BTC[:, :1])
    new_BTC = x_BTC if cache.length else torch.cat([first_BTC, x_BTC], dim=1)
    (seen_BSC,) = cache.append(module, new_BTC)
    return seen_BSC.mean(-2, keepdim=True)


def late_window(module, x_BTC, cache):
    (seen_BSC,) = cache.append(module, x_BTC, keep=4 if cache.length else None)
    return seen_BSC[:, -4:].mean(-2, keepdim=True)


def only_at_first(module, x_BTC, cache):
    if not cache.length:
        cache.append(module, x_BTC)
    return x_BTC


def nothing(module, x_BTC, cache):
    return x_BTC


@pytest.mark.parametrize(
    ("remember", "why"),
    [
        (window, "it keeps a state, or not all positions"),
        (state, "it keeps a state, or not all positions"),
        (sink, "it keeps a state, or not all positions"),
        (late_window, "its steps keep something else than its first pass"),
        (only_at_first, "its steps keep less than its first pass"),
        (nothing, "it keeps nothing of earlier positions"),
    ],
)
def test_a_memory_that_does_not_grow_with_the_text_is_left_alone(remember, why, compiler):
    compiler(last_logits)
    read, model = CompiledSteps(), Keeper(remember)

    assert_same(written(model, read), written(model))

    assert read.news == [f"the model is not compiled, leave --compile out: {why}"]


def zeros(module, x_BTC, cache):
    (seen_BSC,) = cache.append(module, 0 * x_BTC)
    return seen_BSC.mean(-2, keepdim=True)


def test_a_memory_of_zeros_is_no_difference(compiler):
    compiler(last_logits)
    read, model = CompiledSteps(), Keeper(zeros)

    assert_same(written(model, read), written(model), atol=0, rtol=0)
    assert read.news[0].startswith("compiled: ")


def test_a_compiler_that_fails_costs_nothing_and_is_told_once(compiler):
    def fails(*given):
        raise RuntimeError("no compiler here\nand more")

    compiler(fails)
    read, model = CompiledSteps(), model_of("gpt2ish")

    assert_same(written(model, read), written(model), atol=0, rtol=0)
    assert read.news == ["the model is not compiled, leave --compile out: no compiler here"]


def other_logits(logits_BV, cache):
    return logits_BV.roll(1, -1)


def no_number(logits_BV, cache):
    return logits_BV * float("nan")


def forgetful(logits_BV, cache):
    for kept in cache._kept[0]:
        kept[..., cache.length, :] = 0
    return logits_BV


@pytest.mark.parametrize("change", [other_logits, no_number, forgetful])
def test_a_compiler_that_errs_is_found_at_the_first_step(change, compiler):
    compiler(lambda *given: change(last_logits(*given), given[-1]))
    read, model = CompiledSteps(), model_of("gpt2ish")

    assert_same(written(model, read), written(model), atol=0, rtol=0)
    (said,) = read.news
    assert "of their spread away from those without" in said


def test_what_was_interrupted_before_it_was_compared_is_compared_next_time(compiler):
    calls = []

    def interrupted(*given):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return last_logits(*given).roll(1, -1)

    compiler(interrupted)
    read, model = CompiledSteps(), model_of("gpt2ish")
    with pytest.raises(KeyboardInterrupt):
        written(model, read)

    assert_same(written(model, read), written(model), atol=0, rtol=0)
    assert "of their spread away" in read.news[0] and len(calls) == 2


def test_a_cpu_compiles_bf16_alone():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")

    assert can_compile(cpu, "bf16") and can_compile(gpu, "fp32") and not can_compile(cpu, "fp32")


def test_loading_this_does_not_load_the_compiler():
    code = "import lmplay.generate.compiled_steps, sys; "
    code += "print('torch._inductor.compile_fx' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert found.stdout == "False\n"


def test_torch_has_its_attention_back(graphs):
    written(model_of("gpt2ish"), CompiledSteps())

    kernel = torch._C._nn.scaled_dot_product_attention
    assert nn.functional.scaled_dot_product_attention is kernel


def test_an_opened_cache_may_be_passed_again_until_it_is_filled():
    cache, module = Cache(capacity=4), nn.Identity()
    first = torch.randn(1, 3, 2)
    cache.append(module, first)
    cache.advance(3)

    for _ in range(2):
        ((found, (kept,)),) = cache.opened()
        kept[:, 3] = 7
    cache.fill()
    cache.advance(1)
    (seen,) = cache.append(module, torch.zeros(1, 1, 2))

    assert found is module and kept.shape[-2] > 4
    assert torch.equal(seen[:, :4], torch.cat([first, torch.full((1, 1, 2), 7.0)], dim=1))
