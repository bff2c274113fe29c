"""What pip installs works outside the checkout: its own experiments and plans come along."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_an_installed_wheel_lists_and_trains_what_it_carries(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    zipfile.ZipFile(wheel).extractall(site)
    elsewhere.mkdir()
    env = {
        **os.environ,
        "PYTHONPATH": str(site),
        "LMP_DATASETS": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }

    def lmp_trainer(*args):
        command = [sys.executable, "-m", "lmplay.train", *args]
        return subprocess.run(
            command, cwd=elsewhere, env=env, capture_output=True, text=True, timeout=400
        )

    listed = lmp_trainer("--exp", "list", "--json")
    small = ["--set", "tokenizer=byte", "--set", "width=24", "--set", "validation.tokens=2000"]
    trained = lmp_trainer("--exp", "ue", "--plan", "quick", "--tokens", "4096", *small)
    bundled = site / "lmplay" / "_bundled" / "experiments" / "ue.py"

    assert f'"{bundled}"' in listed.stdout
    assert trained.returncode == 0, trained.stderr
    assert "finished at 4,096 tokens" in trained.stdout
