import json
import os
import pickle
import random
import shutil
import struct
import sys
from contextlib import suppress
from functools import partial
from hashlib import sha256
from io import FileIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lmplay.errors import BAD_CHECKPOINT, UserError
from lmplay.run import checkpoint as module
from lmplay.run.checkpoint import Checkpoint, newest_checkpoint, read_checkpoint, save_checkpoint
from lmplay.run.folder import RunFolder
from lmplay.run.rng import restore_rng, rng_state

FILES = ["model.safetensors", "optimizer.safetensors", "rng.safetensors", "averages.safetensors"]
FILES += ["state.json"]
EVERY_FILE = [*FILES, "manifest.json"]


def example(step: int) -> Checkpoint:
    """A small run's state; no two steps have the same."""
    generator = torch.Generator().manual_seed(step)
    table = torch.randn(5, 3, generator=generator)
    model = {"table.weight": table, "bias": torch.full((3,), float(step)), "head.weight": table}
    moments = {
        "step": torch.tensor(float(step)),
        "exp_avg": torch.randn(5, 3, generator=generator),
    }
    group = {"lr": 1e-3, "betas": (0.9, 0.95), "foreach": None, "amsgrad": False, "params": [0]}
    optimizer = {"state": {0: moments}, "param_groups": [group]}
    rng = {"torch": torch.arange(step % 7 + 1, dtype=torch.uint8)}
    state = {"tokens": 100 * step, "seconds": 0.1 * step}
    averages = {"ema/bias": torch.full((3,), -float(step))}
    return Checkpoint(step, model, optimizer, rng, state, averages)


def exact(value: object) -> object:
    """What `==` compares bit by bit and type by type."""
    if isinstance(value, torch.Tensor):
        octets = value.contiguous().reshape(-1).view(torch.uint8).tolist()
        return "tensor", value.dtype, tuple(value.shape), octets
    if isinstance(value, dict):
        return "dict", [(exact(k), exact(v)) for k, v in value.items()]
    if isinstance(value, list | tuple):
        return type(value).__name__, [exact(item) for item in value]
    return type(value).__name__, repr(value)


def same(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two checkpoints are one; the order of tensors in a file means nothing."""
    return all(
        exact(getattr(one, key)) == exact(getattr(other, key))
        for key in ("step", "optimizer", "state")
    ) and all(
        exact(dict(sorted(getattr(one, key).items())))
        == exact(dict(sorted(getattr(other, key).items())))
        for key in ("model", "rng", "averages")
    )


def saved(path: Path, *steps: int, keep: int = 9) -> RunFolder:
    folder = RunFolder(path)
    for step in steps:
        save_checkpoint(folder, example(step), keep)
    return folder


def newest(folder: RunFolder, notes: list[str] | None = None) -> Checkpoint:
    found = newest_checkpoint(folder, [].append if notes is None else notes.append)
    assert found is not None
    return found


def names(folder: RunFolder) -> list[str]:
    return sorted(os.listdir(folder.checkpoints))


def steps(folder: RunFolder) -> list[int]:
    return sorted(int(name.removeprefix("step-").partition("~")[0]) for name in names(folder))


def forge(path: Path, **contents: bytes) -> None:
    """Put other bytes into files of a checkpoint, with a manifest that vouches for them."""
    manifest = json.loads((path / "manifest.json").read_bytes())
    del manifest["sha256"]
    for stem, content in contents.items():
        name = next(name for name in FILES if name.startswith(stem))
        (path / name).unlink()
        (path / name).write_bytes(content)
        manifest["files"][name] = {"bytes": len(content), "sha256": sha256(content).hexdigest()}
    (path / "manifest.json").write_bytes(module._sealed(manifest))


def safetensors(header: dict | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch):
    """No test can see whether the disk has obeyed, only whether it was asked."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


# Round trips


def test_what_is_saved_is_what_is_loaded(tmp_path):
    folder = saved(tmp_path, 7)

    assert same(newest(folder), example(7))
    assert sorted(os.listdir(folder.checkpoints / "step-7")) == sorted(EVERY_FILE)


DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32),
    *(torch.uint64, torch.int64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float16),
    *(torch.bfloat16, torch.float32, torch.float64, torch.complex64),
]


