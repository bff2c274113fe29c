"""Kinds of mistakes that researchers make, each found by its own proof; what only looks so."""

from pathlib import Path

import pytest

from lmplay.catalog.entry import read_file
from lmplay.model.experiment import load_experiment
from lmplay.proofs import tiny

SOURCE = (Path(__file__).parents[2] / "experiments" / "gpt2ish.py").read_text()
INIT, BLOCKS = "        self.config = config\n", "        for block in self.blocks:\n"
NO_MASK = ("is_causal=T > 1", "is_causal=False")
NO_CACHE = ("if cache is not None:\n            k_", "if False:\n            k_")
SHARE = "    ff_dropout: float = 0.1"
NATS = "F.cross_entropy(self(tokens_BT).mT, targets_BT, reduction='none')"


def stream(*lines):
    """Lines that change the stream before the first block."""
    return BLOCKS, "".join(f"        {line}\n" for line in lines) + BLOCKS


def part(line):
    return INIT, f"{INIT}        {line}\n"


def late(*lines):
    old = "        nn.init.zeros_(self.position_table.weight)\n"
    return old, old + "".join(f"        {line}\n" for line in lines)


def top(*lines):
    """Lines before the first class but Config."""
    return "class Attention(", "\n".join(lines) + "\n\n\nclass Attention("


def method(name, *lines):
    body = "".join(f"        {line}\n" for line in lines)
    head = f"    def {name}(self, tokens_BT, targets_BT):\n"
    return "    def hidden(", f"{head}{body}\n    def hidden("


def method_of(signature, *lines):
    body = "".join(f"        {line}\n" for line in lines)
    return "    def hidden(", f"    def {signature}:\n{body}\n    def hidden("


def groups(text):
    body = f"    def parameter_groups(self):\n        return {text}\n\n"
    return "    def hidden(", f"{body}    def hidden("


def gate(start, opened, what="x_BTC.flip(1)"):
    """Something times what a parameter lets through; without another word, later tokens."""
    made = part(f"self.a = nn.Parameter(torch.tensor({start}))")
    return [made, stream(f"x_BTC = x_BTC + {opened} * {what}")]


