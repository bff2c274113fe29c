"""One command as several processes on this machine, which end as one; the others say nothing."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from lmplay.errors import BAD_INPUT, LOCKED, UserError
from lmplay.machine import num_cores

GRACE_SECONDS = 10.0  # that the others get to end by themselves once one has failed


def refuse_missing_gpus(num: int, device: str) -> None:
    """Raise a UserError unless there are `num` GPUs and `device` does not say otherwise."""
    if device not in ("auto", "cuda"):
        problem = f"--gpus {num} and --device {device} are two answers"
        raise UserError(problem, hint="--gpus alone takes the first of them")
    import torch  # counted without starting CUDA, which the processes do themselves

    seen = torch.cuda.device_count()
    if num > seen:
        raise UserError(
            f"--gpus {num}: torch sees {seen} CUDA devices here",
            hint=f"--gpus {seen} takes all of them"
            if seen
            else "without --gpus, one device is used",
        )


def launch(command: list[str], num: int) -> int:
    """Run a command in `num` processes that torch and accelerate take for one group.

    Only the first one is heard, unless another fails alone. SIGINT, SIGTERM, SIGHUP and SIGUSR1
    are passed on, once each. Whoever waits for a process that has failed is killed.

    Returns:
        The exit code: of the first process where it says why it ended, else of whichever failed
        first; 128 + the signal's number where a signal killed it.
    """
    threads = str(max(1, num_cores() // num))
    shared = {
        "WORLD_SIZE": str(num),
        "LOCAL_WORLD_SIZE": str(num),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
    }
    workers: list[subprocess.Popen] = []
    before = {number: _pass_on(number, workers) for number in _signals()}
    with TemporaryDirectory() as folder:
        try:
            for rank in range(num):
                env = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                workers.append(_start(command, env, _said(folder, rank) if rank else None))
            failed = _wait(workers)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
            for number, handler in before.items():
                signal.signal(number, handler)
        codes = [_exit_code(worker) for worker in workers]
        if failed is None or BAD_INPUT <= codes[0] <= LOCKED or codes[0] in (130, 143):
            return codes[0]
        if failed:
            sys.stderr.write(f"process {failed} of {num} failed:\n")
            sys.stderr.write(_said(folder, failed).read_text(errors="replace"))
        return codes[failed]


def _start(command: list[str], env: dict[str, str], said: Path | None) -> subprocess.Popen:
    """A session of its own keeps the terminal's Ctrl-C from reaching it twice."""
    if said is None:
        return subprocess.Popen(command, env=env, start_new_session=True)
    with said.open("wb") as file:
        return subprocess.Popen(
            command, env=env, start_new_session=True, stdout=subprocess.DEVNULL, stderr=file
        )


def _wait(workers: list[subprocess.Popen]) -> int | None:
    """The rank of the process that failed first; None if all ended well."""
    failed, deadline = None, float("inf")
    while any(worker.poll() is None for worker in workers):
        failing = [rank for rank, worker in enumerate(workers) if worker.poll()]
        if failed is None and failing:
            failed, deadline = failing[0], time.monotonic() + GRACE_SECONDS
        if time.monotonic() > deadline:
            return failed
        time.sleep(0.05)
    failing = [rank for rank, worker in enumerate(workers) if worker.poll()]
    return failed if failed is not None or not failing else failing[0]


def _signals() -> list[int]:
    wanted = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        wanted.append(signal.SIGHUP)
    return wanted


def _pass_on(number: int, workers: list[subprocess.Popen]):
    """From now on the workers get this signal; the handler of before."""

    def handler(*_):
        for worker in workers:
            worker.send_signal(number)  # nothing happens to one that has ended

    return signal.signal(number, handler)


def _said(folder: str, rank: int) -> Path:
    return Path(folder) / str(rank)


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def _exit_code(worker: subprocess.Popen) -> int:
    return worker.returncode if worker.returncode >= 0 else 128 - worker.returncode
