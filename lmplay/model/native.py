"""Architectures that Hugging Face's transformers has too: names and weights, theirs and ours."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lmplay.errors import BAD_CHECKPOINT, UserError

NATIVE = {"gpt2": "GPT2LMHeadModel"}  # an experiment's file, which is their model_type: their class

_SIZES = {  # of gpt2's Config: as GPT2Config calls them
    "vocab_size": "vocab_size",
    "max_len": "n_positions",
    "num_blocks": "n_layer",
    "width": "n_embd",
    "num_heads": "n_head",
    "embed_dropout": "embd_pdrop",
    "ff_dropout": "resid_pdrop",
}
_FIXED = {  # what gpt2 computes; a GPT2Config that says otherwise is another model
    "activation_function": "gelu_new",
    "n_inner": None,
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
_ONLY = "only safetensors are read: transformers' save_pretrained writes them"


def to_native(
    file: str, values: Mapping[str, object], weights: Mapping[str, Tensor]
) -> tuple[dict[str, object], dict[str, Tensor]]:
    """The config.json and the state dict with which transformers computes what `file` does.

    Args:
        file: one of NATIVE.
        values: of its Config.
        weights: its state dict.
    """
    config: dict[str, object] = {"model_type": file, "architectures": [NATIVE[file]]}
    config |= {theirs: values[ours] for ours, theirs in _SIZES.items()} | _FIXED
    config |= {"attn_pdrop": 0.0, "initializer_range": 0.02}
    state = {}
    for theirs, ours in _gpt2_names(values["num_blocks"]).items():
        tensor = torch.cat([weights[name] for name in ours])
        state[theirs] = tensor.T.contiguous() if _is_transposed(theirs) else tensor
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
    if file not in NATIVE:
        known = ", ".join(f"{name} ({kind})" for name, kind in NATIVE.items())
        raise UserError(f"no experiment computes a {file!r} of transformers", f"these do: {known}")
    for key, value in _FIXED.items():
        same = (value, "gelu_pytorch_tanh") if key == "activation_function" else (value,)
        if key == "n_inner":
            same = (value, 4 * config.get("n_embd", 0))
        if config.get(key, value) not in same:
            problem = f"this {file} has {key}={config[key]!r}, and experiments/{file}.py {value!r}"
            raise UserError(problem, hint="a copy of that file can be made to compute it")
    if missing := [key for key in _SIZES.values() if key not in config]:
        raise UserError(f"config.json lacks {', '.join(missing)}")
    values = {ours: config[theirs] for ours, theirs in _SIZES.items()}
    state = {}
    for theirs, ours in _gpt2_names(values["num_blocks"]).items():
        short = theirs.removeprefix("transformer.")  # so are they called where GPT2Model was saved
        if theirs not in weights and short not in weights:
            raise UserError(f"the weights lack {theirs}", code=BAD_CHECKPOINT)
        tensor = weights[theirs if theirs in weights else short].float()
        parts = (tensor.T if _is_transposed(theirs) else tensor).chunk(len(ours))
        state |= {name: part.contiguous() for name, part in zip(ours, parts, strict=True)}
    state["head.weight"] = state["token_table.weight"]
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


def _gpt2_names(num_blocks: int) -> dict[str, list[str]]:
    """Their name of each tensor: ours of the tensors that it is made of, one under another."""
    names = {
        "transformer.wte.weight": ["token_table.weight"],
        "transformer.wpe.weight": ["position_table.weight"],
    }
    for part in ("weight", "bias"):
        names[f"transformer.ln_f.{part}"] = [f"final_norm.{part}"]
        for i in range(num_blocks):
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


def _is_transposed(theirs: str) -> bool:
    return ".c_" in theirs and theirs.endswith("weight")  # their Conv1D keeps (inputs, outputs)


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