PLANTED = {
    "an average that goes on": ("repeat", [
        part("self.mean = 0.0"),
        stream("self.mean = 0.9 * self.mean + 0.1 * x_BTC.mean().item()")]),
    "a counter in a buffer": ("repeat", [
        part("self.register_buffer('seen', torch.zeros(()))"), stream("self.seen += 1")]),
    "a list of the module": ("repeat", [top("SEEN = []"), stream("SEEN.append(T)")]),
    "an attribute of the class": ("repeat", [stream("Model.calls = T")]),
    "a queue": ("repeat", [
        top("from collections import deque"), part("self.last = deque(maxlen=4)"),
        stream("self.last.append(x_BTC.mean().item())")]),
    "a default that is filled": ("repeat", [
        ("    def hidden(self, tokens_BT: Tensor, cache=None)",
         "    def hidden(self, tokens_BT: Tensor, cache=None, kept=[])"),
        stream("kept.append(T)")]),
    "what only training counts": ("repeat", [
        part("self.n = 0"), stream("self.n += self.training")]),
    "a context variable": ("repeat", [
        top("import contextvars", "LAST = contextvars.ContextVar('last', default=0)"),
        stream("LAST.set(LAST.get() + self.training)")]),
    "a namespace": ("repeat", [
        top("import types", "STATS = types.SimpleNamespace(n=0)"),
        stream("STATS.n += self.training")]),
    "what belongs to a thread": ("repeat", [
        top("import threading", "LOCAL = threading.local()"),
        stream("LOCAL.n = getattr(LOCAL, 'n', 0) + self.training")]),
    "a weak dictionary": ("repeat", [
        top("import weakref", "SEEN = weakref.WeakKeyDictionary()"),
        stream("SEEN[self] = SEEN.get(self, 0) + self.training")]),
    "bytes": ("repeat", [top("COUNT = bytearray(8)"), stream("COUNT[0] += self.training")]),
    "a coin of its own": ("repeat", [
        part("import random; self.coin = random.Random(0)"),
        stream("x_BTC = x_BTC * (0.9 if self.training and self.coin.random() < 0.5 else 1)")]),
    "an attribute of a weight": ("repeat", [
        stream("self.head.weight.n = getattr(self.head.weight, 'n', 0) + self.training")]),
    "a remembering method of the model": ("repeat", [
        part("import functools; self.box = functools.lru_cache(1)(dict)"),
        stream("x_BTC = x_BTC * (1 + self.box().setdefault(T, x_BTC.std().item()))")]),
    "part of a partial": ("repeat", [
        part("import functools; self.note = functools.partial(list.append, [])"),
        stream("self.note(T)")]),
    "weights written in a pass": ("repeat", [
        stream("if self.training:", "    self.head.weight.data.mul_(0.999)")]),
    "a mode that is set": ("repeat", [stream("self.blocks[0].mlp.eval()")]),
    "another Parameter after a step": ("repeat", [method_of(
        "after_step(self)", "w = F.normalize(self.head.weight.data, dim=-1)",
        "self.head.weight = nn.Parameter(w)")]),
    "numbers shared after a step": ("repeat", [method_of(
        "after_step(self)", "self.head.weight.data = self.token_table.weight.data")]),
    "at that counts its calls": ("repeat", [part("self.calls = 0"), method_of(
        "at(self, progress)", "self.calls += 1")]),
    "at that never goes back": ("repeat", [part("self.size = 0"), method_of(
        "at(self, progress)", "self.size = max(self.size, progress)")]),
    "at that reads weights": ("repeat", [part("self.size = 0"), method_of(
        "at(self, progress)", "self.size = progress * self.head.weight.norm().item()")]),
    "at that draws": ("repeat", [part("self.size = 0"), method_of(
        "at(self, progress)", "self.size = torch.rand(()).item()")]),
    "at that writes weights": ("repeat", [method_of(
        "at(self, progress)", "self.head.weight.data.mul_(1 - progress)")]),
    "what a function counts": ("repeat", [
        stream("Model.hidden.n = getattr(Model.hidden, 'n', 0) + self.training")]),
    "what Config counts": ("repeat", [
        stream("n = getattr(self.config, 'n', 0) + self.training",
               "object.__setattr__(self.config, 'n', n)")]),
    "slots": ("repeat", [
        top("class Meter:", "    __slots__ = ('n',)", "", "", "METER = Meter()", "METER.n = 0"),
        stream("METER.n += self.training")]),
    "a method of something that counts": ("repeat", [
        top("class Meter:", "    n = 0", "", "    def add(self):", "        self.n += 1"),
        part("self.count = Meter().add"), stream("self.count()")]),
    "a method of a list": ("repeat", [part("self.note = [].append"), stream("self.note(T)")]),
    "a queue of the library": ("repeat", [
        top("import queue", "SEEN = queue.Queue()"), stream("SEEN.put(T)")]),
    "an attribute of a buffer": ("repeat", [
        part("self.register_buffer('one', torch.ones(()))"),
        stream("self.one.n = getattr(self.one, 'n', 0) + 1")]),
    "a map that runs on": ("repeat", [
        top("NEXT = map(float, range(10**9))"), stream("next(NEXT)")]),
    "weights as they were": ("repeat", [
        part("import functools; self.box = functools.lru_cache("
             "lambda: self.token_table.weight.std().item())"),
        stream("x_BTC = x_BTC + self.box() * x_BTC.tanh()")]),
    "after_step that draws": ("repeat", [method_of(
        "after_step(self)", "self.head.bias.data += torch.randn_like(self.head.bias)")]),
    "tokens that are written to": ("repeat", [
        ("        T = tokens_BT.shape[1]\n",
         "        T = tokens_BT.shape[1]\n        tokens_BT[:, 0] = 0\n")]),
    "behind a sigmoid": ("causal", gate(-20.0, "self.a.sigmoid()")),
    "behind a softplus": ("causal", gate(-25.0, "F.softplus(self.a)")),
    "behind an exp that is nothing": ("causal", gate(-40.0, "self.a.exp()")),
    "behind a relu that opens late": ("causal", gate(0.0, "F.relu(self.a - 1)")),
    "behind a relu that opens very late": ("causal", gate(0.0, "F.relu(self.a - 5)")),
    "behind a shut relu": ("causal", gate(-1.0, "F.relu(self.a)")),
    "behind a gate of three dimensions": ("causal", [
        part("self.a = nn.Parameter(torch.full((1, 1, config.width), -40.0))"),
        stream("x_BTC = x_BTC + self.a.exp() * x_BTC.flip(1)")]),
    "behind a gate for each block": ("causal", [
        part("self.a = nn.Parameter(torch.full((config.num_blocks, config.width), -40.0))"),
        stream("x_BTC = x_BTC + self.a[0].exp() * self.a[1].exp() * x_BTC.flip(1)")]),
    "behind a counter of passes": ("causal", [
        part("self.register_buffer('n', torch.zeros((), dtype=torch.int64))"),
        stream("self.n += self.training", "x_BTC = x_BTC + (self.n > 2000) * x_BTC.flip(1)")]),
    "behind a counter of steps": ("causal", [
        part("self.register_buffer('n', torch.zeros(()))"),
        method_of("after_step(self)", "self.n += 0.001"),
        stream("x_BTC = x_BTC + F.relu(self.n.clamp(max=1) - 0.5) * x_BTC.flip(1)")]),
    "no mask for a while": ("causal", [
        part("self.progress = 0.0"), method_of("at(self, progress)", "self.progress = progress"),
        stream("x_BTC = x_BTC + (0.6 < self.progress < 0.95) * x_BTC.flip(1)")]),
    "rows mixed for a while": ("rows apart", [
        part("self.progress = 0.0"), method_of("at(self, progress)", "self.progress = progress"),
        stream("x_BTC = x_BTC + (0.6 < self.progress < 0.95) * x_BTC.flip(0)")]),
    "rows behind a shut gate": ("rows apart", gate(-40.0, "self.a.exp()", "x_BTC.flip(0)")),
    "a ten millionth": ("causal", [stream("x_BTC = x_BTC + 1e-7 * x_BTC.roll(-1, 1)")]),
    "nats in bits": ("likelihood", [method("log_likelihood", f"return {NATS} / 1.4427")]),
    "nats over the length": ("likelihood", [
        method("log_likelihood", f"return {NATS} / tokens_BT.shape[1]")]),
    "nats with a ceiling": ("likelihood", [
        method("log_likelihood", f"return {NATS}.clamp(max=3.0)")]),
    "nats with a high ceiling": ("likelihood", [
        method("log_likelihood", f"return {NATS}.clamp(max=10.0)")]),
    "nats among the likeliest": ("likelihood", [method(
        "log_likelihood", "z_BTV = self(tokens_BT)",
        "chosen_BT = z_BTV.gather(-1, targets_BT.clamp(min=0)[..., None])[..., 0]",
        "return (z_BTV.topk(8, -1).values.logsumexp(-1) - chosen_BT).clamp(min=0)")]),
    "one in a hundred too few": ("likelihood", [method("log_likelihood", f"return 0.99 * {NATS}")]),
    "draws that are reported, too low": ("likelihood", [
        method("likelihood_draws", f"return 0.8 * {NATS}.expand(2, *targets_BT.shape)"),
        method("log_likelihood", f"return {NATS}")]),
    "nats that see their target late": ("likelihood", [method(
        "log_likelihood", "late_T1 = (torch.arange(tokens_BT.shape[1]) >= 6)[:, None]",
        "x_BTC = self.hidden(tokens_BT) + self.token_table(targets_BT.clamp(min=0)) * late_T1",
        "return F.cross_entropy(self.head(x_BTC).mT, targets_BT, reduction='none')")]),
    "nats that see their target": ("likelihood", [method(
        "log_likelihood",
        "x_BTC = self.hidden(tokens_BT) + self.token_table(targets_BT.clamp(min=0))",
        "return F.cross_entropy(self.head(x_BTC).mT, targets_BT, reduction='none')")]),
    "nats without a mask": ("likelihood", [NO_MASK, method("log_likelihood", f"return {NATS}")]),
    "groups of eight rows": ("rows apart", [
        stream("if len(x_BTC) % 8 == 0:", "    x_BTC = x_BTC - x_BTC[:8].mean(0)")]),
    "a mean over the batch": ("rows apart", [
        method("training_loss", f"return {NATS}.mean().expand(tokens_BT.shape)")]),
    "a share of the batch": ("rows apart", [
        method("training_loss", f"return {NATS} / len(tokens_BT)")]),
    "weights by the batch": ("rows apart", [method(
        "training_loss", f"nats_BT = {NATS}",
        "return nats_BT.square() / nats_BT.detach().mean()")]),
    "balance over the batch": ("rows apart", [method(
        "loss_terms", "x_BTC = self.hidden(tokens_BT)",
        "mean_C = x_BTC.softmax(-1).mean((0, 1))",
        "first = {'x': x_BTC, 'head': self.head, 'targets': targets_BT}",
        "return [first, {'penalty': mean_C.square().sum().expand(tokens_BT.shape)}]")]),
    "a start of its own": ("seed", [late(
        "own = torch.Generator().manual_seed(0)",
        "nn.init.normal_(self.blocks[0].mlp.up.weight, generator=own)")]),
    "the same dropout in every pass": ("seed", [stream(
        "if self.training:", "    with torch.random.fork_rng(devices=[]):",
        "        torch.manual_seed(7)",
        "        x_BTC = F.dropout(x_BTC, self.config.embed_dropout)")]),
    "dropout of a generator of its own": ("seed", [stream(
        "if not self.training:", "    return self.final_norm(x_BTC)",
        "own = torch.Generator().manual_seed(7)",
        "kept_BTC = torch.rand(x_BTC.shape, generator=own) >= self.config.embed_dropout",
        "x_BTC = x_BTC * kept_BTC")]),
    "a small term over the batch": ("rows apart", [method(
        "loss_terms", "x_BTC = self.hidden(tokens_BT)", "z_BT = self.head(x_BTC).logsumexp(-1)",
        "first = {'x': x_BTC, 'head': self.head, 'targets': targets_BT}",
        "return [first, {'penalty': (z_BT - z_BT.mean()).square(), 'weight': 1e-2}]")]),
    "a seed in forward": ("seed", [stream("torch.manual_seed(0)")]),
    "a seed in a block": ("seed", [(
        "        self.index = index\n",
        "        self.index = index\n        torch.manual_seed(1)\n")]),
    "a state that is set": ("seed", [
        part("torch.set_rng_state(torch.Generator().manual_seed(3).get_state())")]),
    "the seed set again": ("seed", [stream("torch.manual_seed(torch.initial_seed())")]),
    "the time of day": ("seed", [
        top("import time", "START = time.time()"),
        stream("x_BTC = x_BTC * (2 if time.time() - START > 60 else 1)")]),
    "the clock by another name": ("seed", [
        top("from time import monotonic as now", "START = now()"),
        stream("x_BTC = x_BTC * (2 if now() - START > 60 else 1)")]),
    "the hash of a text": ("seed", [
        part("self.salt = hash('salt') % 1000 / 1000"), stream("x_BTC = x_BTC + self.salt")]),
    "Python's random": ("seed", [
        part("import random; self.coin = random.random"),
        stream("x_BTC = x_BTC * (1 if self.coin() < 2 else 0)")]),
    "dropout that never ends": ("modes", [stream("x_BTC = F.dropout(x_BTC, 0.1)")]),
    "the optimizer's step": ("ruler", [top(
        "_TRUE = torch.optim.AdamW.step", "torch.optim.AdamW.step = lambda self: _TRUE(self)")]),
    "the clipping of gradients": ("ruler", [top(
        "_TRUE = nn.utils.clip_grad_norm_",
        "nn.utils.clip_grad_norm_ = lambda *a, **k: _TRUE(*a, **k)")]),
    "fp32 products in bf16": ("ruler", [
        top("torch.set_float32_matmul_precision('medium')")]),
    "a hook of all modules": ("ruler", [
        top("nn.modules.module.register_module_forward_hook(lambda *given: None)")]),
    "another checkpoint": ("ruler", [top(
        "import torch.utils.checkpoint as c", "_TRUE = c.checkpoint",
        "c.checkpoint = lambda *a, **k: _TRUE(*a, **k)")]),
    "another sum": ("ruler", [top(
        "import builtins", "_TRUE = sum", "builtins.sum = lambda *a: _TRUE(*a)")]),
    "a number left in torch": ("ruler", [
        stream("torch.calls = getattr(torch, 'calls', 0) + 1")]),
    "more threads": ("ruler", [top("torch.set_num_threads(torch.get_num_threads())")]),
    "another backend": ("ruler", [top("torch.backends.cuda.matmul.allow_tf32 = False")]),
    "another cross-entropy": ("ruler", [top(
        "_TRUE = F.cross_entropy", "F.cross_entropy = lambda *a, **k: 0.9 * _TRUE(*a, **k)")]),
    "another linear layer": ("ruler", [top(
        "_TRUE = nn.Linear.forward", "nn.Linear.forward = lambda self, x: _TRUE(self, x)")]),
    "a method of every tensor": ("ruler", [
        top("_TRUE = Tensor.log", "Tensor.log = lambda x: _TRUE(x)")]),
    "another softmax, from __init__": ("ruler", [
        top("_TRUE = F.softmax", "", "", "def _other(*a, **k):", "    return _TRUE(*a, **k)"),
        part("F.softmax = _other")]),
    "reading a file": ("imports", [top("open(__file__).close()")]),
    "reading a path": ("imports", [top("from pathlib import Path", "Path(__file__).read_text()")]),
    "starting a process": ("imports", [top("import subprocess", "subprocess.run(['true'])")]),
    "asking for an address": ("imports", [top(
        "import socket", "", "try:", "    socket.create_connection(('127.0.0.1', 9), 0.1)",
        "except OSError:", "    pass")]),
    "reading a file for the start": ("imports", [part("open(__file__).close()")]),
    "reading a file in a pass": ("imports", [stream("open(__file__).close()")]),
    "a log of each step": ("imports", [method_of("after_step(self)", "open(__file__).close()")]),
    "reading a file for generating": ("imports", [
        stream("if cache is not None:", "    open(__file__).close()")]),
    "a file of weights": ("imports", [late("torch.save(self.head.weight, '/dev/null')")]),
    "looking into a folder": ("imports", [top("import os", "os.listdir('.')")]),
    "a setting from outside": ("imports", [
        top("import os", "WIDE = os.environ.get('WIDE') == '1'")]),
    "reaching for the ruler": ("imports", [top(
        "import sys", "RULER = sys.modules.get('lmplay.model.objective')")]),
    "prompts of three": ("cache", [(
        "        q_BTC = self.query(x_BTC)\n",
        "        q_BTC = self.query(x_BTC * (1 if cache is None or T != 3 else 2))\n")]),
    "numbers under two names": ("only weights", [
        late("self.other = nn.Parameter(self.head.weight.data)"),
        stream("x_BTC = x_BTC + 0 * self.other.sum()")]),
    "a part of another's numbers": ("only weights", [
        late("self.other = nn.Parameter(self.head.weight.data[:2])"),
        stream("x_BTC = x_BTC + 0 * self.other.sum()")]),
    "layers in a list": ("only weights", [
        part("self.more = [nn.Linear(config.width, config.width)]"),
        stream("x_BTC = x_BTC + self.more[0](x_BTC)")]),
    "weights of half precision": ("only weights", [
        part("self.a = nn.Parameter(torch.ones(config.width, dtype=torch.bfloat16))"),
        stream("x_BTC = x_BTC * self.a")]),
    "parameters listed anew": ("only weights", [method_of(
        "parameters(self, recurse=True)", "return iter([self.head.weight])")]),
    "a group of nothing": ("optimizer", [
        groups("[{'params': [w for n, w in self.named_parameters() if 'qkv' in n]}]")]),
    "a group that never learns": ("optimizer", [
        groups("[{'params': [self.head.weight], 'lr_scale': 0}]")]),
    "groups that are used up": ("optimizer", [
        part("self.rest = [1]"),
        groups("[{'params': [self.head.weight]}] if self.rest and self.rest.pop() else []")]),
    "a parameter in two groups": ("optimizer", [
        groups("[{'params': [self.head.weight]}, {'params': [self.head.weight]}]")]),
    "a group with what nobody knows": ("optimizer", [
        groups("[{'params': [self.head.weight], 'lr': 1}]")]),
    "a group of what is no parameter": ("optimizer", [
        groups("[{'params': [self.head.weight * 2]}]")]),
}  # fmt: skip

