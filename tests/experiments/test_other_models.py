"""Architectures that are no transformer, or not quite: what each promises."""

import torch
from torch import Tensor, nn

from lmplay.catalog.entries import resolve
from lmplay.model.experiment import load_experiment


def model_of(name: str, **values):
    made = load_experiment(resolve(name))
    return made.model(made.config(**{**made.tiny, **values}), seed=3).eval()


def random_tokens(B: int, T: int, V: int = 61, seed: int = 1) -> Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


def moved_by(model: nn.Module, tokens_BT: Tensor, position: int) -> list[int]:
    """The positions whose logits depend on the token at this one."""
    changed_BT = tokens_BT.clone()
    changed_BT[:, position] = (changed_BT[:, position] + 1) % 61
    with torch.no_grad():
        distance_BT = (model(changed_BT) - model(tokens_BT)).abs().amax(-1)
    return (distance_BT.amax(0) > 0).nonzero().flatten().tolist()


def test_lfm2s_convolutions_alone_see_as_far_as_their_taps_add_up_to():
    model = model_of("lfm2", num_blocks=3, attention_every=0)
    for weight in model.parameters():  # at the start a third block moves less than fp32 can tell
        weight.data += 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))

    assert moved_by(model, random_tokens(B=2, T=16), 4) == list(range(4, 4 + 1 + 3 * 2))


def test_lfm2_attends_in_every_third_block():
    kinds = [
        type(block.attention).__name__
        for block in model_of("lfm2", num_blocks=7, attention_every=3).blocks
    ]

    assert kinds == ["ShortConvolution", "ShortConvolution", "Attention"] * 2 + ["ShortConvolution"]


def pattention(num_tokens: int = 24) -> nn.Module:
    module = load_experiment(resolve("tokenformer")).module
    torch.manual_seed(0)
    return module.Pattention(16, num_tokens)


def test_a_tokenformers_keys_say_directions_only():
    layer, x_BTC = pattention(), torch.randn(2, 5, 16)
    before_BTC = layer(x_BTC)
    layer.keys.data *= 7

    torch.testing.assert_close(layer(x_BTC), before_BTC)


def test_a_tokenformer_grows_by_keys_of_zeros_without_a_trace():
    layer, x_BTC = pattention(), torch.randn(2, 5, 16)
    before_BTC = layer(x_BTC)
    layer.keys = nn.Parameter(torch.cat([layer.keys, torch.zeros(8, 16)]))
    layer.values = nn.Parameter(torch.cat([layer.values, torch.randn(8, 16)]))

    torch.testing.assert_close(layer(x_BTC), before_BTC)


def test_a_tokenformers_tokens_have_no_order_and_stand_a_row_of_zeros():
    layer, x_BTC = pattention(), torch.randn(2, 5, 16)
    before_BTC, order = layer(x_BTC), torch.randperm(24)
    layer.keys.data, layer.values.data = layer.keys.data[order], layer.values.data[order]

    torch.testing.assert_close(layer(x_BTC), before_BTC)
    assert not layer(torch.zeros(1, 1, 16)).any()


def test_a_tokenformers_map_starts_with_the_spread_of_a_linear_layer():
    torch.manual_seed(0)
    layer = load_experiment(resolve("tokenformer")).module.Pattention(256, 512)
    x_BTC = torch.randn(4, 64, 256)

    assert (
        0.8
        < layer(x_BTC).std() / nn.functional.linear(x_BTC, 0.02 * torch.randn(256, 256)).std()
        < 1.25
    )
