"""A run's model as files for other programs: safetensors, or a folder for transformers."""

import dataclasses
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from lmplay.catalog.entry import read_source
from lmplay.disk import atomic_folder, write_json
from lmplay.errors import UserError
from lmplay.export.tokenizer_json import save_tokenizer
from lmplay.model.abilities import any_folds, scores_itself, writes_itself
from lmplay.model.folding import folded
from lmplay.model.native import NATIVE, to_native
from lmplay.roots import bundled_root
from lmplay.run.checkpoint import without_ties
from lmplay.run.folder import RunFolder
from lmplay.run.trained import Trained, open_trained

_PACKAGE = Path(__file__).parent.parent
_WRAPPER = "modeling_lmplay"
_SHIPPED = (
    *("export/modeling_lmplay.py", "model/abilities.py", "model/cache.py", "model/folding.py"),
)


def export(
    folder: RunFolder, step: int | None, to: str, fold: bool, out: Path, weights: str | None = None
) -> dict:
    """Write the model of a run, in fp32, and give back what was written.

    Args:
        step: of the checkpoint; None is the newest.
        to: "safetensors" (model.safetensors and config.json) or "hf" (what from_pretrained opens).
        fold: take out what only training needs, where there is anything.
        out: a folder that is made; it appears whole or not at all.
        weights: an average that the run keeps; None is the newest.
    Raises:
        UserError: no such checkpoint, or transformers has no place for such a model.
    """
    trained = open_trained(folder, step, "cpu", "fp32", weights)
    facts, source = trained.facts, folder.read_source()
    if to == "hf" and (scores_itself(trained.model) or writes_itself(trained.model)):
        problem = f"{facts.label} has no logits from left to right, which transformers needs"
        raise UserError(problem, hint="--to safetensors exports its weights")
    is_folded = fold and any_folds(trained.model)
    model = folded(trained.model) if is_folded else trained.model
    described = read_source(source, Path(f"{facts.file}.py"))[0]
    plain = described.folds_to if is_folded else facts.file
    native = _native(source, plain, is_folded) if to == "hf" else None
    try:
        with atomic_folder(out) as part:
            if to == "safetensors":
                _write_plain(part, trained, model, is_folded, plain)
            else:
                if native:
                    config, state = to_native(
                        native, dataclasses.asdict(trained.config), model.state_dict()
                    )
                    _save(part, state, {})
                else:
                    config = _write_with_code(part, folder, trained, model, is_folded)
                _write_for_transformers(part, trained, config)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {out}: {error}") from None
    before, after = (sum(p.numel() for p in m.parameters()) for m in (trained.model, model))
    return {
        "schema_version": 1,
        "out": str(out),
        "run": str(folder.path),
        "step": trained.step,
        "weights": weights,
        "to": to,
        "folded": is_folded,
        "folds_to": plain if is_folded else None,
        "parameters": {"trained": before, "exported": after},
        "class": (NATIVE[native] if native else "LmplayForCausalLM") if to == "hf" else None,
        "trust_remote_code": to == "hf" and native is None,
    }


def _native(source: str, plain: str | None, is_folded: bool) -> str | None:
    """The file of NATIVE that computes what this model does: it was trained, or is folded to."""
    if plain not in NATIVE:
        return None
    bundled = bundled_root() / "experiments" / f"{plain}.py"
    return plain if is_folded or bundled.read_text(encoding="utf-8") == source else None


def _write_plain(
    part: Path, trained: Trained, model: nn.Module, is_folded: bool, plain: str | None
) -> None:
    weights, aliases = without_ties(model.state_dict())
    _save(part, weights, aliases)
    facts = trained.facts
    config = {
        "experiment": facts.label,
        "file": facts.file,
        "folded": is_folded,
        "folds_to": plain if is_folded else None,
        "step": trained.step,
        "progress": trained.progress,
        "tokenizer": facts.plan["tokenizer"],
        "values": dataclasses.asdict(trained.config),
    }
    write_json(part / "config.json", config)


def _write_with_code(
    part: Path, folder: RunFolder, trained: Trained, model: nn.Module, is_folded: bool
) -> dict[str, object]:
    """Weights, the experiment's own file and the wrapper; gives back the config.json."""
    weights, aliases = without_ties(model.state_dict())
    _save(
        part,
        {f"model.{name}": tensor for name, tensor in weights.items()},
        {f"model.{name}": f"model.{kept}" for name, kept in aliases.items()},
    )
    shutil.copyfile(folder.experiment_py, part / "experiment.py")
    for name in _SHIPPED:
        shutil.copyfile(_PACKAGE / name, part / Path(name).name)
    return {
        "model_type": "musicgen_decoder",  # modeling_lmplay.py says why
        "architectures": ["LmplayForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{_WRAPPER}.LmplayConfig",
            "AutoModel": f"{_WRAPPER}.LmplayModel",
            "AutoModelForCausalLM": f"{_WRAPPER}.LmplayForCausalLM",
        },
        "experiment": trained.facts.label,
        "values": dataclasses.asdict(trained.config),
        "progress": trained.progress,
        "folded": is_folded,
        "vocab_size": trained.config.vocab_size,
        "max_position_embeddings": trained.config.max_len,
        "tie_word_embeddings": bool(aliases),
    }


def _write_for_transformers(part: Path, trained: Trained, config: dict[str, object]) -> None:
    end = trained.tokenizer.end
    ends = {"bos_token_id": end, "eos_token_id": end}
    write_json(part / "config.json", config | ends | {"dtype": "float32"})
    write_json(part / "generation_config.json", ends | {"pad_token_id": end})
    save_tokenizer(trained.tokenizer, part, trained.config.max_len)


def _save(part: Path, weights: dict[str, Tensor], aliases: dict[str, str]) -> None:
    whole = {name: tensor.contiguous() for name, tensor in weights.items()}
    path = part / "model.safetensors"
    path.touch()
    mode = path.stat().st_mode  # by the umask; the library makes files for their owner only
    save_file(whole, path, {"format": "pt", **aliases})
    path.chmod(mode)