HONEST = {
    "layers left out, by a name of its own": [
        (SHARE, f"    layer_skip: float = 0.2\n{SHARE}"),
        stream("if self.training and self.config.layer_skip:",
               "    here_B11 = torch.rand(len(x_BTC), 1, 1, device=x_BTC.device)",
               "    x_BTC = x_BTC * (here_B11 >= self.config.layer_skip)")],
    "noise, by a name of its own": [
        (SHARE, f"    noise: float = 0.1\n{SHARE}"),
        stream("if self.training and self.config.noise:",
               "    x_BTC = x_BTC + self.config.noise * torch.randn_like(x_BTC)")],
    "torch's LSTM": [
        part("self.mixer = nn.LSTM(config.width, config.width, batch_first=True)"),
        stream("state = {} if cache is None else cache.state(self)",
               "y_BTC, state['h'] = self.mixer(x_BTC, state.get('h'))", "x_BTC = x_BTC + y_BTC")],
    "torch's attention": [
        part("self.mha = nn.MultiheadAttention(config.width, 2, batch_first=True)"),
        stream("mask_TT = torch.ones(T, T, dtype=torch.bool, device=x_BTC.device).triu(1)",
               "x_BTC = x_BTC + self.mha(x_BTC, x_BTC, x_BTC, attn_mask=mask_TT)[0]"), NO_CACHE],
    "torch's weight norm": [
        part("self.mix = torch.nn.utils.parametrizations.weight_norm(nn.Linear(config.width, "
             "config.width))"),
        stream("x_BTC = x_BTC + self.mix(x_BTC)")],
    "a gate at zero": gate(0.0, "self.a", "x_BTC.tanh()"),
    "a remembered function of the length": [
        top("import functools", "", "", "@functools.lru_cache", "def twice(T):",
            "    return 2 * T"),
        stream("x_BTC = x_BTC + 0 * twice(T)")],
    "a convolution by fft": [
        part("self.taps = nn.Parameter(torch.randn(config.max_len, config.width) / 8)"),
        stream("f = torch.fft.rfft(x_BTC.float(), n=2 * T, dim=1)",
               "f = f * torch.fft.rfft(self.taps[:T].float(), n=2 * T, dim=0)",
               "x_BTC = x_BTC + torch.fft.irfft(f, n=2 * T, dim=1)[:, :T]"), NO_CACHE],
    "two of eight experts": [
        part("self.router = nn.Linear(config.width, 8)"),
        part("self.experts = nn.ModuleList(nn.Linear(config.width, config.width) "
             "for _ in range(8))"),
        stream("p_BTE = self.router(x_BTC).softmax(-1)", "top_BTK, at_BTK = p_BTE.topk(2, -1)",
               "w_BTE = torch.zeros_like(p_BTE).scatter(-1, at_BTK, top_BTK)",
               "x_BTC = x_BTC + sum(w_BTE[..., e, None] * f(x_BTC) for e, f in "
               "enumerate(self.experts))")],
    "a counter that only training moves": [
        part("self.register_buffer('n', torch.zeros(()))"), stream("self.n += self.training")],
    "torch's spectral norm": [
        part("self.mix = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(config.width, "
             "config.width))"),
        stream("x_BTC = x_BTC + self.mix(x_BTC)")],
    "fixed features from a generator": [
        part("own = torch.Generator().manual_seed(0)\n        self.register_buffer("
             "'fixed', torch.randn(4, config.width, generator=own))"),
        stream("x_BTC = x_BTC + (x_BTC @ self.fixed.mT).cos() @ self.fixed")],
    "a sum that goes on from pass to pass of training, and is used": [
        part("self.register_buffer('n', torch.zeros(()))"),
        stream("self.n += self.training", "x_BTC = x_BTC * (1 + self.n / (100 + self.n))")],
    "a complex recurrence": [
        part("self.phase = nn.Parameter(torch.rand(config.width))"),
        stream("a_C = torch.polar(torch.full_like(self.phase, 0.9), self.phase)",
               "h_BC = torch.zeros_like(x_BTC[:, 0]).to(torch.complex64)", "parts = []",
               "for t in range(T):", "    h_BC = a_C * h_BC + x_BTC[:, t]",
               "    parts.append(h_BC.real)",
               "x_BTC = x_BTC + torch.stack(parts, 1)"), NO_CACHE],
    "blocks whose activations are made again": [
        top("from torch.utils.checkpoint import checkpoint"),
        ("            x_BTC = block(x_BTC, cache)\n",
         "            if self.training:\n"
         "                x_BTC = checkpoint(block, x_BTC, use_reentrant=False)\n"
         "            else:\n                x_BTC = block(x_BTC, cache)\n")],
    "weights on a ball after each step": [method_of(
        "after_step(self)", "self.head.weight.data = F.normalize(self.head.weight.data, dim=-1)")],
    "at that follows progress": [
        part("self.size = 1.0"), method_of("at(self, progress)", "self.size = 1 + progress"),
        stream("x_BTC = x_BTC * self.size")],
    "its own likelihood": [method("log_likelihood", f"return {NATS}")],
    "a penalty for each row": [method(
        "loss_terms", "x_BTC = self.hidden(tokens_BT)",
        "mean_BC = x_BTC.softmax(-1).mean(1)",
        "first = {'x': x_BTC, 'head': self.head, 'targets': targets_BT}",
        "return [first, {'penalty': mean_BC.square().sum(1, True).expand(tokens_BT.shape)}]")],
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The baseline with edits."""

    def make(edits):
        source = SOURCE
        for old, new in edits:
            assert old in source, old
            source = source.replace(old, new)
        path = tmp_path_factory.mktemp("experiments") / "idea.py"
        path.write_text(source)
        return load_experiment(read_file(path)[0])

    return make


@pytest.mark.parametrize("name", PLANTED)
def test_a_kind_of_mistake_is_found_by_its_own_proof(made, monkeypatch, name):
    proof, edits = PLANTED[name]
    rest = {key: tiny.PROOFS[key] for key in {proof, "ruler"}}  # which puts back what it finds
    monkeypatch.setattr(tiny, "PROOFS", rest)

    assert proof in {p.name for p in tiny.check(made(edits)) if p.passed is False}


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_idea_is_not_taken_for_a_mistake(made, name):
    assert not [proof for proof in tiny.check(made(HONEST[name])) if proof.passed is False]


def test_a_value_that_tiny_hides_is_proved_too(made):
    edits = [(SHARE, f"    mask: str = 'causal'\n{SHARE}"),
             ('TINY = {"', 'TINY = {"mask": "causal", "'),
             ("self.num_heads = config.num_heads\n", "self.num_heads = config.num_heads\n"
              "        self.mask = config.mask\n"),
             ("is_causal=T > 1", "is_causal=self.mask == 'causal' and T > 1")]  # fmt: skip
    experiment = made(edits)
    found = {p.name: p for p in tiny.check(experiment, {"mask": "none"})}

    assert found["causal"].detail.startswith("with mask='none': position 0 moves by ")
    assert not [p for p in tiny.check(experiment) if p.passed is False]


def test_a_value_too_large_to_prove_with_is_named(made):
    found = {p.name: p for p in tiny.check(made([]), {"width": 1024, "num_blocks": 3})}

    assert found["values"].passed is None
    assert found["values"].detail == "not proved here with width=1024: TINY has other values"
