"""Weights to start a run from: those of another run, or of a native Hugging Face checkpoint."""

import dataclasses
from hashlib import file_digest, sha256
from pathlib import Path

import torch
from torch import nn

from lmplay.catalog.entries import resolve
from lmplay.data.tokenizers import Tokenizer
from lmplay.errors import UserError
from lmplay.model.abilities import unfolds
from lmplay.model.experiment import load_experiment
from lmplay.model.native import read_native
from lmplay.run.facts import Beginning
from lmplay.run.folder import RunFolder, resolve_run
from lmplay.run.request import InitialModel
from lmplay.run.rng import unchanged_rng
from lmplay.run.run import Run, load_weights
from lmplay.run.trained import open_trained
from lmplay.seeds import stream_seed


def find_initial(text: str, out_dir: Path) -> InitialModel:
    """What `--initial-model` means.

    Raises:
        UserError: no such run or folder, a run without a checkpoint, a folder without safetensors.
    """
    folder = Path(text)
    if (folder / "config.json").is_file():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise UserError(f"{folder} holds no safetensors", hint="no other format is read")
        return InitialModel(folder, None, f"{folder.resolve().name}~{_digest(files)}")
    run, step = resolve_run(text, out_dir)
    found = run.checkpoints.glob("step-*/model.safetensors")
    of_step = {int(file.parent.name[5:]): file for file in found if file.parent.name[5:].isdigit()}
    if step is None and of_step:
        step = max(of_step)
    if step not in of_step:
        raise UserError(f"{run.path} has no such checkpoint", hint=f"it has {sorted(of_step)}")
    return InitialModel(run.path, step, f"{run.read().experiment}~{_digest([of_step[step]])}")


def begin_from(initial: InitialModel, run: Run, tokenizer: Tokenizer) -> Beginning:
    """Give a run's fresh model the weights of a trained one.

    Parameters of one name are copied. A module with `unfold` whose place is held by a plain one in
    the trained model reproduces that; all else keeps its fresh start.

    Returns:
        How the parameters came about, and how far the logits of random text are from the trained
        model's.
    Raises:
        UserError: other tokens, other shapes, or no parameter in common.
    """
    source = _source(initial, tokenizer).to(run.device)
    model = run.model
    theirs, ours = source.state_dict(), model.state_dict()
    _refuse_other_sizes(initial, source, run)
    with unchanged_rng():
        torch.manual_seed(stream_seed(run.seed, "unfold"))
        unfolded = _unfold(model, source)
    inside = tuple(f"{name}." for name in unfolded)
    copied = [key for key in ours if key in theirs and not key.startswith(inside)]
    for key in copied:
        ours[key].copy_(theirs[key])
    if not copied and not unfolded:
        problem = f"{initial.path} and {run.experiment.name} have no parameter in common"
        raise UserError(problem, hint="start from the experiment's parent, or its parent's")
    if run.world_size > 1:
        for tensor in ours.values():  # unfolding need not round alike on every device
            torch.distributed.broadcast(tensor, src=0)
    fresh = [key for key in ours if key not in theirs and not key.startswith(inside)]
    unused = [key for key in theirs if key not in ours and not key.startswith(inside)]
    return Beginning(
        name=initial.name,
        path=str(initial.path),
        step=initial.step,
        copied=len(copied),
        unfolded=unfolded,
        fresh=fresh,
        unused=unused,
        logits_differ=_distance(model, source),
    )


def _source(initial: InitialModel, tokenizer: Tokenizer) -> nn.Module:
    if initial.step is not None:
        trained = open_trained(RunFolder(initial.path), initial.step, "cpu", "fp32")
        if trained.tokenizer.fingerprint != tokenizer.fingerprint:
            problem = f"the tokens of {initial.path} ({trained.tokenizer.name}) are not this plan's"
            raise UserError(problem, hint="start from a run on the same text and tokenizer")
        return trained.model
    name, values, weights = read_native(initial.path)
    experiment = load_experiment(resolve(name))
    model = experiment.model(experiment.config(**values)).eval()
    load_weights(model, weights, str(initial.path))
    return model


def _unfold(model: nn.Module, source: nn.Module) -> list[str]:
    """The names of the modules of `model` that reproduced a plain one of `source`."""
    plain = dict(source.named_modules())
    unfolded: list[str] = []
    for name, module in model.named_modules():
        is_inside = any(name.startswith(f"{other}.") for other in unfolded)
        if not unfolds(module) or name not in plain or is_inside:
            continue
        if module.state_dict().keys() != plain[name].state_dict().keys():
            module.unfold(plain[name])
            unfolded.append(name)
    return unfolded


def _refuse_other_sizes(initial: InitialModel, source: nn.Module, run: Run) -> None:
    theirs, ours = source.state_dict(), run.model.state_dict()
    other = [key for key in ours if key in theirs and ours[key].shape != theirs[key].shape]
    mine, wanted = (dataclasses.asdict(config) for config in (run.config, source.config))
    sizes = {key: wanted[key] for key in mine if key in wanted and mine[key] != wanted[key]}
    vocab_size = sizes.pop("vocab_size", None)
    if vocab_size is not None:
        problem = f"{initial.path} has {vocab_size:,} tokens, not {mine['vocab_size']:,}"
        raise UserError(problem, hint="--set tokenizer=NAME chooses the one it was trained with")
    if other:
        hint = " ".join(f"--set {key}={value}" for key, value in sizes.items())
        shapes = f"{tuple(theirs[other[0]].shape)}, here {tuple(ours[other[0]].shape)}"
        raise UserError(f"{initial.path} has other sizes: {other[0]} is {shapes}", hint=hint)


@torch.no_grad()
def _distance(model: nn.Module, source: nn.Module) -> float:
    config = model.config
    T = min(config.max_len, source.config.max_len, 64)
    random = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(config.vocab_size, (2, T), generator=random)
    tokens_BT = tokens_BT.to(next(model.parameters()).device)
    was_training = model.training
    ours, theirs = model.eval()(tokens_BT), source.eval()(tokens_BT)
    model.train(was_training)
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def _digest(files: list[Path]) -> str:
    whole = sha256()
    for path in files:
        with path.open("rb") as file:
            whole.update(file_digest(file, "sha256").digest())
    return whole.hexdigest()[:8]
