"""Architectures that Hugging Face's transformers has too: names and weights, theirs and ours."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lmplay.errors import BAD_CHECKPOINT, UserError

Values = Mapping[str, object]

# an experiment's file: their class
NATIVE = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "grouped_query": "LlamaForCausalLM",
}

_ONLY = "only safetensors are read: transformers' save_pretrained writes them"


@dataclass(frozen=True)
class _Architecture:
    """How one experiment's Config and weights are called there."""

    model_type: str
    sizes: Mapping[str, str]  # of our Config: as their config calls them
    fixed: Mapping[str, object]  # what we compute; a config that says otherwise is another model
    same: Callable[[Values], Values]  # other words of a config for what is fixed
    names: Callable[[Values], dict[str, list[str]]]  # their tensors: ours, one under another
    prefix: str  # of their names, which the headless model saves without
    is_transposed: Callable[[str], bool]


def to_native(
    file: str, values: Values, weights: Mapping[str, Tensor]
) -> tuple[dict[str, object], dict[str, Tensor]]:
    """The config.json and the state dict with which transformers computes what `file` does.

    Args:
        file: one of NATIVE.
        values: of its Config.
        weights: its state dict.
    """
    ours = _ARCHITECTURES[file]
    config: dict[str, object] = {"model_type": ours.model_type, "architectures": [NATIVE[file]]}
    config |= {name: values[key] for key, name in ours.sizes.items()} | ours.fixed
    config |= {"initializer_range": 0.02} | _also(ours.model_type, values)
    state = {}
    for theirs, parts in ours.names(values).items():
        tensor = torch.cat([weights[name] for name in parts])
        state[theirs] = tensor.T.contiguous() if ours.is_transposed(theirs) else tensor
    return config, state


def from_native(
    config: Mapping[str, object], weights: Mapping[str, Tensor]
) -> tuple[str, dict[str, object], dict[str, Tensor]]:
    """The experiment's name, its Config values and its state dict, in fp32.

    Args:
        config: a config.json of transformers.
        weights: the state dict beside it.
    Raises:
        UserError: no experiment computes this architecture (the hint names those that one does),
            or a tensor is missing (code BAD_CHECKPOINT).
    """
    file = config.get("model_type")
    if all(file != ours.model_type for ours in _ARCHITECTURES.values()):
        known = ", ".join(f"{name} ({kind})" for name, kind in NATIVE.items())
        raise UserError(f"no experiment computes a {file!r} of transformers", f"these do: {known}")
    if file == "llama":
        config = _flat_rope(config)
        file = "llama" if _group(config) == 1 else "grouped_query"
    ours = _ARCHITECTURES[file]
    same = ours.same(config)
    for key, value in ours.fixed.items():
        if config.get(key, value) not in (value, same.get(key, value)):
            problem = f"this {file} has {key}={config[key]!r}, and experiments/{file}.py {value!r}"
            raise UserError(problem, hint="a copy of that file can be made to compute it")
    if missing := [key for key in ours.sizes.values() if key not in config]:
        raise UserError(f"config.json lacks {', '.join(missing)}")
    values = {key: config[name] for key, name in ours.sizes.items()}
    if file == "grouped_query":
        values["heads_per_group"] = _group(config)
    if ours.model_type == "llama":
        values["mlp_multiple"] = _mlp_multiple(config, values["width"])
    state = {}
    for theirs, names in ours.names(values).items():
        short = theirs.removeprefix(ours.prefix)
        if theirs not in weights and short not in weights:
            raise UserError(f"the weights lack {theirs}", code=BAD_CHECKPOINT)
        tensor = weights[theirs if theirs in weights else short].float()
        parts = (tensor.T if ours.is_transposed(theirs) else tensor).chunk(len(names))
        state |= {name: part.contiguous() for name, part in zip(names, parts, strict=True)}
    state.setdefault("head.weight", state["token_table.weight"])  # tied
    return file, values, state


def read_native(folder: Path) -> tuple[str, dict[str, object], dict[str, Tensor]]:
    """What `from_native` makes of a folder that transformers saved, in one file or in shards.

    Raises:
        UserError: as `from_native`; a file is missing or damaged, or holds no safetensors.
    """
    config = _read_json(folder / "config.json")
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if not (folder / names[0]).is_file() and index.is_file():
        places = _read_json(index).get("weight_map")
        names = sorted(set(places.values())) if isinstance(places, dict) else []
    if any(not name.endswith(".safetensors") or Path(name).name != name for name in names):
        raise UserError(f"{index} names what is no safetensors file beside it", hint=_ONLY)
    weights: dict[str, Tensor] = {}
    for name in names:
        try:
            with safe_open(folder / name, framework="pt") as file:
                weights |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise UserError(f"{folder} holds no {name}", hint=_ONLY) from None
        except (SafetensorError, OSError) as error:
            problem = f"{folder / name} cannot be read: {error}"
            raise UserError(problem, hint=_ONLY, code=BAD_CHECKPOINT) from None
    return from_native(config, weights)


