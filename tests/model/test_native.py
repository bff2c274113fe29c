"""gpt2 and llama are functions of transformers, of one set of weights, in both directions."""

import json
import shutil

import pytest
import torch

from lmplay.catalog.entries import resolve
from lmplay.errors import UserError
from lmplay.model.experiment import load_experiment
from lmplay.model.native import NATIVE, read_native, to_native

transformers = pytest.importorskip("transformers", reason="the extra `export` is not installed")

SIZES = {"vocab_size": 61, "n_positions": 24, "n_embd": 32, "n_layer": 3, "n_head": 4}


def tokens(T=24):
    return torch.randint(61, (2, T), generator=torch.Generator().manual_seed(1))


def randomised(model):
    """Biases and norms start at 0 and 1, where mistakes would not show."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.3 * torch.randn(weight.shape, generator=draw)
    return model.eval()


def theirs(**values):
    torch.manual_seed(0)
    return randomised(transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES, **values)))


def ours(name, values, weights):
    experiment = load_experiment(resolve(name))
    model = experiment.model(experiment.config(**values)).eval()
    model.load_state_dict(weights)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of transformers, and its model."""
    folder = tmp_path_factory.mktemp("gpt2")
    model = theirs()
    model.save_pretrained(folder)
    return folder, model


@torch.no_grad()
def test_a_saved_gpt2_answers_in_lmplay_as_in_transformers(saved):
    folder, model = saved
    name, values, weights = read_native(folder)

    assert name == "gpt2"
    torch.testing.assert_close(
        ours(name, values, weights)(tokens()), model(tokens()).logits, rtol=0, atol=1e-5
    )


@torch.no_grad()
def test_our_gpt2_answers_in_transformers_as_in_lmplay():
    experiment = load_experiment(resolve("gpt2"))
    values = {"vocab_size": 61, "max_len": 24, "num_blocks": 3, "width": 32, "num_heads": 4}
    config = experiment.config(**values)
    model = randomised(experiment.model(config, seed=0))
    made, weights = to_native("gpt2", vars(config), model.state_dict())
    native = transformers.GPT2LMHeadModel(transformers.GPT2Config.from_dict(made)).eval()
    told = native.load_state_dict(weights, strict=False)

    assert told.missing_keys == ["lm_head.weight"] and not told.unexpected_keys  # which is tied
    torch.testing.assert_close(
        native(tokens()).logits, model(tokens()), rtol=0, atol=1e-5 * model(tokens()).abs().max()
    )


def test_there_and_back_every_number_is_the_same(saved):
    name, values, weights = read_native(saved[0])
    config, state = to_native(name, values, weights)
    original = saved[1].state_dict()

    assert state.keys() == original.keys() - {"lm_head.weight"}
    assert all(torch.equal(state[key], original[key]) for key in state)
    known = json.loads((saved[0] / "config.json").read_text())
    assert {k: v for k, v in config.items() if known.get(k) != v} == {"attn_pdrop": 0.0}


def test_both_start_with_the_same_spreads():
    sizes = {"n_embd": 192, "n_layer": 3, "n_head": 4, "vocab_size": 500}
    torch.manual_seed(0)
    native = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).state_dict()
    experiment = load_experiment(resolve("gpt2"))
    values = {"vocab_size": 500, "width": 192, "num_blocks": 3, "num_heads": 4}
    config = experiment.config(**values)
    state = to_native("gpt2", vars(config), experiment.model(config, seed=0).state_dict())[1]

    for name, tensor in state.items():
        assert tensor.std().item() == pytest.approx(native[name].std().item(), rel=0.05), name
        assert tensor.mean().item() == pytest.approx(native[name].mean().item(), abs=1e-3), name


@torch.no_grad()
def test_shards_half_precision_and_the_hubs_shorter_names_are_read(saved, tmp_path):
    model = theirs().bfloat16()
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    model.transformer.save_pretrained(tmp_path / "short")
    config = saved[0] / "config.json"
    shutil.copy(config, tmp_path / "short")

    whole = ours(*read_native(tmp_path / "shards"))(tokens())
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert torch.equal(whole, ours(*read_native(tmp_path / "short"))(tokens()))
    torch.testing.assert_close(whole, model.float()(tokens()).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "mistral"}, "no experiment computes a 'mistral'"),
        ({"activation_function": "relu"}, "activation_function='relu'"),
        ({"n_inner": 77}, "n_inner=77"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"n_head": None}, "lacks n_head"),
        ({"n_layer": 4}, "lack transformer.h.3"),
    ],
)
def test_another_architecture_is_refused_by_what_differs(saved, tmp_path, changes, told):
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as raised:
        read_native(tmp_path)

    assert told in raised.value.problem
    assert raised.value.code == (5 if "n_layer" in changes else 2)
    if "model_type" in changes:
        assert all(name in raised.value.hint for name in NATIVE)


def test_pickles_and_damaged_files_are_not_read(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    torch.save(saved[1].state_dict(), tmp_path / "pytorch_model.bin")

    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="cannot be read") as raised:
        read_native(tmp_path)
    assert raised.value.code == 5
    file.unlink()
    with pytest.raises(UserError, match=r"holds no model\.safetensors") as raised:
        read_native(tmp_path)
    assert "only safetensors" in raised.value.hint
    index = {"weight_map": {"a": "../elsewhere/model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="no safetensors file beside it"):
        read_native(tmp_path)


LLAMA = {
    "vocab_size": 61, "max_position_embeddings": 24, "hidden_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 4, "intermediate_size": 100, "rope_theta": 500.0, "rms_norm_eps": 1e-6,
}  # fmt: skip


def saved_llama(folder, **values):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**LLAMA, **values})
    model = randomised(transformers.LlamaForCausalLM(config))
    model.save_pretrained(folder)
    return model


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("num_key_heads", [4, 2, 1])
def test_a_llama_answers_alike_there_and_here_and_there_again(tmp_path, tied, num_key_heads):
    values = {"tie_word_embeddings": tied, "num_key_value_heads": num_key_heads}
    model = saved_llama(tmp_path / "theirs", **values)
    name, values, weights = read_native(tmp_path / "theirs")
    mine = ours(name, values, weights)
    config, state = to_native(name, vars(mine.config), mine.state_dict())
    again = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(config)).eval()
    told = again.load_state_dict(state, strict=False)

    assert name == ("llama" if num_key_heads == 4 else "grouped_query")
    assert config["num_key_value_heads"] == num_key_heads
    assert values["rope_base"] == 500.0 and values["tied"] is tied
    assert told.missing_keys == ["lm_head.weight"] * tied and not told.unexpected_keys
    for other in (mine(tokens()), again(tokens()).logits):
        torch.testing.assert_close(other, model(tokens()).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling="),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e5}}, "rope_scaling="),
        ({"head_dim": 16}, "head_dim=16"),
        ({"intermediate_size": 64}, "intermediate_size=64"),
    ],
)
def test_another_llama_is_refused_by_what_differs(tmp_path, changes, told):
    saved_llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as raised:
        read_native(tmp_path)

    assert told in raised.value.problem


@torch.no_grad()
def test_a_llama_saved_without_its_head_is_read_where_it_is_tied(tmp_path):
    model = saved_llama(tmp_path, tie_word_embeddings=True)
    model.model.save_pretrained(tmp_path)

    torch.testing.assert_close(
        ours(*read_native(tmp_path))(tokens()), model(tokens()).logits, rtol=1e-5, atol=1e-5
    )
