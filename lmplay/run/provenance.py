"""Where a run's numbers come from: the machine, the versions, the commit."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from lmplay.machine import processor

_PACKAGES = ("lmplay", "torch", "accelerate", "datasets", "tokenizers", "tiktoken", "numpy")


def machine_facts(device: torch.device) -> dict[str, object]:
    """What run.json says of the machine, the versions and the commit."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "device": str(device),
        "device_name": name,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in _PACKAGES},
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    """The commit of the working directory, with a + where files differ; None outside git."""
    git = ["git", "-C", str(Path.cwd())]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5
        )
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if head.returncode:
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")