def _gpt2_names(values: Values) -> dict[str, list[str]]:
    names = {
        "transformer.wte.weight": ["token_table.weight"],
        "transformer.wpe.weight": ["position_table.weight"],
    }
    for part in ("weight", "bias"):
        names[f"transformer.ln_f.{part}"] = [f"final_norm.{part}"]
        for i in range(values["num_blocks"]):
            theirs, ours = f"transformer.h.{i}", f"blocks.{i}"
            names |= {
                f"{theirs}.ln_1.{part}": [f"{ours}.attention_norm.{part}"],
                f"{theirs}.attn.c_attn.{part}": [
                    f"{ours}.attention.{name}.{part}" for name in ("query", "key", "value")
                ],
                f"{theirs}.attn.c_proj.{part}": [f"{ours}.attention.output.{part}"],
                f"{theirs}.ln_2.{part}": [f"{ours}.mlp_norm.{part}"],
                f"{theirs}.mlp.c_fc.{part}": [f"{ours}.mlp.up.{part}"],
                f"{theirs}.mlp.c_proj.{part}": [f"{ours}.mlp.down.{part}"],
            }
    return names


def _is_gpt2_transposed(theirs: str) -> bool:
    return ".c_" in theirs and theirs.endswith("weight")  # their Conv1D keeps (inputs, outputs)


def _llama_names(values: Values) -> dict[str, list[str]]:
    names = {
        "model.embed_tokens.weight": ["token_table.weight"],
        "model.norm.weight": ["final_norm.weight"],
    }
    if not values["tied"]:
        names["lm_head.weight"] = ["head.weight"]
    parts = {
        "input_layernorm": "attention_norm",
        "self_attn.q_proj": "attention.query",
        "self_attn.k_proj": "attention.key",
        "self_attn.v_proj": "attention.value",
        "self_attn.o_proj": "attention.output",
        "post_attention_layernorm": "mlp_norm",
        "mlp.gate_proj": "mlp.gate",
        "mlp.up_proj": "mlp.up",
        "mlp.down_proj": "mlp.down",
    }
    for i in range(values["num_blocks"]):
        for theirs, ours in parts.items():
            names[f"model.layers.{i}.{theirs}.weight"] = [f"blocks.{i}.{ours}.weight"]
    return names


def _flat_rope(config: Values) -> Values:
    """Their newer files hold the base and the kind of rotary positions in a dict of its own."""
    rope = config.get("rope_parameters") or {}
    kind = rope.get("rope_type", "default")
    base = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    scaling = config.get("rope_scaling") or (None if kind == "default" else rope)
    return {**config, "rope_theta": base, "rope_scaling": scaling}


def _group(config: Values) -> int:
    """How many of their heads share one of keys and values."""
    heads = config.get("num_attention_heads", 1)
    return heads // (config.get("num_key_value_heads") or heads)


def _mlp_multiple(config: Values, width: int) -> int:
    """The multiple that the hidden width is rounded up to: itself does."""
    hidden_width = config.get("intermediate_size", 0)
    if 3 * hidden_width < 8 * width:
        problem = f"this llama has intermediate_size={hidden_width}, below 8/3 of its width {width}"
        raise UserError(problem, hint="a copy of experiments/llama.py can be made to compute it")
    return hidden_width


def _also(model_type: str, values: Values) -> dict[str, object]:
    """What else a config says, where transformers' default would be another model."""
    if model_type == "gpt2":
        return {"attn_pdrop": 0.0}
    width, multiple = values["width"], values["mlp_multiple"]
    hidden_width = -(-8 * width // (3 * multiple)) * multiple
    group = values.get("heads_per_group", 1) or values["num_heads"]
    heads = {"num_key_value_heads": values["num_heads"] // group}
    rope = {"rope_parameters": {"rope_theta": values["rope_base"], "rope_type": "default"}}
    return {"intermediate_size": hidden_width, **heads, **rope}


_ARCHITECTURES = {
    "gpt2": _Architecture(
        model_type="gpt2",
        sizes={
            "vocab_size": "vocab_size",
            "max_len": "n_positions",
            "num_blocks": "n_layer",
            "width": "n_embd",
            "num_heads": "n_head",
            "embed_dropout": "embd_pdrop",
            "ff_dropout": "resid_pdrop",
        },
        fixed={
            "activation_function": "gelu_new",
            "n_inner": None,
            "layer_norm_epsilon": 1e-5,
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
            "tie_word_embeddings": True,
        },
        same=lambda config: {
            "activation_function": "gelu_pytorch_tanh",
            "n_inner": 4 * config.get("n_embd", 0),
        },
        names=_gpt2_names,
        prefix="transformer.",
        is_transposed=_is_gpt2_transposed,
    ),
    "llama": _Architecture(
        model_type="llama",
        sizes={
            "vocab_size": "vocab_size",
            "max_len": "max_position_embeddings",
            "num_blocks": "num_hidden_layers",
            "width": "hidden_size",
            "num_heads": "num_attention_heads",
            "rope_base": "rope_theta",
            "norm_eps": "rms_norm_eps",
            "tied": "tie_word_embeddings",
        },
        fixed={
            "hidden_act": "silu",
            "head_dim": None,
            "attention_bias": False,
            "mlp_bias": False,
            "rope_scaling": None,
        },
        same=lambda config: {
            "head_dim": config.get("hidden_size", 0) // config.get("num_attention_heads", 1),
        },
        names=_llama_names,
        prefix="model.",
        is_transposed=lambda theirs: False,
    ),
}
_ARCHITECTURES["grouped_query"] = _ARCHITECTURES["llama"]


def _read_json(path: Path) -> dict:
    try:
        made = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(made, dict):
        raise UserError(f"{path} holds no JSON object")
    return made
