"""llama: the model of transformers to rounding, positions that only tell distances, fp32 norms."""

import pytest
import torch
from models import experiment, random_tokens
from torch import Tensor


def model_of(name: str = "llama", **values):
    made = experiment(name)
    return made.model(made.config(**{**made.tiny, **values}), seed=3).eval()


def test_the_winners_model_has_the_parameters_that_its_author_counted():
    made = experiment("noam_wide3")
    model = made.model(made.config(vocab_size=50304), device="meta")

    assert sum(weight.numel() for weight in model.parameters()) == 179_983_360


@pytest.mark.parametrize("width", [64, 256])
def test_a_matrix_hands_on_as_much_at_every_width_and_a_table_starts_at_its_own_spread(width):
    values = {"width": width, "num_heads": 4, "vocab_size": 997}
    model, tied = model_of(**values), model_of(**values, tied=True)
    x_BC = torch.randn(512, width, generator=torch.Generator().manual_seed(1))
    gpt2 = 0.02 * 768**0.5

    assert model.token_table.weight.std().item() == pytest.approx(1, rel=0.05)
    for layer in (model.blocks[0].attention.query, model.blocks[1].mlp.up, model.head, tied.head):
        assert layer(x_BC).std().item() == pytest.approx(gpt2, rel=0.1)
    written = model.blocks[0].attention.output(x_BC).std().item()
    assert written == pytest.approx(gpt2 / (2 * model.config.num_blocks) ** 0.5, rel=0.1)
    assert tied.token_table.weight is tied.head.weight


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_transformers_llama_with_the_same_weights(tied):
    transformers = pytest.importorskip("transformers")
    model = model_of(width=32, num_heads=4, num_blocks=3, max_len=40, tied=tied)
    config = model.config
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=config.hidden_width,
            num_hidden_layers=config.num_blocks,
            num_attention_heads=config.num_heads,
            max_position_embeddings=config.max_len,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=tied,
        )
    ).eval()
    parts = {"attention": "self_attn", "attention_norm": "input_layernorm"}
    parts |= {"mlp_norm": "post_attention_layernorm", "query": "q_proj", "key": "k_proj"}
    parts |= {"value": "v_proj", "output": "o_proj", "gate": "gate_proj", "up": "up_proj"}
    parts |= {"down": "down_proj", "blocks": "layers", "token_table": "embed_tokens"}
    parts |= {"final_norm": "norm"}
    named = {
        "lm_head.weight"
        if name == "head.weight"
        else "model." + ".".join(parts.get(part, part) for part in name.split(".")): weight
        for name, weight in model.state_dict().items()
    }
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    theirs.load_state_dict(named)
    tokens_BT = random_tokens(B=3, T=40)

    torch.testing.assert_close(theirs(tokens_BT).logits, model(tokens_BT), atol=1e-5, rtol=1e-5)


def test_a_turn_is_the_product_with_a_complex_number():
    rotary, rotate = (getattr(experiment("llama").module, name) for name in ("rotary", "rotate"))
    x_TD = torch.randn(7, 8, generator=torch.Generator().manual_seed(0))
    positions_T = torch.arange(5, 12)
    pairs = torch.complex(x_TD[:, :4], x_TD[:, 4:])
    angles = positions_T[:, None] * 100.0 ** (-torch.arange(0, 8, 2) / 8)
    turned = pairs * torch.polar(torch.ones_like(angles), angles)

    found = rotate(x_TD, rotary(positions_T, 8, 100.0))

    torch.testing.assert_close(found, torch.cat([turned.real, turned.imag], dim=-1))


def test_scores_depend_on_distances_alone():
    rotary, rotate = (getattr(experiment("llama").module, name) for name in ("rotary", "rotate"))
    q_TD, k_TD = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))

    def scores(start: int) -> Tensor:
        turn = rotary(torch.arange(start, start + 9), 16, 10000.0)
        return rotate(q_TD, turn) @ rotate(k_TD, turn).T

    torch.testing.assert_close(scores(0), scores(50), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(scores(0), q_TD @ k_TD.T, atol=0.1)


def test_norms_are_taken_in_fp32():
    norm = experiment("llama").module.RMSNorm(64, 1e-5)
    x_BTC = (300 * torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))).bfloat16()
    exact_BTC = x_BTC.double() * (x_BTC.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt()

    assert norm(x_BTC).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x_BTC), exact_BTC.bfloat16(), atol=0, rtol=2**-7)


def test_a_tied_head_is_the_token_table():
    tied, free = model_of(tied=True), model_of()

    assert tied.head.weight is tied.token_table.weight
    assert free.head.weight is not free.token_table.weight
