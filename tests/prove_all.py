"""Prove every bundled name and write the hashes of what passed to proven.json: `make proofs`.

The suite does not make a proof again that stands there, but for an eighth of them each day. What is
remembered in the user's cache is not proved again either.
"""

import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from lmplay.catalog.entry import read_file
from lmplay.model.experiment import load_experiment
from lmplay.proofs.proof_cache import mark
from lmplay.proofs.tiny import checked, depends_on

ROOT = Path(__file__).parent.parent


def proven(path: Path) -> list[str]:
    """The marks of a file's names whose proofs all hold."""
    marks = []
    for experiment in map(load_experiment, read_file(path)):
        failed = [proof for proof in checked(experiment) if proof.passed is False]
        for proof in failed:
            print(f"{experiment.name}: {proof.name}: {proof.detail}", flush=True)
        if not failed:
            marks.append(mark(depends_on(experiment)))
    return marks


def main() -> None:
    paths = sorted((ROOT / "experiments").glob("[!_]*.py"))
    with ProcessPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        marks = sorted(mark for marks in pool.map(proven, paths) for mark in marks)
    (ROOT / "tests" / "proven.json").write_text(json.dumps(marks, indent=0) + "\n")
    print(f"{len(marks)} names are proven")


if __name__ == "__main__":
    main()