@st.composite
def tensors(draw) -> torch.Tensor:
    """Any bits of any type in up to three dimensions, of length 0 too, transposed or not."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    size = int(np.prod(shape)) * dtype.itemsize
    octets = draw(st.binary(min_size=size, max_size=size))
    if dtype == torch.bool:
        octets = bytes(octet % 2 for octet in octets)
    if not size:
        return torch.zeros(shape, dtype=dtype)
    tensor = torch.frombuffer(bytearray(octets), dtype=dtype).reshape(shape)
    return tensor.transpose(0, -1) if draw(st.booleans()) and shape else tensor


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
LEAVES = SCALARS | tensors()
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.sampled_from(["$tensor", "a/b"]), inner)
        | st.dictionaries(st.integers(0, 9) | st.text(max_size=1), inner, max_size=3)
    ),
    max_leaves=6,
)
STATES = st.dictionaries(
    st.integers(0, 9), st.dictionaries(st.text(max_size=4), TREES, max_size=3), max_size=3
)
GROUPS = st.lists(st.dictionaries(st.text(max_size=4), TREES, max_size=3), max_size=2)
OPTIMIZERS = st.fixed_dictionaries({"state": STATES, "param_groups": GROUPS})


FACTS = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=2) | st.tuples(inner))


@given(
    model=st.dictionaries(st.text(max_size=3), tensors(), max_size=3),
    optimizer=OPTIMIZERS | st.lists(OPTIMIZERS, max_size=2),
    state=st.dictionaries(st.text(max_size=3), FACTS, max_size=3),
)
def test_any_state_comes_back_bit_by_bit_and_type_by_type(
    tmp_path_factory, model, optimizer, state
):
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    before = Checkpoint(3, model, optimizer, {}, state)

    save_checkpoint(folder, before, 2)

    assert same(newest(folder), before)
    shutil.rmtree(folder.path)


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.AdamW(parameters, lr=torch.tensor(1e-3), betas=(0.9, 0.95)),
        lambda parameters: torch.optim.Adagrad(parameters, lr=6e-4),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        lambda parameters: torch.optim.LBFGS(parameters, max_iter=3),
        lambda parameters: torch.optim.Adafactor(parameters),
    ],
    ids=["adamw", "adagrad", "sgd", "lbfgs", "adafactor"],
)
def test_an_optimizer_goes_on_as_if_it_had_never_stopped(tmp_path, make):
    def take_steps(model, optimizer, count):
        for _ in range(count):

            def closure(model=model):
                model.zero_grad()
                loss = model(torch.ones(2, 4)).square().sum()
                loss.backward()
                return loss

            optimizer.step(closure)

    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = make(model.parameters())
    take_steps(model, optimizer, 3)
    state = optimizer.state_dict()
    folder = RunFolder(tmp_path)
    save_checkpoint(folder, Checkpoint(3, model.state_dict(), state, {}, {}), 2)
    take_steps(model, optimizer, 3)
    resumed = nn.Linear(4, 3)
    other = make(resumed.parameters())

    found = newest(folder)
    resumed.load_state_dict(found.model)
    other.load_state_dict(found.optimizer)
    take_steps(resumed, other, 3)

    assert exact(resumed.state_dict()) == exact(model.state_dict())
    assert exact(other.state_dict()) == exact(optimizer.state_dict())


def test_tied_weights_are_stored_once_and_tied_again(tmp_path):
    model = nn.ModuleDict({"table": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["table"].weight
    folder = RunFolder(tmp_path)

    path = save_checkpoint(folder, Checkpoint(1, model.state_dict(), {}, {}, {}), 2)

    assert (path / "model.safetensors").read_bytes().count(b"data_offsets") == 1
    weights = newest(folder).model
    assert weights["head.weight"] is weights["table.weight"]
    model.load_state_dict(weights)


def test_two_views_of_one_storage_are_two_tensors(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    model = {"whole": whole, "rows": whole[:2], "turned": whole.T, "spread": whole[0].expand(2, 4)}
    folder = RunFolder(tmp_path)

    save_checkpoint(folder, Checkpoint(1, model, {}, {}, {}), 2)

    assert same(newest(folder), Checkpoint(1, model, {}, {}, {}))


def test_loaded_tensors_do_not_lie_in_the_file(tmp_path):
    folder = saved(tmp_path, 1)

    found = newest(folder)
    with open(folder.checkpoints / "step-1" / "model.safetensors", "r+b") as file:
        file.truncate(0)

    assert same(found, example(1))


@pytest.mark.parametrize(
    "bad",
    [
        {"lr": np.float32(1)},
        {"f": len},
        {"s": {1, 2}},
        {"b": b"octets"},
        {"t": torch.ones(2).to_sparse()},
        {"t": torch.ones(2, device="meta")},
        {"t": torch.ones(2, dtype=torch.complex128)},
    ],
    ids=str,
)
def test_what_cannot_be_saved_is_named_before_anything_is_written(tmp_path, bad):
    folder = RunFolder(tmp_path)
    with pytest.raises(TypeError, match=rf"param_groups/0/{next(iter(bad))} is a .*cannot hold"):
        save_checkpoint(folder, Checkpoint(1, {}, {"param_groups": [bad]}, {}, {}), 2)
    assert os.listdir(tmp_path) == []


def test_a_runs_own_facts_hold_no_tensor(tmp_path):
    with pytest.raises(TypeError, match="state/best"):
        save_checkpoint(RunFolder(tmp_path), Checkpoint(1, {}, {}, {}, {"best": torch.ones(1)}), 2)


def test_another_library_can_read_the_weights(tmp_path):
    from safetensors.torch import load_file

    folder = saved(tmp_path, 1)

    weights = load_file(folder.checkpoints / "step-1" / "model.safetensors")

    assert exact(weights["table.weight"]) == exact(example(1).model["table.weight"])


def test_the_modes_of_a_checkpoint_follow_the_umask(tmp_path):
    previous = os.umask(0o027)
    try:
        path = save_checkpoint(RunFolder(tmp_path), example(1), 2)
    finally:
        os.umask(previous)

    assert path.stat().st_mode & 0o777 == 0o750
    assert {p.stat().st_mode & 0o777 for p in path.iterdir()} == {0o640}


# Random states


def test_every_generator_goes_on_where_it_was(tmp_path):
    def draw():
        torch_draw = torch.rand(3), torch.randn(3)
        return torch_draw, random.random(), random.gauss(0, 1), np.random.randn(3).tolist()

    before = rng_state()
    try:
        random.gauss(0, 1)  # leaves the second of a pair behind
        np.random.randn(1)
        folder = RunFolder(tmp_path)
        save_checkpoint(folder, Checkpoint(1, {}, {}, rng_state(), {}), 2)
        expected = draw(), draw()
        draw()

        restore_rng(newest(folder).rng)

        assert exact((draw(), draw())) == exact(expected)
    finally:
        restore_rng(before)


def test_every_accelerators_generator_is_saved_and_those_still_there_restored(monkeypatch):
    restored = {}
    patch = monkeypatch.setattr
    patch(torch.cuda, "device_count", lambda: 2)
    patch(torch.cuda, "get_rng_state", lambda index: torch.tensor([index]))
    patch(torch.cuda, "set_rng_state", lambda s, index: restored.update({index: s.item()}))
    patch(torch.backends.mps, "is_available", lambda: True)
    patch(torch.mps, "get_rng_state", lambda: torch.tensor([7]))
    patch(torch.mps, "set_rng_state", lambda s: restored.update(mps=s.item()))

    state = rng_state()
    restore_rng(state)
    assert restored == {0: 0, 1: 1, "mps": 7}

    restored.clear()
    patch(torch.cuda, "device_count", lambda: 1)
    patch(torch.backends.mps, "is_available", lambda: False)
    restore_rng(state)
    assert restored == {0: 0}


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        *((name, None) for name in ("torch", "python", "python.gauss", "numpy", "numpy.gauss")),
        *((name, torch.ones(2, 2)) for name in ("torch", "python", "python.gauss", "numpy")),
        *((name, torch.tensor(-1)) for name in ("torch", "python", "numpy", "numpy.position")),
    ],
)
def test_a_random_state_that_does_not_fit_is_the_users_error(name, wrong):
    before = rng_state()
    bad = {key: value for key, value in before.items() if key != name}
    if wrong is not None:
        bad[name] = wrong
    try:
        with pytest.raises(UserError) as caught:
            restore_rng(bad)
        assert caught.value.code == BAD_CHECKPOINT
    finally:
        restore_rng(before)


# Which one is the newest, and which ones stay


def test_a_run_without_checkpoints_has_none(tmp_path):
    folder = RunFolder(tmp_path / "run")

    assert newest_checkpoint(folder, pytest.fail) is None
    folder.checkpoints.mkdir(parents=True)
    (folder.checkpoints / ".tmp-step-5-1-00000000").mkdir()
    (folder.checkpoints / "step-notes").mkdir()
    assert newest_checkpoint(folder, pytest.fail) is None


def test_the_newest_is_told_by_its_step_and_not_by_the_clock(tmp_path):
    folder = saved(tmp_path, 9, 10, 100, 99)
    for number, name in enumerate(["step-100", "step-99", "step-10", "step-9"]):
        for path in (folder.checkpoints / name, *(folder.checkpoints / name).iterdir()):
            os.utime(path, (number, number))

    assert newest(folder).step == 100
    assert read_checkpoint(folder, None, weights_only=False).step == 100


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_pruning_keeps_the_newest_and_nothing_that_is_not_ours_goes(tmp_path, keep):
    folder = saved(tmp_path, 1)
    foreign = ["step-0", "step-best", "notes.txt", ".trash-mine", ".corrupt-step-3-00000000"]
    for name in foreign:
        (folder.checkpoints / name).mkdir()
        (folder.checkpoints / name / "precious").write_text("")
    shuffled = random.Random(keep)

    for step in range(2, 8):
        save_checkpoint(folder, example(step), keep)
        for path in folder.checkpoints.glob("step-?"):
            os.utime(path, (shuffled.random() * 1e9,) * 2)
        kept = [f"step-{n}" for n in range(max(1, step - max(keep, 2) + 1), step + 1)]
        assert names(folder) == sorted([*foreign, *kept])

    assert all((folder.checkpoints / name / "precious").exists() for name in foreign)


@pytest.mark.parametrize("keep", [1, 2, 3])
@pytest.mark.parametrize("file", EVERY_FILE)
def test_pruning_never_leaves_fewer_than_two_whole_ones(tmp_path, keep, file):
    folder = saved(tmp_path, 1, 2, 3, 4)
    for step in (3, 4):
        path = folder.checkpoints / f"step-{step}" / file
        path.write_bytes(path.read_bytes()[:-1] + b"?")

    save_checkpoint(folder, example(5), keep)

    notes = []
    assert newest(folder, notes).step == 5
    assert notes == []
    shutil.rmtree(folder.checkpoints / "step-5")
    assert newest(folder, notes).step == 2
    assert len(notes) == 2


def test_the_one_just_saved_stays_though_higher_steps_exist(tmp_path):
    folder = saved(tmp_path, 10, 20, 30)

    save_checkpoint(folder, example(5), 1)

    assert steps(folder) == [5, 30]


def test_saving_a_step_again_replaces_it(tmp_path):
    folder = saved(tmp_path, 1, 2)
    again = example(2)
    again.state["tokens"] = -1

    save_checkpoint(folder, again, 3)

    assert same(newest(folder), again)
    assert names(folder) == ["step-1", "step-2"]


def test_a_checkpoint_is_read_by_its_step(tmp_path):
    folder = saved(tmp_path, 1, 2, 3)

    assert same(read_checkpoint(folder, 2, weights_only=False), example(2))


def test_weights_are_read_without_the_rest(tmp_path):
    folder = saved(tmp_path, 1)
    for name in ("optimizer.safetensors", "rng.safetensors", "averages.safetensors"):
        (folder.checkpoints / "step-1" / name).unlink()

    found = read_checkpoint(folder, None, weights_only=True)

    assert same(found, Checkpoint(1, example(1).model, {}, {}, example(1).state))


def test_reading_a_step_that_is_not_there_names_those_that_are(tmp_path):
    folder = saved(tmp_path, 10, 9)

    with pytest.raises(UserError) as caught:
        read_checkpoint(folder, 3, weights_only=True)
    assert "step 3" in caught.value.problem
    assert "9, 10" in caught.value.hint
    assert caught.value.code == BAD_CHECKPOINT


def test_reading_an_untrained_run_says_so(tmp_path):
    with pytest.raises(UserError, match="no checkpoint yet") as caught:
        read_checkpoint(RunFolder(tmp_path), None, weights_only=True)
    assert caught.value.code == BAD_CHECKPOINT


def test_reading_never_changes_the_folder(tmp_path):
    folder = saved(tmp_path, 1, 2)
    (folder.checkpoints / "step-2" / "model.safetensors").write_bytes(b"")
    before = sorted(folder.checkpoints.rglob("*"))

    with pytest.warns(UserWarning, match="step-2.*model.safetensors.*step 1 is used"):
        found = read_checkpoint(folder, None, weights_only=True)
    with pytest.raises(UserError, match=r"step-2: model\.safetensors"):
        read_checkpoint(folder, 2, weights_only=True)

    assert found.step == 1
    assert sorted(folder.checkpoints.rglob("*")) == before


# Kills, interrupts, power cuts, full disks


class Dead(BaseException):
    """The process is no more: nothing it would still do reaches the disk."""


class Machine:
    """Counts what reaches the disk and kills the process before call `end`, writes half-way."""

    def __init__(self, patch: pytest.MonkeyPatch, end: int):
        self.end, self.calls = end, 0
        for name in ("mkdir", "fsync", "replace", "unlink", "rmdir", "open"):
            patch.setattr(os, name, self.counted(getattr(os, name)))
        patch.setattr(module, "open", self.opened, raising=False)
        patch.setattr(module, "_CHUNK", 40)

    def tick(self):
        self.calls += 1
        if self.calls >= self.end:
            raise Dead

    def counted(self, function):
        def call(*args, **kwargs):
            self.tick()
            return function(*args, **kwargs)

        return call

    def opened(self, path, mode):
        self.tick()
        return Watched(path, mode, self.tear)

    def tear(self, file, piece):
        try:
            self.tick()
        except Dead:
            file.write(piece[: len(piece) // 2])
            raise
        file.write(piece)


class Watched(FileIO):
    """A file whose writes are done by `write`."""

    def __init__(self, path, mode, write):
        super().__init__(path, mode)
        self.own_write = write

    def write(self, piece):
        return self.own_write(super(), piece)


@pytest.mark.parametrize(
    ("before", "step"),
    [([], 1), ([1], 2), ([1, 2], 3), ([1, 2], 2), ([1], 1)],
    ids=["first", "second", "with-pruning", "replacing", "replacing-the-only-one"],
)
def test_a_process_killed_at_any_point_of_a_save_leaves_a_whole_checkpoint(
    tmp_path, monkeypatch, before, step
):
    base = saved(tmp_path / "base", *before)
    base.checkpoints.mkdir(parents=True, exist_ok=True)
    new = example(step)
    new.state["tokens"] = -1
    old = example(before[-1]) if before else None
    survived = []
    for end in range(1, 1000):
        folder = RunFolder(tmp_path / f"run-{end}")
        shutil.copytree(base.path, folder.path)
        with monkeypatch.context() as patch:
            machine = Machine(patch, end)
            with suppress(Dead):
                save_checkpoint(folder, new, 2)
        if machine.calls < end:
            break

        found = newest_checkpoint(folder, pytest.fail)
        assert same(found, new) or same(found, old) if found else old is None
        survived.append(found is not None and same(found, new))

        save_checkpoint(folder, example(step + 1), 2)
        assert steps(folder) == sorted({*before, *([step] if survived[-1] else []), step + 1})[-2:]
        shutil.rmtree(folder.path)
    else:
        pytest.fail("the save never ended")

    assert survived == sorted(survived)  # once published, never lost again
    assert len(survived) > 25


@pytest.mark.parametrize("step", [2, 3])
def test_ctrl_c_at_any_line_of_a_save_leaves_a_whole_checkpoint_and_no_rubbish(tmp_path, step):
    base = saved(tmp_path / "base", 1, 2)
    new = example(step)
    new.state["tokens"] = -1
    ours = {module.__file__, sys.modules["lmplay.run.folder"].__file__}
    for end in range(1, 10_000, 3):
        lines = 0

        def trace(frame, event, argument, end=end):
            nonlocal lines
            if frame.f_code.co_filename not in ours:
                return None
            lines += event == "line"
            if event == "line" and lines == end:
                raise KeyboardInterrupt
            return trace

        folder = RunFolder(tmp_path / f"run-{end}")
        shutil.copytree(base.path, folder.path)
        previous = sys.gettrace()
        sys.settrace(trace)
        try:
            save_checkpoint(folder, new, 2)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(previous)
        if lines < end:
            break

        found = newest(folder)
        assert same(found, new) or same(found, example(2))
        assert not [name for name in names(folder) if name.startswith(".tmp")]
        shutil.rmtree(folder.path)
    else:
        pytest.fail("the save never ended")
    assert end > 300


class PowerCut:
    """Records writes, syncs and renames, and builds the worst disk that a power cut may leave."""

    def __init__(self, patch: pytest.MonkeyPatch, parent: Path, images: Path):
        self.parent, self.images, self.is_drawing = parent, images, False
        self.events: list[tuple[str, str]] = []
        self.synced: set[int] = {p.stat().st_ino for p in parent.rglob("*")}
        self.durable = self.listing()
        for name in ("mkdir", "fsync", "replace", "unlink", "rmdir"):
            patch.setattr(os, name, self.recorded(name, getattr(os, name)))

    def listing(self) -> dict[str, int]:
        return {name: (self.parent / name).stat().st_ino for name in os.listdir(self.parent)}

    def recorded(self, name, function):
        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            if self.is_drawing:
                return result
            what = os.readlink(f"/proc/self/fd/{args[0]}") if name == "fsync" else str(args[0])
            self.events.append((name, os.path.relpath(what, self.parent)))
            if name == "fsync":
                self.synced.add(os.fstat(args[0]).st_ino)
                if Path(what) == self.parent:
                    self.durable = self.listing()
            self.is_drawing = True
            self.image(self.listing())
            self.image(self.durable)
            self.is_drawing = False
            return result

        return call

    def image(self, entries: dict[str, int]) -> None:
        """The disk with these names in the folder, and of each file only what was synced."""
        where = {number: name for name, number in self.listing().items()}
        image = self.images / f"{len(os.listdir(self.images))}" / "checkpoints"
        image.mkdir(parents=True)
        for name, number in entries.items():
            (image / name).mkdir()
            real = self.parent / where.get(number, "gone")
            for path in real.iterdir() if number in self.synced and real.is_dir() else []:
                is_synced = path.stat().st_ino in self.synced
                (image / name / path.name).write_bytes(path.read_bytes() if is_synced else b"")


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="paths of open files are Linux's")
@pytest.mark.parametrize("step", [2, 3])
def test_a_power_cut_at_any_point_of_a_save_leaves_a_whole_checkpoint(tmp_path, monkeypatch, step):
    folder = saved(tmp_path / "run", 1, 2)
    new = example(step)
    new.state["tokens"] = -1
    images = tmp_path / "images"
    images.mkdir()

    with monkeypatch.context() as patch:
        cut = PowerCut(patch, folder.checkpoints, images)
        save_checkpoint(folder, new, 2)

    for image in images.iterdir():
        found = newest(RunFolder(image))
        assert same(found, new) or same(found, example(2)) or (step == 2 and found.step == 1)
    publish = next(
        i for i, (call, at) in enumerate(cut.events) if call == "replace" and "tmp" in at
    )
    temporary = cut.events[publish][1]
    before = cut.events[:publish]
    for name in EVERY_FILE:
        assert ("fsync", f"{temporary}/{name}") in before
    last_before = [event for event in before if event[1].startswith(temporary)][-1]
    assert last_before == ("fsync", temporary)
    assert cut.events[publish + 1] == ("fsync", ".")
    removal = next(i for i, (call, _) in enumerate(cut.events) if call == "unlink")
    assert cut.events[removal - 1] == ("fsync", ".")


def test_a_new_runs_folders_are_on_the_disk_before_the_checkpoint_counts(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("lmplay.disk.sync_folder", lambda path: synced.append(path), raising=True)

    save_checkpoint(RunFolder(tmp_path / "a" / "b"), example(1), 2)

    assert set(synced) == {tmp_path, tmp_path / "a", tmp_path / "a" / "b"}


def test_a_disk_without_room_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    folder = saved(tmp_path, 1)
    free = shutil.disk_usage(tmp_path)._replace(free=123)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)

    with pytest.raises(UserError) as caught:
        save_checkpoint(folder, example(2), 2)

    assert caught.value.code == BAD_CHECKPOINT
    assert "123 are free" in caught.value.problem
    assert "bytes are needed" in caught.value.problem
    assert names(folder) == ["step-1"]
    assert same(newest(folder), example(1))


@pytest.mark.parametrize("error", [(28, "No space left on device"), (5, "Input/output error")])
@pytest.mark.parametrize("name", ["write", "fsync", "replace", "mkdir"])
def test_a_disk_that_fails_midway_costs_no_checkpoint(tmp_path, monkeypatch, error, name):
    base = saved(tmp_path / "base", 1, 2)
    real = getattr(os, name)
    for end in range(1, 100):
        folder = RunFolder(tmp_path / f"run-{end}")
        shutil.copytree(base.path, folder.path)
        calls = 0

        def fail_once(end=end):
            nonlocal calls
            calls += 1
            if calls == end:
                raise OSError(*error)

        def call(*args, fail_once=fail_once):
            fail_once()
            return real(*args)

        def write(file, piece, fail_once=fail_once):
            fail_once()
            file.write(piece)

        has_failed = False
        with monkeypatch.context() as patch:
            if name == "write":
                patch.setattr(module, "open", partial(Watched, write=write), raising=False)
            else:
                patch.setattr(os, name, call)
            try:
                save_checkpoint(folder, example(3), 2)
            except UserError as caught:
                has_failed = True
                assert caught.code == BAD_CHECKPOINT
                assert error[1] in caught.problem
        if calls < end:
            break

        assert not [entry for entry in names(folder) if entry.startswith(".tmp")]
        found = newest(folder)
        assert same(found, example(3)) or (has_failed and same(found, example(2)))
    else:
        pytest.fail("the save never ended")
    assert end > 1


def test_what_dead_processes_left_is_removed_and_what_living_ones_write_is_not(tmp_path):
    folder = saved(tmp_path, 1)
    dead, alive = 2**22 + 1, os.getppid()  # Linux numbers processes below 2**22
    for kind in ("tmp", "trash"):
        for pid in (dead, alive, os.getpid()):
            (folder.checkpoints / f".{kind}-step-5-{pid}-0123abcd").mkdir()

    save_checkpoint(folder, example(2), 2)

    assert names(folder) == sorted(
        [*(f".{kind}-step-5-{alive}-0123abcd" for kind in ("tmp", "trash")), "step-1", "step-2"]
    )


# Damage


def check_falls_back(folder: RunFolder, file: str) -> None:
    """The newest of steps 1 and 2 is damaged in `file`: named, set aside, the other one used."""
    notes: list[str] = []
    found = newest(folder, notes)
    assert same(found, example(1))
    (note,) = notes
    assert "step-2" in note and file in note and ".corrupt-step-2-" in note
    assert [name for name in names(folder) if not name.startswith(".corrupt-step-2-")] == ["step-1"]
    assert len(names(folder)) == 2


@pytest.mark.parametrize("cut", ["empty", "half", "minus one", "plus one", "missing"])
@pytest.mark.parametrize("file", EVERY_FILE)
def test_a_file_of_another_length_is_named_and_set_aside(tmp_path, file, cut):
    folder = saved(tmp_path, 1, 2)
    path = folder.checkpoints / "step-2" / file
    content = path.read_bytes()
    path.unlink()
    if cut != "missing":
        half = content[: len(content) // 2]
        cuts = {"empty": b"", "half": half, "minus one": content[:-1], "plus one": content + b"\0"}
        path.write_bytes(cuts[cut])

    reason = " is missing" if cut == "missing" else " has " if file in FILES else ""
    check_falls_back(folder, file + reason)


def test_a_flipped_bit_is_never_loaded(tmp_path):
    base = saved(tmp_path / "base", 1, 2)
    places = [
        (name, offset)
        for name in EVERY_FILE
        for offset in range((base.checkpoints / "step-2" / name).stat().st_size)
    ]
    draw = random.Random(0)
    for trial in range(200):
        folder = RunFolder(tmp_path / f"run-{trial}")
        shutil.copytree(base.path, folder.path)
        file, offset = draw.choice(places)
        path = folder.checkpoints / "step-2" / file
        content = bytearray(path.read_bytes())
        content[offset] ^= 1 << draw.randrange(8)
        path.write_bytes(content)

        check_falls_back(folder, file)
        shutil.rmtree(folder.path)


def test_a_manifest_from_another_step_is_not_believed(tmp_path):
    folder = saved(tmp_path, 1, 3)
    (folder.checkpoints / "step-3").rename(folder.checkpoints / "step-2")

    check_falls_back(folder, "manifest.json says step 3")


def test_a_state_from_another_step_is_not_believed(tmp_path):
    folder = saved(tmp_path, 1, 2)
    forge(
        folder.checkpoints / "step-2",
        state=(folder.checkpoints / "step-1" / "state.json").read_bytes(),
    )

    check_falls_back(folder, "state.json")


def test_all_damaged_is_an_error_and_stays_one(tmp_path):
    folder = saved(tmp_path, 1, 2)
    for path in folder.checkpoints.glob("*/manifest.json"):
        path.unlink()

    for expected_notes in (2, 0):
        notes = []
        with pytest.raises(UserError) as caught:
            newest_checkpoint(folder, notes.append)
        assert caught.value.code == BAD_CHECKPOINT
        assert "--resume none" in caught.value.hint
        assert len(notes) == expected_notes


def test_what_cannot_be_set_aside_is_passed_over(tmp_path, monkeypatch):
    folder = saved(tmp_path, 1, 2)
    (folder.checkpoints / "step-2" / "state.json").unlink()

    def refuse(*args):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "replace", refuse)
    notes = []

    assert newest(folder, notes).step == 1
    assert "Read-only file system" in notes[0] and "state.json" in notes[0]


def test_a_file_that_may_not_be_read_is_not_taken_for_damaged(tmp_path, monkeypatch):
    folder = saved(tmp_path, 1, 2)

    def refuse(path, mode):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module, "open", refuse, raising=False)

    with pytest.raises(UserError, match="may not be read") as caught:
        newest(folder)
    assert caught.value.code == BAD_CHECKPOINT
    assert names(folder) == ["step-1", "step-2"]


def test_a_newer_format_is_not_taken_for_damaged(tmp_path):
    folder = saved(tmp_path, 1, 2)
    manifest = folder.checkpoints / "step-2" / "manifest.json"
    body = json.loads(manifest.read_bytes())
    del body["sha256"]
    manifest.write_bytes(module._sealed({**body, "format": module.FORMAT + 1}))

    with pytest.raises(UserError, match="newer lmplay"):
        newest(folder)
    assert names(folder) == ["step-1", "step-2"]


# Hostile input


@pytest.mark.parametrize("stem", ["model", "optimizer", "rng", "state"])
def test_a_pickle_is_refused_and_executes_nothing(tmp_path, stem):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    for protocol, content in enumerate([pickle.dumps(Bomb()), pickle.dumps(Bomb(), protocol=0)]):
        folder = saved(tmp_path / f"run-{protocol}", 1, 2)
        forge(folder.checkpoints / "step-2", **{stem: content})

        check_falls_back(folder, stem)
    assert not (tmp_path / "executed").exists()


HEADERS = {
    "long-claim": struct.pack("<Q", 2**63) + b"{}",
    "longer-than-file": struct.pack("<Q", 100) + b"{}",
    "eight-bytes": struct.pack("<Q", 0),
    "seven-bytes": b"1234567",
    "not-json": safetensors(b"not json"),
    "not-utf8": safetensors(b'{"\xff": 1}'),
    "a-list": safetensors(b"[]"),
    "deep": safetensors(b'{"a":' * 100_000),
    "no-such-dtype": safetensors(
        {"a": {"dtype": "OBJECT", "shape": [1], "data_offsets": [0, 8]}}, bytes(8)
    ),
    "outside": safetensors({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}),
    "overlap": safetensors(
        {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        },
        bytes(12),
    ),
    "wrong-shape": safetensors(
        {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}}, bytes(8)
    ),
    "loose-end": safetensors(
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(8)
    ),
    "lost-tie": safetensors({"__metadata__": {"aliases": '{"head": "nowhere"}'}}),
    "no-tie": safetensors({"__metadata__": {"aliases": "[1]"}}),
    "deep-tie": safetensors({"__metadata__": {"aliases": "[" * 100_000}}),
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_a_hostile_safetensors_file_is_set_aside(tmp_path, content):
    folder = saved(tmp_path, 1, 2)
    forge(folder.checkpoints / "step-2", model=content)

    check_falls_back(folder, "model.safetensors")


def test_a_vast_header_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    folder = saved(tmp_path, 1, 2)
    forge(folder.checkpoints / "step-2", model=safetensors(b" " * (11 << 20)))
    opened = []
    monkeypatch.setattr(
        module, "safe_open", lambda path, **k: opened.append(path) or real_open(path, **k)
    )

    check_falls_back(folder, "model.safetensors")

    assert {path.parent.name for path in opened} == {"step-1"}


def real_open(path, **options):
    import safetensors

    return safetensors.safe_open(path, **options)


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"{}",
        b"[" * 100_000,
        b'{"step": 2, "state": {}, "optimizer": 5}',
        b'{"step": 2, "state": [], "optimizer": {}}',
        b'{"step": 2, "state": {}, "optimizer": {"$tensor": "nowhere"}}',
        b'{"step": 2, "state": {}, "optimizer": {"$tensor": []}}',
        b'{"step": 2, "state": {}, "optimizer": {"$import": "os"}}',
        b'{"step": 2, "state": {}, "optimizer": {"$dict": [[[], 1]]}}',
        b'{"step": 2, "state": {}, "optimizer": {"$dict": 5}}',
        b'{"step": 2, "state": {}, "optimizer": {"$float": "x"}}',
        b'{"step": 2, "state": {}, "optimizer": {"$tuple": 5, "x": 1}}',
        b'{"step": 2, "state": {"$tensor": "0/step"}, "optimizer": {}}',
    ],
)
def test_a_hostile_state_is_set_aside(tmp_path, content):
    folder = saved(tmp_path, 1, 2)
    forge(folder.checkpoints / "step-2", state=content)

    check_falls_back(folder, "state.json")


@pytest.mark.parametrize(
    "change",
    [
        {"files": {}},
        {"files": []},
        {"files": {name: 5 for name in FILES}},
        {"files": {name: {"bytes": "1", "sha256": 1} for name in FILES}},
        {"files": {"../../escape": {"bytes": 1, "sha256": ""}}},
        {"format": "new"},
        {"step": True},
        {"step": "2"},
    ],
    ids=str,
)
def test_a_hostile_manifest_is_set_aside(tmp_path, change):
    folder = saved(tmp_path, 1, 2)
    manifest = folder.checkpoints / "step-2" / "manifest.json"
    body = json.loads(manifest.read_bytes())
    del body["sha256"]
    manifest.write_bytes(module._sealed({**body, **change}))

    check_falls_back(folder, "manifest.json")


def test_a_tensors_name_is_never_a_path(tmp_path):
    folder = RunFolder(tmp_path / "a" / "b" / "run")
    evil = {"../../../evil": torch.ones(1), str(tmp_path / "evil"): torch.ones(2)}
    optimizer = {"state": {"../../evil": {"/evil": torch.ones(3)}}}
    before = Checkpoint(1, evil, optimizer, evil, {"../evil": 1})

    save_checkpoint(folder, before, 2)

    assert same(newest(folder), before)
    assert [path.name for path in tmp_path.rglob("*evil*")] == []


@pytest.mark.parametrize("file", EVERY_FILE)
def test_a_link_is_not_followed(tmp_path, file):
    folder = saved(tmp_path / "run", 1, 2)
    path = folder.checkpoints / "step-2" / file
    path.rename(tmp_path / file)
    path.symlink_to(tmp_path / file)

    check_falls_back(folder, file)
    assert (tmp_path / file).exists()


def test_a_linked_checkpoint_is_set_aside_and_what_it_leads_to_stays(tmp_path):
    folder = saved(tmp_path / "run", 1, 2)
    (folder.checkpoints / "step-2").rename(tmp_path / "elsewhere")
    (folder.checkpoints / "step-2").symlink_to(tmp_path / "elsewhere")

    check_falls_back(folder, "symbolic link")
    assert len(os.listdir(tmp_path / "elsewhere")) == len(EVERY_FILE)


def test_a_pipe_in_a_files_place_does_not_hang_the_reader(tmp_path):
    folder = saved(tmp_path / "run", 1, 2)
    path = folder.checkpoints / "step-2" / "state.json"
    path.unlink()
    os.mkfifo(path)

    check_falls_back(folder, "state.json")
